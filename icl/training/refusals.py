"""Settings that training would accept and could do nothing with; `icl train` refuses them, and `icl sweep` before it starts anything."""

import numpy as np

from icl.config import RunConfig
from icl.metrics_file import metric_columns
from icl.schedules import rate_factor
from icl.validation import ConfigError


def require_monitor(config: RunConfig) -> None:
    """Refuse a patience for a metric that the run does not log.

    Raises:
        ConfigError: Naming the metrics that it does.
    """
    metrics = [column for column in metric_columns(config) if column.startswith("eval/")]
    monitor = config.early_stopping.monitor
    if config.evaluation.every is not None and monitor not in metrics:
        raise ConfigError(f"`early_stopping.monitor` is `{monitor}`, but the metrics are {', '.join(metrics)}.")


def require_learning(config: RunConfig) -> None:
    """Refuse settings under which every update has the learning rate zero, as float32 holds it.

    Raises:
        ConfigError: Saying what to set instead.
    """
    optim, max_steps = config.optim, config.trainer.max_steps
    factor = rate_factor(optim.schedule, warmup_steps=optim.warmup_steps, schedule_steps=config.schedule_steps)
    rise = optim.warmup_steps or config.schedule_steps // 2 or 1  # no schedule rises again after this update
    if optim.schedule == "triangle" and config.schedule_steps == 1:
        raise ConfigError(
            "The last update of the schedule `triangle` has the learning rate zero, so a triangle of 1 step trains nothing; "
            "set `optim.schedule constant`, or a `trainer.max_steps` or `optim.schedule_steps` of at least 2."
        )
    if not np.float32(optim.lr * factor(min(rise, max_steps) - 1)) > 0:
        raise ConfigError(
            f"`optim.lr` ({optim.lr:g}) is so small that every update's learning rate is zero in float32, so nothing would "
            "be trained; raise it, or lower `optim.warmup_steps`."
        )
