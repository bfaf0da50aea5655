"""The copy in the store: complete after every ending, never slowing down training, and sufficient to resume elsewhere."""

import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from s3_server import SECRET
from tiny_runs import TINY, as_arguments, change

import icl.cli.train
import icl.plotting.training
from icl.cli import main
from icl.config import RunConfig
from icl.config.validation import ConfigError
from icl.files.writing import StorageError
from icl.plotting.training import DrawnRun
from icl.runs.checkpoints import list_steps, load_step
from icl.runs.copied_files import copied_names
from icl.runs.delivery import send_results
from icl.runs.folder import RunError, RunFolder, local_root
from icl.runs.mirror import open_mirror
from icl.store.base import LocalStore
from icl.store.opening import open_store
from icl.training import upload
from icl.training.run import train
from icl.training.sender import Sender
from icl.training.upload import Uploader, UploadError

SHORT = change(TINY, trainer={"max_steps": 20}, evaluation={"every": None}, checkpoints={"every": 5, "num_log": 0})
SHOW_RUN = icl.cli.train._show_run


@pytest.fixture(autouse=True)
def _impatient(monkeypatch, no_figures):
    monkeypatch.setattr(upload, "PATIENCE", 0.0)
    monkeypatch.setattr(upload, "SECONDS", 0.02)


def stored(config: RunConfig, url: str) -> RunConfig:
    return change(config, checkpoints={"store": url})


def elsewhere(monkeypatch, tmp_path_factory) -> Path:
    """Simulate another machine, with an empty $LOCAL_ROOT."""
    root = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.setenv("LOCAL_ROOT", str(root))
    return root


def assert_copied(run: RunFolder, url: str) -> None:
    here, there = LocalStore(run.path), open_store(url)
    assert copied_names(there) == copied_names(here)
    for name in copied_names(here):
        assert there.read(name) == here.read(name), name


# Whatever the ending, the copy is complete


def test_a_finished_run_is_in_the_store_whole(s3, capsys):
    result = train(stored(SHORT, f"{s3.url}/group"))
    assert_copied(result.folder, f"{s3.url}/group/tiny")
    assert {"run-id", "config.yaml", "last.ckpt", "metrics.csv", "run.log", "status.json"} <= {
        name.rpartition("/")[2] for name in s3.names()
    }
    assert f"Uploaded to {s3.url}/group/tiny." in capsys.readouterr().out


def test_a_folder_is_a_store_too(tmp_path):
    result = train(stored(SHORT, str(tmp_path / "backup")))
    assert_copied(result.folder, str(tmp_path / "backup" / "tiny"))


def test_the_bucket_of_the_environment_is_the_store(s3, monkeypatch):
    monkeypatch.setenv("AWS_BUCKET_NAME", s3.bucket)
    assert_copied(train(SHORT).folder, f"{s3.url}/tiny")


def test_an_early_stop_leaves_the_best_checkpoint_and_not_those_it_replaced(tmp_path):
    config = change(
        TINY,
        evaluation={"every": 7},
        early_stopping={"patience": 4},
        trainer={"max_steps": 400},
        optim={"lr": 5e-2},
        checkpoints={"every": None, "num_log": 2},
    )
    result = train(stored(config, str(tmp_path)))
    assert result.status.state == "stopped_early"
    assert_copied(result.folder, str(tmp_path / "tiny"))


def test_a_failed_run_is_in_the_store_as_far_as_it_came(s3):
    failing = change(SHORT, optim={"lr": 1e30, "grad_clip": None})
    with pytest.raises(RunError, match="NaN"):
        train(stored(failing, s3.url))
    assert_copied(RunFolder(local_root() / "tiny"), f"{s3.url}/tiny")


def test_a_finished_run_asks_for_no_more_than_its_status(s3, proxy):
    config = stored(SHORT, s3.url)
    train(config)
    proxy.requests.clear()
    assert train(config).was_done
    assert len(proxy.requests) < 10
    assert not any(request.startswith("PUT") for request in proxy.requests)


# What is made after training


@pytest.fixture
def _drawn(monkeypatch):
    """Write a table and a figure at the end of training without delay."""

    def draw(folder: RunFolder) -> DrawnRun:
        folder.write_result("losses.csv", "position,model\n")
        LocalStore(folder.figures).write("training.png", b"a figure")
        row = {"model": [1.0], "ridge": [1.0], "bayes_excess": [0.0], "bayes_excess_stderr": [0.0]}
        losses = pd.DataFrame(row, index=["mean"])
        return DrawnRun(losses, folder.figures / "training.png", "ridge")

    monkeypatch.setattr(icl.cli.train, "_show_run", SHOW_RUN)
    monkeypatch.setattr(icl.plotting.training, "draw_run", draw)


