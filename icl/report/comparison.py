"""The comparison of several runs: the settings in which they differ, their states, losses and LLCs."""

import dataclasses
import math
from collections.abc import Sequence

from icl.analysis.seeds import MIN_FOR_INTERVAL, over_seeds, seed_groups
from icl.plotting.curves import MAX_LABELS, plot_curves
from icl.report.facts import RunFacts
from icl.report.findings import (
    LOSS_SETS,
    final_excess,
    final_losses,
    last_llc,
    llc_verdicts,
    loss_ratios,
    show_setting,
    state_of,
    training_loss,
)
from icl.report.pictures import Picture, draw
from icl.report.tables import MISSING, Cell, Table, number_cell, show, table_of, with_error
from icl.run_names import MEMBER_SEEDS, varying_names

_MAX_NAME_LENGTH = 60
"""Largest length of a name that is made from a run's settings. If any name would be longer, all runs keep the names of their folders."""
MAX_SETTINGS = 8
"""Largest number of settings that have a column in the table."""


def with_varying_names(runs: Sequence[RunFacts]) -> list[RunFacts]:
    """Name each run by the settings in which the runs differ, if all these names are short and different."""
    configs = [facts.config for facts in runs if facts.config is not None]
    names = varying_names(configs) if len(configs) == len(runs) else []
    if len(set(names)) < len(runs) or max(map(len, names)) > _MAX_NAME_LENGTH or not all(names):
        return list(runs)
    return [dataclasses.replace(facts, name=name) for facts, name in zip(runs, names, strict=True)]


def comparison_table(runs: Sequence[RunFacts], targets: Sequence[str]) -> Table:
    """Return a table with a row for each run. The row links to the part of the page about this run; `targets` are the ids of the parts."""
    settings = differing_settings(runs)
    rows = []
    for number, (facts, target) in enumerate(zip(runs, targets, strict=True)):
        step = MISSING if facts.status is None else f"{facts.status.step:,} / {facts.status.max_steps:,}"
        rows.append(
            {
                "run": Cell(text=facts.name, target=target),
                "state": Cell(badge=state_of(facts)),
                "step": number_cell(step),
                **{key: number_cell(values[number]) for key, values in list(settings.items())[:MAX_SETTINGS]},
                **_results(facts),
            }
        )
    header = [name for name in rows[0] if any(row[name].text != MISSING for row in rows)]
    note = (
        "Settings that are the same in all runs are left out. Losses are means over positions, per target. Columns that begin with "
        "'above Bayes' show the loss minus the loss of the Bayes predictor, ± one standard error over prompts."
    )
    if others := list(settings)[MAX_SETTINGS:]:
        note += f" The runs also differ in {', '.join(others)}."
    return Table(caption="The runs", header=header, rows=[[row[name] for name in header] for row in rows], note=note)


def seeds_table(runs: Sequence[RunFacts]) -> Table | None:
    """Return a table with a row for each group of runs that differ only in their seeds; None if there is no such group."""
    configs = {str(facts.folder.path): facts.config for facts in runs if facts.config is not None}
    by_path = {str(facts.folder.path): facts for facts in runs}
    groups = {name: paths for name, paths in seed_groups(configs).items() if len(paths) > 1}
    if not groups:
        return None
    results = {path: _numbers(by_path[path]) for paths in groups.values() for path in paths}
    names = list(dict.fromkeys(name for numbers in results.values() for name in numbers))
    rows = []
    for group, paths in groups.items():
        numbers = [over_seeds(results[path].get(name, math.nan) for path in paths) for name in names]
        rows.append([group, str(len(paths)), *(number_cell(number.text) for number in numbers)])
    table = table_of(rows, ["settings", "seeds", *names], caption="Over seeds")
    note = (
        f"Mean ± one standard error over seeds. With fewer than {MIN_FOR_INTERVAL} seeds, the value of each seed is shown. "
        "For the standard errors over prompts, see the tables of the single runs."
    )
    return dataclasses.replace(table, note=note)


def comparison_picture(runs: Sequence[RunFacts], title: str) -> Picture | None:
    """Draw the loss curves of all runs that have metrics; None if no run has metrics."""
    curves = {facts.name: facts.metrics for facts in runs if facts.metrics is not None}
    if not curves:
        return None
    configs = {facts.name: facts.config for facts in runs if facts.metrics is not None and facts.config is not None}
    groups = seed_groups(configs) if len(configs) == len(curves) else {}
    has_seeds = sum(map(len, groups.values())) == len(curves) > len(groups)
    caption = "loss curves, from the first run (dark) to the last (light)"
    if has_seeds:
        caption = "loss curves: means over seeds (thick) and single seeds (thin), from the first settings (dark) to the last (light)"
    caption += (
        "; there is no legend, because there are too many curves"
        if len(groups if has_seeds else curves) > MAX_LABELS
        else ""
    )
    figure = plot_curves(curves, title=title, groups=groups if has_seeds else None)
    return draw(figure, alt=f"Loss curves of {len(curves)} runs", caption=caption)


def differing_settings(runs: Sequence[RunFacts]) -> dict[str, list[str]]:
    """Return the settings that are not the same in all runs, with the value of each run."""
    trees = [{} if facts.config is None else facts.config.all_settings() for facts in runs]
    keys = dict.fromkeys(key for tree in trees for key in tree if key != "run_name")
    # `population.seeds` sets three seeds at once. If they are equal, show them as one setting.
    if all(len({tree.get(key) for key in MEMBER_SEEDS}) == 1 for tree in trees):
        keys = {"seed" if key == MEMBER_SEEDS[0] else key: None for key in keys if key not in MEMBER_SEEDS[1:]}
        trees = [{**tree, "seed": tree.get(MEMBER_SEEDS[0])} if tree else tree for tree in trees]
    settings = {key: [show_setting(tree[key]) if key in tree else MISSING for tree in trees] for key in keys}
    return {key: values for key, values in settings.items() if len(set(values) - {MISSING}) > 1}


def _numbers(facts: RunFacts) -> dict[str, float]:
    """Return the main numbers of a run, which `seeds_table` averages over seeds."""
    loss = training_loss(facts)
    numbers = {} if loss is None else {"training loss": loss}
    excess = final_excess(facts)
    for distribution, name in LOSS_SETS.items():
        losses = final_losses(facts).get(distribution, {})
        if "model" in losses:
            numbers[f"loss, {name}"] = losses["model"]
        numbers |= {f"/ {predictor}, {name}": ratio for predictor, ratio in loss_ratios(losses, distribution).items()}
        if distribution in excess:
            numbers[f"above Bayes, {name}"] = excess[distribution][0]
    return numbers


def _results(facts: RunFacts) -> dict[str, Cell]:
    cells = {"training loss": number_cell(show(training_loss(facts), pad=True))}
    for distribution, name in LOSS_SETS.items():
        losses = final_losses(facts).get(distribution, {})
        ratios = loss_ratios(losses, distribution)
        cells[f"loss, {name}"] = number_cell(show(losses.get("model"), pad=True))
        for predictor in ("ridge's", "Bayes's", "dMMSE's") if distribution == "pretrain" else ("ridge's", "Bayes's"):
            text = f"{ratios[predictor]:.3f}" if predictor in ratios else MISSING
            cells[f"/ {predictor}, {name}"] = number_cell(text)
        excess = final_excess(facts).get(distribution)
        cells[f"above Bayes, {name}"] = number_cell(MISSING if excess is None else with_error(*excess))
    cells["LLC, last"] = last_llc(facts) or number_cell(MISSING)
    return {**cells, "LLC, all": Cell(text=llc_verdicts(facts) or MISSING)}
