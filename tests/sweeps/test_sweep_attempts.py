"""Claims of a sweep's points: only one worker works on a point, whatever other workers race, die or pause."""

import errno
import json
import math
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict

import pytest

from icl.sweeps.attempts import Attempt, Claim, claim, is_alive, last_attempt, next_file, session_start


def elsewhere(folder, *, age, number=1, **fields) -> None:
    """Return the file of an attempt on another machine, which was last refreshed some seconds ago."""
    path = folder / "attempts" / f"{number:06d}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    attempt = Attempt(number=number, job="job", host="far", kernel="far:boot", locked=True, **fields)
    path.write_text(json.dumps(asdict(attempt)))
    os.utime(path, (time.time() - age, time.time() - age))


def take(folder) -> Claim | None:
    """Return a claim of the next attempt at a point, or None if another worker works on the point."""
    last = last_attempt(folder)
    if last is not None and is_alive(folder, last):
        return None
    return claim(folder, "job", number=last.number + 1 if last else 1)


def race(folder, num=12) -> list[Claim]:
    """Return the claims that succeed when several are made at once."""
    won, barrier = [], threading.Barrier(num)

    def attempt():
        barrier.wait()
        own = take(folder)
        if own is not None:
            won.append(own)

    threads = [threading.Thread(target=attempt) for _ in range(num)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return won


def test_a_claimed_point_is_not_claimed_again_until_its_attempt_ends(tmp_path):
    own = take(tmp_path)
    assert own is not None
    assert take(tmp_path) is None
    own.finish("failed", exit_status=3, reason="why")
    last = last_attempt(tmp_path)
    assert (last.number, last.outcome, last.exit_status, last.reason) == (1, "failed", 3, "why")
    again = take(tmp_path)
    assert again is not None
    assert again.attempt.number == 2
    again.finish("done")


def test_who_looked_before_another_worker_came_and_went_gets_nothing(tmp_path):
    own = claim(tmp_path, "job", number=1)
    own.finish("done")
    assert claim(tmp_path, "job", number=1) is None


@pytest.mark.parametrize("repeat", range(5))
def test_of_many_at_once_one_wins(tmp_path, repeat):
    (own,) = race(tmp_path)
    own.finish("done")


@pytest.mark.parametrize("repeat", range(5))
def test_of_many_that_take_over_a_dead_attempt_one_wins(tmp_path, repeat):
    elsewhere(tmp_path, age=120)
    (own,) = race(tmp_path)
    assert own.attempt.number == 2
    own.finish("done")


@pytest.mark.parametrize(("age", "is_free"), [(1, False), (50, False), (70, True)])
def test_another_machines_attempt_counts_until_its_heartbeat_stops(tmp_path, age, is_free):
    elsewhere(tmp_path, age=age)
    own = take(tmp_path)
    assert (own is not None) is is_free
    if own is not None:
        own.finish("done")


def test_a_heartbeat_keeps_an_attempt_alive_and_notices_that_it_was_taken_over(tmp_path):
    own = take(tmp_path)
    os.utime(own.path, (0, 0))
    assert own.beat()
    assert time.time() - own.path.stat().st_mtime < 5
    elsewhere(tmp_path, age=0, number=2)
    assert not own.beat()
    own.finish("failed")
    assert last_attempt(tmp_path).number == 2


def test_on_one_machine_a_lock_tells_at_once_that_a_worker_died(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from icl.sweeps.attempts import claim\n"
        "own = claim(Path(sys.argv[1]), 'job', number=1); print('claimed', flush=True); time.sleep(60)"
    )
    worker = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert worker.stdout.readline() == b"claimed\n"
    os.utime(tmp_path / "attempts" / "000001.json", (0, 0))  # a slow heartbeat is no death here
    assert take(tmp_path) is None
    worker.kill()
    worker.communicate()
    own = take(tmp_path)
    assert own is not None
    own.finish("done")


def test_a_program_that_outlives_its_worker_keeps_the_point(tmp_path):
    own = take(tmp_path)
    program = subprocess.Popen(["sleep", "60"], pass_fds=(own.descriptor,))
    os.close(own.descriptor)
    assert is_alive(tmp_path, last_attempt(tmp_path))
    program.kill()
    program.wait()
    assert not is_alive(tmp_path, last_attempt(tmp_path))


def test_a_claim_on_a_full_disk_leaves_no_open_file(tmp_path, monkeypatch):
    opened = []

    def fail(descriptor: int, data: bytes) -> int:
        opened.append(descriptor)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", fail)
    with pytest.raises(OSError, match="No space"):
        claim(tmp_path, "job", number=1)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened[0])


def test_a_file_that_is_just_being_written_is_somebodys(tmp_path):
    path = tmp_path / "attempts" / "000001.json"
    path.parent.mkdir()
    path.write_text('{"numb')
    assert take(tmp_path) is None
    os.utime(path, (0, 0))
    own = take(tmp_path)
    assert own is not None
    own.finish("done")


def test_the_last_attempt_at_one_job(tmp_path):
    for number, job in enumerate(["a", "b", "b", "c"], start=1):
        own = claim(tmp_path, job, number=number)
        assert own.attempt.number == number
        assert next_file(own.path).name == f"{number + 1:06d}.json"
        own.finish("done")
    assert last_attempt(tmp_path, "b").number == 3
    assert last_attempt(tmp_path, "a").number == 1
    assert last_attempt(tmp_path, "d") is None


def span(started, ended=None):
    return Attempt(number=1, job="job", started=float(started), ended=None if ended is None else float(ended))


@pytest.mark.parametrize(
    ("live", "over", "start"),
    [
        ([], [span(1, 2)], math.inf),
        ([span(100)], [], 100),
        ([span(100), span(90)], [span(80, 99), span(60, 79), span(10, 50)], 60),  # a pause of ten seconds
        ([span(100)], [span(10, 200), span(1, 9), span(90, 95)], 1),
        ([span(0)], [span(10, 20)], math.inf),  # a file that is just being written says no time
    ],
)
def test_a_session_is_a_chain_of_attempts_without_a_pause_that_reaches_to_now(live, over, start):
    assert session_start(live, over) == start
