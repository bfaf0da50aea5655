"""W&B logging with the real client, offline; a run never depends on W&B."""

import dataclasses
import pwd
import subprocess
import sys
from typing import ClassVar

import pandas as pd
import pytest
from tiny_runs import TINY, as_arguments, change

from icl.cli import llc_output
from icl.runs.folder import RunFolder, local_root
from icl.training import run as run_module
from icl.training.run import train
from icl.training.wandb import agent
from icl.training.wandb import log as wandb_log
from icl.training.wandb.log import WandbLog, start_wandb, wandb_mode

CONFIG = change(TINY, trainer={"max_steps": 20})

KILLS_WANDB = """
import os, pathlib, signal, sys, time
from icl.cli import main
from icl.training.wandb.log import WandbLog
log = WandbLog.log
def killing(self, row):
    if row["step"] == 10:
        for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
            name, _, rest = stat.read_text().rpartition(")")
            if "wandb" in name and int(rest.split()[1]) == os.getpid():
                os.kill(int(stat.parent.name), signal.SIGKILL)
                print("killed")
        time.sleep(1)
    log(self, row)
WandbLog.log = killing
sys.exit(main({arguments!r}))
"""


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """Unset the mode, the key and the login of W&B."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return tmp_path / "netrc"


def test_nothing_set_up_means_no_wandb(nowhere):
    assert wandb_mode() is None
    train(CONFIG)
    assert not (local_root() / "tiny" / "wandb").exists()


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("online", "online"), ("offline", "offline"), ("disabled", None), ("run", "online"), ("shared", "online")],
)
def test_the_mode_is_the_environments(nowhere, monkeypatch, mode, expected):
    monkeypatch.setenv("WANDB_MODE", mode)
    assert wandb_mode() == expected


def test_a_key_or_a_login_means_online_and_disabled_wins(nowhere, monkeypatch):
    nowhere.write_text("machine api.wandb.ai login user password secret\n")
    assert wandb_mode() == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.com")
    assert wandb_mode() is None
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert wandb_mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode() is None


def test_without_a_home_folder_wandb_is_left_out_in_a_sentence(nowhere, monkeypatch, capsys):
    def unknown(_: int) -> None:
        raise KeyError("no such user")

    monkeypatch.delenv("HOME")
    monkeypatch.delenv("NETRC")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert wandb_mode() is None
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert start_wandb(CONFIG, RunFolder(nowhere.parent)) is None
    told = capsys.readouterr().err
    assert told == "W&B is not used, because it needs a home folder and none is known. Set HOME to use it.\n"


def test_a_client_that_fails_in_every_way_stops_no_run(nowhere, monkeypatch, capsys):
    def fail(*_: object) -> None:
        raise RuntimeError("no such luck\nand more")

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(wandb_log, "_init", fail)
    monkeypatch.setattr(wandb_log, "_is_unreachable", False)
    assert start_wandb(CONFIG, RunFolder(nowhere.parent)) is None
    told = capsys.readouterr().err
    assert told.count("no such luck") == told.count("\n") == 2


@pytest.mark.slow
def test_an_offline_run_keeps_its_rows_in_its_own_folder(nowhere, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    done = subprocess.run([sys.executable, "-m", "icl", "train", *as_arguments(CONFIG)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder = RunFolder(local_root() / "tiny")
    files = list((folder.path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 1
    assert b"eval/pretrain/loss" in files[0].read_bytes()
    assert (folder.path / "wandb-id").read_text() in files[0].name


@pytest.mark.slow
def test_a_backend_that_is_not_there_is_one_sentence_and_the_run_finishes_offline(nowhere, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    done = subprocess.run([sys.executable, "-m", "icl", "train", *as_arguments(CONFIG)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("W&B could not start online") == 1
    assert list((local_root() / "tiny" / "wandb").glob("offline-run-*"))


class LostRun:
    """A W&B run whose helper process was killed."""

    summary: ClassVar = {}
    dir = "/nowhere/files"

    def __init__(self) -> None:
        self.calls: list[str] = []

    def _fail(self, name: str) -> None:
        self.calls.append(name)
        raise ConnectionResetError("Connection lost")

    def log(self, row):
        """Fail, as `wandb` does."""
        self._fail("log")

    def mark_preempting(self):
        """Fail, as `wandb` does."""
        self._fail("mark_preempting")

    def finish(self, exit_code):
        """Fail, as `wandb` does."""
        self._fail("finish")


def test_a_client_that_is_lost_during_training_stops_no_run_and_is_one_sentence(nowhere, monkeypatch, capsys):
    monkeypatch.setattr(wandb_log, "_said_failures", set())
    monkeypatch.setattr(wandb_log, "_has_unsent_rows", False)
    runs: list[LostRun] = []

    def start(member, step, wandb_run):
        runs.append(LostRun())
        return [WandbLog(runs[-1])]

    monkeypatch.setattr(run_module, "start_loggers", start)
    configs = [dataclasses.replace(change(CONFIG, seeds={"model": seed}), run_name=f"run{seed}") for seed in range(2)]
    assert [result.status.state for result in run_module.train_population(configs)] == ["finished"] * 2
    assert [run.calls for run in runs] == [["log", "finish"]] * 2
    told = capsys.readouterr().err
    assert told.count("W&B failed (Connection lost), so it lacks the rows from here on. Training goes on") == 1
    assert wandb_log.has_unsent_rows()  # so that `icl.cli` does not run W&B's exit handlers, which would raise errors


def test_a_client_that_is_lost_before_training_stops_no_point_of_a_sweep(nowhere, monkeypatch, capsys):
    monkeypatch.setattr(wandb_log, "_said_failures", set())
    metrics = nowhere.parent / "metrics.csv"
    metrics.write_text("step,train/loss\n10,2.5\n20,2.25\n")
    run = LostRun()
    agent.describe_run(run, CONFIG)
    agent.replay(run, metrics, 20)
    assert run.calls == ["log"]
    told = capsys.readouterr().err
    assert told.count("W&B failed") == told.count("\n") == 2
    lost = LostRun()
    llc_output.log_rows(lost, pd.DataFrame([dict.fromkeys(("step", *llc_output._LOGGED_COLUMNS), 1.0)] * 2))
    assert lost.calls == ["log"]


def test_a_lost_client_cannot_be_told_that_a_run_was_preempted(monkeypatch, capsys):
    monkeypatch.setattr(wandb_log, "_said_failures", set())
    monkeypatch.setattr(wandb_log, "_has_unsent_rows", False)
    run = LostRun()
    wandb_log.end_run(run, 128 + 15)
    assert run.calls == ["mark_preempting"]
    assert capsys.readouterr().err.count("W&B failed") == 1


@pytest.mark.slow
def test_a_run_goes_on_if_the_helper_process_of_wandb_is_killed(nowhere, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    done = subprocess.run(
        [sys.executable, "-c", KILLS_WANDB.format(arguments=["train", *as_arguments(CONFIG)])],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "killed" in done.stdout
    assert done.stderr.count("W&B failed") == 1
    assert "Traceback" not in done.stderr


def test_rows_that_wandb_has_are_not_sent_again():
    class Run:
        summary: ClassVar = {"step": 20}
        rows: ClassVar = []

        def log(self, row):
            self.rows.append(row)

    log = WandbLog(Run())
    for step in (10, 20, 30):
        log.log({"step": step})
    assert Run.rows == [{"step": 30}]
