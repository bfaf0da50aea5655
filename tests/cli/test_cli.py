"""The command line as a user sees it: help, one sentence for each mistake, exit statuses, and files in the announced places."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from tiny_runs import TINY, as_arguments, change

from icl.cli import COMMANDS, main
from icl.config.values import known_keys
from icl.runs.folder import RunFolder, local_root
from icl.training.run import train

QUICK = change(TINY, trainer={"max_steps": 20}, checkpoints={"every": None, "num_log": 3})
TRAIN = ["train", *as_arguments(QUICK)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("DEVICE", "cpu")
        environment.setenv("WANDB_MODE", "disabled")
        return train(QUICK, folder=tmp_path_factory.mktemp("trained") / "tiny").folder.path


@pytest.fixture
def run(trained) -> RunFolder:
    return RunFolder(shutil.copytree(trained, local_root() / "tiny"))


@pytest.mark.parametrize("words", [[], ["--help"]])
def test_help_has_an_example_and_succeeds(words, capsys):
    assert main(words) == 0
    assert "icl train" in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"example:\n  icl {command}" in capsys.readouterr().out


def test_train_help_lists_every_setting_with_its_meaning(capsys):
    with pytest.raises(SystemExit):
        main(["train", "-h"])
    text = capsys.readouterr().out
    assert all(f"--{key}" in text for key in known_keys())
    assert "Task diversity M" in text


def test_training_ends_with_a_table_a_figure_and_the_folder(capsys):
    assert main(TRAIN) == 0
    said = capsys.readouterr().out
    folder = RunFolder(local_root() / "tiny")
    for word in ("model", "ridge", "dmmse", "ols", "zero", str(folder.figures / "training.png"), str(folder.path)):
        assert word in said
    assert (folder.figures / "training.png").read_bytes().startswith(b"\x89PNG")
    assert set(pd.read_csv(folder.results / "losses.csv")["distribution"]) == {"pretrain", "true"}


def test_the_same_command_says_that_it_is_finished(run, capsys):
    assert main(TRAIN) == 0
    assert "is finished: 20 steps" in capsys.readouterr().out


def test_a_config_file_is_below_the_command_line(tmp_path, capsys):
    file = tmp_path / "c.yaml"
    file.write_text("run_name: filed\noptim: {lr: 0.5}\ntask: {num_tasks: inf}\n")
    rest = TRAIN[1:]
    del rest[rest.index("--run_name") : rest.index("--run_name") + 2]
    del rest[rest.index("--task.num_tasks") : rest.index("--task.num_tasks") + 2]
    assert main(["train", "--config", str(file), *rest]) == 0
    config = RunFolder(local_root() / "filed").read_config()
    assert config.optim.lr == 0.01
    assert config.task.is_gaussian


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], "icl train"),
        (["train", "--optim.learning_rate", "1"], "optim"),
        (["train", "--optim.lr", "fast"], "must be a number"),
        (["train", "--model.num_heads", "5"], "must divide"),
        (["train", "--early_stopping.patience", "2", "--evaluation.every", "None"], "needs evaluations"),
        (["train", "--preset", "L2H5"], "L2H4"),
        (["train", "--config", "nowhere.yaml"], r"nowhere.yaml"),
        (["train", "task.num_tasks=3"], "Expected `--section.key VALUE`"),
        (["evaluate", "nowhere"], "nothing at nowhere, nor a run"),
        (["report", "nowhere"], "nothing at nowhere, nor a run"),
        (["llc", "nowhere"], "nothing at nowhere, nor a run"),
        (["runs", "nowhere"], "nothing at nowhere, nor a run"),
        (["evaluate", "nowhere", "--num_promts", "3"], "Did you mean `--num_prompts`?"),
        (["runs", ".", "again"], "takes no `again`. `icl runs --help`"),
        (["evaluate", "nowhere", "--out", "x.txt"], ".csv or .json"),
        (["evaluate", "nowhere", "--num_prompts", "1"], "at least 2"),
        (["predict", "nowhere", "--prompt", "missing.json"], "missing.json"),
    ],
)
def test_a_mistake_is_one_sentence_and_fails(words, said, capsys):
    assert main(words) in (1, 2)
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("icl: ")


def test_evaluating_a_run_writes_its_tables_and_figure(run, tmp_path, capsys):
    out = tmp_path / "out.json"
    assert main(["evaluate", str(run.path), "--num_prompts", "16", "--out", str(out)]) == 0
    table = pd.read_csv(run.results / "evaluation.csv")
    columns = ["step", "checkpoint_hash", "distribution", "quantity", "position", "value", "stderr", "prompts"]
    assert list(table.columns) == columns
    assert set(table["step"]) == {0, 1, 4, 20}
    assert (run.figures / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    assert len(json.loads(out.read_text())["evaluation"]) == len(table)
    assert str(run.results / "evaluation.csv") in capsys.readouterr().out


@pytest.mark.parametrize(
    "commands", [("predict", "runs"), pytest.param(("evaluate", "analyse"), marks=pytest.mark.slow)]
)
def test_a_run_may_be_given_by_its_name_and_a_path_that_exists_wins(run, tmp_path, monkeypatch, capsys, commands):
    monkeypatch.chdir(tmp_path)
    prompt = tmp_path / "prompt.json"
    prompt.write_text(json.dumps({"x_context": [[1, 0]], "y_context": [0.5], "x_query": [[2, 0]]}))
    options = {
        "predict": ["--prompt", str(prompt)],
        "evaluate": ["--num_prompts", "16"],
        "analyse": ["--what", "embeddings"],
        "runs": [],
    }
    for words in ([command, "tiny", *options[command]] for command in commands):
        assert main(words) == 0
        told = capsys.readouterr().out
        assert str(run.path) in told or words[0] == "runs"
    assert main(["llc", "tiny", "--steps", "7"]) == 2
    assert "no saved step 7" in capsys.readouterr().err
    (tmp_path / "tiny").mkdir()
    for command in set(commands) - {"runs"}:
        assert main([command, "tiny", *options[command]]) == 1
        assert str(run.path) not in capsys.readouterr().err


@pytest.mark.slow
def test_a_folder_for_the_output_is_made_by_every_command(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    prompt = {"x_context": [[1, 0]], "y_context": [0.5], "x_query": [[2, 0]]}
    (tmp_path / "prompt.json").write_text(json.dumps(prompt))
    chains = [f"--sampler.{key}=8" for key in ("num_samples", "batch_size", "num_draws", "num_init_batches")]
    for command, name in (
        (["evaluate", "tiny", "--num_prompts", "16"], "x.csv"),
        (["analyse", "tiny", "--what", "embeddings"], "x.json"),
        (["predict", "tiny", "--prompt", "prompt.json"], "x.json"),
        (["report", "tiny"], "x.html"),
        (["llc", "tiny", "--steps", "last", *chains], "x.csv"),
    ):
        folder = tmp_path / command[0] / "deep"
        status = main([*command, "--out", f"{command[0]}/deep/{name}"])
        assert status == 0 or "every estimate is invalid" in capsys.readouterr().err
        assert [path.name for path in folder.iterdir()] == [name]


def test_predicting_from_a_file(run, tmp_path, capsys):
    prompt = tmp_path / "prompt.json"
    prompt.write_text(json.dumps({"x_context": [[1, 0]], "y_context": [0.5], "x_query": [[2, 0], [0, 1]]}))
    assert main(["predict", str(run.path), "--prompt", str(prompt), "--out", str(tmp_path / "y.json")]) == 0
    assert capsys.readouterr().out.count("->") == 2
    assert len(json.loads((tmp_path / "y.json").read_text())["y_predicted"]) == 2


def test_runs_are_listed_with_their_state(run, capsys):
    assert main(["runs"]) == 0
    line = capsys.readouterr().out
    assert "tiny" in line
    assert "finished" in line
    assert "20/20" in line


def test_no_runs_is_said_with_what_to_do(capsys):
    assert main(["runs"]) == 0
    assert "icl train" in capsys.readouterr().out


def test_the_environment_file_is_read_by_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LOCAL_ROOT")
    (tmp_path / ".env").write_text(f"LOCAL_ROOT={tmp_path}/elsewhere\n")
    assert main(["runs"]) == 0
    assert f"{tmp_path}/elsewhere" in capsys.readouterr().out


@pytest.mark.slow
def test_waiting_threads_sleep_soon_unless_the_environment_says_otherwise():
    """This runs in a separate process, because OpenMP reads its environment only once, when PyTorch is loaded."""
    code = """
import os, sys, icl.cli
assert 'torch' not in sys.modules
for environment in ({}, {'GOMP_SPINCOUNT': '7'}, {'OMP_WAIT_POLICY': 'active'}):
    for name in ('GOMP_SPINCOUNT', 'OMP_WAIT_POLICY'):
        os.environ.pop(name, None)
    os.environ.update(environment)
    icl.cli.main(['runs', '.'])
    print('found:', os.environ.get('GOMP_SPINCOUNT'))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    found = [line.partition("found: ")[2] for line in ran.stdout.splitlines() if "found: " in line]
    assert found == ["3000", "7", "None"], ran.stderr


def test_an_absent_device_is_one_sentence(monkeypatch, capsys):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([*TRAIN, "--trainer.accelerator", "cuda"]) == 2
    captured = capsys.readouterr()
    assert "DEVICE=cpu" in captured.err
    assert captured.err.count("\n") == 1
