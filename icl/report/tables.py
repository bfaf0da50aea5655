"""Tables as a page shows them: a few rows that say most, a folded part of the whole, verdicts coloured and in words.

A result table is tidy: a row says which step, which quantity, which settings, the value, its standard error, the verdict. Its
summary puts steps side by side, a row for each quantity; a table of another shape is summed up by rows spread over it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

VERDICTS = ("ok", "suspect", "invalid")
MAX_SUMMARY = 24
"""Rows of a summary of a longer table."""
SHORT = 40
"""Rows of a table that is its own summary."""
MAX_WHOLE = 200
"""Rows of a table that is called whole; half are the first, half the last."""
MAX_CELL = 400
"""Letters of one cell."""
NOTHING = "–"
LOOKS = {word: word for word in VERDICTS} | {
    "finished": "ok",
    "stopped early": "ok",
    "preempted": "suspect",
    "failed": "invalid",
}
"""The verdict whose colour a badge has; others are plain."""
_DIGITS = 6
"""Of numbers in a table that is called whole."""
_STEPS_SIDE_BY_SIDE = 4
_NOT_TOLD = ("checkpoint_hash",)
_MEASURED = ("value", "stderr", "verdict", "reasons")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell: text, and how it is to look."""

    text: str = ""
    badge: str = ""
    """A verdict or a state, shown after the text in its colour and in words."""
    is_number: bool = False
    target: str = ""
    """The id of a section of the page to link to."""

    @property
    def look(self) -> str:
        """The colour of the badge."""
        return look_of(self.badge)


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of a page."""

    caption: str
    header: list[str]
    rows: list[list[Cell]]
    note: str = ""

    @property
    def heads(self) -> list[tuple[str, bool]]:
        """Each column's name, and whether it holds numbers."""
        first = self.rows[0] if self.rows else [Cell()] * len(self.header)
        return [(name, cell.is_number) for name, cell in zip(self.header, first, strict=True)]


def look_of(badge: str) -> str:
    """The colour of a verdict or state: `ok`, `suspect`, `invalid` or `plain`."""
    return LOOKS.get(badge, "plain")


def table_of(rows: Sequence[Sequence[Any]], header: Sequence[str], *, caption: str, note: str = "") -> Table:
    """A table of plain values; cells are taken as they are."""
    cells = [[value if isinstance(value, Cell) else cell(value) for value in row] for row in rows]
    return Table(caption=caption, header=list(header), rows=cells, note=note)


def cell(value: Any, *, digits: int = 4, pad: bool = True) -> Cell:
    """A cell for a plain value; with `pad`, numbers that are not whole have all their digits."""
    is_number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    return Cell(text=show(value, digits=digits, pad=pad), is_number=is_number)


def show(value: Any, *, digits: int = 4, pad: bool = False) -> str:
    """A value as people read it: significant digits, thousands apart, a dash for nothing."""
    if isinstance(value, (bool, np.bool_)):
        return str(value).lower()
    if isinstance(value, (int, np.integer)):
        return f"{int(value):,}"
    if isinstance(value, (float, np.floating)):
        return _show_float(float(value), digits, pad)
    if value is None or value is pd.NA:
        return NOTHING
    text = str(value)
    return text if len(text) <= MAX_CELL else text[:MAX_CELL] + " …"


def _show_float(value: float, digits: int, pad: bool) -> str:
    if math.isnan(value):
        return NOTHING
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if abs(value) < 1e8 and (value.is_integer() or abs(value) >= 10 ** (digits - 1)):
        return f"{value:,.0f}"
    padded = f"{value:#.{digits}g}"
    return padded if pad and "e" not in padded else f"{value:.{digits}g}"


def with_error(value: Any, stderr: Any) -> str:
    """A value and its standard error, to the error's second digit."""
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
    """How many rows have each verdict; those of none of the three words do not count."""
    if "verdict" not in table:
        return {}
    words = table["verdict"].astype(str)
    counts = {word: int((words == word).sum()) for word in VERDICTS}
    return {word: count for word, count in counts.items() if count}


