"""The figure of an evaluation: gaps to ridge, dMMSE and other predictors over training, and losses out of distribution."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from icl.evaluation.scores import headlines
from icl.plotting.colours import BLACK, BLUE, GREEN, ORANGE, VERMILION
from icl.plotting.style import finish_step_axes, new_figure, select, write_in_middle

_GAPS = (
    ("delta_ridge", VERMILION, "to ridge"),
    ("delta_bayes", ORANGE, "to Bayes for new tasks"),
    ("delta_dmmse", GREEN, "to dMMSE"),
    ("prior_zero", BLACK, "to zero"),
)


def plot_evaluation(numbers: pd.DataFrame, baselines: pd.DataFrame, *, title: str) -> Figure:
    """Plot gaps over training on training tasks and on new tasks, and for every distribution the last loss divided by ridge's loss.

    Args:
        numbers: A run's `results/evaluation.csv`.
        baselines: A run's `results/baselines.csv`.
        title: Title of the figure.
    """
    figure, (pretrain, true, shifts) = new_figure(3, width=4.6, height=4.6, title=title)
    _draw_gaps(pretrain, numbers, "pretrain", "On the M training tasks")
    law = "" if (baselines["quantity"] == "bayes").any() else ", w ~ N(0, I)"
    _draw_gaps(true, numbers, "true", f"On new tasks{law}")
    _draw_shifts(shifts, select(numbers, step=numbers["step"].max()), baselines)
    return figure


def _draw_gaps(axes: Axes, numbers: pd.DataFrame, distribution: str, title: str) -> None:
    means = select(numbers, distribution=distribution, position="mean")
    for quantity, colour, label in _GAPS:
        curve = select(means, quantity=quantity)
        if len(curve):
            axes.errorbar(curve["step"], curve["value"], 2 * curve["stderr"], color=colour, label=label, capsize=2)
    # A logarithmic scale needs at least one positive number.
    axes.set_yscale("log" if (means["value"] > 0).any() else "linear")
    finish_step_axes(axes, title, "mean squared difference of predictions")
    axes.legend(fontsize=8)


def _draw_shifts(axes: Axes, last: pd.DataFrame, baselines: pd.DataFrame) -> None:
    losses = headlines(select(last, quantity="loss")).set_index("distribution")
    if not losses["value"].notna().any():
        write_in_middle(axes, "the losses of the last step are not finite")
        return
    ridge = headlines(select(baselines, quantity="ridge")).set_index("distribution")["value"]
    ratio, error = losses["value"] / ridge[losses.index], 2 * losses["stderr"] / ridge[losses.index]
    names = [name if position == "mean" else f"{name} (last y)" for name, position in losses["position"].items()]
    axes.errorbar(ratio, range(len(ratio)), xerr=error, fmt="o", color=BLUE, markersize=4, capsize=2)
    axes.axvline(1, color=VERMILION, linestyle="--", linewidth=1.2, label="ridge")
    axes.set_yticks(range(len(ratio)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="loss / ridge's loss (bars: 2 standard errors)")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="x", which="both", labelsize=8)
    axes.set_title("Last step, every distribution", fontsize=10)
    axes.legend(fontsize=8)
