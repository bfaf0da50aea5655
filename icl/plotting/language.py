"""Figures of language runs: learning curves with unigram and bigram losses, the loss at each position, and behaviours."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from icl.plotting.colours import BLUE, GREEN, ORANGE, SKY, VERMILION
from icl.plotting.style import draw_band, finish_step_axes, new_figure, scale_steps, select
from icl.plotting.tidying import name_outside

BASELINES: dict[str, dict[str, Any]] = {
    "unigram": {"color": "0.55", "linestyle": ":", "label": "frequencies of tokens"},
    "bigram": {"color": "0.25", "linestyle": "--", "label": "frequencies of bigrams"},
}
"""Line styles of the baselines of language runs."""
_LOSS = "loss (nats per token)"


def plot_language_training(
    metrics: pd.DataFrame, losses: pd.DataFrame, *, title: str, levels: Mapping[str, float]
) -> Figure:
    """Plot the learning curves of a language run, its ICL score, and the loss at each position of the test rows.

    Args:
        metrics: The run's `metrics.csv`.
        losses: Table of the losses of the last checkpoint and of the baselines on the test rows of text. The index of the table
            contains each position and `mean`. The columns are `model`, `unigram` and `bigram`.
        title: Title of the figure.
        levels: Mean losses of the baselines `unigram` and `bigram` on the test rows that the learning curves use.
    """
    figure, (curves, score, positions) = new_figure(3, width=4.6, title=title)
    _draw_curves(curves, metrics, levels)
    if "eval/test/icl_score" in metrics:
        scores = metrics.dropna(subset=["eval/test/icl_score"])
        score.plot(scores["step"], scores["eval/test/icl_score"], color=BLUE)
        scale_steps(score, first=1.0)
    score.axhline(0, color="0.7", linewidth=0.8)
    score.set(xlabel="step (updates)", ylabel="ICL score (nats)")
    score.set_title("In-context learning: late minus early loss", fontsize=10)
    by_position = losses.drop(index="mean")
    numbers = by_position.index.astype(int)
    for name, style in BASELINES.items():
        positions.plot(numbers, by_position[name].rolling(5, center=True, min_periods=1).mean(), **style)
    positions.plot(numbers, by_position["model"], color=BLUE, label="model, test rows")
    positions.set(xlabel="position in the row", ylabel=_LOSS)
    positions.set_title("After training (baselines: mean over 5 positions)", fontsize=10)
    name_outside(figure, figure.axes, loc="outside lower center", ncols=4, fontsize=8)
    return figure


def _draw_curves(axes: Axes, metrics: pd.DataFrame, levels: Mapping[str, float]) -> None:
    trained = metrics.dropna(subset=["train/loss"])
    axes.plot(trained["step"], trained["train/loss"], color=SKY, linewidth=1.0, label="training batches")
    if "eval/test/loss" in metrics:
        tested = metrics.dropna(subset=["eval/test/loss"])
        axes.plot(tested["step"], tested["eval/test/loss"], color=BLUE, label="model, test rows")
    for name, style in BASELINES.items():
        axes.axhline(levels[name], **style)
    scale_steps(axes, first=1.0)
    axes.set(xlabel="step (updates)", ylabel=_LOSS)
    axes.set_title("Learning (horizontal lines: mean losses of frequencies)", fontsize=10)


def plot_language_evaluation(numbers: pd.DataFrame, baselines: pd.DataFrame, *, title: str) -> Figure:
    """Plot the test loss and the ICL score over training, and the loss at each position at the last step.

    Bands are two standard errors.

    Args:
        numbers: A run's `results/evaluation.csv`.
        baselines: A run's `results/baselines.csv`.
        title: Title of the figure.
    """
    figure, (loss, score, positions) = new_figure(3, width=4.6, title=title)
    means = select(numbers, quantity="loss", position="mean")
    draw_band(loss, means["step"], means["value"], means["stderr"], color=BLUE, label="model")
    pairs = select(numbers, quantity="icl_score")
    draw_band(score, pairs["step"], pairs["value"], pairs["stderr"], color=BLUE)
    score.axhline(0, color="0.7", linewidth=0.8)
    last = select(numbers, quantity="loss", step=numbers["step"].max())
    for panel, rows in ((positions, last), *((positions, select(baselines, quantity=name)) for name in BASELINES)):
        each = rows[rows["position"] != "mean"]
        style = BASELINES.get(str(rows["quantity"].iloc[0]), {"color": BLUE})
        panel.plot(each["position"].astype(int), each["value"], **{**style, "label": None})
    for name, style in BASELINES.items():
        level = select(baselines, quantity=name, position="mean")["value"]
        loss.axhline(float(level.iloc[0]), **style)
    finish_step_axes(loss, "Test loss", _LOSS)
    finish_step_axes(score, "In-context learning: late minus early loss", "ICL score (nats)")
    positions.set(xlabel="position in the row", ylabel=_LOSS)
    positions.set_title("Last step", fontsize=10)
    name_outside(figure, figure.axes, loc="outside lower center", ncols=4, fontsize=8)
    return figure


_PANELS = (
    ("loss", "Test loss", _LOSS),
    ("icl_score", "In-context learning", "late minus early loss (nats)"),
    ("bigram_score", "Bigrams", "cross-entropy to bigrams (nats)"),
    ("ngram_score", "n-grams", "test loss / loss of common n-grams"),
    ("previous_token", "Attention to the previous token, by head", "mean attention"),
    ("prefix_matching", "Prefix matching, by head", "mean attention"),
    ("ablation", "Loss without positions", "increase of the loss (nats)"),
    ("k_composition", "K-composition, by pair of heads", "minus its mean at the start"),
)
"""Quantity, title and y label of each panel."""
_NAMED_COLOURS = (VERMILION, BLUE, GREEN, ORANGE)
"""Colours of the curves that a panel's legend names. If there are more curves, the legend names those with the largest last values."""
_OTHERS = "0.75"
"""Colour of curves that the legend does not name."""


