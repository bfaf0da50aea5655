"""Signal handlers are installed for a piece of work, and the former handlers are restored afterwards."""

import os
import signal
import threading

import pytest

from icl.signals import handling


def test_a_signal_reaches_the_innermost_work_and_is_handed_back():
    outer, inner = [], []
    before = signal.getsignal(signal.SIGUSR1)
    with handling({signal.SIGUSR1: lambda number, frame: outer.append(number)}):
        with handling({signal.SIGUSR1: lambda number, frame: inner.append(number)}):
            os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR1)
    assert (outer, inner) == ([signal.SIGUSR1], [signal.SIGUSR1])
    assert signal.getsignal(signal.SIGUSR1) is before


def test_an_error_hands_the_signals_back():
    before = signal.getsignal(signal.SIGUSR1)
    with pytest.raises(KeyboardInterrupt), handling({signal.SIGUSR1: signal.default_int_handler}):
        os.kill(os.getpid(), signal.SIGUSR1)
    assert signal.getsignal(signal.SIGUSR1) is before


def test_what_the_user_told_us_to_ignore_stays_ignored(monkeypatch):
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with handling({signal.SIGUSR1: signal.default_int_handler}):
            os.kill(os.getpid(), signal.SIGUSR1)
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_in_another_thread_nothing_changes():
    seen = []

    def work():
        with handling({signal.SIGUSR1: signal.default_int_handler}):
            seen.append(signal.getsignal(signal.SIGUSR1))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGUSR1)]
