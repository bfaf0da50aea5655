"""The figure of a regression that predicts the OOD loss from task diversity and other features: losses and coefficients."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from icl.plotting.colours import BLACK, BLUE, ORANGE, VERMILION
from icl.plotting.style import new_figure, select

_NAMES = {
    "log2_num_tasks": "log₂ M",
    "loss": "loss on training tasks",
    "icl_score": "ICL score (negative is good)",
    "delta_ridge": "gap to ridge",
    "delta_dmmse": "gap to dMMSE",
}


def plot(table: pd.DataFrame, *, title: str) -> Figure:
    """Draw three panels from the table of `icl.analysis.diversity_fit`; bars are two standard errors.

    Args:
        table: The table that the analysis returns.
        title: Title of the figure; the kind of regression and the verdict are added to it.
    """
    figure, (against, predicted, coefficients) = new_figure(3, width=4.7, height=4.2)
    fit = select(table, quantity="r2_cv").iloc[0]
    target = "new tasks" if fit["target"] == "true" else f"`{fit['target']}`"
    label = f"loss on {target} (per target)"
    _draw_against_diversity(against, table, label)
    _draw_predicted(predicted, table, label)
    predicted.set_title(f"R² = {fit['value']:.2f} ± {fit['stderr']:.2f}, leaving out one M at a time", fontsize=10)
    _draw_coefficients(coefficients, select(table, quantity="coefficient"))
    reasons = f": {fit['reasons']}" if fit["reasons"] else ""
    figure.suptitle(f"{title}   ({fit['model_type']}; verdict {fit['verdict']}{reasons})", fontsize=10)
    return figure


def _draw_against_diversity(axes: Axes, table: pd.DataFrame, label: str) -> None:
    """Draw for every finite M the measured loss, the fitted loss, and the prediction of a fit without this M.

    The measured loss for M = inf is a horizontal line.
    """
    points = table[table["quantity"].isin(("measured", "fitted", "held_out"))]
    points = points.assign(num_tasks=points["num_tasks"].astype(float))
    is_infinite = points["num_tasks"] == float("inf")
    finite, infinite = points[~is_infinite], select(points[is_infinite], quantity="measured")
    measured, fitted, held_out = (select(finite, quantity=name) for name in ("measured", "fitted", "held_out"))
    axes.errorbar(
        measured["num_tasks"], measured["value"], 2 * measured["stderr"], fmt="o", color=BLACK, markersize=4, label="measured"
    )  # fmt: skip
    axes.plot(fitted["num_tasks"], fitted["value"], "-", color=BLUE, label="fitted", markersize=7)
    axes.plot(held_out["num_tasks"], held_out["value"], "x", color=ORANGE, label="held out", markersize=7)
    for index, value in enumerate(infinite["value"]):
        text = "M = ∞, measured" if index == 0 else None
        axes.axhline(value, color=VERMILION, linestyle="--", linewidth=1.2, label=text)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="number of training tasks M", ylabel=label)
    axes.set_title("Loss against task diversity", fontsize=10)
    axes.legend(fontsize=8)


def _draw_predicted(axes: Axes, table: pd.DataFrame, label: str) -> None:
    keys = ["num_tasks", "step", "checkpoint_hash"]
    pairs = select(table, quantity="measured").merge(
        select(table, quantity="held_out"), on=keys, suffixes=("", "_held_out")
    )
    xerr = 2 * pairs["stderr"]
    axes.errorbar(pairs["value"], pairs["value_held_out"], xerr=xerr, fmt="o", color=ORANGE, markersize=4)
    values = pairs[["value", "value_held_out"]].to_numpy()
    diagonal = [values.min(), values.max()]
    axes.plot(diagonal, diagonal, color=BLACK, linewidth=0.8, linestyle=":")
    axes.set(xlabel=f"measured {label}", ylabel="predicted without this M")


def _draw_coefficients(axes: Axes, rows: pd.DataFrame) -> None:
    heights = range(len(rows))
    axes.errorbar(rows["value"], heights, xerr=2 * rows["stderr"], fmt="o", color=BLUE, markersize=5, capsize=2)
    axes.axvline(0, color=BLACK, linewidth=0.8)
    axes.set_yticks(heights, [_NAMES.get(name, name) for name in rows["item"]], fontsize=9)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set(xlabel="change of the loss per standard deviation")
    axes.set_title("Coefficients (bars: 2 standard errors)", fontsize=10)
