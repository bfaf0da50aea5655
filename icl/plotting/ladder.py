"""Figures of a ladder of task diversities: which prior is learned first, gaps to dMMSE and ridge, transience of ridge.

A ladder is a set of runs that differ only in M and perhaps in seeds. Runs with the same seed start from the same weights. The colour of a
run shows its M: dark for few tasks, light for many, black for M = inf. `icl.plotting.seeds` describes how several seeds of an M are drawn.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from icl.plotting.colours import BLACK, BLUE, GREEN, ORANGE, VERMILION, ordered_colours
from icl.plotting.diversity import diversity_positions, plot_diversity
from icl.plotting.seeds import draw_curves, draw_points
from icl.plotting.style import label_plainly, new_figure, select
from icl.plotting.tidying import KEY

_DIFFERENCE_LABEL = "mean squared difference of predictions (per target)"


def plot_task_prior(evaluation: pd.DataFrame, runs: pd.DataFrame, *, title: str) -> Figure:
    """Plot the prior-task scores over training, and their minima against M.

    These scores are the mean squared differences of the model's predictions from 0 and from the predictions with the mean task.

    Args:
        evaluation: Rows of `evaluation.csv` for the ladder.
        runs: Rows of `runs.csv` for the ladder.
        title: Title of the figure.
    """
    figure, (mean, zero, smallest) = new_figure(3, width=4.8, height=4.2, title=title)
    ladder = _with_num_tasks(evaluation, runs)
    positions = _positions(ladder)
    for axes, quantity, name, colour, marker, label in (
        (mean, "prior_task_mean", "From the mean of the M tasks, w = t̄", BLUE, "o", "from t̄"),
        (zero, "prior_zero", "From the mean of the Gaussian prior, w = 0", ORANGE, "s", "from 0"),
    ):
        rows = _means(ladder, "pretrain", quantity)
        _draw_over_training(axes, rows, name, _colours(ladder))
        axes.set_ylabel(_DIFFERENCE_LABEL)
        _draw_against_diversity(smallest, _smallest(rows), positions, color=colour, marker=marker, label=label)
    zero.sharey(mean)
    mean.autoscale(axis="y")  # so that the shared limits include the curves of both panels
    zero.legend(fontsize=7.5, ncols=2, title="M", title_fontsize=8)
    _label_diversity(smallest, positions, "Which prior is learned first", "smallest difference during training")
    smallest.set_yscale("log", nonpositive="clip")
    label_plainly(smallest)
    smallest.legend(fontsize=8)
    return figure


def plot_gaps(evaluation: pd.DataFrame, runs: pd.DataFrame, *, title: str) -> Figure:
    """Plot the gap to ridge, the gap to dMMSE, and the loss with its minimum over training, all on new tasks."""
    figure, (ridge, dmmse, loss) = new_figure(3, width=4.8, height=4.2, title=title)
    ladder = _with_num_tasks(evaluation, runs)
    colours = _colours(ladder)
    for axes, quantity, name in (
        (ridge, "delta_ridge", "Gap to ridge, new tasks"),
        (dmmse, "delta_dmmse", "Gap to dMMSE, new tasks"),
        (loss, "loss", "Loss on new tasks (dots: minima)"),
    ):
        _draw_over_training(axes, _means(ladder, "true", quantity), name, colours)
    minima = _smallest(_means(ladder, "true", "loss"))
    loss.scatter(minima["step"] + 1, minima["value"], c=[colours[m] for m in minima["num_tasks"]], s=28, zorder=4)
    ridge.set_ylabel(_DIFFERENCE_LABEL)
    loss.set_ylabel("loss (squared error per target)")
    ridge.legend(fontsize=7.5, ncols=2, title="M", title_fontsize=8)
    return figure


def plot_final_gaps(evaluation: pd.DataFrame, runs: pd.DataFrame, *, title: str) -> Figure:
    """Draw the figure of `icl.plotting.diversity.plot_diversity` for the last steps of a ladder."""
    return plot_diversity(_with_num_tasks(evaluation, runs), title=title)


def plot_transience(evaluation: pd.DataFrame, runs: pd.DataFrame, *, title: str) -> Figure:
    """Plot against M: the step of the smallest loss on new tasks, and the rise of the loss from that step to the last step."""
    figure, (when, rise) = new_figure(2, width=5.0, height=3.9, title=title)
    ladder = _with_num_tasks(evaluation, runs)
    losses, gaps = _means(ladder, "true", "loss"), _smallest(_means(ladder, "true", "delta_ridge"))
    positions = _positions(losses)
    minima = _smallest(losses).set_index(["num_tasks", "run"])
    for (m, run), step in minima["step"].items():
        steps = sorted(select(losses, run=run)["step"])
        index = steps.index(step)
        below, above = step - steps[max(index - 1, 0)], steps[min(index + 1, len(steps) - 1)] - step
        face = "white" if step == steps[-1] else BLUE
        when.errorbar(
            [positions[str(m)]], [step + 1], [[below], [above]], fmt="o", capsize=2.5, color=BLUE, markerfacecolor=face
        )
    last = losses.loc[losses.groupby("run")["step"].idxmax()].set_index(["num_tasks", "run"])
    # All steps use the same prompts, so the errors of two steps are correlated. We do not know the error of their difference.
    rises = (last["value"] - minima["value"].reindex(last.index)).rename("value").reset_index().assign(stderr=np.nan)
    _draw_against_diversity(
        rise, rises, positions, color=VERMILION, marker="o", label="rise of the loss after its minimum"
    )
    _draw_against_diversity(rise, gaps, positions, color=GREEN, marker="s", label="smallest gap to ridge")
    label = "step + 1 of the smallest loss on new tasks\n(bars: neighbouring saved steps; open: last step)"
    _label_diversity(when, positions, "Best step on new tasks", label)
    when.set_yscale("log")
    _label_diversity(rise, positions, "Rise of the loss after the best step", "loss or gap (per target)")
    rise.set_yscale("symlog", linthresh=0.1)
    rise.set_ylim(-0.02, 2 * np.nanmax([*rises["value"], *gaps["value"], 0.1]))
    rise.yaxis.set_major_formatter("{x:g}")
    rise.legend(fontsize=8)
    return figure


def plot_joint_trajectories(dynamics: pd.DataFrame, *, title: str) -> Figure:
    """Plot all runs of a ladder in the first components of one joint PCA, with the projections of ridge and of each dMMSE.

    Args:
        dynamics: Rows of `essential-dynamics.csv` for runs that were analysed together. The column `member` names a run
            (`num_tasks=<M>`) or a predictor (`ridge` or `dMMSE M=<M>`).
        title: Title of the figure.
    """
    figure, panels = new_figure(2, width=6.2, height=5.0, title=title)
    scores = select(dynamics, quantity="score")
    references = select(dynamics, quantity="reference_score").pivot(index="member", columns="item", values="value")
    shares = select(dynamics, quantity="explained_share").set_index("item")["value"]
    num_tasks = {member: str(member).partition("=")[2] for member in scores["member"].unique()}
    colours = _colours(pd.DataFrame({"num_tasks": list(num_tasks.values())}))
    for member, m in sorted(num_tasks.items(), key=lambda pair: float(pair[1])):
        path = select(scores, member=member).pivot(index="step", columns="item", values="value").sort_index()
        reference = references.loc[references.index == ("ridge" if m == "inf" else f"dMMSE M={m}")]
        for axes, second in zip(panels, ("PC2", "PC3"), strict=True):
            _draw_trajectory(axes, path[["PC1", second]], reference[["PC1", second]], m, colours[m])
    for axes, second in zip(panels, ("PC2", "PC3"), strict=True):
        axes.set(xlabel=f"PC1 ({shares['PC1']:.0%} of the variance)", ylabel=f"{second} ({shares[second]:.0%})")
    panels[1].legend(fontsize=7.5, ncols=2, title="M", title_fontsize=8)
    keys = [
        panels[0].plot([], [], marker, color=BLACK, markerfacecolor=face, markersize=size, label=label, gid=KEY)[0]
        for marker, face, label, size in (
            ("o", BLACK, "last step", 7),
            ("D", "white", "dMMSE of this M", 7),
            ("*", "white", "ridge", 13),
        )
    ]
    panels[0].legend(handles=keys, fontsize=8)
    return figure


def _draw_trajectory(axes: Axes, path: pd.DataFrame, reference: pd.DataFrame, m: str, colour: Any) -> None:
    """Draw the path of a run with a dot at its last step. If the table contains the run's Bayes predictor, draw its projection too."""
    label, line, marker, size = ("∞", "--", "*", 13) if m == "inf" else (m, "-", "D", 7)
    axes.plot(*path.to_numpy().T, color=colour, linestyle=line, linewidth=1.2, marker=".", markersize=3, label=label)
    axes.plot(*path.to_numpy()[-1:].T, "o", color=colour, markersize=7)
    axes.plot(
        *reference.to_numpy().T, marker, color=colour, markersize=size, markerfacecolor="white", markeredgewidth=1.6
    )


