"""The sections of one run's page, with their texts, figures and tables."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field

import pandas as pd

from icl.evaluation.scores import EXCESS, headlines
from icl.plotting.curves import plot_curves
from icl.plotting.style import select
from icl.presets import PRESETS
from icl.report.facts import SUBJECTS, RunFacts, Subject, subject_of
from icl.report.findings import PREDICTORS, changed_settings, show_setting
from icl.report.pictures import Picture, draw
from icl.report.tables import (
    MAX_WHOLE,
    MISSING,
    Cell,
    Table,
    count_verdicts,
    not_ok,
    number_cell,
    show,
    summarise,
    table_of,
    whole,
    with_error,
)
from icl.sampling.records import RENAMED_COLUMNS

MAX_LOG_LINES = 60
_MAX_STARTS = 3
_LLC_COLUMNS = (
    "step", "settings", "mode", "rescale", "llc", "stderr", "bias_bound", "drop_at_mean", "init_loss", "mean_loss", "rhat", "ess",
    "num_chains_used", "nbeta", "localization", "lr", "num_draws", "verdict", "reasons",
)  # fmt: skip
_SETS = {"pretrain": "the training tasks", "true": "new tasks", "test": "the test rows"}
_OF_LANGUAGE = {
    "training": "Losses are in nats per token, on rows that were not used for training. The columns unigrams and bigrams show the loss of "
    "predicting the next token from the frequencies of tokens, or of pairs of tokens, in the training text.",
    "evaluation": "The numbers are from the last step, ± one standard error. Losses are in nats per token, averaged over positions.",
}
"""Explanations of sections for language runs. The other sections use `_EXPLANATIONS`."""
_EXPLANATIONS = {
    "training": "Losses are squared errors per target, not divided by D. The Bayes predictor is dMMSE on the training "
    "tasks if M is finite. Otherwise it is ridge, or another predictor if the tasks or the noise are not Gaussian. "
    "OLS has no finite mean loss after D - 1, D or D + 1 examples. The last column is the transformer's loss minus the "
    "loss of the Bayes predictor on the same prompts, ± one standard error of this difference. The tables and the "
    "learning curves use different prompts. So early stopping does not make the losses in the tables too low. "
    "Reports of version 0.1.0 used the same prompts for both, and their tables do not have the last column.",
    "evaluation": "The numbers are from the last step, ± one standard error. They are means over positions. For "
    "shifts that are about the query, the numbers are for the last position. "
    "delta ridge and delta dmmse are the gaps to ridge and dMMSE: "
    "the mean squared difference between the predictions of the transformer and of ridge or dMMSE. bayes excess is the transformer's loss "
    "minus the loss of the Bayes predictor on the same prompts. The Bayes predictor is dMMSE on the training tasks if "
    "M is finite. Otherwise it is ridge, or another predictor if the tasks or the noise are not Gaussian.",
    "llc": "Each estimate has a verdict. If the verdict is not ok, the column reasons says why.",
}


@dataclass(frozen=True, kw_only=True)
class Section:
    """A section of a run's page."""

    id: str
    title: str
    text: str = ""
    notes: list[str] = field(default_factory=list)
    verdicts: dict[str, int] = field(default_factory=dict)
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    folded: list[Table] = field(default_factory=list)
    """Tables that are collapsed until the reader opens them."""
    commands: list[tuple[str, str]] = field(default_factory=list)
    """Pairs of a missing result and the command that computes it."""
    log: str = ""


def run_sections(facts: RunFacts, prefix: str, *, max_rows: int = MAX_WHOLE) -> list[Section]:
    """Return all sections of a run.

    Args:
        facts: The contents of the run's folder.
        prefix: Beginning of the sections' ids. It must be different for each run.
        max_rows: Largest number of rows that a collapsed table shows; longer tables are shortened.
    """
    subjects = {subject.name: subject for subject in map(subject_of, (*facts.tables, *facts.pictures))}
    known = [subject for subject in SUBJECTS if subject.name in subjects or subject.name == "training"]
    unknown = [subjects[name] for name in sorted(subjects.keys() - {subject.name for subject in SUBJECTS})]
    sections = [_settings_section(facts, prefix)]
    for subject in known + unknown:
        build = _training_section if subject.name == "training" else _subject_section
        sections.append(build(facts, subject, prefix, max_rows))
    missing = _missing_section(facts, prefix)
    return [*sections, *([missing] if missing.commands else []), _environment_section(facts, prefix)]


