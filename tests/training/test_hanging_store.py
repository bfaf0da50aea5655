"""A store that accepts connections but never answers: each wait is announced, ends within a minute, and ends with advice."""

import os
import re
import signal
import threading
import time

import pytest
from s3_server import SECRET
from tiny_runs import TINY, as_arguments, change

import icl.store.s3
from icl.cli import main
from icl.files.writing import StorageError
from icl.runs.folder import RunFolder, local_root
from icl.store import waiting
from icl.store.s3 import S3Store
from icl.training import upload
from icl.training.run import train

SHORT = change(TINY, trainer={"max_steps": 6}, evaluation={"every": None}, checkpoints={"every": 2, "num_log": 0})


@pytest.fixture(autouse=True)
def _impatient(monkeypatch, no_figures):
    monkeypatch.setattr(waiting, "NOTICE_SECONDS", 0.2)
    monkeypatch.setattr(upload, "SECONDS", 0.05)
    waiting.moved()  # whatever another test waited for


@pytest.fixture
def hang(proxy, monkeypatch):
    """Let the server hang for the requests that a test chooses, and shorten the waiting times from then on."""
    is_over = threading.Event()

    def choose(fits, seconds=4.0) -> None:  # a busy machine may take a second to answer the other requests
        monkeypatch.setattr(waiting, "SECONDS", seconds)

        def answer(method: str, path: str) -> None:
            if fits(method, path):
                is_over.wait(60)

        proxy.answer = answer

    yield choose
    is_over.set()


def in_bucket(s3) -> list[str]:
    return as_arguments(change(SHORT, checkpoints={"store": s3.url}))


def test_the_end_of_training_waits_a_minute_at_most_and_names_the_command(s3, hang, capsys):
    hang(lambda method, path: method == "PUT" and "step-" in path)
    assert main(["train", *in_bucket(s3)]) == 1
    said = capsys.readouterr()
    assert re.search(r"Uploading the last \d+ files to s3://", said.out)
    assert "icl: waiting for s3://" in said.err
    run = RunFolder(local_root() / "tiny")
    assert f"`icl checkpoints {run.path} push` sends the missing files" in said.err.splitlines()[-1]
    status = run.read_status()
    assert status is not None
    assert (status.state, status.step) == ("finished", 6)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_waiting_at_once(s3, hang, monkeypatch, capsys, number):
    hang(lambda method, path: method == "PUT" and "step-" in path, seconds=60.0)
    sent = []
    plain = upload.Uploader.finish

    def finish(uploader, **limits) -> None:
        threading.Timer(0.5, lambda: sent.append(time.monotonic()) or os.kill(os.getpid(), number)).start()
        plain(uploader, **limits)

    monkeypatch.setattr(upload.Uploader, "finish", finish)
    assert main(["train", *in_bucket(s3)]) == 128 + number
    assert time.monotonic() - sent[0] < 15
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"stopped by {number.name}" in said
    assert "push`" in said


def test_a_training_that_a_signal_stopped_waits_for_seconds_only(s3, hang, monkeypatch, capsys):
    monkeypatch.setattr(upload, "STOPPED_SECONDS", 1.0)
    hang(lambda method, path: method == "PUT" and "step-" in path, seconds=60.0)

    def stop() -> None:
        while not (local_root() / "tiny" / "checkpoints" / "step-000000050.safetensors").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    long = change(SHORT, checkpoints={"store": s3.url, "every": 50}, trainer={"max_steps": 100_000, "compile": "false"})
    assert main(["train", *as_arguments(long)]) == 143
    said = capsys.readouterr().err.splitlines()[-1]
    assert "did not reach" in said
    status = RunFolder(local_root() / "tiny").read_status()
    assert status is not None
    assert status.state == "preempted"


@pytest.mark.parametrize("fits", ["everything", "reading"])
def test_a_start_of_training_from_a_store_that_hangs_is_a_sentence(s3, hang, monkeypatch, capsys, fits):
    monkeypatch.setattr(icl.store.s3, "CHECK_SECONDS", 2.0)
    hang(lambda method, path: fits == "everything" or "config.yaml" in path)
    assert main(["train", *in_bucket(s3)]) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert any(line.startswith("icl: waiting for an answer from 127.0.0.1") for line in said)
    assert "no progress with 127.0.0.1" in said[-1]
    assert SECRET not in "".join(said)
    assert not (local_root() / "tiny" / "config.yaml").exists()


@pytest.mark.parametrize(
    "action", ["push", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ls", "pull", "verify"))]
)
def test_the_commands_for_checkpoints_end_with_a_sentence(s3, hang, monkeypatch, capsys, action):
    config = change(SHORT, checkpoints={"store": s3.url})
    train(config)
    (local_root() / "tiny" / "checkpoints" / "step-000000002.safetensors").unlink()
    hang(lambda method, path: "step-" in path or ("list-type=2" in path and "max-keys=1" not in path.lower()))
    capsys.readouterr()
    assert main(["checkpoints", "tiny", action, "--store", s3.url]) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert any("waiting for" in line for line in said)
    assert "no progress with 127.0.0.1" in said[-1]


def test_an_answer_that_trickles_is_given_up(s3, proxy, monkeypatch):
    store = S3Store(s3.bucket)
    store.write("a", bytes(2**20))
    monkeypatch.setattr(waiting, "SECONDS", 1.0)
    plain = proxy._server.RequestHandlerClass._reply

    def reply(handler, status, headers, body) -> None:
        if handler.command != "GET":
            plain(handler, status, headers, body)
            return
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        for byte in body[:100]:
            handler.wfile.write(bytes([byte]))
            time.sleep(0.05)

    monkeypatch.setattr(proxy._server.RequestHandlerClass, "_reply", reply)
    began = time.monotonic()
    with pytest.raises(StorageError, match="no progress"):
        store.read("a")
    assert time.monotonic() - began < 30


def test_ctrl_c_ends_a_push_to_a_store_that_hangs(s3, hang, monkeypatch, capsys):
    run = train(SHORT).folder
    hang(lambda method, path: method == "PUT" and "step-" in path, seconds=60.0)
    timer = threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGINT))
    began = time.monotonic()
    timer.start()
    assert main(["checkpoints", str(run.path), "push", "--store", s3.url]) == 130
    assert time.monotonic() - began < 15
    assert "interrupted" in capsys.readouterr().err
