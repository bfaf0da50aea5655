"""The figure of an evaluation: gaps to the Bayes-optimal predictors over training, and losses out of distribution."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from icl.evaluation import headlines
from icl.plotting.style import BLACK, BLUE, GREEN, VERMILION, new_figure, scale_steps


def plot_evaluation(numbers: pd.DataFrame, baselines: pd.DataFrame, *, title: str) -> Figure:
    """Gaps over steps in and out of distribution (left, middle), loss against ridge's under every shift (right).

    Args:
        numbers: A run's `results/evaluation.csv`.
        baselines: Its `results/baselines.csv`.
        title: Above the panels.
    """
    figure, (pretrain, true, shifts) = new_figure(3, width=4.6, height=4.6)
    _draw_gaps(pretrain, numbers, "pretrain", "On the M training tasks")
    _draw_gaps(true, numbers, "true", "On new tasks, w ~ N(0, I)")
    _draw_shifts(shifts, numbers[numbers["step"] == numbers["step"].max()], baselines)
    figure.suptitle(title, fontsize=11)
    return figure


def _draw_gaps(axes: Axes, numbers: pd.DataFrame, distribution: str, title: str) -> None:
    means = numbers[(numbers["distribution"] == distribution) & (numbers["position"] == "mean")]
    series = (("delta_ridge", VERMILION, "to ridge"), ("delta_dmmse", GREEN, "to dMMSE"))
    for quantity, colour, label in (*series, ("prior_zero", BLACK, "to zero")):
        curve = means[means["quantity"] == quantity]
        if len(curve):
            axes.errorbar(curve["step"], curve["value"], 2 * curve["stderr"], color=colour, label=label, capsize=2)
    scale = "log" if (means["value"] > 0).any() else "linear"  # nothing finite, nothing to scale
    scale_steps(axes)
    axes.set(yscale=scale, xlabel="step (updates)", ylabel="mean squared distance of predictions")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8)


def _draw_shifts(axes: Axes, last: pd.DataFrame, baselines: pd.DataFrame) -> None:
    losses = headlines(last[last["quantity"] == "loss"]).set_index("distribution")
    if not losses["value"].notna().any():
        axes.text(0.5, 0.5, "the last step's losses are not finite", ha="center", transform=axes.transAxes)
        return
    ridge = headlines(baselines[baselines["quantity"] == "ridge"]).set_index("distribution")["value"]
    ratio, error = losses["value"] / ridge[losses.index], 2 * losses["stderr"] / ridge[losses.index]
    names = [name if position == "mean" else f"{name} (last y)" for name, position in losses["position"].items()]
    axes.errorbar(ratio, range(len(ratio)), xerr=error, fmt="o", color=BLUE, markersize=4, capsize=2)
    axes.axvline(1, color=VERMILION, linestyle="--", linewidth=1.2, label="ridge")
    axes.set_yticks(range(len(ratio)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="loss / ridge's loss (bars: 2 standard errors)")
    for axis in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        axis("{x:g}")
    axes.tick_params(axis="x", which="both", labelsize=8)
    axes.set_title("Last step, every distribution", fontsize=10)
    axes.legend(fontsize=8)
