"""Refuse, before any work, a file of the user's own choice (`--out` and its kin) that cannot be written or must not be.

What a command reads, and what a run's folder holds of its training, would be lost. A name counts however it is written: with
`..`, through links, or in another case where the file system takes it for the same.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from icl.analysis import ANALYSES
from icl.diversity.runs import METADATA
from icl.files.writing import StorageError, require_table_file, require_writable

_RUN_FILES = (
    *("config.yaml", "status.json", "metrics.csv", "run.log", "last.ckpt", "previous.ckpt", "point.json", "sweep.log"),
    *("run-id", "wandb-id", ".lock", ".delivered"),
)
_RUN_FOLDERS = ("checkpoints", "attempts")
_RESULTS = ("evaluation.csv", "baselines.csv", "llc.csv", "llc-calibration.csv", *(f"{name}.csv" for name in ANALYSES))
"""Tables of a run's `results/`, where each analysis writes its numbers anyway."""
_MARKS = ("config.yaml", "status.json", "metrics.csv", "run.log", "last.ckpt")
"""A folder with two of them is a run's, or a copy of one."""


def require_output_table(path: Path, *inputs: Path | str | None, suffixes: Iterable[str] = ()) -> None:
    """Refuse a file for a table that cannot be written, or whose writing would destroy something.

    Args:
        path: The file.
        inputs: Files that the command reads.
        suffixes: Further ones under which the table is also written.

    Raises:
        StorageError: If it is neither .csv nor .json, cannot be written, is an input, or belongs to a run or an experiment.
    """
    require_table_file(path)
    for file in (path, *(path.with_suffix(suffix) for suffix in suffixes)):
        require_output(file, *inputs)


def require_output(path: Path, *inputs: Path | str | None) -> None:
    """Refuse a file that cannot be written, is an input, or belongs to a run or an experiment.

    Raises:
        StorageError: Saying which.
    """
    require_writable(path)
    if any(_is_same(path, Path(read)) for read in inputs if read is not None):
        raise StorageError(f"{path} is what is read, and would be lost; write to another file.")
    owner = _owner(path)
    if owner is not None:
        raise StorageError(f"{path} belongs to {owner}, and would be lost; write to another file.")


def _owner(path: Path) -> str | None:
    """Return whose file a path is, in words; None if it is nobody's."""
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
    """Return whether two names are one file, or would be."""
    try:
        return path.samefile(other)
    except OSError:
        return _real(path) == _real(other)


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # which links in a circle do not stop
