"""The figure of the gradients: sizes, noise and alignment in the weights above, the data distribution and PCAs below."""

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from icl.plotting.style import BLACK, BLUE, GREEN, ORANGE, ORDERED, PURPLE, SKY, VERMILION, new_figure, scale_steps

_FAMILIES = (
    ("all", "all weights", BLACK),
    ("embeddings", "embeddings", ORANGE),
    ("attention", "attention", BLUE),
    ("mlp", "MLP", GREEN),
    ("norms", "layer norms", PURPLE),
    ("unembedding", "unembedding", VERMILION),
)
_PARAMETERS = (
    ("x_mean", "mean of x", BLUE, "-"),
    ("x_scale", "scale of x", BLUE, "--"),
    ("w_mean", "mean of w", GREEN, "-"),
    ("w_scale", "scale of w", GREEN, "--"),
    ("noise_mean", "mean of noise", VERMILION, "-"),
    ("noise_scale", "scale of noise", VERMILION, "--"),
)


def plot(table: pd.DataFrame, *, title: str) -> Figure:
    """Six panels from the table of `icl.analysis.gradients`; bands are two standard errors.

    Where noise drowns a squared norm, triangles show how large it can be, and how small the noise scale.

    Args:
        table: Its `results/gradients.csv`.
        title: Above the panels.
    """
    figure, (norms, noise, alignment, data, weights_pca, data_pca) = new_figure(3, num_rows=2, width=4.9, height=3.9)
    weights = table[table["kind"] == "weights"]
    for group, label, colour in _FAMILIES:
        style = {"color": colour, "label": label, "linewidth": 2.2 if group == "all" else 1.3}
        _draw(norms, _select(weights, "norm", group), style)
    _draw(noise, _select(weights, "noise_scale", "all"), {"color": BLACK, "label": "tr Σ / |G|²"})
    _draw_limits(norms, noise, weights)
    for quantity, label, colour in (
        ("alignment_previous", "with the previous saved step", BLUE),
        ("alignment_tasks", "between single tasks", ORANGE),
    ):
        _draw(alignment, _select(weights, quantity, "all"), {"color": colour, "label": label})
    for name, label, colour, line in _PARAMETERS:
        _draw_data(data, table, name, {"color": colour, "label": label, "linestyle": line})
    _finish_steps(norms, "|G| (loss per unit of weight)", "Weight gradient by group", scale="log")
    norms.set_ylim(bottom=norms.get_ylim()[0] / 6)  # room for the legend
    _finish_steps(noise, "prompts", "Gradient noise scale", scale="log")
    _finish_steps(alignment, "cosine", "Alignment of weight gradients")
    alignment.set_ylim(-1.05, 1.05)
    alignment.axhline(0, color=BLACK, linewidth=0.6)
    _finish_steps(
        data, "∂ E[loss] / ∂ parameter", "Gradient in the data distribution (points: score function)", columns=2
    )
    data.axhline(0, color=BLACK, linewidth=0.6)
    data.set_ylim(top=data.get_ylim()[1] * 1.25)  # room for the legend
    _draw_components(figure, weights_pca, weights, "PCA of weight gradients over steps")
    _draw_components(figure, data_pca, table[table["kind"] == "data"], "PCA of data gradients over steps")
    figure.suptitle(f"{title}   (bands: 2 standard errors)", fontsize=11)
    return figure


def _select(table: pd.DataFrame, quantity: str, item: str) -> pd.DataFrame:
    return table[(table["quantity"] == quantity) & (table["item"] == item)].sort_values("step")


def _draw(axes: Axes, curve: pd.DataFrame, style: dict) -> None:
    """A line through what is `ok` with its band; what is in doubt is left out, so the line has gaps there."""
    known = curve["verdict"] == "ok"
    if not known.any():
        return
    steps, values, errors = curve["step"].astype(float), curve["value"].where(known), 2 * curve["stderr"].where(known)
    axes.plot(steps, values, marker="o", markersize=2.5, **style)
    axes.fill_between(steps, values - errors, values + errors, color=style["color"], alpha=0.18, linewidth=0)


def _draw_limits(norms: Axes, noise: Axes, weights: pd.DataFrame) -> None:
    """Of all weights where the norm is in doubt: its upper limit, and the noise scale's lower one, at two errors."""
    norm = _select(weights, "norm", "all").set_index("step")
    doubtful = norm.index[norm["verdict"] != "ok"]
    square, trace = (_select(weights, name, "all").set_index("step") for name in ("squared_norm", "noise_trace"))
    most = square.loc[doubtful, "value"].clip(lower=0) + 2 * square.loc[doubtful, "stderr"]
    steps = doubtful.to_numpy(float)
    style: dict[str, Any] = {"linestyle": "", "color": BLACK, "markersize": 4, "markerfacecolor": "none"}
    norms.plot(steps, most**0.5, marker="v", label="all weights, at most", **style)
    noise.plot(steps, trace.loc[doubtful, "value"] / most, marker="^", label="at least", **style)


def _draw_data(axes: Axes, table: pd.DataFrame, name: str, style: dict) -> None:
    """The pathwise gradient as a line, the score function's as faint points with bars."""
    curves = _select(table, "gradient", name)
    path, score = (curves[curves["estimator"] == estimator] for estimator in ("pathwise", "score_function"))
    _draw(axes, path, style)
    axes.errorbar(
        score["step"].astype(float),
        score["value"],
        2 * score["stderr"],
        fmt=".",
        markersize=3,
        color=style["color"],
        alpha=0.3,
        elinewidth=0.8,
        zorder=0,
    )


def _finish_steps(axes: Axes, label: str, title: str, *, scale: str = "linear", columns: int = 1) -> None:
    has_lines = bool(axes.lines)
    scale_steps(axes)
    if has_lines:
        if scale == "log":
            axes.set_yscale("log", nonpositive="clip")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.legend(fontsize=8, ncols=columns)
    else:
        axes.text(0.5, 0.5, "nothing here stands above its noise", ha="center", transform=axes.transAxes)
    axes.set(xlabel="step (updates)", ylabel=label)
    axes.set_title(title, fontsize=10)


def _draw_components(figure: Figure, axes: Axes, rows: pd.DataFrame, title: str) -> None:
    """The path of the gradient in its first two components, coloured by step."""
    scores = rows[rows["quantity"] == "pc_score"].pivot(index="step", columns="item", values="value")
    shares = rows[rows["quantity"] == "explained_share"].set_index("item")
    axes.set_title(title, fontsize=10)
    if scores.shape[1] < 2:
        axes.text(0.5, 0.5, "needs three saved steps that differ", ha="center", transform=axes.transAxes)
        return
    steps = scores.index.astype(float) + 1
    norm = LogNorm(1, max(steps.max(), 2))
    axes.plot(scores["PC1"], scores["PC2"], color=SKY, linewidth=0.8, zorder=1)
    axes.scatter(scores["PC1"], scores["PC2"], c=steps, norm=norm, cmap=ORDERED, s=18, zorder=2)
    figure.colorbar(ScalarMappable(norm, ORDERED), ax=axes, label="step + 1")
    doubt = "" if (shares["verdict"] == "ok").all() else "\n(mostly estimation noise)"
    for axis, item in ((axes.set_xlabel, "PC1"), (axes.set_ylabel, "PC2")):
        axis(f"{item} ({shares.loc[item, 'value']:.0%} of the variance)")
    if doubt:
        axes.set_title(title + doubt, fontsize=10)
