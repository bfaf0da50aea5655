"""Small callbacks: each decides when, and calls a function that decides what.

They run in the order of `run.make_callbacks`: what a step's row or checkpoint needs is ready before it is written, and
the resume file follows, so it never knows of a step that the other files do not have.
"""

import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import lightning.pytorch as pl

from icl.config import EarlyStoppingConfig, RunConfig
from icl.evaluation import EvaluationSet, summarise
from icl.runs import RunError, RunFolder
from icl.training.metrics_file import MetricsFile
from icl.training.module import PopulationModule
from icl.training.wandb_agent import in_sweep

Metrics = dict[str, float]


class Member(NamedTuple):
    """One run of a population: its settings and its folder."""

    config: RunConfig
    folder: RunFolder


class NonFiniteLossError(RunError):
    """The loss of a member became NaN or infinite."""


class NonFiniteGuard(pl.Callback):
    """Stops a run whose loss is no longer finite; the step itself never waits for the answer."""

    def __init__(self, every: int) -> None:
        self.every = every

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        """Look at the device's record every `every` steps."""
        if trainer.global_step % self.every == 0 or trainer.global_step == trainer.max_steps:
            self.check(module)

    def check(self, module: PopulationModule) -> None:
        """Look now; whoever saves something calls this first.

        Raises:
            NonFiniteLossError: Naming the first bad step.
        """
        step = int(module.first_bad_step.max())
        if step >= 0:
            raise NonFiniteLossError(
                f"The loss became NaN or infinite at step {step}. What was saved before is good; the same settings "
                "would fail again, so try a lower `optim.lr`, `optim.grad_clip 1`, or precision 32-true, under a new run_name."
            )


class Evaluation(pl.Callback):
    """Evaluates on fixed prompts at step 0, every `every` steps and the last step."""

    def __init__(self, sets: Sequence[Sequence[EvaluationSet]], every: int | None) -> None:
        self.sets, self.every = sets, every
        self.step = -1
        self.metrics: list[Metrics] = []

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """The initial model."""
        if trainer.global_step == 0 and self.every is not None:
            self._evaluate(trainer, module)

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        """Every so many steps, and at the end."""
        step = trainer.global_step
        if self.every is not None and (step % self.every == 0 or step == trainer.max_steps):
            self._evaluate(trainer, module)

    def latest(self, step: int) -> list[Metrics] | None:
        """Each member's metrics if this step was evaluated."""
        return self.metrics if self.step == step else None

    def _evaluate(self, trainer: pl.Trainer, module: PopulationModule) -> None:
        if trainer.is_global_zero:
            device = self.sets[0][0].prompts.xs.device
            params = {name: tensor.detach().to(device) for name, tensor in module.params.items()}
            self.metrics = summarise(module.predict, params, self.sets)
        self.metrics = trainer.strategy.broadcast(self.metrics)
        self.step = trainer.global_step


