"""The figure of fixed and changing pools of tasks: the gaps to ridge and to dMMSE over training, one panel for each pool."""

from typing import Any, TypeAlias

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from icl.plotting.colours import GREEN, VERMILION
from icl.plotting.seeds import draw_curves
from icl.plotting.style import label_plainly, new_figure, select

FIRST_STEP = 100
"""First step of the figure. At earlier steps, models do not yet use the examples."""
Gaps: TypeAlias = tuple[tuple[str, Any, str, str], ...]
"""The gaps to draw: the quantity, the colour, the line style and the label of each gap."""
_GAPS: Gaps = (("delta_ridge", VERMILION, "--", "to ridge"), ("delta_dmmse", GREEN, "-", "to dMMSE"))


def plot_moving_pools(table: pd.DataFrame, *, title: str) -> Figure:
    """Plot the gaps on training tasks over the steps. Each kind of pool has a panel, and all panels have the same y axis.

    Args:
        table: The shipped table `moving-pool`.
        title: Title of the figure.
    """
    rows = select(table, distribution="pretrain")
    rows = rows[rows["step"] >= FIRST_STEP]
    pools = rows[["num_tasks", "pool", "pool_steps"]].drop_duplicates().to_dict("records")
    figure, panels = new_figure(len(pools), width=3.6, height=3.8, title=title)
    for axes, pool in zip(panels, pools, strict=True):
        is_walk = pool["pool"] == "walk"
        own = rows[(rows["num_tasks"] == pool["num_tasks"]) & (rows["pool"] == pool["pool"])]
        own = own[own["pool_steps"] == pool["pool_steps"]] if is_walk else own
        draw_gaps(axes, own, _GAPS)
        how = f"walking, n = {pool['pool_steps']:,.0f} steps" if is_walk else "fixed"
        axes.set_title(f"M = {pool['num_tasks']}, {how}", fontsize=10)
        axes.sharey(panels[0])
    panels[0].autoscale(axis="y")  # so that the shared limits include the curves of all panels
    label_plainly(panels[0])
    panels[0].set_ylabel("mean squared difference of predictions")
    panels[0].legend(fontsize=8, loc="lower left")
    return figure


def draw_gaps(axes: Axes, rows: pd.DataFrame, gaps: Gaps) -> None:
    """Draw each of the gaps against the step on logarithmic axes, with its mean over seeds.

    Gaps that are not in the table are left out.
    """
    for quantity, colour, line, label in gaps:
        curves = select(rows, quantity=quantity)
        if curves.empty:
            continue
        curves = curves.assign(x=curves["step"], run=curves["seed"])
        draw_curves(axes, curves, color=colour, floor=0.1, linestyle=line, label=label)
    axes.set(xscale="log", yscale="log", xlabel="step (updates)")
    label_plainly(axes, "x")
