"""The figure of a task-diversity experiment: the gaps of the trained models to ridge and to dMMSE, against the number of tasks M.

If a model has learned the Gaussian prior, its gap to ridge is zero. If it has learned its M tasks, its gap to dMMSE is zero
(Raventos et al. 2023, arXiv 2306.15063, figure 2). They divide the gaps by D; we do not. The threshold M above which models
learn the Gaussian prior depends on the architecture and the training (`icl.diversity.threshold`).
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from icl.plotting.colours import GREEN, VERMILION
from icl.plotting.seeds import draw_points
from icl.plotting.style import new_figure, select

SERIES = {"delta_ridge": (VERMILION, "o", "gap to ridge"), "delta_dmmse": (GREEN, "s", "gap to dMMSE")}
PANELS = {"pretrain": "In distribution: the M training tasks", "true": "Out of distribution: new tasks"}
_MAX_MINOR_RATIO = 30.0
"""If the ratio of the limits of the y axis is below this value, ticks between powers of ten are labelled too."""
_MAX_TICKS = 11


def plot_diversity(table: pd.DataFrame, *, title: str, thresholds: pd.DataFrame | None = None) -> Figure:
    """Plot the gaps to ridge and to dMMSE against M: on the training tasks (left) and on new tasks (right).

    M = inf has a tick of its own, to the right of all finite M.

    Args:
        table: Table with the columns `num_tasks` (as text), `step`, `distribution`, `quantity`, `position`, `value`, `stderr`, and `run` if
            there are several seeds for an M (`icl.plotting.seeds` describes how seeds are drawn). Only the last step of each run is drawn.
        title: Title of the figure.
        thresholds: Table from `icl.diversity.threshold.thresholds`. The threshold in the last row of this table is
            drawn. If there are several seeds, the last row is the row for all seeds. A band shows the 95 % interval of
            the threshold, or two standard errors if there is only one seed.
    """
    keys = ["num_tasks", "run"] if "run" in table else ["num_tasks"]
    last = table[table["step"] == table.groupby(keys)["step"].transform("max")]
    positions = diversity_positions(last["num_tasks"].astype(str).unique())
    figure, panels = new_figure(len(PANELS), width=5.4, height=4.4, title=title)
    for axes, (distribution, name) in zip(panels, PANELS.items(), strict=True):
        _draw_gaps(axes, select(last, distribution=distribution, position="mean"), positions)
        _label_diversities(axes, positions)
        axes.set_title(name, fontsize=10)
    if thresholds is not None and len(thresholds):
        _draw_threshold(panels[-1], thresholds.iloc[-1].to_dict())
    panels[0].set_ylabel(
        f"gap: mean squared difference of predictions\n(per target, not divided by D; {_describe_bars(last)})",
        fontsize=9,
    )
    _share_scale(panels, last.loc[last["quantity"].isin(list(SERIES)), "value"])
    for axes in [axes for axes in panels if axes.get_legend_handles_labels()[0]][-1:]:
        axes.legend(fontsize=9)
    return figure


def diversity_positions(num_tasks: Iterable[str], *, gap: float | None = None) -> dict[str, float]:
    """Return the horizontal position of every M, in ascending order.

    The position of a finite M is log2 M. M = inf lies `gap` to the right of the largest finite M. By default, `gap` is
    10 % of the range of the finite positions, but at least 1.5.
    """
    ordered = sorted(num_tasks, key=float)
    positions = {m: math.log2(float(m)) for m in ordered if m != "inf"}
    if "inf" in ordered:
        first, last = min(positions.values(), default=0.0), max(positions.values(), default=0.0)
        positions["inf"] = last + (max(1.5, 0.1 * (last - first)) if gap is None else gap)
    return positions


def _draw_gaps(axes: Axes, means: pd.DataFrame, positions: Mapping[str, float]) -> None:
    for quantity, (colour, marker, label) in SERIES.items():
        gaps = select(means, quantity=quantity)
        gaps = gaps.assign(x=gaps["num_tasks"].astype(str).map(positions)).sort_values("x")
        is_infinite = gaps["num_tasks"] == "inf"
        style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 5, "capsize": 2.5, "label": label}
        for points, line in ((gaps[~is_infinite], "-"), (gaps[is_infinite], "none")):
            if len(points):
                draw_points(axes, points, linestyle=line, **style)
                style["label"] = None  # one legend entry for finite and infinite M


def _draw_threshold(axes: Axes, row: Mapping[str, Any]) -> None:
    """Draw the threshold M as a line, with a band for its 95 % interval, or for two standard errors if there is only one seed."""
    if math.isnan(row["threshold"]):
        return
    where, width = math.log2(row["threshold"]), 2 * row["stderr_log2"]
    has_interval = row["num_seeds"] > 1 and math.isfinite(row["lower"])
    low, high = (math.log2(row["lower"]), math.log2(row["upper"])) if has_interval else (where - width, where + width)
    axes.axvline(where, color="0.35", linewidth=1.0, linestyle="--", label=f"threshold, M = {row['threshold']:.3g}")
    if row["num_seeds"] == 1 or has_interval:
        axes.axvspan(low, high, color="0.35", alpha=0.12, linewidth=0)


def _describe_bars(last: pd.DataFrame) -> str:
    has_seeds = "run" in last and bool((last.groupby("num_tasks")["run"].nunique() > 1).any())
    return "open: seeds; bars: 95 % over seeds" if has_seeds else "bars: 2 s.e."


def _share_scale(panels: list[Axes], values: pd.Series) -> None:
    """Give all panels the same y scale, which is logarithmic if any value is positive.

    On the logarithmic scale, error bars that reach zero end at the lower edge.
    """
    for axes in panels[1:]:
        axes.sharey(panels[0])
    if not ((values > 0) & (values < math.inf)).any():
        return
    panels[0].set_yscale("log", nonpositive="clip")
    panels[0].autoscale(axis="y")
    low, high = panels[0].get_ylim()
    for axes in panels:
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}" if high / low < _MAX_MINOR_RATIO else NullFormatter())
        axes.tick_params(axis="y", which="minor", labelsize=8)


def _label_diversities(axes: Axes, positions: Mapping[str, float]) -> None:
    stride = max(1, math.ceil(len(positions) / _MAX_TICKS))
    finite = [m for m in positions if m != "inf"]
    labels = {positions[m]: _power(positions[m], m) for m in finite[::-1][::stride][::-1]}
    if "inf" in positions:
        labels[positions["inf"]] = "∞"
        if finite:
            middle = (positions["inf"] + positions[finite[-1]]) / 2
            axes.axvline(middle, color="0.7", linewidth=0.8, linestyle=(0, (2, 3)))
    axes.set_xticks(list(labels), list(labels.values()))
    at_infinity = "; at ∞, dMMSE is ridge" if "inf" in positions else ""
    axes.set_xlabel(f"task diversity M (number of training tasks{at_infinity})", fontsize=9)


def _power(exponent: float, label: str) -> str:
    return f"$2^{{{exponent:.0f}}}$" if exponent.is_integer() else label
