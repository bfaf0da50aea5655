"""The application against its own bare step: Lightning, our callbacks, logging, evaluation and saving around the step.

Training runs as `icl train` runs it, and stands still after every stretch of steps while as many bare ones are made.
"""

import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from benchmarks.turns import MIN_TURNS, Side, Turn, timed, wait_for
from icl.build import build_model
from icl.config import RunConfig
from icl.model.stacked import stack
from icl.runs.folder import RunError, RunFolder
from icl.training.data import PromptDataModule
from icl.training.members import Member
from icl.training.module import PopulationModule
from icl.training.progress import ProgressBar
from icl.training.trainer import evaluation_sets, make_callbacks, make_trainer


class Interruptions(pl.Callback):
    """Times the steps since it last looked up, then as many bare ones; the last of the callbacks, so it sees all costs.

    Args:
        bare: Makes one bare step.
        device: Where both train.
        seconds: How long the turns go on, after a first one that warms up and does not count.
        num_steps: Of a turn; those up to the end of a stretch are added.
    """

    def __init__(self, bare: Callable[[], object], device: str, *, seconds: float, num_steps: int) -> None:
        self.bare, self.device, self.seconds, self.num_steps = bare, device, seconds, num_steps
        self.turns: list[Turn] = []
        self.is_done = False
        self._is_warm = False
        self._end = 0.0
        self._begin_turn()

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Begin to count."""
        self._go_on(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """The stretch has ended: its steps count for the application, and the other side makes as many."""
        wait_for(self.device)
        num_steps, seconds = trainer.global_step - self._step, time.perf_counter() - self._since
        self._steps += num_steps
        self._ours += seconds
        self._peer += num_steps * timed(Side(self.bare, num_steps), self.device)
        if self._steps >= self.num_steps:
            self._end_turn()
            trainer.should_stop = trainer.should_stop or self.is_done
        self._go_on(trainer)

    def _go_on(self, trainer: pl.Trainer) -> None:
        self._step, self._since = trainer.global_step, time.perf_counter()

    def _begin_turn(self) -> None:
        self._steps, self._peer, self._ours = 0, 0.0, 0.0

    def _end_turn(self) -> None:
        if self._is_warm:
            self.turns.append(Turn(self._peer / self._steps, self._ours / self._steps))
            self.is_done = len(self.turns) >= MIN_TURNS and time.perf_counter() >= self._end
        else:
            self._is_warm, self._end = True, time.perf_counter() + self.seconds
        self._begin_turn()


def measure_application(config: RunConfig, device: str, bare: Callable[[], object], seconds: float) -> list[Turn]:
    """Seconds per step of the bare loop and of `icl train`, whose run is in a temporary folder.

    Raises:
        RunError: If training ended before it was asked to; what it raised itself goes through.
    """
    config = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, accelerator=device))
    interruptions = Interruptions(bare, device, seconds=seconds, num_steps=turn_length(config, device))
    with tempfile.TemporaryDirectory(prefix="icl-bench-") as folder:
        members = [Member(config, RunFolder(Path(folder)))]
        trainer = make_trainer(config, members)
        callbacks = make_callbacks(members, evaluation_sets([config]))
        # The bar is left out: it would write over the table.
        kept = [callback for callback in callbacks if not isinstance(callback, ProgressBar)]
        trainer.callbacks += [*kept, interruptions]  # type: ignore[attr-defined]
        module = PopulationModule(members, stack([dict(build_model(config).named_parameters())]))
        trainer.fit(module, PromptDataModule([config]))
    if not interruptions.is_done:
        cause = members[0].reason or "its steps were done, or a signal came"
        raise RunError(f"The application ended at step {trainer.global_step:,}, before all was measured: {cause}")
    return interruptions.turns


def turn_length(config: RunConfig, device: str) -> int:
    """Steps from one row of the log to the next: a turn with none, or a median of such turns, would know nothing of it.

    Evaluations are as much rarer as they are dearer. On a GPU, whose steps are short, a turn has one of them too; on a CPU
    it would last half a minute, for a cost of three steps in a thousand.
    """
    every = config.evaluation.every if device == "cuda" else None
    return max(config.trainer.log_every, every or 0)
