"""Measure how much time `icl train` needs beyond its training steps: for Lightning, our callbacks, logging, evaluation and saving.

A real training run pauses at intervals. In each pause we run as many bare steps (the training step alone) as the run has made since
the last pause. The ratio compares the time of the bare steps with the time of the run.
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
    """Callback that times the run's steps since its last call, and then the same number of bare steps.

    This callback must be the last one, so that the times include all other callbacks.

    Args:
        bare: Function that makes one bare step.
        device: Device of the run and of the bare steps.
        seconds: Total time of all turns, in seconds. The first turn only warms up and does not count.
        num_steps: Minimum number of the run's steps in a turn.
    """

    def __init__(self, bare: Callable[[], object], device: str, *, seconds: float, num_steps: int) -> None:
        self.bare, self.device, self.seconds, self.num_steps = bare, device, seconds, num_steps
        self.turns: list[Turn] = []
        self.is_done = False
        self._is_warm = False
        self._end = 0.0
        self._begin_turn()

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Start the clock."""
        self._go_on(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Add the run's time since the last call, then time the same number of bare steps."""
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
    """Return the seconds per step of the bare loop and of `icl train`. The run is in a temporary folder.

    Raises:
        RunError: If training ended before the measurement was complete. An exception from training itself is not caught.
    """
    config = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, accelerator=device))
    interruptions = Interruptions(bare, device, seconds=seconds, num_steps=turn_length(config, device))
    with tempfile.TemporaryDirectory(prefix="icl-bench-") as folder:
        members = [Member(config, RunFolder(Path(folder)))]
        trainer = make_trainer(config, members)
        callbacks = make_callbacks(members, evaluation_sets([config]))
        # Leave out the progress bar, which would overwrite the table.
        kept = [callback for callback in callbacks if not isinstance(callback, ProgressBar)]
        trainer.callbacks += [*kept, interruptions]  # type: ignore[attr-defined]
        module = PopulationModule(members, stack([dict(build_model(config).named_parameters())]))
        trainer.fit(module, PromptDataModule([config]))
    if not interruptions.is_done:
        cause = members[0].reason or "it reached its last step or received a signal"
        raise RunError(f"Training ended at step {trainer.global_step:,}, before the measurement was complete: {cause}.")
    return interruptions.turns


def turn_length(config: RunConfig, device: str) -> int:
    """Return the number of steps in a turn: long enough that each turn includes the cost of logging a row.

    On a GPU, whose steps are short, a turn also includes an evaluation. On a CPU such a turn would last half a minute, although
    evaluations add only 0.3 % to the time of a run.
    """
    every = config.evaluation.every if device == "cuda" else None
    return max(config.trainer.log_every, every or 0)
