"""Callbacks of training: each callback decides when something happens, and calls a function that does it.

A member is one of the runs that train together as a population. The callbacks run in the order of `trainer.make_callbacks`. All
contents of a row or checkpoint are computed before the row or checkpoint is written. The resume file is written after the rows and the
checkpoints, so it never contains a step whose row or checkpoint is missing.
"""

import contextlib
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl

from icl.config import EarlyStoppingConfig
from icl.evaluation.scores import summarise
from icl.evaluation.sets import EvaluationSet
from icl.resolve import POINT_VARIABLE
from icl.runs.metrics_file import MetricsFile, logged_steps, metric_columns
from icl.runs.status import FAILS_AGAIN
from icl.signals import handling
from icl.training.members import Member
from icl.training.module import PopulationModule
from icl.training.wandb.agent import PARENT_PROCESS, in_sweep

Metrics = dict[str, float | int]

_ECHO_SECONDS = 1.0
"""Two signals within this number of seconds count as one. On Ctrl-C the terminal signals this program and its W&B agent, and the agent then
signals this program again. If `icl sweep` started this program, all signals count as one, whenever they arrive. The reason is that Slurm
signals both this program and `icl sweep`, and `icl sweep` then signals this program again, perhaps seconds later. To end this program at
once, `icl sweep` uses SIGKILL."""


class NonFiniteGuard(pl.Callback):
    """End a member whose loss, gradient or weights are no longer finite. The other members continue.

    The losses and gradients are checked only once in `every` steps, because a check waits for the device. The weights are checked only
    before they are evaluated or saved, and at the last step.
    """

    def __init__(self, members: Sequence[Member], every: int) -> None:
        self.members, self.every = members, every

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        """Check the losses and gradients once in `every` steps. At the last step, check the weights too."""
        if trainer.global_step == trainer.max_steps:
            self.check(module)
        elif trainer.global_step % self.every == 0:
            _end_bad_members(self.members, module)

    def check(self, module: PopulationModule) -> None:
        """Check the losses, gradients and weights now. Every callback that saves something calls this method first."""
        module.check_weights()
        _end_bad_members(self.members, module)


class Evaluation(pl.Callback):
    """Evaluate on fixed prompts at step 0, then once in `every` steps, and at the last step.

    Args:
        sets_at: Function that takes a step and returns the evaluation sets of every member at this step.
        every: Number of steps between evaluations; None means no evaluation.
        max_steps: Last step of training.
    """

    def __init__(
        self, sets_at: Callable[[int], Sequence[Sequence[EvaluationSet]]], every: int | None, max_steps: int
    ) -> None:
        self.sets_at, self.every, self.max_steps = sets_at, every, max_steps
        self.step = -1
        self.metrics: list[Metrics] = []

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Evaluate the initial model."""
        if trainer.global_step == 0 and self.every is not None:
            self._evaluate(trainer, module)

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        """Evaluate once in `every` steps, and at the last step."""
        step = trainer.global_step
        if self.every is not None and (step % self.every == 0 or step == self.max_steps):
            self._evaluate(trainer, module)

    def latest(self, step: int) -> list[Metrics] | None:
        """Return the metrics of every member at `step`, or None if this step was not evaluated."""
        return self.metrics if self.step == step else None

    def _evaluate(self, trainer: pl.Trainer, module: PopulationModule) -> None:
        if trainer.is_global_zero:
            sets = self.sets_at(trainer.global_step)
            device = sets[0][0].prompts.xs.device
            params = {name: tensor.detach().to(device) for name, tensor in module.params.items()}
            self.metrics = summarise(module.predict, params, sets, nll=module.nll)
        self.metrics = trainer.strategy.broadcast(self.metrics)
        self.step = trainer.global_step


class EarlyStopping(pl.Callback):
    """Record each member's best value of the monitored metric, and end each member whose metric no longer falls.

    If a member's loss, gradient, weights or metric are no longer finite, the member ends as failed, not as stopped early.
    """

    def __init__(self, members: Sequence[Member], settings: EarlyStoppingConfig, evaluation: Evaluation) -> None:
        self.members, self.settings, self.evaluation = members, settings, evaluation

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Check the initial model."""
        self._check(trainer.global_step, module)

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        """Check the members if this step was evaluated."""
        self._check(trainer.global_step, module)

    def _check(self, step: int, module: PopulationModule) -> None:
        metrics = self.evaluation.latest(step)
        if metrics is None:
            return
        module.check_weights()
        _end_bad_members(self.members, module)
        for index, member in enumerate(self.members):
            if member.is_running:
                self._check_member(member, metrics[index][self.settings.monitor], step)

    def _check_member(self, member: Member, value: float, step: int) -> None:
        if not math.isfinite(value):
            member.end("failed", step, _describe_bad_step(step, f"`{self.settings.monitor}`"))
            return
        if value < member.best - self.settings.min_delta:
            member.best, member.best_step, member.num_checks = value, step, 0
            return
        member.num_checks += 1
        if self.settings.patience is not None and member.num_checks >= self.settings.patience:
            reason = (
                f"{self.settings.monitor} has not fallen by more than {self.settings.min_delta:g} in "
                f"{member.num_checks} evaluations; its best value is {member.best:.4g} at step {member.best_step}"
            )
            member.end("stopped_early", step, reason)


