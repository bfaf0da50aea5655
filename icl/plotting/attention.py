"""The figure of the attention heads: seven scores of each over training, and the mean patterns at the last step."""

import math
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from icl.plotting.style import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    new_figure,
    ordered_colours,
    scale_steps,
)
from icl.plotting.tidying import name_outside

_PANELS = (
    ("entropy", "all", "Entropy", "entropy / log(tokens visible)"),
    ("variability", "all", "Variability between prompts", "distance to the mean pattern"),
    ("self", "all", "To the token itself", "weight"),
    ("previous", "all", "To the previous token", "weight"),
    ("y_tokens", "x", "From x-tokens to y-tokens", "weight"),
    ("y_tokens", "y", "From y-tokens to y-tokens", "weight"),
    ("lag", "all", "Distance (0: itself, 1: first token)", "mean lag / k"),
)
_HEAD_COLOURS = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY)
_LINES = ("-", "--", ":", "-.")
_MANY_BLOCKS = 3


def plot(table: pd.DataFrame, *, title: str) -> Figure:
    """Eight panels from the table of `icl.analysis.attention`; bands are two standard errors.

    Args:
        table: Its `results/attention.csv`.
        title: Above the panels.
    """
    figure, axes = new_figure(4, num_rows=2, width=4.1, height=3.4)
    curves = table[table["queries"].isin(("all", "x", "y"))]
    styles = _styles(sorted(set(curves["part"]) - {"uniform"}, key=_place))
    for panel, (quantity, queries, name, label) in zip(axes, _PANELS, strict=False):
        own = curves[(curves["quantity"] == quantity) & (curves["queries"] == queries)]
        for head, style in styles.items():
            _draw(panel, own[own["part"] == head].sort_values("step"), head, style)
        panel.axhline(
            own.loc[own["part"] == "uniform", "value"].item(), color=BLACK, linestyle=(0, (1, 1)), label="uniform"
        )
        _finish(panel, name, label)
    name_outside(figure, axes[:1], loc="outside lower center", ncols=12, fontsize=9)
    _draw_patterns(figure, axes[-1], table[table["quantity"] == "pattern"])
    figure.suptitle(f"{title}   (bands: 2 standard errors)", fontsize=11)
    return figure


def _place(head: str) -> tuple[int, ...]:
    """Block and head of `b1h1`."""
    return tuple(int(number) for number in head[1:].split("h"))


def _styles(heads: list[str]) -> dict[str, dict[str, Any]]:
    """Few blocks: a line style for each and a colour for each head of it; many: the other way round."""
    blocks = sorted({_place(head)[0] for head in heads})
    colours = ordered_colours(len(blocks))
    styles = {}
    for name in heads:
        block, head = _place(name)
        if len(blocks) <= _MANY_BLOCKS:
            styles[name] = {"color": _HEAD_COLOURS[(head - 1) % len(_HEAD_COLOURS)], "linestyle": _LINES[block - 1]}
        else:
            styles[name] = {"color": colours[block - 1], "linestyle": _LINES[(head - 1) % len(_LINES)]}
    return styles


def _draw(axes: Axes, curve: pd.DataFrame, label: str, style: dict[str, Any]) -> None:
    steps, values, errors = curve["step"].astype(float), curve["value"], 2 * curve["stderr"]
    axes.plot(steps, values, label=label, linewidth=1.5, **style)
    axes.fill_between(steps, values - errors, values + errors, color=style["color"], alpha=0.18, linewidth=0)


def _finish(axes: Axes, title: str, label: str) -> None:
    scale_steps(axes)
    axes.set(xlabel="step (updates)", ylabel=label)
    axes.set_title(title, fontsize=10)


def _draw_patterns(figure: Figure, axes: Axes, rows: pd.DataFrame) -> None:
    """The mean patterns side by side, queries down and keys across; a block is a row, unless there are more blocks than heads."""
    heads = sorted(set(rows["part"]), key=_place)
    if not heads:
        axes.set_visible(False)
        return
    num_blocks, num_heads = _place(heads[-1])
    size = int(rows["query_token"].max()) + 1
    num_columns = num_heads if num_heads >= num_blocks else math.ceil(len(heads) ** 0.5)
    canvas = np.full([(size + 1) * count for count in (math.ceil(len(heads) / num_columns), num_columns)], np.nan)
    for number, name in enumerate(heads):
        top, left = ((size + 1) * place for place in divmod(number, num_columns))
        own = rows[rows["part"] == name]
        queries, keys = (own[axis].to_numpy(int) for axis in ("query_token", "key_token"))
        canvas[top + queries, left + keys] = own["value"]
        axes.text(left + size - 0.5, top, name, ha="right", va="top", fontsize=8)
    brightest = rows.loc[rows["query_token"] > 0, "value"].max()  # the first token can only attend to itself
    image = axes.imshow(canvas, cmap="Blues", vmin=0, vmax=brightest)
    axes.set(xticks=[], yticks=[], xlabel="token attended to", ylabel="attending token")
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.set_title(f"Mean patterns at step {int(rows['step'].iloc[0]):,}", fontsize=10)
    figure.colorbar(image, ax=axes, label="weight", shrink=0.8)
