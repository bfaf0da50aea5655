"""The figure of a run's behaviour: losses, scores and gaps over training; scaled inputs and tasks; task vectors."""

import math
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from icl.plotting.colours import BLACK, BLUE, GREEN, ORANGE, ORDERED, PREDICTORS, PURPLE, VERMILION
from icl.plotting.style import draw_band, finish_step_axes, new_figure, select, write_in_middle
from icl.plotting.tidying import KEY

_LINES = {"pretrain": "-", "true": ":"}
_SETS = {"pretrain": "training tasks", "true": "new tasks"}
_MIN_SCALE = 0.2
"""Only multipliers g above this value set the upper limit of the y axis.

For smaller g, the noise variance dominates loss / g².
"""
_SCALED_PANELS = (
    ("input_scale", "loss_over_g2", "Inputs scaled by g", "mean squared error / g²"),
    ("task_scale", "loss_over_g2", "Tasks scaled by g", "mean squared error / g²"),
    ("input_scale", "size_ratio", "Size of predictions, inputs scaled by g", "|predictions| / |targets|"),
)
"""Family of distributions, quantity, title and y label of each panel whose x axis is the multiplier g."""
_PAIR_COLOURS = (ORANGE, PURPLE, BLUE)


def plot(table: pd.DataFrame, *, title: str) -> Figure:
    """Draw eight panels from the table of `icl.analysis.behaviour`; bands are two standard errors.

    All steps use the same prompts. So the difference between two steps has a smaller standard error than the bands suggest.

    Args:
        table: The run's `results/behaviour.csv`.
        title: Title of the figure.
    """
    title = f"{title}   (bands: 2 standard errors; solid: training tasks, dotted: new tasks)"
    figure, axes = new_figure(4, num_rows=2, width=4.4, height=3.7, title=title)
    loss, scores, prior, gaps, inputs, tasks, sizes, vectors = axes
    table = table.assign(position=table["position"].astype(str))
    model, baselines = table[table["predictor"] == "model"], table[table["predictor"] != "model"]
    _draw_loss(loss, model, baselines)
    _draw_scores(scores, model, baselines)
    _draw_prior_scores(prior, model)
    _draw_gaps(gaps, model)
    _draw_task_vectors(vectors, model, baselines)
    _draw_scaled(figure, (inputs, tasks, sizes), model, baselines)
    return figure


def _draw_loss(axes: Axes, model: pd.DataFrame, baselines: pd.DataFrame) -> None:
    for name, label in _SETS.items():
        _draw_curve(axes, _means(model, "loss", name), color=BLUE, linestyle=_LINES[name], label=label)
        for predictor in ("ridge", "dmmse") if name == "pretrain" else ("ridge",):
            _draw_level(axes, _means(baselines, "loss", name), predictor, linestyle=_LINES[name])
    _draw_level(axes, _means(baselines, "loss", "true"), "zero")
    rise, critical_step = (select(model, quantity=quantity).iloc[0] for quantity in ("rise", "critical_step"))
    if rise["finding"] not in ("none", "unresolved") and rise["verdict"] == "ok":
        _mark_step(axes, critical_step, BLACK, f"lowest on new tasks ({rise['finding']})")
    _finish(axes, "Loss", "mean squared error per target")


def _draw_scores(axes: Axes, model: pd.DataFrame, baselines: pd.DataFrame) -> None:
    pairs = select(model, quantity="icl_score")["position"].unique()
    for pair, colour in zip(pairs, _PAIR_COLOURS, strict=False):
        label = "k₁ = {}, k₂ = {}".format(*pair.split(":"))
        _draw_both_sets(axes, model, "icl_score", position=pair, color=colour, label=label)
        level = _means(baselines, "icl_score", "true", pair)
        _draw_level(axes, level, "ridge", color=colour, label="ridge" if pair == pairs[-1] else None)
    _finish(axes, "In-context learning scores", "loss(k₂) − loss(k₁)\n(negative: examples help)")


def _draw_prior_scores(axes: Axes, model: pd.DataFrame) -> None:
    for quantity, label, colour in (
        ("prior_zero", "from 0", BLACK),
        ("prior_task_mean", "from the mean task's predictions", GREEN),
    ):
        _draw_both_sets(axes, model, quantity, color=colour, label=label)
        for _, minimum in select(model, quantity=f"{quantity}_minimum_step", verdict="ok").iterrows():
            _mark_step(axes, minimum, colour, None)
    axes.set_yscale("log")
    _finish(axes, "Prior-task scores", "mean squared difference of predictions")


def _draw_gaps(axes: Axes, model: pd.DataFrame) -> None:
    for quantity, label, colour in (
        ("delta_ridge", "gap to ridge", VERMILION),
        ("delta_dmmse", "gap to dMMSE", GREEN),
    ):
        _draw_both_sets(axes, model, quantity, color=colour, label=label)
    for _, crossing in select(model, quantity="crossing_step", verdict="ok").iterrows():
        if not math.isnan(crossing["value"]):
            name = crossing["distribution"]
            colour = GREEN if "dMMSE" in crossing["finding"] else VERMILION
            _mark_step(axes, crossing, colour, f"crossing {crossing['finding']}, {_SETS[name]}", _LINES[name])
    axes.set_yscale("log")
    _finish(axes, "Gaps to the Bayes predictors", "mean squared difference of predictions")


