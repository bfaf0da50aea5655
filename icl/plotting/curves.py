"""The figure of losses against the step for one or several runs, during or after training.

Each run is a line. Up to `MAX_END_LABELS` runs with short names are named at the ends of their lines. Otherwise a legend names up to
`MAX_LABELS` runs. If there are more runs, the figure has no names. On the logarithmic axis, step 0 lies far to the left of
the next step. The loss at step 0 is therefore a dot that is not joined to the line.
"""

import math
from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from icl.analysis.seeds import pool
from icl.plotting.colours import ordered_colours
from icl.plotting.style import new_figure, scale_steps
from icl.plotting.tidying import name_outside

MAX_LABELS = 16
"""Largest number of runs for which there is a legend. A reader cannot tell more colours apart."""
MAX_END_LABELS = 12
"""Largest number of runs that are named at the ends of their lines."""
_LABEL_HEIGHT = 0.065
"""Smallest distance between two names at the ends of lines, as a fraction of the height of the axes."""
_MAX_NAME_LENGTH = 30
MANY_LABELS = 3.0
"""Largest ratio of the upper to the lower limit of the y axis at which all ticks are labelled.

Above this ratio, only 1, 2 and 5 times powers of ten are labelled.
"""
_PANELS = {
    "train/loss": "Training batches",
    "eval/pretrain/loss": "Fixed prompts, training tasks",
    "eval/true/loss": "Fixed prompts, new tasks",
    "train/nll": "Training batches",
    "eval/pretrain/nll": "Fixed prompts, training tasks",
    "eval/true/nll": "Fixed prompts, new tasks",
}
_LABELS = {"loss": "loss (squared error per target)", "nll": "negative log-likelihood (nats per target)"}


def plot_curves(
    curves: Mapping[str, pd.DataFrame], *, title: str, groups: Mapping[str, Sequence[str]] | None = None
) -> Figure:
    """Plot losses against the step: on training batches, and on the fixed prompts if any run was evaluated on them.

    Args:
        curves: The `metrics.csv` of each run. The keys are the runs' names. The first runs get the darkest lines.
        title: Title of the figure.
        groups: Names of the runs in each group. The runs of a group differ only in their seeds. If a group has several
            runs, a thick line with the group's name shows their mean, and thin lines of the same colour show the single
            runs.
    """
    panels, seeds = {}, {}
    for key, name in _PANELS.items():
        # If a run was trained by negative log-likelihood, only this loss is shown.
        shown = {run: table for run, table in curves.items() if ("train/nll" in table) == key.endswith("nll")}
        losses = {run: _losses(shown.get(run, pd.DataFrame()), key) for run in curves}
        if any(map(len, losses.values())):
            panels[key] = (name, losses if groups is None else _means(losses, groups, key))
            seeds[key] = [] if groups is None else [[losses[run] for run in runs] for runs in groups.values()]
    names = list(curves) if groups is None else list(groups)
    figure, axes = new_figure(max(1, len(panels)), width=4.0, height=3.6, title=title)
    has_end_labels = 1 < len(names) <= MAX_END_LABELS and max(map(len, names)) <= _MAX_NAME_LENGTH
    for panel, (key, (name, losses)) in zip(axes, panels.items(), strict=False):
        for members, colour in zip(seeds[key], ordered_colours(len(seeds[key])), strict=True):
            for curve in members if len(members) > 1 else ():
                later = curve[curve["step"] > 0]
                panel.plot(later["step"], later[key], color=colour, linewidth=0.6, alpha=0.6)
        _draw_losses(panel, losses, key)
        panel.set_title(name, fontsize=10)
        if has_end_labels:
            _label_ends(panel, losses, key)
    for panel, key in zip(axes, panels or ["train/loss"], strict=False):
        if key.startswith("train/") or panel is axes[0]:
            panel.set_ylabel(_LABELS[key.rpartition("/")[2]])
    if 1 < len(names) <= MAX_LABELS and not has_end_labels:
        name_outside(figure, axes[: len(panels)], loc="outside lower center", ncols=3, fontsize=8)
    return figure


