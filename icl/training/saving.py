"""What a run leaves on disk as it goes: checkpoints for analysis, and the file it resumes from."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from icl import population
from icl.checkpoints import checkpoint_name, save_checkpoint
from icl.config import RunConfig
from icl.runs import RunError, RunFolder, require_same_config
from icl.storage import StorageError, sync_folder, temporary_path
from icl.training.callbacks import EarlyStopping, Member, MetricsLog, NonFiniteGuard, any_rank
from icl.training.module import PopulationModule


class ScheduledCheckpoints(pl.Callback):
    """Saves the weights at the steps of the schedule, and at the step where training ends."""

    def __init__(
        self, members: Sequence[Member], steps: Sequence[int], guard: NonFiniteGuard, stopping: EarlyStopping
    ) -> None:
        self.members, self.steps, self.guard, self.stopping = members, frozenset(steps), guard, stopping
        self.extra_step: int | None = None

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """The initial model."""
        if trainer.global_step == 0:
            self._save(trainer, module)

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        """Save if the step is on the schedule, training ends here, or it is the best so far."""
        step = trainer.global_step
        if step in self.steps or step == trainer.max_steps or self.stopping.reason is not None:
            self._save(trainer, module)
        elif self.stopping.settings.patience is not None and self.stopping.best_step == step:
            self._save_best(trainer, module)

    def state_dict(self) -> dict[str, Any]:
        """The best checkpoint that is not on the schedule."""
        return {"extra_step": self.extra_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it up again."""
        self.extra_step = state_dict["extra_step"]

    def _save_best(self, trainer: pl.Trainer, module: PopulationModule) -> None:
        """Keep one checkpoint off the schedule: the best."""
        old, self.extra_step = self.extra_step, trainer.global_step
        self._save(trainer, module)
        if trainer.is_global_zero and old is not None:
            for member in self.members:
                member.folder.checkpoints.delete(checkpoint_name(old))

    def _save(self, trainer: pl.Trainer, module: PopulationModule) -> None:
        self.guard.check(module)
        if trainer.is_global_zero:
            for member, params in zip(self.members, population.unstack(module.params), strict=True):
                save_checkpoint(member.folder.checkpoints, trainer.global_step, member.config, params)


class ResumeFile(pl.Callback):
    """Keeps `last.ckpt` at most `seconds` old, and exact at the end of training."""

    def __init__(
        self, folder: RunFolder, metrics_log: MetricsLog, guard: NonFiniteGuard, *, seconds: float = 20.0
    ) -> None:
        self.folder, self.metrics_log, self.guard, self.seconds = folder, metrics_log, guard, seconds
        self._saved_at = time.monotonic()

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        """Save when it is time, and when this was the last step."""
        is_last = trainer.should_stop or trainer.global_step == trainer.max_steps
        if is_last or any_rank(trainer, time.monotonic() - self._saved_at > self.seconds):
            self.guard.check(module)
            for file in self.metrics_log.files:
                file.sync()
            save_resume_file(trainer, self.folder.resume_file)
            self._saved_at = time.monotonic()


def save_resume_file(trainer: pl.Trainer, path: Path) -> None:
    """Write Lightning's checkpoint so that a kill at any moment leaves the old one or the new one.

    Raises:
        StorageError: If it cannot be written.
    """
    temporary = temporary_path(path)
    try:
        trainer.save_checkpoint(temporary)
        if trainer.is_global_zero:
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_folder(path.parent)
    except OSError as error:
        raise StorageError(
            f"Cannot write {path}: {error.strerror or error}. What was saved before is intact; "
            "free space, then run the same command again."
        ) from None


def read_resume_step(folder: RunFolder, config: RunConfig) -> int:
    """The step that a run continues from: that of its resume file, or 0 without one.

    Raises:
        ConfigError: If the file is of a run with other settings.
        RunError: If it is damaged.
    """
    if not folder.resume_file.is_file():
        return 0
    try:
        content = torch.load(folder.resume_file, map_location="cpu", weights_only=True)
        step, saved = int(content["global_step"]), RunConfig.from_dict(content["configs"][0])
    except Exception as error:  # torch raises many kinds for a damaged file
        raise RunError(
            f"{folder.resume_file} cannot be read ({type(error).__name__}), so the run cannot be resumed. "
            "Delete that file to train again from step 0; the saved checkpoints stay."
        ) from None
    require_same_config(saved, config, folder)
    return step
