"""The sections of one run's page: what each shows of the run's facts, and in which words."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field

import pandas as pd

from icl.config import flatten
from icl.evaluation import headlines
from icl.plotting.curves import plot_curves
from icl.report.facts import SUBJECTS, RunFacts, Subject, subject_of
from icl.report.findings import PREDICTORS, changed_settings, show_setting
from icl.report.pictures import Picture, draw
from icl.report.tables import (
    MAX_WHOLE,
    Cell,
    Table,
    count_verdicts,
    doubtful,
    show,
    summarise,
    table_of,
    whole,
    with_error,
)
from icl.sampling.records import RENAMED_COLUMNS

MAX_LOG_LINES = 60
_LLC_COLUMNS = (
    *(
        "step",
        "settings",
        "mode",
        "rescale",
        "llc",
        "stderr",
        "bias_bound",
        "drop_at_mean",
        "init_loss",
        "mean_loss",
        "rhat",
        "ess",
    ),
    *("num_chains_used", "nbeta", "localization", "lr", "num_draws", "verdict", "reasons"),
)
_SETS = {"pretrain": "the training tasks", "true": "new tasks, w ~ N(0, I)"}
_READING = {
    "training": "Losses are squared errors per target, not divided by D. Ridge is the best predictor for infinitely many tasks, "
    "dMMSE for the M training tasks; OLS has no finite mean loss where the examples number D - 1 to D + 1.",
    "evaluation": "The last step, means over positions, or the query alone where a shift is about it; ± one standard error. delta: "
    "mean squared distance between the transformer's predictions and the predictor's.",
    "llc": "Read an estimate with its verdict: what is not ok says why.",
}


@dataclass(frozen=True, kw_only=True)
class Section:
    """One part of a run's page."""

    id: str
    title: str
    text: str = ""
    notes: list[str] = field(default_factory=list)
    verdicts: dict[str, int] = field(default_factory=dict)
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    folded: list[Table] = field(default_factory=list)
    commands: list[tuple[str, str]] = field(default_factory=list)
    """What a command would add, and the command."""
    log: str = ""


def run_sections(facts: RunFacts, prefix: str, *, max_rows: int = MAX_WHOLE) -> list[Section]:
    """All sections of a run; `prefix` begins their ids, `max_rows` limits the folded tables."""
    known = {subject.name: subject for subject in SUBJECTS}
    found = {subject_of(name).name: subject_of(name) for name in (*facts.tables, *facts.pictures)}
    order = [*(name for name in known if name in found or name == "training"), *sorted(set(found) - set(known))]
    sections = [_settings_section(facts, prefix)]
    for name in order:
        build = _training_section if name == "training" else _subject_section
        sections.append(build(facts, known.get(name) or found[name], prefix, max_rows))
    missing = _missing_section(facts, prefix)
    return [*sections, *([missing] if missing.commands else []), _environment_section(facts, prefix)]


def _settings_section(facts: RunFacts, prefix: str) -> Section:
    if facts.config is None:
        return Section(
            id=f"{prefix}settings", title="Settings", text="They are not known, as config.yaml cannot be read."
        )
    name, changed = facts.config.preset, changed_settings(facts)
    tables = []
    if changed:
        rows = [[key, show_setting(own), show_setting(base)] for key, (own, base) in changed.items()]
        tables = [table_of(rows, ["setting", "this run", f"preset {name}"], caption="What differs from the preset")]
    every = [[key, show_setting(value)] for key, value in flatten(facts.config.to_dict()).items()]
    text = f"Of the preset {name}, changed as below." if changed else f"All settings are those of the preset {name}."
    folded = [table_of(every, ["setting", "value"], caption="All settings")]
    return Section(id=f"{prefix}settings", title="Settings", text=text, tables=tables, folded=folded)


def _training_section(facts: RunFacts, subject: Subject, prefix: str, max_rows: int) -> Section:
    section = _subject_section(facts, subject, prefix, max_rows)
    pictures, tables, notes = section.pictures, [], list(section.notes)
    losses = facts.tables.get("losses")
    if losses is not None and {"distribution", "position", "model"} <= set(losses):
        tables = list(_position_tables(losses))
    else:
        notes.append("Losses at each position come with the end of training.")
    if facts.metrics is not None and not pictures:
        caption = "the losses so far"
        pictures = [
            draw(
                plot_curves({facts.name: facts.metrics}, title=facts.name),
                alt=f"Loss curves of the run {facts.name}",
                caption=caption,
            )
        ]
    folded = list(section.folded)
    if facts.metrics is not None:
        folded.append(whole(facts.metrics, caption="The learning curves", file="metrics.csv", max_rows=max_rows))
    return dataclasses.replace(section, pictures=pictures, tables=tables, folded=folded, notes=notes)


def _position_tables(losses: pd.DataFrame) -> Iterator[Table]:
    """Loss at each position on the training tasks, then on new ones."""
    for name, title in _SETS.items():
        own = losses[losses["distribution"] == name]
        shown = [key for key in PREDICTORS if key in own and own[key].notna().any()]
        if own.empty:
            continue
        numeric = own[shown].apply(pd.to_numeric, errors="coerce")
        ratio = numeric["model"] / numeric["ridge"] if {"model", "ridge"} <= set(shown) else None
        rows = [
            [
                Cell(text=str(position)),
                *row,
                *([] if ratio is None else [Cell(text=f"{ratio.iloc[place]:.3f}", is_number=True)]),
            ]
            for place, (position, row) in enumerate(zip(own["position"], numeric.to_numpy().tolist(), strict=True))
        ]
        header = ["position", *(PREDICTORS[key] for key in shown), *([] if ratio is None else ["transformer / ridge"])]
        yield table_of(rows, header, caption=f"Loss at each position, {title}")


