"""Train one run from its configuration to its folder, or take up where it stopped.

The same call does all of it: a new run begins, an unfinished one resumes bit-identically, a finished one says so.
Every way of ending (finished, stopped early, pre-empted by a signal, failed) is in `status.json` with its reason.
"""

import logging
import signal
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from icl import population
from icl.build import build_evaluation_sets, build_model, choose_device
from icl.config import ConfigError, RunConfig
from icl.presets import run_name
from icl.runs import DONE, RunError, RunFolder, State, Status, is_child_rank, local_root, require_same_config
from icl.schedules import checkpoint_steps
from icl.storage import remove_temporaries
from icl.training import wandb_agent
from icl.training.callbacks import (
    EarlyStopping,
    Evaluation,
    Member,
    MetricsLog,
    NonFiniteGuard,
    StopSignals,
    metric_columns,
)
from icl.training.data import PromptDataModule
from icl.training.module import PopulationModule
from icl.training.progress import ProgressBar, StatusFile
from icl.training.saving import ResumeFile, ScheduledCheckpoints, read_resume_step
from icl.training.upload import upload_behind
from icl.training.wandb_log import WandbLog, start_wandb

_MANY_TASKS = 2**16
"""Where dMMSE on the evaluation prompts takes seconds, and a person would wonder."""


class TrainResult(NamedTuple):
    """How a run ended."""

    folder: RunFolder
    status: Status
    received: signal.Signals | None = None
    """What pre-empted it, if anything did."""
    was_done: bool = False
    """Whether there was nothing left to do."""


def train(config: RunConfig, *, folder: str | Path | None = None, wandb_run: Any = None) -> TrainResult:
    """Train a run to its end, or resume it.

    Args:
        config: The run.
        folder: Its folder; left out, `$LOCAL_ROOT/<run name>`.
        wandb_run: The W&B run of a sweep's point (`icl.training.wandb_agent`); left out, one of its own if W&B is set up.

    Raises:
        ConfigError: If the folder holds a run with other settings, or the device is absent.
        RunError: If another process trains it, its resume file is unusable, the loss became non-finite, or its place
            in the store is another run's.
        StorageError: If it cannot be written, or its store cannot be used; what was saved before is intact.
        UploadError: If it has ended, and files of it did not reach its store.
    """
    run = RunFolder(folder if folder is not None else local_root() / run_name(config))
    _quieten_lightning()
    trainer = make_trainer(config)  # refuses what it must before anything is written
    require_monitor(config)
    if is_child_rank():
        return TrainResult(run, *_fit(config, run, trainer, read_resume_step(run, config)))
    with run.lock(), upload_behind(config, run):
        return _train(config, run, trainer, wandb_run)


def _train(config: RunConfig, run: RunFolder, trainer: pl.Trainer, wandb_run: Any) -> TrainResult:
    if run.config_file.exists():
        require_same_config(run.read_config(), config, run)
        status = run.read_status()
        if status is not None and status.state in DONE:
            if wandb_run is not None:
                wandb_agent.replay(wandb_run, run.metrics_file, status.step)
                WandbLog(wandb_run).finish(0)
            return TrainResult(run, status, was_done=True)
    resume_step = read_resume_step(run, config)
    run.write_config(config)
    for folder in (run.path, run.checkpoints.root, run.results, run.figures):
        remove_temporaries(folder)
    started = time.monotonic()
    run.log(f"resuming from step {resume_step}" if resume_step else "starting")
    print(f"Resuming {run.path} from step {resume_step:,}." if resume_step else f"Training {run.path}.")
    run.write_status(Status(state="waiting", step=resume_step, max_steps=config.trainer.max_steps))
    try:
        status, received = _fit(config, run, trainer, resume_step, wandb_run)
    except SystemExit as stop:  # Lightning's answer to a second Ctrl-C
        _record_failure(run, KeyboardInterrupt())
        raise KeyboardInterrupt from stop
    except BaseException as error:
        _record_failure(run, error)
        if isinstance(error, RuntimeError) and "memory" in str(error).lower():
            sizes = "`model`, `trainer.batch_size` or `evaluation.num_prompts`"
            raise RunError(f"The device has not enough memory for this run; make {sizes} smaller.") from None
        raise
    run.write_status(status)
    run.log(f"{status.state} at step {status.step} after {time.monotonic() - started:.1f} s. {status.reason or ''}")
    return TrainResult(run, status, received)


def _fit(
    config: RunConfig, run: RunFolder, trainer: pl.Trainer, resume_step: int, wandb_run: Any = None
) -> tuple[Status, signal.Signals | None]:
    callbacks = make_callbacks([Member(config, run)])
    trainer.callbacks += callbacks  # type: ignore[attr-defined]
    if wandb_run is not None:
        wandb_agent.replay(wandb_run, run.metrics_file, resume_step)
    wandb_log = WandbLog(wandb_run) if wandb_run is not None else None if is_child_rank() else start_wandb(config, run)
    if wandb_log is not None:
        next(callback for callback in callbacks if isinstance(callback, MetricsLog)).sinks.append(wandb_log.log)
    try:
        ended = _fit_from(resume_step, config, run, trainer, callbacks)
    except BaseException:
        if wandb_log is not None:
            wandb_log.finish(1)
        raise
    if wandb_log is not None:
        wandb_log.finish(0 if ended[1] is None else 128 + ended[1])
    return ended