class EarlyStopping(pl.Callback):
    """Notes the best evaluation of the monitored metric, and stops when it no longer falls."""

    def __init__(self, settings: EarlyStoppingConfig, evaluation: Evaluation) -> None:
        self.settings, self.evaluation = settings, evaluation
        self.best = math.inf
        self.best_step: int | None = None
        self.num_checks = 0
        self.reason: str | None = None

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Count the initial model as the first check; a run that had stopped stays stopped."""
        trainer.should_stop = self.reason is not None
        self._check(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Check where there is a new evaluation."""
        self._check(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Best value, its step, checks since, and why training stopped."""
        return {
            "best": self.best,
            "best_step": self.best_step,
            "num_checks": self.num_checks,
            "reason": self.reason,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the count."""
        self.best, self.best_step = state_dict["best"], state_dict["best_step"]
        self.num_checks, self.reason = state_dict["num_checks"], state_dict["reason"]

    def _check(self, trainer: pl.Trainer) -> None:
        metrics = self.evaluation.latest(trainer.global_step)
        if metrics is None:
            return
        name = self.settings.monitor
        value = metrics[0][name]
        if value < self.best - self.settings.min_delta:
            self.best, self.best_step, self.num_checks = value, trainer.global_step, 0
            return
        self.num_checks += 1
        if self.settings.patience is not None and self.num_checks >= self.settings.patience:
            self.reason = (
                f"{name} has not fallen by more than {self.settings.min_delta:g} in {self.num_checks} evaluations; "
                f"best {self.best:.4g} at step {self.best_step}"
            )
            trainer.should_stop = True


class StopSignals(pl.Callback):
    """SIGINT and SIGTERM end training after the step in hand, with everything saved; a second one ends it at once.

    So does the death of the W&B agent that started the program: nobody else would end an orphan.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._agent = os.getppid() if in_sweep() else None
        self._previous: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Listen, in place of Lightning's own handlers; only the main thread may."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._receive)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Stop all ranks if any was told to."""
        if self._agent is not None and os.getppid() != self._agent and self.received is None:
            print("\nThe W&B agent is gone: saving after this step.", file=sys.stderr)
            self.received = signal.SIGTERM
        if any_rank(trainer, self.received is not None):
            trainer.should_stop = True
            self.received = self.received or signal.SIGTERM

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        """Give the signals back."""
        self._restore()

    def on_exception(self, trainer: pl.Trainer, module: Any, exception: BaseException) -> None:
        """Give the signals back."""
        self._restore()

    def _receive(self, number: int, frame: Any) -> None:
        self.received = signal.Signals(number)
        signal.signal(number, self._previous[self.received])
        print(f"\n{self.received.name}: saving after this step; send it again to stop at once.", file=sys.stderr)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


class MetricsLog(pl.Callback):
    """Writes a row of `metrics.csv` at every logged or evaluated step."""

    def __init__(self, members: Sequence[Member], evaluation: Evaluation, stopping: EarlyStopping, every: int) -> None:
        self.members, self.evaluation, self.stopping, self.every = members, evaluation, stopping, every
        self.files: list[MetricsFile] = []
        self.loss: list[float] | None = None
        self.sinks: list[Callable[[Metrics], None]] = []

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Begin the files, or cut them back to the step that training resumes from."""
        if trainer.is_global_zero:
            step = trainer.global_step
            for member in self.members:
                self.files.append(MetricsFile(member.folder.metrics_file, metric_columns(member.config)))
                self.files[-1].begin(self._logged_steps(step, trainer.max_steps))
        if trainer.global_step == 0:
            self._write(trainer, module)

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        """A row where there is something to say."""
        self._write(trainer, module)

    def state_dict(self) -> dict[str, Any]:
        """The loss of the last row, for the status."""
        return {"loss": self.loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it up again."""
        self.loss = state_dict["loss"]

    def _logged_steps(self, step: int, max_steps: int) -> set[int]:
        """The steps up to this one that have a row; none for a run that begins."""
        if step == 0:
            return set()
        evaluations = range(0, step + 1, self.evaluation.every) if self.evaluation.every is not None else ()
        last = {max_steps} if step == max_steps else set()
        return {*range(self.every, step + 1, self.every), *evaluations, *last}

    def _write(self, trainer: pl.Trainer, module: PopulationModule) -> None:
        step = trainer.global_step
        evaluated = self.evaluation.latest(step)
        is_last = step == trainer.max_steps or self.stopping.reason is not None
        is_logged = step > 0 and (step % self.every == 0 or is_last)
        if not is_logged and evaluated is None:
            return
        rate = float(trainer.optimizers[0].param_groups[0]["lr"])
        rows: list[Metrics] = [{"step": step, "lr": rate} for _ in self.members]
        if is_logged:
            self.loss, clipped = module.take_means()
            for row, loss, share in zip(rows, self.loss, clipped, strict=True):
                row |= {"train/loss": loss, "clipped_fraction": share}
        for index, file in enumerate(self.files):
            row = rows[index] | (evaluated[index] if evaluated else {})
            file.append(row)
            for sink in self.sinks:
                sink({key: value for key, value in row.items() if key in file.columns})


def metric_columns(config: RunConfig) -> list[str]:
    """The columns of `metrics.csv`, fixed by the settings."""
    columns = ["step", "train/loss", "lr"]
    if config.optim.grad_clip is not None:
        columns.append("clipped_fraction")
    if config.evaluation.every is not None:
        gaps = ["delta_ridge"] if config.task.is_gaussian else ["delta_ridge", "delta_dmmse"]
        for name in ("pretrain", "true"):
            columns += [f"eval/{name}/{quantity}" for quantity in ("loss", *gaps, "icl_score")]
    return columns


def any_rank(trainer: pl.Trainer, flag: bool) -> bool:
    """Whether the flag is set on any rank; every rank must ask."""
    return flag if trainer.world_size == 1 else trainer.strategy.reduce_boolean_decision(flag, all=False)
