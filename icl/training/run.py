"""Train runs from their settings, or resume them.

The same call starts a new run, resumes an unfinished run bit-identically, or reports that a run is finished. Every outcome
(finished, stopped early, pre-empted by a signal, failed) is written to `status.json` with its reason.

Runs that differ only in their seeds and tasks can be trained together, as the members of one population. A single run is a
population of one. If the members are at different steps, the members at the lowest step are trained first. When they reach the
second-lowest step, both groups are trained together. If a member ends before the others, the population is rebuilt from the resume files of
the others.
"""

import contextlib
import itertools
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from icl.build import build_model
from icl.compute.devices import choose_device
from icl.config import MEMBER_SETTINGS, RunConfig
from icl.config.validation import ConfigError
from icl.evaluation.sets import EvaluationSet
from icl.model.stacked import Params, stack
from icl.run_names import run_name
from icl.runs.folder import RunError, RunFolder, is_child_rank, local_root, require_own_place
from icl.runs.status import FAILS_AGAIN, Status
from icl.training.callbacks import StopSignals
from icl.training.capacity import num_fitting, require_room
from icl.training.data import PromptDataModule
from icl.training.endings import isolate_failure, record_outcome, recording_failure
from icl.training.loggers import require_loggers, start_loggers
from icl.training.members import Member
from icl.training.module import PopulationModule
from icl.training.opening import begin_run, has_ended, open_run
from icl.training.processes import Plan, PlanSharing, SameSteps, join_processes
from icl.training.progress import member_status
from icl.training.refusals import require_learning, require_monitor, require_own_run, require_text
from icl.training.saving import read_resume_file
from icl.training.trainer import PopulationDDP, evaluation_sets, make_callbacks, make_trainer
from icl.training.wandb import agent as wandb_agent


class TrainResult(NamedTuple):
    """Outcome of training a run."""

    folder: RunFolder
    status: Status
    received: signal.Signals | None = None
    """Signal that pre-empted the run, or None if no signal did."""
    was_done: bool = False
    """Whether the run was already finished."""
    incomplete: str | None = None
    """Message about missing rows or a missing last checkpoint of an ended run; None if nothing is missing. A run with such a message does
    not count as a success."""
    lacking: str | None = None
    """Message that says which earlier checkpoints of an ended run are missing, and whether its rows were altered. `icl checkpoints RUN verify`
    reports both as damage."""


class NonFiniteLossError(RunError):
    """Raised if the loss, the gradient, a weight or the monitored metric of a run became NaN or infinite."""


def failure_of(status: Status) -> RunError:
    """Return the error to raise for a run that has failed, from its status."""
    reason = status.reason or "The run failed."
    return NonFiniteLossError(reason) if FAILS_AGAIN in reason else RunError(reason)


def train(config: RunConfig, *, folder: str | Path | None = None, wandb_run: Any = None) -> TrainResult:
    """Train a run to its end, or resume it.

    Args:
        config: Settings of the run.
        folder: Folder of the run; None uses `$LOCAL_ROOT/<run name>`.
        wandb_run: W&B run of a sweep's point (one combination of the sweep's settings, `icl.training.wandb.agent`). The caller ends this
            W&B run. If `wandb_run` is None and W&B is set up, `train` starts a W&B run itself.

    Raises:
        ConfigError: If the folder contains a run with other settings, or the device does not exist.
        NonFiniteLossError: If the loss, the gradient, a weight or the monitored metric became NaN or infinite.
        RunError: If another process trains the run, the run's resume file is unusable, or another run uses the run's name in the store.
        StorageError: If the run cannot be written, or its store cannot be used. Earlier saves are intact.
        UploadError: If the run has ended, but some files did not reach its store.
    """
    result = train_population([config], folders=None if folder is None else [folder], wandb_run=wandb_run)[0]
    if result.status.state == "failed":
        raise failure_of(result.status)
    for sentence in filter(None, (result.lacking, result.incomplete)):
        print(f"icl: {sentence}", file=sys.stderr)
    return result


