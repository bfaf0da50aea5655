"""The figure of the Hessian: trace, extreme eigenvalues, and the spectrum at a few steps."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from icl.plotting.colours import BLACK, BLUE, ORANGE, PURPLE, VERMILION, ordered_colours
from icl.plotting.style import draw_band, finish_step_axes, new_figure, select, spread_indices

_NUM_SPECTRA = 5
_MAX_NODE_WEIGHT = 0.05
"""Largest weight of a Lanczos node that is drawn. The weight of a node is the share of all eigenvalues that it represents."""
_EIGENVALUES = (
    ("top 1", "largest", VERMILION),
    ("top 2", "second", ORANGE),
    ("top 3", "third", PURPLE),
    ("bottom 1", "smallest", BLUE),
)


def plot(table: pd.DataFrame, *, title: str) -> Figure:
    """Draw three panels from the table of `icl.analysis.hessian`; bands are two standard errors.

    Args:
        table: The run's `results/hessian.csv`.
        title: Title of the figure.
    """
    title = f"{title}   (bands: 2 standard errors)"
    figure, (traces, eigenvalues, spectra) = new_figure(3, width=4.9, height=3.9, title=title)
    _draw_curve(traces, select(table, quantity="trace", part="all"), BLACK, "trace")
    finish_step_axes(traces, "Trace of the Hessian (open: not ok)", "tr H (loss per unit of weight²)")
    eigenvalues.set_yscale("symlog", linthresh=1)  # before drawing: `axhline` fixes the limits for the present scale
    for part, label, colour in _EIGENVALUES:
        _draw_curve(eigenvalues, select(table, quantity="eigenvalue", part=part), colour, label)
    eigenvalues.axhline(0, color=BLACK, linewidth=0.6)
    eigenvalues.legend(fontsize=8, loc="center left")
    finish_step_axes(eigenvalues, "Extreme eigenvalues (open: not converged)", "eigenvalue (loss per unit of weight²)")
    _draw_spectra(spectra, table)
    return figure


def _draw_curve(axes: Axes, curve: pd.DataFrame, colour: str, label: str) -> None:
    """Draw a line with its band. Marks are filled if the verdict is ok, otherwise open."""
    if curve.empty:
        return
    curve = curve.sort_values("step", kind="stable")
    draw_band(axes, curve["step"], curve["value"], curve["stderr"], color=colour, label=label)
    is_ok = curve["verdict"] == "ok"
    for points, face in ((curve[is_ok], colour), (curve[~is_ok], "white")):
        axes.plot(points["step"], points["value"], "o", markersize=3, color=colour, markerfacecolor=face)


def _draw_spectra(axes: Axes, table: pd.DataFrame) -> None:
    """Draw the number of eigenvalues above λ and the number below −λ at a few steps. The x axis is the threshold λ.

    Each Lanczos node represents a share of all eigenvalues. The number drawn at λ is the number of eigenvalues that the nodes
    beyond λ represent together. If the number of these nodes is larger, this number is drawn. Nodes with a large share are left
    out, because they represent the many eigenvalues near zero, which Lanczos does not resolve.
    """
    steps = np.unique(select(table, quantity="spectral_node")["step"].to_numpy(int))
    chosen = steps[spread_indices(len(steps), _NUM_SPECTRA)]
    for step, colour in zip(chosen, ordered_colours(len(chosen)), strict=True):
        nodes, weights = (
            select(table, step=step, quantity=quantity).set_index("part")["value"]
            for quantity in ("spectral_node", "spectral_weight")
        )
        counts = weights * select(table, step=step, quantity="num_parameters")["value"].item()
        nodes = nodes[weights < _MAX_NODE_WEIGHT]
        for sign, line in ((1, "-"), (-1, "--")):
            side = (sign * nodes[sign * nodes > 0]).sort_values(ascending=False)
            num_beyond = np.maximum(counts[side.index].cumsum(), np.arange(1, len(side) + 1))
            label = f"step {step:,}" if sign == 1 else None
            axes.step(side, num_beyond, where="post", color=colour, linestyle=line, label=label)
    axes.set(xscale="log", yscale="log", xlabel="λ (loss per unit of weight²)", ylabel="number of eigenvalues beyond λ")
    axes.set_title("Spectrum (solid: above λ, dashed: below −λ)", fontsize=10)
    axes.legend(fontsize=8)
