"""Where a point stands, from its run's folder: done, running, failed or waiting, each with its reason.

A point of `icl train` is done when its run says so under the same settings, whoever trained it; any other program's is
done when the last attempt at it exited with 0. A failure that the same settings would only repeat, such as a loss of
NaN, is final: it is not tried again by the same versions, unless it is asked for.
"""

import time
from pathlib import Path
from typing import Literal, NamedTuple

from icl.runs import DONE, RunFolder, Status, fails_again, require_same_config
from icl.sweeps.attempts import STALE_SECONDS, Attempt, is_alive, last_attempt
from icl.sweeps.points import Point
from icl.validation import ConfigError


class PointState(NamedTuple):
    """Where a point stands."""

    state: Literal["done", "running", "failed", "waiting"]
    reason: str
    attempt: int = 0
    """The number of the last attempt at the point; 0 if there was none."""
    is_final: bool = False
    """Whether the same settings would fail again."""


def point_state(point: Point, root: Path, *, stale_after: float = STALE_SECONDS) -> PointState:
    """Where a point stands now, in the folder of all runs."""
    run = RunFolder(root / point.name)
    current = last_attempt(run.path)
    status = run.read_status() if point.trains else None
    state = _state(point, run, status, current, stale_after)
    if state.state == "failed" and status is not None and fails_again(run, status):
        return state._replace(is_final=True, reason=f"{state.reason} It is not tried again, except by --retry.")
    return state


def _state(
    point: Point, run: RunFolder, status: Status | None, current: Attempt | None, stale_after: float
) -> PointState:
    """The same, but for whether a failure is final."""
    number = current.number if current else 0
    if current is not None and is_alive(run.path, current, stale_after=stale_after):
        return PointState("running", f"on {current.host or 'a machine'}{_progress(status)}", number)
    own = last_attempt(run.path, point.job)
    if status is not None:
        return _state_of_run(point, run, status, own, number)
    if own is not None:
        return _state_of_attempt(own, None, number)
    return PointState("waiting", "not started", number)


def _state_of_run(point: Point, run: RunFolder, status: Status, own: Attempt | None, number: int) -> PointState:
    """The state of a point that `icl train` has worked on, under a sweep or not."""
    try:
        require_same_config(run.read_config(), point.config, run)
    except ConfigError as error:
        return PointState("failed", str(error), number)
    if own is not None and own.ended is not None and own.ended < status.updated:
        own = None  # somebody has trained the run since, outside of a sweep
    if status.state in DONE and (own is None or own.outcome != "failed"):
        return PointState("done", f"{status.state.replace('_', ' ')} at step {status.step:,}", number)
    if own is not None and own.outcome != "done":
        return _state_of_attempt(own, status, number)
    if status.state == "failed":
        return PointState("failed", f"{status.reason}{_progress(status)}", number)
    if status.state in ("running", "waiting") and time.time() - status.updated < STALE_SECONDS:
        return PointState("running", f"outside of this sweep{_progress(status)}", number)
    return PointState("waiting", f"stopped{_progress(status)}; it will resume", number)


def _state_of_attempt(own: Attempt, status: Status | None, number: int) -> PointState:
    """The state of a point by the last attempt at it, which nobody works on any more."""
    progress = _progress(status)
    if own.outcome == "done":
        return PointState("done", "exited with 0", number)
    if own.outcome == "failed":
        return PointState("failed", own.reason or "no reason given", number)
    if own.outcome == "preempted":
        return PointState("waiting", f"{own.reason}{progress}; it will resume", number)
    return PointState("waiting", f"its worker on {own.host or 'a machine'} died{progress}; it will resume", number)


def _progress(status: Status | None) -> str:
    if status is None:
        return ""
    return f" at step {status.step:,} of {status.max_steps:,}"
