"""Calls without progress are given up, calls with progress are not, and the user is told about the wait."""

import threading
import time

import pytest

from icl.store import waiting
from icl.store.waiting import StalledError, await_result, moved, silence


@pytest.fixture
def hanging():
    """Return a call that does not end while the test runs."""
    is_over = threading.Event()
    yield is_over.wait
    is_over.set()


def test_the_result_and_the_error_are_those_of_the_call():
    assert await_result(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        await_result(lambda: 1 / 0)


def test_a_call_that_hangs_is_given_up(hanging):
    began = time.monotonic()
    with pytest.raises(StalledError):
        await_result(hanging, seconds=0.2)
    assert time.monotonic() - began < 5


def test_a_call_that_moves_may_take_long():
    def act() -> str:
        for _ in range(12):
            time.sleep(0.1)
            moved()
        return "done"

    assert await_result(act, seconds=0.9) == "done"


def test_a_trickle_is_no_progress(hanging):
    def act() -> None:
        for _ in range(1000):
            if hanging(0.01):
                return
            moved(1)

    began = time.monotonic()
    with pytest.raises(StalledError):
        await_result(act, seconds=0.3)
    assert time.monotonic() - began < 5


def test_waiting_can_be_stopped(hanging):
    with pytest.raises(StalledError):
        await_result(hanging, is_stopped=lambda: True)


def test_a_person_is_told_once_and_threads_behind_the_scenes_say_nothing(hanging, monkeypatch, capsys):
    monkeypatch.setattr(waiting, "NOTICE_SECONDS", 0.1)
    with silence(), pytest.raises(StalledError):
        await_result(hanging, seconds=0.3, awaited="a store")
    assert capsys.readouterr().err == ""
    moved()
    for _ in range(2):
        with pytest.raises(StalledError):
            await_result(hanging, seconds=0.4, awaited="a store")
    assert capsys.readouterr().err == "icl: waiting for a store; giving up after 0 s without progress.\n"
