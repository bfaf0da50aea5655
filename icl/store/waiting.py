"""Run calls that may hang. Each call runs in a separate thread, and we give up on the call after some time without progress.

A time limit of the socket is not enough, because a server may send a byte from time to time. A limit on the total time would be wrong
too, because a large file may need an hour. So we limit the time without progress. Progress means an answer, or at least
`_ENOUGH_BYTES` bytes. The function `moved` records progress for the whole process.
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
"""Number of bytes that count as progress. At about one kilobyte per second, these bytes arrive within `SECONDS`."""
_POLL_SECONDS = 0.05

Result = TypeVar("Result")


class StalledError(Exception):
    """Raised if we give up on a call: it made no progress, or the program was interrupted. The call may still be running."""


class _Progress:
    """Time of the last progress, the number of bytes since then, and whether the notice was printed since then."""

    def __init__(self) -> None:
        self.at = time.monotonic()
        self.num_bytes = 0
        self.was_told = False
        self.lock = threading.Lock()


_progress = _Progress()
_thread = threading.local()
_is_given_up = threading.Event()
_left: list[threading.Thread] = []
"""Threads of the calls on which we gave up."""


def moved(num_bytes: int = _ENOUGH_BYTES) -> None:
    """Record progress: some bytes, or by default a finished piece of work."""
    with _progress.lock:
        _progress.num_bytes += num_bytes
        if _progress.num_bytes >= _ENOUGH_BYTES:
            _progress.at, _progress.num_bytes, _progress.was_told = time.monotonic(), 0, False


@contextlib.contextmanager
def giving_up() -> Iterator[None]:
    """While the context is open, give up at once on all calls of this process. Use this after the user has interrupted the program."""
    _is_given_up.set()
    try:
        yield
    finally:
        _is_given_up.clear()


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """While the context is open, do not print what this thread waits for. Use this in threads that work in the background."""
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
        seconds: Seconds without progress after which to give up. The default is `SECONDS`.
        awaited: Name of the thing that the program waits for, printed after `NOTICE_SECONDS`. If it is empty, nothing is printed.
        is_stopped: Function that returns whether to give up at once. It is called many times a second.

    Raises:
        StalledError: If we gave up on the call. The thread of the call continues, but does not keep the program from ending.
    """
    seconds = SECONDS if seconds is None else seconds
    future: Future[Result] = Future()

    def work() -> None:
        try:
            future.set_result(act())
        except BaseException as error:
            future.set_exception(error)

    began = time.monotonic()
    # At exit, Python waits for the threads of a pool, but not for a daemon thread.
    thread = threading.Thread(target=work, name="icl-waiting", daemon=True)
    thread.start()
    try:
        while not wait([future], _POLL_SECONDS).done:
            idle = time.monotonic() - max(began, _progress.at)
            if is_stopped() or _is_given_up.is_set() or idle >= seconds:
                raise StalledError
            is_silent = getattr(_thread, "is_silent", False)
            if awaited and idle >= NOTICE_SECONDS and not _progress.was_told and not is_silent:
                _progress.was_told = True
                print(f"icl: waiting for {awaited}; giving up after {seconds:.0f} s without progress.", file=sys.stderr)
    except BaseException:  # such as KeyboardInterrupt
        _left.append(thread)
        raise
    return future.result()


def require_awaited() -> None:
    """Raise an error if this thread is the thread of a call on which we gave up. Call this before a request is sent or repeated.

    Otherwise, an old write could be repeated after a newer write of the same file, and undo the newer write.

    Raises:
        StalledError: If we gave up on the call.
    """
    if threading.current_thread() in _left:
        raise StalledError


def would_block_exit() -> bool:
    """Return whether Python, at exit, would wait for a call on which we gave up.

    Python waits for a call that still runs and uses a thread pool. For example, the client of the Hugging Face Hub sends files with a
    thread pool. If the Hub does not answer, the threads of this pool run for minutes.
    """
    has_pool = any(thread.name.startswith("ThreadPoolExecutor") for thread in threading.enumerate())
    return has_pool and any(thread.is_alive() for thread in _left)