def _settings_section(facts: RunFacts, prefix: str) -> Section:
    name = f"{prefix}settings"
    if facts.config is None:
        return Section(id=name, title="Settings", text="The settings are unknown, because config.yaml cannot be read.")
    preset, changed = facts.config.preset, changed_settings(facts)
    tables, text = [], f"All settings are from the preset {preset}."
    if preset not in PRESETS:
        text = (
            f"This version of icl does not know the preset {preset}, so the run's settings cannot be compared with it."
        )
    if changed:
        text = f"The settings are from the preset {preset}, with the changes below."
        rows = [[key, show_setting(value), show_setting(default)] for key, (value, default) in changed.items()]
        tables = [table_of(rows, ["setting", "this run", f"preset {preset}"], caption="Changes from the preset")]
    every = [[key, show_setting(value)] for key, value in facts.config.all_settings().items()]
    folded = [table_of(every, ["setting", "value"], caption="All settings")]
    return Section(id=name, title="Settings", text=text, tables=tables, folded=folded)


def _training_section(facts: RunFacts, subject: Subject, prefix: str, max_rows: int) -> Section:
    section = _subject_section(facts, subject, prefix, max_rows)
    pictures, tables, notes, folded = section.pictures, [], list(section.notes), list(section.folded)
    losses = facts.tables.get("losses")
    if losses is not None and {"distribution", "position", "model"} <= set(losses):
        tables = list(_position_tables(losses))
    else:
        notes.append("The losses at each position will be shown here when training has ended.")
    if facts.metrics is not None:
        if not pictures:
            figure = plot_curves({facts.name: facts.metrics}, title=facts.name)
            pictures = [draw(figure, alt=f"Loss curves of the run {facts.name}", caption="the losses so far")]
        folded.append(whole(facts.metrics, caption="The learning curves", file="metrics.csv", max_rows=max_rows))
    return dataclasses.replace(section, pictures=pictures, tables=tables, folded=folded, notes=notes)


def _position_tables(losses: pd.DataFrame) -> Iterator[Table]:
    """Yield a table of the losses at each position, for each distribution in `losses`."""
    for distribution, title in _SETS.items():
        rows = select(losses, distribution=distribution)
        columns = [key for key in PREDICTORS if key in rows and rows[key].notna().any()]
        if rows.empty:
            continue
        numbers = rows[columns].apply(pd.to_numeric, errors="coerce")
        header = ["position", *(PREDICTORS[key] for key in columns)]
        cells = [
            [Cell(text=str(position)), *row]
            for position, row in zip(rows["position"], numbers.to_numpy().tolist(), strict=True)
        ]
        if {"model", "ridge"} <= set(columns):
            header.append("transformer / ridge")
            for row, ratio in zip(cells, numbers["model"] / numbers["ridge"], strict=True):
                row.append(number_cell(f"{ratio:.3f}"))
        if set(EXCESS) <= set(rows):
            header.append("above the Bayes predictor")
            excess = rows[list(EXCESS)].apply(pd.to_numeric, errors="coerce").to_numpy().tolist()
            for row, (value, stderr) in zip(cells, excess, strict=True):
                row.append(number_cell(with_error(value, stderr)))
        yield table_of(cells, header, caption=f"Loss at each position, {title}")


def _subject_section(facts: RunFacts, subject: Subject, prefix: str, max_rows: int) -> Section:
    """Return the section on one topic: its figures, a summary of each table, and the whole tables, which are collapsed."""
    tables: list[Table] = []
    folded: list[Table] = []
    verdicts: dict[str, int] = {}
    names = [name for name in facts.tables if subject_of(name).name == subject.name]
    for name in sorted(names, key=lambda name: (name != subject.name, name)):
        table, file = facts.tables[name], f"results/{name}.csv"
        counts = count_verdicts(table)
        verdicts |= {verdict: verdicts.get(verdict, 0) + count for verdict, count in counts.items()}
        tables += _summary(facts, name, table)
        if counts.keys() - {"ok"}:
            caption = f"{name}: rows with a verdict other than ok"
            folded.append(whole(not_ok(table), caption=caption, file=f"{file} (verdict not ok)", max_rows=max_rows))
        folded.append(whole(table, caption=f"{name}: whole table", file=file, max_rows=max_rows))
    return Section(
        id=f"{prefix}{_as_id(subject.name)}",
        title=subject.title,
        text=_explanation(facts, subject) or f"{subject.help[:1].upper()}{subject.help[1:]}.",
        verdicts=verdicts,
        pictures=[picture for name, picture in facts.pictures.items() if subject_of(name).name == subject.name],
        tables=tables,
        folded=folded,
    )


def _explanation(facts: RunFacts, subject: Subject) -> str:
    is_language = facts.config is not None and facts.config.model.is_language
    return (_OF_LANGUAGE.get(subject.name, "") if is_language else "") or _EXPLANATIONS.get(subject.name, "")


