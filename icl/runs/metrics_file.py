"""Write and read `metrics.csv`, which has one row per logged step.

The file contains nothing that depends on the current time. When a run resumes, incomplete rows and the rows after the saved step are
removed, and training writes them again. So the bytes of the complete file do not depend on interruptions. Floats have nine significant
digits, which are enough to restore a float32 exactly.
"""

import csv
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from icl.config import RunConfig
from icl.files.reading import is_number
from icl.files.system import sync_file
from icl.files.writing import StorageError, write_atomically
from icl.runs.folder import RunError, RunFolder
from icl.store.base import sha256


def logged_steps(config: RunConfig, step: int) -> set[int]:
    """Return the steps up to `step` that have a row in `metrics.csv`.

    If `step` is 0, the set is empty, because a run that resumes at step 0 writes the row of step 0 again.
    """
    if step == 0:
        return set()
    evaluations = range(0, step + 1, config.evaluation.every) if config.evaluation.every is not None else ()
    last = {step} if step == config.trainer.max_steps else set()
    return {*range(config.trainer.log_every, step + 1, config.trainer.log_every), *evaluations, *last}


def metric_columns(config: RunConfig) -> list[str]:
    """Return the columns of `metrics.csv`, which depend only on the settings."""
    columns = ["step", config.model.train_metric, "lr"]
    if config.optim.grad_clip is not None:
        columns.append("clipped_fraction")
    if config.evaluation.every is not None:
        if config.model.is_language:
            return [*columns, "eval/test/loss", "eval/test/icl_score"]
        losses = ["loss", "nll"] if config.model.has_density else ["loss"]
        gaps = ["delta_ridge"] if config.task.is_gaussian else ["delta_ridge", "delta_dmmse"]
        for name in ("pretrain", "true"):
            columns += [f"eval/{name}/{quantity}" for quantity in (*losses, *gaps, "icl_score")]
    return columns


class MetricsFile:
    """A table with fixed columns, to which rows are appended."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path, self.columns = path, list(columns)
        self._lines: list[str] = []
        self._num_bytes = 0

    def begin(
        self, logged_steps: Iterable[int] = (), *, known: Mapping[str, Callable[[int], float | None]] | None = None
    ) -> None:
        """Start the file, or remove the rows after the step from which training resumes.

        Args:
            logged_steps: The steps whose rows are kept.
            known: Functions that compute a column from the step, keyed by the column's name. In these columns, the kept rows get new
                values. This corrects files of version 0.1.0, in which a row has the learning rate of the next update instead of the last
                update.

        Raises:
            RunError: If the row of one of the logged steps is missing.
            StorageError: If the file cannot be written.
        """
        rows = self.require_rows(logged_steps)
        for name, value_at in (known or {}).items():
            column = self.columns.index(name)
            rows = [[*row[:column], _text(value_at(int(row[0]))), *row[column + 1 :]] for row in rows]
        self._lines = list(map(_line, [self.columns, *rows]))
        self._write_all()

    def require_rows(self, logged_steps: Iterable[int]) -> list[list[str]]:
        """Return the rows of some steps, in the order of the steps.

        Raises:
            RunError: If one of these rows is missing.
        """
        _, lines = _read(self.path)
        rows = {int(row[0]): row for row in lines if len(row) == len(self.columns)}
        steps = sorted(logged_steps)
        missing = [step for step in steps if step not in rows]
        if missing:
            raise RunError(
                f"{self.path} has lost the row of step {missing[0]}; put the row back, or delete "
                "last.ckpt, previous.ckpt and status.json in the same folder to train from step 0."
            )
        return [rows[step] for step in steps]

    def append(self, row: Mapping[str, float | int | None]) -> None:
        """Write one row. A column without a value stays empty.

        If the file was removed or changed its length since the last row, all rows are written again.

        Raises:
            StorageError: If the file cannot be written, or its folder was moved or removed.
        """
        line = _line([_text(row.get(column)) for column in self.columns])
        self._lines.append(line)
        if not self._is_whole():
            self._write_all()
            return
        try:
            with self.path.open("a", encoding="utf-8", newline="") as file:
                file.write(line)
        except OSError as error:
            raise StorageError(
                f"Cannot write {self.path}: {error.strerror}. Earlier saves are intact. Free space or check the disk, then run the "
                "same command again."
            ) from None
        self._num_bytes += len(line.encode())

    def sync(self) -> None:
        """Wait until every row is on disk.

        Raises:
            StorageError: If the disk failed, or the file's folder was moved or removed.
        """
        if not self._is_whole():
            self._write_all()
        try:
            with self.path.open("rb") as file:
                sync_file(file.fileno(), self.path.parent)
        except OSError as error:
            raise StorageError(f"Cannot write {self.path}: {error.strerror}.") from None

    def digest(self) -> dict[str, Any]:
        """Return the size and the SHA-256 of all rows that have been written so far."""
        data = "".join(self._lines).encode()
        return {"size": len(data), "sha256": sha256(data)}

    def _is_whole(self) -> bool:
        """Return whether the file still has the same length as after this process's last write."""
        try:
            return self.path.stat().st_size == self._num_bytes
        except OSError:
            return False

    def _write_all(self) -> None:
        if not self.path.parent.is_dir():
            raise StorageError(
                f"Cannot write {self.path}: its folder was moved or removed. Put the folder back, and run the same command again."
            )
        data = "".join(self._lines).encode()
        write_atomically(self.path, data)
        self._num_bytes = len(data)


def lost_rows(run: RunFolder, config: RunConfig, step: int) -> str | None:
    """Return a message about the first row that is missing up to `step`, or None if no row is missing."""
    try:
        MetricsFile(run.metrics_file, metric_columns(config)).require_rows(logged_steps(config, step))
    except RunError as error:
        return str(error)
    return None


def are_rows_altered(data: bytes, saved: Any, *, has_ended: bool = False) -> bool:
    """Return whether the rows that existed at a save have changed since that save.

    Args:
        data: The whole file.
        saved: Result of `MetricsFile.digest` at the save, or None if version 0.1.0 made the save.
        has_ended: Whether the run ended with this save. In this case, additional rows also count as a change.
    """
    if not isinstance(saved, dict) or not isinstance(saved.get("size"), int):
        return False
    is_longer = has_ended and saved["size"] != len(data)
    return is_longer or sha256(data[: saved["size"]]) != saved.get("sha256")


def whole_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a `metrics.csv` as dicts keyed by column. Rows that are damaged or were cut short are left out."""
    columns, rows = _read(path)
    return [dict(zip(columns, row, strict=True)) for row in rows if len(row) == len(columns) and columns[0] == "step"]


def _read(path: Path) -> tuple[list[str], list[list[str]]]:
    """Return a file's header and its complete rows. In a complete row, the first cell is a step, and the others are numbers or empty."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    header, *lines = text.splitlines(keepends=True) or [""]
    whole = (_cells(line) for line in lines if line.endswith("\n"))
    return _cells(header), [row for row in whole if row and _is_row(row)]


def _cells(line: str) -> list[str]:
    try:
        return next(csv.reader([line]), [])
    except csv.Error:
        return []


def _is_row(cells: Sequence[str]) -> bool:
    """Return whether the first cell of a row is a step and the others are numbers or empty. A cell is empty if its number was not logged."""
    return bool(re.fullmatch(r"[0-9]{1,18}", cells[0])) and all(not cell or is_number(cell) for cell in cells[1:])


def _line(values: Sequence[str]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(values)
    return buffer.getvalue()


def _text(value: float | int | None) -> str:
    return "" if value is None else f"{value:.9g}" if isinstance(value, float) else str(value)
