"""The figure of a run: its learning curves, and its loss at each position beside the Bayes-optimal predictors."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TypeAlias

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from icl import population
from icl.build import build_architecture, build_evaluation_sets
from icl.checkpoints import checkpoint_files, load_checkpoint_file
from icl.config import TaskConfig
from icl.evaluation import EvaluationSet, losses_by_position
from icl.plotting.style import BLUE, PREDICTORS, SKY, new_figure, save_figure, scale_steps
from icl.runs import RunError, RunFolder

_TABLE, _FIGURE = "losses.csv", "training.png"
_LEVELS = {"zero": "zero, M tasks", "ridge": "ridge, M tasks", "dmmse": "dMMSE, M tasks"}
_SetsKey: TypeAlias = tuple[TaskConfig, int, int, int]


def draw_run(folder: RunFolder, shared: dict[_SetsKey, list[EvaluationSet]] | None = None) -> tuple[pd.DataFrame, Path]:
    """The table and the figure of a run's last checkpoint, saved to `results/losses.csv` and `figures/training.png`.

    Args:
        folder: The run's.
        shared: Takes and gives the prompts with their baselines, which runs that differ in their training seeds alone share.

    Returns:
        The losses on the training tasks (rows: positions and their mean; columns: predictors), and the figure's path.

    Raises:
        CheckpointError: If the run has no usable checkpoint.
    """
    checkpoint = load_checkpoint_file(checkpoint_files(folder.path)[-1])
    config = checkpoint.config
    predict = partial(population.apply, build_architecture(config))
    params = population.stack([checkpoint.params])
    key = (config.task, config.seeds.tasks, config.seeds.evaluation, config.evaluation.num_prompts)
    shared = {} if shared is None else shared
    if key not in shared:
        shared[key] = build_evaluation_sets(config, num_prompts=config.evaluation.num_prompts)
    losses = {one.name: losses_by_position(predict, params, one) for one in shared[key]}
    folder.write_result(_TABLE, pd.concat(losses, names=["distribution"]).to_csv(float_format="%.6g"))
    tasks = "∞" if config.task.is_gaussian else f"{config.task.num_tasks:,}"
    figure = plot_training(
        _read_metrics(folder),
        losses,
        title=f"{folder.path.name}   (M = {tasks}, D = {config.task.task_size}, "
        f"σ² = {config.task.noise_variance:g}, step {checkpoint.step:,})",
    )
    return losses["pretrain"], save_figure(figure, folder.figures / _FIGURE)


def drawn_losses(folder: RunFolder) -> pd.DataFrame | None:
    """The table that `draw_run` gave before, or None if it or the figure is not there."""
    if not (folder.figures / _FIGURE).is_file():
        return None
    try:
        return pd.read_csv(folder.results / _TABLE).set_index(["distribution", "position"]).loc["pretrain"]
    except (OSError, ValueError, KeyError):
        return None


def _read_metrics(folder: RunFolder) -> pd.DataFrame:
    try:
        return pd.read_csv(folder.metrics_file)
    except (OSError, ValueError):
        raise RunError(
            f"{folder.metrics_file} is missing or damaged, so the learning curves cannot be drawn."
        ) from None


def plot_training(metrics: pd.DataFrame, losses: Mapping[str, pd.DataFrame], *, title: str) -> Figure:
    """Learning curves against step, then loss against position on the training tasks and on new ones.

    Args:
        metrics: The run's `metrics.csv`.
        losses: For `pretrain` and `true`, loss per target: a row per position 1..K and one `mean`, a column per predictor
            (`model`, `ridge`, `dmmse`, `ols`, `zero`; those that apply).
        title: Above the panels.
    """
    figure, (curves, pretrain, true) = new_figure(3, width=4.6)
    _draw_curves(curves, metrics, losses["pretrain"].loc["mean"])
    _draw_positions(pretrain, losses["pretrain"].drop(index="mean"), "After training: the M training tasks")
    _draw_positions(true, losses["true"].drop(index="mean"), "After training: new tasks, w ~ N(0, I)")
    pretrain.legend(fontsize=8)
    true.sharey(pretrain)
    figure.suptitle(title, fontsize=11)
    return figure


def _draw_curves(axes: Axes, metrics: pd.DataFrame, means: pd.Series) -> None:
    trained = metrics.dropna(subset=["train/loss"])
    axes.plot(trained["step"], trained["train/loss"], color=SKY, linewidth=1.0, label="training batches")
    if "eval/pretrain/loss" in metrics:
        evaluated = metrics.dropna(subset=["eval/pretrain/loss"])
        is_start = evaluated["step"] == 0  # far before the next one, so a point by itself
        for key, tasks, line, face in (("pretrain", "M", "-", BLUE), ("true", "new", ":", "white")):
            losses = evaluated.set_index("step")[f"eval/{key}/loss"]
            start, rest = losses[is_start.to_numpy()], losses[~is_start.to_numpy()]
            axes.plot(rest.index, rest, color=BLUE, linestyle=line, label=f"fixed prompts, {tasks} tasks")
            axes.plot(start.index, start, color=BLUE, linestyle="", marker="o", markersize=4, markerfacecolor=face)
    for name in ("zero", "ridge", "dmmse"):
        if name in means:
            axes.axhline(means[name], **PREDICTORS[name] | {"linewidth": 1.2, "label": _LEVELS[name]})
    scale_steps(axes, first=max(1.0, float(trained["step"].min())))
    axes.set(yscale="log", xlabel="step (updates)", ylabel="loss (squared error per target)")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="y", which="minor", labelsize=8)
    has_start = bool((metrics["step"] == 0).any())
    axes.set_title("Learning (points: before training)" if has_start else "Learning", fontsize=10)
    axes.legend(fontsize=8)


def _draw_positions(axes: Axes, losses: pd.DataFrame, title: str) -> None:
    for name in ("zero", "ols", "ridge", "dmmse", "model"):
        if name in losses:
            style = PREDICTORS[name] | ({"marker": "o", "markersize": 4} if name == "model" else {})
            axes.plot(losses.index, losses[name], **style)
    top = 1.25 * losses.drop(columns=["ols"], errors="ignore").max().max()
    axes.set(ylim=(0, top), xlabel="position k (k − 1 examples seen)", ylabel="loss (squared error per target)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(title, fontsize=10)
