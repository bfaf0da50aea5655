"""Common style of all figures: empty axes, axes of training steps, lines with bands, selection of rows, and saving."""

import io
import sys
import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from matplotlib.transforms import Bbox

from icl.files.writing import write_atomically
from icl.plotting.tidying import tidy

_RC_SETTINGS: dict[Any, Any] = {
    "figure.dpi": 110,
    "savefig.dpi": 160,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "pdf.fonttype": 42,
    "svg.hashsalt": "icl",
}
_METADATA: dict[str, dict[str, Any]] = {
    "png": {"Software": None},
    "pdf": {"Creator": None, "Producer": None, "CreationDate": None},
    "svg": {"Creator": None, "Date": None},
}
"""Metadata that is left out of each file format. With dates and versions, two files of the same figure would differ."""
_ORIGIN_INCHES = 0.16
"""Height of the line above a figure that names the source of its data."""
_MINOR_DIGITS = ((8.0, "23456789"), (400.0, "25"))
"""Pairs of a ratio and digits. If a logarithmic axis spans less than the ratio, minor ticks that begin with these digits are labelled."""


def new_figure(
    num_columns: int = 1, *, num_rows: int = 1, width: float = 5.2, height: float = 3.8, title: str = ""
) -> tuple[Figure, list[Axes]]:
    """Create a figure and its empty axes, row by row. The figure's label is the full name of the function that called `new_figure`.

    Args:
        num_columns: Number of columns of axes.
        num_rows: Number of rows of axes.
        width: Width of one axes, in inches.
        height: Height of one axes, in inches.
        title: Title of the whole figure.
    """
    with rc_context(_RC_SETTINGS):
        figure = Figure(figsize=(width * num_columns, height * num_rows), layout="constrained")
        axes = figure.subplots(num_rows, num_columns, squeeze=False)
    if title:
        figure.suptitle(title, fontsize=11)
    caller = sys._getframe(1)
    figure.set_label(f"{caller.f_globals['__name__']}.{caller.f_code.co_name}")
    return figure, list(axes.flat)


def label_plainly(axes: Axes, which: Literal["x", "y"] = "y") -> None:
    """Label the ticks of a logarithmic axis with plain numbers.

    If the axis spans less than a factor of 400, some or all minor ticks are labelled too.
    """
    low, high = axes.get_ylim() if which == "y" else axes.get_xlim()
    axis = axes.yaxis if which == "y" else axes.xaxis
    digits = next((digits for ratio, digits in _MINOR_DIGITS if high / low < ratio), "")
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(FuncFormatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in digits else ""))
    axes.tick_params(axis=which, which="minor", labelsize=8)


def scale_steps(axes: Axes, *, first: float = 1.0) -> None:
    """Scale the x axis for training steps: logarithmic above `first`, linear below it, so that step 0 can be shown.

    The limits leave room at both ends, so that no mark is cut.
    """
    last = max(first, axes.dataLim.x1)  # dataLim.x1 is -inf if the axes are empty
    axes.set_xscale("symlog", linthresh=first)
    axes.set_xlim(-0.1 * first, 1.3 * last)


def finish_step_axes(axes: Axes, title: str, ylabel: str) -> None:
    """Scale and label axes whose x axis shows the training step. Call this function after drawing."""
    scale_steps(axes)
    axes.set(xlabel="step (updates)", ylabel=ylabel)
    axes.set_title(title, fontsize=10)


def draw_band(
    axes: Axes,
    x: pd.Series | pd.Index,
    values: pd.Series,
    stderr: pd.Series,
    *,
    floor: pd.Series | float = -np.inf,
    alpha: float = 0.18,
    **style: Any,
) -> None:
    """Draw a line with a band of two standard errors.

    Args:
        axes: Axes to draw in.
        x: Horizontal position of each value.
        values: Values of the line.
        stderr: Standard error of each value.
        floor: Lower limit of the band. Set a floor if the axis is logarithmic, because a band that reaches zero would fill the panel.
        alpha: Opacity of the band.
        style: Options of the line. `color` is required, and the band has the same colour.
    """
    x = x.astype(float)
    axes.plot(x, values, **style)
    low, high = (values - 2 * stderr).clip(lower=floor), values + 2 * stderr
    axes.fill_between(x, low, high, color=style["color"], alpha=alpha, linewidth=0)


def set_limits(axes: Axes, values: pd.Series, *, margin: float = 0.07) -> None:
    """Set the limits of the y axis to the range of the finite values, widened at both ends by the fraction `margin` of the range."""
    finite = values[np.isfinite(values.astype(float))].astype(float)
    if len(finite):
        low, high = finite.min(), finite.max()
        room = margin * (high - low) or 0.1 * abs(high) or 1.0
        axes.set_ylim(low - room, high + room)


def write_in_middle(axes: Axes, text: str) -> None:
    """Write a text in the middle of empty axes, which says why they are empty."""
    axes.text(0.5, 0.5, text, ha="center", transform=axes.transAxes)


def select(table: pd.DataFrame, **values: Any) -> pd.DataFrame:
    """Return the rows in which every named column has the given value."""
    is_chosen = pd.Series(True, index=table.index)
    for column, value in values.items():
        is_chosen &= table[column] == value
    return table[is_chosen]


def spread_indices(count: int, wanted: int) -> list[int]:
    """Return up to `wanted` evenly spread indices below `count`, including the first and the last."""
    return sorted({round(position) for position in np.linspace(0, count - 1, min(count, wanted))})


def render_figure(figure: Figure, file_format: str = "png", *, origin: str = "") -> bytes:
    """Return the bytes of an image file of the figure. The file contains neither the date nor versions of software.

    Args:
        figure: Figure to draw.
        file_format: `png`, `pdf` or `svg`.
        origin: Source of the data, written in small print above the figure and outside its layout.
    """
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # On a slow machine, matplotlib warns that its search for the best position of a legend is slow.
        warnings.filterwarnings("ignore", 'Creating legend with loc="best"')
        _render(figure, file_format, origin, buffer)
    return buffer.getvalue()


def _render(figure: Figure, file_format: str, origin: str, buffer: io.BytesIO) -> None:
    tidy(figure)
    width, height = figure.get_size_inches()
    strip = _ORIGIN_INCHES if origin else 0.0
    with rc_context(_RC_SETTINGS):
        line = figure.text(
            1 - 0.1 / width, 1 + 0.4 * strip / height, origin, fontsize=6, color="0.4", ha="right", va="center"
        )
        line.set_in_layout(False)
        extent = Bbox([[0, 0], [width, height + strip]])
        engine = figure.get_layout_engine()
        figure.set_layout_engine("none")  # `tidy` has computed the layout
        figure.savefig(buffer, format=file_format, metadata=_METADATA.get(file_format), bbox_inches=extent)
        figure.set_layout_engine(engine)
        line.remove()


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure atomically, in the format that the file's suffix names, and return the path.

    Raises:
        StorageError: If the file cannot be written.
    """
    write_atomically(path, render_figure(figure, path.suffix.lstrip(".")))
    return path
