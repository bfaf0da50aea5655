"""Runs trained together compared with the same runs trained alone: files, numbers, endings and failures."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_runs import TINY, as_population, change

from icl.cli import main
from icl.config import PopulationConfig, RunConfig
from icl.config.validation import ConfigError
from icl.run_names import run_name
from icl.runs.checkpoints import list_steps, load_step
from icl.runs.folder import RunFolder, local_root
from icl.training.run import train, train_population

SHORT = change(TINY, trainer={"max_steps": 40}, checkpoints={"every": 20, "num_log": 0})
CONFIGS = [
    change(SHORT, task={"num_tasks": num_tasks}, seeds={"model": seed, "data": seed, "noise": seed})
    for num_tasks, seed in ((16, 0), (16, 1), (float("inf"), 0))
]


def folders(name: str, count: int) -> list[str]:
    return [str(local_root() / name / str(index)) for index in range(count)]


def assert_alike(folder: RunFolder, alone: RunFolder, *, atol: float = 2e-5) -> None:
    """Check that two runs have the same files, and the same numbers up to rounding."""
    assert file_names(folder) == file_names(alone)
    assert folder.read_config() == alone.read_config()
    table, expected = pd.read_csv(folder.metrics_file), pd.read_csv(alone.metrics_file)
    assert list(table.columns) == list(expected.columns)
    np.testing.assert_allclose(table, expected, rtol=1e-4, atol=atol)
    for step in list_steps(alone.checkpoints):
        saved, other = load_step(folder.checkpoints, step), load_step(alone.checkpoints, step)
        assert saved.config == other.config
        for key, tensor in other.params.items():
            torch.testing.assert_close(saved.params[key], tensor, rtol=0, atol=atol)


def file_names(folder: RunFolder) -> set[str]:
    """Return the files in a run's folder, without `previous.ckpt`, whose existence depends on timing."""
    return {path.relative_to(folder.path).as_posix() for path in folder.path.rglob("*")} - {"previous.ckpt"}


def assert_identical(folder: RunFolder, expected: RunFolder) -> None:
    assert folder.metrics_file.read_bytes() == expected.metrics_file.read_bytes()
    for step in list_steps(expected.checkpoints):
        assert load_step(folder.checkpoints, step).digest == load_step(expected.checkpoints, step).digest


def stop_at(folder: RunFolder, step: int) -> threading.Thread:
    """Start a thread that sends SIGTERM to this process once the run has reached a step."""

    def wait() -> None:
        while (status := folder.read_status()) is None or status.step < step:
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_members_are_what_they_would_be_alone():
    together = train_population(CONFIGS, folders=folders("together", 3))
    for index, (config, result) in enumerate(zip(CONFIGS, together, strict=True)):
        alone = train(config, folder=folders("alone", 3)[index])
        assert (result.status.state, result.status.step) == ("finished", 40)
        assert_alike(result.folder, alone.folder)


@pytest.mark.slow
def test_the_first_checkpoints_are_bit_identical_to_those_of_a_run_alone():
    together = train_population(CONFIGS, folders=folders("together", 3))
    for index, (config, result) in enumerate(zip(CONFIGS, together, strict=True)):
        alone = train(config, folder=folders("alone", 3)[index]).folder
        assert load_step(result.folder.checkpoints, 0).digest == load_step(alone.checkpoints, 0).digest


@pytest.mark.slow
def test_a_member_stops_early_alone_and_the_others_go_on_as_if_alone():
    stopping = {
        "early_stopping": {"patience": 1, "min_delta": 0.0, "monitor": "eval/true/loss"},
        "evaluation": {"every": 2},
    }
    configs = [change(config, **stopping) for config in CONFIGS]
    alone = [train(config, folder=place) for config, place in zip(configs, folders("alone", 3), strict=True)]
    assert len({result.status.step for result in alone}) > 1, "the seeds should stop at different steps"
    together = train_population(configs, folders=folders("together", 3))
    for result, expected in zip(together, alone, strict=True):
        assert result.status.state == expected.status.state
        assert result.status.step == expected.status.step
        assert result.status.best_step == expected.status.best_step
        assert result.status.reason == expected.status.reason
        assert_alike(result.folder, expected.folder)


@pytest.mark.slow
def test_a_member_that_goes_non_finite_fails_alone():
    places = folders("together", 3)
    waiter = stop_at(RunFolder(places[0]), 10)
    interrupted = train_population(CONFIGS, folders=places)
    waiter.join()
    assert {result.status.state for result in interrupted} == {"preempted"}
    step = interrupted[1].status.step
    saved = torch.load(interrupted[1].folder.resume_file, weights_only=True)
    saved["state_dict"]["rows"].fill_(float("nan"))
    torch.save(saved, interrupted[1].folder.resume_file)
    results = train_population(CONFIGS, folders=places)
    assert [result.status.state for result in results] == ["finished", "failed", "finished"]
    assert f"NaN or infinite at step {step + 1}" in str(results[1].status.reason)
    for index in (0, 2):
        assert_alike(results[index].folder, train(CONFIGS[index], folder=folders("alone", 3)[index]).folder)
    assert max(list_steps(results[1].folder.checkpoints)) <= step
    assert not np.isnan(pd.read_csv(results[1].folder.metrics_file)["train/loss"].iloc[-1])