def plot(table: pd.DataFrame, *, title: str) -> Figure:
    """Draw the behaviours of a language run over training; bands are two standard errors.

    If a panel has more than four curves, the legend names the four with the largest values at the last step; the others are grey.

    Args:
        table: The run's `results/language-behaviour.csv`.
        title: Title of the figure.
    """
    figure, axes = new_figure(4, num_rows=2, width=4.2, height=3.6, title=f"{title}   (bands: 2 standard errors)")
    table = table.assign(part=table["part"].fillna("").astype(str), position=table["position"].fillna("").astype(str))
    for panel, (quantity, name, label) in zip(axes, _PANELS, strict=True):
        rows = select(table, quantity=quantity)
        rows = rows[rows["position"] == "mean"] if quantity == "loss" else rows
        _draw_curves_of(panel, rows, prefix="n = " if quantity == "ngram_score" else "")
        if quantity == "bigram_score":
            floor = select(table, quantity="bigram_floor")["value"]
            panel.axhline(float(floor.iloc[-1]), color=VERMILION, linestyle="--", linewidth=1.2, label="floor")
        if quantity in ("icl_score", "ablation", "k_composition"):
            panel.axhline(0, color=GREEN, linewidth=0.8)
        finish_step_axes(panel, name, label)
        if panel.get_legend_handles_labels()[1]:
            panel.legend(fontsize=8)
    return figure


def _draw_curves_of(axes: Axes, rows: pd.DataFrame, *, prefix: str) -> None:
    """Draw a curve for each head, pair of heads or length of n-grams. Names in the legend begin with `prefix`."""
    groups = rows.sort_values("step").groupby(["part", "position"], sort=False)
    curves = {f"{prefix}{part or position}": curve for (part, position), curve in groups}
    if len(curves) < 2:
        for curve in curves.values():
            draw_band(axes, curve["step"], curve["value"], curve["stderr"], color=BLUE)
        return
    last = {name: curve["value"].fillna(-np.inf).iloc[-1] for name, curve in curves.items()}
    largest = sorted(curves, key=lambda name: -last[name])[: len(_NAMED_COLOURS)]
    colours = dict(zip([name for name in curves if name in largest], _NAMED_COLOURS, strict=False))
    for name in sorted(curves, key=colours.__contains__):  # grey curves first
        curve, label = curves[name], name if name in colours else None
        colour = colours.get(name, _OTHERS)
        draw_band(axes, curve["step"], curve["value"], curve["stderr"], color=colour, label=label)
