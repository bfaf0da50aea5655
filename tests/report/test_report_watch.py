"""`icl report --watch`: one page that follows the runs, is never half written, and ends with them."""

import contextlib
import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tiny_runs import TINY, as_arguments, change

from icl.cli import main
from icl.report import watch as watching_module
from icl.report.watch import watch
from icl.runs.folder import RunFolder, local_root
from icl.training.run import train

SHORT = change(TINY, trainer={"max_steps": 20})
REFRESH = '<meta http-equiv="refresh" content="1">'


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> RunFolder:
    return train(SHORT, folder=tmp_path_factory.mktemp("watched") / "tiny").folder


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """Do not wait longer because this machine is slow."""
    monkeypatch.setattr(watching_module, "_SHARE", 0.0)


def write_state(run: RunFolder, **fields: object) -> None:
    status = run.read_status()
    assert status is not None
    run.write_status(dataclasses.replace(status, **fields))


def wait_for_text(page: Path, pattern: str) -> str:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            text = page.read_text()
            assert text.rstrip().endswith("</html>")  # never half a page
            if re.search(pattern, text):
                return text
        time.sleep(0.05)
    raise AssertionError(f"the page never had {pattern}")


@pytest.mark.slow
def test_a_page_follows_a_run_until_it_has_ended(finished):
    write_state(finished, state="running", step=7)
    page = finished.path / "report.html"
    said: list[str] = []
    results: list = []
    thread = threading.Thread(
        target=lambda: results.append(watch([finished.path], seconds=0.5, say=said.append)), daemon=True
    )
    thread.start()
    assert REFRESH in wait_for_text(page, r"\b7 of 20")
    write_state(finished, state="running", step=13)
    assert REFRESH in wait_for_text(page, r"\b13 of 20")
    write_state(finished, state="finished", step=20)
    thread.join(60)
    assert not thread.is_alive()
    text = page.read_text()
    assert "refresh" not in text
    assert results[0][1] is None
    assert len(said) == 1
    assert list(finished.path.glob(".tmp-*")) == []


@pytest.mark.slow
def test_a_folder_without_runs_is_waited_for_and_new_runs_join(finished, tmp_path):
    said: list[str] = []
    page = tmp_path / "report.html"
    thread = threading.Thread(
        target=lambda: watch([tmp_path], seconds=0.2, quiet_seconds=3.0, say=said.append), daemon=True
    )
    thread.start()
    while not said:
        time.sleep(0.05)
    assert "no runs below it" in said[0]
    write_state(finished, state="finished", step=20)
    shutil.copytree(finished.path, tmp_path / "a")
    wait_for_text(page, "1 run in")
    shutil.copytree(finished.path, tmp_path / "b")
    thread.join(60)
    assert not thread.is_alive()
    assert said[1].startswith(f"Report  {page}")


def test_a_page_that_cannot_be_written_is_an_error(finished, tmp_path, capsys):
    assert main(["report", str(finished.path), "--watch", "--out", str(tmp_path / "page.csv")]) == 1
    assert "must end in .html or .htm" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_follows_real_training_and_ends_on_a_signal():
    config = change(TINY, trainer={"max_steps": 3000, "log_every": 10}, evaluation={"every": 500})
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    training = subprocess.Popen([sys.executable, "-m", "icl", "train", *as_arguments(config)], env=environment)
    local_root().mkdir(exist_ok=True)
    command = [sys.executable, "-m", "icl", "report", str(local_root()), "--watch"]
    watching = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        wait_for_text(local_root() / "report.html", "running")
        assert training.wait(300) == 0
        wait_for_text(local_root() / "report.html", "finished")
    finally:
        training.kill()
        watching.send_signal(signal.SIGTERM)
    said, _ = watching.communicate(timeout=60)
    assert watching.returncode == 143
    assert "updated when the runs change" in said
