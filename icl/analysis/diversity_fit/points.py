"""Read the table of `icl evaluate --checkpoint_base_dir` as points for a fit, one point for each trained model."""

from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from icl.config.validation import ConfigError, UserError, parse_num_tasks
from icl.files.reading import MAX_TABLE, ContentError, parse_json, read_bytes
from icl.files.tables import read_table, require_numbers

FEATURES = ("log2_num_tasks", "loss", "icl_score", "delta_ridge", "delta_dmmse")
"""All features, in the order in which `Settings.features = "auto"` takes them."""
MODEL = ["num_tasks", "step", "checkpoint_hash"]
"""Columns that identify a trained model."""
_COLUMNS = (*MODEL, "distribution", "quantity", "position", "value", "stderr")


class FitError(UserError, ValueError):
    """Raised if a regression cannot be fitted to a table."""


def read_points(
    path: Path,
    target: str = "true",
    *,
    steps: Literal["last", "all"] = "last",
    infinite: Literal["leave_out", "next"] = "leave_out",
) -> pd.DataFrame:
    """Read the table of trained models in a file, and return a table with one row for each model.

    The columns of the returned table are:

    - `num_tasks`, `step` and `checkpoint_hash`, which identify the model;
    - `target`, the loss of the model on the distribution `target`, and its standard error `target_stderr`;
    - one column for each feature in `FEATURES`, with NaN if the file has no value of the feature;
    - `is_inside`, which says whether the fit uses the model.

    Args:
        path: The table, as written by `icl evaluate --checkpoint_base_dir`.
        target: The distribution on which the loss is measured.
        steps: With `last`, only the models at the last step of each M are returned.
        infinite: With `leave_out`, the fit does not use models with M = inf. With `next`, the fit uses these models
            too. For M = inf, `log2_num_tasks` is the largest finite log2 M plus 1.

    Raises:
        FitError: If the file cannot be read, lacks columns, or has no loss on the distribution `target`.
    """
    table = _read(path)
    try:
        table["num_tasks"] = [str(parse_num_tasks(str(value))) for value in table["num_tasks"]]
    except ConfigError as error:
        raise FitError(f"{path} cannot be used: {error}") from None
    targets = _headline(table, target, "loss", path)
    points = pd.DataFrame({"target": targets["value"], "target_stderr": targets["stderr"]})
    for name in FEATURES[1:]:
        rows = table[(table["distribution"] == "pretrain") & (table["quantity"] == name)]
        points[name] = _full_span(rows, name).groupby(MODEL)["value"].last()
    points = points.reset_index()
    diversity = points["num_tasks"].astype(float)
    finite = np.isfinite(diversity)
    octaves = np.log2(diversity.where(finite))
    points["log2_num_tasks"] = octaves.fillna(octaves.max() + 1)
    points["is_inside"] = (finite | (infinite == "next")) & np.isfinite(points["target"])
    if steps == "last":
        points = points[points["step"] == points.groupby("num_tasks")["step"].transform("max")]
    return points.sort_values(["log2_num_tasks", "step"]).reset_index(drop=True)


def _read(path: Path) -> pd.DataFrame:
    try:
        if path.suffix.lower() == ".json":
            content = parse_json(read_bytes(path, limit=MAX_TABLE))
            lists = [content] if isinstance(content, list) else [v for v in content.values() if isinstance(v, list)]
            table = pd.DataFrame([row for rows in lists for row in rows if isinstance(row, dict)])
        else:
            table = read_table(path)
        require_numbers(table)
    except OSError as error:
        raise FitError(f"Cannot read the table {path}: {error.strerror}.") from None
    except (ContentError, AttributeError, ValueError) as error:
        why = f" ({error})" if isinstance(error, ContentError) else ""
        raise FitError(
            f"{path} is not a table in CSV or JSON{why}. Make one with `icl evaluate --checkpoint_base_dir`."
        ) from None
    missing = [name for name in _COLUMNS if name not in table]
    if missing:
        raise FitError(
            f"{path} has no column {', '.join(missing)}. Expected a table from `icl evaluate --checkpoint_base_dir`."
        )
    table["position"] = table["position"].astype(str)
    return table


def _headline(table: pd.DataFrame, distribution: str, quantity: str, path: Path) -> pd.DataFrame:
    """Return one quantity of every model: its mean over positions, or its value at the query.

    The value at the query is used for shifts that are evaluated only at the query.
    """
    rows = table[(table["distribution"] == distribution) & (table["quantity"] == quantity)]
    if rows.empty:
        available = ", ".join(sorted(map(str, table["distribution"].unique())))
        raise FitError(f"{path} has no {quantity} on `{distribution}`; its distributions are {available}.")
    means = rows[rows["position"] == "mean"]
    return (rows if means.empty else means).groupby(MODEL)[["value", "stderr"]].last()


def _full_span(rows: pd.DataFrame, quantity: str) -> pd.DataFrame:
    """Return the rows with the mean over positions; for `icl_score`, the rows for the span from position 1 to the last position."""
    if quantity != "icl_score":
        return rows[rows["position"] == "mean"]
    ends = rows["position"].str.extract(r"^1:(\d+)$")[0].astype(float)
    return rows[ends == ends.max()]
