"""The figure of the fit of OOD error: against task diversity, predicted against measured, and its coefficients."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from icl.plotting.style import BLACK, BLUE, ORANGE, VERMILION, new_figure

_NAMES = {
    "log2_num_tasks": "log₂ M",
    "loss": "loss on training tasks",
    "icl_score": "ICL score (negative is good)",
    "delta_ridge": "gap to ridge",
    "delta_dmmse": "gap to dMMSE",
}


def plot(table: pd.DataFrame, *, title: str) -> Figure:
    """Three panels from the table of `icl.analysis.diversity_fit`; bars are two standard errors.

    Args:
        table: What the analysis returned.
        title: Above the panels, before the verdict.
    """
    figure, (against, predicted, coefficients) = new_figure(3, width=4.7, height=4.2)
    about = table[table["quantity"] == "r2_cv"].iloc[0]
    points = {name: table[table["quantity"] == name] for name in ("measured", "fitted", "held_out")}
    place = "new tasks" if about["target"] == "true" else f"`{about['target']}`"
    label = f"loss on {place} (per target)"
    _draw_against(against, points, label)
    _draw_predicted(predicted, points, label, about)
    _draw_coefficients(coefficients, table[table["quantity"] == "coefficient"], about)
    reasons = f": {about['reasons']}" if about["reasons"] else ""
    figure.suptitle(f"{title}   ({about['model_type']}; verdict {about['verdict']}{reasons})", fontsize=10)
    return figure


def _draw_against(axes: Axes, points: dict[str, pd.DataFrame], label: str) -> None:
    """Measured loss and both predictions at every M; M = inf, which has no place on the axis, as a line."""
    measured = points["measured"].assign(num_tasks=points["measured"]["num_tasks"].astype(float))
    finite = measured[measured["num_tasks"] < float("inf")]
    infinite = measured[measured["num_tasks"] == float("inf")]
    axes.errorbar(
        finite["num_tasks"], finite["value"], 2 * finite["stderr"], fmt="o", color=BLACK, markersize=4, label="measured"
    )
    for name, colour, marker, text in (("fitted", BLUE, "-", "fitted"), ("held_out", ORANGE, "x", "held out")):
        rows = points[name].assign(num_tasks=points[name]["num_tasks"].astype(float))
        rows = rows[rows["num_tasks"] < float("inf")]
        axes.plot(rows["num_tasks"], rows["value"], marker, color=colour, label=text, markersize=7)
    for place, value in enumerate(infinite["value"]):
        axes.axhline(
            value, color=VERMILION, linestyle="--", linewidth=1.2, label="M = ∞, measured" if not place else None
        )
    axes.set_xscale("log", base=2)
    axes.set(xlabel="number of training tasks M", ylabel=label)
    axes.set_title("Against task diversity", fontsize=10)
    axes.legend(fontsize=8)


def _draw_predicted(axes: Axes, points: dict[str, pd.DataFrame], label: str, about: pd.Series) -> None:
    keys = ["num_tasks", "step", "checkpoint_hash"]
    both = points["measured"].merge(points["held_out"], on=keys, suffixes=("", "_held_out"))
    errors = 2 * both["stderr"]
    axes.errorbar(both["value"], both["value_held_out"], xerr=errors, fmt="o", color=ORANGE, markersize=4)
    low, high = (extreme(both[["value", "value_held_out"]].to_numpy().ravel()) for extreme in (min, max))
    axes.plot([low, high], [low, high], color=BLACK, linewidth=0.8, linestyle=":")
    axes.set(xlabel=f"measured {label}", ylabel="predicted without this M")
    axes.set_title(f"R² = {about['value']:.2f} ± {about['stderr']:.2f}, leaving out one M at a time", fontsize=10)


def _draw_coefficients(axes: Axes, rows: pd.DataFrame, about: pd.Series) -> None:
    places = range(len(rows))
    axes.errorbar(rows["value"], places, xerr=2 * rows["stderr"], fmt="o", color=BLUE, markersize=5, capsize=2)
    axes.axvline(0, color=BLACK, linewidth=0.8)
    axes.set_yticks(places, [_NAMES.get(name, name) for name in rows["item"]], fontsize=9)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set(xlabel="change of the loss per standard deviation")
    axes.set_title("Coefficients (bars: 2 standard errors)", fontsize=10)
