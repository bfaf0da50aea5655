"""The task-diversity experiment with tiny runs: which runs it trains and where, and what remains after an interruption or failure."""

import contextlib
import fcntl
import io
import json
import math
import os
import pty
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tiny_runs import TINY, change

from icl.cli import main
from icl.cli.diversity import _parser, _read_config
from icl.config import RunConfig, flatten
from icl.config.validation import ConfigError
from icl.diversity import jobs, metadata
from icl.diversity.experiment import run_experiment
from icl.diversity.jobs import experiment_points, root_of
from icl.diversity.metadata import read_metadata
from icl.diversity.runs import experiment_runs, find_runs
from icl.files.writing import StorageError
from icl.runs.checkpoints import list_steps, load_step
from icl.runs.folder import RunFolder
from icl.sweeps.engine import SweepResult
from icl.sweeps.points import sweep_points
from icl.sweeps.schema import read_sweep_file
from icl.training.run import train

QUICK = change(TINY, trainer={"max_steps": 20, "log_every": 5}, checkpoints={"every": 10, "num_log": 0})
SLOW = change(TINY, trainer={"max_steps": 120, "log_every": 5}, evaluation={"every": 10}, checkpoints={"every": 60})
SWEEP = Path(__file__).resolve().parents[2] / "sweeps" / "training-runs" / "icr-diversity.yaml"
DOCUMENTED = [
    "--num_steps",
    "500000",
    "--batch_size",
    "2048",
    "--learning_rate",
    "1e-3",
    "--warmup_steps",
    "50000",
    "--checkpoint_every",
    "50000",
    "--eval_every",
    "10000",
    "--early_stopping_patience",
    "10",
    "--early_stopping_min_delta",
    "0.001",
]


def command(tmp_path: Path, config: RunConfig = QUICK, *words: str) -> list[str]:
    """Return the words that run the experiment with M = 2, 4, inf below a temporary folder."""
    settings = flatten(config.to_dict())
    for key in ("task.num_tasks", "run_name", "population.seeds", "population.num_tasks"):
        settings.pop(key, None)
    folders = ["--base_checkpoint_dir", str(tmp_path / "base"), "--plots_dir", str(tmp_path / "plots")]
    options = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    return ["diversity", "--max_power", "2", *folders, *options, *words]


def parse(words: list[str]) -> RunConfig:
    return _read_config(_parser().parse_args(words))


def states(tmp_path: Path) -> dict[str, str]:
    return {entry["num_tasks"]: entry["state"] for entry in read_metadata(tmp_path / "base")["runs"]}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    """Return the folder of a finished experiment, and its output. Tests do not change the folder."""
    folder = tmp_path_factory.mktemp("finished")
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setenv("DEVICE", "cpu")
        patch.setenv("WANDB_MODE", "disabled")
        patch.delenv("AWS_BUCKET_NAME", raising=False)
        assert main(command(folder)) == 0
    return folder, said.getvalue()


def wait_until(condition, process: subprocess.Popen | None = None) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        assert process is None or process.poll() is None, "it ended before it could be interrupted"
        time.sleep(0.005)


def is_training(folder: Path) -> bool:
    status = RunFolder(folder).read_status()
    return status is not None and status.state == "running" and status.step >= 5


def assert_as_trained_alone(base: Path, config: RunConfig, elsewhere: Path, labels: Sequence[str]) -> None:
    """Check that the runs of an experiment have the same weights and rows as the same runs trained alone."""
    for label in labels:
        folder = find_runs(base)[label]
        own = change(config, task={"num_tasks": math.inf if label == "inf" else int(label)})
        alone = train(own, folder=elsewhere / label).folder
        assert list_steps(folder.checkpoints) == list_steps(alone.checkpoints)
        last = list_steps(alone.checkpoints)[-1]
        assert load_step(folder.checkpoints, last).digest == load_step(alone.checkpoints, last).digest
        assert folder.metrics_file.read_bytes() == alone.metrics_file.read_bytes()


