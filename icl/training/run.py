"""Train runs from their configurations to their folders, or take up where they stopped.

The same call does all of it: a new run begins, an unfinished one resumes bit-identically, a finished one says so.
Every way of ending (finished, stopped early, pre-empted by a signal, failed) is in `status.json` with its reason.

Several runs that differ in their seeds and tasks alone are trained together, as one population; one run is a population
of one, and there is no other way. Members that stand at different steps are put together as the first ones catch up;
a member that ends before the others leaves, and the rest goes on without it from the files it would resume from.
"""

import contextlib
import itertools
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from icl import tiny_attention
from icl.build import build_model, choose_device
from icl.config import MEMBER_SETTINGS, RunConfig
from icl.contents import describe_altered_rows, describe_missing, missing_steps
from icl.environment import environment_line
from icl.evaluation import EvaluationSet
from icl.metrics_file import MetricsFile, are_rows_altered, logged_steps, lost_rows, metric_columns
from icl.presets import run_name
from icl.runs import (
    DONE,
    FAILS_AGAIN,
    RunError,
    RunFolder,
    Status,
    is_child_rank,
    leaving_nothing,
    local_root,
    require_own_place,
    require_same_config,
)
from icl.stacked import Params, stack
from icl.storage import remove_temporaries
from icl.training import wandb_agent
from icl.training.callbacks import StopSignals
from icl.training.capacity import num_fitting, require_room
from icl.training.data import PromptDataModule
from icl.training.endings import isolate_failure, record_outcome, recording_failure
from icl.training.members import Member
from icl.training.module import PopulationModule
from icl.training.processes import join_processes
from icl.training.progress import member_status
from icl.training.refusals import require_learning, require_monitor
from icl.training.saving import read_resume_file
from icl.training.trainer import evaluation_sets, make_callbacks, make_trainer
from icl.training.upload import upload_behind
from icl.training.wandb_log import WandbLog, start_wandb, wandb_mode
from icl.validation import ConfigError


class TrainResult(NamedTuple):
    """How a run ended."""

    folder: RunFolder
    status: Status
    received: signal.Signals | None = None
    """What pre-empted it, if anything did."""
    was_done: bool = False
    """Whether there was nothing left to do."""
    incomplete: str | None = None
    """What a run that had ended before lacks so that it is no success: rows, or its last checkpoint; a sentence."""
    lacking: str | None = None
    """Which other checkpoints a run that had ended before lacks, and whether its rows were altered, in sentences; `icl checkpoints RUN
    verify` calls either damage."""


class NonFiniteLossError(RunError):
    """The loss of a run became NaN or infinite."""


def failure_of(status: Status) -> RunError:
    """Return the error for a run whose status says that it failed."""
    reason = status.reason or "The run failed."
    return NonFiniteLossError(reason) if FAILS_AGAIN in reason else RunError(reason)


def train(config: RunConfig, *, folder: str | Path | None = None, wandb_run: Any = None) -> TrainResult:
    """Train a run to its end, or resume it.

    Args:
        config: The run.
        folder: Its folder; left out, `$LOCAL_ROOT/<run name>`.
        wandb_run: The W&B run of a sweep's point (`icl.training.wandb_agent`), which the caller ends; left out,
            one of its own if W&B is set up.

    Raises:
        ConfigError: If the folder holds a run with other settings, or the device is absent.
        NonFiniteLossError: If the loss became NaN or infinite.
        RunError: If another process trains it, its resume file is unusable, or its place in the store is another run's.
        StorageError: If it cannot be written, or its store cannot be used; what was saved before is intact.
        UploadError: If it has ended, and files of it did not reach its store.
    """
    result = train_population([config], folders=None if folder is None else [folder], wandb_run=wandb_run)[0]
    if result.status.state == "failed":
        raise failure_of(result.status)
    for told in filter(None, (result.lacking, result.incomplete)):
        print(f"icl: {told}", file=sys.stderr)
    return result