def _summary(facts: RunFacts, name: str, table: pd.DataFrame) -> list[Table]:
    """Return the summary of a table, or an empty list for a table without a summary.

    Without a summary, the section shows the numbers in another form, or only in the whole table.
    """
    columns = {"step", "distribution", "quantity", "position", "value", "stderr"}
    if name == "evaluation" and columns <= set(table) and table["step"].notna().any():
        return [_evaluation_table(table, facts.tables.get("baselines"))]
    if name in ("baselines", "losses", "llc-positions"):
        return []
    if name == "llc":
        return summarise(table.rename(columns=RENAMED_COLUMNS), caption="llc: summary", columns=_LLC_COLUMNS)
    return summarise(table, caption=f"{name}: summary")


def _evaluation_table(numbers: pd.DataFrame, baselines: pd.DataFrame | None) -> Table:
    """Return a table of the last step, with a row for each distribution and a column for each quantity; the loss comes first."""
    last = headlines(select(numbers, step=numbers["step"].max()))
    ridge: dict[str, float] = {}
    if baselines is not None and {"distribution", "quantity", "position", "value"} <= set(baselines):
        losses = headlines(select(baselines, quantity="ridge"))
        ridge = dict(zip(losses["distribution"], losses["value"], strict=True))
    records = {(row["distribution"], row["quantity"]): row for row in last.to_dict("records")}
    quantities = list(last["quantity"].unique())
    rows = []
    for distribution in last["distribution"].unique():
        cells = []
        for quantity in quantities:
            row = records.get((distribution, quantity))
            cells.append(number_cell(MISSING if row is None else with_error(row["value"], row["stderr"])))
        loss = records.get((distribution, "loss"))
        ratio = (
            f"{loss['value'] / ridge[distribution]:.3g}" if loss is not None and ridge.get(distribution) else MISSING
        )
        rows.append([str(distribution), *cells[:1], number_cell(ratio), *cells[1:]])
    first, *others = (quantity.replace("_", " ") for quantity in quantities)
    caption = f"Step {show(int(numbers['step'].max()))}, the last of {numbers['step'].nunique()} saved steps"
    return table_of(rows, ["distribution", first, "loss / ridge's loss", *others], caption=caption)


def _missing_section(facts: RunFacts, prefix: str) -> Section:
    """Return the section that lists missing results, with the commands that compute them."""
    measured = {subject_of(name).name for name in facts.tables}
    missing = [
        subject for subject in SUBJECTS if subject.command and subject.name not in measured and _applies(subject, facts)
    ]
    commands = [(f"{subject.title}: {subject.help}", facts.command(subject.command)) for subject in missing]
    if sum("--what" in subject.command for subject in missing) > 1:
        commands.append(("All analyses at once", facts.command("icl analyse RUN --what all")))
    if commands:
        commands.append(("This page, updated with the new results", facts.command("icl report RUN")))
    text = "These results have not been computed for this run. Each line shows the command that computes one of them."
    if not facts.saved_steps:
        text += " The commands need checkpoints, but there are none in the folder. To fetch them from a store, run icl checkpoints RUN pull."
    return Section(id=f"{prefix}missing", title="Missing results", text=text, commands=commands)


def _applies(subject: Subject, facts: RunFacts) -> bool:
    """Return whether the command of a topic can be used for this run."""
    if facts.config is None:
        return True
    if facts.config.model.family not in subject.families:
        return False
    has_needs = not (subject.needs_finite_tasks and facts.config.task.is_gaussian)
    return has_needs and (facts.config.model.has_density or not subject.needs_density)


def _environment_section(facts: RunFacts, prefix: str) -> Section:
    """Return the section with the versions, machine and command of the most recent starts of training, and the end of the log."""
    starts = facts.environments
    shown = starts[-_MAX_STARTS:]
    text = f"The last {_MAX_STARTS} of the run's {len(starts)} starts are shown." if len(starts) > _MAX_STARTS else ""
    if not starts:
        text = "run.log does not contain the versions, the machine or the command of the training."
    keys = dict.fromkeys(key for _, environment in starts for key in environment)
    rows = [[key, *(environment.get(key, MISSING) for _, environment in shown)] for key in keys]
    header = ["", *(f"started {when}" for when, _ in shown)]
    tables = [table_of(rows, header, caption="Environment of the training")] if starts else []
    log = "\n".join(facts.log.splitlines()[-MAX_LOG_LINES:])
    return Section(id=f"{prefix}environment", title="Environment", text=text, tables=tables, log=log)


def _as_id(name: str) -> str:
    """Return a name as a part of an HTML id: characters other than ASCII letters, digits and hyphens are replaced by their codes."""
    return "".join(
        letter if (letter.isascii() and letter.isalnum()) or letter == "-" else f"-{ord(letter):x}-" for letter in name
    )
