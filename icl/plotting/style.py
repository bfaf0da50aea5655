"""One look for every figure: colours that colour-blind readers can tell apart, and how figures are saved.

The palette is Okabe and Ito's (2008). A predictor has one colour and one line style wherever it is drawn.
"""

import io
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from matplotlib.transforms import Bbox

from icl.plotting.tidying import tidy
from icl.storage import write_atomically

BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILION, PURPLE = (
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#F0E442",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
)

PREDICTORS: dict[str, dict[str, Any]] = {
    "model": {"color": BLUE, "linestyle": "-", "linewidth": 2.2, "label": "transformer"},
    "ridge": {"color": VERMILION, "linestyle": "--", "label": "ridge (Bayes for M = ∞)"},
    "dmmse": {"color": GREEN, "linestyle": "-.", "label": "dMMSE (Bayes for the M tasks)"},
    "ols": {"color": PURPLE, "linestyle": ":", "label": "OLS"},
    "zero": {"color": BLACK, "linestyle": (0, (1, 1)), "linewidth": 1.0, "label": "zero"},
}

ORDERED = ListedColormap(colormaps["viridis"](np.linspace(0, 0.9, 256)), name="ordered")
"""For steps and other things in an order: dark first, never too light on white."""

_SETTINGS: dict[Any, Any] = {
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
_NO_DATES: dict[str, dict[str, Any]] = {
    "png": {"Software": None},
    "pdf": {"Creator": None, "Producer": None, "CreationDate": None},
    "svg": {"Creator": None, "Date": None},
}
"""What would make two files of one figure differ."""
_ORIGIN_INCHES = 0.16
_MINOR_DIGITS = ((8.0, "23456789"), (400.0, "25"))
"""Up to which ratio of the ends of a logarithmic axis ticks between powers of ten are labelled, and which of them."""


def new_figure(
    num_columns: int = 1, *, num_rows: int = 1, width: float = 5.2, height: float = 3.8
) -> tuple[Figure, list[Axes]]:
    """Empty axes in the common look, row by row; `width` and `height` are one axes'."""
    with rc_context(_SETTINGS):
        figure = Figure(figsize=(width * num_columns, height * num_rows), layout="constrained")
        axes = figure.subplots(num_rows, num_columns, squeeze=False)
    return figure, list(axes.flat)


def label_plainly(axes: Axes, which: Literal["x", "y"] = "y") -> None:
    """Ticks of a logarithmic axis as plain numbers; those between powers of ten too, where it spans few: all, or 2 and 5."""
    low, high = axes.get_ylim() if which == "y" else axes.get_xlim()
    axis = axes.yaxis if which == "y" else axes.xaxis
    digits = next((shown for ratio, shown in _MINOR_DIGITS if high / low < ratio), "")
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(FuncFormatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in digits else ""))
    axes.tick_params(axis=which, which="minor", labelsize=8)


def ordered_colours(count: int) -> list[Any]:
    """Colours of `ORDERED` for things in an order, such as layers or singular values."""
    return [ORDERED(index / max(count - 1, 1)) for index in range(count)]


def scale_steps(axes: Axes, *, first: float = 1.0) -> None:
    """Steps on a logarithmic axis from `first` on, with a place for step 0 and room for whole marks at both ends of what is drawn."""
    last = max(first, axes.dataLim.x1)  # -inf if there is nothing yet
    axes.set_xscale("symlog", linthresh=first)
    axes.set_xlim(-0.1 * first, 1.3 * last)


def render_figure(figure: Figure, kind: str = "png", *, origin: str = "") -> bytes:
    """A figure as the bytes of a file of this kind, without the time or versions in it.

    Args:
        figure: The figure.
        kind: `png`, `pdf` or `svg`.
        origin: Where the data come from, in small print above the figure, outside its layout.
    """
    buffer = io.BytesIO()
    tidy(figure)
    width, height = figure.get_size_inches()
    strip = _ORIGIN_INCHES if origin else 0.0
    with rc_context(_SETTINGS):
        line = figure.text(
            1 - 0.1 / width, 1 + 0.4 * strip / height, origin, fontsize=6, color="0.4", ha="right", va="center"
        )
        line.set_in_layout(False)
        figure.savefig(
            buffer, format=kind, metadata=_NO_DATES.get(kind), bbox_inches=Bbox([[0, 0], [width, height + strip]])
        )
        line.remove()
    return buffer.getvalue()


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure atomically, without the time or versions in it.

    Raises:
        StorageError: If it cannot be written.
    """
    write_atomically(path, render_figure(figure, path.suffix.lstrip(".")))
    return path
