"""The figure of runs as far as they have come: their losses against the step, one line for each."""

from collections.abc import Mapping

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from icl.plotting.style import new_figure, ordered_colours

MAX_LABELS = 16
"""Runs that a legend can still tell apart."""
MANY_LABELS = 3.0
"""Highest over lowest loss from which on 1, 2 and 5 are labels enough."""
_PANELS = {
    "train/loss": "Training batches",
    "eval/pretrain/loss": "Fixed prompts, training tasks",
    "eval/true/loss": "Fixed prompts, new tasks, w ~ N(0, I)",
}


def plot_curves(curves: Mapping[str, pd.DataFrame], *, title: str) -> Figure:
    """Losses against step: on training batches, then on the fixed prompts that any of the runs was evaluated on.

    Args:
        curves: By the run's name, its `metrics.csv`; dark lines are those that come first.
        title: Above the panels.
    """
    panels = {
        key: name for key, name in _PANELS.items() if any(_curve(table, key) is not None for table in curves.values())
    }
    figure, axes = new_figure(max(1, len(panels)), width=4.6)
    for panel, (key, name) in zip(axes, panels.items(), strict=False):
        _draw(panel, curves, key)
        panel.set_title(name, fontsize=10)
    axes[0].set_ylabel("loss (squared error per target)")
    handles, names = axes[0].get_legend_handles_labels()
    if 1 < len(names) <= MAX_LABELS:
        figure.legend(handles, names, loc="outside right center", fontsize=8)
    figure.suptitle(title, fontsize=11)
    return figure


def _draw(axes: Axes, curves: Mapping[str, pd.DataFrame], key: str) -> None:
    for (name, table), colour in zip(curves.items(), ordered_colours(len(curves)), strict=True):
        curve = _curve(table, key)
        if curve is not None:
            axes.plot(curve["step"], curve[key], color=colour, label=name, marker="." if len(curve) < 3 else None)
    axes.set(xscale="log", yscale="log", xlabel="step (updates)")
    axes.xaxis.set_minor_formatter(NullFormatter())
    lowest, highest = axes.get_ylim()
    if highest / lowest > MANY_LABELS:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter() if highest / lowest > MANY_LABELS else "{x:g}")
    axes.tick_params(axis="y", which="minor", labelsize=8)


def _curve(table: pd.DataFrame, key: str) -> pd.DataFrame | None:
    """The positive losses after step 0, or None if there are none."""
    if not {"step", key} <= set(table.columns):
        return None
    numbers = table[["step", key]].apply(pd.to_numeric, errors="coerce").dropna()
    numbers = numbers[(numbers["step"] > 0) & (numbers[key] > 0)]
    return numbers if len(numbers) else None
