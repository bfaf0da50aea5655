"""The figure of the Hessian: its trace, its extreme eigenvalues, and its whole spectrum at a few steps."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from icl.plotting.style import BLACK, BLUE, ORANGE, PURPLE, VERMILION, new_figure, ordered_colours, scale_steps

_NUM_SPECTRA = 5
_BULK = 0.05
"""A node with more than this share of all eigenvalues."""
_EIGENVALUES = (
    ("top 1", "largest", VERMILION),
    ("top 2", "second", ORANGE),
    ("top 3", "third", PURPLE),
    ("bottom 1", "smallest", BLUE),
)


def plot(table: pd.DataFrame, *, title: str) -> Figure:
    """Three panels from the table of `icl.analysis.hessian`; bands are two standard errors.

    Args:
        table: Its `results/hessian.csv`.
        title: Above the panels.
    """
    figure, (traces, eigenvalues, spectra) = new_figure(3, width=4.9, height=3.9)
    _draw_curve(traces, _select(table, "trace", "all"), {"color": BLACK, "label": "trace"})
    _finish_steps(traces, "tr H (loss per unit of weight²)", "Trace of the Hessian")
    for part, label, colour in _EIGENVALUES:
        _draw_curve(eigenvalues, _select(table, "eigenvalue", part), {"color": colour, "label": label})
    eigenvalues.axhline(0, color=BLACK, linewidth=0.6)
    eigenvalues.set_yscale("symlog", linthresh=1)
    eigenvalues.legend(fontsize=8, loc="center left")
    _finish_steps(eigenvalues, "eigenvalue (loss per unit of weight²)", "Extreme eigenvalues (open: not converged)")
    _draw_spectra(spectra, table)
    figure.suptitle(f"{title}   (bands: 2 standard errors)", fontsize=11)
    return figure


def _select(table: pd.DataFrame, quantity: str, part: str | None) -> pd.DataFrame:
    rows = table[table["quantity"] == quantity]
    return (rows if part is None else rows[rows["part"] == part]).sort_values("step", kind="stable")


def _draw_curve(axes: Axes, curve: pd.DataFrame, style: dict) -> None:
    """A line with its band; full points are `ok`, open ones in doubt."""
    if curve.empty:
        return
    steps, values, errors = curve["step"].astype(float), curve["value"], 2 * curve["stderr"]
    axes.plot(steps, values, **style)
    axes.fill_between(steps, values - errors, values + errors, color=style["color"], alpha=0.18, linewidth=0)
    is_ok = curve["verdict"] == "ok"
    marks = {"linestyle": "", "marker": "o", "markersize": 3, "color": style["color"]}
    axes.plot(steps[is_ok], values[is_ok], **marks)
    axes.plot(steps[~is_ok], values[~is_ok], markerfacecolor="white", **marks)


def _draw_spectra(axes: Axes, table: pd.DataFrame) -> None:
    """How many eigenvalues lie beyond a value, on either side of zero, at some of the steps.

    An eigenvalue found counts at least as one. Nodes that stand for a large share of all are left out: they are the bulk
    about zero, which Lanczos does not resolve.
    """
    steps = np.unique(table.loc[table["quantity"] == "spectral_node", "step"].to_numpy(int))
    chosen = np.unique(np.linspace(0, len(steps) - 1, _NUM_SPECTRA).round().astype(int))
    for step, colour in zip(steps[chosen], ordered_colours(len(chosen)), strict=True):
        at = table[table["step"] == step]
        nodes, weights = (
            _select(at, name, None).set_index("part")["value"] for name in ("spectral_node", "spectral_weight")
        )
        counts = weights * _select(at, "num_parameters", None)["value"].item()
        nodes = nodes[weights < _BULK]
        for sign, line in ((1, "-"), (-1, "--")):
            side = (sign * nodes[sign * nodes > 0]).sort_values(ascending=False)
            beyond = np.maximum(counts[side.index].cumsum(), np.arange(1, len(side) + 1))
            label = f"step {step:,}" if sign == 1 else None
            axes.step(side, beyond, where="post", color=colour, linestyle=line, label=label)
    axes.set(xscale="log", yscale="log", xlabel="λ (loss per unit of weight²)", ylabel="number of eigenvalues beyond λ")
    axes.set_title("Spectrum (full: above λ, dashed: below −λ)", fontsize=10)
    axes.legend(fontsize=8)


def _finish_steps(axes: Axes, label: str, title: str) -> None:
    scale_steps(axes)
    axes.set(xlabel="step (updates)", ylabel=label)
    axes.set_title(title, fontsize=10)