@pytest.mark.usefixtures("_drawn")
def test_the_table_and_the_figure_of_training_reach_the_store(s3, capsys):
    assert main(["train", *as_arguments(stored(SHORT, s3.url))]) == 0
    assert_copied(RunFolder(local_root() / "tiny"), f"{s3.url}/tiny")
    assert s3.get("tiny/figures/training.png") == b"a figure"
    assert f"Uploaded figures/training.png, results/losses.csv to {s3.url}/tiny." in capsys.readouterr().out


@pytest.mark.usefixtures("_drawn")
def test_a_run_that_is_finished_and_whole_in_its_store_needs_it_no_more(s3, proxy, capsys):
    words = ["train", *as_arguments(stored(SHORT, s3.url))]
    assert main(words) == 0
    proxy.requests.clear()
    proxy.close()
    assert main(words) == 0
    assert "is finished" in capsys.readouterr().out
    assert proxy.requests == []


@pytest.mark.usefixtures("_drawn")
def test_results_that_cannot_be_sent_are_an_error_that_the_same_command_mends(s3, proxy, capsys):
    words = ["train", *as_arguments(stored(SHORT, s3.url))]
    proxy.answer = lambda method, path: 500 if method == "PUT" and "figures" in path else None
    assert main(words) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "figures/training.png" in said
    assert "icl checkpoints" in said
    proxy.answer = lambda method, path: None
    assert main(words) == 0
    assert s3.get("tiny/figures/training.png") == b"a figure"


@pytest.mark.slow
def test_an_evaluation_goes_to_the_store_of_its_run(s3):
    run = train(stored(SHORT, s3.url)).folder
    assert main(["evaluate", str(run.path), "--num_prompts", "4"]) == 0
    assert_copied(run, f"{s3.url}/tiny")
    assert s3.get("tiny/results/evaluation.csv") == (run.results / "evaluation.csv").read_bytes()


def test_results_of_a_run_that_never_had_a_copy_stay_here(s3, proxy, monkeypatch):
    run = train(SHORT).folder
    run.write_result("evaluation.csv", "step\n")
    monkeypatch.setenv("AWS_BUCKET_NAME", s3.bucket)
    assert send_results(run) == []
    assert proxy.requests == []


def test_results_never_go_to_the_place_of_another_run(s3, tmp_path):
    config = stored(SHORT, s3.url)
    train(config)
    mine = train(stored(SHORT, str(tmp_path / "backup")), folder=tmp_path / "tiny").folder
    mine.write_config(config)
    mine.write_result("evaluation.csv", "step\n")
    with pytest.raises(UploadError, match="the store has no copy of this run"):
        send_results(mine)
    assert "tiny/results/evaluation.csv" not in s3.names()


# Training does not wait


def test_a_step_never_waits_for_a_store_that_hangs(s3, proxy, monkeypatch):
    """While every upload hangs, training continues to its end. Then the uploads are repeated."""
    finished = []
    plain_status = RunFolder.write_status

    def write_status(folder: RunFolder, status) -> None:
        plain_status(folder, status)
        finished.append(status.state == "finished")

    def hang(method: str, path: str) -> None:
        while "checkpoints/step" in path and not any(finished):
            time.sleep(0.01)

    monkeypatch.setattr(RunFolder, "write_status", write_status)
    proxy.answer = hang
    result = train(stored(change(SHORT, trainer={"max_steps": 60}), s3.url))
    assert result.status.state == "finished"
    assert_copied(result.folder, f"{s3.url}/tiny")


def test_last_ckpt_is_sent_only_when_all_it_vouches_for_has_arrived(s3, proxy):
    result = train(SHORT)
    mirror = open_mirror(result.folder, s3.url, "tiny")
    proxy.answer = lambda method, path: 503 if method == "PUT" and "step-000000010" in path else None
    uploader = Uploader(mirror, SHORT)
    uploader.start()
    with pytest.raises(UploadError, match=r"step-000000010\.safetensors, last\.ckpt, status\.json"):
        uploader.finish()
    assert "tiny/checkpoints/step-000000015.safetensors" in s3.names()
    assert not {"tiny/last.ckpt", "tiny/status.json"} & set(s3.names())


def test_a_file_that_cannot_be_read_for_a_while_is_sent_later(s3, monkeypatch):
    """One ESTALE on `last.ckpt` must not end the thread that sends files."""
    result = train(SHORT)
    uploader = Uploader(open_mirror(result.folder, s3.url, "tiny"), SHORT, seconds=0.01)
    read, failures = LocalStore.read, iter(["stale", "broken"])

    def fail_twice(store: LocalStore, key: str, **options) -> bytes:
        failure = next(failures, None) if key == "last.ckpt" else None
        if failure == "stale":
            raise OSError(errno.ESTALE, "Stale file handle")
        if failure == "broken":
            raise RuntimeError("broken")
        return read(store, key, **options)

    monkeypatch.setattr(LocalStore, "read", fail_twice)
    assert not uploader.sender.send(lambda: False)
    assert "Stale file handle" in uploader.sender.reason
    assert not {"tiny/last.ckpt", "tiny/status.json"} & set(s3.names())
    uploader.start()
    deadline = time.monotonic() + 30
    while "tiny/status.json" not in s3.names():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert uploader.sender.reason == "RuntimeError: broken."
    uploader.finish()
    assert_copied(result.folder, f"{s3.url}/tiny")


