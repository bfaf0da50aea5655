"""Read tables that `icl` wrote (`metrics.csv`, `results/*.csv`), and check each column.

If one cell of a column is damaged, pandas reads the whole column as text, and a later computation fails with an error that does not
name the cause. This module refuses the whole table instead, with a short reason.
"""

import io
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from icl.files.reading import MAX_TABLE, ContentError, first_line, read_bytes

TEXTS = (
    "distribution",
    "quantity",
    "part",
    "position",
    "verdict",
    "reasons",
    "settings",
    "mode",
    "checkpoint_hash",
    "num_tasks",
)
"""Columns that are read as text, although some of their values look like numbers."""
_NUMBERS = frozenset(
    (
        "step",
        "value",
        "stderr",
        "llc",
        "init_loss",
        "mean_loss",
        "nbeta",
        "localization",
        "lr",
        "rhat",
        "ess",
        "rescale",
        "settled",
        "settled_stderr",
        "drop_at_mean",
        "heat",
        "bias_bound",
        "model",
        "ridge",
        "dmmse",
        "ols",
        "zero",
        "start",
        "end",
    )
)
_NUMBER_ENDS = ("_stderr", "/loss", "/delta_ridge", "/delta_dmmse", "/icl_score")
_MAX_COLUMNS = 10_000
_LARGEST = 1e100
"""Largest magnitude of a number. Sums of squares of larger numbers may be infinite, and no axis of a plot can show them."""


def read_table(path: Path, *, columns: Sequence[str] = ()) -> pd.DataFrame:
    """Return the table in a CSV file. The table must have the columns `columns`, and may have others.

    Raises:
        ContentError: If the file is not a table, a column is missing, or a column contains an invalid number or step (see `require_numbers`).
        OSError: If there is no such file, or it cannot be read.
    """
    data = read_bytes(path, limit=MAX_TABLE)
    if data.partition(b"\n")[0].count(b",") >= _MAX_COLUMNS:
        raise ContentError(f"it has more than {_MAX_COLUMNS:,} columns")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "error", pd.errors.ParserWarning
            )  # raised if the rows have more cells than the header
            # Without `index_col`, pandas would take the first cell of such rows as the row's name, and shift the others.
            table = pd.read_csv(io.BytesIO(data), dtype=dict.fromkeys(TEXTS, str), low_memory=False, index_col=False)
    except Exception as error:  # pandas raises many kinds of errors for damaged text
        raise ContentError(f"it is not a CSV table ({first_line(error)})") from None
    missing = [name for name in columns if name not in table]
    if missing:
        raise ContentError(f"it has no column `{missing[0]}`")
    require_numbers(table)
    if "quantity" in table and table["quantity"].isna().any():
        raise ContentError("one of its rows has no `quantity`")
    return table


def require_numbers(table: pd.DataFrame) -> None:
    """Refuse a table with text in a column of numbers, a step that is not a whole number, or a number that is too large.

    Raises:
        ContentError: If the table has such a value. The message names the column.
    """
    for name, column in table.items():
        is_number = pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)
        if not is_number and (name in _NUMBERS or str(name).endswith(_NUMBER_ENDS)) and column.notna().any():
            raise ContentError(f"its column `{name}` contains something other than numbers")
        if is_number and (np.abs(column[np.isfinite(column)].astype(float)) > _LARGEST).any():
            raise ContentError(f"its column `{name}` contains a number with a magnitude above {_LARGEST:g}")
    steps = table["step"].dropna().astype(float) if "step" in table else pd.Series(dtype=float)
    if not ((steps >= 0) & (steps < 2**63) & (steps % 1 == 0)).all():
        raise ContentError("its column `step` contains a value that is not a whole number of at least 0")
