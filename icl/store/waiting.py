"""Calls that may hang. Each runs on its own thread, and we give up on it after some time without progress.

A time limit of a socket does not help against a server that sends a byte now and then, and a large file may need an hour. So
the limit applies to progress: an answer, or enough bytes. `moved` records progress for the whole process.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from typing import TypeVar

SECONDS = 60.0
"""Seconds without progress after which we give up on a call."""
NOTICE_SECONDS = 2.0
"""Seconds without progress after which we print what the program waits for."""
_ENOUGH_BYTES = 2**16
"""Number of bytes that count as progress. This many bytes within `SECONDS` are about a kilobyte per second."""
_POLL_SECONDS = 0.05

Result = TypeVar("Result")


class StalledError(Exception):
    """Call that we gave up on, because it made no progress for too long or the program was interrupted. It may still be running."""


class _Progress:
    """Time of the last progress."""

    def __init__(self) -> None:
        self.at = time.monotonic()
        self.num_bytes = 0
        self.was_told = False
        self.lock = threading.Lock()


_progress = _Progress()
_thread = threading.local()
_is_given_up = threading.Event()


def moved(num_bytes: int = _ENOUGH_BYTES) -> None:
    """Record progress: a number of bytes, or by default a whole piece of work."""
    with _progress.lock:
        _progress.num_bytes += num_bytes
        if _progress.num_bytes >= _ENOUGH_BYTES:
            _progress.at, _progress.num_bytes, _progress.was_told = time.monotonic(), 0, False


@contextlib.contextmanager
def giving_up() -> Iterator[None]:
    """Give up on all calls of this process at once, because the user has interrupted it."""
    _is_given_up.set()
    try:
        yield
    finally:
        _is_given_up.clear()


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Print no notices about what this thread waits for, because it works in the background."""
    _thread.is_silent = True
    try:
        yield
    finally:
        _thread.is_silent = False


def await_result(
    act: Callable[[], Result],
    *,
    seconds: float | None = None,
    awaited: str = "",
    is_stopped: Callable[[], bool] = lambda: False,
) -> Result:
    """Return the result of a call, or raise the call's exception.

    Args:
        act: The call.
        seconds: Seconds without progress after which to give up. By default `SECONDS`.
        awaited: Name of what the program waits for, printed after `NOTICE_SECONDS`. If empty, nothing is printed.
        is_stopped: Function that returns whether to give up at once. It is called many times a second.

    Raises:
        StalledError: If the call was given up. Its thread continues, but does not keep the program from ending.
    """
    seconds = SECONDS if seconds is None else seconds
    future: Future[Result] = Future()

    def work() -> None:
        try:
            future.set_result(act())
        except BaseException as error:
            future.set_exception(error)

    began = time.monotonic()
    # A thread of a pool would keep the program from ending.
    threading.Thread(target=work, name="icl-waiting", daemon=True).start()
    while not wait([future], _POLL_SECONDS).done:
        idle = time.monotonic() - max(began, _progress.at)
        if is_stopped() or _is_given_up.is_set() or idle >= seconds:
            raise StalledError
        if awaited and idle >= NOTICE_SECONDS and not _progress.was_told and not getattr(_thread, "is_silent", False):
            _progress.was_told = True
            print(f"icl: waiting for {awaited}; giving up after {seconds:.0f} s without progress.", file=sys.stderr)
    return future.result()
