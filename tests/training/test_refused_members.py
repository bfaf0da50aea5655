"""A member that cannot resume ends alone, with a reason; the other members train as if it did not exist."""

import re
import shutil
import signal

import pandas as pd
import pytest
import torch
from tiny_runs import TINY, as_population, change

import icl.cli.train
import icl.plotting.training
from icl.build import build_evaluation_sets
from icl.cli import main
from icl.plotting.training import draw_run, drawn_losses
from icl.runs.folder import RunFolder, local_root
from icl.runs.status import Status
from icl.training import run
from icl.training.run import TrainResult, train, train_population

QUICK = change(TINY, trainer={"max_steps": 10}, checkpoints={"every": 5, "num_log": 0})
CONFIGS = [change(QUICK, seeds={"model": seed}) for seed in range(3)]
WORDS = ["train", *as_population(QUICK), "--population.seeds", "0,1"]


@pytest.fixture
def places():
    return [str(local_root() / "together" / str(index)) for index in range(3)]


@pytest.fixture
def begun(places) -> RunFolder:
    """Return the folder of the second member, which was stopped at step 10 of 10 before it was recorded as finished."""
    folder = train(CONFIGS[1], folder=places[1]).folder
    folder.write_status(Status(state="preempted", step=10, max_steps=10))
    return folder


def states(results):
    return [result.status.state for result in results]


def test_a_damaged_resume_file_fails_its_member_alone(places, begun, capsys):
    begun.resume_file.write_bytes(begun.resume_file.read_bytes()[:500])
    results = train_population(CONFIGS, folders=places)
    assert states(results) == ["finished", "failed", "finished"]
    assert "So the run cannot be resumed" in str(results[1].status.reason)
    status = begun.read_status()
    assert status is not None
    assert (status.state, status.step, status.reason) == ("failed", 10, results[1].status.reason)
    assert f"icl: {begun.path} is left out: {begun.resume_file} is damaged or was cut short" in capsys.readouterr().err
    alone = train(CONFIGS[0], folder=local_root() / "alone")
    assert results[0].folder.metrics_file.read_bytes() == alone.folder.metrics_file.read_bytes()


def test_lost_rows_are_told_to_the_run_that_lost_them(places):
    longer = [change(config, trainer={"max_steps": 20}) for config in CONFIGS]
    stopped = train(longer[1], folder=places[1]).folder
    resume_at(stopped, 10)
    lines = stopped.metrics_file.read_text().splitlines(keepends=True)
    stopped.metrics_file.write_text("".join(line for line in lines if not line.startswith("10,")))
    results = train_population(longer, folders=places)
    assert states(results) == ["finished", "failed", "finished"]
    assert "has lost the row of step 10" in str(results[1].status.reason)
    assert [RunFolder(place).read_status().state for place in places] == ["finished", "failed", "finished"]


def resume_at(folder: RunFolder, step: int) -> None:
    """Change a run's resume file and status so that they are at an earlier step."""
    content = torch.load(folder.resume_file, weights_only=True)
    content["global_step"] = step
    torch.save(content, folder.resume_file)
    folder.write_status(Status(state="preempted", step=step, max_steps=20))


@pytest.mark.parametrize("content", [b"[1, 2]", None], ids=["damaged", "of another run"])
def test_a_folder_that_is_not_the_members_is_left_as_it_is(places, begun, content):
    if content is None:
        begun.write_config(change(CONFIGS[1], optim={"lr": 0.5}))
    else:
        begun.config_file.write_bytes(content)
    before = {path: path.read_bytes() for path in begun.path.rglob("*") if path.is_file()}
    results = train_population(CONFIGS, folders=places)
    assert states(results) == ["finished", "failed", "finished"]
    assert {path: path.read_bytes() for path in begun.path.rglob("*") if path.is_file()} == before
    reason = "was begun with other settings: `optim.lr`" if content is None else "it contains no settings"
    assert reason in str(results[1].status.reason)


def test_a_run_that_another_process_trains_is_left_to_it(places, begun):
    before = begun.status_file.read_bytes()
    with begun.lock():
        results = train_population(CONFIGS, folders=places)
    assert states(results) == ["finished", "failed", "finished"]
    assert "Another process is training" in str(results[1].status.reason)
    assert begun.status_file.read_bytes() == before


def test_a_metric_that_one_member_lacks_is_that_members_refusal(places):
    stopping = {"monitor": "eval/pretrain/delta_dmmse", "patience": 9}
    configs = [change(config, early_stopping=stopping) for config in CONFIGS]
    configs[2] = change(configs[2], task={"num_tasks": float("inf")})
    results = train_population(configs, folders=places)
    assert states(results) == ["finished", "finished", "failed"]
    assert "the metrics are" in str(results[2].status.reason)
    assert not RunFolder(places[2]).path.exists()


