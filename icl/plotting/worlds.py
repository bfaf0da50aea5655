"""The figure of runs whose tasks, noise or inputs are not Gaussian: the gaps to ridge and to the Bayes predictor, one panel for each preset."""

import pandas as pd
from matplotlib.figure import Figure

from icl.plotting.colours import ORANGE, VERMILION
from icl.plotting.moving_pool import FIRST_STEP, Gaps, draw_gaps
from icl.plotting.style import label_plainly, new_figure, select

_NUM_COLUMNS = 3
_GAPS: Gaps = (("delta_ridge", VERMILION, "--", "to ridge"), ("delta_bayes", ORANGE, "-", "to the Bayes predictor"))


def plot_worlds(table: pd.DataFrame, *, title: str) -> Figure:
    """Plot the gaps on new tasks over the steps, in one panel for each preset.

    A dotted line shows the mean squared difference between ridge and the Bayes predictor. If ridge is the Bayes predictor,
    the panel shows only the gap to ridge.

    Args:
        table: The shipped table `worlds`.
        title: Title of the figure.
    """
    presets = list(dict.fromkeys(table["preset"]))
    num_rows = -(-len(presets) // _NUM_COLUMNS)
    figure, panels = new_figure(_NUM_COLUMNS, num_rows=num_rows, width=3.6, height=3.0, title=title)
    for axes, preset in zip(panels, presets, strict=False):
        rows = select(table, preset=preset)
        draw_gaps(axes, rows[rows["step"] >= FIRST_STEP], _GAPS)
        distance = select(rows, quantity="separation")
        if len(distance):
            axes.axhline(
                distance["value"].mean(), color="0.4", linestyle=":", label="between ridge and the Bayes predictor"
            )
        axes.set_title(preset if len(distance) else f"{preset} (ridge is the Bayes predictor)", fontsize=10)
        label_plainly(axes)
    for axes in panels[len(presets) :]:
        axes.set_axis_off()
    for axes in panels[::_NUM_COLUMNS]:
        axes.set_ylabel("mean squared difference")
    panels[0].legend(fontsize=7, loc="best")
    return figure
