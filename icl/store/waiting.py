"""Calls that may hang: made on a thread of their own, and given up once nothing has moved for a while.

A time limit of a socket does not help against a server that sends a byte now and then, and a large file may rightly take an
hour. So what counts is progress: an answer, or enough bytes. It is counted once for the whole process, by `moved`.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from typing import TypeVar

SECONDS = 60.0
"""Seconds without progress after which a call is given up."""
NOTICE_SECONDS = 2.0
"""Seconds without progress after which a person is told what is waited for."""
_ENOUGH_BYTES = 2**16
"""Bytes that count as progress: about a kilobyte a second."""
_POLL_SECONDS = 0.05

Result = TypeVar("Result")


class StalledError(Exception):
    """Nothing has moved for too long, or the waiting was stopped; the call may hang still."""


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
    """Count progress: so many bytes, or a whole piece of work."""
    with _progress.lock:
        _progress.num_bytes += num_bytes
        if _progress.num_bytes >= _ENOUGH_BYTES:
            _progress.at, _progress.num_bytes, _progress.was_told = time.monotonic(), 0, False


@contextlib.contextmanager
def giving_up() -> Iterator[None]:
    """Let everything that this process waits for be given up at once: the user has interrupted it."""
    _is_given_up.set()
    try:
        yield
    finally:
        _is_given_up.clear()


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Say nothing of what this thread waits for: it works behind the scenes."""
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
    """Return the result of a call, or its exception.

    Args:
        act: The call.
        seconds: Without progress after which it is given up; left out, `SECONDS`.
        awaited: What to tell a person after `NOTICE_SECONDS` that the program waits for; nothing if empty.
        is_stopped: Asked all the time, whether to give up at once.

    Raises:
        StalledError: If it was given up. Its thread goes on, and does not keep the program from ending.
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
