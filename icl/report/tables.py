"""Tables of a page: short summaries, and long tables that a reader can open. Verdicts are shown in colour and in words.

In a tidy result table, each row has a step, a value with its standard error and verdict, and key columns. The key columns say what
the value is: its quantity and, for example, its distribution. The summary of a tidy table has a row for each combination of keys, and a
column for each of a few steps. Any other table is shown whole if it has at most `MAX_SHORT` rows. Otherwise its summary shows
`MAX_SUMMARY` rows of the table, at about equal distances.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from icl.plotting.style import spread_indices

VERDICTS = ("ok", "suspect", "invalid")
MAX_SUMMARY = 24
"""Number of rows in the summary of a table with more than `MAX_SHORT` rows."""
MAX_SHORT = 40
"""Largest number of rows of a table whose summary shows all rows."""
MAX_WHOLE = 200
"""Largest number of rows of a table that is shown whole. For a longer table, only the first `MAX_WHOLE` / 2 rows and the last
`MAX_WHOLE` / 2 rows are shown."""
MAX_CELL = 400
"""Largest number of characters in a cell."""
MISSING = "–"
LOOKS = {verdict: verdict for verdict in VERDICTS} | {
    "finished": "ok",
    "stopped early": "ok",
    "preempted": "suspect",
    "failed": "invalid",
}
"""The colours of badges. The keys are the words on the badges. Badges with other words have no colour."""
_WHOLE_DIGITS = 6
"""Significant digits of numbers in a table that is shown whole."""
_MAX_STEPS = 4
"""Largest number of steps that a summary shows side by side."""
_NEVER_SHOWN = ("checkpoint_hash",)
_MEASURED = ("value", "stderr", "verdict", "reasons")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A cell of a table."""

    text: str = ""
    badge: str = ""
    """A verdict or a state, shown as a coloured word after the text."""
    is_number: bool = False
    target: str = ""
    """Id of the section of the page that the cell links to."""

    @property
    def look(self) -> str:
        """The colour of the badge."""
        return look_of(self.badge)


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table on a page of the report."""

    caption: str
    header: list[str]
    rows: list[list[Cell]]
    note: str = ""

    @property
    def heads(self) -> list[tuple[str, bool]]:
        """The name of each column, and whether the column contains numbers."""
        first = self.rows[0] if self.rows else [Cell()] * len(self.header)
        return [(name, cell.is_number) for name, cell in zip(self.header, first, strict=True)]


def look_of(badge: str) -> str:
    """Return the colour of a verdict or state: `ok`, `suspect`, `invalid` or `plain`."""
    return LOOKS.get(badge, "plain")


def table_of(rows: Sequence[Sequence[Any]], header: Sequence[str], *, caption: str) -> Table:
    """Build a table from rows of plain values or cells."""
    cells = [[value if isinstance(value, Cell) else cell(value) for value in row] for row in rows]
    return Table(caption=caption, header=list(header), rows=cells)


def cell(value: Any) -> Cell:
    """Return a cell for a plain value."""
    is_number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    return Cell(text=show(value, pad=True), is_number=is_number)


def number_cell(text: str, badge: str = "") -> Cell:
    """Return a cell for an already formatted number."""
    return Cell(text=text, is_number=True, badge=badge)


def show(value: Any, *, digits: int = 4, pad: bool = False) -> str:
    """Return a value as a string: rounded to significant digits, with a comma between thousands. A missing value gives a dash.

    Args:
        value: Any value. A long string is cut.
        digits: Number of significant digits.
        pad: Whether numbers that are not whole keep trailing zeros.
    """
    if isinstance(value, (bool, np.bool_)):
        return str(value).lower()
    if isinstance(value, (int, np.integer)):
        return f"{int(value):,}"
    if isinstance(value, (float, np.floating)):
        return _show_float(float(value), digits, pad)
    if value is None or value is pd.NA:
        return MISSING
    text = str(value)
    return text if len(text) <= MAX_CELL else text[:MAX_CELL] + " …"


def _show_float(value: float, digits: int, pad: bool) -> str:
    if math.isnan(value):
        return MISSING
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if abs(value) < 1e8 and (value.is_integer() or abs(value) >= 10 ** (digits - 1)):
        return f"{value:,.0f}"
    padded = f"{value:#.{digits}g}"
    return padded if pad and "e" not in padded else f"{value:.{digits}g}"


def with_error(value: Any, stderr: Any) -> str:
    """Return a value and its standard error as a string, rounded at the second digit of the standard error."""
    try:
        value, stderr = float(value), float(stderr)
    except (TypeError, ValueError):
        return show(value, pad=True)
    if not (math.isfinite(value) and math.isfinite(stderr) and stderr > 0):
        return show(value, pad=True)
    decimals = max(0, 1 - math.floor(math.log10(stderr)))
    if decimals > 6 or max(abs(value), stderr) >= 1e8:
        return f"{value:.4g} ± {stderr:.2g}"
    return f"{value:,.{decimals}f} ± {stderr:,.{decimals}f}"


def count_verdicts(table: pd.DataFrame) -> dict[str, int]:
    """Return the number of rows with each verdict. Other words in the column `verdict` are ignored."""
    if "verdict" not in table:
        return {}
    counts = table["verdict"].astype(str).value_counts()
    return {verdict: int(counts[verdict]) for verdict in VERDICTS if verdict in counts}


def summarise(table: pd.DataFrame, *, caption: str, columns: Sequence[str] = ()) -> list[Table]:
    """Return one or two short tables that summarise a table. The module docstring says what a tidy table is.

    The summary of a tidy table has one column for each of a few steps. Rows of a tidy table that belong to no step are
    in a separate summary. A long table that is not tidy is summarised by rows at about equal distances.

    Args:
        table: A table with at least one row.
        caption: Caption of the summary.
        columns: Names of columns. If the table has any of these columns, the summary shows only these columns.
    """
    chosen = [name for name in columns if name in table]
    table = table[chosen] if chosen else table.drop(columns=[name for name in _NEVER_SHOWN if name in table])
    has_step = table["step"].notna() if "step" in table else pd.Series(False, index=table.index)
    with_step, without_step = table[has_step], table[~has_step]
    keys = [name for name in table if name not in ("step", *_MEASURED)]
    is_tidy = {"value", "quantity"} <= set(table) and len(with_step) > 0 and with_step["step"].nunique() > 1
    if not is_tidy or with_step.duplicated([*keys, "step"]).any():
        return [_spread(table, caption)]
    whole_run = [_spread(without_step, f"{caption} of the whole run")] if len(without_step) else []
    return [*whole_run, _side_by_side(with_step, caption)]


def whole(table: pd.DataFrame, *, caption: str, file: str, max_rows: int = MAX_WHOLE) -> Table:
    """Return all columns of a table. If there are more than `max_rows` rows, return only the first and the last rows."""
    note = f"All {_count_rows(len(table))} of {file}."
    if len(table) > max_rows:
        half = max_rows // 2
        note = f"The first and the last {half} of {_count_rows(len(table))}; all are in {file}."
        table = pd.concat([table.iloc[:half], table.iloc[len(table) - half :]])
    rows = _cells(table, _WHOLE_DIGITS)
    return Table(caption=caption, header=[str(name) for name in table], rows=rows, note=note)


def not_ok(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows whose verdict is `suspect` or `invalid`."""
    rows = table[table["verdict"].isin(VERDICTS[1:])]
    return rows.drop(columns=[name for name in _NEVER_SHOWN if name in rows])


