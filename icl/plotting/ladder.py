"""Figures of a ladder of task diversities: which prior a run learns first, how far it is from dMMSE and ridge, and when it leaves ridge.

A run's colour says its M: dark is few tasks, light many; M = inf is black. All runs of a ladder start from the same weights.
"""

import math
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from icl.plotting.diversity import plot_diversity
from icl.plotting.style import BLACK, BLUE, GREEN, ORANGE, VERMILION, label_plainly, new_figure, ordered_colours
from icl.plotting.tidying import KEY


def plot_task_prior(evaluation: pd.DataFrame, runs: pd.DataFrame, *, title: str) -> Figure:
    """Distances of predictions to those of the mean task and to 0 over training, and their smallest values against M.

    Args:
        evaluation: Rows of `evaluation.csv` of the ladder.
        runs: The same of `runs.csv`.
        title: Above the panels.
    """
    figure, (mean, zero, least) = new_figure(3, width=4.8, height=4.2)
    ladder = _ladder(evaluation, runs)
    for axes, quantity, name in (
        (mean, "prior_task_mean", "To the mean of the M tasks, w = t̄"),
        (zero, "prior_zero", "To the mean of the Gaussian prior, w = 0"),
    ):
        _draw_ladder(axes, _select(ladder, "pretrain", quantity))
        axes.set(
            xscale="log",
            yscale="log",
            xlabel="step + 1 (updates)",
            ylabel="mean squared distance of predictions (per target)",
        )
        label_plainly(axes)
        axes.set_title(name, fontsize=10)
    zero.sharey(mean)
    mean.autoscale(axis="y")  # to what both hold
    zero.legend(fontsize=7.5, ncols=2, title="M", title_fontsize=8)
    for quantity, colour, marker, label in (
        ("prior_task_mean", BLUE, "o", "to t̄"),
        ("prior_zero", ORANGE, "s", "to 0"),
    ):
        rows = _select(ladder, "pretrain", quantity)
        rows = _lowest(rows)
        _draw_against(least, rows, color=colour, marker=marker, label=label)
    _finish_against(least, "smallest distance in training", ladder)
    least.set_yscale("log", nonpositive="clip")
    label_plainly(least)
    least.set_title("Which prior comes first", fontsize=10)
    least.legend(fontsize=8)
    figure.suptitle(title, fontsize=11)
    return figure


def plot_gaps(evaluation: pd.DataFrame, runs: pd.DataFrame, *, title: str) -> Figure:
    """Gaps to ridge and to dMMSE on new tasks over training, and the loss on new tasks with its minimum: when ridge is left."""
    figure, (ridge, dmmse, loss) = new_figure(3, width=4.8, height=4.2)
    ladder = _ladder(evaluation, runs)
    for axes, quantity, name in (
        (ridge, "delta_ridge", "Gap to ridge, new tasks"),
        (dmmse, "delta_dmmse", "Gap to dMMSE, new tasks"),
        (loss, "loss", "Loss on new tasks (points: its minimum)"),
    ):
        rows = _select(ladder, "true", quantity)
        _draw_ladder(axes, rows)
        axes.set(xscale="log", yscale="log", xlabel="step + 1 (updates)")
        label_plainly(axes)
        axes.set_title(name, fontsize=10)
        if quantity == "loss":
            lowest = _lowest(rows)
            colours = _colours(ladder)
            axes.scatter(
                lowest["step"] + 1, lowest["value"], c=[colours[m] for m in lowest["num_tasks"]], s=28, zorder=4
            )
    ridge.set_ylabel("mean squared distance of predictions (per target)")
    loss.set_ylabel("squared error per target")
    ridge.legend(fontsize=7.5, ncols=2, title="M", title_fontsize=8)
    figure.suptitle(title, fontsize=11)
    return figure


def plot_final_gaps(evaluation: pd.DataFrame, runs: pd.DataFrame, *, title: str) -> Figure:
    """`icl.plotting.diversity.plot_diversity` of the ladder's last steps."""
    return plot_diversity(_ladder(evaluation, runs), title=title)