def _draw_task_vectors(axes: Axes, model: pd.DataFrame, baselines: pd.DataFrame) -> None:
    for quantity, label, colour in (("cosine", "cosine", BLUE), ("norm_ratio", "|weights| / |task|", ORANGE)):
        _draw_both_sets(axes, model, quantity, color=colour, label=label)
        for name, line in (("pretrain", "--"), ("true", ":")):
            _draw_level(axes, _means(baselines, quantity, name), "ridge", color=colour, linestyle=line, label=None)
    axes.plot([], [], color=BLACK, linestyle="--", linewidth=1, label="ridge", gid=KEY)
    _finish(axes, "Task vector read from the model", "mean over positions and prompts")


def _draw_scaled(figure: Figure, panels: tuple[Axes, ...], model: pd.DataFrame, baselines: pd.DataFrame) -> None:
    """Draw the loss and the size of predictions against the multiplier g of inputs or tasks. Darker lines are earlier steps."""
    steps = sorted(select(model, distribution="input_scale")["step"].unique())
    if not steps:
        for axes in panels:
            write_in_middle(axes, "no scaled inputs or tasks (num_scales is 0)")
        return
    colours = ScalarMappable(LogNorm(1, max(2, steps[-1] + 1)), ORDERED)
    for axes, (family, quantity, title, label) in zip(panels, _SCALED_PANELS, strict=True):
        rows = select(model, distribution=family, quantity=quantity)
        levels = select(baselines, distribution=family, quantity=quantity)
        for step in steps:
            curve, colour = select(rows, step=step), colours.to_rgba(step + 1)
            axes.plot(curve["scale"], curve["value"], color=colour, linewidth=1.3)
        # Draw a band for the last step only, because many bands would hide each other.
        draw_band(axes, curve["scale"], curve["value"], curve["stderr"], alpha=0.15, color=colour, linewidth=1.3)
        for name in ("ridge", "zero") if quantity == "loss_over_g2" else ("ridge",):
            level = select(levels, predictor=name)
            axes.plot(level["scale"], level["value"], **PREDICTORS[name])
        axes.axvline(1, color=BLACK, linewidth=0.6)
        axes.set(xscale="log", yscale="log", xlabel="multiplier g (1: as in training)", ylabel=label)
        if quantity == "loss_over_g2":
            highest = rows.loc[rows["scale"] > _MIN_SCALE, "value"].max()
            axes.set_ylim(top=2 * highest if math.isfinite(highest) and highest > 0 else None)
        axes.set_title(title, fontsize=10)
        axes.legend(fontsize=8)
    figure.colorbar(colours, ax=panels[0], label="step + 1")


def _means(table: pd.DataFrame, quantity: str, distribution: str, position: str = "mean") -> pd.DataFrame:
    """Return the rows of one quantity on one distribution: by default the means over positions, otherwise the values at one position."""
    return select(table, quantity=quantity, distribution=distribution, position=position)


def _draw_both_sets(
    axes: Axes, model: pd.DataFrame, quantity: str, *, position: str = "mean", label: str, **style: Any
) -> None:
    """Draw a quantity on training tasks and on new tasks, with one legend entry for both."""
    for name, line in _LINES.items():
        curve = _means(model, quantity, name, position)
        _draw_curve(axes, curve, linestyle=line, label=label if name == "pretrain" else None, **style)


def _draw_curve(axes: Axes, rows: pd.DataFrame, **style: Any) -> None:
    if len(rows):
        rows = rows.sort_values("step")
        options = style | {"marker": "o", "markersize": 2.5, "linewidth": 1.5}
        draw_band(axes, rows["step"], rows["value"], rows["stderr"], alpha=0.15, **options)


def _draw_level(axes: Axes, baselines: pd.DataFrame, predictor: str, **style: Any) -> None:
    """Draw the value of a baseline as a horizontal line, if the table contains this baseline."""
    rows = select(baselines, predictor=predictor)
    if len(rows):
        options = PREDICTORS[predictor] | {"linewidth": 1.0} | style
        if options["label"] in axes.get_legend_handles_labels()[1]:
            options["label"] = None
        axes.axhline(rows["value"].item(), **options)


def _mark_step(axes: Axes, step: pd.Series, colour: str, label: str | None, linestyle: str = "-") -> None:
    """Draw a vertical line at a step, and shade the interval between the saved steps that enclose it."""
    axes.axvspan(step["lower"], step["upper"], color=colour, alpha=0.08, linewidth=0)
    axes.axvline(step["value"], color=colour, linewidth=0.9, linestyle=linestyle, label=label)


def _finish(axes: Axes, title: str, ylabel: str) -> None:
    finish_step_axes(axes, title, ylabel)
    if axes.lines:
        axes.legend(fontsize=7.5)
    else:
        write_in_middle(axes, "needs at least two examples")
