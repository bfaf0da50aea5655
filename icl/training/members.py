"""State of each member of a population during training.

A member is one of the runs that train together. Members that train at the same time are at the same step.

A member trains until it ends, for example because it stops early or its loss is no longer finite. After its end, its saved files are
no longer changed. The member's slice of the stacked parameters is still updated until the population is rebuilt, but the results are
no longer recorded. Members do not interact, so these updates do not change the numbers of the other members.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from icl.config import RunConfig
from icl.runs.folder import RunFolder
from icl.runs.status import State

_SAVED = (
    "loss",
    "best",
    "best_step",
    "num_checks",
    "extra_step",
    "state",
    "end_step",
    "reason",
    "is_packed",
    "num_parts",
    "rows",
)


@runtime_checkable
class RowLogger(Protocol):
    """A logger that receives the rows of a member's `metrics.csv`."""

    def log(self, row: Mapping[str, int | float], /) -> None:
        """Log one row, which contains its step."""

    def finish(self, exit_code: int) -> None:
        """End the log, with the exit code of the program."""


@dataclass(eq=False)
class Member:
    """One run of a population: its settings, its folder and its state."""

    config: RunConfig
    folder: RunFolder
    loss: float | None = None
    """Latest training loss in `metrics.csv`: the mean over the steps since the training loss was last logged. None before the first such loss."""
    best: float = math.inf
    """Best value of the monitored metric."""
    best_step: int | None = None
    num_checks: int = 0
    """Number of evaluations since the best value was reached."""
    extra_step: int | None = None
    """Step of the best checkpoint if no checkpoint was scheduled for this step, else None."""
    state: State = "running"
    end_step: int | None = None
    reason: str | None = None
    is_recorded: bool = False
    """Whether the member's outcome has been recorded."""
    is_own: bool = False
    """Whether the folder is known to belong to this run, with no other process training in it. Only then may a failure be written to
    the folder."""
    is_refused: bool = False
    """Whether the member could not be started or resumed. The other members then train without this member."""
    is_packed: bool = False
    """Whether the member started as one of several members. This affects how a compiled step rounds on a CPU. The value is kept if the
    member is resumed alone, so that its results do not change."""
    num_parts: int | None = None
    """Number of parts into which a compiled step on a CPU splits the prompts; None before the first start. The value is kept when the
    run is resumed, so that its results do not change."""
    rows: dict[str, Any] | None = None
    """Size in bytes and digest of `metrics.csv` at the last save."""
    lacking: frozenset[int] = frozenset()
    """Steps whose checkpoints were missing when the run was resumed; training continues without them."""
    incomplete: str | None = None
    """Message about a missing last checkpoint or missing rows of a run that had already ended; None if nothing is missing. A run with
    such a message does not count as a success."""
    told_lacking: str | None = None
    """Message about a run that had already ended: which earlier checkpoints are missing, and whether its rows were altered. None if all is well."""
    notes: list[str] = field(default_factory=list)
    """Messages to print and log when training starts or resumes."""
    loggers: list[RowLogger] = field(default_factory=list)
    """Loggers that receive the rows of `metrics.csv`, such as W&B."""
    _started: float = field(default_factory=time.monotonic)

    @property
    def is_running(self) -> bool:
        """Whether the member is still training."""
        return self.state == "running"

    def records(self, step: int) -> bool:
        """Return whether to save the member's results at this step.

        Return True while the member is running, and at the step at which it stops early.
        """
        return self.is_running or (self.state == "stopped_early" and self.end_step == step)

    def is_last(self, step: int) -> bool:
        """Return whether the member's training ends with this step."""
        return step == self.config.trainer.max_steps or self.end_step == step

    @property
    def seconds(self) -> float:
        """Seconds since this process started or resumed the member."""
        return time.monotonic() - self._started

    def end(self, state: State, step: int, reason: str | None = None) -> None:
        """Mark this member as ended: set its final state, its last step and the reason."""
        self.state, self.end_step, self.reason = state, step, reason

    def state_dict(self) -> dict[str, Any]:
        """Return the state from which a resumed member continues, as plain values."""
        return {name: getattr(self, name) for name in _SAVED}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restore the state of a saved member."""
        for name in _SAVED:
            setattr(self, name, saved.get(name, getattr(self, name)))  # older files have no `is_packed`
        self.num_parts = saved.get("num_parts", 1)  # older files have no `num_parts`, because prompts were never split