def plot_transience(evaluation: pd.DataFrame, runs: pd.DataFrame, *, title: str) -> Figure:
    """The step at which the loss on new tasks is smallest, and how much it rises from there to the end, against M."""
    figure, (when, rise) = new_figure(2, width=5.0, height=3.9)
    rows = _select(_ladder(evaluation, runs), "true", "loss")
    steps: dict[str, list[int]] = {str(m): sorted(own["step"]) for m, own in rows.groupby("num_tasks")}
    lowest = _lowest(rows).set_index("num_tasks")
    last = rows.loc[rows.groupby("num_tasks")["step"].idxmax()].set_index("num_tasks")
    for m, row in lowest.iterrows():
        own, place = steps[str(m)], steps[str(m)].index(row["step"])
        below, above = row["step"] - own[max(place - 1, 0)], own[min(place + 1, len(own) - 1)] - row["step"]
        is_last = row["step"] == own[-1]
        style: dict[str, Any] = {"color": BLUE, "markerfacecolor": "white" if is_last else BLUE}
        when.errorbar(
            [_place(str(m), rows)],
            [row["step"] + 1],
            [[below], [above]],
            fmt="o",
            capsize=2.5,
            **style,
        )
    difference = pd.DataFrame(
        {"num_tasks": last.index, "value": (last["value"] - lowest["value"]).to_numpy(), "stderr": 0.0}
    )
    _draw_against(rise, difference, color=VERMILION, marker="o", label="rise after the minimum")
    gap = _select(_ladder(evaluation, runs), "true", "delta_ridge")
    gap = _lowest(gap)
    _draw_against(rise, gap, color=GREEN, marker="s", label="smallest gap to ridge")
    _finish_against(
        when, "step + 1 of the smallest loss on new tasks\n(bars: neighbouring saved steps; open: the last)", rows
    )
    when.set_yscale("log")
    _finish_against(rise, "squared error or distance, per target", rows)
    rise.set_yscale("symlog", linthresh=0.1)
    highest = np.nanmax([*difference["value"], *gap["value"], 0.1])
    rise.set_ylim(-0.02, 2 * highest)
    rise.yaxis.set_major_formatter("{x:g}")
    rise.legend(fontsize=8)
    when.set_title("When new tasks go best", fontsize=10)
    rise.set_title("What is lost afterwards", fontsize=10)
    figure.suptitle(title, fontsize=11)
    return figure


def plot_joint_trajectories(dynamics: pd.DataFrame, *, title: str) -> Figure:
    """All runs of a ladder in the first components of one PCA, with dMMSE of every M and ridge projected in.

    Args:
        dynamics: Rows of `essential-dynamics.csv` of runs analysed together; `member` is `num_tasks=<M>`.
        title: Above the panels.
    """
    figure, panels = new_figure(2, width=6.2, height=5.0)
    scores = dynamics[dynamics["quantity"] == "score"]
    points = dynamics[dynamics["quantity"] == "reference_score"].pivot(index="member", columns="item", values="value")
    shares = dynamics[dynamics["quantity"] == "explained_share"].set_index("item")["value"]
    num_tasks = {member: str(member).partition("=")[2] for member in scores["member"].unique()}
    colours = _colours(pd.DataFrame({"num_tasks": list(num_tasks.values())}))
    for axes, (first, second) in zip(panels, (("PC1", "PC2"), ("PC1", "PC3")), strict=True):
        for member, m in sorted(num_tasks.items(), key=lambda pair: float(pair[1])):
            path = scores[scores["member"] == member].pivot(index="step", columns="item", values="value").sort_index()
            colour, line = colours[m], "--" if m == "inf" else "-"
            label = None if axes is panels[0] else "∞" if m == "inf" else m
            axes.plot(
                path[first],
                path[second],
                color=colour,
                linestyle=line,
                marker=".",
                markersize=3,
                linewidth=1.2,
                label=label,
            )
            axes.plot(path[first].iloc[-1:], path[second].iloc[-1:], "o", color=colour, markersize=7)
            name = "ridge" if m == "inf" else f"dMMSE M={m}"
            if name in points.index:
                marker = "*" if m == "inf" else "D"
                axes.plot(
                    points.loc[name, first], points.loc[name, second], marker, color=colour, markerfacecolor="white",
                    markersize=13 if m == "inf" else 7, markeredgewidth=1.6,
                )  # fmt: skip
        axes.set(xlabel=f"{first} ({shares[first]:.0%} of the variance)", ylabel=f"{second} ({shares[second]:.0%})")
    panels[1].legend(fontsize=7.5, ncols=2, title="M", title_fontsize=8)
    for marker, label, size in (("o", "last step", 7), ("D", "dMMSE of this M", 7), ("*", "ridge", 13)):
        panels[0].plot(
            [],
            [],
            marker,
            color=BLACK,
            markerfacecolor=BLACK if marker == "o" else "white",
            markersize=size,
            label=label,
            gid=KEY,
        )
    panels[0].legend(fontsize=8)
    figure.suptitle(title, fontsize=11)
    return figure


