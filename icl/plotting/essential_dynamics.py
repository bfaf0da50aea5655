"""The figure of essential dynamics: principal components of a trajectory over training, and their shares of the variance.

The path in planes of two components is drawn with its evolute, the curve of the centres of its osculating circles. Each
component's share of the variance is drawn next to its share in random walks.
"""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from icl.plotting.colours import BLACK, BLUE, GREEN, ORANGE, ORDERED, PURPLE, SKY, VERMILION, YELLOW
from icl.plotting.style import new_figure, select, write_in_middle

_RUN_COLOURS = (SKY, ORANGE, GREEN, PURPLE, BLUE, VERMILION)
_COMPONENT_COLOURS = (BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY)
_SHAPES = (("cusp", "X", 45, "smooth_score"), ("vertex", "D", 45, "smooth_score"), ("form", "*", 120, "form_score"))
"""Kind of shape, its marker and size, and the quantity in the table that gives its coordinates."""
_GREY = "#888888"
_REFERENCE_MARKERS = "sP^vhd8<>p"
_STATES = {
    "outputs": "predictions",
    "tokens": "outputs at all tokens",
    "weights": "weights",
    "gradients": "gradients of the loss",
    "first_moment": "Adam's first moment",
    "second_moment": "Adam's second moment",
}
_MAX_NAMED = 6
"""A legend names at most this many runs, and at most this many references. The references are ridge and dMMSE."""


def plot(table: pd.DataFrame, *, title: str) -> Figure:
    """Draw four panels from the table of `icl.analysis.essential_dynamics`.

    Circles are checkpoints; lines are the smoothed path. The evolute is drawn only for a single run. Cusps, vertices and forms have
    open marks if their verdict is not ok.

    Args:
        table: The run's `results/essential-dynamics.csv`.
        title: Start of the figure's title. We add the number of further runs, the kind of state (such as predictions) and the smoothing.
    """
    figure, (first, second, times, shares) = new_figure(2, num_rows=2, width=6.0, height=4.6)
    scores = select(table, quantity="score")
    norm = LogNorm(1, max(scores["step"].astype(float).max() + 1, 2))
    components = [name for name in ("PC1", "PC2", "PC3") if (table["item"] == name).any()]
    for axes, plane in ((first, components[:2]), (second, components[1:3])):
        if len(plane) < 2:
            write_in_middle(axes, "the trajectory has no further components")
            axes.set_axis_off()
            continue
        _draw_plane(axes, table, plane, norm)
        figure.colorbar(ScalarMappable(norm, ORDERED), ax=axes, label="step + 1")
    _draw_times(times, table)
    _draw_shares(shares, table)
    num_others = scores["run"].nunique() - 1
    others = f" and {num_others} more" if num_others else ""
    smoothing = f"lines: smoothed in log step, kernel width {table['bandwidth'].iloc[0]:g} or more"
    figure.suptitle(f"{title}{others}, {_STATES[table['state'].iloc[0]]}   ({smoothing})", fontsize=11)
    return figure


def _draw_plane(axes: Axes, table: pd.DataFrame, plane: list[str], norm: LogNorm) -> None:
    runs = select(table, quantity="score")["run"].unique()
    is_first_plane = plane[0] == "PC1"  # only this plane has the legend of runs and references
    for number, run in enumerate(runs):
        points, path = _scores_and_path(select(table, run=run))
        axes.scatter(
            points[plane[0]], points[plane[1]], c=points.index + 1.0, norm=norm, cmap=ORDERED, s=14, zorder=3, alpha=0.8
        )
        label = run if len(runs) > 1 and number < _MAX_NAMED and is_first_plane else None
        colour = _RUN_COLOURS[number % len(_RUN_COLOURS)]
        axes.plot(path[plane[0]], path[plane[1]], color=colour, linewidth=1.3, label=label, zorder=2)
    _draw_references(axes, table, plane, named=is_first_plane)
    _set_limits(axes, table, plane)
    if len(runs) == 1:
        _draw_evolute(axes, table, plane)
    _draw_shapes(axes, table, plane)
    share = _by_item(table, "explained_share")["value"]
    axes.set(xlabel=f"{plane[0]} ({share[plane[0]]:.0%} of the variance)", ylabel=f"{plane[1]} ({share[plane[1]]:.0%})")
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=8)


def _set_limits(axes: Axes, table: pd.DataFrame, plane: list[str]) -> None:
    """Set the limits from the scores. The evolute cannot set them, because it goes to infinity at every inflection of the path."""
    shown = table[table["quantity"].isin(["score", "smooth_score", "reference_score"])]
    limits = []
    for item in plane:
        values = select(shown, item=item)["value"]
        margin = 0.07 * (values.max() - values.min())
        limits.append((values.min() - margin, values.max() + margin))
    axes.set(xlim=limits[0], ylim=limits[1])


def _draw_references(axes: Axes, table: pd.DataFrame, plane: list[str], *, named: bool) -> None:
    """Draw the projections of ridge and dMMSE.

    For each predictor, the legend shows a share: how much of the predictor's squared distance to the mean of all states lies within
    the principal components.
    """
    captured = select(table, quantity="reference_captured").set_index("run")["value"]
    for number, (name, rows) in enumerate(select(table, quantity="reference_score").groupby("run", sort=False)):
        point = rows.set_index("item")["value"]
        label = f"{name} ({captured[name]:.0%} within all PCs)" if named and number < _MAX_NAMED else None
        axes.scatter(
            point[plane[0]], point[plane[1]], marker=_REFERENCE_MARKERS[number % len(_REFERENCE_MARKERS)], s=55, zorder=4, label=label,
            color=VERMILION if name == "ridge" else GREEN, edgecolors=BLACK, linewidths=0.5,
        )  # fmt: skip