def train_population(
    configs: Sequence[RunConfig], *, folders: Sequence[str | Path] | None = None, wandb_run: Any = None
) -> list[TrainResult]:
    """Train several runs together, each to its end. Up to rounding, each run has the same results as if it were trained alone.

    Unfinished runs are resumed, and finished runs are left as they are. A member fails if its loss becomes non-finite, if
    its folder, settings, resume file or store cannot be used, or if another process trains it. The other members then continue.
    With several processes, such an error is raised instead.

    Args:
        configs: Settings of the runs, which differ only in `MEMBER_SETTINGS`.
        folders: Folders of the runs; None uses `$LOCAL_ROOT/<run name>` for each.
        wandb_run: As in `train`. It can be given only for a single run.

    Raises:
        ConfigError: If the runs cannot share a population, or the device does not exist.
        StorageError, UploadError: As in `train`.
        UserError: Any error of `train`, if there is a single run or several processes train together.
    """
    require_alike(configs)
    require_loggers(configs[0].trainer)
    configs = [join_processes(config) for config in configs]
    paths = folders if folders is not None else [local_root() / run_name(config) for config in configs]
    if len(set(map(str, paths))) < len(paths):
        raise ConfigError(
            f"Two members of the population have the same folder, {max(paths, key=paths.count)}. Give each member its own folder."
        )
    is_packed = len(configs) > 1
    members = [Member(c, RunFolder(path), is_packed=is_packed) for c, path in zip(configs, paths, strict=True)]
    trainer = make_trainer(configs[0])  # raises an error for impossible settings before anything is written
    is_shared = configs[0].trainer.num_processes > 1
    is_alone = not is_packed or is_shared
    plans = PlanSharing(trainer, is_shared=is_shared and isinstance(trainer.strategy, PopulationDDP))
    for member in members:
        with isolate_failure(member, is_alone=is_alone):
            require_own_run(member.config)
            require_monitor(member.config)
            require_own_place(member.folder)
            if not has_ended(member):
                require_learning(member.config)
                require_text(member.config)
                require_room(member.config, choose_device(member.config.trainer.accelerator))
    if is_child_rank():
        return _follow(members, plans)
    with contextlib.ExitStack() as resources:
        resources.enter_context(plans.leading(len(members)))
        first_steps: dict[Member, int | None] = {}
        for member in members:
            with isolate_failure(member, is_alone=is_alone):
                if not member.is_refused:
                    first_steps[member] = open_run(member, resources)
        return _train(members, first_steps, wandb_run, plans, is_alone=is_alone)


def require_alike(configs: Sequence[RunConfig]) -> None:
    """Check that runs can be trained as one population.

    Raises:
        ConfigError: If the runs differ in a setting that they must share; the message names it.
    """
    first = configs[0].shared_settings()
    for config in configs[1:]:
        for key, value in config.shared_settings().items():
            if value != first[key]:
                raise ConfigError(
                    f"`{key}` differs among the members of the population ({first[key]!r} and {value!r}); they may differ "
                    f"in {', '.join(f'`{name}`' for name in MEMBER_SETTINGS)} only."
                )


def _follow(members: Sequence[Member], plans: PlanSharing) -> list[TrainResult]:
    """Train the members in a process whose rank is not 0, as rank 0 has planned."""
    plan = plans.receive()
    steps = {member: read_resume_file(member) for member in members if plan is None and not has_ended(member)}
    if plan is not None:
        steps = {member: step for member, step in zip(members, plan.steps, strict=True) if step is not None}
        for member in steps:
            read_resume_file(member)
    limit = _num_at_once(list(steps)) if plan is None else plan.num_at_once
    received = _train_groups(list(steps), steps, limit)
    return [_result(member, received) for member in members]


def _train(
    members: Sequence[Member],
    first_steps: Mapping[Member, int | None],
    wandb_run: Any,
    plans: PlanSharing,
    *,
    is_alone: bool,
) -> list[TrainResult]:
    """Train the members that have not ended, each from the step at which it continues."""
    done = [member for member, step in first_steps.items() if step is None]
    steps = {member: step for member, step in first_steps.items() if step is not None}
    received = None
    if done and wandb_run is not None:
        wandb_agent.replay(wandb_run, done[0].folder.metrics_file, done[0].config.trainer.max_steps)
    with recording_failure(list(steps)):
        for member, step in steps.items():
            with isolate_failure(member, is_alone=is_alone):
                begin_run(member, step)
        unfinished = [member for member in steps if not member.is_refused]
        if unfinished:
            _announce(unfinished, [member for member in members if member.is_refused], steps)
        for member in unfinished:
            member.loggers = start_loggers(member, steps[member], wandb_run)
            # Usually, no member has ended yet, and this call records nothing. But a run that was killed after its last step has already
            # ended.
            record_outcome(member, steps[member], None)
        running = [member for member in unfinished if member.is_running]
        limit = _num_at_once(running)
        plans.share(Plan([steps[member] if member in running else None for member in members], limit))
        received = _train_groups(running, steps, limit)
    return [_result(member, received, was_done=member in done) for member in members]


