"""Draw results of runs that differ only in seeds: each seed, the mean over seeds and, for at least three seeds, its 95 % interval."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from icl.analysis.seeds import MIN_FOR_INTERVAL, pool


def draw_points(axes: Axes, rows: pd.DataFrame, *, color: Any, **style: Any) -> None:
    """Draw values with error bars. Rows with the same `x` are different seeds.

    A single seed has a bar of two standard errors over prompts. Several seeds are shown as open marks, and the line goes through their
    mean. For at least three seeds, the bar at the mean is its 95 % interval over seeds.

    Args:
        axes: Axes to draw in.
        rows: Columns `x`, `value` and `stderr` (over prompts).
        color: Colour of marks and lines.
        style: Further options of `Axes.errorbar`.
    """
    means = pool(rows, by=["x"]).sort_values("x")
    bars = _bars(means, over_prompts=2 * means["stderr"])
    axes.errorbar(means["x"], means["value"], bars, color=color, **style)
    seeds = rows[rows["x"].isin(means.loc[means["num_seeds"] > 1, "x"])]
    if len(seeds):
        axes.scatter(seeds["x"], seeds["value"], s=14, facecolors="none", edgecolors=[color], linewidths=0.8, zorder=4)


def draw_curves(
    axes: Axes, rows: pd.DataFrame, *, color: Any, floor: float = -np.inf, alpha: float = 0.12, **style: Any
) -> None:
    """Draw curves over `x`. Rows with the same `x` are different seeds.

    A single seed has a band of two standard errors over prompts. For several seeds, each seed is a thin line and their mean is a thick
    line. For at least three seeds, the band around the mean is its 95 % interval over seeds.

    Args:
        axes: Axes to draw in.
        rows: Columns `run`, `x`, `value` and `stderr` (over prompts).
        color: Colour of lines and bands.
        floor: Lower limit of the bands, as a fraction of the mean. Set it for a logarithmic axis.
        alpha: Opacity of the bands.
        style: Further options of `Axes.plot`.
    """
    means = pool(rows, by=["x"]).sort_values("x")
    num_seeds = rows["run"].nunique()
    means = means[means["num_seeds"] == means["num_seeds"].max()]  # a mean over fewer seeds would make the curve jump
    if num_seeds > 1:
        for _, curve in rows.sort_values("x").groupby("run", sort=False):
            axes.plot(
                curve["x"], curve["value"], **style | {"color": color, "linewidth": 0.6, "alpha": 0.6, "label": None}
            )
    axes.plot(means["x"], means["value"], color=color, **style)
    below, above = _bars(means, over_prompts=2 * means["stderr"])
    low = means["value"] - below
    if np.isfinite(floor):  # -inf times a negative mean would be inf
        low = low.clip(lower=floor * means["value"])
    axes.fill_between(means["x"].astype(float), low, means["value"] + above, color=color, alpha=alpha, linewidth=0)


def _bars(means: pd.DataFrame, *, over_prompts: pd.Series) -> np.ndarray:
    """Return the lengths of the bars below and above each mean; NaN for two seeds.

    `over_prompts` is the length of the bar of a single seed.
    """
    has_interval = means["num_seeds"] >= MIN_FOR_INTERVAL
    is_single = means["num_seeds"] == 1
    below = (means["value"] - means["low"]).where(has_interval, over_prompts.where(is_single))
    above = (means["high"] - means["value"]).where(has_interval, over_prompts.where(is_single))
    return np.stack((below, above))
