"""The figure of the loss gradients, with respect to the weights and to the data distribution, and of their PCA."""

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from icl.plotting.colours import BLACK, BLUE, GREEN, ORANGE, ORDERED, PURPLE, SKY, VERMILION
from icl.plotting.style import draw_band, finish_step_axes, new_figure, select, write_in_middle

_GROUPS = (
    ("all", "all weights", BLACK, 2.2),
    ("embeddings", "embeddings", ORANGE, 1.3),
    ("attention", "attention", BLUE, 1.3),
    ("mlp", "MLP", GREEN, 1.3),
    ("norms", "layer norms", PURPLE, 1.3),
    ("unembedding", "unembedding", VERMILION, 1.3),
)
"""Group of weights, its label, its colour and its line width."""
_DATA_PARAMETERS = (
    ("x_mean", "mean of x", BLUE, "-"),
    ("x_scale", "scale of x", BLUE, "--"),
    ("w_mean", "mean of w", GREEN, "-"),
    ("w_scale", "scale of w", GREEN, "--"),
    ("noise_mean", "mean of noise", VERMILION, "-"),
    ("noise_scale", "scale of noise", VERMILION, "--"),
)


def plot(table: pd.DataFrame, *, title: str) -> Figure:
    """Draw six panels from the table of `icl.analysis.gradients`; bands are two standard errors.

    At some steps, the squared norm of the weight gradient is not significantly above zero. At these steps, triangles
    show an upper limit of the norm and a lower limit of the noise scale.

    Args:
        table: The run's `results/gradients.csv`.
        title: Title of the figure.
    """
    title = f"{title}   (bands: 2 standard errors)"
    figure, axes = new_figure(3, num_rows=2, width=4.9, height=3.9, title=title)
    norms, noise, alignment, data, weights_pca, data_pca = axes
    weights = select(table, kind="weights")
    for group, label, colour, width in _GROUPS:
        _draw_known(norms, _curve(weights, "norm", group), color=colour, label=label, linewidth=width)
    _draw_known(noise, _curve(weights, "noise_scale", "all"), color=BLACK, label="tr Σ / |G|²")
    _draw_limits(norms, noise, weights)
    for quantity, label, colour in (
        ("alignment_previous", "with the previous saved step", BLUE),
        ("alignment_tasks", "between single tasks", ORANGE),
    ):
        _draw_known(alignment, _curve(weights, quantity, "all"), color=colour, label=label)
    for parameter, label, colour, line in _DATA_PARAMETERS:
        _draw_data_gradient(data, _curve(table, "gradient", parameter), color=colour, label=label, linestyle=line)
    _finish(norms, "Norm of the weight gradient, by group", "|G| (loss per unit of weight)", is_logarithmic=True)
    norms.set_ylim(bottom=norms.get_ylim()[0] / 6)  # room for the legend
    _finish(noise, "Gradient noise scale", "prompts", is_logarithmic=True)
    _finish(alignment, "Alignment of weight gradients", "cosine")
    alignment.set_ylim(-1.05, 1.05)
    alignment.axhline(0, color=BLACK, linewidth=0.6)
    _finish(data, "Gradient in the data distribution (dots: score function)", "∂ E[loss] / ∂ parameter", num_columns=2)
    data.axhline(0, color=BLACK, linewidth=0.6)
    data.set_ylim(top=data.get_ylim()[1] * 1.25)  # room for the legend
    _draw_components(figure, weights_pca, weights, "PCA of weight gradients over steps")
    _draw_components(figure, data_pca, select(table, kind="data"), "PCA of data gradients over steps")
    return figure


def _curve(table: pd.DataFrame, quantity: str, item: str) -> pd.DataFrame:
    return select(table, quantity=quantity, item=item).sort_values("step")


def _draw_known(axes: Axes, curve: pd.DataFrame, **style: Any) -> None:
    """Draw the values with verdict ok as a line with a band. The line has gaps at all other values."""
    is_ok = curve["verdict"] == "ok"
    if is_ok.any():
        known = curve[["value", "stderr"]].where(is_ok)
        draw_band(axes, curve["step"], known["value"], known["stderr"], marker="o", markersize=2.5, **style)


def _draw_limits(norms: Axes, noise: Axes, weights: pd.DataFrame) -> None:
    """At steps with an uncertain norm, draw an upper limit of the norm and a lower limit of the noise scale (two standard errors)."""
    norm, square, trace = (
        _curve(weights, quantity, "all").set_index("step") for quantity in ("norm", "squared_norm", "noise_trace")
    )
    uncertain = norm.index[norm["verdict"] != "ok"]
    highest = square.loc[uncertain, "value"].clip(lower=0) + 2 * square.loc[uncertain, "stderr"]
    steps = uncertain.to_numpy(float)
    style: dict[str, Any] = {"linestyle": "", "color": BLACK, "markersize": 4, "markerfacecolor": "none"}
    norms.plot(steps, highest**0.5, marker="v", label="all weights, at most", **style)
    noise.plot(steps, trace.loc[uncertain, "value"] / highest, marker="^", label="at least", **style)


def _draw_data_gradient(axes: Axes, curves: pd.DataFrame, **style: Any) -> None:
    """Draw the pathwise estimate as a line, and the score-function estimate as faint dots with bars."""
    _draw_known(axes, select(curves, estimator="pathwise"), **style)
    score = select(curves, estimator="score_function")
    axes.errorbar(
        score["step"], score["value"], 2 * score["stderr"], fmt=".", markersize=3, color=style["color"], alpha=0.3, elinewidth=0.8, zorder=0
    )  # fmt: skip


def _finish(axes: Axes, title: str, ylabel: str, *, is_logarithmic: bool = False, num_columns: int = 1) -> None:
    has_lines = bool(axes.lines)
    finish_step_axes(axes, title, ylabel)
    if not has_lines:
        write_in_middle(axes, "no value exceeds its noise")
        return
    if is_logarithmic:
        axes.set_yscale("log", nonpositive="clip")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.legend(fontsize=8, ncols=num_columns)


def _draw_components(figure: Figure, axes: Axes, rows: pd.DataFrame, title: str) -> None:
    """Draw the path of the gradient in its first two principal components, coloured by step."""
    scores = select(rows, quantity="pc_score").pivot(index="step", columns="item", values="value")
    shares = select(rows, quantity="explained_share").set_index("item")
    axes.set_title(title, fontsize=10)
    if scores.shape[1] < 2:
        write_in_middle(axes, "needs three different saved steps")
        return
    steps = scores.index.astype(float) + 1
    norm = LogNorm(1, max(steps.max(), 2))
    axes.plot(scores["PC1"], scores["PC2"], color=SKY, linewidth=0.8, zorder=1)
    axes.scatter(scores["PC1"], scores["PC2"], c=steps, norm=norm, cmap=ORDERED, s=18, zorder=2)
    figure.colorbar(ScalarMappable(norm, ORDERED), ax=axes, label="step + 1")
    labels = [f"{item} ({shares.loc[item, 'value']:.0%} of the variance)" for item in ("PC1", "PC2")]
    axes.set(xlabel=labels[0], ylabel=labels[1])
    if not (shares["verdict"] == "ok").all():
        axes.set_title(f"{title}\n(mostly estimation noise)", fontsize=10)