def _fit_from(
    resume_step: int, config: RunConfig, run: RunFolder, trainer: pl.Trainer, callbacks: list[pl.Callback]
) -> tuple[Status, signal.Signals | None]:
    """Train to the end; the status to end with, and the signal that stopped it."""
    module = PopulationModule([config], population.stack([dict(build_model(config).named_parameters())]))
    path = str(run.resume_file) if resume_step else None
    trainer.fit(module, datamodule=PromptDataModule([config]), ckpt_path=path, weights_only=True)
    stopping = next(callback for callback in callbacks if isinstance(callback, EarlyStopping))
    received = next(callback.received for callback in callbacks if isinstance(callback, StopSignals))
    last = run.read_status() or Status(state="running")
    step = trainer.global_step
    state: State = "finished"
    reason = None
    if stopping.reason is not None:
        state, reason = "stopped_early", stopping.reason
    elif step < config.trainer.max_steps:
        state, reason = "preempted", f"{received.name if received else 'a signal'} at step {step}"
    losses = next(callback.loss for callback in callbacks if isinstance(callback, MetricsLog))
    done = replace(
        last,
        state=state,
        reason=reason,
        step=step,
        max_steps=trainer.max_steps,
        loss=losses[0] if losses else None,
        best_step=stopping.best_step,
    )
    return done, received if state == "preempted" else None


def make_callbacks(members: Sequence[Member]) -> list[pl.Callback]:
    """The callbacks in the order in which they must see a step."""
    config = members[0].config
    if not config.task.is_gaussian and config.task.num_tasks > _MANY_TASKS and config.evaluation.every is not None:
        prompts = 2 * config.evaluation.num_prompts
        print(f"Computing dMMSE over {config.task.num_tasks:,} tasks for {prompts:,} evaluation prompts, once ...")
    kind = choose_device(config.trainer.accelerator)
    device = "cpu" if kind == "tpu" else kind  # evaluation is small; an XLA device would compile it for every shape
    every = config.evaluation.every
    sets = [
        build_evaluation_sets(member.config, num_prompts=config.evaluation.num_prompts, device=device)
        for member in members
        if every is not None
    ]
    guard = NonFiniteGuard(config.trainer.log_every)
    evaluation = Evaluation(sets, every)
    stopping = EarlyStopping(config.early_stopping, evaluation)
    log = MetricsLog(members, evaluation, stopping, config.trainer.log_every)
    grid = config.checkpoints
    steps = checkpoint_steps(
        config.trainer.max_steps, every=grid.every, num_log=grid.num_log, num_linear=grid.num_linear
    )
    return [
        guard,
        evaluation,
        stopping,
        StopSignals(),
        log,
        ScheduledCheckpoints(members, steps, guard, stopping),
        ResumeFile(members[0].folder, log, guard, seconds=grid.resume_seconds),
        StatusFile(members, log, stopping),
        ProgressBar(log),
    ]


def make_trainer(config: RunConfig) -> pl.Trainer:
    """Lightning's Trainer without callbacks of its own.

    Raises:
        ConfigError: If Lightning refuses the devices, the strategy or the precision.
    """
    settings = config.trainer
    strategy: str | Strategy = settings.strategy
    if settings.devices * settings.num_nodes > 1 and strategy in ("auto", "ddp"):
        strategy = DDPStrategy(broadcast_buffers=False)  # ours are already the same on every rank
    options = {
        "accelerator": choose_device(settings.accelerator),
        "devices": settings.devices,
        "num_nodes": settings.num_nodes,
        "strategy": strategy,
        "precision": settings.precision,
        "max_steps": settings.max_steps,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
    }
    try:
        return pl.Trainer(**options)  # type: ignore[arg-type]
    except (ValueError, RuntimeError, MisconfigurationException) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"Lightning refuses these `trainer` settings: {reason}") from None


def require_monitor(config: RunConfig) -> None:
    """Refuse a patience for a metric that the run does not log.

    Raises:
        ConfigError: Naming the metrics that it does.
    """
    metrics = [column for column in metric_columns(config) if column.startswith("eval/")]
    monitor = config.early_stopping.monitor
    if config.evaluation.every is not None and monitor not in metrics:
        raise ConfigError(f"`early_stopping.monitor` is `{monitor}`, but the metrics are {', '.join(metrics)}.")


def _record_failure(run: RunFolder, error: BaseException) -> None:
    """Say in `status.json` that the run failed, where the disk still allows it."""
    last = run.read_status() or Status(state="failed")
    reason = (str(error) or type(error).__name__).splitlines()[0]
    was_interrupted = isinstance(error, KeyboardInterrupt)
    state: State = "preempted" if was_interrupted else "failed"
    reason = "interrupted" if was_interrupted else reason
    try:
        run.write_status(replace(last, state=state, reason=reason))
        run.log(f"{state}: {reason}")
    except OSError:
        return


def _quieten_lightning() -> None:
    """Leave the terminal to our own progress bar."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*`isinstance.treespec, LeafSpec.`.*")