def summarise(table: pd.DataFrame, *, caption: str, columns: Sequence[str] = ()) -> list[Table]:
    """The rows that say most: steps side by side if the table is tidy, else rows spread over it.

    Args:
        table: With at least one row.
        caption: Above it.
        columns: The only ones to show, if the table has any of them.
    """
    chosen = [name for name in columns if name in table]
    table = table[chosen] if chosen else table.drop(columns=[name for name in _NOT_TOLD if name in table])
    has_step = table["step"].notna() if "step" in table else pd.Series(False, index=table.index)
    steps, rest = table[has_step], table[~has_step]
    keys = [name for name in table if name not in ("step", *_MEASURED)]
    is_tidy = {"value", "quantity"} <= set(table) and len(steps) > 0 and steps["step"].nunique() > 1
    if not is_tidy or steps.duplicated([*keys, "step"]).any():
        return [_spread(table, caption)]
    of_run = [_spread(rest, f"{caption}: of the whole run")] if len(rest) else []
    return [*of_run, _side_by_side(steps, caption)]


def whole(table: pd.DataFrame, *, caption: str, file: str, max_rows: int = MAX_WHOLE) -> Table:
    """All columns of the first and last rows, with a note of how many there are."""
    note = f"All {_rows(len(table))} of {file}."
    places = list(range(len(table)))
    if len(table) > max_rows:
        half = max_rows // 2
        places = [*range(half), *range(len(table) - half, len(table))]
        note = f"The first and the last {half} of {_rows(len(table))}; all are in {file}."
    return Table(
        caption=caption, header=[str(name) for name in table], rows=_cells(table.iloc[places], _DIGITS), note=note
    )


def doubtful(table: pd.DataFrame) -> pd.DataFrame:
    """The rows whose verdict is not `ok`, without what is machinery."""
    rows = table[table["verdict"].isin(VERDICTS[1:])]
    return rows.drop(columns=[name for name in _NOT_TOLD if name in rows])


