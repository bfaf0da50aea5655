"""The figure of runs as far as they have come: their losses against the step, one line for each.

Few runs are named at the ends of their lines, more in a legend. Step 0 lies far before the next one, so it is a point by itself.
"""

import math
from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from icl.plotting.style import new_figure, ordered_colours, scale_steps
from icl.plotting.tidying import name_outside

MAX_LABELS = 16
"""Runs that a legend can still tell apart."""
MAX_END_LABELS = 12
"""Runs that can be named at the ends of their lines."""
_LABEL_HEIGHT = 0.065
"""Least distance of two such names, as a share of the axes' height."""
_MAX_LETTERS = 30
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
    figure, axes = new_figure(max(1, len(panels)), width=4.0, height=3.6)
    is_labelled = 1 < len(curves) <= MAX_END_LABELS and max(map(len, curves)) <= _MAX_LETTERS
    for panel, (key, name) in zip(axes, panels.items(), strict=False):
        _draw(panel, curves, key)
        panel.set_title(name, fontsize=10)
        if is_labelled:
            _label_ends(panel, curves, key)
    axes[0].set_ylabel("loss (squared error per target)")
    if 1 < len(curves) <= MAX_LABELS and not is_labelled:
        name_outside(figure, axes[: len(panels)], loc="outside lower center", ncols=3, fontsize=8)
    figure.suptitle(title, fontsize=11)
    return figure


def _draw(axes: Axes, curves: Mapping[str, pd.DataFrame], key: str) -> None:
    first = math.inf
    for (name, table), colour in zip(curves.items(), ordered_colours(len(curves)), strict=True):
        curve = _curve(table, key)
        if curve is None:
            continue
        start, rest = curve[curve["step"] == 0], curve[curve["step"] > 0]
        first = min([first, *rest["step"]])
        axes.plot(rest["step"], rest[key], color=colour, label=name, marker="." if len(rest) < 3 else None)
        axes.plot(
            start["step"], start[key], color=colour, linestyle="", marker="o", markersize=4,
            label=name if rest.empty else None,
        )  # fmt: skip
    scale_steps(axes, first=float(first) if first < math.inf else 1.0)
    axes.set(yscale="log", xlabel="step (updates)" if len(curves) < 2 else "step (updates; points: step 0)")
    lowest, highest = axes.get_ylim()
    if highest / lowest > MANY_LABELS:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter() if highest / lowest > MANY_LABELS else "{x:g}")
    axes.tick_params(axis="y", which="minor", labelsize=8)


def _label_ends(axes: Axes, curves: Mapping[str, pd.DataFrame], key: str) -> None:
    """Write each run's name on the right of the axes, joined to the end of its line; names keep their distance."""
    ends = {name: curve.iloc[-1] for name, table in curves.items() if (curve := _curve(table, key)) is not None}
    colours = dict(zip(curves, ordered_colours(len(curves)), strict=True))
    low, high = (math.log(limit) for limit in axes.get_ylim())
    wanted = {name: (math.log(end[key]) - low) / (high - low) for name, end in ends.items()}
    for name, place in zip(
        sorted(wanted, key=lambda name: wanted[name]), _spread(sorted(wanted.values())), strict=True
    ):
        axes.annotate(
            name,
            (ends[name]["step"], ends[name][key]),
            xytext=(1.05, place),
            textcoords="axes fraction",
            va="center",
            fontsize=9,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colours[name],
                "linewidth": 1.0,
                "shrinkA": 1,
                "shrinkB": 1,
                "relpos": (0, 0.5),
            },
        )


def _spread(places: Sequence[float]) -> list[float]:
    """Move sorted places in [0, 1] apart to at least the height of a name, as little as passing up and down once does."""
    spread: list[float] = []
    for place in places:
        spread.append(max(place, spread[-1] + _LABEL_HEIGHT) if spread else place)
    limit = 1.0
    for number in reversed(range(len(spread))):
        spread[number] = min(spread[number], limit)
        limit = spread[number] - _LABEL_HEIGHT
    return spread


def _curve(table: pd.DataFrame, key: str) -> pd.DataFrame | None:
    """The positive losses, or None if there are none."""
    if not {"step", key} <= set(table.columns):
        return None
    numbers = table[["step", key]].apply(pd.to_numeric, errors="coerce").dropna()
    numbers = numbers[(numbers["step"] >= 0) & (numbers[key] > 0)]
    return numbers if len(numbers) else None
