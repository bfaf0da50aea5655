"""Figures of a run's development that combine several tables: loss and LLC, in-context learning, learning curves.

In the first two of these figures, each seed has its own line, with a band of two standard errors over prompts. Vertical lines mark the
ends of stages. The x axis shows step + 1 on a logarithmic scale, so that the initial model at step 0 is visible.
"""

from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from icl.plotting.colours import BLACK, BLUE, GREEN, ORANGE, PREDICTORS, SKY, VERMILION, ordered_colours
from icl.plotting.llc import draw_by_verdict
from icl.plotting.llc_studies import SAMPLERS, rows_of_sampler
from icl.plotting.style import draw_band, label_plainly, new_figure, select
from icl.plotting.tidying import KEY
from icl.plotting.training import plot_training

Stages = Mapping[str, float]
"""The step at which each stage ends. The keys are the names of the stages."""

PUBLISHED_STAGES: Stages = {"LR1": 1465, "LR2": 40_292, "LR3": 126_262, "LR4": 318_181, "LR5": 500_000}
"""The stages of L2H4 (Hoogland et al. 2024, table 2, which rounds these steps to 1k, 40k, 126k, 320k and 500k)."""
_SEED_COLOURS = (BLUE, ORANGE, GREEN, VERMILION, SKY)
_SEED_LINES = ("-", "--", "-.", ":", (0, (1, 1)))
_LOSS_LABEL = "loss (squared error per target)"