def _subject_section(facts: RunFacts, subject: Subject, prefix: str, max_rows: int) -> Section:
    """Figures, a summary of each table, and the tables themselves, folded."""
    own = {name: table for name, table in facts.tables.items() if subject_of(name).name == subject.name}
    own = {name: own[name] for name in sorted(own, key=lambda name: (name != subject.name, name))}
    pictures = [picture for name, picture in facts.pictures.items() if subject_of(name).name == subject.name]
    verdicts: dict[str, int] = {}
    tables: list[Table] = []
    folded: list[Table] = []
    for name, table in own.items():
        counts = count_verdicts(table)
        verdicts |= {word: verdicts.get(word, 0) + count for word, count in counts.items()}
        tables += _summary(facts, name, table)
        if counts.keys() - {"ok"}:
            doubts = doubtful(table)
            folded.append(
                whole(
                    doubts,
                    caption=f"{name}: rows in doubt",
                    file=f"results/{name}.csv whose verdict is not ok",
                    max_rows=max_rows,
                )
            )
        folded.append(whole(table, caption=f"{name}: the table", file=f"results/{name}.csv", max_rows=max_rows))
    text = _READING.get(subject.name) or (subject.help[:1].upper() + subject.help[1:] + ".")
    return Section(
        id=f"{prefix}{_as_id(subject.name)}",
        title=subject.title,
        text=text,
        verdicts=verdicts,
        pictures=pictures,
        tables=tables,
        folded=folded,
    )


def _summary(facts: RunFacts, name: str, table: pd.DataFrame) -> list[Table]:
    """A table in brief; nothing for those that another one tells."""
    if name == "evaluation" and {"step", "distribution", "quantity", "position", "value", "stderr"} <= set(table):
        return [_evaluation_table(table, facts.tables.get("baselines"))]
    if name in ("baselines", "losses", "llc-positions"):
        return []
    if name == "llc":
        return summarise(table.rename(columns=RENAMED_COLUMNS), caption="llc in brief", columns=_LLC_COLUMNS)
    return summarise(table, caption=f"{name} in brief")


def _evaluation_table(numbers: pd.DataFrame, baselines: pd.DataFrame | None) -> Table:
    """The last step: a row for each distribution, the losses first."""
    last = headlines(numbers[numbers["step"] == numbers["step"].max()])
    ridge: dict[str, float] = {}
    if baselines is not None and {"distribution", "quantity", "position", "value"} <= set(baselines):
        own = headlines(baselines[baselines["quantity"] == "ridge"])
        ridge = dict(zip(own["distribution"], own["value"], strict=True))
    quantities = list(dict.fromkeys(last["quantity"]))
    at = {(row["distribution"], row["quantity"]): row for row in last.to_dict("records")}
    rows = []
    for name in dict.fromkeys(last["distribution"]):
        cells: list[Cell | str | float | None] = [str(name)]
        for quantity in quantities:
            row = at.get((name, quantity))
            cells.append(
                Cell(text=show(None) if row is None else with_error(row["value"], row["stderr"]), is_number=True)
            )
        loss = at.get((name, "loss"))
        known = loss is not None and bool(ridge.get(name))
        cells.insert(
            2, Cell(text=f"{loss['value'] / ridge[name]:.3g}" if known and loss else show(None), is_number=True)
        )
        rows.append(cells)
    header = [*(quantity.replace("_", " ") for quantity in quantities)]
    header.insert(1, "loss / ridge's")
    step = show(int(numbers["step"].max()))
    return table_of(
        rows, ["distribution", *header], caption=f"Step {step}, the last of {numbers['step'].nunique()} saved"
    )


def _missing_section(facts: RunFacts, prefix: str) -> Section:
    """What there is not yet, and the commands that make it."""
    there = {subject_of(name).name for name in facts.tables}
    missing = [subject for subject in SUBJECTS if subject.command and subject.name not in there]
    commands = [(f"{subject.title}: {subject.help}", facts.command(subject.command)) for subject in missing]
    if sum("--what" in subject.command for subject in missing) > 1:
        commands.append(("All analyses at once", facts.command("icl analyse RUN --what all")))
    if commands:
        commands.append(("This page again, with what has been added", facts.command("icl report RUN")))
    text = "Not measured for this run, with the command that would."
    if not facts.saved_steps:
        text += (
            " These need checkpoints, and the folder holds none; icl checkpoints RUN pull fetches them from a store."
        )
    return Section(id=f"{prefix}missing", title="What is missing", text=text, commands=commands)


def _environment_section(facts: RunFacts, prefix: str) -> Section:
    starts = facts.environments
    tables = []
    if starts:
        keys = list(dict.fromkeys(key for _, about in starts for key in about))
        rows = [[key, *(about.get(key, show(None)) for _, about in starts[-3:])] for key in keys]
        header = ["", *(f"started {when}" for when, _ in starts[-3:])]
        tables = [table_of(rows, header, caption="What it was trained with")]
        text = "" if len(starts) <= 3 else f"The last 3 of {len(starts)} starts."
    else:
        text = "run.log does not say with which versions, on which machine and by which command the run was trained."
    lines = facts.log.splitlines()
    log = "\n".join(lines[-MAX_LOG_LINES:])
    return Section(id=f"{prefix}environment", title="Environment", text=text, tables=tables, log=log)


def _as_id(name: str) -> str:
    return "".join(
        letter if letter.isascii() and letter.isalnum() else f"-{ord(letter):x}-" if letter != "-" else "-"
        for letter in name
    )
