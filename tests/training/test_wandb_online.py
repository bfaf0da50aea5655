"""W&B logging with the real client, online, to a backend on the loopback: what reaches the backend, and what a run does if it fails."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_runs import TINY, as_arguments, change
from wandb_server import WandbRun, WandbServer

from icl.cli import main
from icl.config import RunConfig, flatten
from icl.resolve import resolve
from icl.run_names import run_name
from icl.runs.folder import RunFolder, local_root

WANDB = [sys.executable, "-m", "wandb"]
ICL = [sys.executable, "-m", "icl"]
PATIENCE = 120.0
"""Seconds in which whatever a test waits for must come, on a busy machine too."""

SHORT = change(TINY, trainer={"max_steps": 20}, evaluation={"every": 10})
LONG = change(TINY, trainer={"max_steps": 200_000}, checkpoints={"every": 100_000, "resume_seconds": 1.0})
POINT = {"optim.lr": 0.01}

Start = Callable[..., subprocess.Popen]


def own_environment(server: WandbServer, folder: Path) -> dict[str, str]:
    """Set where the client finds its backend and the agent finds `icl`, and hide the user's own settings."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    here = {"PATH": path, "WANDB_DIR": str(folder), "NETRC": str(folder / "netrc"), "OMP_NUM_THREADS": "1"}
    return os.environ | server.environment() | here


@pytest.fixture
def start(wandb_server: WandbServer, tmp_path: Path) -> Iterator[Start]:
    """Start programs whose output goes to `said`. All of them end with the test."""
    begun: list[subprocess.Popen] = []

    def start(command: list[str], **more: str) -> subprocess.Popen:
        with (tmp_path / "said").open("ab") as output:
            environment = own_environment(wandb_server, tmp_path) | more
            begun.append(subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=output, stderr=output))
        return begun[-1]

    yield start
    for process in begun:
        process.kill()


def wait_for(condition: Callable[[], Any], process: subprocess.Popen | None = None) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        assert process is None or process.poll() is None, "the program ended too soon"
        time.sleep(0.02)


def end_of(process: subprocess.Popen) -> int:
    return process.wait(timeout=PATIENCE)


def arguments(config: RunConfig, swept: dict[str, Any] = POINT) -> list[str]:
    """Return the settings in a sweep's command. The sweep sets the other settings."""
    words = as_arguments(config)
    pairs = zip(words[::2], words[1::2], strict=True)
    return [word for pair in pairs if pair[0][2:] not in {*flatten(swept), "run_name"} for word in pair]


