"""The figure of a model's implicit prior: its energy distances to candidate priors, the nearer prior, and the size of estimated tasks."""

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from icl.plotting.colours import BLACK, BLUE, GREEN, ORANGE, VERMILION
from icl.plotting.style import draw_band, finish_step_axes, new_figure, select, write_in_middle

_CANDIDATES = {
    "pool": ("M training tasks", GREEN),
    "prior": ("the prior of new tasks", ORANGE),
    "gaussian": ("N(0, I)", VERMILION),
}


def plot(table: pd.DataFrame, *, title: str) -> Figure:
    """Draw the table of `icl.analysis.prior` in three panels.

    Args:
        table: The run's `results/prior.csv`.
        title: Title of the figure.
    """
    title = f"{title}   (bands: 2 standard errors; open marks: verdict is not ok)"
    figure, (distances, preference, squares) = new_figure(3, width=4.6, height=4.0, title=title)
    by_step = table[table["step"].notna()].sort_values("step", kind="stable")
    labels = {}
    for candidate, (label, colour) in _CANDIDATES.items():
        rows = select(by_step, quantity="energy_distance", candidate=candidate)
        if rows.empty:
            continue
        labels[candidate] = label
        _draw(distances, rows, f"to {label}", colour)
        levels = select(table, quantity="mean_square", candidate=candidate)
        _draw_reference(squares, levels, color=colour, linewidth=1.0, linestyle="--", label=f"prompts of {label}")
    first, *others = labels.values()
    separation = select(table, quantity="separation")
    between = f"from {first} to {others[0]}" if others else None
    _draw_reference(distances, separation, color=BLACK, linewidth=0.8, linestyle=":", label=between)
    _finish(distances, "Distance of the model's tasks to each prior", "energy distance of the estimates")
    rows = select(by_step, quantity="preference")
    if rows.empty:
        write_in_middle(preference, "M = ∞: there is only one prior")
    else:
        _draw(preference, rows, "", BLUE)
        title = f"Nearer prior (above 0: {first}; below: {others[0]})"
        _finish(preference, title, "difference of the two distances")
    _draw(squares, select(by_step, quantity="mean_square", candidate="model"), "model", BLUE)
    _finish(squares, "Size of the estimated tasks", "mean |w|² / D")
    return figure


def _draw_reference(axes: Axes, rows: pd.DataFrame, **style: Any) -> None:
    """Draw a value of the candidate priors as a horizontal line.

    If the pool changes during training, draw the value at each step as a curve.
    """
    if rows["step"].notna().any():
        rows = rows.sort_values("step")
        axes.plot(rows["step"].astype(float), rows["value"], **style)
    else:
        for level in rows["value"]:
            axes.axhline(level, **style)


def _draw(axes: Axes, rows: pd.DataFrame, label: str, colour: str) -> None:
    """Draw a line with a band of two standard errors. Marks are filled if the verdict is ok, otherwise open."""
    if rows.empty:
        return
    draw_band(axes, rows["step"], rows["value"], rows["stderr"], alpha=0.2, color=colour, label=label or None)
    is_ok = rows["verdict"] == "ok"
    for points, face in ((rows[is_ok], colour), (rows[~is_ok], "white")):
        axes.plot(
            points["step"].astype(float), points["value"], "o", markersize=3.5, color=colour, markerfacecolor=face
        )


def _finish(axes: Axes, title: str, label: str) -> None:
    axes.axhline(0, color=BLACK, linewidth=0.6)
    finish_step_axes(axes, title, label)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=8)
