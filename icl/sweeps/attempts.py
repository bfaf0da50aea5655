"""Who works on a point: numbered attempts in its run's folder, one file each, of which the highest counts.

An attempt is begun by creating the next number's file exclusively, which one process in the world can do, and only once
the attempt before it is over: ended, or dead. Files are never deleted, so a number is never held twice, and a worker that
was only slow sees from the higher number that its point was taken over. Whether an attempt lives is asked in two ways:

- on the machine it runs on, by a lock that the worker and the program it started hold until both are gone;
- elsewhere, by the file's time, which the worker refreshes (both times are the file server's, so clocks need not agree).
"""

import contextlib
import json
import math
import os
import platform
import secrets
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

from icl.file_system import LockedError, lock_file
from icl.reading import ContentError, parse_json, read_bytes
from icl.storage import write_atomically
from icl.validation import has_type

Outcome = Literal["running", "done", "failed", "preempted"]

BEAT_SECONDS = 5.0
"""Between two refreshings of a live attempt's file."""
STALE_SECONDS = 60.0
"""After which an attempt on another machine counts as dead."""
_PAUSE_SECONDS = 5.0
"""Longest time between two attempts of one session: engines need milliseconds, and clocks differ by seconds."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One try at a point, as its file tells it."""

    number: int
    job: str
    """What was tried: `Point.job`."""
    outcome: Outcome = "running"
    reason: str | None = None
    exit_status: int | None = None
    host: str = ""
    kernel: str = ""
    """The running system of a machine, within which locks are seen."""
    locked: bool = False
    """Whether the file system could lock the file."""
    pid: int = 0
    started: float = 0.0
    ended: float | None = None


class Claim:
    """This process's own attempt at a point; keep it alive by `beat` and end it by `finish`."""

    def __init__(self, path: Path, descriptor: int, attempt: Attempt) -> None:
        self.path, self.descriptor, self.attempt = path, descriptor, attempt
        self.folder = path.parents[1]
        """The run's."""

    def beat(self) -> bool:
        """Say that the attempt lives.

        Returns:
            Whether it still counts; not if another worker took it for dead and took the point over.
        """
        with contextlib.suppress(OSError):  # a file server may be away for a while
            os.utime(self.descriptor)
        return not next_file(self.path).exists()

    def finish(self, outcome: Outcome, *, exit_status: int | None = None, reason: str | None = None) -> None:
        """Write how the attempt ended, and let go of the point.

        Raises:
            StorageError: If it cannot be written.
        """
        ended = replace(
            self.attempt, outcome=outcome, exit_status=exit_status, reason=reason, ended=round(time.time(), 3)
        )
        try:
            write_atomically(self.path, _encode(ended))
        finally:
            os.close(self.descriptor)


def claim(folder: Path, job: str, *, number: int) -> Claim | None:
    """Begin an attempt at the point of a run's folder, or None if somebody has begun it before.

    Args:
        folder: Of the run.
        job: What is tried.
        number: One more than that of the last attempt, which the caller has seen to be over. So what the caller knew
            of the point still holds if this succeeds.

    Raises:
        OSError: If the folder cannot be written.
    """
    (folder / "attempts").mkdir(parents=True, exist_ok=True)
    path = _file(folder, number)
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o644)
    except FileExistsError:
        return None
    attempt = Attempt(
        number=number,
        job=job,
        host=platform.node(),
        kernel=_kernel(),
        locked=lock_file(descriptor, path.parent),
        pid=os.getpid(),
        started=round(time.time(), 3),
    )
    os.write(descriptor, _encode(attempt))  # after the lock: whoever can read it can trust the lock
    return Claim(path, descriptor, attempt)


def last_attempt(folder: Path, job: str | None = None) -> Attempt | None:
    """The latest attempt at the point of a run's folder, of one job or of any."""
    files = sorted((file for file in (folder / "attempts").glob("*.json") if file.stem.isdecimal()), reverse=True)
    attempts = (_read(file) for file in files)
    return next((attempt for attempt in attempts if job is None or attempt.job == job), None)


def is_alive(folder: Path, attempt: Attempt, *, stale_after: float = STALE_SECONDS) -> bool:
    """Whether somebody is still working on an attempt."""
    if attempt.outcome != "running":
        return False
    path = _file(folder, attempt.number)
    with path.open() as file:  # opening makes a network file system ask its server
        if attempt.locked and attempt.kernel == _kernel():
            try:
                if lock_file(file.fileno(), path.parent, shared=True):
                    return False
            except LockedError:
                return True
        return _server_time(path.parent) - os.fstat(file.fileno()).st_mtime < stale_after


def session_start(live: Iterable[Attempt], over: Iterable[Attempt]) -> float:
    """Return when the work that is going on began: the start of the chain of attempts, without a pause, that reaches to now.

    Args:
        live: Attempts that somebody works on; without any, no work is going on, and it began at infinity.
        over: Attempts that have ended.
    """
    start = min((attempt.started for attempt in live if attempt.started), default=math.inf)
    for attempt in sorted(over, key=lambda attempt: attempt.ended or 0.0, reverse=True):
        if (attempt.ended or 0.0) < start - _PAUSE_SECONDS:
            break
        start = min(start, attempt.started)
    return start


def next_file(path: Path) -> Path:
    """The file of the attempt after this one."""
    return path.with_name(f"{int(path.stem) + 1:06d}.json")


def _file(folder: Path, number: int) -> Path:
    return folder / "attempts" / f"{number:06d}.json"


def _read(path: Path) -> Attempt:
    """Return the attempt that a file tells of; one that is just being written, or is damaged, is running and says no more."""
    number = int(path.stem)
    try:
        attempt = Attempt(**parse_json(read_bytes(path)))
    except (ContentError, TypeError, OSError):
        return Attempt(number=number, job="")
    is_usable = all(has_type(getattr(attempt, field.name), field.type) for field in fields(Attempt))
    return attempt if is_usable and attempt.number == number else Attempt(number=number, job="")


def _encode(attempt: Attempt) -> bytes:
    return (json.dumps(asdict(attempt), indent=1) + "\n").encode()


def _kernel() -> str:
    """One name for everything that shares this machine's running system."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    return f"{platform.node()}:{boot}"


def _server_time(folder: Path) -> float:
    """The present time by the clock of the machine that holds the files."""
    probe = folder / f".clock-{secrets.token_hex(4)}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:  # only to be looked at
        return time.time()
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
