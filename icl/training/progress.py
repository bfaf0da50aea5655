"""Progress of training: a progress bar, and `status.json` for `icl runs`."""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
from tqdm import tqdm

from icl.progress import progress_bar
from icl.runs.status import State, Status
from icl.training.callbacks import MetricsLog
from icl.training.members import Member


class StatusFile(pl.Callback):
    """Keep the `status.json` of every member up to date during training. The module `endings` writes the final status."""

    def __init__(self, members: Sequence[Member], metrics_log: MetricsLog) -> None:
        self.members, self.metrics_log = members, metrics_log
        self.steps_per_second: float | None = None
        self._last = (0, 0.0)
        """Step and time of the last measurement of the speed."""

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Write into each status that the member is running."""
        self._last = (trainer.global_step, time.monotonic())
        self._write(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        """Measure the speed and write the status at every logged step."""
        if trainer.global_step % self.metrics_log.every == 0:
            last_step, last_time = self._last
            self._last = (trainer.global_step, time.monotonic())
            self.steps_per_second = (trainer.global_step - last_step) / max(1e-9, self._last[1] - last_time)
            self._write(trainer)

    def _write(self, trainer: pl.Trainer) -> None:
        rate = round(self.steps_per_second, 2) if self.steps_per_second else None
        for member in self.members:
            if trainer.is_global_zero and member.is_running:
                status = member_status(member, "running", trainer.global_step)
                member.folder.write_status(replace(status, steps_per_second=rate))


def member_status(member: Member, state: State, step: int) -> Status:
    """Return the content of `status.json` for a member at a step."""
    return Status(
        state=state,
        step=step,
        max_steps=member.config.trainer.max_steps,
        loss=member.loss,
        best_step=member.best_step,
        reason=member.reason,
    )


class ProgressBar(pl.Callback):
    """Show loss, steps per second and remaining time: as a progress bar on a terminal, otherwise as a line every ten seconds."""

    def __init__(self, metrics_log: MetricsLog, max_steps: int) -> None:
        self.metrics_log, self.max_steps = metrics_log, max_steps
        self.bar: tqdm | None = None

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Create the bar. In a resumed run, it begins at the step from which training resumes."""
        if trainer.is_global_zero:
            num_members = len(self.metrics_log.members)
            name = "training" if num_members == 1 else f"training {num_members} members"
            self.bar = progress_bar(name, self.max_steps, "step", shows_rate=True, initial=trainer.global_step)

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        """Advance the bar."""
        if self.bar is not None:
            if self.metrics_log.loss is not None and trainer.global_step % self.metrics_log.every == 0:
                self.bar.set_postfix_str(f"loss={self.metrics_log.loss:.4f}", refresh=False)
            self.bar.update(trainer.global_step - self.bar.n)

    def on_train_end(self, *_: Any) -> None:
        """Close the bar and leave it on the terminal."""
        if self.bar is not None:
            self.bar.close()

    on_exception = on_train_end  # type: ignore[assignment]  # Lightning also passes the exception
