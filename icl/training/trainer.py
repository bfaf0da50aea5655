"""Build what training a population needs: Lightning's Trainer, the callbacks in order, and the evaluation sets.

A population consists of runs that train together. These runs are called its members.
"""

import logging
import warnings
from collections.abc import Sequence
from functools import partial
from typing import TypeAlias

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from icl.build import build_evaluation_sets
from icl.compute.devices import choose_device
from icl.config import RunConfig, TaskConfig
from icl.config.validation import ConfigError
from icl.evaluation.sets import MONITOR, EvaluationSet
from icl.runs.contents import expected_steps
from icl.runs.folder import is_child_rank
from icl.tasks.priors import task_sequence
from icl.training.callbacks import EarlyStopping, Ending, Evaluation, MetricsLog, NonFiniteGuard, StopSignals
from icl.training.members import Member
from icl.training.presence import FilesGuard
from icl.training.processes import cluster_environment
from icl.training.progress import ProgressBar, StatusFile
from icl.training.saving import MemberFiles, ResumeFiles, ScheduledCheckpoints
from icl.training.xla import xla_options

_SetsKey: TypeAlias = tuple[TaskConfig, int | str, int]
"""Settings in which members may differ and on which their evaluation sets depend."""
_MANY_TASKS = 2**16
"""With more than this number of tasks, computing dMMSE on the evaluation prompts takes seconds. So we print a message first."""


def make_trainer(config: RunConfig, members: Sequence[Member] = (), *, max_steps: int | None = None) -> pl.Trainer:
    """Build Lightning's Trainer, without Lightning's callbacks.

    The Trainer saves to each member's files, and loads from these files.

    Args:
        config: Settings that the members share.
        members: Runs to train.
        max_steps: Step at which to stop; None means the last step of the runs.

    Raises:
        ConfigError: If `icl` or Lightning refuses the devices, the strategy or the precision.
    """
    settings = config.trainer
    _quieten_lightning()
    strategy: str | Strategy = settings.strategy
    if strategy == "ddp" or (settings.num_processes > 1 and strategy == "auto"):
        strategy = PopulationDDP()
    elif settings.num_processes > 1:
        raise ConfigError(f"`trainer.strategy` must be ddp for several processes, got {strategy}.")
    if settings.precision.startswith("16") or settings.precision == "bf16-true":
        raise ConfigError(
            f"`trainer.precision` cannot be {settings.precision}, because weights and Adam's moments need float32. Use bf16-mixed."
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
        # In a job of Slurm, Lightning looks in this folder for a checkpoint that it saved before the job was requeued. Without this
        # setting, it would look in the working folder.
        "default_root_dir": str(members[0].folder.path) if members else None,
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
    """Lightning strategy for several processes. Each process takes a part of every batch.

    The step itself averages the gradients (`PopulationModule._average`).
    """

    def configure_ddp(self) -> None:
        """Do not wrap the module in `DistributedDataParallel`."""


def make_callbacks(members: Sequence[Member], sets: Sequence[Sequence[EvaluationSet]]) -> list[pl.Callback]:
    """Return the callbacks in the order in which they must see a step."""
    config = members[0].config
    max_steps = config.trainer.max_steps
    guard = NonFiniteGuard(members, config.trainer.log_every)
    sets_of_step = partial(sets_at, [member.config for member in members], sets)
    evaluation = Evaluation(sets_of_step, config.evaluation.every, max_steps)
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
        ScheduledCheckpoints(members, expected_steps(config, max_steps), guard, config.early_stopping),
        ResumeFiles(members, log, guard, files, seconds=config.checkpoints.resume_seconds),
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
"""The callbacks whose results a callback uses at the same step, for each type of callback. The used callbacks must run first."""


def require_order(callbacks: Sequence[pl.Callback]) -> None:
    """Check that every callback comes after the callbacks whose results it uses.

    Raises:
        RuntimeError: If two callbacks are in the wrong order; the message names them.
    """
    kinds = [type(callback) for callback in callbacks]
    for kind, used in _USES.items():
        for earlier in used:
            if kind in kinds and (earlier not in kinds or kinds.index(earlier) > kinds.index(kind)):
                raise RuntimeError(f"The callback {earlier.__name__} must come before {kind.__name__}.")


def evaluation_sets(configs: Sequence[RunConfig]) -> list[list[EvaluationSet]]:
    """Return the fixed prompts of every member, with the baselines' predictions. Members that differ only in training seeds share the same sets.

    Only rank 0 evaluates, so other ranks receive empty lists. Sets of other ranks would need memory on the device of rank 0, because
    these ranks have not chosen their own devices yet.
    """
    settings = configs[0].evaluation
    if settings.every is None or is_child_rank():
        return [[] for _ in configs]
    kind = choose_device(configs[0].trainer.accelerator)
    # An XLA device would compile this small computation again for every shape.
    device = "cpu" if kind == "tpu" else kind
    by_key: dict[_SetsKey, list[EvaluationSet]] = {}
    by_member = []
    for config in configs:
        key = _sets_key(config)
        if key not in by_key:
            if not config.model.is_language and not config.task.is_gaussian and config.task.num_tasks > _MANY_TASKS:
                prompts = f"{2 * settings.num_prompts:,} evaluation prompts"
                print(f"Computing dMMSE once, over {config.task.num_tasks:,} tasks for {prompts} ...")
            number = settings.num_prompts
            by_key[key] = build_evaluation_sets(config, num_prompts=number, step=MONITOR, model_step=0, device=device)
        by_member.append(by_key[key])
    return by_member


def sets_at(
    configs: Sequence[RunConfig], sets: Sequence[Sequence[EvaluationSet]], step: int
) -> Sequence[Sequence[EvaluationSet]]:
    """Return the evaluation sets of every member at a step.

    If a member's pool of tasks changes during training, its sets use the pool of this step. All other members have the sets of
    `evaluation_sets`.
    """
    if not sets or not any(config.task.has_moving_pool for config in configs):
        return sets
    device = sets[0][0].prompts.xs.device
    number = configs[0].evaluation.num_prompts
    make = partial(build_evaluation_sets, num_prompts=number, step=MONITOR, model_step=step, device=device)
    made: dict[_SetsKey, Sequence[EvaluationSet]] = {}
    for config, own_sets in zip(configs, sets, strict=True):
        key = _sets_key(config)
        if key not in made:
            made[key] = make(config) if config.task.has_moving_pool else own_sets
    return [made[_sets_key(config)] for config in configs]


def _sets_key(config: RunConfig) -> _SetsKey:
    return config.task, task_sequence(config), config.seeds.evaluation


def _quieten_lightning() -> None:
    """Silence Lightning's messages, which would disturb our progress bar."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*`isinstance.treespec, LeafSpec.`.*")
    warnings.filterwarnings("ignore", message="The `srun` command is available")
