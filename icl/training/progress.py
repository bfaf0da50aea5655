"""What a person sees while a run trains: a progress bar, and `status.json` for `icl runs`."""

import io
import sys
import time
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from tqdm import tqdm

from icl.runs import Status
from icl.training.callbacks import EarlyStopping, Member, MetricsLog

_SECONDS_BETWEEN_LINES = 10.0


class StatusFile(pl.Callback):
    """Keeps `status.json` up to date while training runs."""

    def __init__(self, members: Sequence[Member], metrics_log: MetricsLog, stopping: EarlyStopping) -> None:
        self.members, self.metrics_log, self.stopping = members, metrics_log, stopping
        self.steps_per_second: float | None = None
        self._mark = (0, 0.0)

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Say that it runs."""
        self._mark = (trainer.global_step, time.monotonic())
        self.write(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        """At every logged step."""
        if trainer.global_step % self.metrics_log.every == 0:
            step, then = self._mark
            self._mark = (trainer.global_step, time.monotonic())
            self.steps_per_second = (trainer.global_step - step) / max(1e-9, self._mark[1] - then)
            self.write(trainer)

    def write(self, trainer: pl.Trainer) -> None:
        """Write it now."""
        if trainer.is_global_zero:
            for index, member in enumerate(self.members):
                member.folder.write_status(
                    Status(
                        state="running",
                        step=trainer.global_step,
                        max_steps=member.config.trainer.max_steps,
                        loss=self.metrics_log.loss[index] if self.metrics_log.loss else None,
                        best_step=self.stopping.best_step,
                        steps_per_second=round(self.steps_per_second, 2) if self.steps_per_second else None,
                    )
                )


class ProgressBar(pl.Callback):
    """Loss, steps per second and time left: a live bar on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, metrics_log: MetricsLog) -> None:
        self.metrics_log = metrics_log
        self.bar: tqdm | None = None
        self._is_live = True
        self._printed_at = 0.0

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Begin at the step that training begins at."""
        if trainer.is_global_zero:
            self._is_live = sys.stderr.isatty()
            self._printed_at = time.monotonic()
            self.bar = tqdm(
                total=trainer.max_steps,
                initial=trainer.global_step,
                desc="training",
                unit="step",
                dynamic_ncols=True,
                mininterval=0.2,
                file=None if self._is_live else io.StringIO(),
            )

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        """One step on."""
        if self.bar is not None:
            if self.metrics_log.loss is not None and trainer.global_step % self.metrics_log.every == 0:
                self.bar.set_postfix_str(f"loss={self.metrics_log.loss[0]:.4f}", refresh=False)
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
        loss = f"loss {self.metrics_log.loss[0]:.4f}  " if self.metrics_log.loss else ""
        line = f"step {state['n']:,}/{state['total']:,}  {loss}{rate:.1f} steps/s  {left} left"
        print(line, file=sys.stderr, flush=True)

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()
