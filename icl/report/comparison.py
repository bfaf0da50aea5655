"""Several runs beside each other: what differs in their settings, how far they are, what they reached."""

import dataclasses
from collections.abc import Sequence

from icl.config import flatten
from icl.plotting.curves import MAX_LABELS, plot_curves
from icl.presets import MEMBER_SEEDS, varying_names
from icl.report.facts import RunFacts
from icl.report.findings import (
    final_losses,
    last_llc,
    llc_verdicts,
    ratios,
    show_setting,
    state_of,
    training_loss,
)
from icl.report.pictures import Picture, draw
from icl.report.tables import NOTHING, Cell, Table, show

_MAX_NAME = 60
"""Letters of a name made of settings; runs that differ in more keep the names of their folders."""
MAX_SETTINGS = 8
"""Columns of settings that differ."""


def with_varying_names(runs: Sequence[RunFacts]) -> list[RunFacts]:
    """Name each run by the settings that differ among the runs, if such names tell them apart and are short."""
    configs = [facts.config for facts in runs if facts.config is not None]
    names = varying_names(configs) if len(configs) == len(runs) else []
    if len(set(names)) < len(runs) or max(map(len, names)) > _MAX_NAME or not all(names):
        return list(runs)
    return [dataclasses.replace(facts, name=name) for facts, name in zip(runs, names, strict=True)]


def comparison_table(runs: Sequence[RunFacts], targets: Sequence[str]) -> Table:
    """A row for each run, linked to its part of the page by the id in `targets`."""
    settings = differing_settings(runs)
    shown = dict(list(settings.items())[:MAX_SETTINGS])
    rows = [
        {
            "run": Cell(text=facts.name, target=target),
            **_standing(facts),
            **{key: Cell(text=values[place], is_number=True) for key, values in shown.items()},
            **_reached(facts),
        }
        for place, (facts, target) in enumerate(zip(runs, targets, strict=True))
    ]
    header = [name for name in rows[0] if any(row[name].text != NOTHING for row in rows)]
    left = list(settings)[MAX_SETTINGS:]
    note = "Settings that are the same in all runs are left out; losses are means over positions, per target."
    note += f" Also different: {', '.join(left)}." if left else ""
    return Table(caption="The runs", header=header, rows=[[row[name] for name in header] for row in rows], note=note)


def comparison_picture(runs: Sequence[RunFacts], title: str) -> Picture | None:
    """The loss curves of all runs that have any."""
    curves = {facts.name: facts.metrics for facts in runs if facts.metrics is not None}
    if not curves:
        return None
    caption = "the loss curves, from the first run (dark) to the last (light)"
    caption += "; too many for names" if len(curves) > MAX_LABELS else ""
    return draw(plot_curves(curves, title=title), alt=f"Loss curves of {len(curves)} runs", caption=caption)


def differing_settings(runs: Sequence[RunFacts]) -> dict[str, list[str]]:
    """The settings that are not the same in all runs, with each run's value."""
    trees = [{} if facts.config is None else flatten(facts.config.to_dict()) for facts in runs]
    keys = dict.fromkeys(key for tree in trees for key in tree if key != "run_name")
    if all(len({tree.get(key) for key in MEMBER_SEEDS}) == 1 for tree in trees):  # a population's seed sets all three
        keys = {"seed" if key == MEMBER_SEEDS[0] else key: None for key in keys if key not in MEMBER_SEEDS[1:]}
        trees = [{**tree, "seed": tree.get(MEMBER_SEEDS[0])} if tree else tree for tree in trees]
    values = {key: [show_setting(tree[key]) if key in tree else NOTHING for tree in trees] for key in keys}
    return {key: own for key, own in values.items() if len(set(own) - {NOTHING}) > 1}


def _standing(facts: RunFacts) -> dict[str, Cell]:
    step = NOTHING if facts.status is None else f"{facts.status.step:,} / {facts.status.max_steps:,}"
    return {"state": Cell(badge=state_of(facts)), "step": Cell(text=step, is_number=True)}


def _reached(facts: RunFacts) -> dict[str, Cell]:
    losses = final_losses(facts)
    cells = {"training loss": Cell(text=show(training_loss(facts), pad=True), is_number=True)}
    for name, title in (("pretrain", "training tasks"), ("true", "new tasks")):
        own = losses.get(name, {})
        known = ratios(own)
        cells[f"loss, {title}"] = Cell(text=show(own.get("model"), pad=True), is_number=True)
        for whose in ("ridge's", "dMMSE's") if name == "pretrain" else ("ridge's",):  # on new tasks dMMSE is no optimum
            text = f"{known[whose]:.3f}" if whose in known else NOTHING
            cells[f"/ {whose}, {title}"] = Cell(text=text, is_number=True)
    cells["LLC, last"] = last_llc(facts) or Cell(text=NOTHING, is_number=True)
    return {**cells, "LLC, all": Cell(text=llc_verdicts(facts) or NOTHING)}