def _without_constants(table: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Without empty columns and those that hold one value, which are told in a sentence."""
    table = table.dropna(axis="columns", how="all")
    kept = ("step", "quantity", *_MEASURED)
    same = [name for name in table if name not in kept and table[name].nunique(dropna=False) == 1]
    if len(table) < 2 or not same:
        return table, ""
    told = ", ".join(f"{name} = {show(table[name].iloc[0])}" for name in same)
    return table.drop(columns=same), f"The same in every row: {told}."


def _side_by_side(table: pd.DataFrame, caption: str) -> Table:
    """A row for each combination of the keys, a column for each of a few steps."""
    table, same = _without_constants(table)
    keys = [str(name) for name in table if name not in ("step", *_MEASURED)]
    keys.sort(key=lambda name: name != "quantity")
    steps = sorted(table["step"].unique())
    chosen = [steps[place] for place in _places(len(steps), _STEPS_SIDE_BY_SIDE)]
    known = table[table["step"].isin(chosen) & table["value"].notna()]
    at = {(*_key(row, keys), row["step"]): row for row in known.to_dict("records")}
    kinds = list(dict.fromkeys(place[:-1] for place in at))
    picked = kinds if len(kinds) <= SHORT else _some_of_each(kinds, MAX_SUMMARY)
    shown = [name for index, name in enumerate(keys) if any(kind[index] != NOTHING for kind in picked)]
    rows = [
        [
            *(Cell(text=text) for name, text in zip(keys, kind, strict=True) if name in shown),
            *(_measured(at.get((*kind, step))) for step in chosen),
        ]
        for kind in picked
    ]
    note = f"{len(chosen)} of {len(steps)} steps" if len(steps) > len(chosen) else "All steps"
    note += f", and {len(picked)} of {len(kinds):,} quantities." if len(picked) < len(kinds) else "."
    has_errors = "stderr" in table and table["stderr"].notna().any()
    note += " Values ± one standard error." if has_errors else ""
    header = [*(name.replace("_", " ") for name in shown), *(f"step {show(_whole_number(step))}" for step in chosen)]
    return Table(caption=caption, header=header, rows=rows, note=_join(note, same))


def _measured(row: dict[Any, Any] | None) -> Cell:
    if row is None:
        return Cell(text=NOTHING, is_number=True)
    verdict = row.get("verdict")
    text = with_error(row["value"], row.get("stderr"))
    return Cell(text=text, is_number=True, badge=verdict if verdict in VERDICTS[1:] else "")


def _spread(table: pd.DataFrame, caption: str) -> Table:
    """Rows spread evenly, first and last included; errors beside their values."""
    table, same = _without_constants(table)
    places = _places(len(table), MAX_SUMMARY if len(table) > SHORT else len(table))
    note = f"{len(places)} of {_rows(len(table))}, spread evenly." if len(places) < len(table) else ""
    part = table.iloc[places]
    errors = {str(name): error for name in part if (error := _error_column(part, str(name)))}
    shown = [str(name) for name in part if name not in errors.values()]
    header = [name.replace("_", " ") + (" ± standard error" if name in errors else "") for name in shown]
    rows = []
    for record, cells in zip(part.to_dict("records"), _cells(part, 4), strict=True):
        plain = dict(zip(map(str, part.columns), cells, strict=True))
        rows.append(
            [
                Cell(text=with_error(record[name], record[errors[name]]), is_number=True)
                if name in errors
                else plain[name]
                for name in shown
            ]
        )
    return Table(caption=caption, header=header, rows=rows, note=_join(note, same))


def _error_column(table: pd.DataFrame, name: str) -> str | None:
    """The column with the standard error of this one."""
    if f"{name}_stderr" in table:
        return f"{name}_stderr"
    columns = [str(column) for column in table]
    follows = columns.index(name) + 1 < len(columns) and columns[columns.index(name) + 1] == "stderr"
    return "stderr" if follows else None


def _cells(table: pd.DataFrame, digits: int) -> list[list[Cell]]:
    numeric = {name for name in table if pd.api.types.is_numeric_dtype(table[name])}
    return [
        [_cell_of(name, value, name in numeric, digits) for name, value in row.items()]
        for row in table.astype(object).to_dict("records")
    ]


def _cell_of(name: Any, value: Any, is_number: bool, digits: int) -> Cell:
    if name == "verdict" and value in VERDICTS:
        return Cell(badge=value)
    return Cell(text=show(value, digits=digits, pad=is_number and digits < _DIGITS), is_number=is_number)


def _key(row: dict[Any, Any], keys: list[str]) -> tuple[str, ...]:
    return tuple(show(_whole_number(row[name])) for name in keys)


def _whole_number(value: Any) -> Any:
    """An integer that stands in a column with gaps, as an integer again."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 1e8 else value


def _places(count: int, wanted: int) -> list[int]:
    """Places spread over `count` of them, first and last included."""
    return sorted({round(place) for place in np.linspace(0, count - 1, min(count, wanted))})


def _some_of_each(kinds: list[tuple[str, ...]], wanted: int) -> list[tuple[str, ...]]:
    """At most `wanted` of the kinds in their order, shared out among those with the same first word."""
    groups: dict[str, list[int]] = {}
    for place, kind in enumerate(kinds):
        groups.setdefault(kind[0] if kind else "", []).append(place)
    chosen: list[int] = []
    for turn in range(len(kinds)):
        for places in groups.values():
            if turn < len(places) and len(chosen) < wanted:
                chosen.append(places[turn])
        if len(chosen) >= wanted:
            break
    return [kinds[place] for place in sorted(chosen)]


def _rows(count: int) -> str:
    return f"{count:,} row" if count == 1 else f"{count:,} rows"


def _join(*sentences: str) -> str:
    return " ".join(sentence for sentence in sentences if sentence)