def train_population(
    configs: Sequence[RunConfig], *, folders: Sequence[str | Path] | None = None, wandb_run: Any = None
) -> list[TrainResult]:
    """Train several runs at once, each as if alone, to their ends; resume those that had begun, leave those that are done.

    A member whose loss becomes non-finite fails alone: its status says so, and the others go on. So does one that is
    refused (its folder, settings, resume file or store cannot be used, or another process trains it), unless several
    processes train together.

    Args:
        configs: The runs, which differ in `MEMBER_SETTINGS` only.
        folders: Theirs; left out, `$LOCAL_ROOT/<run name>` each.
        wandb_run: As in `train`; for one run only.

    Raises:
        ConfigError: If the runs cannot share a population, or the device is absent.
        StorageError, UploadError: As `train`.
        UserError: Whatever `train` raises, if there is one run only or several processes train together.
    """
    require_alike(configs)
    wandb_mode()
    configs = [join_processes(config) for config in configs]
    places = folders if folders is not None else [local_root() / run_name(config) for config in configs]
    if len(set(map(str, places))) < len(places):
        raise ConfigError(f"Of the members of the population, two members are the run {max(places, key=places.count)}.")
    is_packed = len(configs) > 1
    members = [Member(c, RunFolder(place), is_packed=is_packed) for c, place in zip(configs, places, strict=True)]
    make_trainer(configs[0])  # refuses what it must before anything is written
    is_alone = not is_packed or configs[0].trainer.devices * configs[0].trainer.num_nodes > 1
    for member in members:
        with isolate_failure(member, is_alone=is_alone):
            require_monitor(member.config)
            require_own_place(member.folder)
            if not _is_done(member):
                require_learning(member.config)
                require_room(member.config, choose_device(member.config.trainer.accelerator))
    if is_child_rank():
        unfinished = [member for member in members if not _is_done(member)]
        received = _train_groups(unfinished, {member: read_resume_file(member) for member in unfinished})
        return [_result(member, received) for member in members]
    with contextlib.ExitStack() as held:
        taken: dict[Member, int | None] = {}
        for member in members:
            with isolate_failure(member, is_alone=is_alone):
                if not member.is_refused:
                    taken[member] = _take_up(member, held)
        return _train(members, taken, wandb_run, is_alone=is_alone)


def require_alike(configs: Sequence[RunConfig]) -> None:
    """Refuse runs that cannot be trained as one population.

    Raises:
        ConfigError: Naming the first setting in which they may not differ, or the name that two of them share.
    """
    first = configs[0].shared_settings()
    for config in configs[1:]:
        for key, value in config.shared_settings().items():
            if value != first[key]:
                raise ConfigError(
                    f"`{key}` differs among the members of the population ({first[key]!r} and {value!r}); they may differ "
                    f"in {', '.join(f'`{name}`' for name in MEMBER_SETTINGS)} only."
                )


def _take_up(member: Member, held: contextlib.ExitStack) -> int | None:
    """Hold a run's folder and its copy; returns the step that it goes on from, or None if it has ended before."""
    with contextlib.ExitStack() as own:
        own.enter_context(leaving_nothing(member.folder))
        own.enter_context(upload_behind(member.config, member.folder))
        is_done = _is_done(member)
        member.is_own = member.folder.config_file.exists()
        step = None if is_done else read_resume_file(member)
        _note_missing(member, step)
        held.push(own.pop_all())
    return step


def _note_missing(member: Member, step: int | None) -> None:
    """Note which checkpoints a run has lost that goes on from a step, and what it lacks if it has ended (None).

    A run is no failure for scheduled checkpoints that were removed, whether it goes on or has ended; without its last
    one, or with rows missing, a run that has ended is.
    """
    run, config = member.folder, member.config
    last = run.read_status()
    end = last if step is None else None
    reached = end.step if end is not None else step or 0
    if reached == 0:
        return
    missing = missing_steps(run, config, reached, end)
    sentence = describe_missing(run, missing) if missing else None
    if end is not None:
        member.incomplete = sentence if reached in missing else lost_rows(run, config, reached)
        told = (None if reached in missing else sentence, describe_altered_rows(run))
        member.told_lacking = " ".join(filter(None, told)) or None
    elif (
        missing and member.is_running and (reached < config.trainer.max_steps or last is None or last.state != "failed")
    ):
        member.lacking = frozenset(missing)
        member.notes.append(f"{sentence} Training goes on without them.")


def _train(
    members: Sequence[Member], taken: Mapping[Member, int | None], wandb_run: Any, *, is_alone: bool
) -> list[TrainResult]:
    done = [member for member, step in taken.items() if step is None]
    steps = {member: step for member, step in taken.items() if step is not None}
    received = None
    if done and wandb_run is not None:
        wandb_agent.replay(wandb_run, done[0].folder.metrics_file, done[0].config.trainer.max_steps)
    with recording_failure(list(steps)):
        for member, step in steps.items():
            with isolate_failure(member, is_alone=is_alone):
                _begin(member, step)
        left = [member for member in steps if not member.is_refused]
        if left:
            _announce(left, [member for member in members if member.is_refused], steps)
            for member in left:
                member.wandb = _wandb_log(member, steps[member], wandb_run)
                record_outcome(member, steps[member], None)  # one that was killed between its end and its last words
            received = _train_groups(left, steps)
    return [_result(member, received, was_done=member in done) for member in members]


def _train_groups(members: Sequence[Member], steps: Mapping[Member, int]) -> signal.Signals | None:
    """Train as many members at a time as fit on the device; returns the signal that stopped it, if one did."""
    if len(members) <= 1:
        return _train_stages(members, steps)
    kind = choose_device(members[0].config.trainer.accelerator)
    limit = num_fitting([member.config for member in members], "cpu" if kind == "tpu" else kind)
    if len(members) > limit / 10 and not is_child_rank():
        in_turn = "" if len(members) <= limit else f", so they are trained in {-(-len(members) // limit)} groups"
        print(f"About {limit:,} such members fit on this device at a time{in_turn}.")
    for group in (members[start : start + limit] for start in range(0, len(members), limit)):
        received = _train_stages(group, steps)
        if received is not None:
            for member in members:
                record_outcome(member, steps[member], received)
            return received
    return None


