"""The figure of attention: seven panels with scores of each head over training, and the mean patterns at the last step."""

import math
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from icl.plotting.colours import BLACK, BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION, ordered_colours
from icl.plotting.style import draw_band, finish_step_axes, new_figure, select
from icl.plotting.tidying import name_outside

_PANELS = (
    ("entropy", "all", "Entropy", "entropy / log(tokens visible)"),
    ("variability", "all", "Variability between prompts", "distance to the mean pattern"),
    ("self", "all", "Attention to the token itself", "weight"),
    ("previous", "all", "Attention to the previous token", "weight"),
    ("y_tokens", "x", "Attention from x-tokens to y-tokens", "weight"),
    ("y_tokens", "y", "Attention from y-tokens to y-tokens", "weight"),
    ("lag", "all", "Distance (0: itself, 1: first token)", "mean lag / k"),
)
"""Quantity, set of queries, title and y label of each panel."""
_HEAD_COLOURS = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY)
_LINES = ("-", "--", ":", "-.")
_MAX_BLOCKS = 3
"""Largest number of blocks that are distinguished by line style."""


def plot(table: pd.DataFrame, *, title: str) -> Figure:
    """Draw eight panels from the table of `icl.analysis.attention`; bands are two standard errors.

    Args:
        table: The run's `results/attention.csv`.
        title: Title of the figure.
    """
    figure, axes = new_figure(4, num_rows=2, width=4.1, height=3.4, title=f"{title}   (bands: 2 standard errors)")
    heads = table.loc[table["queries"].isin(("all", "x", "y")) & (table["part"] != "uniform"), "part"]
    styles = _styles(sorted(set(heads), key=_block_and_head))
    for panel, (quantity, queries, name, label) in zip(axes, _PANELS, strict=False):
        rows = select(table, quantity=quantity, queries=queries)
        for head, style in styles.items():
            curve = select(rows, part=head).sort_values("step")
            draw_band(panel, curve["step"], curve["value"], curve["stderr"], label=head, linewidth=1.5, **style)
        uniform = select(rows, part="uniform")["value"].item()
        panel.axhline(uniform, color=BLACK, linestyle=(0, (1, 1)), label="uniform")
        finish_step_axes(panel, name, label)
    name_outside(figure, axes[:1], loc="outside lower center", ncols=12, fontsize=9)
    _draw_patterns(figure, axes[-1], select(table, quantity="pattern"))
    return figure


def _block_and_head(name: str) -> tuple[int, ...]:
    """Return the numbers of the block and of the head from a name such as `b1h1`."""
    return tuple(int(number) for number in name[1:].split("h"))


def _styles(names: list[str]) -> dict[str, dict[str, Any]]:
    """Return the line style and colour of each head.

    With few blocks, the line style shows the block and the colour shows the head. With many blocks, the line style
    shows the head and the colour shows the block.
    """
    blocks = {_block_and_head(name)[0] for name in names}
    block_colours = ordered_colours(len(blocks))
    styles = {}
    for name in names:
        block, head = _block_and_head(name)
        if len(blocks) <= _MAX_BLOCKS:
            styles[name] = {"color": _HEAD_COLOURS[(head - 1) % len(_HEAD_COLOURS)], "linestyle": _LINES[block - 1]}
        else:
            styles[name] = {"color": block_colours[block - 1], "linestyle": _LINES[(head - 1) % len(_LINES)]}
    return styles


def _draw_patterns(figure: Figure, axes: Axes, rows: pd.DataFrame) -> None:
    """Draw the mean patterns of all heads next to each other. In each pattern, rows are queries and columns are keys.

    Each row of patterns shows the heads of one block, unless there are more blocks than heads.
    """
    names = sorted(set(rows["part"]), key=_block_and_head)
    if not names:
        axes.set_visible(False)
        return
    num_blocks, num_heads = _block_and_head(names[-1])
    num_columns = num_heads if num_heads >= num_blocks else math.ceil(len(names) ** 0.5)
    size = int(rows["query_token"].max()) + 1
    stride = size + 1  # NaN between the patterns leaves a gap
    canvas = np.full((stride * math.ceil(len(names) / num_columns), stride * num_columns), np.nan)
    for number, name in enumerate(names):
        top, left = (stride * index for index in divmod(number, num_columns))
        pattern = select(rows, part=name)
        canvas[top + pattern["query_token"].to_numpy(int), left + pattern["key_token"].to_numpy(int)] = pattern["value"]
        axes.text(left + size - 0.5, top, name, ha="right", va="top", fontsize=8)
    brightest = rows.loc[
        rows["query_token"] > 0, "value"
    ].max()  # token 0 is left out: its weight on itself is always 1
    image = axes.imshow(canvas, cmap="Blues", vmin=0, vmax=brightest)
    axes.set(xticks=[], yticks=[], xlabel="token attended to", ylabel="attending token")
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.set_title(f"Mean patterns at step {int(rows['step'].iloc[0]):,}", fontsize=10)
    figure.colorbar(image, ax=axes, label="weight", shrink=0.8)
