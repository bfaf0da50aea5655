"""Selection of rows from the tables that figures and pages show."""

from typing import Any

import numpy as np
import pandas as pd


def select(table: pd.DataFrame, **values: Any) -> pd.DataFrame:
    """Return the rows in which every named column has the given value."""
    is_chosen = pd.Series(True, index=table.index)
    for column, value in values.items():
        is_chosen &= table[column] == value
    return table[is_chosen]


def spread_indices(count: int, wanted: int) -> list[int]:
    """Return up to `wanted` evenly spread indices below `count`, including the first and the last."""
    return sorted({round(position) for position in np.linspace(0, count - 1, min(count, wanted))})
