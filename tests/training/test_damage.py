"""Run folders that are damaged or mixed up: each gets one sentence, and never a traceback or a silent mistake."""

import json
import shutil
import threading

import pytest
import torch
from tiny_runs import TINY, as_arguments, change

from icl.api import load_model
from icl.cli import main
from icl.config.validation import ConfigError, UserError
from icl.evaluation.prediction import PromptError, predict_from_prompt
from icl.runs.checkpoints import CheckpointError, checkpoint_files, list_steps
from icl.runs.folder import RunFolder, local_root
from icl.runs.metrics_file import MetricsFile
from icl.tasks.prompts import sample_prompts
from icl.training.run import train
from icl.whole_runs import evaluate_run, save_evaluation

QUICK = change(TINY, trainer={"max_steps": 20})
COMMAND = ["train", *as_arguments(QUICK)]


@pytest.fixture
def folder() -> RunFolder:
    return train(QUICK).folder


def unfinish(folder: RunFolder) -> None:
    folder.status_file.unlink()


def test_another_runs_resume_file_is_refused(folder):
    other = RunFolder(local_root() / "other")
    other.path.mkdir()
    shutil.copy(folder.resume_file, other.resume_file)
    with pytest.raises(ConfigError, match=r"`seeds.model` was 0 and is now 3"):
        train(change(QUICK, seeds={"model": 3}), folder=other.path)
    assert not other.config_file.exists()


def test_a_lost_config_does_not_let_other_settings_in(folder):
    folder.config_file.unlink()
    unfinish(folder)
    with pytest.raises(ConfigError, match=r"seeds.model"):
        train(change(QUICK, seeds={"model": 3}))


def test_lost_rows_are_named_on_resume(folder):
    columns = folder.metrics_file.read_text().splitlines()[0].split(",")
    rows = MetricsFile(folder.metrics_file, columns)
    rows.begin([0, 10])
    assert folder.metrics_file.read_text().count("\n") == 3
    with pytest.raises(UserError, match="has lost the row of step 20"):
        rows.begin([0, 10, 20])
    folder.metrics_file.unlink()
    with pytest.raises(UserError, match="has lost the row of step 0"):
        rows.begin([0, 10])


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[1, 2]", b"task: 5\n", b"task: {curriculum: 1}\n"])
def test_a_damaged_config_is_one_sentence(folder, content, capsys):
    folder.config_file.write_bytes(content)
    assert main(COMMAND) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "content", ['{"state": "running", "step": "x"}', '{"state": "finished", "step": null}', "{", "5"]
)
def test_a_damaged_status_does_not_spoil_the_list_of_runs(folder, content, capsys):
    train(change(QUICK), folder=local_root() / "whole")
    folder.status_file.write_text(content)
    assert main(["runs"]) == 0
    assert "whole" in capsys.readouterr().out


def test_a_finished_run_without_checkpoints_is_one_sentence(folder, capsys):
    shutil.rmtree(folder.checkpoints.root)
    capsys.readouterr()
    assert main(COMMAND) == 1
    assert "lacks the checkpoints of steps 0, 1, " in capsys.readouterr().err


def test_checkpoints_are_those_of_the_folder_itself(folder):
    with pytest.raises(CheckpointError, match="There are no checkpoints"):
        checkpoint_files(local_root())
    assert len(checkpoint_files(folder.checkpoints.root)) == len(list_steps(folder.checkpoints))


def test_a_run_resumed_elsewhere_is_still_one_run(folder):
    unfinish(folder)
    train(change(QUICK, checkpoints={"resume_seconds": 1.0}))
    numbers, _ = evaluate_run(folder.path, num_prompts=8, shifts=[])
    assert numbers["step"].nunique() == len(list_steps(folder.checkpoints))


def test_evaluating_the_checkpoints_folder_writes_to_the_run(folder):
    numbers, references = evaluate_run(folder.checkpoints.root, num_prompts=8, shifts=[])
    written = dict(save_evaluation(folder.checkpoints.root, numbers, references))
    assert written["Numbers"] == folder.results / "evaluation.csv"


def test_numbers_that_are_not_finite_are_null_in_json(folder, tmp_path):
    numbers, references = evaluate_run(folder.path, num_prompts=8, shifts=[])
    numbers.loc[:, "value"] = float("nan")
    save_evaluation(folder.path, numbers, references, out=tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text())["evaluation"][0]["value"] is None


def test_predictions_that_are_not_finite_are_refused(folder):
    with pytest.raises(PromptError, match="not finite"):
        predict_from_prompt(load_model(folder.path), [[1e38, 1e38]], [1e38], [[1e38, 1e38]])


def test_double_precision_trains_and_evaluates():
    folder = train(change(QUICK, trainer={"precision": "64-true"})).folder
    assert torch.isfinite(
        load_model(folder.path)(*sample_prompts(QUICK, stream="true", step=0, batch_size=2)[:2])
    ).all()


def test_training_off_the_main_thread(tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(train(QUICK, folder=tmp_path / "threaded")))
    thread.start()
    thread.join()
    assert results[0].status.state == "finished"


def test_the_status_has_the_loss_of_the_last_row(folder):
    status = folder.read_status()
    assert status is not None
    last = folder.metrics_file.read_text().splitlines()[-1].split(",")
    assert status.loss == pytest.approx(float(last[1]), rel=1e-6)


def test_a_bad_monitor_is_refused_before_the_folder_is_claimed():
    with pytest.raises(ConfigError, match="eval/pretrain/loss"):
        train(change(QUICK, early_stopping={"monitor": "nope", "patience": 1}))
    assert not (local_root() / "tiny").exists()


@pytest.mark.parametrize("bad", [{"distribution": "ture"}, {"step": -1}, {"batch_size": 0}])
def test_sampling_refuses_what_does_not_exist(bad, as_users_run):
    with pytest.raises(ValueError, match=next(iter(bad))):
        sample_prompts(QUICK, **{"stream": "true", "step": 0, "batch_size": 2} | bad)