def test_a_file_that_vanished_from_the_store_is_sent_again(s3):
    result = train(SHORT)
    mirror = open_mirror(result.folder, s3.url, "tiny")
    sender = Sender(mirror, SHORT)
    assert sender.send(lambda: False)
    mirror.there.delete("last.ckpt")
    for name in ("last.ckpt", "status.json"):
        os.utime(result.folder.path / name)
    assert sender.send(lambda: False)
    assert_copied(result.folder, f"{s3.url}/tiny")


# Servers that fail


def test_a_server_that_fails_for_a_while_costs_nothing(s3, proxy, monkeypatch):
    monkeypatch.setattr(upload, "PATIENCE", 20.0)
    failures = iter(range(9))
    proxy.answer = lambda method, path: 503 if "checkpoints/step" in path and next(failures, None) is not None else None
    assert_copied(train(stored(SHORT, s3.url)).folder, f"{s3.url}/tiny")


def test_a_server_that_fails_for_good_ends_the_run_non_zero_and_push_finishes_the_job(s3, proxy, capsys):
    words = ["train", *as_arguments(stored(SHORT, s3.url))]
    proxy.answer = lambda method, path: 500 if method == "PUT" and "step-" in path else None
    assert main(words) == 1
    run = RunFolder(local_root() / "tiny")
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "checkpoints/step-000000005.safetensors" in said
    assert f"icl checkpoints {run.path} push" in said
    assert SECRET not in said
    status = run.read_status()
    assert status is not None
    assert (status.state, status.step) == ("finished", 20)
    assert list_steps(run.checkpoints) == [0, 5, 10, 15, 20]
    proxy.answer = lambda method, path: None
    command = re.search(r"`icl (checkpoints [^`]*)`", said)
    assert command is not None
    assert main(command[1].split()) == 0
    assert_copied(run, f"{s3.url}/tiny")


def test_a_server_that_disappears_leaves_a_run_that_the_same_command_completes(s3, proxy, capsys, monkeypatch):
    words = ["train", *as_arguments(stored(SHORT, s3.url))]
    proxy.answer = lambda method, path: proxy.close() if "step-000000010" in path else None
    assert main(words) == 1
    assert "did not reach" in capsys.readouterr().err
    run = RunFolder(local_root() / "tiny")
    assert list_steps(run.checkpoints) == [0, 5, 10, 15, 20]
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    assert main(words) == 0
    assert_copied(run, f"{s3.url}/tiny")


# Refusals before step 1


