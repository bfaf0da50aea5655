"""A signal in which we look for stages: a quantity at many saved steps, taken from a table of results.

A signal needs at least `MIN_POINTS` steps that are close enough in log time (`smoothing.MAX_SPACING`). Otherwise the
smoothed curve follows the scatter of the points, and turns where the signal does not. An LLC whose standard errors are
all known may have sparse steps, because the smoothing never assumes less noise than these errors.

The LLC is nbeta (E[L] - L(w0)), where L(w0) is the loss at the checkpoint and E[L] is the mean loss along the chains. If L(w0)
changes but E[L] hardly does, the LLC is the loss with its sign reversed, and is not an independent signal (`mirrors_loss`). The
published LLC up to step 46,000 is an example, because its chains left the basin.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float

from icl.analysis.stages.smoothing import MAX_SPACING, is_too_sparse

MIN_POINTS = 8
"""Smallest number of steps of a signal."""
MIRROR = 0.2
"""An LLC mirrors the loss if the standard deviation of E[L] over steps is below this share of the standard deviation of L(w0)."""
HEADS = ("previous_token", "prefix_matching")
"""Quantities that are measured for every head."""
RISE = 3.0
"""Minimum rise of a head's score over the run, in standard errors, for the score to count as a signal."""
_GROUPS = {"icl_score": "loss", "bigram_score": "loss", **dict.fromkeys(HEADS, "attention")}
MEASURED_SETS = ("pretrain", "test")
"""Sets on which signals are measured: `pretrain` in regression runs, `test` in language runs."""
_POINT = ["step", "checkpoint_hash", "value", "stderr"]


class Signal(NamedTuple):
    """A quantity at many saved steps."""

    name: str
    """`loss`, `icl_score`, `prior_task_score` or `llc`; in language runs also `bigram_score`, `previous_token` and `prefix_matching`."""
    source: str
    """Description of the source for the summary."""
    points: pd.DataFrame
    """Columns `step`, `checkpoint_hash`, `value` and `stderr`; for the LLC also `verdict`, `init_loss` and `mean_loss`."""
    has_onsets: bool = False
    """Whether an onset in this signal counts as a boundary (`icl.analysis.stages.boundaries`)."""

    @property
    def group(self) -> str:
        """Group of dependent signals.

        The ICL score is a difference of two terms of the loss, and the bigram score is a cross-entropy of the same predictions. So
        both are in one group with the loss. The two scores of heads form another group.
        """
        return _GROUPS.get(self.name, self.name)

    @property
    def errors(self) -> Float[np.ndarray, " S"]:
        """Independent standard error of every point; 0 if it is unknown, so that only the scatter counts as noise.

        Only the LLC has independent errors. Other signals are measured on the same prompts at every step, so their
        errors mostly shift the whole curve.
        """
        if self.name != "llc":
            return np.zeros(len(self.points))
        return self.points["stderr"].fillna(0.0).to_numpy(float)


def mirrors_loss(signal: Signal, low: float, high: float) -> bool:
    """Return whether a signal is an LLC that mirrors the loss between two log times (see `MIRROR`)."""
    if signal.name != "llc" or "mean_loss" not in signal.points:
        return False
    times = np.log1p(signal.points["step"].astype(float))
    near = signal.points[times.between(low, high)]
    moves = near[["init_loss", "mean_loss"]].astype(float).std(ddof=0)
    return len(near) >= 4 and bool(moves["mean_loss"] < MIRROR * moves["init_loss"])


def sparse_reason(signal: Signal, longest: float) -> str:
    """Return why a signal with too sparse steps is left out, and what to do; empty if the steps are close enough."""
    times = np.log1p(signal.points["step"].to_numpy(float))
    if (signal.errors > 0).all() or not is_too_sparse(times, longest=longest):
        return ""
    return (
        f"The {signal.name} is left out: the {len(times)} steps in {signal.source} are too far apart to tell stages "
        f"from scatter (the median distance is {np.median(np.diff(times)):.2f} in ln(step + 1), and at most "
        f"{MAX_SPACING * longest:.2g} is allowed). Save more checkpoints, for example with --checkpoints.num_log 60."
    )


def select_signals(table: pd.DataFrame, source: str, quantities: Mapping[str, str]) -> dict[str, Signal]:
    """Return the signals in a table; empty if the table lacks `quantity`, `position` or a column of `_POINT`.

    Args:
        table: The table. Rows of sets other than `MEASURED_SETS`, and of predictors other than the model, are ignored.
        source: Description of the table.
        quantities: Name of the signal for each quantity of the table. The keys are values of the column `quantity`.
    """
    signals: dict[str, Signal] = {}
    if not {"quantity", "position", *_POINT} <= set(table.columns):
        return signals
    if "distribution" in table:
        table = table[table["distribution"].isin(MEASURED_SETS)]
    if "predictor" in table:
        table = table[table["predictor"] == "model"]
    for quantity, name in quantities.items():
        rows = table[table["quantity"] == quantity]
        if quantity in HEADS:
            signals |= _of_best_head(name, source, rows)
            continue
        if quantity == "icl_score":
            ends = rows["position"].str.extract(r"^(\d+):(\d+)$").astype(float)
            spans = ends[1] - ends[0]
            rows = rows[spans == spans.max()]
        elif quantity != "bigram_score":
            rows = rows[rows["position"] == "mean"]
        signals |= make_signal(name, source, rows)
    return signals


def _of_best_head(name: str, source: str, rows: pd.DataFrame) -> dict[str, Signal]:
    """Return the scores of the head with the largest last score; empty if they rise by at most `RISE` standard errors over the run.

    The score of a head that learns nothing only fluctuates. Such a score shows no stages, although its values on fixed rows form a
    smooth curve.
    """
    if "part" not in rows:
        return {}
    rows = rows[np.isfinite(rows["value"].astype(float))]  # a diverged run may end with NaN
    if rows.empty:
        return {}
    last = rows[rows["step"] == rows["step"].max()].sort_values("value")
    head = last["part"].iloc[-1]
    scores = rows[rows["part"] == head].sort_values("step")
    (first, first_error), (final, final_error) = (scores[["value", "stderr"]].iloc[index] for index in (0, -1))
    if not final - first > RISE * np.hypot(first_error, final_error):
        return {}
    return make_signal(name, f"{source}, head {head}", scores)


def make_signal(name: str, source: str, points: pd.DataFrame) -> dict[str, Signal]:
    """Return a dictionary with the signal under its name; empty if the signal has fewer than `MIN_POINTS` finite points."""
    points = points[[column for column in (*_POINT, "verdict", "init_loss", "mean_loss") if column in points]]
    points = points[np.isfinite(points["value"].astype(float)) & points["step"].notna()]
    points = points.astype({"step": int}).sort_values("step").drop_duplicates("step", keep="last")
    return {name: Signal(name, source, points.reset_index(drop=True))} if len(points) >= MIN_POINTS else {}
