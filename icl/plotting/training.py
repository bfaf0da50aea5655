"""The figure of a training run: its learning curves, and the losses of the model and the baselines at each position."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from icl.build import build_evaluation_sets
from icl.config import LanguageConfig, RunConfig, TaskConfig
from icl.evaluation.predictors import predict_prompts, predictor
from icl.evaluation.scores import evaluate_baselines, tabulate_losses
from icl.evaluation.sets import MONITOR, EvaluationSet, evaluation_set, set_names
from icl.files.reading import ContentError
from icl.files.tables import read_table
from icl.model.stacked import stack
from icl.plotting.colours import BLUE, PREDICTORS, SKY, predictor_style
from icl.plotting.language import plot_language_training
from icl.plotting.style import label_plainly, new_figure, save_figure, scale_steps
from icl.plotting.tidying import name_outside
from icl.runs.checkpoints import checkpoint_files, load_checkpoint_file
from icl.runs.folder import RunError, RunFolder
from icl.tasks.priors import task_sequence
from icl.tasks.rows import TEST

_TABLE, _FIGURE = "losses.csv", "training.png"
_MAX_LINEAR_RATIO = 60.0
"""Largest ratio of the highest to the lowest loss for which the y axis is linear.

Above this ratio, the y axis is logarithmic, so that the lowest loss is readable.
"""
_LOSS_LABEL = "loss (squared error per target)"
_NLL_LABEL = "negative log-likelihood (nats per target)"
_SetsKey: TypeAlias = tuple[TaskConfig, LanguageConfig, int | str, int, int, int | None]


class DrawnRun(NamedTuple):
    """Results of `draw_run`."""

    losses: pd.DataFrame
    """Losses on the training tasks, or on the test rows of a language run.

    There is a row for each position and a row for the mean over positions. There is a column for each predictor. Two more
    columns contain the model's excess loss over the predictor `optimum`, and the standard error of this excess.
    """
    figure: Path
    """Path of the figure."""
    optimum: str
    """Name of the predictor to which the excess refers: the Bayes predictor for the training tasks, or `bigram` for a language run.

    The Bayes predictor is `dmmse` for a finite M, otherwise `ridge` or `bayes`. If it is `bayes` but was not computed, the name is empty.
    """


def draw_run(folder: RunFolder, shared: dict[_SetsKey, list[EvaluationSet]] | None = None) -> DrawnRun:
    """Draw a run with the losses of its last checkpoint; write `results/losses.csv` and `figures/training.png`.

    These losses and the learning curves use different prompts (`icl.evaluation.sets.REPORT`). So early stopping, which selects
    the last checkpoint by the learning curves, does not make these losses too low.

    Args:
        folder: Folder of the run.
        shared: Cache of prompts with their baselines. Use the same cache for runs that differ only in their training seeds.

    Raises:
        CheckpointError: If the run has no usable checkpoint.
        RunError: If `metrics.csv` is missing or damaged.
    """
    checkpoint = load_checkpoint_file(checkpoint_files(folder.path)[-1])
    config = checkpoint.config
    step = checkpoint.step if config.task.has_moving_pool else None
    key = (
        config.task,
        config.language,
        task_sequence(config),
        config.seeds.evaluation,
        config.evaluation.num_prompts,
        step,
    )
    shared = {} if shared is None else shared
    if key not in shared:
        number = config.evaluation.num_prompts
        monitor = evaluation_set(config, set_names(config)[0], num_prompts=number, step=MONITOR, model_step=step)
        reported = build_evaluation_sets(config, num_prompts=number, model_step=step, with_bayes=True)
        shared[key] = [monitor, *reported]
    monitor, *reported = shared[key]
    sets = {prompt_set.name: prompt_set for prompt_set in reported}
    predict, params = predictor(config.model), stack([checkpoint.params])
    predictions = {name: predict_prompts(predict, params, prompt_set.prompts)[0] for name, prompt_set in sets.items()}
    losses = {name: tabulate_losses(predictions[name], prompt_set) for name, prompt_set in sets.items()}
    folder.write_result(_TABLE, pd.concat(losses, names=["distribution"]).to_csv(float_format="%.9g"))
    metrics = _read_metrics(folder, config)
    # The horizontal lines of the baselines are computed on the prompts of the learning curves.
    if config.model.has_density:
        levels = {name: float(values.mean()) for name, values in monitor.nll.items()}
    else:
        levels = {row["quantity"]: row["value"] for row in evaluate_baselines([monitor]) if row["position"] == "mean"}
    if config.model.is_language:
        title = f"{folder.path.name}   (step {checkpoint.step:,})"
        figure = plot_language_training(metrics, losses[TEST], title=title, levels=levels)
        return DrawnRun(losses[TEST], save_figure(figure, folder.figures / _FIGURE), "bigram")
    figure = plot_training(metrics, losses, title=_title(folder, config, checkpoint.step), levels=levels)
    path = save_figure(figure, folder.figures / _FIGURE)
    return DrawnRun(losses["pretrain"], path, sets["pretrain"].bayes or "")


def _title(folder: RunFolder, config: RunConfig, step: int) -> str:
    num_tasks = "∞" if config.task.is_gaussian else f"{config.task.num_tasks:,}"
    return (
        f"{folder.path.name}   (M = {num_tasks}, D = {config.task.task_size}, "
        f"σ² = {config.task.noise_variance:g}, step {step:,})"
    )


def drawn_losses(folder: RunFolder) -> pd.DataFrame | None:
    """Return the losses that `draw_run` wrote for the training tasks or, for a language run, the test rows.

    Return None if the figure is missing, or if the table is missing or damaged.
    """
    if not (folder.figures / _FIGURE).is_file():
        return None
    try:
        return (
            read_table(folder.results / _TABLE)
            .set_index(["distribution", "position"])
            .loc[set_names(folder.read_config())[0]]
        )
    except (OSError, ContentError, KeyError):
        return None


def _read_metrics(folder: RunFolder, config: RunConfig) -> pd.DataFrame:
    train = config.model.train_metric
    quantity = train.partition("/")[2]
    evaluated = (
        () if config.evaluation.every is None else tuple(f"eval/{name}/{quantity}" for name in set_names(config))
    )
    try:
        return read_table(folder.metrics_file, columns=("step", train, *evaluated))
    except (OSError, ContentError):
        raise RunError(
            f"{folder.metrics_file} is missing or damaged, so the learning curves cannot be drawn; restore the file or train again."
        ) from None


def plot_training(
    metrics: pd.DataFrame, losses: Mapping[str, pd.DataFrame], *, title: str, levels: Mapping[str, float] | None = None
) -> Figure:
    """Plot the learning curves, then the loss at each position on the training tasks and on new tasks.

    Args:
        metrics: The run's `metrics.csv`.
        losses: Tables of the loss per target on `pretrain` and on `true`. Each has a row for each position 1..K and a
            row `mean`, and a column for each predictor that applies (of `model`, `bayes`, `ridge`, `dmmse`, `ols`, `zero`).
        title: Title of the figure.
        levels: Mean losses of the predictors on the prompts of the learning curves, in the unit of the training loss.
            The default for the squared error is the means in `losses`. For the negative log-likelihood, no levels are
            drawn by default.
    """
    figure, (curves, pretrain, true) = new_figure(3, width=4.6, title=title)
    quantity = "nll" if "train/nll" in metrics else "loss"
    if levels is None:
        levels = losses["pretrain"].loc["mean"].to_dict() if quantity == "loss" else {}
    _draw_curves(curves, metrics, levels, quantity=quantity, predictors={*levels, *losses["pretrain"]})
    _draw_positions(pretrain, losses["pretrain"].drop(index="mean"), "After training: the M training tasks")
    law = "" if "bayes" in losses["true"] else ", w ~ N(0, I)"
    _draw_positions(true, losses["true"].drop(index="mean"), f"After training: new tasks{law}")
    _share_limits([pretrain, true], losses)
    name_outside(figure, figure.axes, loc="outside lower center", ncols=4, fontsize=8)
    return figure


def _draw_curves(
    axes: Axes, metrics: pd.DataFrame, levels: Mapping[str, float], *, quantity: str, predictors: Collection[str]
) -> None:
    """Draw losses over training, with the mean losses of the predictors as horizontal lines. The y axis of `nll` is linear.

    `predictors` are the names of all predictors in the figure.
    """
    trained = metrics.dropna(subset=[f"train/{quantity}"])
    axes.plot(trained["step"], trained[f"train/{quantity}"], color=SKY, linewidth=1.0, label="training batches")
    if f"eval/pretrain/{quantity}" in metrics:
        for name, tasks, line, face in (("pretrain", "training", "-", BLUE), ("true", "new", ":", "white")):
            losses = metrics.dropna(subset=[f"eval/pretrain/{quantity}"]).set_index("step")[f"eval/{name}/{quantity}"]
            _draw_evaluated(axes, losses, f"fixed prompts, {tasks} tasks (dot: step 0)", line, face)
    for name in ("zero", "ridge", "bayes", "dmmse"):
        if name in levels:
            axes.axhline(levels[name], **predictor_style(name, predictors) | {"linewidth": 1.2})
    scale_steps(axes, first=max(1.0, float(trained["step"].min())))
    axes.set(xlabel="step (updates)", ylabel=_LOSS_LABEL if quantity == "loss" else _NLL_LABEL)
    if quantity == "loss":
        axes.set_yscale("log")
        label_plainly(axes)
    axes.set_title("Learning (horizontal lines: mean loss on training tasks)", fontsize=10)


def _draw_evaluated(axes: Axes, losses: pd.Series, label: str, line: str, face: str) -> None:
    """Draw losses on fixed prompts. Step 0 lies far to the left of the next step, so the loss at step 0 is a separate dot."""
    start, later = losses[losses.index == 0], losses[losses.index != 0]
    num_known = later.notna().sum()
    dot: dict[str, Any] = {"marker": "o", "markersize": 4, "markerfacecolor": face}
    axes.plot(
        later.index, later, color=BLUE, linestyle=line, label=label if num_known else None,
        **dot | ({} if num_known == 1 else {"marker": None}),
    )  # fmt: skip
    axes.plot(start.index, start, color=BLUE, linestyle="", label=None if num_known else label, **dot)


def _draw_positions(axes: Axes, losses: pd.DataFrame, title: str) -> None:
    for name in ("zero", "ols", "ridge", "bayes", "dmmse", "model"):
        if name in losses:
            style = predictor_style(name, list(losses)) | ({"marker": "o", "markersize": 4} if name == "model" else {})
            axes.plot(losses.index, losses[name], **style)
    axes.set(xlabel="position k (k − 1 examples seen)", ylabel=_LOSS_LABEL)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(title, fontsize=10)


def _share_limits(panels: list[Axes], losses: Mapping[str, pd.DataFrame]) -> None:
    """Give the panels the same y axis, chosen for the losses of all predictors except OLS. OLS can have an infinite mean loss."""
    names = [name for name in PREDICTORS if name != "ols"]
    shown = pd.concat([table.drop(index="mean").filter(items=names) for table in losses.values()])
    values = shown.to_numpy(dtype=float)
    positive = values[np.isfinite(values) & (values > 0)]
    highest, lowest = (positive.max(), positive.min()) if len(positive) else (1.0, 1.0)
    is_logarithmic = highest > _MAX_LINEAR_RATIO * lowest and not (values == 0).any()
    for axes in panels:
        if is_logarithmic:
            axes.set(yscale="log", ylim=(0.8 * lowest, 1.5 * highest))
        else:
            axes.set(ylim=(0, 1.1 * highest))
