"""`metrics.csv`: one row per logged step, the same bytes whether or not the run was interrupted.

It holds nothing that depends on the wall clock. On resume the rows past the resume point, and a row that was cut short,
are removed; training then writes them again. Floats have nine significant digits, which give float32 back exactly.
"""

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from icl.file_system import sync_file
from icl.runs import RunError
from icl.storage import StorageError, write_atomically


class MetricsFile:
    """Appends rows of fixed columns."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path, self.columns = path, list(columns)

    def begin(
        self, logged_steps: Iterable[int] = (), *, known: Mapping[str, Callable[[int], float | None]] | None = None
    ) -> None:
        """Start the file, or cut it back to the steps that were logged before the one that training resumes from.

        Args:
            logged_steps: The steps whose rows are kept.
            known: Columns that are functions of the step, written anew in the kept rows. Version 0.1.0 wrote another
                learning rate, that of the next update.

        Raises:
            RunError: If one of their rows is missing.
            StorageError: If it cannot be written.
        """
        rows = self.require_rows(logged_steps)
        for name, value_at in (known or {}).items():
            place = self.columns.index(name)
            rows = [[*row[:place], _text(value_at(int(row[0]))), *row[place + 1 :]] for row in rows]
        write_atomically(self.path, "".join(map(_line, [self.columns, *rows])).encode())

    def require_rows(self, logged_steps: Iterable[int]) -> list[list[str]]:
        """The rows of these steps in their order.

        Raises:
            RunError: If one of them is missing.
        """
        found = self._rows()
        steps = sorted(logged_steps)
        missing = [step for step in steps if step not in found]
        if missing:
            raise RunError(
                f"{self.path} has lost the row of step {missing[0]}; put it back, or delete last.ckpt to train from step 0."
            )
        return [found[step] for step in steps]

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
            sync_file(file.fileno(), self.path.parent)

    def _rows(self) -> dict[int, list[str]]:
        """The whole rows of the file by their step."""
        text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.is_file() else ""
        whole = [line for line in text.splitlines(keepends=True)[1:] if line.endswith("\n")]
        rows = [row for row in csv.reader(whole) if len(row) == len(self.columns) and row[0].isdigit()]
        return {int(row[0]): row for row in rows}


def _line(values: Sequence[str]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(values)
    return buffer.getvalue()


def _text(value: float | int | None) -> str:
    return "" if value is None else f"{value:.9g}" if isinstance(value, float) else str(value)