def _with_num_tasks(evaluation: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """Return the evaluation with a column for the number of tasks of each run."""
    return evaluation.merge(runs[["run", "num_tasks"]], on="run")


def _means(ladder: pd.DataFrame, distribution: str, quantity: str) -> pd.DataFrame:
    """Return the means over positions of one quantity."""
    return select(ladder, distribution=distribution, quantity=quantity, position="mean").reset_index(drop=True)


def _smallest(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the row with the smallest finite value for each run."""
    known = rows.dropna(subset=["value"])
    return known.loc[known.groupby("run")["value"].idxmin()]


def _positions(ladder: pd.DataFrame) -> dict[str, float]:
    return diversity_positions(ladder["num_tasks"].unique(), gap=2.0)


def _colours(ladder: pd.DataFrame) -> dict[str, Any]:
    finite = [m for m in sorted(ladder["num_tasks"].unique(), key=float) if m != "inf"]
    return dict(zip(finite, ordered_colours(len(finite)), strict=True)) | {"inf": BLACK}


def _draw_over_training(axes: Axes, rows: pd.DataFrame, title: str, colours: Mapping[str, Any]) -> None:
    for m, colour in colours.items():
        curve = select(rows, num_tasks=m).sort_values("step")
        if len(curve):
            label, line = ("∞", "--") if m == "inf" else (m, "-")
            curve = curve.assign(x=curve["step"] + 1)
            draw_curves(axes, curve, floor=0.2, color=colour, linewidth=1.4, linestyle=line, label=label)
    axes.set(xscale="log", yscale="log", xlabel="step + 1 (updates)")
    label_plainly(axes)
    axes.set_title(title, fontsize=10)


def _draw_against_diversity(axes: Axes, rows: pd.DataFrame, positions: Mapping[str, float], **style: Any) -> None:
    """Draw values against M, with a line through the finite M."""
    ordered = rows.assign(x=rows["num_tasks"].map(positions)).sort_values("x")
    is_infinite = ordered["num_tasks"] == "inf"
    options = style | {"capsize": 2, "markersize": 5}
    for points, changes in ((ordered[~is_infinite], {}), (ordered[is_infinite], {"linestyle": "none", "label": None})):
        if len(points):
            draw_points(axes, points, **options | changes)


def _label_diversity(axes: Axes, positions: Mapping[str, float], title: str, ylabel: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set(xlabel="task diversity M (number of training tasks)", ylabel=ylabel)
    axes.set_xticks(list(positions.values()), ["∞" if m == "inf" else m for m in positions], fontsize=8)
