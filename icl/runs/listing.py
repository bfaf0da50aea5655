"""Find the runs below a folder, for the listing of `icl runs` and for commands that take several runs."""

import os
import re
import time
from collections.abc import Sequence
from pathlib import Path

from icl.runs.folder import RunError, RunFolder
from icl.runs.status import Status


def run_folders(root: Path) -> list[RunFolder]:
    """Return all runs below a folder, sorted by the numbers in their names: M8 comes before M16.

    Raises:
        RunError: If `root` exists and is not a folder.
    """
    if os.path.lexists(root) and not root.is_dir():
        raise RunError(f"{root} is not a folder; name a folder of runs.")
    names = sorted((file.parent.relative_to(root).as_posix() for file in root.glob("**/status.json")), key=_by_number)
    return [RunFolder(root / name) for name in names]


def named_runs(paths: Sequence[Path]) -> dict[str, RunFolder]:
    """Return the runs at some paths, keyed by name. Runs that have the same name are keyed by path instead.

    Args:
        paths: Each path is a run's folder, or a folder with runs below it.

    Raises:
        RunError: If there is no run at a path or below it.
    """
    runs: dict[Path, tuple[str, RunFolder]] = {}
    for path in paths:
        folder = RunFolder(path)
        if folder.config_file.is_file() or folder.status_file.is_file():
            runs.setdefault(path.resolve(), (path.resolve().name, folder))
            continue
        below = run_folders(path)
        if not below:
            raise RunError(
                f"{path} is not a run, and there are no runs below it: expected a folder with config.yaml. `icl runs` lists the runs below LOCAL_ROOT."
            )
        for run in below:
            runs.setdefault(run.path.resolve(), (run.path.relative_to(path).as_posix(), run))
    names = [name for name, _ in runs.values()]
    return {name if names.count(name) == 1 else str(run.path): run for name, run in runs.values()}


def describe_runs(root: Path) -> list[str]:
    """Return a line for each run below a folder, with its name, state, step and loss, and the age of its last status.

    If a run's `status.json` cannot be read, its line says so.
    """
    return [_line(run.path.relative_to(root).as_posix(), run.read_status()) for run in run_folders(root)]


def _line(name: str, status: Status | None) -> str:
    # The name of a folder from an unknown source may contain control characters, which could move the cursor.
    name = "".join(character if character.isprintable() else "?" for character in name)
    if status is None:
        return f"{name:40s} {'unreadable':13s} its status.json is damaged; the same `icl train` command writes it again"
    loss = "-" if status.loss is None else f"{status.loss:.4f}" if abs(status.loss) < 1e6 else f"{status.loss:.3g}"
    progress = f"{status.step:,}/{status.max_steps:,}"
    age = _age(time.time() - status.updated)
    return f"{name:40s} {status.state:13s} step {progress:>17s}  loss {loss:>8s}  {age} ago"


def _by_number(name: str) -> list[tuple[str, int]]:
    """Return a sort key that puts M=8 before M=16."""
    return [(text, int(number or -1)) for text, number in re.findall(r"(\D*)(\d*)", name)]


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"
