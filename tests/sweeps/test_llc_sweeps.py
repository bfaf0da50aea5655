"""Sweeps of `icl llc`: each point is a run with a sampler, and has its own name and job."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny_runs import TINY

from icl.build import build_model
from icl.cli import main
from icl.presets import preset
from icl.resolve import resolve
from icl.run_names import run_name
from icl.runs.checkpoints import save_checkpoint
from icl.runs.folder import RunFolder
from icl.sampling.published import PUBLISHED
from icl.sweeps.points import sweep_points
from icl.sweeps.schema import SweepFileError, read_sweep_file
from icl.sweeps.state import point_state

ROOT = Path(__file__).parents[2] / "sweeps"
LLC = sorted(
    [*(ROOT / "llc").glob("*.yaml"), *(ROOT / "calibration").glob("*.yaml"), *(ROOT / "analysis").glob("*.yaml")]
)
NUM_POINTS = {
    "0-L2H4-llcs-over-time": 5,
    "epsilon-nbeta-gamma": 80,
    "n": 6,
    "batch-size": 6,
    "fixed-or-fresh-minibatches": 6,
    "loss-function": 2,
    "failure-step-0": 1,
    "failure-tiny-noise": 1,
    "L2H4-llcs": 5,
    "L2H4-rescaling": 5,
    "L2H4Mfin-llcs": 21,
    "quickstart-llcs": 4,
}


def points(tmp_path, parameters, *, command=("${env}", "icl", "llc")):
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({"method": "grid", "command": list(command), "parameters": parameters}))
    return sweep_points(read_sweep_file(path))


def of_file(folder, name):
    return sweep_points(read_sweep_file(ROOT / folder / f"{name}.yaml"))


def test_a_point_lies_below_its_run_and_is_told_apart_by_its_sampler(tmp_path):
    found = points(tmp_path, {"task.num_tasks": {"value": 8}, "sampler.lr": {"values": [1e-6, 2e-5]}})
    assert [point.name for point in found] == [
        "quickstart,num_tasks=8/llc/lr=1e-06",
        "quickstart,num_tasks=8/llc/preset",
    ]
    assert len({point.job for point in found}) == 2
    assert not any(point.trains for point in found)


def test_a_trained_points_job_does_not_depend_on_the_sampler(tmp_path):
    command = ("${env}", "icl", "train")
    (plain,) = points(tmp_path, {"task.num_tasks": {"value": 8}}, command=command)
    (other,) = points(tmp_path, {"task.num_tasks": {"value": 8}, "sampler.lr": {"value": 1e-6}}, command=command)
    assert (plain.name, plain.job) == (other.name, other.job)
    with pytest.raises(SweepFileError, match="would both be the run"):
        points(tmp_path, {"sampler.lr": {"values": [1e-6, 1e-5]}}, command=command)


def test_the_words_of_the_command_count(tmp_path):
    (point,) = points(
        tmp_path, {"sampler.lr": {"value": 1e-6}}, command=("icl", "llc", "--published", "--steps", "last")
    )
    assert point.config.sampler.steps == "last"
    with pytest.raises(SweepFileError, match="is swept"):
        points(tmp_path, {"sampler.lr": {"value": 1e-6}}, command=("icl", "llc", "--sampler.lr", "3"))


@pytest.mark.slow
def test_a_point_is_the_run_that_training_makes(tmp_path):
    """For each of our LLC sweeps with a training sweep, the runs are those that the training sweep trains."""
    trained = {
        point.name for name in ("L2H4Minf", "L2H4Mfin", "quickstart") for point in of_file("training-runs", name)
    }
    for path in LLC:
        runs = {run_name(point.config) for point in sweep_points(read_sweep_file(path))}
        assert runs <= trained, path.name


def test_there_are_the_files_that_are_promised():
    assert {path.stem: len(sweep_points(read_sweep_file(path))) for path in LLC} == NUM_POINTS


def test_the_published_sweep_has_the_published_sampler():
    for point in of_file("llc", "0-L2H4-llcs-over-time"):
        ours = point.config.sampler  # SGLD has no friction, so that of the preset stays
        published = dataclasses.replace(PUBLISHED, num_init_batches=ours.num_init_batches, friction=ours.friction)
        assert point.config.sampler == published


def test_the_failures_have_their_published_scales():
    (start,), (tiny,) = of_file("calibration", "failure-step-0"), of_file("calibration", "failure-tiny-noise")
    assert (start.config.sampler.steps, start.config.sampler.localization, start.config.sampler.lr) == ("0", 0, 1e-5)
    sampler = tiny.config.sampler
    scales = (sampler.lr, sampler.nbeta * sampler.lr / 2, sampler.localization * sampler.lr / 2)
    assert scales == pytest.approx((1e-8, 0.01, 0.001))


def test_the_trustworthy_sweep_has_the_presets_sampler():
    assert all(point.config.sampler == preset("L2H4").sampler for point in of_file("analysis", "L2H4-llcs"))


def make_run(folder, config):
    run = RunFolder(folder)
    run.write_config(config)
    save_checkpoint(run.checkpoints, 0, config, dict(build_model(config).named_parameters()))


@pytest.mark.slow
def test_a_sweep_runs_its_points_once_and_says_where_they_stand(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_ROOT", str(tmp_path / "runs"))
    file = tmp_path / "sweep.yaml"
    tree = TINY.to_dict() | {"run_name": "tiny"}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tree))
    make_run(tmp_path / "runs" / "tiny", resolve(tree))
    sampler = {
        "batch_size": 8,
        "num_samples": 64,
        "num_draws": 4,
        "num_burnin_steps": 2,
        "num_chains": 2,
        "num_init_batches": 2,
    }
    parameters = {f"sampler.{key}": {"value": value} for key, value in sampler.items()}
    parameters["sampler.lr"] = {"value": 1e-6}
    command = ["${env}", "icl", "llc", "--config", str(tmp_path / "tiny.yaml")]
    file.write_text(yaml.safe_dump({"method": "grid", "command": command, "parameters": parameters}))
    assert main(["sweep", str(file)]) == 0
    told = capsys.readouterr().out
    assert "1 done" in told
    rows = (tmp_path / "runs" / "tiny" / "results" / "llc.csv").read_text().splitlines()
    assert len(rows) == 2
    (point,) = sweep_points(read_sweep_file(file))
    assert point.name.startswith("tiny/llc/")
    assert point_state(point, tmp_path / "runs").state == "done"
    assert json.loads((tmp_path / "runs" / point.name / "point.json").read_text())["sampler.lr"] == 1e-6
    assert main(["sweep", str(file)]) == 0


def test_a_point_without_its_run_fails_and_says_what_to_train(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_ROOT", str(tmp_path / "runs"))
    monkeypatch.setenv("ICL_SWEEP_POINT", str(tmp_path / "point.json"))
    (tmp_path / "point.json").write_text(json.dumps({"task.num_tasks": 8}))
    assert main(["llc"]) == 2
    assert "train it with `icl train` and the same settings" in capsys.readouterr().err


@pytest.mark.slow
def test_a_point_of_wandb_arrives(tmp_path):
    """The program is started as `wandb agent` does, offline: the client passes the config."""
    root = tmp_path / "runs"
    make_run(root / "tiny", TINY)
    point = tmp_path / "config-defaults.yaml"
    point.write_text(yaml.safe_dump({"wandb_version": 1, "sampler.lr": {"value": 1e-6}, "run_name": {"value": "tiny"}}))
    environment = os.environ | {
        "WANDB_MODE": "offline",
        "WANDB_SWEEP_ID": "sweep1",
        "WANDB_RUN_ID": "run1",
        "WANDB_SWEEP_PARAM_PATH": str(point),
        "WANDB_DIR": str(tmp_path),
        "LOCAL_ROOT": str(root),
        "OMP_NUM_THREADS": "1",
    }
    small = {
        "batch_size": 8,
        "num_samples": 64,
        "num_draws": 4,
        "num_burnin_steps": 2,
        "num_chains": 2,
        "num_init_batches": 2,
    }
    words = [word for key, value in small.items() for word in (f"--sampler.{key}", str(value))]
    command = [sys.executable, "-m", "icl", "llc", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = (root / "tiny" / "results" / "llc.csv").read_text().splitlines()
    assert len(rows) == 2
    assert ",1e-06," in rows[1]