class Ending(pl.Callback):
    """Stop Lightning's `fit` as soon as one member has ended. Training then continues in a new `fit`.

    `icl.training.run` starts the new `fit`, with the members that have not ended. With several processes, `fit` stops
    only when all members have ended.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = members

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Check the members before the first step."""
        self._check(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Check the members after every step."""
        self._check(trainer)

    def _check(self, trainer: pl.Trainer) -> None:
        quorum = any if trainer.world_size == 1 else all
        if quorum(not member.is_running for member in self.members):
            trainer.should_stop = True


class StopSignals(pl.Callback):
    """On SIGINT or SIGTERM, end training after the current step, with everything saved. A second signal ends training at once.

    Training also ends after the current step if the W&B agent that started the program has died, because after that nobody else would end
    the program.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._received_at = 0.0
        self._agent = PARENT_PROCESS if in_sweep() else None
        self._handling = contextlib.ExitStack()

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Install our signal handlers in place of Lightning's."""
        self._handling.enter_context(handling(dict.fromkeys((signal.SIGINT, signal.SIGTERM), self._receive)))

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Stop all processes if one of them has received a signal."""
        if self._agent is not None and os.getppid() != self._agent and self.received is None:
            print("\nThe W&B agent has ended: saving after this step, then stopping.", file=sys.stderr)
            self.received = signal.SIGTERM
        if any_rank(trainer, self.received is not None):
            trainer.should_stop = True
            self.received = self.received or signal.SIGTERM

    def on_train_end(self, *_: Any) -> None:
        """Restore the signal handlers that were in use before training."""
        self._handling.close()

    on_exception = on_train_end  # type: ignore[assignment]  # Lightning also passes the exception

    def _receive(self, number: int, frame: Any) -> None:
        if self.received is None:
            self.received, self._received_at = signal.Signals(number), time.monotonic()
            print(f"\n{self.received.name}: saving after this step; send it again to stop at once.", file=sys.stderr)
        elif POINT_VARIABLE not in os.environ and time.monotonic() - self._received_at > _ECHO_SECONDS:
            self._handling.close()
            signal.raise_signal(number)


class MetricsLog(pl.Callback):
    """Write a row of each member's `metrics.csv` at every logged or evaluated step."""

    def __init__(self, members: Sequence[Member], evaluation: Evaluation, every: int) -> None:
        self.members, self.evaluation, self.every = members, evaluation, every
        self.files: list[MetricsFile] = []

    @property
    def loss(self) -> float | None:
        """Mean of the running members' latest training losses in `metrics.csv`; None if no running member has one yet."""
        losses = [member.loss for member in self.members if member.is_running and member.loss is not None]
        return sum(losses) / len(losses) if losses else None

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Create the files, or remove the rows after the step from which training resumes."""
        if trainer.is_global_zero:
            for member in self.members:
                self.files.append(MetricsFile(member.folder.metrics_file, metric_columns(member.config)))
                steps = logged_steps(member.config, trainer.global_step)
                self.files[-1].begin(steps, known={"lr": partial(_rate, module)})
        if trainer.global_step == 0:
            self._write(trainer, module)

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        """Write a row if the step is logged or evaluated."""
        self._write(trainer, module)

    def _write(self, trainer: pl.Trainer, module: PopulationModule) -> None:
        """Write the rows of this step.

        The rows of a logged step contain mean losses, so the host waits for the device. At other steps, the host does not wait.
        """
        step = trainer.global_step
        evaluated = self.evaluation.latest(step)
        is_logged = step > 0 and step % self.every == 0
        recorded = [index for index, member in enumerate(self.members) if member.records(step)]
        logged = [index for index in recorded if is_logged or (step > 0 and self.members[index].is_last(step))]
        if not logged and evaluated is None:
            return
        means = dict(zip(logged, zip(*module.take_means(logged), strict=True), strict=True)) if logged else {}
        for index in recorded:
            row: dict[str, float | int | None] = {"step": step, "lr": _rate(module, step)}
            if index in means:
                self.members[index].loss, row["clipped_fraction"] = means[index]
                row[module.config.model.train_metric] = means[index][0]
            row |= evaluated[index] if evaluated else {}
            if index in means or evaluated:
                self._append(index, row)

    def _append(self, index: int, row: Mapping[str, float | int | None]) -> None:
        if self.files:
            file = self.files[index]
            file.append(row)
            for logger in self.members[index].loggers:
                logger.log({key: value for key, value in row.items() if key in file.columns and value is not None})


def any_rank(trainer: pl.Trainer, flag: bool) -> bool:
    """Return whether the flag is true in at least one process. Every process must call this function."""
    return flag if trainer.world_size == 1 else trainer.strategy.reduce_boolean_decision(flag, all=False)


def _rate(module: PopulationModule, step: int) -> float | None:
    """Return the learning rate of the update that led to this step, or None for step 0."""
    return module.rate(step) if step > 0 else None


def _end_bad_members(members: Sequence[Member], module: PopulationModule) -> None:
    """End every running member for which the module has recorded a bad step. This waits for the device."""
    for member, step in zip(members, module.first_bad_step.tolist(), strict=True):
        if step >= 0 and member.is_running:
            member.end("failed", step, _describe_bad_step(step))


def _describe_bad_step(step: int, quantity: str = "The loss, the gradient or a weight") -> str:
    return (
        f"{quantity} became NaN or infinite at step {step}. Earlier saves are intact; {FAILS_AGAIN}, so "
        "try a lower `optim.lr`, `optim.grad_clip 1`, or precision 32-true, under a new run_name."
    )
