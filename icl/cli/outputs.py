"""Check the output files that a user chose (`--out` and similar options), before any work begins.

A file is refused if it cannot be written. A file is also refused if the command reads it, or if it belongs to a run or an
experiment, because its content would be lost. Different paths to the same file are recognised: paths with `..`, paths through
links, and paths that differ only in capital letters on a file system that ignores case.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from icl.analysis import ANALYSES
from icl.diversity.runs import METADATA
from icl.files.writing import StorageError, require_table_file, require_writable

_RUN_FILES = (
    *("config.yaml", "status.json", "metrics.csv", "run.log", "last.ckpt", "previous.ckpt", "point.json", "sweep.log"),
    *("run-id", "wandb-id", ".lock", ".delivered", "imported.json"),
)
_RUN_FOLDERS = ("checkpoints", "attempts")
_RESULTS = ("evaluation.csv", "baselines.csv", "llc.csv", "llc-calibration.csv", *(f"{name}.csv" for name in ANALYSES))
"""Tables in the folder `results/` of a run. Each command writes its own table to this folder by default."""
_MARKS = ("config.yaml", "status.json", "metrics.csv", "run.log", "last.ckpt")
"""A folder with at least two of these files counts as the folder of a run, or as a copy of such a folder."""


def require_output_table(path: Path, *inputs: Path | str | None, suffixes: Iterable[str] = ()) -> None:
    """Refuse the file of a table if it cannot be written, or if other data would be lost.

    Args:
        path: The file.
        inputs: Files that the command reads.
        suffixes: Suffixes of further copies of the table, such as `.json`. These files are also checked.

    Raises:
        StorageError: If the file is neither .csv nor .json, cannot be written, is read by the command, or belongs to a run or an
            experiment.
    """
    require_table_file(path)
    for file in (path, *(path.with_suffix(suffix) for suffix in suffixes)):
        require_output(file, *inputs)


def require_output(path: Path, *inputs: Path | str | None) -> None:
    """Refuse a file that cannot be written, that the command reads, or that belongs to a run or an experiment.

    Raises:
        StorageError: If the file is refused; the message gives the reason.
    """
    require_writable(path)
    if any(_is_same(path, Path(read)) for read in inputs if read is not None):
        raise StorageError(f"{path} is an input of this command and would be lost; write to another file.")
    owner = _owner(path)
    if owner is not None:
        raise StorageError(f"{path} belongs to {owner} and would be lost; write to another file.")


def _owner(path: Path) -> str | None:
    """Return a phrase that names the run or experiment to which a file belongs, or None if it belongs to neither."""
    real = _real(path)
    for folder in real.parents:
        parts = real.relative_to(folder).parts
        if sum((folder / mark).is_file() for mark in _MARKS) > 1:
            is_file = len(parts) == 1 and any(parts[0] == name or _is_same(path, folder / name) for name in _RUN_FILES)
            is_result = len(parts) == 2 and parts[0] == "results" and parts[1] in _RESULTS
            if is_file or is_result or parts[0] in _RUN_FOLDERS:
                return f"the run {folder}"
    if real.name == METADATA and real.is_file():
        return f"the experiment {real.parent}"
    return None


def _is_same(path: Path, other: Path) -> bool:
    """Return whether two paths lead to the same file. The file need not exist."""
    try:
        return path.samefile(other)
    except OSError:
        return _real(path) == _real(other)


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # unlike `Path.resolve`, `realpath` accepts links that form a circle
