"""The figure of the embeddings: spectra and overlaps above, layer norms, dead weights and the unembedding below."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from icl.plotting.style import BLACK, BLUE, GREEN, ORANGE, VERMILION, new_figure, ordered_colours, scale_steps
from icl.plotting.tidying import KEY

_SPECTRA = (("token_embedding", "Spectrum of the token embedding"), ("position_embedding", "Spectrum of the positions"))
_OVERLAPS = (
    ("token_embedding on position_embedding", "tokens and positions", BLUE),
    ("readout on token_embedding", "read-out and tokens", ORANGE),
    ("readout on position_embedding", "read-out and positions", GREEN),
)


def plot(table: pd.DataFrame, *, title: str) -> Figure:
    """Six panels from the table of `icl.analysis.embeddings`.

    Args:
        table: Its `results/embeddings.csv`.
        title: Above the panels.
    """
    figure, axes = new_figure(3, num_rows=2, width=4.9, height=3.9)
    tokens, positions, overlaps, norms, small, readout = axes
    for panel, (part, name) in zip((tokens, positions), _SPECTRA, strict=True):
        _draw_components(panel, table, "spectrum_share", part)
        _finish(panel, "share of Σ s²", name)
    tokens.set_ylim(bottom=0)
    positions.set_yscale("log")
    _draw_overlaps(overlaps, table)
    _draw_norms(norms, table)
    _draw_small(small, table)
    _draw_components(readout, table, "weight", "effective_unembedding", colour=BLUE)
    _draw(readout, _curve(table, "bias", "effective_unembedding"), color=VERMILION, label="bias")
    readout.plot([], [], color=BLUE, label="weights, one for each channel", gid=KEY)
    readout.legend(fontsize=8)
    _finish(readout, "weight", "Effective unembedding")
    figure.suptitle(title, fontsize=11)
    return figure


def _draw_components(axes: Axes, table: pd.DataFrame, quantity: str, part: str, colour: str | None = None) -> None:
    """A line for every component, dark first, or all of one colour."""
    rows = table[(table["quantity"] == quantity) & (table["part"] == part)]
    wide = rows.pivot(index="step", columns="component", values="value").sort_index()
    colours = ordered_colours(wide.shape[1])
    for number, own in zip(wide, colours, strict=True):
        style = (
            {"color": own, "linewidth": 1.4} if colour is None else {"color": colour, "linewidth": 0.6, "alpha": 0.6}
        )
        axes.plot(
            wide.index.astype(float), wide[number], label=f"no. {int(number)}" if colour is None else None, **style
        )
    if colour is None:
        axes.legend(*_ends(axes, 7), fontsize=8, ncols=2)


def _ends(axes: Axes, limit: int) -> tuple[list, list]:
    """The legend's entries; of more than `limit` only the first, the middle and the last."""
    handles, labels = axes.get_legend_handles_labels()
    last = len(labels) - 1
    shown = range(last + 1) if last < limit else (0, last // 2, last)
    return [handles[index] for index in shown], [labels[index] for index in shown]


def _draw_overlaps(axes: Axes, table: pd.DataFrame) -> None:
    for part, label, colour in _OVERLAPS:
        _draw(axes, _curve(table, "overlap", part), color=colour, label=label)
        _draw(axes, _curve(table, "overlap_chance", part), color=colour, linestyle=":", linewidth=1.0, marker="")
    axes.plot([], [], color=BLACK, linestyle=":", linewidth=1.0, label="by chance", gid=KEY)
    axes.set_ylim(-0.03, 1.03)
    axes.legend(fontsize=8)
    _finish(axes, "mean cos² of the principal angles", "Overlap of subspaces")


def _draw_norms(axes: Axes, table: pd.DataFrame) -> None:
    """The root mean square of every layer norm's weight and bias."""
    paths = _norm_paths(table)
    for path, colour in zip(paths, ordered_colours(len(paths)), strict=True):
        for suffix, line in (("weight", "-"), ("bias", "--")):
            mean, deviation = (_curve(table, name, f"{path}.{suffix}") for name in ("mean", "std"))
            label = _norm_name(path) if suffix == "weight" else None
            _draw(axes, np.hypot(mean, deviation), color=colour, linestyle=line, label=label)
    axes.legend(*_ends(axes, 10), fontsize=8) if paths else _say_none(axes)
    _finish(axes, "root mean square", "Layer norms (full: γ, dashed: β)")


def _draw_small(axes: Axes, table: pd.DataFrame) -> None:
    paths = _norm_paths(table)
    for path, colour in zip(paths, ordered_colours(len(paths)), strict=True):
        _draw(axes, _curve(table, "share_small", f"{path}.weight"), color=colour, label=f"γ, {_norm_name(path)}")
    handles, labels = _ends(axes, 8)
    extra: tuple[tuple[str, dict[str, Any]], ...] = (
        ("effective_unembedding", {"color": VERMILION, "linewidth": 2.2, "label": "effective unembedding"}),
        ("all", {"color": BLACK, "linestyle": "--", "label": "all parameters"}),
    )
    for part, style in extra:
        handles += _draw(axes, _curve(table, "share_small", part), **style)
        labels.append(style["label"])
    axes.set_ylim(-0.03, 1.5)  # room for the legend
    axes.set_yticks(np.linspace(0, 1, 6))
    axes.legend(handles, labels, fontsize=8, ncols=2, loc="upper left")
    _finish(axes, f"share below {table['threshold'].iloc[0]:g}", "Dead weights")


def _norm_paths(table: pd.DataFrame) -> list[str]:
    """Of the layer norms, in the order of the model."""
    parts = table["part"].drop_duplicates()
    paths = [part.removesuffix(".weight") for part in parts if part.endswith("norm.weight")]
    return sorted(
        paths,
        key=lambda path: (not path.startswith("blocks"), [(len(word), word) for word in path.split(".")[1:2]], path),
    )


def _norm_name(path: str) -> str:
    """`blocks.0.attention_norm` is "attention 1"."""
    words = path.split(".")
    if words[0] != "blocks":
        return "final"
    return f"{words[2].removesuffix('_norm').replace('mlp', 'MLP')} {int(words[1]) + 1}"


def _curve(table: pd.DataFrame, quantity: str, part: str) -> pd.Series:
    rows = table[(table["quantity"] == quantity) & (table["part"] == part)]
    return rows.set_index("step")["value"].sort_index()


def _draw(axes: Axes, curve: pd.Series, **style: Any) -> list[Line2D]:
    options: dict[str, Any] = {"marker": "o", "markersize": 2.5} | style
    return axes.plot(curve.index.astype(float), curve, **options)


def _say_none(axes: Axes) -> None:
    axes.text(0.5, 0.5, "this model has no layer norms", ha="center", transform=axes.transAxes)


def _finish(axes: Axes, label: str, title: str) -> None:
    scale_steps(axes)
    axes.set(xlabel="step (updates)", ylabel=label)
    axes.set_title(title, fontsize=10)
