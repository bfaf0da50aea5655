"""`status.json`: a run's progress, and how and why the run ended."""

import json
import time
from dataclasses import asdict, dataclass
from typing import Literal

from icl.config.validation import is_count, typed_record
from icl.files.reading import ContentError, parse_json
from icl.files.redaction import redact

State = Literal["waiting", "running", "finished", "stopped_early", "preempted", "failed"]
DONE: tuple[State, ...] = ("finished", "stopped_early")
"""States of a run that has ended successfully."""
FAILS_AGAIN = "the same settings would fail again"
"""Phrase that `reason` contains if a run failed and would fail again with the same settings."""
WAS_REMOVED = "was moved or removed while the run was trained"
"""Phrase that `reason` contains if a run ended because its folder was missing."""
_LAST_TIME = 253_402_300_799
"""Unix time of the end of the year 9999, which is the last date in Python."""


@dataclass(frozen=True, kw_only=True)
class Status:
    """The content of `status.json`."""

    state: State
    step: int = 0
    """Number of optimizer updates so far."""
    max_steps: int = 0
    loss: float | None = None
    """Mean training loss in the last row of `metrics.csv`."""
    best_step: int | None = None
    """Evaluated step at which `early_stopping.monitor` had its best value. The checkpoint of this step is kept if `patience` is set."""
    reason: str | None = None
    """The reason why the run stopped, failed or was preempted."""
    steps_per_second: float | None = None
    updated: float = 0.0
    """Unix time of this status."""

    @property
    def is_done(self) -> bool:
        """Whether the run has ended successfully."""
        return self.state in DONE


def status_text(status: Status) -> bytes:
    """Return the content of `status.json` for a status, with the current time."""
    reason = None if status.reason is None else redact(status.reason)
    content = asdict(status) | {"reason": reason, "updated": round(time.time(), 3)}
    return (json.dumps(content, indent=1) + "\n").encode()


def parse_status(data: bytes) -> Status | None:
    """Parse a run's `status.json`. Return None if the file cannot be read, or contains a value that `icl` never writes."""
    try:
        status = typed_record(Status, parse_json(data, limit=100))
    except ContentError:
        return None
    if status is None or not 0 <= status.updated <= _LAST_TIME:
        return None
    steps = (status.step, status.max_steps, status.best_step or 0)
    return status if all(map(is_count, steps)) else None
