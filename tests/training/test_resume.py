"""A run killed at a bad moment and resumed by the same command has the same bytes as an uninterrupted run."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_runs import TINY, as_arguments, change

from icl.cli import main
from icl.runs.checkpoints import list_steps, load_step
from icl.runs.folder import RunFolder
from icl.training.run import train

# Slow enough to be caught in the act, saving its resume file at every step.
CONFIG = change(
    TINY,
    trainer={"max_steps": 160, "log_every": 5},
    evaluation={"every": 40},
    checkpoints={"every": 25, "resume_seconds": 0.0},
    early_stopping={"patience": 50},
)
COMMAND = [sys.executable, "-m", "icl", "train", *as_arguments(CONFIG)]

DIES_IN_A_SAVE = """
import os, signal, sys
import {module} as module
original = module.os.fsync
calls = 0
def fsync(descriptor):
    global calls
    name = os.readlink(f"/proc/self/fd/{{descriptor}}")
    calls += {pattern!r} in name
    if calls == {calls}:
        os.truncate(name, os.path.getsize(name) // 2)  # half of the bytes had reached the disk
        os.kill(os.getpid(), signal.SIGKILL)
    original(descriptor)
module.os.fsync = fsync
from icl.cli import main
sys.exit(main({arguments!r}))
"""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> RunFolder:
    return train(CONFIG, folder=tmp_path_factory.mktemp("undisturbed") / "tiny").folder


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LOCAL_ROOT", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    return tmp_path


def wait_for_step(process: subprocess.Popen, folder: RunFolder, step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        status = folder.read_status()
        if status is not None and status.step >= step:
            return
        assert process.poll() is None, "the run ended before it could be interrupted"
        time.sleep(0.005)
    raise AssertionError(f"the run never reached step {step}")


def finish(root: Path) -> str:
    done = subprocess.run(COMMAND, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_same(folder: RunFolder, expected: RunFolder) -> None:
    assert folder.metrics_file.read_bytes() == expected.metrics_file.read_bytes()
    assert list_steps(folder.checkpoints) == list_steps(expected.checkpoints)
    for step in list_steps(expected.checkpoints):
        assert load_step(folder.checkpoints, step).digest == load_step(expected.checkpoints, step).digest, step
    files = {path.relative_to(folder.path).as_posix() for path in folder.path.rglob("*")}
    assert not any(".tmp-" in name for name in files)


@pytest.mark.slow
def test_a_killed_run_resumes_bit_identically(root, undisturbed, capsys):
    """A separate process is killed. The same command resumes in this process, which saves the time of two starts."""
    folder = RunFolder(root / "tiny")
    with subprocess.Popen(COMMAND, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        wait_for_step(process, folder, 95)
        process.kill()
    status = folder.read_status()
    assert status is not None
    assert status.state == "running"
    assert main(COMMAND[3:]) == 0
    assert "Resuming" in capsys.readouterr().out
    assert_same(folder, undisturbed)
    assert main(COMMAND[3:]) == 0
    assert "is finished" in capsys.readouterr().out


@pytest.mark.slow
def test_sigterm_saves_exits_with_its_number_and_resumes_bit_identically(root, undisturbed):
    folder = RunFolder(root / "tiny")
    with subprocess.Popen(COMMAND, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        wait_for_step(process, folder, 53)
        process.send_signal(signal.SIGTERM)
        errors = process.communicate()[1]
    assert process.returncode == 128 + signal.SIGTERM
    assert "run the same command again to resume" in errors
    status = folder.read_status()
    assert status is not None
    assert status.state == "preempted"
    finish(root)
    assert_same(folder, undisturbed)


@pytest.mark.parametrize(
    ("module", "pattern", "calls"),
    [
        pytest.param("icl.files.system", "last.ckpt", 50, id="resume file", marks=pytest.mark.slow),
        pytest.param("icl.files.system", "step-000000075", 1, id="checkpoint", marks=pytest.mark.slow),
    ],
)
def test_a_kill_inside_a_save_loses_nothing(root, undisturbed, module, pattern, calls):
    folder = RunFolder(root / "tiny")
    script = DIES_IN_A_SAVE.format(module=module, pattern=pattern, calls=calls, arguments=COMMAND[3:])
    died = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=300)
    assert died.returncode == -signal.SIGKILL, died.stderr
    for step in list_steps(folder.checkpoints):
        load_step(folder.checkpoints, step)  # every one that is listed is whole
    assert any(path.name.startswith(".tmp-") for path in folder.path.rglob("*"))
    finish(root)
    assert_same(folder, undisturbed)


@pytest.mark.slow
def test_a_full_disk_is_one_sentence_and_loses_nothing(root, undisturbed):
    folder = RunFolder(root / "tiny")
    with subprocess.Popen(COMMAND, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        wait_for_step(process, folder, 40)
        process.kill()
    saved = folder.resume_file.read_bytes()
    limit = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000));"
    script = f"{limit} from icl.cli import main; sys.exit(main({COMMAND[3:]!r}))"
    full = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert full.returncode == 1
    assert "Traceback" not in full.stderr
    assert "Earlier saves are intact" in full.stderr.strip().splitlines()[-1]
    assert folder.resume_file.read_bytes() == saved
    finish(root)
    assert_same(folder, undisturbed)


def test_a_folder_that_cannot_be_written_is_one_sentence(monkeypatch, tmp_path, capsys):
    """This runs in the process of the test, because libraries may add lines to the errors of a whole program."""
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("LOCAL_ROOT", str(tmp_path / "file"))
    assert main(COMMAND[3:]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "LOCAL_ROOT" in error


def test_a_damaged_resume_file_is_named(root):
    train(change(CONFIG, trainer={"max_steps": 10}))
    folder = RunFolder(root / "tiny")
    folder.status_file.unlink()
    folder.resume_file.write_bytes(folder.resume_file.read_bytes()[:100])
    folder.previous_file.unlink()  # what then happens with it: test_resume_files.py
    with pytest.raises(RuntimeError, match=r"last.ckpt is damaged or was cut short.*cannot be resumed"):
        train(change(CONFIG, trainer={"max_steps": 10}))
