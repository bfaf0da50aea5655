"""Start the loggers that `trainer.loggers` names.

They receive the rows of `metrics.csv`. This file is written even without loggers.
"""

from typing import Any

from icl.config import TrainerConfig
from icl.config.validation import ConfigError
from icl.training.members import Member, RowLogger
from icl.training.tensorboard import TensorBoardLog, require_tensorboard
from icl.training.wandb import agent
from icl.training.wandb.log import WandbLog, is_disabled, start_wandb, wandb_mode


def require_loggers(settings: TrainerConfig) -> None:
    """Check that the chosen loggers can be used.

    Raises:
        ConfigError: If a package is missing, W&B is chosen but not set up, or $WANDB_MODE is not a mode of W&B.
    """
    mode = wandb_mode()
    if "tensorboard" in settings.logger_names:
        require_tensorboard()
    if "wandb" in settings.logger_names and mode is None and not is_disabled():
        raise ConfigError(
            "`trainer.loggers` contains wandb, but W&B is not set up. Run `wandb login`, or set WANDB_MODE=offline to log to the "
            "run's folder."
        )


def start_loggers(member: Member, step: int, wandb_run: Any) -> list[RowLogger]:
    """Start the loggers of a member that continues from `step`.

    Args:
        member: The member.
        step: Step from which the member continues. TensorBoard and the W&B run of a sweep first receive the earlier rows.
        wandb_run: W&B run of a sweep's point (one combination of the sweep's settings). This W&B run always receives the rows. If
            `wandb_run` is None, a W&B run is started, unless `trainer.loggers` leaves W&B out or W&B is not set up.
    """
    names = member.config.trainer.logger_names
    loggers: list[RowLogger] = []
    if wandb_run is not None:
        agent.replay(wandb_run, member.folder.metrics_file, step)
        loggers.append(WandbLog(wandb_run, is_lent=True))
    elif not names or "wandb" in names:
        log = start_wandb(member.config, member.folder)
        loggers += [] if log is None else [log]
    if "tensorboard" in names:
        loggers.append(TensorBoardLog(member.config, member.folder, step))
    return loggers