@pytest.mark.parametrize("wrong", ["bucket", "credentials", "server", "secret"])
def test_what_cannot_work_is_refused_before_the_first_step(s3, proxy, monkeypatch, capsys, wrong):
    url = s3.url
    if wrong == "bucket":
        url = "s3://no-such-bucket"
    elif wrong == "credentials":
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    elif wrong == "server":
        proxy.close()
    else:
        proxy.answer = lambda method, path: 403
    assert main(["train", *as_arguments(stored(SHORT, url))]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert not (local_root() / "tiny" / "config.yaml").exists()


@pytest.mark.parametrize("url", ["gs://bucket/a", "s3://key:secret@bucket", "s3://", ""])
def test_a_place_that_is_no_store_is_refused_by_the_configuration(url):
    with pytest.raises(ConfigError, match=r"checkpoints\.store") as refusal:
        stored(TINY, url)
    assert "key:secret" not in str(refusal.value)


def test_the_runs_own_folder_is_no_second_store():
    with pytest.raises(ConfigError, match="would be in the run's own folder"):
        train(stored(SHORT, str(local_root())))


# Whose place it is


def test_two_runs_of_one_name_never_overwrite_each_other(s3, monkeypatch, tmp_path_factory):
    first = train(stored(SHORT, s3.url)).folder
    elsewhere(monkeypatch, tmp_path_factory)
    with pytest.raises(ConfigError, match=r"s3://.*begun with other settings.*seeds.data"):
        train(stored(change(SHORT, seeds={"data": 7}), s3.url))
    train(SHORT)  # equal settings, begun here without the store
    with pytest.raises(RunError, match="contains another run of that name"):
        train(stored(SHORT, s3.url))
    assert_copied(first, f"{s3.url}/tiny")


def test_where_the_copy_goes_may_change_when_a_run_is_resumed(tmp_path):
    train(stored(SHORT, str(tmp_path / "a")))
    assert_copied(train(stored(SHORT, str(tmp_path / "b"))).folder, str(tmp_path / "b" / "tiny"))


# Another machine, from the bucket alone


def assert_same_result(run: RunFolder, expected: RunFolder) -> None:
    assert run.metrics_file.read_bytes() == expected.metrics_file.read_bytes()
    assert list_steps(run.checkpoints) == list_steps(expected.checkpoints)
    for step in list_steps(run.checkpoints):
        assert load_step(run.checkpoints, step).digest == load_step(expected.checkpoints, step).digest


DIES_AFTER_AN_UPLOAD = """
import os, signal, sys, time
from icl.training import saving, sender, upload
plain_send, plain_save, arrived = sender.Sender._send, saving.MemberFiles.save_checkpoint, []
def send(self, files, bar):
    was_sent = plain_send(self, files, bar)
    arrived.extend(file.name for file in files if was_sent and file is not None)
    return was_sent
def save(self, checkpoint, path, storage_options=None):
    plain_save(self, checkpoint, path)
    if checkpoint["global_step"] == 70:
        num = arrived.count("last.ckpt")
        while arrived.count("last.ckpt") == num:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
sender.Sender._send, upload.SECONDS, saving.MemberFiles.save_checkpoint = send, 0.05, save
from icl.cli import main
sys.exit(main())
"""


@pytest.mark.slow
def test_a_machine_that_dies_is_replaced_from_the_bucket_bit_identically(s3, monkeypatch, tmp_path_factory, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))  # as here
    config = change(TINY, trainer={"max_steps": 120}, early_stopping={"patience": 50})
    undisturbed = train(config, folder=tmp_path_factory.mktemp("whole") / "tiny")
    config = stored(config, s3.url)
    often = change(config, checkpoints={"resume_seconds": 0.0})
    command = [sys.executable, "-c", DIES_AFTER_AN_UPLOAD, "train", *as_arguments(often)]
    died = subprocess.run(command, capture_output=True, timeout=300)
    assert died.returncode == -signal.SIGKILL, died.stderr
    elsewhere(monkeypatch, tmp_path_factory)
    resumed = train(config)
    said = capsys.readouterr().out
    step = re.search(r"Resuming .* from step ([\d,]+)", said)
    assert step is not None
    assert 0 < int(step[1].replace(",", "")) < 120
    assert "of the run from s3://" in said
    assert_same_result(resumed.folder, undisturbed.folder)
    assert_copied(resumed.folder, f"{s3.url}/tiny")


def test_a_folder_that_fell_behind_takes_the_later_steps_from_the_store(s3, monkeypatch, tmp_path_factory, tmp_path):
    config = stored(SHORT, s3.url)
    finished = train(config).folder
    behind = RunFolder(tmp_path / "tiny")
    for name in ("run-id", "config.yaml"):
        LocalStore(behind.path).write(name, (finished.path / name).read_bytes())
    monkeypatch.setenv("LOCAL_ROOT", str(tmp_path))
    assert train(config).was_done
    assert_same_result(behind, finished)


def test_a_damaged_object_is_not_resumed_from(s3, monkeypatch, tmp_path_factory):
    config = stored(SHORT, s3.url)
    train(config)
    s3.corrupt("tiny/last.ckpt", lambda data: data[:-10])
    root = elsewhere(monkeypatch, tmp_path_factory)
    with pytest.raises(StorageError, match=r"last\.ckpt is damaged"):
        train(config)
    assert not (root / "tiny" / "config.yaml").exists()


# What must not be anywhere


def test_no_secret_is_in_any_file_or_in_what_was_said(s3, capsys):
    assert main(["train", *as_arguments(stored(SHORT, s3.url))]) == 0
    said = capsys.readouterr()
    assert SECRET not in said.out + said.err
    for path in (local_root() / "tiny").rglob("*"):
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path
    for key in s3.names():
        assert SECRET.encode() not in s3.get(key), key


@pytest.mark.slow
def test_without_a_store_no_aws_code_is_imported_and_no_thread_is_started(tmp_path):
    code = f"""
import sys, threading
from icl.cli import main
import icl.cli.train as command
command._show_run = lambda folder: None
assert main({["train", *as_arguments(SHORT)]!r}) == 0
assert main(["checkpoints", "tiny", "ls"]) == 0
print([name for name in ("boto3", "botocore", "s3transfer", "icl.store.s3") if name in sys.modules],
      [thread.name for thread in threading.enumerate() if thread.name == "icl-upload"])
"""
    environment = {**os.environ, "LOCAL_ROOT": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "[] []"
