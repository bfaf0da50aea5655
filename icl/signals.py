"""Handlers of signals for the length of a piece of work.

Training, uploads, sweeps and experiments each answer Ctrl-C and SIGTERM in their own way. All of them listen through
`handling`, which puts the handlers of before back, so a piece of work within another one hands the signals back to it.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import TypeAlias

Handler: TypeAlias = Callable[[int, FrameType | None], object]


@contextlib.contextmanager
def handling(handlers: Mapping[signal.Signals, Handler]) -> Iterator[None]:
    """Handle signals in this way while the body runs.

    Python handles signals in the main thread only, so in another thread nothing changes. A signal that the user told the
    program to ignore, as `nohup` does, stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in handlers}
    for number, handler in handlers.items():
        if before[number] is not signal.SIG_IGN:
            signal.signal(number, handler)
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, signal.SIG_DFL if former is None else former)  # None: not set by Python
