"""What a person sees while a run trains: a progress bar, and `status.json` for `icl runs`."""

import io
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
from tqdm import tqdm

from icl.runs import State, Status
from icl.training.callbacks import MetricsLog
from icl.training.members import Member

_SECONDS_BETWEEN_LINES = 10.0


class StatusFile(pl.Callback):
    """Keeps the `status.json` of every member that takes part up to date; its end is written when it is settled."""

    def __init__(self, members: Sequence[Member], metrics_log: MetricsLog) -> None:
        self.members, self.metrics_log = members, metrics_log
        self.steps_per_second: float | None = None
        self._mark = (0, 0.0)

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Say that they run."""
        self._mark = (trainer.global_step, time.monotonic())
        self._write(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        """At every logged step."""
        if trainer.global_step % self.metrics_log.every == 0:
            step, then = self._mark
            self._mark = (trainer.global_step, time.monotonic())
            self.steps_per_second = (trainer.global_step - step) / max(1e-9, self._mark[1] - then)
            self._write(trainer)

    def _write(self, trainer: pl.Trainer) -> None:
        rate = round(self.steps_per_second, 2) if self.steps_per_second else None
        for member in self.members:
            if trainer.is_global_zero and member.is_running:
                status = member_status(member, "running", trainer.global_step)
                member.folder.write_status(replace(status, steps_per_second=rate))


def member_status(member: Member, state: State, step: int) -> Status:
    """What `status.json` says of a member at a step."""
    return Status(
        state=state,
        step=step,
        max_steps=member.config.trainer.max_steps,
        loss=member.loss,
        best_step=member.best_step,
        reason=member.reason,
    )


class ProgressBar(pl.Callback):
    """Loss, steps per second and time left: a live bar on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, metrics_log: MetricsLog, max_steps: int) -> None:
        self.metrics_log, self.max_steps = metrics_log, max_steps
        self.bar: tqdm | None = None
        self._is_live = True
        self._printed_at = 0.0

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Begin at the step that training begins at."""
        if trainer.is_global_zero:
            self._is_live = sys.stderr.isatty()
            self._printed_at = time.monotonic()
            self.bar = tqdm(
                total=self.max_steps,
                initial=trainer.global_step,
                desc="training" if (number := len(self.metrics_log.members)) == 1 else f"training {number} members",
                unit="step",
                dynamic_ncols=True,
                mininterval=0.2,
                file=None if self._is_live else io.StringIO(),
            )

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        """One step on."""
        if self.bar is not None:
            if self.metrics_log.loss is not None and trainer.global_step % self.metrics_log.every == 0:
                self.bar.set_postfix_str(f"loss={self.metrics_log.loss:.4f}", refresh=False)
            self.bar.update(trainer.global_step - self.bar.n)
            if not self._is_live and time.monotonic() - self._printed_at > _SECONDS_BETWEEN_LINES:
                self._printed_at = time.monotonic()
                self._print_line(self.bar.format_dict)

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        """Leave the finished bar on the terminal."""
        self._close()

    def on_exception(self, trainer: pl.Trainer, module: Any, exception: BaseException) -> None:
        """Leave the bar where it stopped."""
        self._close()

    def _print_line(self, state: dict[str, Any]) -> None:
        rate = state["rate"] or (state["n"] - state["initial"]) / max(1e-9, state["elapsed"])
        left = tqdm.format_interval((state["total"] - state["n"]) / rate) if rate else "?"
        loss = f"loss {self.metrics_log.loss:.4f}  " if self.metrics_log.loss is not None else ""
        line = f"step {state['n']:,}/{state['total']:,}  {loss}{rate:.1f} steps/s  {left} left"
        print(line, file=sys.stderr, flush=True)

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()