def _losses(table: pd.DataFrame, key: str) -> pd.DataFrame:
    """Return the steps and the losses of one column, or no rows if the table lacks this column.

    Squared errors that are not positive are left out, because the axis is logarithmic.
    """
    if not {"step", key} <= set(table.columns):
        return pd.DataFrame({"step": [], key: []})
    numbers = table[["step", key]].apply(pd.to_numeric, errors="coerce").dropna()
    return numbers[(numbers["step"] >= 0) & (numbers[key] > (-math.inf if key.endswith("nll") else 0))]


def _means(
    losses: Mapping[str, pd.DataFrame], groups: Mapping[str, Sequence[str]], key: str
) -> dict[str, pd.DataFrame]:
    """Return the mean curve of each group over its seeds. Only the steps with the largest number of seeds are kept."""
    means = {}
    for group, runs in groups.items():
        table = pd.concat([losses[run] for run in runs]).rename(columns={key: "value"})
        mean = pool(table, by=["step"]).rename(columns={"value": key})
        means[group] = mean.loc[mean["num_seeds"] == mean["num_seeds"].max(), ["step", key]]
    return means


def _draw_losses(axes: Axes, losses: Mapping[str, pd.DataFrame], key: str) -> None:
    first = math.inf
    for (run, curve), colour in zip(losses.items(), ordered_colours(len(losses)), strict=True):
        if curve.empty:
            continue
        start, later = curve[curve["step"] == 0], curve[curve["step"] > 0]
        first = min([first, *later["step"]])
        axes.plot(later["step"], later[key], color=colour, label=run, marker="." if len(later) < 3 else None)
        axes.plot(
            start["step"], start[key], color=colour, linestyle="", marker="o", markersize=4,
            label=run if later.empty else None,
        )  # fmt: skip
    scale_steps(axes, first=float(first) if first < math.inf else 1.0)
    axes.set_xlabel("step (updates)" if len(losses) < 2 else "step (updates; dots: step 0)")
    if key.endswith("nll"):
        return
    axes.set_yscale("log")
    lowest, highest = axes.get_ylim()
    if highest / lowest > MANY_LABELS:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter() if highest / lowest > MANY_LABELS else "{x:g}")
    axes.tick_params(axis="y", which="minor", labelsize=8)


def _label_ends(axes: Axes, losses: Mapping[str, pd.DataFrame], key: str) -> None:
    """Write the name of each run to the right of the axes, and join it to the end of the run's line. The names do not overlap."""
    scale = float if key.endswith("nll") else math.log
    low, high = map(scale, axes.get_ylim())
    colours = dict(zip(losses, ordered_colours(len(losses)), strict=True))
    ends = {run: curve.iloc[-1] for run, curve in losses.items() if len(curve)}
    heights = {run: (scale(end[key]) - low) / (high - low) for run, end in ends.items()}
    ordered = sorted(heights, key=lambda run: heights[run])
    for run, height in zip(ordered, _spread([heights[run] for run in ordered]), strict=True):
        axes.annotate(
            run, (ends[run]["step"], ends[run][key]), xytext=(1.05, height), textcoords="axes fraction", va="center", fontsize=9,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colours[run], "linewidth": 1.0, "shrinkA": 1, "shrinkB": 1, "relpos": (0, 0.5)},
        )  # fmt: skip


def _spread(heights: Sequence[float]) -> list[float]:
    """Move sorted heights in [0, 1] apart, so that neighbours differ by at least `_LABEL_HEIGHT`.

    A first pass moves heights up. A second pass moves heights down, so that none is above 1.
    """
    spread: list[float] = []
    for height in heights:
        spread.append(max(height, spread[-1] + _LABEL_HEIGHT) if spread else height)
    limit = 1.0
    for index in reversed(range(len(spread))):
        spread[index] = min(spread[index], limit)
        limit = spread[index] - _LABEL_HEIGHT
    return spread
