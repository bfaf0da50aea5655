"""From runs to one HTML file: read them, choose their sections, fill the template, write it atomically.

The page asks for nothing outside itself: images are data URIs, the style is inside, there is no script, and a content
security policy says so to the browser.
"""

import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

import jinja2
from tqdm import tqdm

from icl.report.comparison import comparison_picture, comparison_table, with_varying_names
from icl.report.facts import RunFacts, read_run
from icl.report.findings import (
    final_losses,
    last_llc,
    llc_verdicts,
    ratios,
    state_of,
    state_sentence,
    training_loss,
    what_it_is,
)
from icl.report.sections import Section, run_sections
from icl.report.tables import MAX_WHOLE, Cell, cell, look_of
from icl.runs import RunFolder, named_runs
from icl.storage import StorageError, require_writable, write_atomically

NAME = "report.html"
_LEAST_ROWS = 20


@dataclass(frozen=True, kw_only=True)
class RunPart:
    """What the template shows of one run."""

    id: str
    name: str
    about: str
    state: str
    standing: str
    tiles: list[tuple[str, Cell]]
    problems: list[str]
    sections: list[Section]

    @property
    def look(self) -> str:
        """The colour of its state."""
        return look_of(self.state)


@dataclass(frozen=True, kw_only=True)
class Report:
    """A page that was written."""

    path: Path
    size: int
    """In bytes."""
    runs: list[RunFacts]

    @property
    def folder(self) -> RunFolder | None:
        """The run in whose own folder it lies, if it lies in one."""
        run = self.runs[0].folder
        return run if len(self.runs) == 1 and self.path == run.path / NAME else None


def write_report(paths: Sequence[str | Path], *, out: str | Path | None = None) -> Report:
    """Write one page of everything there is for some runs.

    Args:
        paths: Runs' folders, or folders with runs below them.
        out: The file; left out, `report.html` in the folder if it is one, else in the working directory.

    Raises:
        RunError: If a path is no run and has none below it.
        StorageError: If the file is no .html, or cannot be written.

    Example:
        write_report(["runs/quickstart"]).path
    """
    folders = [Path(path) for path in paths]
    file = Path(out) if out is not None else (folders[0] if len(folders) == 1 else Path()) / NAME
    if file.suffix.lower() not in (".html", ".htm"):
        raise StorageError(f"The page is written as .html, got {file}.")
    named = named_runs(folders)
    require_writable(file)
    facts = [
        read_run(name, folder)
        for name, folder in tqdm(named.items(), desc="reading", unit="run", disable=len(named) == 1)
    ]
    is_one = len(folders) == 1 and folders[0].resolve() == facts[0].folder.path.resolve()
    title = facts[0].name if is_one else _title(folders, len(facts))
    data = render(facts, title=title, compare=not is_one).encode("utf-8", errors="replace")
    write_atomically(file, data)
    return Report(path=file, size=len(data), runs=facts)


def render(runs: Sequence[RunFacts], *, title: str, compare: bool) -> str:
    """The page as text; with `compare`, the runs beside each other come first."""
    places = [facts.name for facts in runs]
    runs = with_varying_names(runs) if compare else runs
    ids = [f"run-{number}" for number in range(1, len(runs) + 1)]
    max_rows = max(_LEAST_ROWS, MAX_WHOLE // len(runs))
    return _template().render(
        title=title,
        made=time.strftime("%Y-%m-%d %H:%M:%S %z"),
        maker=f"icl {version('icl')}, Python {platform.python_version()}",
        compare=compare,
        comparison=comparison_table(runs, ids) if compare else None,
        curves=comparison_picture(runs, title) if compare else None,
        runs=[_part(facts, name, place, max_rows) for facts, name, place in zip(runs, ids, places, strict=True)],
    )


def _part(facts: RunFacts, name: str, place: str, max_rows: int) -> RunPart:
    """One run's part; `place` is the name of its folder, told where the run goes by another name."""
    about = what_it_is(facts)
    return RunPart(
        id=name,
        name=facts.name,
        about=about if place == facts.name else f"Run {place}. {about}",
        state=state_of(facts),
        standing=state_sentence(facts),
        tiles=_tiles(facts),
        problems=facts.problems,
        sections=run_sections(facts, f"{name}-", max_rows=max_rows),
    )


def _tiles(facts: RunFacts) -> list[tuple[str, Cell]]:
    """The few numbers that one looks for first."""
    tiles = [("Training loss, last batches", cell(training_loss(facts)))]
    losses = final_losses(facts)
    for name, title in (("pretrain", "training tasks"), ("true", "new tasks")):
        own = losses.get(name)
        if own is None:
            continue
        tiles.append((f"Loss on {title}", cell(own["model"])))
        tiles += [(f"Loss / {whose}, {title}", Cell(text=f"{ratio:.3f}")) for whose, ratio in _told(ratios(own), name)]
    estimate = last_llc(facts)
    if estimate is not None:
        tiles.append(("LLC, last estimate", estimate))
    if verdicts := llc_verdicts(facts):
        tiles.append(("LLC, all estimates", Cell(text=verdicts)))
    steps = facts.saved_steps
    span = f"{len(steps):,}, steps {steps[0]:,} to {steps[-1]:,}" if steps else "none here"
    return [*tiles, ("Saved checkpoints", Cell(text=span))]


def _told(known: dict[str, float], distribution: str) -> list[tuple[str, float]]:
    """The ratios that say something: on new tasks dMMSE is no optimum."""
    return [(whose, ratio) for whose, ratio in known.items() if distribution == "pretrain" or "ridge" in whose]


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
