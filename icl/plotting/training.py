"""The figure of a run: its learning curves, and its loss at each position beside the Bayes-optimal predictors."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from icl.build import build_evaluation_sets
from icl.checkpoints import checkpoint_files, load_checkpoint_file
from icl.config import RunConfig, TaskConfig
from icl.evaluation import EvaluationSet, excess_over_optimum, predict_prompts, tabulate_losses
from icl.plotting.style import BLUE, PREDICTORS, SKY, label_plainly, new_figure, save_figure, scale_steps
from icl.plotting.tidying import name_outside
from icl.reading import ContentError
from icl.runs import RunError, RunFolder
from icl.stacked import apply, stack
from icl.table_files import read_table

_TABLE, _FIGURE = "losses.csv", "training.png"
_LARGEST_RATIO = 60.0
"""Largest over smallest loss from which on the axis is logarithmic, so that the smallest can be read."""
_SetsKey: TypeAlias = tuple[TaskConfig, int, int, int]


class DrawnRun(NamedTuple):
    """What `draw_run` made."""

    losses: pd.DataFrame
    """The losses on the training tasks: a row per position and one for their mean, a column per predictor."""
    figure: Path
    optimum: str
    """The Bayes predictor of the training tasks: `ridge` for M = inf, else `dmmse`."""
    excess: float
    """Mean loss of the model minus that of the optimum, on the same prompts."""
    excess_stderr: float


def draw_run(folder: RunFolder, shared: dict[_SetsKey, list[EvaluationSet]] | None = None) -> DrawnRun:
    """Draw a run's last checkpoint; its table and figure go to `results/losses.csv` and `figures/training.png`.

    Args:
        folder: The run's.
        shared: Takes and gives the prompts with their baselines, which runs that differ in their training seeds alone share.

    Raises:
        CheckpointError: If the run has no usable checkpoint.
    """
    checkpoint = load_checkpoint_file(checkpoint_files(folder.path)[-1])
    config = checkpoint.config
    predict = partial(apply, config.model)
    params = stack([checkpoint.params])
    key = (config.task, config.seeds.tasks, config.seeds.evaluation, config.evaluation.num_prompts)
    shared = {} if shared is None else shared
    if key not in shared:
        shared[key] = build_evaluation_sets(config, num_prompts=config.evaluation.num_prompts)
    predictions = {one.name: predict_prompts(predict, params, one.prompts)[0] for one in shared[key]}
    losses = {one.name: tabulate_losses(predictions[one.name], one) for one in shared[key]}
    own = next(one for one in shared[key] if one.name == "pretrain")
    optimum, excess = excess_over_optimum(predictions["pretrain"], own, is_gaussian=config.task.is_gaussian)
    folder.write_result(_TABLE, pd.concat(losses, names=["distribution"]).to_csv(float_format="%.9g"))
    tasks = "∞" if config.task.is_gaussian else f"{config.task.num_tasks:,}"
    figure = plot_training(
        _read_metrics(folder, config),
        losses,
        title=f"{folder.path.name}   (M = {tasks}, D = {config.task.task_size}, "
        f"σ² = {config.task.noise_variance:g}, step {checkpoint.step:,})",
    )
    path = save_figure(figure, folder.figures / _FIGURE)
    return DrawnRun(losses["pretrain"], path, optimum, float(excess.value), float(excess.stderr))


def drawn_losses(folder: RunFolder) -> pd.DataFrame | None:
    """The table that `draw_run` gave before, or None if it or the figure is not there."""
    if not (folder.figures / _FIGURE).is_file():
        return None
    try:
        return read_table(folder.results / _TABLE).set_index(["distribution", "position"]).loc["pretrain"]
    except (OSError, ContentError, KeyError):
        return None


def _read_metrics(folder: RunFolder, config: RunConfig) -> pd.DataFrame:
    evaluated = () if config.evaluation.every is None else ("eval/pretrain/loss", "eval/true/loss")
    try:
        return read_table(folder.metrics_file, columns=("step", "train/loss", *evaluated))
    except (OSError, ContentError):
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
    _share_limits([pretrain, true], losses)
    name_outside(figure, figure.axes, loc="outside lower center", ncols=4, fontsize=8)
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
            label = f"fixed prompts, {tasks} tasks (left; dot: step 0)"
            axes.plot(
                rest.index, rest, color=BLUE, linestyle=line, label=label if rest.notna().any() else None,
                marker="o" if rest.notna().sum() == 1 else None, markersize=4, markerfacecolor=face,
            )  # fmt: skip
            axes.plot(
                start.index, start, color=BLUE, linestyle="", marker="o", markersize=4, markerfacecolor=face,
                label=None if rest.notna().any() else label,
            )  # fmt: skip
    for name in ("zero", "ridge", "dmmse"):
        if name in means:
            axes.axhline(means[name], **PREDICTORS[name] | {"linewidth": 1.2})
    scale_steps(axes, first=max(1.0, float(trained["step"].min())))
    axes.set(yscale="log", xlabel="step (updates)", ylabel="loss (squared error per target)")
    label_plainly(axes)
    axes.set_title("Learning (predictors' levels: the M training tasks)", fontsize=10)


def _draw_positions(axes: Axes, losses: pd.DataFrame, title: str) -> None:
    for name in ("zero", "ols", "ridge", "dmmse", "model"):
        if name in losses:
            style = PREDICTORS[name] | ({"marker": "o", "markersize": 4} if name == "model" else {})
            axes.plot(losses.index, losses[name], **style)
    axes.set(xlabel="position k (k − 1 examples seen)", ylabel="loss (squared error per target)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(title, fontsize=10)


def _share_limits(panels: list[Axes], losses: Mapping[str, pd.DataFrame]) -> None:
    """Give panels one axis that holds every predictor's losses; OLS, whose mean may be infinite, alone may leave it."""
    shown = pd.concat([table.drop(index="mean").drop(columns="ols", errors="ignore") for table in losses.values()])
    values = shown.to_numpy(dtype=float)
    positive = values[np.isfinite(values) & (values > 0)]
    highest, lowest = (positive.max(), positive.min()) if len(positive) else (1.0, 1.0)
    is_wide = highest > _LARGEST_RATIO * lowest and not (values == 0).any()
    for axes in panels:
        if is_wide:
            axes.set(yscale="log", ylim=(0.8 * lowest, 1.5 * highest))
        else:
            axes.set(ylim=(0, 1.1 * highest))
