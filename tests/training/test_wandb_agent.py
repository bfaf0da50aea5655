"""A point of a W&B sweep with the real client, started as `wandb agent` does (offline: the client still passes the config)."""

import os
import signal
import subprocess
import sys
import time

import pytest
import yaml
from tiny_runs import TINY, as_arguments, change

from icl.resolve import resolve
from icl.run_names import run_name
from icl.runs.folder import RunFolder, local_root
from icl.training.wandb.agent import in_sweep, swept_settings

FIXED = change(TINY, trainer={"max_steps": 20})


def agents_environment(folder, point: dict) -> dict[str, str]:
    """Return the variables that `wandb agent` gives the program: the sweep, the run, and a file with the point."""
    file = folder / "config-defaults.yaml"
    file.write_text(yaml.safe_dump({"wandb_version": 1} | {key: {"value": value} for key, value in point.items()}))
    return {
        **os.environ,
        "WANDB_MODE": "offline",
        "WANDB_SWEEP_ID": "sweep1",
        "WANDB_RUN_ID": "run1",
        "WANDB_SWEEP_PARAM_PATH": str(file),
        "WANDB_DIR": str(folder),
        "OMP_NUM_THREADS": "1",
    }


def arguments_without(*keys: str, config=FIXED) -> list[str]:
    words = as_arguments(config)
    for key in (*keys, "run_name"):
        place = words.index(f"--{key}")
        del words[place : place + 2]
    return words


def program(*words: str) -> list[str]:
    return [sys.executable, "-m", "icl", "train", *words]


@pytest.mark.slow
def test_the_point_arrives_whether_dotted_or_nested(tmp_path):
    point = {"optim.lr": 0.25, "task.num_tasks": "inf", "model": {"mlp_size": 4}}
    words = arguments_without("optim.lr", "task.num_tasks", "model.mlp_size")
    environment = agents_environment(tmp_path, point)
    done = subprocess.run(program(*words), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = resolve(dict(zip([w[2:] for w in words[::2]], words[1::2], strict=True)), point)
    folder = RunFolder(local_root() / run_name(expected))  # named by the whole configuration, as `icl sweep` names it
    assert folder.read_config() == expected
    assert (expected.optim.lr, expected.task.is_gaussian, expected.model.mlp_size) == (0.25, True, 4)
    again = subprocess.run(program(*words), env=environment | {"WANDB_RUN_ID": "run2"}, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "is finished" in again.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("point", "kept", "said"),
    [
        ({"optim.learning_rate": 1}, (), "optim.learning_rate"),
        ({"optim.lr": 0.5}, ("optim.lr",), "is swept"),
        ({"population.seeds": [0, 1]}, (), "must be a single run; remove `population`"),
    ],
)
def test_a_bad_point_is_one_sentence_and_fails(tmp_path, point, kept, said):
    words = arguments_without(*(key for key in point if key not in kept and f"--{key}" in as_arguments(FIXED)))
    environment = agents_environment(tmp_path, point)
    done = subprocess.run(program(*words), env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


LONG = change(TINY, trainer={"max_steps": 200_000}, checkpoints={"every": 100_000, "resume_seconds": 0.0})


def wait_until(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        assert process.poll() is None, "the program ended too soon"
        time.sleep(0.01)


def training_folder() -> RunFolder | None:
    found = list(local_root().glob("*/status.json"))
    return RunFolder(found[0].parent) if found else None


def is_training() -> bool:
    folder = training_folder()
    status = folder.read_status() if folder else None
    return status is not None and status.step > 50


@pytest.mark.slow
def test_sigterm_saves_and_fails_the_point(tmp_path):
    environment = agents_environment(tmp_path, {"optim.lr": 0.25})
    words = arguments_without("optim.lr", config=LONG)
    with subprocess.Popen(program(*words), env=environment, stderr=subprocess.PIPE, text=True) as process:
        wait_until(is_training, process)
        process.send_signal(signal.SIGTERM)
        errors = process.communicate()[1]
    assert process.returncode == 128 + signal.SIGTERM, errors
    folder = training_folder()
    assert folder is not None
    status = folder.read_status()
    assert status is not None
    assert status.state == "preempted"
    assert folder.resume_file.is_file()


@pytest.mark.slow
def test_an_orphan_saves_and_ends(tmp_path):
    environment = agents_environment(tmp_path, {"optim.lr": 0.25})
    agent = "import subprocess, sys; subprocess.Popen(sys.argv[1:]).wait()"
    command = [sys.executable, "-c", agent, *program(*arguments_without("optim.lr", config=LONG))]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        wait_until(is_training, process)
        process.kill()
    deadline = time.monotonic() + 120
    folder = training_folder()
    assert folder is not None
    while (status := folder.read_status()) is None or status.state == "running":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert status.state == "preempted"


def test_disabled_wins_over_the_agent():
    assert in_sweep({"WANDB_SWEEP_ID": "s"})
    assert not in_sweep({"WANDB_SWEEP_ID": "s", "WANDB_MODE": "disabled"})
    assert not in_sweep({})


def test_without_the_agents_file_the_point_is_what_differs(monkeypatch):
    monkeypatch.delenv("WANDB_SWEEP_PARAM_PATH", raising=False)

    class Run:
        config = TINY.to_dict() | {"optim.lr": 0.5, "_wandb": {}, "model": TINY.to_dict()["model"] | {"mlp_size": 4}}

    assert swept_settings(Run(), TINY) == {"optim.lr": 0.5, "model.mlp_size": 4}