def _train_stages(members: Sequence[Member], steps: Mapping[Member, int]) -> signal.Signals | None:
    """Train those that are furthest behind until they reach the next, then these together, and so on to the end.

    Returns:
        The signal that stopped it, if one did.
    """
    sets = evaluation_sets([member.config for member in members])
    active: list[Member] = []
    levels = sorted({steps[member] for member in members})
    for step, until in itertools.pairwise([*levels, members[0].config.trainer.max_steps]):
        active += [member for member in members if member.is_running and steps[member] == step]
        is_behind = True
        while active and is_behind:
            step, received = _fit(active, step, until, [sets[members.index(member)] for member in active])
            for member in active:
                record_outcome(member, step, received)
            if received is not None:
                return received
            active = [member for member in active if member.is_running]
            is_behind = step < until
    return None


def _fit(
    members: Sequence[Member], step: int, until: int, sets: Sequence[Sequence[EvaluationSet]]
) -> tuple[int, signal.Signals | None]:
    """Train members that stand at one step until another, or until one of them ends, or a signal comes.

    Returns:
        The step reached, and the signal.
    """
    configs = [member.config for member in members]
    trainer = make_trainer(configs[0], members, max_steps=until)
    callbacks = make_callbacks(members, sets)
    trainer.callbacks += callbacks  # type: ignore[attr-defined]
    module = PopulationModule(members, _initial_params(configs))
    path = str(members[0].folder.resume_file) if step else None
    trainer.fit(module, datamodule=PromptDataModule(configs), ckpt_path=path, weights_only=True)
    reached = trainer.global_step
    received = next(callback.received for callback in callbacks if isinstance(callback, StopSignals))
    if received is None and reached < until and all(member.is_running for member in members):
        received = signal.SIGTERM
    return reached, received if reached < configs[0].trainer.max_steps else None


def _initial_params(configs: Sequence[RunConfig]) -> Params:
    """The parameters before training; in the precision of training, or a resumed run would be rounded as it is loaded."""
    is_double = configs[0].trainer.precision == "64-true"
    models = [build_model(config).to(torch.float64 if is_double else torch.float32) for config in configs]
    return stack([dict(model.named_parameters()) for model in models])


def _is_done(member: Member) -> bool:
    """Whether the run has ended before; a folder that holds another run is refused."""
    if not member.folder.config_file.exists():
        return False
    require_same_config(member.folder.read_config(), member.config, member.folder)
    status = member.folder.read_status()
    return status is not None and status.state in DONE


def _begin(member: Member, step: int) -> None:
    run = member.folder
    member.is_own = True
    MetricsFile(run.metrics_file, metric_columns(member.config)).require_rows(logged_steps(member.config, step))
    if step > 0 and are_rows_altered(run.metrics_file.read_bytes(), member.rows):
        member.notes.append(
            f"{run.metrics_file} was altered since step {step:,} was saved; its rows are kept as they are."
        )
    run.write_config(member.config)
    for folder in (run.path, run.checkpoints.root, run.moments.root, run.results, run.figures):
        remove_temporaries(folder)
    run.log(f"resuming from step {step}" if step else "starting")
    for note in member.notes:
        run.log(note)
    threads = str(torch.get_num_threads())
    run.log(environment_line({"attention on CPUs": tiny_attention.ON_CPUS, "threads": threads}))
    run.write_status(member_status(member, "waiting", step))


def _announce(members: Sequence[Member], refused: Sequence[Member], steps: Mapping[Member, int]) -> None:
    for member in refused:
        print(f"icl: {member.folder.path} is left out: {member.reason}", file=sys.stderr)
    if len(members) > 1:
        print(f"Training {len(members)} runs as one population:")
    for member in members:
        place = member.folder.path
        print(f"Resuming {place} from step {steps[member]:,}." if steps[member] else f"Training {place}.")
        for note in member.notes:
            print(f"icl: {note}", file=sys.stderr)


def _wandb_log(member: Member, step: int, wandb_run: Any) -> WandbLog | None:
    """The member's W&B run: the sweep's, or one of its own."""
    if wandb_run is None:
        return start_wandb(member.config, member.folder)
    wandb_agent.replay(wandb_run, member.folder.metrics_file, step)
    return WandbLog(wandb_run, is_lent=True)


def _result(member: Member, received: signal.Signals | None, *, was_done: bool = False) -> TrainResult:
    status = None if member.is_refused else member.folder.read_status()
    status = status or member_status(member, member.state, 0)
    received = received if member.state == "preempted" else None
    return TrainResult(member.folder, status, received, was_done, member.incomplete, member.told_lacking)
