"""Refuse settings that are valid, but with which training would be useless or impossible.

`icl train` makes all of these checks before it writes anything. `icl sweep` makes two of them, `require_learning` and
`require_monitor`, before it starts any run.
"""

import numpy as np

from icl.config import RunConfig
from icl.config.schedules import rate_factor
from icl.config.validation import ConfigError
from icl.runs.metrics_file import metric_columns
from icl.tasks.rows import row_source


def require_monitor(config: RunConfig) -> None:
    """Refuse early stopping by a metric that the run does not log.

    Raises:
        ConfigError: If the metric does not exist; the message lists the metrics that exist.
    """
    metrics = [column for column in metric_columns(config) if column.startswith("eval/")]
    monitor = config.early_stopping.monitor
    if config.evaluation.every is not None and monitor not in metrics:
        raise ConfigError(
            f"`early_stopping.monitor` is `{monitor}`, but the metrics are {', '.join(metrics)}; choose one of them."
        )


def require_own_run(config: RunConfig) -> None:
    """Refuse to train an imported run, because its data, optimiser and random numbers came from another program.

    Raises:
        ConfigError: If the settings belong to an imported run.
    """
    if config.checkpoints.imported_from is not None or config.task.imported_tasks is not None:
        raise ConfigError(
            f"The run was imported from {config.checkpoints.imported_from or 'older code'}, so it cannot be trained further. To train a "
            "new run, leave out `checkpoints.imported_from` and `task.imported_tasks`, and keep the other settings."
        )


def require_learning(config: RunConfig) -> None:
    """Refuse settings for which the learning rate of every update is zero in float32.

    Raises:
        ConfigError: If no update has a positive rate.
    """
    optim, max_steps = config.optim, config.trainer.max_steps
    factor = rate_factor(optim.schedule, warmup_steps=optim.warmup_steps, schedule_steps=config.schedule_steps)
    # Update at which the schedule has its highest learning rate.
    highest = optim.warmup_steps or config.schedule_steps // 2 or 1
    if optim.schedule == "triangle" and config.schedule_steps == 1:
        raise ConfigError(
            "The last update of the schedule `triangle` has the learning rate zero, so a triangle of 1 step trains nothing. "
            "Set `optim.schedule constant`, or a `trainer.max_steps` or `optim.schedule_steps` of at least 2."
        )
    if not np.float32(optim.lr * factor(min(highest, max_steps) - 1)) > 0:
        raise ConfigError(
            f"`optim.lr` ({optim.lr:g}) is so small that the learning rate of every update is zero in float32, so nothing "
            "would be trained. Raise `optim.lr`, or lower `optim.warmup_steps`."
        )


def require_text(config: RunConfig) -> None:
    """Refuse to train a language model on a text that cannot be read or is too short. A text is opened only once per process.

    Raises:
        ConfigError: If the text cannot be used.
    """
    if config.model.is_language:
        row_source(config, stream="train")