def plot_run_training(learning: pd.DataFrame, positions: pd.DataFrame, *, title: str) -> Figure:
    """Draw the figure of `icl.plotting.training.plot_training` from the shipped tables of one run."""
    names = ["model", "ridge", "dmmse", "ols", "zero"]
    losses = {
        distribution: rows.set_index("position")[names].dropna(axis="columns", how="all")
        for distribution, rows in positions.groupby("distribution")
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
    """Plot loss (top) and LLC (bottom), for the published sampler (left) and for a sampler that stays in the basin (right).

    Args:
        evaluation: Rows of `evaluation.csv` for the seeds of one model.
        baselines: Rows of `baselines.csv` for the same runs.
        llc: Rows of `llc.csv` for one of the runs.
        published: The table `published.csv`. The losses and LLCs in this table are drawn for comparison.
        title: Title of the figure.
        stages: Step at which each stage ends.
    """
    figure, axes = new_figure(2, num_rows=2, width=5.4, height=3.4, title=title)
    loss = _curves_by_run(evaluation, quantity="loss", position="mean")
    means = select(baselines, distribution="pretrain", position="mean")
    levels = means.drop_duplicates("quantity").set_index("quantity")["value"]
    for (name, is_published, _), top, bottom in zip(SAMPLERS, axes[:2], axes[2:], strict=True):
        rows = rows_of_sampler(llc, is_published)
        _draw_seeds(top, loss)
        for predictor in ("zero", "ridge"):
            top.axhline(levels[predictor], **PREDICTORS[predictor] | {"linewidth": 1.2})
        style: dict[str, Any] = {"color": GREEN, "marker": "s", "markersize": 3, "label": "E[L] over the chains"}
        top.plot(rows["step"] + 1, rows["mean_loss"], **style)
        draw_estimates(bottom, rows)
        if is_published:
            _draw_published(top, select(published, quantity="loss"))
            _draw_published(bottom, select(published, quantity="LLC (published sampler)"))
        for panel in (top, bottom):
            mark_stages(panel, stages, named=panel is top)
            panel.set_xscale("log")
        top.set_title(_describe_sampler(name, rows), fontsize=10)
        bottom.set_xlabel("step + 1 (updates)")
        top.set_ylim(0.85 * levels["ridge"], 1.22 * levels["zero"])
        bottom.set_xlim(top.get_xlim())
    axes[0].set_ylabel(_LOSS_LABEL)
    axes[2].set_ylabel("LLC estimate (bars: 2 standard errors)")
    axes[0].legend(fontsize=7.5, loc="center left")
    for panel in axes[2:]:
        panel.legend(fontsize=8, loc="upper left")
    return figure


def plot_in_context_learning(
    evaluation: pd.DataFrame, baselines: pd.DataFrame, *, title: str, stages: Stages = PUBLISHED_STAGES
) -> Figure:
    """Plot the loss at each position of the first run, and for every seed the ICL scores, the size of predictions and the gap to ridge.

    Args:
        evaluation: Rows of `evaluation.csv` for the seeds of one model.
        baselines: Rows of `baselines.csv` for the same runs.
        title: Title of the figure.
        stages: Step at which each stage ends.
    """
    figure, (positions, scores, prior, gap) = new_figure(2, num_rows=2, width=5.4, height=3.5, title=title)
    first_run = evaluation["run"].iloc[0]
    _draw_positions(positions, select(evaluation, run=first_run), select(baselines, run=first_run))
    _draw_scores(scores, evaluation)
    for panel, quantity in ((prior, "prior_zero"), (gap, "delta_ridge")):
        _draw_seeds(panel, _curves_by_run(evaluation, quantity=quantity, position="mean"))
        panel.set_yscale("log")
        label_plainly(panel)
    for panel, name, label in (
        (positions, f"Loss at each position ({first_run})", _LOSS_LABEL),
        (scores, "ICL scores (line styles: seeds)", "difference of losses (negative is good)"),
        (prior, "Mean square of predictions (0: the prior's mean)", "E[ŷ²] (per target)"),
        (gap, "Gap to ridge", "mean squared difference (per target)"),
    ):
        panel.set_title(name, fontsize=10)
        panel.set(xscale="log", xlabel="step + 1 (updates)", ylabel=label)
        mark_stages(panel, stages, named=panel in (positions, scores))
    positions.legend(fontsize=7.5, ncols=2, loc="lower left")
    for panel in (scores, prior):
        panel.legend(fontsize=8, loc="lower left")
    return figure


def mark_stages(axes: Axes, stages: Stages, *, named: bool = True) -> None:
    """Draw a vertical line where each stage ends, with the name of the stage to the left of the line."""
    for name, step in stages.items():
        axes.axvline(step + 1, color=BLACK, linewidth=0.8, alpha=0.5)
        if named:
            position, frame = (step + 1, 0.985), ("data", "axes fraction")
            style: dict[str, Any] = {"ha": "right", "va": "top", "rotation": "vertical", "fontsize": 8, "color": "0.35"}
            axes.annotate(name, position, xycoords=frame, **style)


def draw_estimates(axes: Axes, rows: pd.DataFrame) -> None:
    """Draw LLCs over training, joined by a thin line, with bars of two standard errors. The marks show the verdicts."""
    axes.plot(rows["step"] + 1, rows["llc"], color=BLACK, linewidth=0.8, alpha=0.5)
    draw_by_verdict(axes, rows["step"] + 1, rows)


def _describe_sampler(name: str, rows: pd.DataFrame) -> str:
    if rows.empty:
        return name
    row = rows.iloc[0]
    return (
        f"{name}: nβ = {row['nbeta']:.4g}, γ = {row['localization']:.4g}, ε = {row['lr']:.2g}\n"
        f"{row['num_chains']} chains × ({row['num_burnin_steps']:,} + {row['num_draws']:,}), batch {row['batch_size']}"
    )


def _curves_by_run(evaluation: pd.DataFrame, *, quantity: str, position: str) -> dict[str, pd.DataFrame]:
    """Return one quantity on the training tasks at every step, for each run."""
    rows = select(evaluation, distribution="pretrain", quantity=quantity, position=position)
    return {str(run): curve.sort_values("step") for run, curve in rows.groupby("run", sort=False)}


def _draw_seeds(axes: Axes, curves: Mapping[str, pd.DataFrame]) -> None:
    for number, (run, curve) in enumerate(curves.items()):
        colour, line = _SEED_COLOURS[number % len(_SEED_COLOURS)], _SEED_LINES[number % len(_SEED_LINES)]
        seed = run.rpartition("/")[2].replace("=", " ")
        draw_band(
            axes, curve["step"] + 1, curve["value"], curve["stderr"], color=colour, linestyle=line, linewidth=1.5, label=seed
        )  # fmt: skip


def _draw_scores(axes: Axes, evaluation: pd.DataFrame) -> None:
    """Draw the ICL score of every pair of positions. Colours show the pair, line styles the seed."""
    pairs = select(evaluation, distribution="pretrain", quantity="icl_score")["position"].unique()
    for colour, pair in zip((SKY, ORANGE, BLUE), pairs, strict=False):
        first, _, second = pair.partition(":")
        for number, curve in enumerate(_curves_by_run(evaluation, quantity="icl_score", position=pair).values()):
            draw_band(
                axes, curve["step"] + 1, curve["value"], curve["stderr"], color=colour, linewidth=1.5,
                linestyle=_SEED_LINES[number % len(_SEED_LINES)], label=f"loss({second}) − loss({first})" if number == 0 else None,
            )  # fmt: skip
    axes.axhline(0, color=BLACK, linewidth=0.6)


def _draw_positions(axes: Axes, evaluation: pd.DataFrame, baselines: pd.DataFrame) -> None:
    """Draw the loss at every position over training. A short line at the right edge shows ridge's loss at the same position."""
    losses = select(evaluation, distribution="pretrain", quantity="loss")
    positions = sorted((position for position in losses["position"].unique() if position.isdigit()), key=int)
    ridge = select(baselines, distribution="pretrain", quantity="ridge").set_index("position")["value"]
    for position, colour in zip(positions, ordered_colours(len(positions)), strict=True):
        curve = select(losses, position=position).sort_values("step")
        draw_band(
            axes, curve["step"] + 1, curve["value"], curve["stderr"], color=colour, linewidth=1.5, label=f"k = {position}"
        )  # fmt: skip
        axes.axhline(ridge.loc[position], xmin=0.965, color=colour, linewidth=2.2)
    axes.plot([], [], color=BLACK, linewidth=2.2, label="ridge (right edge)", gid=KEY)


def _draw_published(axes: Axes, rows: pd.DataFrame) -> None:
    """Draw released numbers as bars from the lowest to the highest released seed. Some numbers are known for one seed only."""
    middle = (rows["low"] + rows["high"]) / 2
    axes.errorbar(
        rows["step"] + 1, middle, rows["high"] - middle, fmt="D", color=VERMILION, markerfacecolor="none", markersize=7, capsize=3,
        label="released numbers", zorder=5,
    )  # fmt: skip
