"""The figure of an implicit prior: energy distances of the model's tasks to both candidate priors, the nearer prior, and sizes."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from icl.plotting.colours import BLACK, BLUE, GREEN, VERMILION
from icl.plotting.style import draw_band, finish_step_axes, new_figure, select, write_in_middle

_CANDIDATES = {"pool": ("M training tasks", GREEN), "gaussian": ("N(0, I)", VERMILION)}


def plot(table: pd.DataFrame, *, title: str) -> Figure:
    """Draw the table of `icl.analysis.prior` in three panels.

    Args:
        table: The run's `results/prior.csv`.
        title: Title of the figure.
    """
    title = f"{title}   (bands: 2 standard errors; open marks: verdict is not ok)"
    figure, (distances, preference, squares) = new_figure(3, width=4.6, height=4.0, title=title)
    by_step = table[table["step"].notna()].sort_values("step", kind="stable")
    whole_run = table[table["step"].isna()]
    for candidate, (label, colour) in _CANDIDATES.items():
        _draw(distances, select(by_step, quantity="energy_distance", candidate=candidate), f"to {label}", colour)
        for level in select(whole_run, quantity="mean_square", candidate=candidate)["value"]:
            squares.axhline(level, color=colour, linewidth=1.0, linestyle="--", label=f"prompts of {label}")
    for level in select(whole_run, quantity="separation")["value"]:
        distances.axhline(level, color=BLACK, linewidth=0.8, linestyle=":", label="between the two priors")
    _finish(distances, "Distance of the model's tasks to each prior", "energy distance of the estimates")
    rows = select(by_step, quantity="preference")
    if rows.empty:
        write_in_middle(preference, "M = ∞: there is only one prior")
    else:
        _draw(preference, rows, "", BLUE)
        _finish(preference, "Nearer prior (above 0: training tasks)", "distance to N(0, I) − to training tasks")
    _draw(squares, select(by_step, quantity="mean_square", candidate="model"), "model", BLUE)
    _finish(squares, "Size of the estimated tasks", "mean |w|² / D")
    return figure


def _draw(axes: Axes, rows: pd.DataFrame, label: str, colour: str) -> None:
    """Draw a line with its band. Marks are filled if the verdict is ok, otherwise open."""
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
