"""The figure of stages: every signal and its slope in log time, smoothed, with the boundaries between named and typed stages."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from icl.plotting.llc import VERDICTS
from icl.plotting.style import BLACK, ORANGE, SKY, VERMILION, new_figure, scale_steps

_LABELS = {
    "loss": "loss\n(squared error per target)",
    "icl_score": "ICL score\n(negative: examples help)",
    "prior_task_score": "prior-task score\nE ŷ² (0: the prior's mean)",
    "llc": "LLC",
}
_TYPES = {"A": SKY, "B": ORANGE, "?": "#bbbbbb"}
_KEY = "type A (blue): loss falls, LLC rises; B (orange): both fall; grey: not known; bold: verdict ok"
_EDGES: dict[str, dict[str, Any]] = {
    "ok": {"linestyle": "-", "alpha": 0.9},
    "suspect": {"linestyle": "--", "alpha": 0.8},
}


def plot(table: pd.DataFrame, *, title: str) -> Figure:
    """A row for each signal, its values (left) and its slope (right), against the step.

    Bands are two standard errors: of the curves, and of the boundaries' places. Boundaries that are `suspect` are
    dashed, `invalid` ones not drawn; stages are shaded by type.

    Args:
        table: Its `results/stages.csv`.
        title: Above the panels.
    """
    names = [name for name in _LABELS if (table["signal"] == name).any()]
    figure, axes = new_figure(2, num_rows=len(names), width=5.6, height=2.5)
    for row, name in enumerate(names):
        own = table[table["signal"] == name]
        values, slopes = axes[2 * row], axes[2 * row + 1]
        _draw_curve(values, own, "smooth")
        _draw_points(values, own)
        _draw_curve(slopes, own, "slope")
        slopes.axhline(0, color=BLACK, linewidth=0.8)
        values.set_ylabel(_LABELS[name])
        slopes.set_ylabel("slope per unit of\nln(step + 1)")
        for panel in (values, slopes):
            _draw_boundaries(panel, table)
            scale_steps(panel)
            panel.sharex(axes[0]) if panel is not axes[0] else None
    for panel in axes[:2]:
        _name_stages(panel, table)
    for panel in axes[-2:]:
        panel.set_xlabel("step (updates)")
    figure.suptitle(f"{title}: {_verdict(table)}", fontsize=11)
    return figure


def _draw_curve(axes: Axes, own: pd.DataFrame, quantity: str) -> None:
    rows = own[own["quantity"] == quantity]
    value, error = rows["value"].astype(float), 2 * rows["stderr"].astype(float)
    axes.plot(rows["at"], value, color=VERMILION, linewidth=1.4, zorder=4)
    axes.fill_between(rows["at"], value - error, value + error, color=VERMILION, alpha=0.25, linewidth=0, zorder=3)
    if quantity == "slope":  # its error grows at the ends, where a slope is known from one side
        axes.set_ylim(*_limits(rows.loc[error < 4 * error.median(), "value"]))


def _draw_points(axes: Axes, own: pd.DataFrame) -> None:
    rows = own[own["quantity"] == "measured"]
    for verdict, style in VERDICTS.items():
        chosen = rows[rows["verdict"] == verdict]
        if chosen.empty:
            continue
        is_llc = bool((own["signal"] == "llc").any())
        error = 2 * chosen["stderr"].astype(float) if is_llc else None  # of the others: a common offset
        label = verdict if is_llc else None
        axes.errorbar(
            chosen["at"], chosen["value"], error, **style, linestyle="none", markersize=3, elinewidth=0.7, label=label
        )
        if is_llc:
            axes.legend(fontsize=7)


def _draw_boundaries(axes: Axes, table: pd.DataFrame) -> None:
    stages = table[table["quantity"] == "stage"]
    for stage in stages.to_dict("records"):
        axes.axvspan(stage["start"], stage["end"], color=_TYPES[stage["type"]], alpha=0.12, linewidth=0, zorder=0)
    for row in table[table["quantity"] == "boundary"].to_dict("records"):
        if row["verdict"] in _EDGES:
            axes.axvline(row["at"], color=BLACK, linewidth=1.1, zorder=2, **_EDGES[row["verdict"]])
            axes.axvspan(row["low"], row["high"], color=BLACK, alpha=0.15, linewidth=0, zorder=1)


def _name_stages(axes: Axes, table: pd.DataFrame) -> None:
    for stage in table[table["quantity"] == "stage"].to_dict("records"):
        middle = np.expm1((np.log1p(stage["start"]) + np.log1p(stage["end"])) / 2)
        axes.annotate(
            f"{stage['stage']:.0f}{stage['type']}" if stage["type"] != "?" else f"{stage['stage']:.0f}",
            (middle, 1.02),
            xycoords=("data", "axes fraction"),
            ha="center",
            fontsize=9,
            fontweight="bold" if stage["verdict"] == "ok" else "normal",
        )


def _verdict(table: pd.DataFrame) -> str:
    found = table.loc[table["quantity"] == "boundary", "verdict"].value_counts()
    counts = [f"{found[verdict]} {verdict}" for verdict in ("ok", "suspect") if verdict in found]
    if not counts:
        return "no boundaries between stages"
    return f"boundaries between stages: {', '.join(counts)} (dashed: suspect; bands: 2 standard errors)\n{_KEY}"


def _limits(values: pd.Series) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    if not np.isfinite((low, high)).all():
        return -1.0, 1.0
    room = 0.15 * (high - low) or 1.0
    return low - room, high + room
