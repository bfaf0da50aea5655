"""The figure of stages: every smoothed signal and its slope in log time, with the boundaries and the types of the stages."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from icl.plotting.colours import BLACK, ORANGE, SKY, VERMILION
from icl.plotting.llc import VERDICTS
from icl.plotting.style import new_figure, scale_steps, select, set_limits

_LABELS = {
    "loss": "loss\n(squared error per target)",
    "icl_score": "ICL score\n(negative: examples help)",
    "bigram_score": "bigram score\n(cross-entropy, nats)",
    "previous_token": "attention to the\nprevious token",
    "prefix_matching": "prefix-matching\nattention",
    "prior_task_score": "prior-task score\nE ŷ² (0: the prior's mean)",
    "llc": "LLC",
}
_LANGUAGE_LABELS = {"loss": "loss\n(nats per token)", "icl_score": "ICL score, nats\n(negative: context helps)"}
"""Labels that differ for language runs."""
_TYPE_COLOURS = {"A": SKY, "B": ORANGE, "?": "#bbbbbb"}
_TYPE_KEY = "type A (blue): loss falls, LLC rises; B (orange): both fall; grey: unknown; bold: verdict ok"
_BOUNDARY_STYLES: dict[str, dict[str, Any]] = {
    "ok": {"linestyle": "-", "alpha": 0.9},
    "suspect": {"linestyle": "--", "alpha": 0.8},
}


def plot(table: pd.DataFrame, *, title: str) -> Figure:
    """Draw two panels for each signal: its values (left) and its slope (right) against the step.

    Bands show two standard errors, of the curves and of the steps of the boundaries. Boundaries with the verdict `suspect` are
    dashed. Boundaries with the verdict `invalid` are not drawn. The background colour shows the type of each stage.

    Args:
        table: The run's `results/stages.csv`.
        title: Title of the figure; the number of boundaries is added to it.
    """
    signals = [signal for signal in _LABELS if (table["signal"] == signal).any()]
    labels = _LABELS | (_LANGUAGE_LABELS if "family" in table else {})
    figure, axes = new_figure(2, num_rows=len(signals), width=5.6, height=2.5)
    for signal, values, slopes in zip(signals, axes[::2], axes[1::2], strict=True):
        rows = select(table, signal=signal)
        _draw_curve(values, select(rows, quantity="smooth"))
        _draw_measured(values, select(rows, quantity="measured"), is_llc=signal == "llc")
        slope = select(rows, quantity="slope")
        _draw_curve(slopes, slope)
        # At the two ends of the run, all neighbouring points lie on one side, so the standard error of the slope is large.
        # The limits of the y axis must not depend on these slopes.
        error = slope["stderr"].astype(float)
        set_limits(slopes, slope.loc[error < 4 * error.median(), "value"], margin=0.15)
        slopes.axhline(0, color=BLACK, linewidth=0.8)
        values.set_ylabel(labels[signal])
        slopes.set_ylabel("slope per unit of\nln(step + 1)")
        for panel in (values, slopes):
            _draw_boundaries(panel, table)
            scale_steps(panel)
            if panel is not axes[0]:
                panel.sharex(axes[0])
    for panel in axes[:2]:
        _name_stages(panel, select(table, quantity="stage"))
    for panel in axes[-2:]:
        panel.set_xlabel("step (updates)")
    figure.suptitle(f"{title}: {_describe_boundaries(table)}", fontsize=11)
    return figure


def _draw_curve(axes: Axes, rows: pd.DataFrame) -> None:
    value, error = rows["value"].astype(float), 2 * rows["stderr"].astype(float)
    axes.plot(rows["at"], value, color=VERMILION, linewidth=1.4, zorder=4)
    axes.fill_between(rows["at"], value - error, value + error, color=VERMILION, alpha=0.25, linewidth=0, zorder=3)


def _draw_measured(axes: Axes, rows: pd.DataFrame, *, is_llc: bool) -> None:
    """Draw the measured values. Only LLCs get bars and a legend.

    The standard errors of other signals mostly describe a shift that all points share, so bars would be misleading.
    """
    for verdict, style in VERDICTS.items():
        chosen = select(rows, verdict=verdict)
        if len(chosen):
            error, label = (2 * chosen["stderr"].astype(float), verdict) if is_llc else (None, None)
            options: dict[str, Any] = style | {"linestyle": "none", "markersize": 3, "elinewidth": 0.7, "label": label}
            axes.errorbar(chosen["at"], chosen["value"], error, **options)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=7)


def _draw_boundaries(axes: Axes, table: pd.DataFrame) -> None:
    """Shade the stages by their types, and draw the boundaries between them."""
    for stage in select(table, quantity="stage").to_dict("records"):
        axes.axvspan(
            stage["start"], stage["end"], color=_TYPE_COLOURS[stage["type"]], alpha=0.12, linewidth=0, zorder=0
        )
    for boundary in select(table, quantity="boundary").to_dict("records"):
        if boundary["verdict"] in _BOUNDARY_STYLES:
            style = _BOUNDARY_STYLES[boundary["verdict"]]
            axes.axvline(boundary["at"], color=BLACK, linewidth=1.1, zorder=2, **style)
            axes.axvspan(boundary["low"], boundary["high"], color=BLACK, alpha=0.15, linewidth=0, zorder=1)


def _name_stages(axes: Axes, stages: pd.DataFrame) -> None:
    """Write the number and the type of each stage above its middle in log time."""
    for stage in stages.to_dict("records"):
        middle = np.expm1((np.log1p(stage["start"]) + np.log1p(stage["end"])) / 2)
        name = f"{stage['stage']:.0f}" + ("" if stage["type"] == "?" else stage["type"])
        weight = "bold" if stage["verdict"] == "ok" else "normal"
        frame = ("data", "axes fraction")
        axes.annotate(name, (middle, 1.02), xycoords=frame, ha="center", fontsize=9, fontweight=weight)


def _describe_boundaries(table: pd.DataFrame) -> str:
    counts = select(table, quantity="boundary")["verdict"].value_counts()
    shown = [f"{counts[verdict]} {verdict}" for verdict in _BOUNDARY_STYLES if verdict in counts]
    if not shown:
        return "no boundaries between stages"
    return f"boundaries between stages: {', '.join(shown)} (dashed: suspect; bands: 2 standard errors)\n{_TYPE_KEY}"