def create_sweep(server: WandbServer, folder: Path, config: RunConfig, parameters: dict[str, Any], *words: str) -> str:
    """Create a sweep of runs with the settings `config`, except for the parameters. Return the sweep's path for an agent."""
    swept = {key.replace(".parameters", ""): None for key in flatten(parameters)}
    keys = {key.rpartition(".")[0]: None for key in swept}
    tree = {"method": "grid", "command": ["${env}", "icl", "train", *arguments(config, keys), *words]}
    tree["parameters"] = parameters
    (folder / "sweep.yaml").write_text(yaml.safe_dump(tree))
    command = [*WANDB, "sweep", str(folder / "sweep.yaml")]
    done = subprocess.run(command, env=own_environment(server, folder), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (sweep,) = server.sweeps
    assert f"wandb agent team/icl/{sweep}" in done.stderr
    return f"team/icl/{sweep}"


def as_point(server: WandbServer, folder: Path, run: str = "run1", point: dict[str, Any] = POINT) -> dict[str, str]:
    """Return the environment in which an agent passes on a point that the server knows."""
    server.runs.setdefault(run, WandbRun(run, point=point))
    file = folder / f"{run}.yaml"
    file.write_text(yaml.safe_dump({"wandb_version": 1} | {key: {"value": value} for key, value in point.items()}))
    return {"WANDB_SWEEP_ID": "sweep1", "WANDB_RUN_ID": run, "WANDB_SWEEP_PARAM_PATH": str(file)}


def step_reached() -> int:
    """Return the step of the only run below $LOCAL_ROOT, or -1 if there is no run yet."""
    found = list(local_root().glob("*/status.json"))
    status = RunFolder(found[0].parent).read_status() if found else None
    return -1 if status is None else status.step


def the_run() -> RunFolder:
    (folder,) = local_root().glob("*/config.yaml")
    return RunFolder(folder.parent)


def state_of(run: RunFolder) -> str:
    status = run.read_status()
    assert status is not None
    return status.state


# A sweep


@pytest.mark.slow
def test_an_agent_runs_every_point_and_a_crashed_one_is_reported_and_left_behind(wandb_server, start, tmp_path):
    parameters = {"optim.lr": {"values": [1e30, 0.01]}, "model": {"parameters": {"mlp_size": {"value": 4}}}}
    sweep = create_sweep(wandb_server, tmp_path, SHORT, parameters)
    assert end_of(start([*WANDB, "agent", sweep])) == 0
    said = (tmp_path / "said").read_text()
    assert "Traceback" not in said
    assert said.count("icl: The loss, the gradient or a weight became NaN or infinite at step 2.") == 1
    assert wandb_server.refused == []
    crashed, good = wandb_server.runs.values()
    assert (crashed.exit_codes, good.exit_codes) == ([1], [0])
    for run in (crashed, good):
        config = resolve(SHORT.to_dict(), {"run_name": None}, run.point)
        assert run.name == run_name(config)
        told, settings = flatten(run.config), flatten(config.to_dict())
        assert {key: told[key] for key in settings} == settings
        assert RunFolder(local_root() / run.name).read_config() == config
    assert good.steps == [0, 10, 20]
    assert {"train/loss", "lr", "eval/pretrain/loss", "eval/true/delta_ridge"} <= set(good.rows[-1])
    assert good.summary["eval/pretrain/loss"] == good.rows[-1]["eval/pretrain/loss"]
    assert good.axes() == {"step"}


@pytest.mark.slow
def test_a_nested_point_arrives_by_args_and_an_invalid_one_fails_alone_as_in_icl_sweep(
    wandb_server, start, tmp_path, capsys
):
    parameters = {"model": {"parameters": {"mlp_size": {"values": [0, 4]}, "double_residual": {"value": True}}}}
    sweep = create_sweep(wandb_server, tmp_path, SHORT, parameters, "${args}")
    assert end_of(start([*WANDB, "agent", sweep])) == 0
    invalid, good = wandb_server.runs.values()
    assert (invalid.exit_codes, good.exit_codes) == ([2], [0])
    assert good.point == {"model": {"double_residual": True, "mlp_size": 4}}
    assert RunFolder(local_root() / good.name).read_config().model.double_residual
    said = (tmp_path / "said").read_text()
    assert said.count("icl: `model.mlp_size` must be a whole number of at least 1, got 0.") == 1
    assert "Traceback" not in said
    assert main(["sweep", str(tmp_path / "sweep.yaml")]) == 1
    said = capsys.readouterr().out
    assert said.count("point 1 (model.mlp_size=0): `model.mlp_size` must be a whole number of at least 1, got 0.") == 1
    assert f"done     {good.name}: finished at step 20" in said
    assert "2 points: 1 done, 1 failed." in said


# Signals and orphans


@pytest.mark.slow
def test_a_preempted_point_is_marked_and_goes_on_from_its_checkpoint_when_handed_out_again(
    wandb_server, start, tmp_path
):
    command = [*ICL, "train", *arguments(LONG)]
    program = start(command, **as_point(wandb_server, tmp_path))
    wait_for(lambda: step_reached() > 50, program)
    program.send_signal(signal.SIGTERM)
    assert end_of(program) == 128 + signal.SIGTERM
    first = wandb_server.runs["run1"]
    assert (first.was_preempting, first.exit_codes) == (True, [143])
    folder, stopped_at = the_run(), step_reached()
    assert state_of(folder) == "preempted"
    assert first.steps == list(range(0, stopped_at + 1, 10))
    assert first.name == folder.path.name
    program = start(command, **as_point(wandb_server, tmp_path, "run2"))
    wait_for(lambda: step_reached() > stopped_at + 50, program)
    program.send_signal(signal.SIGTERM)
    assert end_of(program) == 143
    assert f"from step {stopped_at:,}" in (tmp_path / "said").read_text()
    again = wandb_server.runs["run2"]
    assert again.steps == list(range(0, step_reached() + 1, 10))  # the rows of the first are sent again
    assert again.rows[0]["eval/pretrain/loss"] == pytest.approx(first.rows[0]["eval/pretrain/loss"])


STOPPED_EARLY = """
import os, signal, sys
from icl.training import run
def train(*arguments, **options):
    os.kill(os.getpid(), signal.SIGTERM)
run.train_population = train
from icl.cli import main
sys.exit(main())
"""


@pytest.mark.slow
def test_a_signal_before_training_is_a_preemption_too(wandb_server, start, tmp_path):
    program = start(
        [sys.executable, "-c", STOPPED_EARLY, "train", *arguments(SHORT)], **as_point(wandb_server, tmp_path)
    )
    assert end_of(program) == 130
    run = wandb_server.runs["run1"]
    assert (run.was_preempting, run.exit_codes) == (True, [130])
    assert "Traceback" not in (tmp_path / "said").read_text()


STOPPED_WHILE_JOINING = """
import os, signal, sys
import wandb
init = wandb.init
def slow_init(**options):
    os.kill(os.getpid(), signal.{signal})
    return init(**options)
wandb.init = slow_init
from icl.cli import main
sys.exit(main())
"""
STOPPED_WHILE_IMPORTING = """
import builtins, os, signal, sys
load = builtins.__import__
def slow_import(name, *rest):
    if name == "torch":
        builtins.__import__ = load
        os.kill(os.getpid(), signal.SIGTERM)
    return load(name, *rest)
builtins.__import__ = slow_import
from icl.cli import main
sys.exit(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "program",
    [
        STOPPED_WHILE_JOINING.replace("{signal}", "SIGTERM"),
        STOPPED_WHILE_JOINING.replace("{signal}", "SIGINT"),
        STOPPED_WHILE_IMPORTING,
    ],
)
def test_a_signal_before_the_sweep_is_joined_gives_the_point_back(wandb_server, start, tmp_path, program):
    """An interrupted `wandb.init` used to leave a run that W&B took for finished, and the point was never trained."""
    process = start([sys.executable, "-c", program, "train", *arguments(SHORT)], **as_point(wandb_server, tmp_path))
    assert end_of(process) == 130
    run = wandb_server.runs["run1"]
    assert (run.was_preempting, run.exit_codes) == (True, [130])
    assert "Traceback" not in (tmp_path / "said").read_text()


@pytest.mark.slow
def test_an_agent_that_is_told_to_stop_hands_its_point_back(wandb_server, start, tmp_path):
    """SIGTERM stops `wandb agent --forward-signals`. The next agent gets the same run and finishes it."""
    config = change(LONG, trainer={"max_steps": 1500}, checkpoints={"every": 500})
    sweep = create_sweep(wandb_server, tmp_path, config, {"optim.lr": {"value": 0.01}})
    first = start([*WANDB, "agent", "--forward-signals", sweep])
    wait_for(lambda: step_reached() > 50, first)
    first.send_signal(signal.SIGTERM)
    end_of(first)
    (run,) = wandb_server.runs.values()
    wait_for(lambda: run.exit_codes)
    assert (run.was_preempting, run.exit_codes) == (True, [143])
    assert state_of(the_run()) == "preempted"  # before W&B hands it out again
    assert 50 < step_reached() < 1500
    second = start([*WANDB, "agent", sweep])
    assert end_of(second) == 0
    assert run.exit_codes == [143, 0]
    assert state_of(the_run()) == "finished"
    assert run.steps == list(range(0, 1501, 10))
    assert "Resuming" in (tmp_path / "said").read_text()


@pytest.mark.slow
def test_a_program_whose_agent_died_saves_and_hands_its_point_back(wandb_server, start, tmp_path):
    sweep = create_sweep(wandb_server, tmp_path, LONG, {"optim.lr": {"value": 0.01}})
    agent = start([*WANDB, "agent", sweep])
    wait_for(lambda: step_reached() > 50, agent)
    agent.kill()
    (run,) = wandb_server.runs.values()
    wait_for(lambda: run.exit_codes)
    assert (run.was_preempting, run.exit_codes) == (True, [143])
    assert state_of(the_run()) == "preempted"
    assert "The W&B agent has ended" in (tmp_path / "said").read_text()


# A network that fails

IMPATIENT = """
import sys
from icl.training.wandb import log as wandb_log
wandb_log._FINISH_SECONDS = 2
from icl.cli import main
sys.exit(main())
"""


@pytest.mark.parametrize("fault", ["errors", "gone"])
@pytest.mark.slow
def test_a_network_that_fails_in_mid_run_does_not_stop_training(wandb_server, start, tmp_path, fault):
    words = ["train", *as_arguments(change(LONG, trainer={"max_steps": 300}))]
    program = start([sys.executable, "-c", IMPATIENT, *words])
    wait_for(lambda: wandb_server.runs, program)
    if fault == "gone":
        wandb_server.close()
    else:
        wandb_server.answer = lambda path: 500
    assert end_of(program) == 0
    assert state_of(the_run()) == "finished"
    said = (tmp_path / "said").read_text()
    (folder,) = the_run().path.glob("wandb/run-*")
    assert f"W&B did not receive everything within 2 s. To send the rest, run `wandb sync {folder}`." in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_backend_that_refuses_at_the_start_means_offline(wandb_server, start, tmp_path):
    wandb_server.answer = lambda path: 401
    began = time.monotonic()
    assert end_of(start([*ICL, "train", *as_arguments(SHORT)])) == 0
    assert time.monotonic() - began < 40
    said = (tmp_path / "said").read_text()
    assert said.count("W&B could not start online") == 1
    assert list(the_run().path.glob("wandb/offline-run-*"))


@pytest.mark.slow
def test_a_backend_that_refuses_at_the_start_of_a_point_ends_it(wandb_server, start, tmp_path):
    wandb_server.answer = lambda path: 401
    assert end_of(start([*ICL, "train", *arguments(SHORT)], **as_point(wandb_server, tmp_path))) == 1
    said = (tmp_path / "said").read_text()
    assert said.count("icl: W&B did not return the settings of this sweep's point") == 1
    assert "Traceback" not in said
    assert not list(local_root().iterdir())
