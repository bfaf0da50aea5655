"""The runs of a population while they train: what belongs to one of them and not to the step they share.

A member takes part until it has ended: stopped early, or failed because its loss was no longer finite. What it has saved
then is final. Its slice of the stacked parameters is computed on until the population is next put together, for nothing,
and nothing of it is recorded; members never see each other, so the others' numbers do not change.
"""

import math
import time
from dataclasses import dataclass, field
from typing import Any

from icl.config import RunConfig
from icl.runs import RunFolder, State
from icl.training.wandb_log import WandbLog

_SAVED = ("loss", "best", "best_step", "num_checks", "extra_step", "state", "end_step", "reason", "is_packed", "rows")


@dataclass(eq=False)
class Member:
    """One run: its settings, its folder, and how it stands."""

    config: RunConfig
    folder: RunFolder
    loss: float | None = None
    """Mean training loss of the last row of `metrics.csv`."""
    best: float = math.inf
    """The monitored metric at its best."""
    best_step: int | None = None
    num_checks: int = 0
    """Evaluations since the best."""
    extra_step: int | None = None
    """The best checkpoint, if it is not on the schedule."""
    state: State = "running"
    end_step: int | None = None
    reason: str | None = None
    is_settled: bool = False
    """Whether its end has been written down."""
    is_own: bool = False
    """Whether its folder is known to be this run's, and nobody else trains it; only then is it told of a refusal."""
    is_refused: bool = False
    """Whether it could not be taken up, so that the others train without it."""
    is_packed: bool = False
    """Whether it began as one of several, which decides how a CPU steps it; it stays so if it is resumed as the last one."""
    rows: dict[str, Any] | None = None
    """How long `metrics.csv` was at the last save, and its digest."""
    lacking: frozenset[int] = frozenset()
    """Steps whose checkpoints were missing when it was taken up; training goes on without them."""
    incomplete: str | None = None
    """What a run that had ended before lacks so that it is no success, in a sentence."""
    told_lacking: str | None = None
    """Which other checkpoints it lacks, in a sentence."""
    notes: list[str] = field(default_factory=list)
    """What a person must be told when it is taken up, a sentence each."""
    wandb: WandbLog | None = None
    """Its W&B run, which takes the rows of `metrics.csv`."""
    _started: float = field(default_factory=time.monotonic)

    @property
    def is_running(self) -> bool:
        """Whether the next step counts for it."""
        return self.state == "running"

    def records(self, step: int) -> bool:
        """Whether what it is at this step is to be kept: until it ends, and where it stops, but nothing non-finite."""
        return self.is_running or (self.state == "stopped_early" and self.end_step == step)

    def is_last(self, step: int) -> bool:
        """Whether its training ends with this step."""
        return step == self.config.trainer.max_steps or self.end_step == step

    @property
    def seconds(self) -> float:
        """Since this process took it up."""
        return time.monotonic() - self._started

    def end(self, state: State, step: int, reason: str | None = None) -> None:
        """Take part no more."""
        self.state, self.end_step, self.reason = state, step, reason

    def state_dict(self) -> dict[str, Any]:
        """What a resumed member goes on with, as plain values."""
        return {name: getattr(self, name) for name in _SAVED}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take it up again."""
        for name in _SAVED:
            setattr(self, name, saved.get(name, getattr(self, name)))  # older files have no `is_packed`
