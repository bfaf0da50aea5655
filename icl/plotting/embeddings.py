"""The figure of the embeddings: spectra and overlaps, layer norms, dead weights and the unembedding."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from icl.plotting.colours import BLACK, BLUE, GREEN, ORANGE, VERMILION, ordered_colours
from icl.plotting.style import finish_step_axes, new_figure, select, write_in_middle
from icl.plotting.tidying import KEY

_OVERLAPS = (
    ("token_embedding on position_embedding", "tokens and positions", BLUE),
    ("readout on token_embedding", "read-out and tokens", ORANGE),
    ("readout on position_embedding", "read-out and positions", GREEN),
)


def plot(table: pd.DataFrame, *, title: str) -> Figure:
    """Draw six panels from the table of `icl.analysis.embeddings`.

    Args:
        table: The run's `results/embeddings.csv`.
        title: Title of the figure.
    """
    figure, axes = new_figure(3, num_rows=2, width=4.9, height=3.9, title=title)
    tokens, positions, overlaps, norms, small, readout = axes
    _draw_spectrum(tokens, table, "token_embedding", "Spectrum of the token embedding")
    tokens.set_ylim(bottom=0)
    _draw_spectrum(positions, table, "position_embedding", "Spectrum of the position embedding")
    positions.set_yscale("log")
    _draw_overlaps(overlaps, table)
    _draw_norms(norms, table)
    _draw_small_weights(small, table)
    _draw_unembedding(readout, table)
    return figure


def _draw_spectrum(axes: Axes, table: pd.DataFrame, part: str, title: str) -> None:
    """Draw each singular value's share of the sum of squares, s² / Σ s². The largest share has the darkest colour."""
    shares = _components(table, "spectrum_share", part)
    for number, colour in zip(shares, ordered_colours(shares.shape[1]), strict=True):
        axes.plot(shares.index, shares[number], color=colour, linewidth=1.4, label=f"no. {int(number)}")
    axes.legend(*_legend_entries(axes, 7), fontsize=8, ncols=2)
    finish_step_axes(axes, title, "share of Σ s²")


def _draw_overlaps(axes: Axes, table: pd.DataFrame) -> None:
    for part, label, colour in _OVERLAPS:
        _draw_curve(axes, _curve(table, "overlap", part), color=colour, label=label)
        _draw_curve(axes, _curve(table, "overlap_chance", part), color=colour, linestyle=":", linewidth=1.0, marker="")
    axes.plot([], [], color=BLACK, linestyle=":", linewidth=1.0, label="by chance", gid=KEY)
    axes.set_ylim(-0.03, 1.03)
    axes.legend(fontsize=8)
    finish_step_axes(axes, "Overlap of subspaces", "mean cos² of the principal angles")


def _draw_norms(axes: Axes, table: pd.DataFrame) -> None:
    """Draw the root mean square of the weight and the bias of every layer norm."""
    paths = _norm_paths(table)
    for path, colour in zip(paths, ordered_colours(len(paths)), strict=True):
        for suffix, line, label in (("weight", "-", _norm_name(path)), ("bias", "--", None)):
            mean, deviation = (_curve(table, quantity, f"{path}.{suffix}") for quantity in ("mean", "std"))
            _draw_curve(axes, np.hypot(mean, deviation), color=colour, linestyle=line, label=label)
    if paths:
        axes.legend(*_legend_entries(axes, 10), fontsize=8)
    else:
        write_in_middle(axes, "this model has no layer norms")
    finish_step_axes(axes, "Layer norms (solid: γ, dashed: β)", "root mean square")


def _draw_small_weights(axes: Axes, table: pd.DataFrame) -> None:
    """Draw the share of weights whose absolute value is below the threshold in the table."""
    paths = _norm_paths(table)
    for path, colour in zip(paths, ordered_colours(len(paths)), strict=True):
        share = _curve(table, "share_small", f"{path}.weight")
        _draw_curve(axes, share, color=colour, label=f"γ, {_norm_name(path)}")
    handles, labels = _legend_entries(axes, 8)
    for part, label, style in (
        ("effective_unembedding", "effective unembedding", {"color": VERMILION, "linewidth": 2.2}),
        ("all", "all parameters", {"color": BLACK, "linestyle": "--"}),
    ):
        handles += _draw_curve(axes, _curve(table, "share_small", part), label=label, **style)
        labels.append(label)
    axes.set_ylim(-0.03, 1.5)  # room for the legend
    axes.set_yticks(np.linspace(0, 1, 6))
    axes.legend(handles, labels, fontsize=8, ncols=2, loc="upper left")
    finish_step_axes(axes, "Dead weights", f"share below {table['threshold'].iloc[0]:g}")


def _draw_unembedding(axes: Axes, table: pd.DataFrame) -> None:
    weights = _components(table, "weight", "effective_unembedding")
    axes.plot(weights.index, weights, color=BLUE, linewidth=0.6, alpha=0.6)
    _draw_curve(axes, _curve(table, "bias", "effective_unembedding"), color=VERMILION, label="bias")
    axes.plot([], [], color=BLUE, label="weights, one line for each channel", gid=KEY)
    axes.legend(fontsize=8)
    finish_step_axes(axes, "Effective unembedding", "weight")


def _components(table: pd.DataFrame, quantity: str, part: str) -> pd.DataFrame:
    """Return the values of one quantity, with a row for each step and a column for each component."""
    rows = select(table, quantity=quantity, part=part)
    return rows.pivot(index="step", columns="component", values="value").sort_index()


def _curve(table: pd.DataFrame, quantity: str, part: str) -> pd.Series:
    return select(table, quantity=quantity, part=part).set_index("step")["value"].sort_index()


def _draw_curve(axes: Axes, curve: pd.Series, **style: Any) -> list[Line2D]:
    options: dict[str, Any] = {"marker": "o", "markersize": 2.5} | style
    return axes.plot(curve.index, curve, **options)


def _legend_entries(axes: Axes, limit: int) -> tuple[list, list]:
    """Return the handles and labels of a legend.

    If there are more than `limit` entries, return only the first, the middle and the last entry.
    """
    handles, labels = axes.get_legend_handles_labels()
    last = len(labels) - 1
    shown = range(last + 1) if last < limit else (0, last // 2, last)
    return [handles[index] for index in shown], [labels[index] for index in shown]


def _norm_paths(table: pd.DataFrame) -> list[str]:
    """Return the paths of the layer norms in the order of the model: blocks in ascending order, then the final norm."""
    paths = [part.removesuffix(".weight") for part in table["part"].unique() if part.endswith("norm.weight")]
    return sorted(
        paths, key=lambda path: (0, int(path.split(".")[1]), path) if path.startswith("blocks") else (1, 0, path)
    )


def _norm_name(path: str) -> str:
    """Return the name of a layer norm for readers: `blocks.0.attention_norm` becomes "attention 1"."""
    words = path.split(".")
    if words[0] != "blocks":
        return "final"
    return f"{words[2].removesuffix('_norm').replace('mlp', 'MLP')} {int(words[1]) + 1}"
