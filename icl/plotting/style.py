"""One look for every figure: colours that colour-blind readers can tell apart, and how figures are saved.

The palette is Okabe and Ito's (2008). A predictor has one colour and one line style wherever it is drawn.
"""

import io
from pathlib import Path
from typing import Any

from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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
}


def new_figure(
    num_columns: int = 1, *, num_rows: int = 1, width: float = 5.2, height: float = 3.8
) -> tuple[Figure, list[Axes]]:
    """Empty axes in the common look, row by row; `width` and `height` are one axes'."""
    with rc_context(_SETTINGS):
        figure = Figure(figsize=(width * num_columns, height * num_rows), layout="constrained")
        axes = figure.subplots(num_rows, num_columns, squeeze=False)
    return figure, list(axes.flat)


def ordered_colours(count: int) -> list[Any]:
    """Colours for things in an order, such as layers or singular values: dark first, never too light on white."""
    return [colormaps["viridis"](0.9 * index / max(count - 1, 1)) for index in range(count)]


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure atomically, without the time or versions in it.

    Raises:
        StorageError: If it cannot be written.
    """
    buffer = io.BytesIO()
    with rc_context(_SETTINGS):
        figure.savefig(buffer, format=path.suffix.lstrip("."), metadata={"Software": None})
    write_atomically(path, buffer.getvalue())
    return path
