"""Temporary signal handlers for a piece of work.

Training, uploads, sweeps and experiments respond to Ctrl-C and SIGTERM in different ways. All of them use `handling`, which restores
the previous handlers at the end. So when an inner piece of work has ended, the handlers of the outer work are in use again.

If a W&B sweep has started this program to train one combination of settings, the program must tell W&B how its run ended. It cannot do so
before it has joined the sweep. Until then, the handler `defer` stores signals in the list `deferred`.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import TypeAlias

Handler: TypeAlias = Callable[[int, FrameType | None], object]

deferred: list[signal.Signals] = []
"""Signals that `defer` has handled, in the order of their arrival."""


def defer(number: int, frame: FrameType | None) -> None:
    """Handle a signal by appending it to `deferred`. The program continues."""
    deferred.append(signal.Signals(number))


@contextlib.contextmanager
def handling(handlers: Mapping[signal.Signals, Handler]) -> Iterator[None]:
    """Use these signal handlers while the body of the `with` statement runs.

    Python handles signals only in the main thread, so this function does nothing in another thread. A signal that was already
    ignored when the program started, for example because of `nohup`, is still ignored.
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
            signal.signal(number, signal.SIG_DFL if former is None else former)  # None: Python did not set it
