"""The colours of all figures.

We use the palette of Okabe and Ito (2008), because colour-blind readers can distinguish its colours. Most figures show
a predictor with the colour and line style of `PREDICTORS`.
"""

from collections.abc import Collection
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import ListedColormap

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
    "bayes": {"color": ORANGE, "linestyle": (0, (4, 1)), "label": "Bayes for new tasks"},
    "dmmse": {"color": GREEN, "linestyle": "-.", "label": "dMMSE (Bayes for the M tasks)"},
    "ols": {"color": PURPLE, "linestyle": ":", "label": "OLS"},
    "zero": {"color": BLACK, "linestyle": (0, (1, 1)), "linewidth": 1.0, "label": "zero"},
}


def predictor_style(name: str, predictors: Collection[str]) -> dict[str, Any]:
    """Return the style of a predictor in a figure of several predictors.

    If the figure also shows `bayes`, the label of ridge does not contain the word Bayes.
    """
    return PREDICTORS[name] | ({"label": "ridge"} if name == "ridge" and "bayes" in predictors else {})


ORDERED = ListedColormap(colormaps["viridis"](np.linspace(0, 0.9, 256)), name="ordered")
"""Colour map for ordered values such as steps, from dark to light. Yellow is left out, because it is hard to see on white."""


def ordered_colours(count: int) -> list[Any]:
    """Return `count` colours of `ORDERED`, for ordered objects such as layers or singular values."""
    return [ORDERED(index / max(count - 1, 1)) for index in range(count)]
