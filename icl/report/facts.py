"""Read the files of a run's folder that the page uses, and collect a message for each file that cannot be read."""

import shlex
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from icl.analysis import ANALYSES
from icl.config import RunConfig
from icl.config.validation import ConfigError
from icl.files.reading import ContentError, read_bytes
from icl.files.tables import read_table
from icl.report.pictures import Picture, PictureError, embed
from icl.runs.checkpoints import list_steps
from icl.runs.contents import describe_altered_rows
from icl.runs.environment import environments_of
from icl.runs.folder import RunFolder
from icl.runs.status import Status
from icl.store.base import LocalStore


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A topic of a run's page: tables and figures whose names begin with the same word."""

    name: str
    title: str
    help: str
    command: str
    """The command that makes the tables and figures, with RUN in place of the run's folder; empty if there is no command."""
    tables: tuple[str, ...] = ()
    """Tables that belong to the topic although their names begin with another word."""
    needs_finite_tasks: bool = False
    """Whether the command needs a run with a finite M."""
    needs_density: bool = False
    """Whether the command needs a model with a predictive distribution."""
    families: tuple[str, ...] = ("regression", "language")
    """Values of `model.family` for which the command is available."""


SUBJECTS = (
    Subject(
        name="training",
        title="Training",
        help="losses during training, and the final losses at each position, compared with the optimal predictors",
        command="",
        tables=("losses",),
    ),
    Subject(
        name="evaluation",
        title="Evaluation",
        help="losses and gaps to the Bayes-optimal predictors, in and out of distribution",
        command="icl evaluate RUN",
        tables=("baselines",),
    ),
    Subject(
        name="llc",
        title="Local learning coefficient",
        help="the local learning coefficient at saved steps, with verdicts",
        command="icl llc RUN",
    ),
    *(
        Subject(
            name=name,
            title=name.replace("-", " ").capitalize(),
            help=about.help,
            command=f"icl analyse RUN --what {name}",
            needs_finite_tasks=about.needs_finite_tasks,
            needs_density=about.needs_density,
            families=about.families,
        )
        for name, about in ANALYSES.items()
        if about.of == "run"
    ),
)


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """All contents of a run's folder that the page uses."""

    folder: RunFolder
    name: str
    config: RunConfig | None
    status: Status | None
    log: str
    metrics: pd.DataFrame | None
    tables: dict[str, pd.DataFrame]
    """Tables in `results/` with at least one row. The keys are the names of the tables."""
    pictures: dict[str, Picture]
    """Figures in `figures/`. The keys are the names of the figures."""
    saved_steps: list[int]
    problems: list[str]
    """A message for each file that could not be read or shown."""

    @property
    def environments(self) -> list[tuple[str, dict[str, str]]]:
        """Time and environment of every start of the training, from the run's log."""
        return environments_of(self.log)

    def command(self, template: str) -> str:
        """Return a command with this run's folder in place of RUN."""
        return template.replace("RUN", shlex.quote(str(self.folder.path)))


def read_run(name: str, folder: RunFolder) -> RunFacts:
    """Read all files of a run's folder that can be read."""
    problems: list[str] = []
    config = _read_config(folder, problems)
    status = folder.read_status()
    if status is None:
        problems.append("status.json is missing or damaged, so the state of the run is unknown.")
    if altered := describe_altered_rows(folder):
        problems.append(altered)
    links = LocalStore(folder.path).links_out()
    if links:
        problems.append(f"Symbolic links that lead out of the run's folder are left out: {', '.join(links)}.")
    tables = {file.stem: _read_table(file, problems) for file in _files(folder.results, "csv", folder.path)}
    pictures = {file.stem: _read_picture(file, name, problems) for file in _files(folder.figures, "png", folder.path)}
    others = [
        file.name for file in folder.figures.glob("*") if file.suffix in (".pdf", ".svg") and file.stem not in pictures
    ]
    if others:
        problems.append(f"Only PNG figures are shown; left out: {', '.join(sorted(others))}.")
    return RunFacts(
        folder=folder,
        name=name,
        config=config,
        status=status,
        log=_read_log(folder),
        metrics=_read_table(folder.metrics_file, problems),
        tables={stem: table for stem, table in tables.items() if table is not None},
        pictures={stem: picture for stem, picture in pictures.items() if picture is not None},
        saved_steps=list_steps(folder.checkpoints) if folder.checkpoints.root.is_dir() else [],
        problems=problems,
    )


def subject_of(name: str) -> Subject:
    """Return the topic of a table or figure. The beginning of the name determines the topic.

    For an unknown name, return a new topic.
    """
    subjects = [
        subject
        for subject in SUBJECTS
        if name == subject.name or name.startswith(f"{subject.name}-") or name in subject.tables
    ]
    if subjects:
        return max(subjects, key=lambda subject: len(subject.name))
    return Subject(name=name, title=name.replace("-", " ").replace("_", " ").capitalize(), help=name, command="")


def _read_config(folder: RunFolder, problems: list[str]) -> RunConfig | None:
    try:
        return folder.read_config()
    except ConfigError as error:
        problems.append(f"config.yaml cannot be read, so the settings are unknown: {error}")
        return None


def _read_table(file: Path, problems: list[str]) -> pd.DataFrame | None:
    """Read a table. If it has no rows or cannot be read, add a message to `problems` and return None."""
    name = file.name if file.parent.name != "results" else f"results/{file.name}"
    try:
        table = read_table(file)
    except FileNotFoundError:
        problems.append(f"There is no {name}.")
        return None
    except (OSError, ContentError) as error:
        problems.append(f"{name} is damaged or empty and is left out ({_cause(error)}).")
        return None
    if table.empty:
        problems.append(f"{name} has no rows yet.")
        return None
    return table


def _read_picture(file: Path, run: str, problems: list[str]) -> Picture | None:
    """Read a figure. If it cannot be shown, add a message to `problems` and return None."""
    caption = subject_of(file.stem).help
    alt = f"Figure {file.stem} of the run {run}: {caption}"
    try:
        return embed(read_bytes(file, limit=None), alt=alt, caption=caption, file=f"figures/{file.name}")
    except (PictureError, ContentError, OSError) as error:
        problems.append(f"figures/{file.name} is left out: {_cause(error)}.")
        return None


def _read_log(folder: RunFolder) -> str:
    try:
        return read_bytes(folder.log_file, limit=None).decode(errors="replace")
    except (ContentError, OSError):
        return ""


def _files(folder: Path, suffix: str, run: Path) -> list[Path]:
    """Return the files with a suffix in one folder of a run.

    Links to files outside the run's folder are left out. Files outside the folder are not part of the run, and a published page
    would reveal their content.
    """
    files = (file for file in folder.glob(f"*.{suffix}") if file.is_file() and not file.name.startswith("."))
    return sorted(file for file in files if file.resolve().is_relative_to(run.resolve()))


def _cause(error: Exception) -> str:
    """Return the first line of an exception's message, without a full stop."""
    text = (error.strerror if isinstance(error, OSError) else None) or (str(error).splitlines() or [""])[0]
    return (text or type(error).__name__).strip().rstrip(".")
