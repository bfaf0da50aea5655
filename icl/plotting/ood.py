"""Figures of losses out of distribution: every shift at the last step, and the shifts over training."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from icl.evaluation.scores import headlines
from icl.plotting.colours import BLUE, GREEN, ORANGE, PREDICTORS, PURPLE, ordered_colours
from icl.plotting.development import Stages, mark_stages
from icl.plotting.style import draw_band, label_plainly, new_figure, select

_MARKS = (("o", BLUE), ("s", ORANGE), ("D", GREEN), ("v", PURPLE))
_RIDGE = PREDICTORS["ridge"] | {"linewidth": 1.2, "label": "ridge"}
_NAMES = {"pretrain": "training tasks", "true": "new tasks"}


def plot_shifts(evaluation: pd.DataFrame, baselines: pd.DataFrame, *, title: str) -> Figure:
    """Plot the loss divided by ridge's loss on the same prompts, for every distribution, at the last step of each run.

    Args:
        evaluation: Rows of `evaluation.csv` for a few runs.
        baselines: Rows of `baselines.csv` for the same runs.
        title: Title of the figure.
    """
    figure, (axes,) = new_figure(1, width=7.6, height=6.2)
    names: list[str] = []
    for number, (run, rows) in enumerate(evaluation.groupby("run", sort=False)):
        ratios = _ratios_to_ridge(rows, select(baselines, run=run))
        names += [name for name in ratios.index if name not in names]
        marker, colour = _MARKS[number % len(_MARKS)]
        heights = [names.index(name) + 0.16 * (number - 0.5) for name in ratios.index]
        axes.errorbar(
            ratios["value"], heights, xerr=2 * ratios["stderr"], fmt=marker, color=colour, markersize=5, capsize=2, label=str(run)
        )  # fmt: skip
    axes.axvline(1, **_RIDGE)
    axes.set_yticks(range(len(names)), [_readable_name(name) for name in names], fontsize=9)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set(
        xscale="log", xlabel="loss / ridge's loss on the same prompts (bars: 2 standard errors of the model's loss)"
    )
    label_plainly(axes, "x")
    axes.legend(fontsize=8)
    axes.set_title(title, fontsize=11)
    return figure


def plot_shifts_over_training(
    evaluation: pd.DataFrame, baselines: pd.DataFrame, *, title: str, stages: Stages | None = None
) -> Figure:
    """Plot the loss divided by ridge's loss over training, with panels for scaled inputs, scaled tasks, and the other shifts.

    Args:
        evaluation: Rows of `evaluation.csv` for one run.
        baselines: Rows of `baselines.csv` for the same run.
        title: Title of the figure.
        stages: Step at which each stage ends.
    """
    figure, panels = new_figure(3, width=4.9, height=4.0, title=title)
    ratios = pd.concat(
        _ratios_to_ridge(rows, baselines).assign(step=step).reset_index() for step, rows in evaluation.groupby("step")
    )
    ratios = ratios.groupby("distribution").filter(lambda rows: rows["step"].nunique() > 1)
    names = ratios["distribution"].str
    for axes, rows, name in (
        (panels[0], ratios[names.startswith("input_scale_")], "Inputs scaled by g (variance g²)"),
        (panels[1], ratios[names.startswith("task_scale_")], "Tasks scaled by g"),
        (panels[2], ratios[~names.contains("_scale_")], "Other shifts"),
    ):
        _draw_over_training(axes, rows)
        mark_stages(axes, stages or {}, named=axes is panels[0])
        axes.axhline(1, **_RIDGE)
        axes.set(xscale="log", yscale="log", xlabel="step + 1 (updates)")
        # Leave room for the legend: above all curves in the last panel, below the line of ridge in the other panels.
        low, high = axes.get_ylim()
        axes.set_ylim(*((low, 4 * high) if axes is panels[-1] else (low * (low / high) ** 0.45, high)))
        label_plainly(axes)
        axes.set_title(name, fontsize=10)
        axes.legend(fontsize=7, ncols=2, loc="upper left" if axes is panels[-1] else "lower left")
    panels[0].set_ylabel("loss / ridge's loss (1: ridge)")
    return figure


def _ratios_to_ridge(evaluation: pd.DataFrame, baselines: pd.DataFrame) -> pd.DataFrame:
    """Return loss / ridge's loss with its standard error, for each distribution, at the last step of these rows."""
    last = select(evaluation, step=evaluation["step"].max(), quantity="loss")
    losses = headlines(last).set_index("distribution")
    ridge = headlines(select(baselines, quantity="ridge")).set_index("distribution")["value"]
    return losses[["value", "stderr"]].div(ridge.reindex(losses.index), axis=0).rename_axis("distribution")


def _draw_over_training(axes: Axes, ratios: pd.DataFrame) -> None:
    names = ratios["distribution"].unique()
    for name, colour in zip(names, ordered_colours(len(names)), strict=True):
        curve = select(ratios, distribution=name).sort_values("step")
        words, _, size = name.rpartition("_")
        label = f"g = {size}" if words.endswith("scale") else _readable_name(name)
        draw_band(
            axes, curve["step"] + 1, curve["value"], curve["stderr"], floor=0.05, alpha=0.15, color=colour, linewidth=1.4, label=label
        )  # fmt: skip


def _readable_name(distribution: str) -> str:
    """Return the name of a distribution for readers: `input_scale_3` becomes "input scale × 3"."""
    words, _, size = distribution.rpartition("_")
    if words.endswith("scale"):
        return f"{words.replace('_', ' ')} × {size}"
    return _NAMES.get(distribution, distribution.replace("_", " "))
