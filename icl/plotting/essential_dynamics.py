"""The figure of essential dynamics: the path in planes of components with its evolute, components in time, shares beside walks."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from icl.plotting.style import BLACK, BLUE, GREEN, ORANGE, ORDERED, PURPLE, SKY, VERMILION, YELLOW, new_figure

_RUNS = (SKY, ORANGE, GREEN, PURPLE, BLUE, VERMILION)
_COMPONENTS = (BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY)
_SHAPES = (("cusp", "X"), ("vertex", "D"), ("form", "*"))
_GREY = "#888888"
_REFERENCES = "sP^vhd8<>p"
_STATES = {
    "outputs": "predictions",
    "tokens": "whole outputs",
    "weights": "weights",
    "gradients": "gradients of the loss",
    "first_moment": "Adam's first moment",
    "second_moment": "Adam's second moment",
}
_MOST_NAMED = 6
"""Runs that a legend names."""


def plot(table: pd.DataFrame, *, title: str) -> Figure:
    """Four panels from the table of `icl.analysis.essential_dynamics`.

    Circles are checkpoints, lines the smoothed curve, the evolute is drawn for a single run. Shapes in doubt are hollow.

    Args:
        table: Its `results/essential-dynamics.csv`.
        title: Above the panels.
    """
    figure, (first, second, times, shares) = new_figure(2, num_rows=2, width=6.0, height=4.6)
    steps = table.loc[table["quantity"] == "score", "step"].astype(float) + 1
    norm = LogNorm(1, max(steps.max(), 2))
    names = [item for item in ("PC1", "PC2", "PC3") if (table["item"] == item).any()]
    for axes, plane in ((first, names[:2]), (second, names[1:3])):
        if len(plane) < 2:
            axes.text(0.5, 0.5, "the trajectory has no further components", ha="center", transform=axes.transAxes)
            axes.set_axis_off()
            continue
        _draw_plane(axes, table, plane, norm)
        figure.colorbar(ScalarMappable(norm, ORDERED), ax=axes, label="step + 1")
    _draw_times(times, table)
    _draw_shares(shares, table)
    others = len(table.loc[table["quantity"] == "score", "run"].unique()) - 1
    jointly = f" and {others} more" if others else ""
    kernel = f"lines: smoothed in log step, kernel {table['bandwidth'].iloc[0]:g} or wider"
    figure.suptitle(f"{title}{jointly}, {_STATES[table['state'].iloc[0]]}   ({kernel})", fontsize=11)
    return figure


def _draw_plane(axes: Axes, table: pd.DataFrame, plane: list[str], norm: LogNorm) -> None:
    scores = table[table["quantity"] == "score"]
    runs = list(scores["run"].unique())
    for number, run in enumerate(runs):
        own = table[table["run"] == run]
        points = _pivot(own, "score")
        axes.scatter(
            points[plane[0]],
            points[plane[1]],
            c=points.index + 1.0,
            norm=norm,
            cmap=ORDERED,
            s=14,
            zorder=3,
            alpha=0.8,
        )
        label = run if len(runs) > 1 and number < _MOST_NAMED and plane[0] == "PC1" else None
        curve = _pivot(own, "smooth_score")
        line = points if curve.empty else curve
        axes.plot(
            line[plane[0]], line[plane[1]], color=_RUNS[number % len(_RUNS)], linewidth=1.3, label=label, zorder=2
        )
    _draw_references(axes, table, plane)
    _set_limits(axes, table, plane)
    if len(runs) == 1:
        _draw_evolute(axes, table, plane)
    _draw_shapes(axes, table, plane)
    share = table[table["quantity"] == "explained_share"].set_index("item")["value"]
    axes.set(xlabel=f"{plane[0]} ({share[plane[0]]:.0%} of the variance)", ylabel=f"{plane[1]} ({share[plane[1]]:.0%})")
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=8)


def _set_limits(axes: Axes, table: pd.DataFrame, plane: list[str]) -> None:
    """Around the scores; an evolute goes to infinity at every inflection."""
    shown = table[table["quantity"].isin(["score", "smooth_score", "reference_score"])]
    limits = []
    for item in plane:
        values = shown.loc[shown["item"] == item, "value"]
        margin = 0.07 * (values.max() - values.min())
        limits.append((values.min() - margin, values.max() + margin))
    axes.set(xlim=limits[0], ylim=limits[1])


def _draw_references(axes: Axes, table: pd.DataFrame, plane: list[str]) -> None:
    """The Bayes predictors, with how much of their distance to the mean the components show."""
    rows = table[table["quantity"] == "reference_score"]
    captured = table[table["quantity"] == "reference_captured"].set_index("run")["value"]
    for number, (name, own) in enumerate(rows.groupby("run", sort=False)):
        point = own.set_index("item")["value"]
        style: dict[str, Any] = {
            "color": VERMILION if name == "ridge" else GREEN,
            "edgecolors": BLACK,
            "linewidths": 0.5,
        }
        label = f"{name} ({captured[name]:.0%} within all PCs)" if plane[0] == "PC1" and number < _MOST_NAMED else None
        marker = _REFERENCES[number % len(_REFERENCES)]
        axes.scatter(point[plane[0]], point[plane[1]], marker=marker, s=55, zorder=4, label=label, **style)


def _draw_evolute(axes: Axes, table: pd.DataFrame, plane: list[str]) -> None:
    """The centres of the osculating circles, with gaps where curvature is not known."""
    own = table[table["item"] == "-".join(plane)]
    centres = [own[own["quantity"] == f"centre_{axis}"].set_index("step") for axis in (1, 2)]
    if centres[0].empty:
        return
    known = (centres[0]["verdict"] == "ok").to_numpy()
    x, y = (one["value"].where(known).astype(float) for one in centres)
    axes.plot(x, y, color=VERMILION, linewidth=0.9, linestyle="--", marker=".", markersize=3, label="evolute", zorder=1)


def _draw_shapes(axes: Axes, table: pd.DataFrame, plane: list[str]) -> None:
    """Cusps and vertices on the curve, forms where they lie."""
    for kind, marker in _SHAPES:
        found = table[(table["quantity"] == kind) & table["item"].isin(["-".join(plane), "all"])]
        source = "form_score" if kind == "form" else "smooth_score"
        for is_known in (True, False):
            chosen = found[(found["verdict"] == "ok") == is_known]
            if chosen.empty:
                continue
            places = table[table["quantity"] == source].pivot_table(
                index=["run", "step"], columns="item", values="value", dropna=False
            )
            at = places.loc[list(zip(chosen["run"], chosen["step"], strict=True))]
            face, edge = (YELLOW, BLACK) if is_known else ("none", _GREY)
            label = kind if is_known else f"{kind}, in doubt"
            size = 120 if kind == "form" else 45
            axes.scatter(
                at[plane[0]],
                at[plane[1]],
                marker=marker,
                s=size,
                facecolors=face,
                edgecolors=edge,
                label=label,
                zorder=5,
            )


def _draw_times(axes: Axes, table: pd.DataFrame) -> None:
    """Scores against the step, of every run; each in one unit, the largest score."""
    runs = list(table.loc[table["quantity"] == "score", "run"].unique())
    for number, run in enumerate(runs):
        own = table[table["run"] == run]
        scores, curve = _pivot(own, "score"), _pivot(own, "smooth_score")
        for item, colour in zip(scores.columns, _COMPONENTS, strict=False):
            style: dict[str, Any] = {"color": colour, "alpha": 1.0 if len(runs) == 1 else 0.6}
            label = item if number == 0 else None
            axes.plot(scores.index + 1.0, scores[item], linestyle="", marker=".", markersize=3, **style)
            line = scores if curve.empty else curve
            axes.plot(line.index + 1.0, line[item], label=label, **style)
    axes.set_xscale("log")
    axes.axhline(0, color=BLACK, linewidth=0.6)
    axes.set(xlabel="step + 1 (updates)", ylabel="score")
    axes.legend(fontsize=8)


def _draw_shares(axes: Axes, table: pd.DataFrame) -> None:
    """Shares of the variance beside those of random walks."""
    share = _share(table, "explained_share")
    places = np.arange(len(share))
    runs = table[table["quantity"] == "displacement_ratio"]
    axes.bar(places, share["value"], width=0.55, color=SKY, label="explained share", zorder=2)
    flips = _share(table, "null_flips")
    for offset, name, marker, label in (
        (-0.18, "null_equal", "_", "walk of equal steps"),
        (-0.06, "null_brownian", "o", "Brownian motion in updates"),
        (0.06, "null_walk", "s", "walk with the run's step lengths"),
    ):
        axes.plot(places + offset, _share(table, name)["value"], linestyle="", marker=marker, color=BLACK, label=label,
                  markersize=9 if marker == "_" else 4, markerfacecolor="none", zorder=3)  # fmt: skip
    axes.errorbar(places + 0.18, flips["value"], 2 * flips["stderr"], fmt=".", color=VERMILION, capsize=3,
                  label="the run's steps, random signs (2 deviations)", zorder=3)  # fmt: skip
    axes.set_xticks(places, list(share.index))
    axes.set(ylabel="share of the variance", ylim=(0, max(1.0, axes.get_ylim()[1])))
    doubtful = ", ".join(share.index[share["verdict"] != "ok"])
    verdict = (
        f"Beside random walks; in doubt: {doubtful}" if doubtful else "Cumulative shares beyond those of random walks"
    )
    ratios = f"{runs['value'].min():.2g}" + ("" if len(runs) == 1 else f" to {runs['value'].max():.2g}")
    noise = table.loc[table["quantity"] == "noise_share", "value"]
    verdict += f"; estimation noise: at most {noise.iloc[0]:.0%}" if len(noise) else ""
    axes.set_title(f"{verdict}\nsquared displacement / sum of squared steps: {ratios} (walk: 1)", fontsize=9)
    axes.legend(fontsize=8)


def _share(table: pd.DataFrame, quantity: str) -> pd.DataFrame:
    return table[table["quantity"] == quantity].set_index("item")


def _pivot(rows: pd.DataFrame, quantity: str) -> pd.DataFrame:
    """Steps by components."""
    chosen = rows[rows["quantity"] == quantity]
    pivoted = chosen.pivot_table(index="step", columns="item", values="value", dropna=False)
    pivoted.index = pivoted.index.astype(float)
    return pivoted
