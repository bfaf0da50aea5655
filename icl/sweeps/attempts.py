"""Record each attempt at a sweep's point as a numbered file in the run's folder. The file shows which worker runs the point.

A point is one combination of the sweep's settings. A worker is a process of `icl sweep`, which starts a program for a point.

Only the attempt with the highest number counts. Once the previous attempt has ended or its worker has died, another worker can
begin an attempt: it creates the file with the next number. The creation is exclusive, so only one process can succeed. Files are
never deleted, so no number is used twice. If a worker was considered dead by mistake, it finds a file with a higher number. So it knows
that another worker has taken over the point. There are two ways to check whether an attempt is alive:

- On the machine of the attempt, check whether its file is locked. The worker and its program keep the lock until both have ended.
- On any other machine, check whether the file was modified recently, because the worker refreshes the file every few seconds. The file
  server gives both the time of the modification and the current time, so the clocks of the machines need not agree.
"""

import contextlib
import json
import math
import os
import platform
import secrets
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from icl.config.validation import typed_record
from icl.files.reading import ContentError, parse_json, read_bytes
from icl.files.system import LockedError, lock_file
from icl.files.writing import write_atomically

Outcome = Literal["running", "done", "failed", "preempted"]

BEAT_SECONDS = 5.0
"""Seconds between two refreshes of an attempt's file by its worker."""
STALE_SECONDS = 60.0
"""Seconds without a refresh after which an attempt on another machine counts as dead."""
_PAUSE_SECONDS = 5.0
"""Longest pause, in seconds, between two attempts of one session (`session_start`). A worker pauses only for milliseconds between two
attempts, but the clocks of different machines may differ by seconds."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One attempt at a point, with the facts that its file records."""

    number: int
    job: str
    """`Point.job` of the attempt: a hash of the command and of the settings that affect the result."""
    outcome: Outcome = "running"
    reason: str | None = None
    exit_status: int | None = None
    host: str = ""
    kernel: str = ""
    """Identifier of the machine, which changes when the machine boots. Processes with the same identifier see each other's locks."""
    locked: bool = False
    """Whether the file system supports locks."""
    pid: int = 0
    started: float = 0.0
    ended: float | None = None


class Claim:
    """An attempt of this process at a point. Call `beat` at intervals to keep the attempt alive, and `finish` to end it."""

    def __init__(self, path: Path, descriptor: int, attempt: Attempt) -> None:
        self.path, self.descriptor, self.attempt = path, descriptor, attempt
        self.folder = path.parents[1]  # the folder of the run

    def beat(self) -> bool:
        """Refresh the file of the attempt. Return False if another worker has taken over the point."""
        with contextlib.suppress(OSError):  # a file server may be unreachable for a while
            os.utime(self.descriptor)
        return not next_file(self.path).exists()

    def finish(self, outcome: Outcome, *, exit_status: int | None = None, reason: str | None = None) -> None:
        """Record in the attempt's file how the attempt ended, and release the lock. Other workers can then claim the point.

        Raises:
            StorageError: If the file cannot be written.
        """
        now = round(time.time(), 3)
        attempt = replace(self.attempt, outcome=outcome, exit_status=exit_status, reason=reason, ended=now)
        try:
            write_atomically(self.path, _encode(attempt))
        finally:
            os.close(self.descriptor)


def claim(folder: Path, job: str, *, number: int) -> Claim | None:
    """Begin an attempt at a point. Return None if another process has begun the attempt with this number.

    Args:
        folder: Folder of the run.
        job: `Point.job` of the attempt.
        number: Number of the last attempt plus one. The last attempt must have ended, or its worker must have died. If the claim
            succeeds, no other process has begun an attempt since the caller read that number.

    Raises:
        OSError: If the folder cannot be written.
    """
    (folder / "attempts").mkdir(parents=True, exist_ok=True)
    path = _file(folder, number)
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o644)
    except FileExistsError:
        return None
    try:
        attempt = Attempt(
            number=number,
            job=job,
            host=platform.node(),
            kernel=_kernel(),
            locked=lock_file(descriptor, path.parent),
            pid=os.getpid(),
            started=round(time.time(), 3),
        )
        os.write(descriptor, _encode(attempt))  # after locking, so that every reader of the file can rely on the lock
    except OSError:
        os.close(descriptor)
        raise
    return Claim(path, descriptor, attempt)


def last_attempt(folder: Path, job: str | None = None) -> Attempt | None:
    """Return the last attempt in a run's folder, or None if there is none. If `job` is given, ignore attempts with a different `job`."""
    files = sorted((file for file in (folder / "attempts").glob("*.json") if file.stem.isdecimal()), reverse=True)
    attempts = (_read(file) for file in files)
    return next((attempt for attempt in attempts if job is None or attempt.job == job), None)


def is_alive(folder: Path, attempt: Attempt) -> bool:
    """Return whether the worker of an attempt is still working on it."""
    if attempt.outcome != "running":
        return False
    path = _file(folder, attempt.number)
    # Opening the file makes a network file system ask its server for the current modification time.
    with path.open() as file:
        if attempt.locked and attempt.kernel == _kernel():
            try:
                if lock_file(file.fileno(), path.parent, shared=True):
                    return False
            except LockedError:
                return True
        return _server_time(path.parent) - os.fstat(file.fileno()).st_mtime < STALE_SECONDS


def session_start(live: Iterable[Attempt], ended: Iterable[Attempt]) -> float:
    """Return the time at which the current session began.

    A session is a series of attempts that continues until now, without a pause of more than `_PAUSE_SECONDS`.

    Args:
        live: Attempts whose workers are still working. If `live` is empty, there is no current session, and the result
            is infinity.
        ended: Attempts that have ended.
    """
    start = min((attempt.started for attempt in live if attempt.started), default=math.inf)
    for attempt in sorted(ended, key=lambda attempt: attempt.ended or 0.0, reverse=True):
        if (attempt.ended or 0.0) < start - _PAUSE_SECONDS:
            break
        start = min(start, attempt.started)
    return start


def next_file(path: Path) -> Path:
    """Return the path of the next attempt's file. `path` is the file of an attempt."""
    return path.with_name(f"{int(path.stem) + 1:06d}.json")


def _file(folder: Path, number: int) -> Path:
    return folder / "attempts" / f"{number:06d}.json"


def _read(path: Path) -> Attempt:
    """Return the attempt that a file describes.

    If the file is damaged or not complete yet, only the attempt's number is known, and the attempt counts as running.
    """
    number, attempt = int(path.stem), None
    with contextlib.suppress(ContentError, OSError):
        attempt = typed_record(Attempt, parse_json(read_bytes(path)))
    return attempt if attempt is not None and attempt.number == number else Attempt(number=number, job="")


def _encode(attempt: Attempt) -> bytes:
    return (json.dumps(asdict(attempt), indent=1) + "\n").encode()


def _kernel() -> str:
    """Return an identifier of this machine, which changes when the machine boots."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    return f"{platform.node()}:{boot}"


def _server_time(folder: Path) -> float:
    """Return the current time on the clock of the file server, from the modification time of a new file."""
    probe = folder / f".clock-{secrets.token_hex(4)}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:  # the folder cannot be written, for example because the sweep belongs to another user
        return time.time()
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
