"""The figure of a task-diversity experiment: how far the trained models are from ridge and from dMMSE, against M.

A model that has learnt the Gaussian prior sits on ridge, one that has learnt its M tasks on dMMSE (Raventos et al. 2023,
arXiv 2306.15063, figure 2, where the gaps are divided by D; here they are not). Where one gives way to the other depends on
architecture and training; no threshold is drawn, because none is estimated.
"""

import math
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from icl.plotting.style import GREEN, VERMILION, new_figure

SERIES = {"delta_ridge": (VERMILION, "o", "to ridge"), "delta_dmmse": (GREEN, "s", "to dMMSE")}
PANELS = {"pretrain": "In distribution: the M training tasks", "true": "Out of distribution: new tasks, w ~ N(0, I)"}
_FEW_DECADES = 30.0
"""Below this ratio of largest to smallest value, ticks between powers of ten are labelled too."""


def plot_diversity(table: pd.DataFrame, *, title: str) -> Figure:
    """Gaps in distribution (left) and out of distribution (right); M = inf has a tick of its own.

    Args:
        table: `num_tasks` (as text), `step`, `distribution`, `quantity`, `position`, `value`, `stderr`; of each M the last
            step is drawn.
        title: Above the panels.
    """
    last = table[table["step"] == table.groupby("num_tasks")["step"].transform("max")]
    labels = sorted(last["num_tasks"].astype(str).unique(), key=float)
    places = _places(labels)
    figure, panels = new_figure(len(PANELS), width=5.4, height=4.4)
    for axes, (distribution, name) in zip(panels, PANELS.items(), strict=True):
        _draw_gaps(axes, last[last["distribution"] == distribution], places)
        _label_diversities(axes, places)
        axes.set_title(name, fontsize=10)
    panels[0].set_ylabel(
        "gap: mean squared distance of predictions\n(per target, not divided by D; bars: 2 s.e.)", fontsize=9
    )
    _share_values(panels, last.loc[last["quantity"].isin(list(SERIES)), "value"])
    drawn = [axes for axes in panels if axes.get_legend_handles_labels()[0]]
    for axes in drawn[:1]:
        axes.legend(fontsize=9)
    figure.suptitle(title, fontsize=11)
    return figure


def _places(labels: list[str]) -> dict[str, float]:
    """Where each M stands: at log2 M, and infinity beyond the largest by a gap of its own."""
    finite = [math.log2(float(label)) for label in labels if label != "inf"]
    beyond = max(finite) + max(1.5, 0.1 * (max(finite) - min(finite))) if finite else 0.0
    return {label: beyond if label == "inf" else math.log2(float(label)) for label in labels}


def _draw_gaps(axes: Axes, numbers: pd.DataFrame, places: dict[str, float]) -> None:
    means = numbers[numbers["position"] == "mean"].set_index("num_tasks")
    for quantity, (colour, marker, name) in SERIES.items():
        gaps = means[means["quantity"] == quantity]
        finite = gaps[gaps.index != "inf"].sort_index(key=lambda index: index.map(places))
        style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 5, "capsize": 2.5}
        if len(finite):
            axes.errorbar(finite.index.map(places), finite["value"], 2 * finite["stderr"], label=f"gap {name}", **style)
        for label, gap in gaps[gaps.index == "inf"].iterrows():
            own: dict[str, Any] = {} if len(finite) else {"label": f"gap {name}"}
            axes.errorbar([places[str(label)]], gap["value"], 2 * gap["stderr"], linestyle="none", **style, **own)


def _share_values(panels: list[Axes], values: pd.Series) -> None:
    """One scale for all panels: logarithmic if there is anything above zero; bars that reach below it are cut."""
    for axes in panels[1:]:
        axes.sharey(panels[0])
    if not ((values > 0) & (values < math.inf)).any():
        return
    panels[0].set_yscale("log", nonpositive="clip")
    panels[0].autoscale(axis="y")
    low, high = panels[0].get_ylim()
    for axes in panels:
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}" if high / low < _FEW_DECADES else NullFormatter())
        axes.tick_params(axis="y", which="minor", labelsize=8)


def _label_diversities(axes: Axes, places: dict[str, float]) -> None:
    step = max(1, math.ceil(len(places) / 11))
    finite = [label for label in places if label != "inf"]
    shown = finite[::-1][::step][::-1] + (["inf"] if "inf" in places else [])
    names = ["∞" if label == "inf" else _power(places[label], label) for label in shown]
    axes.set_xticks([places[label] for label in shown], names)
    if "inf" in places and finite:
        axes.axvline((places["inf"] + places[finite[-1]]) / 2, color="0.7", linewidth=0.8, linestyle=(0, (2, 3)))
    axes.set_xlabel("task diversity M (number of training tasks; at ∞, dMMSE is ridge)", fontsize=9)


def _power(exponent: float, label: str) -> str:
    return f"$2^{{{exponent:.0f}}}$" if exponent.is_integer() else label
