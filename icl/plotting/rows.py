"""Selection of rows from the tables that figures are drawn from."""

from typing import Any

import pandas as pd


def select(table: pd.DataFrame, **values: Any) -> pd.DataFrame:
    """Return the rows in which every named column has the given value."""
    is_chosen = pd.Series(True, index=table.index)
    for column, value in values.items():
        is_chosen &= table[column] == value
    return table[is_chosen]
