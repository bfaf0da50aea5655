"""The figure of an analysis over several runs: curves over training. Runs that differ only in their seeds have the same colour."""

from collections.abc import Mapping

import pandas as pd
from matplotlib.figure import Figure

from icl.analysis.seeds import seed_groups
from icl.config import RunConfig
from icl.plotting.colours import ordered_colours
from icl.plotting.curves import MAX_LABELS
from icl.plotting.seeds import draw_curves
from icl.plotting.style import finish_step_axes, new_figure, select
from icl.plotting.tidying import name_outside

_PANELS: dict[str, tuple[tuple[str, dict[str, str], str], ...]] = {
    "behaviour": (
        ("Loss on training tasks", {"quantity": "loss", "distribution": "pretrain"}, "loss (squared error per target)"),
        ("Loss on new tasks", {"quantity": "loss", "distribution": "true"}, "loss (squared error per target)"),
        (
            "Gap to ridge, new tasks",
            {"quantity": "delta_ridge", "distribution": "true"},
            "squared difference (per target)",
        ),
    ),
    "mixture": (
        ("Weight of dMMSE, training tasks", {"quantity": "weight", "distribution": "pretrain"}, "fixed weight"),
        ("Weight of dMMSE, new tasks", {"quantity": "weight", "distribution": "true"}, "fixed weight"),
    ),
}
"""The panels of each analysis, keyed by its name: the title, the values that select rows of the table, and the y label."""


def plot_over_runs(
    name: str, tables: Mapping[str, pd.DataFrame], configs: Mapping[str, RunConfig], *, title: str
) -> Figure:
    """Plot the main curves of several runs. `icl.plotting.seeds.draw_curves` describes how seeds are drawn.

    Args:
        name: `behaviour` or `mixture`.
        tables: The table of each run.
        configs: The settings of each run.
        title: Title of the figure.
    """
    groups, panels = seed_groups(configs), _PANELS[name]
    figure, all_axes = new_figure(
        len(panels),
        width=4.8,
        height=4.2,
        title=f"{title}   (bands: 95 % over at least 3 seeds; for one seed, 2 standard errors)",
    )
    for axes, (label, wanted, ylabel) in zip(all_axes, panels, strict=True):
        for (group, runs), colour in zip(groups.items(), ordered_colours(len(groups)), strict=True):
            rows = pd.concat([tables[run].assign(run=run) for run in runs])
            rows = select(rows[rows["step"].notna()], position="mean", **wanted)
            rows = rows[rows["value"].notna()]
            if "predictor" in rows:
                rows = select(rows, predictor="model")
            if len(rows):
                draw_curves(axes, rows.assign(x=rows["step"].astype(float)), color=colour, linewidth=1.6, label=group)
        finish_step_axes(axes, label, ylabel)
    if 1 < len(groups) <= MAX_LABELS:
        name_outside(figure, list(all_axes), loc="outside lower center", ncols=4, fontsize=8)
    return figure
