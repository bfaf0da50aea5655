"""What trains a population: Lightning's Trainer, the callbacks in their order, and the prompts to evaluate on."""

import logging
import warnings
from collections.abc import Sequence

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from icl.build import build_evaluation_sets, choose_device
from icl.config import RunConfig
from icl.evaluation import EvaluationSet
from icl.runs import is_child_rank
from icl.schedules import checkpoint_steps
from icl.training.callbacks import (
    EarlyStopping,
    Ending,
    Evaluation,
    MetricsLog,
    NonFiniteGuard,
    StopSignals,
)
from icl.training.members import Member
from icl.training.presence import FilesGuard
from icl.training.processes import cluster_environment
from icl.training.progress import ProgressBar, StatusFile
from icl.training.saving import MemberFiles, ResumeFiles, ScheduledCheckpoints
from icl.training.xla import xla_options
from icl.validation import ConfigError

_MANY_TASKS = 2**16
"""Where dMMSE on the evaluation prompts takes seconds, and a person would wonder."""


def make_trainer(config: RunConfig, members: Sequence[Member] = (), *, max_steps: int | None = None) -> pl.Trainer:
    """Lightning's Trainer without callbacks of its own; it saves to and loads from the members' own files.

    Args:
        config: The settings that the members share.
        members: The runs to be trained.
        max_steps: Where to stop, if before the runs' end.

    Raises:
        ConfigError: If Lightning refuses the devices, the strategy or the precision.
    """
    settings = config.trainer
    _quieten_lightning()
    strategy: str | Strategy = settings.strategy
    if strategy == "ddp" or (settings.devices * settings.num_nodes > 1 and strategy == "auto"):
        strategy = PopulationDDP()
    elif settings.devices * settings.num_nodes > 1:
        raise ConfigError(f"`trainer.strategy` must be ddp for several processes, got {strategy}.")
    if settings.precision.startswith("16") or settings.precision == "bf16-true":
        raise ConfigError(
            f"`trainer.precision` cannot be {settings.precision}: weights and Adam's moments need float32; use bf16-mixed."
        )
    kind = choose_device(settings.accelerator)
    options = {
        "accelerator": kind,
        "devices": settings.devices,
        "num_nodes": settings.num_nodes,
        "strategy": strategy,
        "precision": settings.precision,
        "max_steps": max_steps or settings.max_steps,
        "plugins": [MemberFiles(members)],
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
    }
    if kind == "tpu":
        options |= xla_options(settings, members)
    options["plugins"] = [*options["plugins"], cluster_environment(settings)]  # type: ignore[misc]
    try:
        return pl.Trainer(**options)  # type: ignore[arg-type]
    except (ValueError, RuntimeError, MisconfigurationException) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"Lightning refuses these `trainer` settings: {reason}") from None


class PopulationDDP(DDPStrategy):
    """Processes that share every batch; the step itself takes the mean of their gradients, and the module stays bare."""

    def configure_ddp(self) -> None:
        """Nothing to wrap."""


def make_callbacks(members: Sequence[Member], sets: Sequence[Sequence[EvaluationSet]]) -> list[pl.Callback]:
    """The callbacks in the order in which they must see a step."""
    config = members[0].config
    grid, max_steps = config.checkpoints, config.trainer.max_steps
    steps = checkpoint_steps(max_steps, every=grid.every, num_log=grid.num_log, num_linear=grid.num_linear)
    guard = NonFiniteGuard(members, config.trainer.log_every)
    evaluation = Evaluation(sets, config.evaluation.every, max_steps)
    log = MetricsLog(members, evaluation, config.trainer.log_every)
    files = FilesGuard(members)
    callbacks: list[pl.Callback] = [
        files,
        guard,
        evaluation,
        EarlyStopping(members, config.early_stopping, evaluation),
        Ending(members),
        StopSignals(),
        log,
        ScheduledCheckpoints(members, steps, guard, config.early_stopping),
        ResumeFiles(members, log, guard, files, seconds=grid.resume_seconds),
        StatusFile(members, log),
        ProgressBar(log, max_steps),
    ]
    require_order(callbacks)
    return callbacks


_USES: dict[type[pl.Callback], tuple[type[pl.Callback], ...]] = {
    EarlyStopping: (Evaluation,),
    Ending: (FilesGuard, NonFiniteGuard, EarlyStopping),
    MetricsLog: (Evaluation, EarlyStopping, Ending),
    ScheduledCheckpoints: (NonFiniteGuard, EarlyStopping, Ending),
    ResumeFiles: (Ending, StopSignals, MetricsLog, ScheduledCheckpoints),
    StatusFile: (MetricsLog,),
    ProgressBar: (MetricsLog,),
}
"""The callbacks whose work at a step another one uses at the same step; so they must come before it."""


def require_order(callbacks: Sequence[pl.Callback]) -> None:
    """Check that every callback comes after those whose work it uses.

    Raises:
        RuntimeError: Naming the first two in the wrong order.
    """
    kinds = [type(callback) for callback in callbacks]
    for kind, used in _USES.items():
        for earlier in used:
            if kind in kinds and (earlier not in kinds or kinds.index(earlier) > kinds.index(kind)):
                raise RuntimeError(f"The callback {earlier.__name__} must come before {kind.__name__}.")


def evaluation_sets(configs: Sequence[RunConfig]) -> list[list[EvaluationSet]]:
    """Each member's fixed prompts with their baselines; members that differ in their training seeds alone share them.

    On rank 0 only, which alone evaluates: another rank's device is not yet chosen, and would be rank 0's.
    """
    settings = configs[0].evaluation
    if settings.every is None or is_child_rank():
        return [[] for _ in configs]
    kind = choose_device(configs[0].trainer.accelerator)
    device = "cpu" if kind == "tpu" else kind  # evaluation is small; an XLA device would compile it for every shape
    made: dict[tuple[int | float, int, int], list[EvaluationSet]] = {}
    for config in configs:
        key = (config.task.num_tasks, config.seeds.tasks, config.seeds.evaluation)
        if key not in made:
            if not config.task.is_gaussian and config.task.num_tasks > _MANY_TASKS:
                prompts = f"{2 * settings.num_prompts:,} evaluation prompts"
                print(f"Computing dMMSE over {config.task.num_tasks:,} tasks for {prompts}, once ...")
            made[key] = build_evaluation_sets(config, num_prompts=settings.num_prompts, device=device)
    return [made[config.task.num_tasks, config.seeds.tasks, config.seeds.evaluation] for config in configs]


def _quieten_lightning() -> None:
    """Leave the terminal to our own progress bar."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*`isinstance.treespec, LeafSpec.`.*")
