"""Read the state of a sweep's point from the folder of its run: done, running, failed or waiting, with the reason.

A point is one combination of the sweep's settings. A point whose program is `icl train` is done if its run is done with the same
settings, even if the run was trained outside the sweep. A point of any other program is done if the last attempt at the point exited
with status 0. A failure is final if the same settings would fail again, for example because the loss becomes NaN. Such a point is tried
again only with `--retry`, or after the installed versions of packages change.
"""

import time
from pathlib import Path
from typing import Literal, NamedTuple

from icl.config.validation import UserError
from icl.runs.folder import RunFolder, fails_again, require_same_config
from icl.runs.status import Status
from icl.sweeps import attempts
from icl.sweeps.attempts import Attempt, is_alive, last_attempt
from icl.sweeps.points import Point


class PointState(NamedTuple):
    """The state of a point, and the reason for it."""

    state: Literal["done", "running", "failed", "waiting"]
    reason: str
    attempt: int = 0
    """Number of the last attempt at the point, or 0 if there was none."""
    is_final: bool = False
    """Whether the point has failed and would fail again with the same settings."""


def point_state(point: Point, root: Path) -> PointState:
    """Return the current state of a point. `root` is the folder of all runs."""
    run = RunFolder(root / point.name)
    current = last_attempt(run.path)
    status = run.read_status() if point.trains else None
    state = _state(point, run, status, current)
    if state.state == "failed" and status is not None and fails_again(run, status):
        return state._replace(
            is_final=True, reason=f"{state.reason} This run is not tried again; use --retry to try it again."
        )
    return state


def _state(point: Point, run: RunFolder, status: Status | None, current: Attempt | None) -> PointState:
    """Return the state of a point, without checking whether a failure is final."""
    number = current.number if current else 0
    if current is not None and is_alive(run.path, current):
        return PointState("running", f"on {current.host or 'a machine'}{_progress(status)}", number)
    attempt = last_attempt(run.path, point.job)
    if status is not None:
        return _state_of_run(point, run, status, attempt, number)
    if attempt is not None and point.trains and attempt.outcome == "done":
        return PointState("waiting", "its status.json is missing or damaged", number)
    if attempt is not None:
        return _state_of_attempt(attempt, None, number)
    return PointState("waiting", "not started", number)


def _state_of_run(point: Point, run: RunFolder, status: Status, attempt: Attempt | None, number: int) -> PointState:
    """Return the state of a point whose run has been started by `icl train`, in a sweep or outside of one."""
    try:
        require_same_config(run.read_config(), point.config, run)
    except UserError as error:
        return PointState("failed", str(error), number)
    if attempt is not None and attempt.ended is not None and attempt.ended < status.updated:
        attempt = None  # after this attempt, the run was trained outside of a sweep
    if status.is_done and (attempt is None or attempt.outcome != "failed"):
        return PointState("done", f"{status.state.replace('_', ' ')} at step {status.step:,}", number)
    if attempt is not None and attempt.outcome != "done":
        return _state_of_attempt(attempt, status, number)
    if status.state == "failed":
        return PointState("failed", f"{status.reason}{_progress(status)}", number)
    # The clock of the run's machine may be ahead of ours by less than `STALE_SECONDS`. If it is ahead by more, some clock is wrong.
    is_recent = abs(time.time() - status.updated) < attempts.STALE_SECONDS
    if status.state in ("running", "waiting") and is_recent:
        return PointState("running", f"outside of this sweep{_progress(status)}", number)
    return PointState("waiting", f"stopped{_progress(status)}; it will resume", number)


def _state_of_attempt(attempt: Attempt, status: Status | None, number: int) -> PointState:
    """Return the state of a point from its last attempt, which must have ended."""
    progress = _progress(status)
    if attempt.outcome == "done":
        return PointState("done", "exited with status 0", number)
    if attempt.outcome == "failed":
        return PointState("failed", attempt.reason or "no reason given", number)
    if attempt.outcome == "preempted":
        return PointState("waiting", f"{attempt.reason}{progress}; it will resume", number)
    return PointState("waiting", f"its worker on {attempt.host or 'a machine'} died{progress}; it will resume", number)


def _progress(status: Status | None) -> str:
    return "" if status is None else f" at step {status.step:,} of {status.max_steps:,}"
