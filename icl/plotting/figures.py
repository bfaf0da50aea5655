"""Figures of a run's development that bring several tables together: loss and LLC over stages, in-context learning, learning curves.

Several seeds are one thin line each with a band of two standard errors over prompts. Vertical lines are where stages end. Steps are
drawn at step + 1 on a logarithmic axis, so that the initial model has a place.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from icl.plotting.llc import VERDICTS
from icl.plotting.style import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    PREDICTORS,
    SKY,
    VERMILION,
    label_plainly,
    new_figure,
    ordered_colours,
)
from icl.plotting.tidying import KEY
from icl.plotting.training import plot_training

Stages = Mapping[str, float]
"""The step at which each stage ends, by its name."""

PUBLISHED_STAGES: Stages = {"LR1": 1465, "LR2": 40292}
"""Of L2H4, Hoogland et al. 2024, table 2: the first two, with the steps that its numbers are of (the table prints 1k and 40k)."""
_SEEDS = (BLUE, ORANGE, GREEN, VERMILION, SKY)
_LINES = ("-", "--", "-.", ":", (0, (1, 1)))


def plot_run_training(learning: pd.DataFrame, positions: pd.DataFrame, *, title: str) -> Figure:
    """`icl.plotting.training.plot_training` from the shipped tables of one run."""
    names = ["model", "ridge", "dmmse", "ols", "zero"]
    losses = {
        distribution: own.set_index("position")[names].dropna(axis="columns", how="all")
        for distribution, own in positions.groupby("distribution")
    }
    return plot_training(learning, losses, title=title)


def plot_loss_and_llc(
    evaluation: pd.DataFrame,
    baselines: pd.DataFrame,
    llc: pd.DataFrame,
    published: pd.DataFrame,
    *,
    title: str,
    stages: Stages = PUBLISHED_STAGES,
) -> Figure:
    """Loss above and LLC below, with the published sampler (left) and with one that stays in the basin (right).

    Args:
        evaluation: Rows of `evaluation.csv` of the seeds of one model.
        baselines: The same of `baselines.csv`.
        llc: Rows of `llc.csv` of one of them.
        published: `published.csv`, of which losses and LLCs are drawn.
        title: Above the panels.
        stages: Where stages end.
    """
    figure, axes = new_figure(2, num_rows=2, width=5.4, height=3.4)
    loss = _curves(evaluation, "pretrain", "loss", "mean")
    floor = baselines[(baselines["distribution"] == "pretrain") & (baselines["position"] == "mean")]
    levels = floor.drop_duplicates("quantity").set_index("quantity")["value"]
    for column, (is_published, name) in enumerate(
        ((True, "published sampler"), (False, "sampler that stays in the basin"))
    ):
        top, bottom = axes[column], axes[column + 2]
        rows = llc[llc["mode"].fillna("").str.startswith("published") == is_published].sort_values("step")
        _draw_seeds(top, loss)
        for predictor in ("zero", "ridge"):
            top.axhline(levels[predictor], **PREDICTORS[predictor] | {"linewidth": 1.2})
        top.plot(
            rows["step"] + 1, rows["mean_loss"], color=GREEN, marker="s", markersize=3, label="E[L] over the chains"
        )
        draw_estimates(bottom, rows)
        if is_published:
            _draw_published(top, published, "loss")
            _draw_published(bottom, published, "LLC (published sampler)")
        for panel in (top, bottom):
            mark_stages(panel, stages, named=panel is top)
            panel.set_xscale("log")
        top.set_title(_settings(name, rows), fontsize=10)
        bottom.set_xlabel("step + 1 (updates)")
        top.set_ylim(0.85 * levels["ridge"], 1.22 * levels["zero"])
        bottom.set_xlim(top.get_xlim())
    axes[0].set_ylabel("loss (squared error per target)")
    axes[2].set_ylabel("LLC estimate (bars: 2 standard errors)")
    axes[0].legend(fontsize=7.5, loc="center left")
    for panel in axes[2:]:
        panel.legend(fontsize=8, loc="upper left")
    figure.suptitle(title, fontsize=11)
    return figure


def plot_in_context_learning(
    evaluation: pd.DataFrame, baselines: pd.DataFrame, *, title: str, stages: Stages = PUBLISHED_STAGES
) -> Figure:
    """Loss by position, ICL scores, the size of predictions and the gap to ridge over training; a line for each seed.

    Args:
        evaluation: Rows of `evaluation.csv` of the seeds of one model.
        baselines: The same of `baselines.csv`.
        title: Above the panels.
        stages: Where stages end.
    """
    figure, (positions, scores, prior, gap) = new_figure(2, num_rows=2, width=5.4, height=3.5)
    own = evaluation[evaluation["distribution"] == "pretrain"]
    runs = list(own["run"].unique())
    _draw_positions(positions, own[own["run"] == runs[0]], baselines[baselines["run"] == runs[0]])
    pairs = list(own.loc[own["quantity"] == "icl_score", "position"].unique())
    for colour, pair in zip((SKY, ORANGE, BLUE), pairs, strict=False):
        for number, (_, curve) in enumerate(_curves(own, "pretrain", "icl_score", pair).items()):
            label = f"loss({pair.partition(':')[2]}) − loss({pair.partition(':')[0]})" if number == 0 else None
            _draw(scores, curve, color=colour, linestyle=_LINES[number % len(_LINES)], label=label)
    for panel, quantity in ((prior, "prior_zero"), (gap, "delta_ridge")):
        _draw_seeds(panel, _curves(own, "pretrain", quantity, "mean"))
        panel.set_yscale("log")
        label_plainly(panel)
    scores.axhline(0, color=BLACK, linewidth=0.6)
    for panel, name, label in (
        (positions, f"Loss at each position ({runs[0]})", "loss (squared error per target)"),
        (scores, "ICL scores (line styles: seeds)", "difference of losses (negative is good)"),
        (prior, "Mean square of predictions (0: the prior's mean)", "E[ŷ²] (per target)"),
        (gap, "Gap to ridge", "mean squared distance (per target)"),
    ):
        panel.set_title(name, fontsize=10)
        panel.set(xscale="log", xlabel="step + 1 (updates)", ylabel=label)
        mark_stages(panel, stages, named=panel in (positions, scores))
    positions.legend(fontsize=7.5, ncols=2, loc="lower left")
    for panel in (scores, prior):
        panel.legend(fontsize=8, loc="lower left")
    figure.suptitle(title, fontsize=11)
    return figure


def mark_stages(axes: Axes, stages: Stages, *, named: bool = True) -> None:
    """A vertical line where each stage ends, with its name on the left of it."""
    for name, step in stages.items():
        axes.axvline(step + 1, color=BLACK, linewidth=0.8, alpha=0.5)
        if named:
            axes.annotate(
                f"{name} ",
                (step + 1, 0.985),
                xycoords=("data", "axes fraction"),
                ha="right",
                va="top",
                fontsize=8,
                color="0.35",
            )


def draw_estimates(axes: Axes, rows: pd.DataFrame) -> None:
    """LLCs with bars of two standard errors; each verdict has its own mark and colour, and none hides."""
    axes.plot(rows["step"] + 1, rows["llc"], color=BLACK, linewidth=0.8, alpha=0.5)
    for verdict, style in VERDICTS.items():
        own = rows[rows["verdict"] == verdict]
        if len(own):
            axes.errorbar(
                own["step"] + 1,
                own["llc"],
                2 * own["stderr"],
                linestyle="none",
                capsize=2,
                markersize=6,
                label=verdict,
                **style,
            )


def _settings(name: str, rows: pd.DataFrame) -> str:
    if rows.empty:
        return name
    one = rows.iloc[0]
    return (
        f"{name}: nβ = {one['nbeta']:.4g}, γ = {one['localization']:.4g}, ε = {one['lr']:.2g}\n"
        f"{one['num_chains']} chains × ({one['num_burnin_steps']:,} + {one['num_draws']:,}), batch {one['batch_size']}"
    )


def _curves(table: pd.DataFrame, distribution: str, quantity: str, position: str) -> dict[str, pd.DataFrame]:
    """One number over training, by run."""
    rows = table[
        (table["distribution"] == distribution) & (table["quantity"] == quantity) & (table["position"] == position)
    ]
    return {str(run): own.sort_values("step") for run, own in rows.groupby("run", sort=False)}


def _draw(axes: Axes, curve: pd.DataFrame, **style: Any) -> None:
    steps, values, errors = curve["step"] + 1.0, curve["value"], 2 * curve["stderr"]
    axes.plot(steps, values, **{"linewidth": 1.5} | style)
    axes.fill_between(steps, values - errors, values + errors, color=style["color"], alpha=0.18, linewidth=0)


def _draw_seeds(axes: Axes, curves: Mapping[str, pd.DataFrame]) -> None:
    for number, (run, curve) in enumerate(curves.items()):
        seed = run.rpartition("/")[2].replace("=", " ")
        _draw(axes, curve, color=_SEEDS[number % len(_SEEDS)], linestyle=_LINES[number % len(_LINES)], label=seed)


def _draw_positions(axes: Axes, own: pd.DataFrame, baselines: pd.DataFrame) -> None:
    """The loss at every position, with ridge's at the same one as a short line at the right."""
    losses = own[(own["quantity"] == "loss") & own["position"].str.isdigit()]
    places: Sequence[str] = sorted(losses["position"].unique(), key=int)
    ridge = baselines[(baselines["distribution"] == "pretrain") & (baselines["quantity"] == "ridge")].set_index(
        "position"
    )
    for place, colour in zip(places, ordered_colours(len(places)), strict=True):
        _draw(axes, losses[losses["position"] == place].sort_values("step"), color=colour, label=f"k = {place}")
        axes.axhline(ridge.loc[place, "value"], xmin=0.965, color=colour, linewidth=2.2)
    axes.plot([], [], color=BLACK, linewidth=2.2, label="ridge (right edge)", gid=KEY)


def _draw_published(axes: Axes, published: pd.DataFrame, quantity: str) -> None:
    rows = published[published["quantity"] == quantity]
    middle = (rows["low"] + rows["high"]) / 2
    axes.errorbar(
        rows["step"] + 1, middle, rows["high"] - middle, fmt="D", color=VERMILION, markerfacecolor="none", markersize=7, capsize=3,
        label="released (5 seeds)", zorder=5,
    )  # fmt: skip
