"""The figure of the behaviour: losses, scores and distances over training above; sizes never seen and task vectors below."""

import math
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from icl.plotting.style import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    ORDERED,
    PREDICTORS,
    PURPLE,
    VERMILION,
    new_figure,
    scale_steps,
)
from icl.plotting.tidying import KEY

_LINES = {"pretrain": "-", "true": ":"}
_SETS = {"pretrain": "training tasks", "true": "new tasks"}
_NOISY = 0.2
_SCORE_COLOURS = (ORANGE, PURPLE, BLUE)


def plot(table: pd.DataFrame, *, title: str) -> Figure:
    """Eight panels from the table of `icl.analysis.behaviour`; bands are two standard errors.

    Prompts are the same at all steps, so curves move less against each other than their bands are wide.

    Args:
        table: Its `results/behaviour.csv`.
        title: Above the panels.
    """
    figure, axes = new_figure(4, num_rows=2, width=4.4, height=3.7)
    loss, scores, prior, distances, inputs, tasks, sizes, vectors = axes
    table = table.assign(position=table["position"].astype(str))
    model, known = table[table["predictor"] == "model"], table[table["predictor"] != "model"]
    _draw_loss(loss, model, known)
    _draw_scores(scores, model, known)
    _draw_prior(prior, model)
    _draw_distances(distances, model)
    _draw_vectors(vectors, model, known)
    _draw_multiples(figure, (inputs, tasks, sizes), model, known)
    figure.suptitle(f"{title}   (bands: 2 standard errors; solid: training tasks, dotted: new tasks)", fontsize=11)
    return figure


def _draw_loss(axes: Axes, model: pd.DataFrame, known: pd.DataFrame) -> None:
    for name, label in _SETS.items():
        _draw(axes, _curve(model, "loss", name), color=BLUE, linestyle=_LINES[name], label=label)
        for predictor in ("ridge", "dmmse"):
            if predictor == "ridge" or name == "pretrain":
                _level(axes, known, "loss", name, "mean", predictor, linestyle=_LINES[name])
    _level(axes, known, "loss", "true", "mean", "zero")
    critical = model[model["quantity"] == "critical_step"].iloc[0]
    rise = model[model["quantity"] == "rise"].iloc[0]
    if rise["finding"] not in ("none", "unresolved") and rise["verdict"] == "ok":
        _mark(axes, critical, BLACK, f"lowest on new tasks ({rise['finding']})")
    _finish(axes, "Loss", "mean squared error per target")


def _draw_scores(axes: Axes, model: pd.DataFrame, known: pd.DataFrame) -> None:
    pairs = model.loc[model["quantity"] == "icl_score", "position"].drop_duplicates().tolist()
    for pair, colour in zip(pairs, _SCORE_COLOURS, strict=False):
        label = "k₁ = {}, k₂ = {}".format(*pair.split(":"))
        for name in _SETS:
            own = _curve(model, "icl_score", name, pair)
            _draw(axes, own, color=colour, linestyle=_LINES[name], label=label if name == "pretrain" else None)
    for pair, colour in zip(pairs, _SCORE_COLOURS, strict=False):
        _level(
            axes, known, "icl_score", "true", pair, "ridge", color=colour, label="ridge" if pair == pairs[-1] else None
        )
    _finish(axes, "In-context learning scores", "loss(k₂) − loss(k₁)\n(negative: examples help)")


def _draw_prior(axes: Axes, model: pd.DataFrame) -> None:
    for quantity, label, colour in (("prior_zero", "to 0", BLACK), ("prior_task_mean", "to the mean task's", GREEN)):
        for name in _SETS:
            own = _curve(model, quantity, name)
            _draw(axes, own, color=colour, linestyle=_LINES[name], label=label if name == "pretrain" else None)
        for _, place in model[model["quantity"] == f"{quantity}_minimum_step"].iterrows():
            if place["verdict"] == "ok":
                _mark(axes, place, colour, None)
    axes.set_yscale("log")
    _finish(axes, "Prior-task scores", "mean squared distance of predictions")


def _draw_distances(axes: Axes, model: pd.DataFrame) -> None:
    for quantity, label, colour in (("delta_ridge", "to ridge", VERMILION), ("delta_dmmse", "to dMMSE", GREEN)):
        for name in _SETS:
            own = _curve(model, quantity, name)
            _draw(axes, own, color=colour, linestyle=_LINES[name], label=label if name == "pretrain" else None)
    for _, place in model[(model["quantity"] == "crossing_step") & (model["verdict"] == "ok")].iterrows():
        if not math.isnan(place["value"]):
            name = place["distribution"]
            label = f"crossing {place['finding']}, {_SETS[name]}"
            _mark(axes, place, GREEN if "dMMSE" in place["finding"] else VERMILION, label, _LINES[name])
    axes.set_yscale("log")
    _finish(axes, "Distance to the Bayes predictors", "mean squared distance of predictions")