def _without_constants(table: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Return a table without its empty and constant columns, and a sentence with the values of the constant columns."""
    table = table.drop(columns=[name for name in table if name != "value" and table[name].isna().all()])
    always_shown = ("step", "quantity", *_MEASURED)
    constant = [name for name in table if name not in always_shown and table[name].nunique(dropna=False) == 1]
    if len(table) < 2 or not constant:
        return table, ""
    values = ", ".join(f"{name} = {show(table[name].iloc[0])}" for name in constant)
    return table.drop(columns=constant), f"The same in every row: {values}."


def _side_by_side(table: pd.DataFrame, caption: str) -> Table:
    """Return a table with a row for each combination of the key columns, and a column for each of a few steps."""
    table, constants = _without_constants(table)
    keys = [str(name) for name in table if name not in ("step", *_MEASURED)]
    keys.sort(key=lambda name: name != "quantity")
    steps = sorted(table["step"].unique())
    chosen = [steps[index] for index in spread_indices(len(steps), _MAX_STEPS)]
    known = table[table["step"].isin(chosen) & table["value"].notna()]
    records: dict[tuple[tuple[str, ...], Any], dict[Any, Any]] = {
        (tuple(show(_as_integer(row[name])) for name in keys), row["step"]): row for row in known.to_dict("records")
    }
    kinds = list(dict.fromkeys(kind for kind, _ in records))
    picked = kinds if len(kinds) <= MAX_SHORT else _some_of_each(kinds, MAX_SUMMARY)
    shown = [index for index in range(len(keys)) if any(kind[index] != MISSING for kind in picked)]
    rows = [
        [*(Cell(text=kind[index]) for index in shown), *(_measured(records.get((kind, step))) for step in chosen)]
        for kind in picked
    ]
    header = [keys[index].replace("_", " ") for index in shown] + [f"step {show(_as_integer(step))}" for step in chosen]
    note = f"{len(chosen)} of {len(steps)} steps" if len(steps) > len(chosen) else "All steps"
    note += f", and {len(picked)} of {len(kinds):,} quantities." if len(picked) < len(kinds) else "."
    note = note if kinds else "No value is known."
    errors = "Values ± one standard error." if "stderr" in table and table["stderr"].notna().any() else ""
    return Table(caption=caption, header=header, rows=rows, note=_join(note, errors, constants))


def _measured(record: dict[Any, Any] | None) -> Cell:
    if record is None:
        return number_cell(MISSING)
    verdict = record.get("verdict")
    return number_cell(with_error(record["value"], record.get("stderr")), verdict if verdict in VERDICTS[1:] else "")


def _spread(table: pd.DataFrame, caption: str) -> Table:
    """Return a table of rows at about equal distances, from the first row to the last. A short table keeps all rows.

    A value and its standard error share one cell.
    """
    table, constants = _without_constants(table)
    num_rows = len(table)
    part = table.iloc[spread_indices(num_rows, MAX_SUMMARY if num_rows > MAX_SHORT else num_rows)]
    note = f"{len(part)} of {_count_rows(num_rows)}, evenly spread." if len(part) < num_rows else ""
    names = [str(name) for name in part]
    errors = {name: error for name in names if (error := _error_column(names, name))}
    shown = [name for name in names if name not in errors.values()]
    rows = []
    for record, cells in zip(part.to_dict("records"), _cells(part, 4), strict=True):
        row = dict(zip(names, cells, strict=True))
        row |= {name: number_cell(with_error(record[name], record[error])) for name, error in errors.items()}
        rows.append([row[name] for name in shown])
    header = [name.replace("_", " ") + (" ± standard error" if name in errors else "") for name in shown]
    return Table(caption=caption, header=header, rows=rows, note=_join(note, constants))


def _error_column(columns: list[str], name: str) -> str | None:
    """Return the column with the standard error of column `name`: `<name>_stderr`, or `stderr` if it follows directly."""
    if f"{name}_stderr" in columns:
        return f"{name}_stderr"
    following = columns[columns.index(name) + 1 :]
    return "stderr" if following[:1] == ["stderr"] else None


def _cells(table: pd.DataFrame, digits: int) -> list[list[Cell]]:
    numeric = {name for name in table if pd.api.types.is_numeric_dtype(table[name])}
    return [
        [_table_cell(name, value, name in numeric, digits) for name, value in row.items()]
        for row in table.astype(object).to_dict("records")
    ]


def _table_cell(name: Any, value: Any, is_number: bool, digits: int) -> Cell:
    if name == "verdict" and value in VERDICTS:
        return Cell(badge=value)
    return Cell(text=show(value, digits=digits, pad=is_number and digits < _WHOLE_DIGITS), is_number=is_number)


def _as_integer(value: Any) -> Any:
    """Return a whole number as an integer, because pandas stores integers as floats if a column has missing values."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 1e8 else value


def _some_of_each(kinds: list[tuple[str, ...]], wanted: int) -> list[tuple[str, ...]]:
    """Return at most `wanted` of the kinds, in their original order.

    A kind is a combination of values in the key columns. The returned kinds contain each value of the first key column about
    equally often.
    """
    groups: dict[str, list[int]] = {}
    for index, kind in enumerate(kinds):
        groups.setdefault(kind[0] if kind else "", []).append(index)
    # In each round, take one more kind from every group.
    by_round = [(number, index) for indices in groups.values() for number, index in enumerate(indices)]
    chosen = sorted(by_round, key=lambda pair: pair[0])[:wanted]
    return [kinds[index] for index in sorted(index for _, index in chosen)]


def _count_rows(count: int) -> str:
    return f"{count:,} row" if count == 1 else f"{count:,} rows"


def _join(*sentences: str) -> str:
    return " ".join(sentence for sentence in sentences if sentence)