# What is trained


def test_there_is_a_run_for_every_power_of_two_and_one_for_infinity(tmp_path):
    runs = experiment_runs(QUICK, max_power=5, base=tmp_path)
    assert [run.label for run in runs] == ["2", "4", "8", "16", "32", "inf"]
    assert [run.folder.path.name for run in runs] == [f"checkpoints_M{run.label}" for run in runs]
    assert {change(run.config, task={"num_tasks": 1}) for run in runs} == {change(QUICK, task={"num_tasks": 1})}


@pytest.mark.parametrize("words", [DOCUMENTED, [], ["--num_steps", "500_000"]])
def test_the_documented_command_and_none_at_all_are_the_published_sweep(words, tmp_path):
    runs = experiment_runs(parse(words), max_power=20, base=tmp_path)
    assert [run.config for run in runs] == [point.config for point in sweep_points(read_sweep_file(SWEEP))]


def test_shorter_runs_shrink_warmup_and_intervals_along():
    config = parse(["--num_steps", "1000"])
    assert (config.optim.warmup_steps, config.checkpoints.every, config.evaluation.every) == (100, 100, 20)
    assert parse(["--optim.schedule", "constant"]).optim.warmup_steps is None


def test_a_preset_of_ones_own_brings_its_own_settings(tmp_path):
    from icl.presets import preset

    assert parse(["--preset", "carroll"]) == preset("carroll")
    (tmp_path / "c.yaml").write_text("preset: raventos-small\ntrainer: {batch_size: 8}\n")
    config = parse(["--config", str(tmp_path / "c.yaml"), "--num_steps", "100", "--warmup_steps", "10"])
    assert (config.preset, config.trainer.batch_size, config.optim.warmup_steps) == ("raventos-small", 8, 10)
    assert config.early_stopping.patience is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--max_power", "0"], "from 1 to 30"),
        (["--max_power", "many"], "whole number"),
        (["--max_powr", "3"], "max_power"),
        (["--num_steps", "many"], "trainer.max_steps"),
        (["--num_steps", "10", "--trainer.max_steps", "10"], "same setting"),
        (["--task.num_tasks", "8"], "set by the experiment"),
        (["--trainer.devices", "2"], "icl sweep"),
        (["--warmup_steps", "500000"], "must be below"),
    ],
)
@pytest.mark.parametrize("where", [[], ["--background"]])
def test_a_mistake_is_one_sentence_and_makes_nothing(words, said, where, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["diversity", *words, *where]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# From the first step to the figure


def test_every_run_is_trained_as_it_would_be_alone_and_the_figure_drawn(finished, tmp_path):
    folder, said = finished
    assert "[2/3] M = 4: finished at step 20, loss" in said
    assert str(folder / "plots" / "diversity.png") in said
    assert (folder / "plots" / "diversity.png").read_bytes().startswith(b"\x89PNG")
    assert list(find_runs(folder / "base")) == ["2", "4", "inf"]
    assert_as_trained_alone(folder / "base", QUICK, tmp_path, ["2", "4", "inf"])


def test_the_metadata_tell_everything_there_is_to_know(finished):
    tree = read_metadata(finished[0] / "base")
    assert tree["state"] == "finished"
    assert tree["settings"]["trainer"]["max_steps"] == 20
    assert "num_tasks" not in tree["settings"]["task"]
    assert {"icl", "torch", "lightning", "python"} <= set(tree["versions"])
    for entry, folder in zip(tree["runs"], find_runs(finished[0] / "base").values(), strict=True):
        status = folder.read_status()
        assert status is not None
        assert (entry["state"], entry["step"], entry["loss"]) == ("finished", 20, status.loss)
        assert entry["folder"] == str(folder.path)
        assert entry["started"] <= entry["ended"] <= tree["ended"]


def test_finished_runs_are_skipped_and_the_figure_is_drawn_again(finished, capsys):
    base, figure = finished[0] / "base", finished[0] / "plots" / "diversity.png"
    before = {path: path.stat().st_mtime_ns for path in base.glob("checkpoints_M*/**/*") if path.is_file()}
    old = read_metadata(base)["runs"]
    figure.unlink()
    assert main(command(finished[0])) == 0
    assert capsys.readouterr().out.count("was finished at step 20") == 3
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert read_metadata(base)["runs"] == old
    assert figure.is_file()


@pytest.mark.slow
def test_the_metadata_are_there_from_the_start_and_follow_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr(metadata, "REFRESH_SECONDS", 0.01)
    base, seen, said = tmp_path / "base", [], []
    watching = threading.Event()

    def watch() -> None:
        while not watching.wait(0.005):
            seen.append(read_metadata(base))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        run_experiment(
            change(SLOW, trainer={"max_steps": 100}),
            max_power=1,
            base=base,
            say=lambda line: said.append((line, read_metadata(base))),
        )
    finally:
        watching.set()
        thread.join()
    first = said[0][1]
    assert first["state"] == "running"
    assert first["pid"] == os.getpid()
    assert [(entry["state"], entry["step"]) for entry in first["runs"]] == [("waiting", 0), ("waiting", 0)]
    entries = [tree["runs"][0] for tree in seen if tree]
    assert any(entry["state"] == "running" and 0 < entry["step"] < 100 for entry in entries)
    steps = [entry["step"] for entry in entries]
    assert steps == sorted(steps)


@pytest.mark.slow
def test_a_run_that_stops_early_is_done(tmp_path, capsys):
    config = change(QUICK, evaluation={"every": 5}, early_stopping={"patience": 1, "min_delta": 1e6})
    assert main(command(tmp_path, config)) == 0
    assert set(states(tmp_path).values()) == {"stopped_early"}
    assert read_metadata(tmp_path / "base")["runs"][0]["reason"]
    capsys.readouterr()
    assert main(command(tmp_path, config)) == 0
    assert capsys.readouterr().out.count("was stopped early at step") == 3


# What goes wrong


def test_a_run_that_fails_is_recorded_the_rest_goes_on_and_the_next_command_tries_again(tmp_path, capsys):
    damaged = tmp_path / "base" / "checkpoints_M4" / "last.ckpt"
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(b"half a file")
    assert main(command(tmp_path)) == 1
    captured = capsys.readouterr()
    assert "M = 4 failed" in captured.err
    assert states(tmp_path) == {"2": "finished", "4": "failed", "inf": "finished"}
    tree = read_metadata(tmp_path / "base")
    assert tree["state"] == "failed"
    assert "last.ckpt is damaged" in tree["runs"][1]["reason"]
    assert (tmp_path / "plots" / "diversity.png").is_file()
    damaged.unlink()
    assert main(command(tmp_path)) == 0
    assert set(states(tmp_path).values()) == {"finished"}
    assert_as_trained_alone(tmp_path / "base", QUICK, tmp_path / "alone", ["4"])


def test_when_every_loss_diverges_all_are_tried_once_and_nothing_is_drawn(tmp_path, capsys):
    words = command(tmp_path, change(QUICK, optim={"lr": 1e30, "grad_clip": None}))
    assert main(words) == 1
    logs = [path.read_text() for path in (tmp_path / "base").glob("*/run.log")]
    assert main(words) == 1
    assert capsys.readouterr().out.count("This run is not tried again; use --retry to try it again.") == 3
    assert [path.read_text() for path in (tmp_path / "base").glob("*/run.log")] == logs
    assert main([*words, "--retry"]) == 1
    assert all(path.read_text().count("starting") == 2 for path in (tmp_path / "base").glob("*/run.log"))
    capsys.readouterr()
    assert main(words) == 1
    assert set(states(tmp_path).values()) == {"failed"}
    reasons = [entry["reason"] for entry in read_metadata(tmp_path / "base")["runs"]]
    assert all("NaN or infinite" in reason for reason in reasons)
    assert not (tmp_path / "plots").exists()
    assert capsys.readouterr().err.count("icl: M = ") == 3


def test_runs_of_other_settings_are_not_mixed_in(finished, capsys):
    metadata = finished[0] / "base" / "experiment_metadata.json"
    before = metadata.read_bytes()
    assert main(command(finished[0], change(QUICK, optim={"lr": 0.5}))) == 2
    said = capsys.readouterr().err
    assert "optim.lr" in said
    assert "--base_checkpoint_dir" in said
    assert metadata.read_bytes() == before


def test_a_login_node_without_the_device_submits_and_shows_jobs_for_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DEVICE", "cuda")
    monkeypatch.chdir(tmp_path)
    words = ["diversity", "--preset", "quickstart", "--max_power", "1"]
    assert main([*words, "--slurm", "--dry-run"]) == 0
    assert "--array=0-1" in capsys.readouterr().out
    assert main([*words, "--status"]) == 1
    assert "waiting   M = inf: not started" in capsys.readouterr().out
    assert main([*words, "--slurm", "--background"]) == 2
    assert "`--background` cannot be given with `--slurm`" in capsys.readouterr().err


@pytest.mark.parametrize("base", ["my experiment", "..", "a%b/c", "/tmp/x (1)", "checkpoints", "../checkpoints"])
def test_jobs_train_the_same_folders_whatever_their_name(tmp_path, monkeypatch, base):
    """The folder of an experiment may have a name that a run may not have."""
    monkeypatch.chdir(tmp_path)
    runs = experiment_runs(QUICK, max_power=1, base=Path(base))
    points = experiment_points(runs, Path(base))
    assert [root_of(Path(base)) / point.name for point in points] == [run.folder.path for run in runs]
    assert [point.config.run_name for point in points] == [point.name for point in points]


def test_a_job_goes_on_if_the_metadata_cannot_be_written(tmp_path, monkeypatch, capsys):
    """The metadata are only for information. An error would end the job between the claim on a run and its start."""

    def fail(_: metadata.Metadata) -> None:
        raise StorageError("No space left on device")

    def run_sweep(*_: object, say, **__: object) -> SweepResult:
        monkeypatch.setattr(metadata.Metadata, "write", fail)
        say("[0/2] started")
        return SweepResult({})

    monkeypatch.setattr(jobs, "run_sweep", run_sweep)
    runs = experiment_runs(QUICK, max_power=1, base=tmp_path / "base")
    result, _ = jobs.run_job(runs, base=tmp_path / "base", max_power=1, retry=False, job=None)
    assert result.is_over
    assert capsys.readouterr().out == "[0/2] started\n"


def test_two_processes_cannot_hold_one_experiment(tmp_path, capsys):
    (tmp_path / "base").mkdir()
    with (tmp_path / "base" / ".lock").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert main(command(tmp_path)) == 1
    assert "Another process is training the experiment" in capsys.readouterr().err
    assert not (tmp_path / "base" / "experiment_metadata.json").exists()


@pytest.mark.slow
def test_a_lost_terminal_changes_nothing_and_sigterm_saves_for_the_same_command(tmp_path, monkeypatch):
    """The terminal is lost while M = 2 trains, and SIGTERM arrives while M = 4 trains."""
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))  # as in this process: sums depend on it
    words, base = command(tmp_path, SLOW), tmp_path / "base"
    terminal, end = pty.openpty()
    inherited = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # `nohup pytest` would hand on that it is ignored
    with subprocess.Popen(
        [sys.executable, "-m", "icl", *words],
        stdin=end,
        stdout=end,
        stderr=end,
        start_new_session=True,
    ) as process:
        signal.signal(signal.SIGHUP, inherited)
        os.close(end)
        wait_until(lambda: is_training(base / "checkpoints_M2"), process)
        process.send_signal(signal.SIGHUP)
        wait_until((base / "experiment.log").exists, process)
        os.close(terminal)
        wait_until(lambda: is_training(base / "checkpoints_M4"), process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    log = (base / "experiment.log").read_text()
    assert "M = 2: finished at step 120" in log
    assert "stopped by SIGTERM with 1 of 3 runs done; run the same command again to continue" in log
    assert states(tmp_path) == {"2": "finished", "4": "preempted", "inf": "waiting"}
    assert read_metadata(base)["state"] == "preempted"
    assert main(words) == 0
    assert_as_trained_alone(base, SLOW, tmp_path / "alone", ["4"])


@pytest.mark.slow
def test_in_the_background_it_has_a_session_a_log_and_a_process_to_stop(tmp_path, capsys):
    words, base = command(tmp_path, change(SLOW, trainer={"max_steps": 4000})), tmp_path / "base"
    assert main([*words, "--background"]) == 0
    said = capsys.readouterr().out
    process = read_metadata(base)["pid"]
    try:
        assert f"kill {process}" in said
        assert str(base / "experiment.log") in said
        assert os.getsid(process) == process
        assert main([*words, "--background"]) == 1
        assert "Another process is training the experiment" in capsys.readouterr().err
        wait_until(lambda: is_training(base / "checkpoints_M2"))
    finally:
        os.kill(process, signal.SIGTERM)
        wait_until(lambda: read_metadata(base)["state"] != "running")
        os.waitpid(process, 0)
    assert states(tmp_path)["2"] == "preempted"
    assert "Training" in (base / "experiment.log").read_text()


# What people see of it


def test_icl_runs_shows_the_experiment_in_the_order_of_m(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished[0] / "base", "checkpoints")
    shutil.copytree("checkpoints/checkpoints_M2", "checkpoints/checkpoints_M16")
    for words in ([], ["checkpoints"]):
        assert main(["runs", *words]) == 0
        said = capsys.readouterr().out
        lines = [line.split() for line in said.splitlines() if line.startswith("checkpoints_M")]
        assert [line[0] for line in lines] == [f"checkpoints_M{label}" for label in ("2", "4", "16", "inf")]
        assert all(line[1] == "finished" for line in lines)
        assert "3 runs: 3 finished" in said


def test_icl_runs_says_of_a_killed_experiment_that_nobody_runs_it(finished, tmp_path, capsys):
    shutil.copytree(finished[0] / "base", tmp_path / "base")
    file = tmp_path / "base" / "experiment_metadata.json"
    with subprocess.Popen(["true"]) as gone:
        pass
    for pid, said in (
        (gone.pid, "killed; run the same command again to continue"),
        (os.getpid(), f"running (process {os.getpid()}"),
    ):
        file.write_text(json.dumps(read_metadata(file.parent) | {"state": "running", "pid": pid}))
        assert main(["runs", str(file.parent)]) == 0
        assert said in capsys.readouterr().out


def test_help_names_every_option_and_how_to_outlive_a_terminal(capsys):
    with pytest.raises(SystemExit):
        main(["diversity", "--help"])
    said = capsys.readouterr().out
    words = [*DOCUMENTED[::2], "--max_power", "--base_checkpoint_dir", "--background", "nohup", "example:"]
    assert all(word in said for word in words)


def test_without_a_command_line_the_metadata_are_plain_json(tmp_path):
    run_experiment(QUICK, max_power=1, base=tmp_path / "base", say=lambda line: None)
    tree = json.loads((tmp_path / "base" / "experiment_metadata.json").read_text())
    assert [entry["num_tasks"] for entry in tree["runs"]] == ["2", "inf"]
    with pytest.raises(ConfigError, match="max_power"):
        run_experiment(QUICK, max_power=31, base=tmp_path / "base")