def _draw_vectors(axes: Axes, model: pd.DataFrame, known: pd.DataFrame) -> None:
    for quantity, label, colour in (("cosine", "cosine", BLUE), ("norm_ratio", "|weights| / |task|", ORANGE)):
        for name in _SETS:
            own = _curve(model, quantity, name)
            _draw(axes, own, color=colour, linestyle=_LINES[name], label=label if name == "pretrain" else None)
            line = {"pretrain": "--", "true": ":"}[name]
            _level(axes, known, quantity, name, "mean", "ridge", color=colour, linestyle=line, label=None)
    axes.plot([], [], color=BLACK, linestyle="--", linewidth=1, label="ridge's", gid=KEY)
    _finish(axes, "Task vector read from the model", "mean over positions and prompts")


def _draw_multiples(figure: Figure, panels: tuple[Axes, ...], model: pd.DataFrame, known: pd.DataFrame) -> None:
    """The curves over multipliers of some steps, dark first, with ridge's and zero's."""
    parts = (
        ("input_scale", "loss_over_g2", "Inputs g times as large", "mean squared error / g²"),
        ("task_scale", "loss_over_g2", "Tasks g times as large", "mean squared error / g²"),
        ("input_scale", "size_ratio", "Size of predictions, inputs g times as large", "|predictions| / |targets|"),
    )
    steps = sorted(model.loc[model["distribution"] == "input_scale", "step"].unique())
    if not steps:
        for axes in panels:
            axes.text(0.5, 0.5, "left out (num_scales is 0)", ha="center", transform=axes.transAxes)
        return
    colours = ScalarMappable(LogNorm(1, max(2, steps[-1] + 1)), ORDERED)
    for axes, (family, quantity, title, label) in zip(panels, parts, strict=True):
        own = model[(model["distribution"] == family) & (model["quantity"] == quantity)]
        for step in steps:
            curve = own[own["step"] == step].set_index("scale")
            axes.plot(curve.index, curve["value"], color=colours.to_rgba(step + 1), linewidth=1.3)
        _draw(axes, curve, color=colours.to_rgba(step + 1), marker="", linewidth=1.3)  # the last step's band
        for name in ("ridge", "zero"):
            rows = known[
                (known["predictor"] == name) & (known["distribution"] == family) & (known["quantity"] == quantity)
            ]
            if quantity == "loss_over_g2" or name == "ridge":
                axes.plot(rows["scale"], rows["value"], **PREDICTORS[name])
        axes.axvline(1, color=BLACK, linewidth=0.6)
        axes.set(xscale="log", yscale="log", xlabel="multiplier g (1: as in training)", ylabel=label)
        if quantity == "loss_over_g2":  # at small g all is noise / g^2
            highest = own.loc[own["scale"] > _NOISY, "value"].max()
            axes.set_ylim(top=2 * highest if math.isfinite(highest) and highest > 0 else None)
        axes.set_title(title, fontsize=10)
        axes.legend(fontsize=8)
    figure.colorbar(colours, ax=panels[0], label="step + 1")


def _curve(model: pd.DataFrame, quantity: str, name: str, position: str = "mean") -> pd.DataFrame:
    """Values and errors by step, in order."""
    rows = model[(model["quantity"] == quantity) & (model["distribution"] == name) & (model["position"] == position)]
    return rows.set_index("step").sort_index()


def _draw(axes: Axes, curve: pd.DataFrame, **style: Any) -> None:
    if curve.empty:
        return
    places, values, errors = curve.index.astype(float), curve["value"], 2 * curve["stderr"]
    options: dict[str, Any] = {"marker": "o", "markersize": 2.5, "linewidth": 1.5} | style
    axes.plot(places, values, **options)
    axes.fill_between(places, values - errors, values + errors, color=style["color"], alpha=0.15, linewidth=0)


def _level(
    axes: Axes, known: pd.DataFrame, quantity: str, name: str, position: str, predictor: str, **style: Any
) -> Line2D | None:
    """A baseline's value as a line across."""
    chosen = (known["quantity"] == quantity) & (known["distribution"] == name) & (known["predictor"] == predictor)
    rows = known[chosen & (known["position"] == position)]
    if rows.empty:
        return None
    options = PREDICTORS[predictor] | {"linewidth": 1.0} | style
    if options["label"] in axes.get_legend_handles_labels()[1]:
        options["label"] = None
    return axes.axhline(rows["value"].item(), **options)


def _mark(axes: Axes, place: pd.Series, colour: str, label: str | None, linestyle: str = "-") -> None:
    """A step, and the saved steps that enclose it."""
    axes.axvspan(place["lower"], place["upper"], color=colour, alpha=0.08, linewidth=0)
    axes.axvline(place["value"], color=colour, linewidth=0.9, linestyle=linestyle, label=label)


def _finish(axes: Axes, title: str, label: str) -> None:
    scale_steps(axes)
    axes.set(xlabel="step (updates)", ylabel=label)
    axes.set_title(title, fontsize=10)
    if axes.lines:
        axes.legend(fontsize=7.5)
    else:
        axes.text(0.5, 0.5, "needs a second example", ha="center", transform=axes.transAxes)