def test_a_population_resumes_bit_identically():
    config = change(SHORT, checkpoints={"resume_seconds": 0.0})
    configs = [change(config, seeds={"model": seed}) for seed in range(3)]
    undisturbed = train_population(configs, folders=folders("undisturbed", 3))
    places = folders("together", 3)
    waiter = stop_at(RunFolder(places[2]), 10)
    interrupted = train_population(configs, folders=places)
    waiter.join()
    assert all(result.received == signal.SIGTERM for result in interrupted)
    assert all(result.status.state == "preempted" for result in interrupted)
    resumed = train_population(configs, folders=places)
    for result, expected in zip(resumed, undisturbed, strict=True):
        assert result.status.state == "finished"
        assert_identical(result.folder, expected.folder)


COMPILED = """
import test_population_training as t
from tiny_runs import change

configs = [change(c, trainer={"compile": "true"}, checkpoints={"resume_seconds": 0.0}) for c in t.CONFIGS]
undisturbed = t.train_population(configs, folders=t.folders("undisturbed", 3))
for config, result, place in zip(configs, undisturbed, t.folders("alone", 3), strict=True):
    t.assert_alike(result.folder, t.train(config, folder=place).folder)
places = t.folders("together", 3)
waiter = t.stop_at(t.RunFolder(places[2]), 10)
assert {result.status.state for result in t.train_population(configs, folders=places)} == {"preempted"}
waiter.join()
results = [*t.train_population(configs[:2], folders=places[:2]), t.train(configs[2], folder=places[2])]
for result, expected in zip(results, undisturbed, strict=True):
    assert result.status.state == "finished"
    t.assert_identical(result.folder, expected.folder)
"""


@pytest.mark.slow
def test_compiled_members_are_alike_alone_and_resume_bit_identically():
    """On a CPU, members run in parallel, one on each core.

    The test runs in a separate process, because shape checks cannot be traced.
    """
    paths = os.pathsep.join(str(folder) for folder in (Path(__file__).parent, Path(__file__).parent.parent))
    run = subprocess.run(
        [sys.executable, "-c", COMPILED],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
def test_members_at_different_steps_are_put_together_as_they_meet(capsys):
    places = folders("together", 3)
    train(CONFIGS[2], folder=places[2])
    waiter = stop_at(RunFolder(places[1]), 10)
    ahead = train(CONFIGS[1], folder=places[1])
    waiter.join()
    results = train_population(CONFIGS, folders=places)
    assert [result.was_done for result in results] == [False, False, True]
    assert f"Resuming {places[1]} from step {ahead.status.step}" in capsys.readouterr().out
    for index, result in enumerate(results):
        assert result.status.state == "finished"
        assert_alike(result.folder, train(CONFIGS[index], folder=folders("alone", 3)[index]).folder)


def test_a_member_of_a_population_may_be_resumed_alone():
    places = folders("together", 3)
    waiter = stop_at(RunFolder(places[0]), 10)
    train_population(CONFIGS, folders=places)
    waiter.join()
    assert torch.load(RunFolder(places[2]).resume_file, weights_only=True)["members"][0]["is_packed"]
    result = train(CONFIGS[2], folder=places[2])
    assert result.status.state == "finished"
    assert_alike(result.folder, train(CONFIGS[2], folder=folders("alone", 3)[2]).folder)


def test_runs_of_different_shape_are_refused_in_one_sentence():
    with pytest.raises(ConfigError, match=r"`optim.lr` differs among the members") as refusal:
        train_population([SHORT, change(SHORT, optim={"lr": 0.5})], folders=folders("together", 2))
    assert "\n" not in str(refusal.value)
    with pytest.raises(ConfigError, match="Two members of the population have the same folder"):
        train_population([SHORT, SHORT], folders=[local_root() / "one"] * 2)


def test_the_members_of_a_configuration_are_a_product():
    config = RunConfig(population=PopulationConfig(seeds=(0, 3), num_tasks=(1, float("inf"))))
    members = config.members()
    assert [(one.task.num_tasks, one.seeds.model) for one in members] == [
        (1, 0),
        (1, 3),
        (float("inf"), 0),
        (float("inf"), 3),
    ]
    assert all(one.seeds.data == one.seeds.noise == one.seeds.model for one in members)
    assert all((one.seeds.tasks, one.seeds.evaluation) == (0, 0) for one in members)
    assert all(one.members() == [one] for one in members)
    assert run_name(members[0]) == "quickstart,num_tasks=1"
    named = RunConfig(run_name="exp", population=PopulationConfig(seeds=(0, 3))).members()
    assert [run_name(one) for one in named] == ["exp/seed=0", "exp/seed=3"]


@pytest.mark.parametrize(
    ("population", "reason"),
    [
        ({"seeds": (0, 0)}, "contains the same value twice"),
        ({"seeds": ()}, "must be a list"),
        ({"seeds": (-1,)}, "at least 0"),
        ({"num_tasks": (0,)}, "number of tasks M"),
    ],
)
def test_a_population_that_cannot_be_is_refused(population, reason):
    with pytest.raises(ConfigError, match=reason):
        PopulationConfig(**population)


@pytest.mark.slow
def test_the_command_trains_a_population_and_shows_every_member(capsys):
    words = ["train", *as_population(SHORT), "--population.seeds", "0,1"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "seed=0" in printed
    assert "seed=1" in printed
    for seed in (0, 1):
        folder = RunFolder(local_root() / "tiny" / f"seed={seed}")
        assert folder.read_config().seeds.model == seed
        assert (folder.figures / "training.png").stat().st_size > 1000
    assert main(words) == 0
    assert "finished" in capsys.readouterr().out