def _lowest(rows: pd.DataFrame) -> pd.DataFrame:
    """The row of the smallest finite value for each M."""
    known = rows.dropna(subset=["value"])
    return known.loc[known.groupby("num_tasks")["value"].idxmin()]


def _ladder(evaluation: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """With the number of tasks of each run."""
    return evaluation.merge(runs[["run", "num_tasks"]], on="run")


def _select(ladder: pd.DataFrame, distribution: str, quantity: str) -> pd.DataFrame:
    chosen = (
        (ladder["distribution"] == distribution) & (ladder["quantity"] == quantity) & (ladder["position"] == "mean")
    )
    return ladder[chosen].reset_index(drop=True)


def _colours(ladder: pd.DataFrame) -> dict[str, Any]:
    labels = sorted(ladder["num_tasks"].unique(), key=float)
    finite = [label for label in labels if label != "inf"]
    return dict(zip(finite, ordered_colours(len(finite)), strict=True)) | {"inf": BLACK}


def _draw_ladder(axes: Axes, rows: pd.DataFrame) -> None:
    for m, colour in _colours(rows).items():
        own = rows[rows["num_tasks"] == m].sort_values("step")
        if own.empty:
            continue
        steps, values, errors = own["step"] + 1.0, own["value"], 2 * own["stderr"]
        label = "∞" if m == "inf" else m
        axes.plot(steps, values, color=colour, linewidth=1.4, linestyle="--" if m == "inf" else "-", label=label)
        axes.fill_between(
            steps, (values - errors).clip(lower=values * 0.2), values + errors, color=colour, alpha=0.12, linewidth=0
        )


def _place(m: str, rows: pd.DataFrame) -> float:
    """log2 M, and infinity two octaves beyond the largest."""
    finite = [math.log2(float(label)) for label in rows["num_tasks"].unique() if label != "inf"]
    return max(finite, default=0.0) + 2 if m == "inf" else math.log2(float(m))


def _draw_against(axes: Axes, rows: pd.DataFrame, **style: Any) -> None:
    places = pd.Series([_place(m, rows) for m in rows["num_tasks"]], index=rows.index)
    order = places[rows["num_tasks"] != "inf"].sort_values().index
    axes.errorbar(
        places[order], rows.loc[order, "value"], 2 * rows.loc[order, "stderr"], capsize=2, markersize=5, **style
    )
    beyond = rows[rows["num_tasks"] == "inf"]
    style = {key: value for key, value in style.items() if key != "label"}
    axes.errorbar(
        places[beyond.index], beyond["value"], 2 * beyond["stderr"], linestyle="none", capsize=2, markersize=5, **style
    )


def _finish_against(axes: Axes, label: str, rows: pd.DataFrame) -> None:
    axes.set(xlabel="task diversity M (number of training tasks)", ylabel=label)
    labels = sorted(rows["num_tasks"].unique(), key=float)
    axes.set_xticks([_place(m, rows) for m in labels], ["∞" if m == "inf" else m for m in labels], fontsize=8)
