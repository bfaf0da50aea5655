"""Figure of refined LLCs: each component's estimate over training, and its susceptibilities to the loss at each position."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from icl.plotting.colours import BLACK, ordered_colours
from icl.plotting.llc import VERDICTS, draw_by_verdict
from icl.plotting.style import new_figure, scale_steps, select

_SETS = {"pretrain": "training tasks", "true": "new tasks"}


def plot_components(table: pd.DataFrame, susceptibilities: pd.DataFrame, *, title: str) -> Figure:
    """Plot the refined LLC of each component against the step, and susceptibilities at the last step against the position.

    Args:
        table: Rows of `llc-components.csv` that share their settings. If all rows have the same step, the x axis of the
            first panel shows the components.
        susceptibilities: Rows of `llc-susceptibilities.csv` for the same estimates.
        title: Title of the figure.
    """
    figure, (estimates, *panels) = new_figure(3, width=4.8, height=3.9, title=title)
    names = list(dict.fromkeys(table["component"]))
    colours = dict(zip(names, ordered_colours(len(names)), strict=True))
    if table["step"].nunique() > 1:
        _draw_over_training(estimates, table, colours)
    else:
        _draw_at_one_step(estimates, table, names)
    last = susceptibilities[susceptibilities["step"] == table["step"].max()]
    for panel, distribution in zip(panels, _SETS, strict=True):
        panel.axhline(0, color=BLACK, linewidth=0.8)
        for index, name in enumerate(names):
            rows = select(last, component=name, distribution=distribution)
            shift = 0.3 * (index / max(1, len(names) - 1) - 0.5)  # so that bars do not overlap
            panel.errorbar(
                rows["position"] + shift, rows["susceptibility"], yerr=2 * rows["stderr"], color=colours[name], marker=".", label=name, capsize=2,
            )  # fmt: skip
        panel.set_xlabel("position")
        panel.set_title(f"loss on {_SETS[distribution]}, step {int(table['step'].max()):,}", fontsize=9)
    panels[0].set_ylabel("susceptibility (bars: 2 standard errors)")
    panels[-1].legend(fontsize=7, ncols=2)
    return figure


def _draw_over_training(axes: Axes, table: pd.DataFrame, colours: dict[str, object]) -> None:
    for name, colour in colours.items():
        rows = select(table, component=name).sort_values("step")
        axes.plot(rows["step"], rows["llc"], color=colour, label=name)
        axes.errorbar(rows["step"], rows["llc"], yerr=2 * rows["stderr"], fmt="none", color=colour, capsize=2)
        for verdict, style in VERDICTS.items():
            marked = select(rows, verdict=verdict)
            marks = {key: value for key, value in style.items() if key != "color"}
            axes.plot(marked["step"], marked["llc"], linestyle="", color=colour, markersize=5, **marks)
    first, last = table["step"].min(), table["step"].max()
    if 0 < first < last / 20:
        axes.set_xscale("log")
    elif first < last / 20:
        scale_steps(axes)
    axes.set(xlabel="step (updates)", ylabel="refined LLC (bars: 2 standard errors)")
    axes.set_title("dot: ok, triangle: suspect, cross: invalid", fontsize=9)
    axes.legend(fontsize=7, ncols=2)


def _draw_at_one_step(axes: Axes, table: pd.DataFrame, names: list[str]) -> None:
    draw_by_verdict(axes, table["component"].map({name: index for index, name in enumerate(names)}), table)
    axes.set_xticks(range(len(names)), names, rotation=60 if len(names) > 6 else 0, fontsize=8)
    axes.set(ylabel="refined LLC (bars: 2 standard errors)", title=f"step {int(table['step'].iloc[0]):,}")
    axes.legend(fontsize=8)
