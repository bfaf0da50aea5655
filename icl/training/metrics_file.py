"""`metrics.csv`: one row per logged step, the same bytes whether or not the run was interrupted.

It holds nothing that depends on the wall clock. On resume the rows past the resume point, and a row that was cut short,
are removed; training then writes them again. Floats have nine significant digits, which give float32 back exactly.
"""

import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from icl.storage import StorageError, write_atomically


class MetricsFile:
    """Appends rows of fixed columns."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path, self.columns = path, list(columns)

    def begin(self, resume_step: int | None) -> None:
        """Start the file, or cut it back to `resume_step`.

        Raises:
            StorageError: If it cannot be written.
        """
        rows = [] if resume_step is None or not self.path.is_file() else self._rows_until(resume_step)
        write_atomically(self.path, "".join(map(_line, [self.columns, *rows])).encode())

    def append(self, row: Mapping[str, float | int | None]) -> None:
        """Write one row; a column without a value stays empty.

        Raises:
            StorageError: If it cannot be written.
        """
        try:
            with self.path.open("a", encoding="utf-8", newline="") as file:
                file.write(_line([_text(row.get(column)) for column in self.columns]))
        except OSError as error:
            raise StorageError(
                f"Cannot write {self.path}: {error.strerror}. What was saved before is intact."
            ) from None

    def sync(self) -> None:
        """Wait until the disk has every row."""
        with self.path.open("rb") as file:
            os.fsync(file.fileno())

    def _rows_until(self, step: int) -> list[list[str]]:
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)[1:]
        rows = list(csv.reader(line for line in lines if line.endswith("\n")))
        return [row for row in rows if len(row) == len(self.columns) and int(row[0]) <= step]


def _line(values: Sequence[str]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(values)
    return buffer.getvalue()


def _text(value: float | int | None) -> str:
    return "" if value is None else f"{value:.9g}" if isinstance(value, float) else str(value)