def _draw_evolute(axes: Axes, table: pd.DataFrame, plane: list[str]) -> None:
    """Draw the centres of the osculating circles, with gaps where the curvature is uncertain."""
    x, y = (
        select(table, item="-".join(plane), quantity=quantity).set_index("step")
        for quantity in ("centre_1", "centre_2")
    )
    if x.empty:
        return
    is_ok = (x["verdict"] == "ok").to_numpy()
    axes.plot(
        x["value"].where(is_ok).astype(float), y["value"].where(is_ok).astype(float), color=VERMILION, linewidth=0.9,
        linestyle="--", marker=".", markersize=3, label="evolute", zorder=1,
    )  # fmt: skip


def _draw_shapes(axes: Axes, table: pd.DataFrame, plane: list[str]) -> None:
    """Mark the cusps and vertices of the path, and the forms that the analysis found."""
    for kind, marker, size, source in _SHAPES:
        shapes = table[(table["quantity"] == kind) & table["item"].isin(["-".join(plane), "all"])]
        is_ok = shapes["verdict"] == "ok"
        for chosen, label, face, edge in (
            (shapes[is_ok], kind, YELLOW, BLACK),
            (shapes[~is_ok], f"{kind}, uncertain", "none", _GREY),
        ):
            if len(chosen):
                coordinates = _pivot(table, source, ["run", "step"])
                points = coordinates.loc[list(zip(chosen["run"], chosen["step"], strict=True))]
                style: dict[str, Any] = {
                    "marker": marker,
                    "s": size,
                    "facecolors": face,
                    "edgecolors": edge,
                    "zorder": 5,
                }
                axes.scatter(points[plane[0]], points[plane[1]], label=label, **style)


def _draw_times(axes: Axes, table: pd.DataFrame) -> None:
    """Draw the scores of every run and their smoothed path against the step."""
    runs = select(table, quantity="score")["run"].unique()
    for number, run in enumerate(runs):
        scores, path = _scores_and_path(select(table, run=run))
        for item, colour in zip(scores.columns, _COMPONENT_COLOURS, strict=False):
            style: dict[str, Any] = {"color": colour, "alpha": 1.0 if len(runs) == 1 else 0.6}
            axes.plot(scores.index + 1.0, scores[item], linestyle="", marker=".", markersize=3, **style)
            axes.plot(path.index + 1.0, path[item], label=item if number == 0 else None, **style)
    axes.set_xscale("log")
    axes.axhline(0, color=BLACK, linewidth=0.6)
    axes.set(xlabel="step + 1 (updates)", ylabel="score")
    axes.legend(fontsize=8)


def _draw_shares(axes: Axes, table: pd.DataFrame) -> None:
    """Draw each component's share of the variance next to its share in random walks."""
    share, flips = _by_item(table, "explained_share"), _by_item(table, "null_flips")
    x = np.arange(len(share))
    axes.bar(x, share["value"], width=0.55, color=SKY, label="explained share", zorder=2)
    for offset, quantity, marker, size, label in (
        (-0.18, "null_equal", "_", 9, "walk of equal steps"),
        (-0.06, "null_brownian", "o", 4, "Brownian motion in updates"),
        (0.06, "null_walk", "s", 4, "walk with the run's step lengths"),
    ):
        axes.plot(x + offset, _by_item(table, quantity)["value"], linestyle="", marker=marker, color=BLACK, label=label,
                  markersize=size, markerfacecolor="none", zorder=3)  # fmt: skip
    axes.errorbar(x + 0.18, flips["value"], 2 * flips["stderr"], fmt=".", color=VERMILION, capsize=3,
                  label="the run's steps, random signs (2 std. deviations)", zorder=3)  # fmt: skip
    axes.set_xticks(x, list(share.index))
    axes.set(ylabel="share of the variance", ylim=(0, max(1.0, axes.get_ylim()[1])))
    axes.set_title(_describe_shares(table, share), fontsize=9)
    axes.legend(fontsize=8)


def _describe_shares(table: pd.DataFrame, share: pd.DataFrame) -> str:
    uncertain = ", ".join(share.index[share["verdict"] != "ok"])
    text = f"Not above random walks: {uncertain}" if uncertain else "Cumulative shares above those of random walks"
    noise = select(table, quantity="noise_share")["value"]
    if len(noise):
        text += f"; estimation noise: at most {noise.iloc[0]:.0%}"
    ratios = select(table, quantity="displacement_ratio")["value"]
    ratio = f"{ratios.min():.2g}" + (f" to {ratios.max():.2g}" if len(ratios) > 1 else "")
    return f"{text}\nsquared displacement / sum of squared steps: {ratio} (random walk: 1)"


def _by_item(table: pd.DataFrame, quantity: str) -> pd.DataFrame:
    return select(table, quantity=quantity).set_index("item")


def _scores_and_path(run: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return two tables: the scores of a run, and their smoothed path. Each has a row for each step and a column for each component.

    If there is no smoothed path, the scores take its place.
    """
    scores, path = (_pivot(run, quantity, "step") for quantity in ("score", "smooth_score"))
    return scores, scores if path.empty else path


def _pivot(table: pd.DataFrame, quantity: str, index: str | list[str]) -> pd.DataFrame:
    """Return a table of the values of one quantity, with a column for each component."""
    rows = select(table, quantity=quantity).astype({"step": float})
    return rows.pivot_table(index=index, columns="item", values="value", dropna=False)