def test_the_command_tells_each_reason_once_and_nothing_else_of_runs_that_all_fail(capsys):
    for seed in (0, 1):
        folder = RunFolder(local_root() / "tiny" / f"seed={seed}")
        folder.write_config(change(QUICK, optim={"lr": 0.5}))
    assert main(WORDS) == 1
    told = capsys.readouterr()
    assert told.out == ""
    lines = told.err.splitlines()
    assert len(lines) == 2
    assert all("was begun with other settings" in line for line in lines)


@pytest.mark.slow
def test_the_command_trains_and_shows_the_others_and_names_who_failed_last(capsys):
    bad = RunFolder(local_root() / "tiny" / "seed=0")
    bad.write_config(change(QUICK, optim={"lr": 0.5}))
    assert main(WORDS) == 1
    told = capsys.readouterr()
    assert told.err.splitlines()[-1].startswith(f"icl: {bad.path} failed: The run")
    assert (local_root() / "tiny" / "seed=1" / "figures" / "training.png").is_file()
    assert "Mean loss" in told.out


@pytest.mark.parametrize(("steps", "where"), [((12, 12), "step 12;"), ((1000, 12), "steps 12 to 1,000;")])
def test_a_signal_is_told_with_the_steps_of_those_that_it_stopped(monkeypatch, capsys, steps, where):
    done = TrainResult(RunFolder("a"), Status(state="finished", step=4000), None, True)
    stopped = [
        TrainResult(RunFolder(str(step)), Status(state="preempted", step=step), signal.SIGTERM) for step in steps
    ]
    monkeypatch.setattr(run, "train_population", lambda configs, wandb_run=None: [done, *stopped])
    assert main(WORDS) == 143
    assert f"stopped by SIGTERM at {where}" in capsys.readouterr().err


@pytest.mark.slow
def test_members_share_the_prompts_they_are_shown_on_and_what_is_drawn_is_not_drawn_again(monkeypatch, capsys, places):
    built, drawn = [], []

    def build(config, **options):
        built.append(config)
        return build_evaluation_sets(config, **options)

    def draw(folder, *shared):
        drawn.append(folder.path)
        return draw_run(folder, *shared)

    monkeypatch.setattr(icl.plotting.training, "build_evaluation_sets", build)
    monkeypatch.setattr(icl.plotting.training, "draw_run", draw)
    configs = [*CONFIGS[:2], change(CONFIGS[2], task={"num_tasks": float("inf")})]
    assert icl.cli.train._show_members(train_population(configs, folders=places)) == []
    assert (len(built), len(drawn)) == (2, 3)
    table = told_table(capsys)
    (RunFolder(places[2]).figures / "training.png").unlink()
    assert icl.cli.train._show_members(train_population(configs, folders=places)) == []
    assert [str(path) for path in drawn[3:]] == places[2:]
    assert told_table(capsys) == table


def told_table(capsys):
    return capsys.readouterr().out.partition("Mean loss")[2]


@pytest.mark.slow
def test_a_member_that_cannot_be_drawn_is_named_and_the_others_are_shown(places, capsys):
    results = train_population(CONFIGS, folders=places)
    shutil.rmtree(results[0].folder.checkpoints.root)
    reasons = icl.cli.train._show_members(results)
    assert len(reasons) == 1
    assert "There are no checkpoints" in reasons[0]
    assert places[1] in capsys.readouterr().out


def test_the_table_is_read_back_as_it_was_drawn(places):
    folder = train(QUICK, folder=places[0]).folder
    assert drawn_losses(folder) is None
    table, figure = draw_run(folder)[:2]
    pd.testing.assert_frame_equal(drawn_losses(folder), table, rtol=1e-5)
    folder.write_result("losses.csv", "position,model\n")
    assert drawn_losses(folder) is None
    figure.unlink()
    assert drawn_losses(folder) is None


@pytest.mark.parametrize(
    ("num_tasks", "said"),
    [(8, "times ridge's and [0-9.]+ times dMMSE's. It is .* above dMMSE's, the optimum for these M tasks"),
     ("inf", "times ridge's. It is .* above ridge's, the optimum for M = ∞")],
)  # fmt: skip
def test_the_headline_compares_with_both_and_with_the_optimum(num_tasks, said, places, capsys):
    folder = train(change(QUICK, task={"num_tasks": num_tasks}), folder=places[0]).folder
    icl.cli.train._show_run(folder)
    lines = capsys.readouterr().out.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("The model's mean loss is"))
    line = " ".join(lines[first : first + 2])
    assert max(map(len, lines[first : first + 2])) < 100
    assert re.search(said, line)
    table = drawn_losses(folder)
    optimum = "dmmse" if num_tasks == 8 else "ridge"
    excess, stderr = map(float, re.search(r"(-?[0-9.]+) ± ([0-9.]+)", line).groups())
    assert excess == pytest.approx(table.loc["mean", "model"] - table.loc["mean", optimum], abs=1e-4)
    assert 0 < stderr < 1