def _num_at_once(members: Sequence[Member]) -> int:
    """Return how many of the members are trained at once on the device."""
    if len(members) <= 1:
        return 1
    kind = choose_device(members[0].config.trainer.accelerator)
    limit = num_fitting([member.config for member in members], "cpu" if kind == "tpu" else kind)
    if len(members) > limit / 10 and not is_child_rank():
        in_turn = "" if len(members) <= limit else f", so they are trained in {-(-len(members) // limit)} groups"
        print(f"About {limit:,} members of this size fit on this device at a time{in_turn}.")
    return limit


def _train_groups(members: Sequence[Member], steps: Mapping[Member, int], limit: int) -> signal.Signals | None:
    """Train the members in groups of up to `limit`. Return the signal that stopped training, or None if no signal did."""
    for group in (members[start : start + limit] for start in range(0, len(members), limit)):
        received = _train_stages(group, steps)
        if received is not None:
            for member in members:
                record_outcome(member, steps[member], received)
            return received
    return None


def _train_stages(members: Sequence[Member], steps: Mapping[Member, int]) -> signal.Signals | None:
    """Train the members at the lowest step until they reach the second-lowest step. Then train both groups together, and so on to the end.

    Returns:
        The signal that stopped training, or None if training was not stopped.
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
    """Train members from `step` until they reach the step `until`, one of them ends, or a signal arrives.

    Returns:
        The step reached, and the signal that stopped training. The signal is None if none arrived, or if training is complete.
    """
    configs = [member.config for member in members]
    trainer = make_trainer(configs[0], members, max_steps=until)
    callbacks = make_callbacks(members, sets)
    trainer.callbacks += [SameSteps([member.folder.path.name for member in members], step, until), *callbacks]  # type: ignore[attr-defined]
    module = PopulationModule(members, _initial_params(configs))
    path = str(members[0].folder.resume_file) if step else None
    trainer.fit(module, datamodule=PromptDataModule(configs), ckpt_path=path, weights_only=True)
    reached = trainer.global_step
    received = next(callback.received for callback in callbacks if isinstance(callback, StopSignals))
    if received is None and reached < until and all(member.is_running for member in members):
        received = signal.SIGTERM
    return reached, received if reached < configs[0].trainer.max_steps else None


def _initial_params(configs: Sequence[RunConfig]) -> Params:
    """Return the parameters before training.

    They have the dtype that training uses, so that numbers from a resume file are not rounded when they are loaded.
    """
    is_double = configs[0].trainer.precision in ("64-true", "64")  # Lightning accepts both
    models = [build_model(config).to(torch.float64 if is_double else torch.float32) for config in configs]
    return stack([dict(model.named_parameters()) for model in models])


def _announce(members: Sequence[Member], refused: Sequence[Member], steps: Mapping[Member, int]) -> None:
    for member in refused:
        print(f"icl: {member.folder.path} is left out: {member.reason}", file=sys.stderr)
    if len(members) > 1:
        print(f"Training {len(members)} runs as one population:")
    for member in members:
        path = member.folder.path
        print(f"Resuming {path} from step {steps[member]:,}." if steps[member] else f"Training {path}.")
        for note in member.notes:
            print(f"icl: {note}", file=sys.stderr)


def _result(member: Member, received: signal.Signals | None, *, was_done: bool = False) -> TrainResult:
    status = None if member.is_refused else member.folder.read_status()
    status = status or member_status(member, member.state, 0)
    received = received if member.state == "preempted" else None
    return TrainResult(member.folder, status, received, was_done, member.incomplete, member.told_lacking)
