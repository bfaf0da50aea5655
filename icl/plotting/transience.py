"""The figure of transient ridge: the loss on new tasks falls towards the loss of ridge and rises again, in every seed."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from icl.plotting.colours import BLUE, GREEN, VERMILION
from icl.plotting.seeds import draw_curves
from icl.plotting.style import finish_step_axes, new_figure, select

_PANELS = {"pretrain": "Loss on the training tasks", "true": "Loss on new tasks"}
_BASELINES = {"zero": ("0.5", ":", "zero"), "ridge": (VERMILION, "--", "ridge"), "dmmse": (GREEN, "-.", "dMMSE")}


def plot_transience(table: pd.DataFrame, *, title: str) -> Figure:
    """Plot the loss on training tasks (left) and on new tasks (right) over the steps, with the losses of the baselines.

    Each seed is a thin line. The mean over seeds is a thick line with its 95 % interval. The loss on new tasks is smallest at some step;
    the grey band is the 95 % interval of this step over seeds.

    Args:
        table: The shipped table `transience`.
        title: Title of the figure.
    """
    figure, panels = new_figure(len(_PANELS), width=4.6, height=3.8, title=title)
    for axes, (distribution, name) in zip(panels, _PANELS.items(), strict=True):
        losses = select(table, distribution=distribution, quantity="loss")
        curves = select(losses, predictor="model")
        curves = curves.assign(run=curves["seed"], x=curves["step"].astype(float))
        draw_curves(axes, curves, color=BLUE, linewidth=1.8, label="transformer")
        for predictor, (colour, line, label) in _BASELINES.items():
            level = select(losses, predictor=predictor)["value"].mean()
            axes.axhline(level, color=colour, linestyle=line, linewidth=1.2, label=label)
        finish_step_axes(axes, name, "loss (squared error per target)")
        axes.set_ylim(0, 1.2 * select(losses, predictor="zero")["value"].max())
    _draw_critical_step(panels[-1], table)
    panels[0].legend(fontsize=8)
    return figure


def _draw_critical_step(axes: Axes, table: pd.DataFrame) -> None:
    """Shade the 95 % interval of the step with the smallest loss, and write the rise of the loss after this step."""
    for row in select(table, quantity="critical_step").to_dict("records"):
        axes.axvspan(row["low"], row["high"], color="0.5", alpha=0.15, linewidth=0)
    for row in select(table, quantity="rise").to_dict("records"):
        text = f"rise {row['value']:.2f} ± {row['stderr']:.2f}\n(standard error over seeds)"
        axes.annotate(text, (0.97, 0.04), xycoords="axes fraction", ha="right", va="bottom", fontsize=9)
