"""Write the report of one or more runs as one HTML file.

The page loads nothing from outside: images are data URIs, the style is part of the page, and there is no script. A
content security policy tells the browser to enforce this.
"""

import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

import jinja2

from icl.files.writing import StorageError, require_writable, write_atomically
from icl.progress import with_progress
from icl.report.comparison import comparison_picture, comparison_table, seeds_table, with_varying_names
from icl.report.facts import RunFacts, read_run
from icl.report.findings import (
    LOSS_SETS,
    describe_run,
    final_losses,
    last_llc,
    llc_verdicts,
    loss_ratios,
    state_of,
    state_sentence,
    training_loss,
)
from icl.report.sections import Section, run_sections
from icl.report.tables import MAX_WHOLE, Cell, cell, look_of
from icl.runs.folder import RunFolder
from icl.runs.listing import named_runs

NAME = "report.html"
_MIN_ROWS = 20
"""Smallest limit on the number of rows of a collapsed table. The limit falls as the number of runs on the page grows."""


@dataclass(frozen=True, kw_only=True)
class RunPart:
    """The part of the page about one run, in the form that the template needs."""

    id: str
    name: str
    description: str
    state: str
    progress: str
    tiles: list[tuple[str, Cell]]
    """Pairs of a label and a main number of the run."""
    problems: list[str]
    sections: list[Section]

    @property
    def look(self) -> str:
        """The colour of the state."""
        return look_of(self.state)


@dataclass(frozen=True, kw_only=True)
class Report:
    """A page that was written."""

    path: Path
    size: int
    """Size in bytes."""
    runs: list[RunFacts]

    @property
    def folder(self) -> RunFolder | None:
        """The run's folder, if the page is `report.html` in this folder and is about one run; otherwise None."""
        run = self.runs[0].folder
        return run if len(self.runs) == 1 and self.path == run.path / NAME else None


def write_report(
    paths: Sequence[str | Path],
    *,
    out: str | Path | None = None,
    reload_seconds: int | None = None,
    shows_progress: bool = True,
) -> Report:
    """Write one page about one or more runs.

    Args:
        paths: Folders of runs, or folders with runs below them.
        out: The file to write. The default is `report.html` in the folder, or in the working directory for several paths.
        reload_seconds: Interval, in seconds, at which a browser loads the page again; None means never.
        shows_progress: Whether to show a progress bar while several runs are read.

    Raises:
        RunError: If a path is not a run and there is no run below it.
        StorageError: If the file's suffix is not .html or .htm, or the file cannot be written.

    Example:
        ```python
        write_report(["runs/quickstart"]).path
        ```
    """
    folders = [Path(path) for path in paths]
    file = Path(out) if out is not None else (folders[0] if len(folders) == 1 else Path()) / NAME
    if file.suffix.lower() not in (".html", ".htm"):
        raise StorageError(f"The file name of the page must end in .html or .htm, got {file}.")
    named = named_runs(folders)
    require_writable(file)
    items = list(named.items())
    facts = [
        read_run(name, folder) for name, folder in (with_progress(items, "reading", "run") if shows_progress else items)
    ]
    is_one = len(folders) == 1 and folders[0].resolve() == facts[0].folder.path.resolve()
    title = facts[0].name if is_one else _title(folders, len(facts))
    data = render(facts, title=title, compare=not is_one, reload_seconds=reload_seconds).encode(
        "utf-8", errors="replace"
    )
    write_atomically(file, data)
    return Report(path=file, size=len(data), runs=facts)


def render(runs: Sequence[RunFacts], *, title: str, compare: bool, reload_seconds: int | None = None) -> str:
    """Return the HTML of the page.

    With `compare`, the page begins with a comparison of the runs. With `reload_seconds`, a browser loads the page again
    at this interval.
    """
    folder_names = [facts.name for facts in runs]
    runs = with_varying_names(runs) if compare else runs
    ids = [f"run-{number}" for number in range(1, len(runs) + 1)]
    max_rows = max(_MIN_ROWS, MAX_WHOLE // len(runs))
    return _template().render(
        title=title,
        time=time.strftime("%Y-%m-%d %H:%M:%S %z"),
        program=f"icl {version('icl')}, Python {platform.python_version()}",
        compare=compare,
        reload_seconds=reload_seconds,
        comparison=comparison_table(runs, ids) if compare else None,
        seeds=seeds_table(runs) if compare else None,
        curves=comparison_picture(runs, title) if compare else None,
        runs=[
            _run_part(facts, name, folder_name, max_rows)
            for facts, name, folder_name in zip(runs, ids, folder_names, strict=True)
        ],
    )


def _run_part(facts: RunFacts, name: str, folder_name: str, max_rows: int) -> RunPart:
    description = describe_run(facts)
    return RunPart(
        id=name,
        name=facts.name,
        description=description if folder_name == facts.name else f"Run {folder_name}. {description}",
        state=state_of(facts),
        progress=state_sentence(facts),
        tiles=_tiles(facts),
        problems=facts.problems,
        sections=run_sections(facts, f"{name}-", max_rows=max_rows),
    )


def _tiles(facts: RunFacts) -> list[tuple[str, Cell]]:
    """Return the main numbers of a run with their labels."""
    tiles = [("Training loss, last batches", cell(training_loss(facts)))]
    for distribution, losses in final_losses(facts).items():
        if name := LOSS_SETS.get(distribution):
            tiles.append((f"Loss on {name}", cell(losses["model"])))
            for predictor, ratio in loss_ratios(losses, distribution).items():
                tiles.append((f"Loss / {predictor} loss, {name}", Cell(text=f"{ratio:.3f}")))
    if estimate := last_llc(facts):
        tiles.append(("LLC, last estimate", estimate))
    if verdicts := llc_verdicts(facts):
        tiles.append(("LLC, all estimates", Cell(text=verdicts)))
    steps = facts.saved_steps
    checkpoints = f"{len(steps):,}, steps {steps[0]:,} to {steps[-1]:,}" if steps else "none in this folder"
    return [*tiles, ("Saved checkpoints", Cell(text=checkpoints))]


def _title(folders: Sequence[Path], count: int) -> str:
    runs = f"{count:,} run" if count == 1 else f"{count:,} runs"
    return f"{runs} in {folders[0].resolve().name}/" if len(folders) == 1 else runs


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html")
