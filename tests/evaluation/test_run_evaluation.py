"""Evaluation of whole runs: the numbers are those of single checkpoints and single runs, and nothing is computed twice."""

import json
import math
import re
import shutil
from collections import Counter

import pandas as pd
import pytest
from tiny_runs import TINY, change

from icl import whole_runs as run_evaluation
from icl.analysis.run import torch_device
from icl.build import build_architecture, build_evaluation_sets
from icl.cli import evaluate_ahead, main
from icl.evaluation.scores import evaluate, evaluate_baselines
from icl.model.stacked import apply, stack
from icl.runs.checkpoints import checkpoint_files, load_checkpoint_file
from icl.runs.folder import RunFolder
from icl.training.run import train
from icl.whole_runs import RunEvaluator, evaluate_run

QUICK = change(TINY, trainer={"max_steps": 20, "log_every": 10}, checkpoints={"every": 10, "num_log": 0})
OTHERS = {
    "M=16/seed=0": QUICK,
    "M=16/seed=1": change(QUICK, seeds={"model": 1, "data": 1}),
    "M=4/seed=0": change(QUICK, task={"num_tasks": 4}),
    "M=4/wide": change(QUICK, task={"num_tasks": 4}, model={"embed_size": 16}),
    "other-pool": change(QUICK, seeds={"tasks": 7}),
    "inf": change(QUICK, task={"num_tasks": math.inf}),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return several runs below one folder, by their paths relative to it."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEVICE", "cpu")
        patch.setenv("WANDB_MODE", "disabled")
        patch.delenv("AWS_BUCKET_NAME", raising=False)
        for name, config in OTHERS.items():
            assert train(config, folder=root / name).status.state == "finished"
    return root


@pytest.fixture
def runs(trained, tmp_path):
    """Return a copy of these runs, in which nothing has been evaluated yet."""
    return shutil.copytree(trained, tmp_path / "runs")


@pytest.fixture
def made(monkeypatch):
    """Record the M and the name of each evaluation set that is made."""
    true, names = run_evaluation.evaluation_set, []

    def noted(config, name, **others):
        names.append((config.task.num_tasks, name))
        return true(config, name, **others)

    monkeypatch.setattr(run_evaluation, "evaluation_set", noted)
    return names


def test_all_steps_of_a_run_are_evaluated_on_the_same_prompts(runs):
    run = runs / "M=16/seed=0"
    numbers, references = evaluate_run(run, num_prompts=16, shifts=["task_scale_3"])
    assert sorted(numbers["step"].unique()) == [0, 10, 20]
    assert numbers["checkpoint_hash"].nunique() == 3
    sets = build_evaluation_sets(QUICK, num_prompts=16, shifts=("task_scale_3",), device=torch_device())
    for file in checkpoint_files(run):
        checkpoint = load_checkpoint_file(file)
        model = build_architecture(checkpoint.config)
        own = numbers[numbers["step"] == checkpoint.step].drop(columns=["step", "checkpoint_hash", "prompts"])
        expected = evaluate(
            lambda params, xs, ys, m=model: apply(m.config, params, xs, ys), stack([checkpoint.params]), sets
        )
        assert own.to_dict("records") == expected[0]
        alone, _ = evaluate_run(file, num_prompts=16, shifts=["task_scale_3"])
        assert alone.drop(columns=["step", "checkpoint_hash", "prompts"]).to_dict("records") == expected[0]
    assert references.drop(columns="prompts").to_dict("records") == evaluate_baselines(sets)
    assert set(numbers["prompts"]) == set(references["prompts"]) == {"report"}


def test_an_interrupted_evaluation_goes_on_where_it_was(runs, monkeypatch):
    asked = {"num_prompts": 16, "shifts": []}
    undisturbed, references = evaluate_run(runs / "M=16/seed=0", **asked)
    folder = shutil.copytree(runs / "M=16/seed=0", runs / "copy", ignore=shutil.ignore_patterns("results"))
    true, evaluated = run_evaluation.evaluate, []

    def two_populations(predict, params, sets, **options):
        if len(evaluated) == 2:
            raise KeyboardInterrupt
        evaluated.append(len(next(iter(params.values()))))
        return true(predict, params, sets, **options)

    monkeypatch.setattr("icl.analysis.run.MEMBERS_AT_ONCE", 1)
    monkeypatch.setattr(run_evaluation, "evaluate", two_populations)
    with pytest.raises(KeyboardInterrupt):
        evaluate_run(folder, **asked)
    monkeypatch.setattr(
        run_evaluation, "evaluate", lambda *one, **options: evaluated.append(1) or true(*one, **options)
    )
    numbers, again = evaluate_run(folder, **asked)
    assert evaluated == [1, 1, 1]
    assert numbers.equals(undisturbed)
    assert again.equals(references)
    evaluate_run(folder, **{**asked, "num_prompts": 17})
    assert evaluated == [1] * 6


@pytest.mark.slow
def test_several_runs_have_the_numbers_of_each_alone_and_share_their_sets(runs, trained, tmp_path, made):
    evaluate = RunEvaluator(num_prompts=16, num_ood_prompts=12, shifts=["seen_query"])
    together = {name: evaluate(runs / name) for name in OTHERS}
    pools = [16, 4, 16, math.inf]  # the second pool of 16 tasks is another; a shift has new tasks
    pairs = [(num_tasks, name) for num_tasks in pools for name in ("pretrain", "true")]
    assert Counter(made) == Counter([*pairs, (math.inf, "seen_query")])
    for name, found in together.items():
        for path in (trained / name, checkpoint_files(trained / name)[-1]):
            folder = path if path.is_file() else shutil.copytree(path, tmp_path / "alone" / name)
            asked = {"num_prompts": 16, "num_ood_prompts": 12, "shifts": ["seen_query"]}
            numbers, references = evaluate_run(folder, **asked)
            own = found[0][found[0]["step"] >= numbers["step"].min()].reset_index(drop=True)
            pd.testing.assert_frame_equal(own, numbers, check_exact=True)
            pd.testing.assert_frame_equal(found[1], references, check_exact=True)


@pytest.mark.slow
def test_the_command_evaluates_folders_of_runs_into_one_table(runs, tmp_path, capsys, made, monkeypatch):
    monkeypatch.setattr(
        evaluate_ahead, "_trial", lambda *arguments: (0.0, 0.0)
    )  # its trials make small sets of their own
    out, folders = tmp_path / "all.json", {name: runs / "M=16" / name for name in ("seed=0", "seed=1")}
    folders["other-pool"] = runs / "other-pool"
    assert (
        main(["evaluate", str(runs / "M=16"), str(runs / "other-pool"), "--num_prompts", "8", "--out", str(out)]) == 0
    )
    said = capsys.readouterr()
    counts = Counter(name for _, name in made)
    assert (counts.pop("pretrain"), counts.pop("true"), set(counts.values())) == (2, 2, {1})  # a pair for each pool
    assert "9/9" in said.err  # one bar over the checkpoints of all
    table = json.loads(out.read_text())
    for kind in ("evaluation", "baselines"):
        assert list(dict.fromkeys(row["run"] for row in table[kind])) == list(folders)
        assert next(iter(table[kind][0])) == "run"
        for name, folder in folders.items():
            own = [row["value"] for row in table[kind] if row["run"] == name]
            assert own == pytest.approx(pd.read_csv(folder / "results" / f"{kind}.csv")["value"].tolist(), rel=1e-12)
            assert (folder / "figures" / "evaluation.png").is_file()
            assert name in said.out


@pytest.mark.slow
def test_a_broken_run_among_good_ones_is_named_and_the_others_are_done(runs, tmp_path, capsys):
    names = ("M=16/seed=0", "M=16/seed=1", "M=4/seed=0")
    (runs / names[1] / "checkpoints" / "step-000000010.safetensors").write_bytes(b"nothing")
    out = tmp_path / "both.csv"
    paths = [str(runs / name) for name in names]
    assert main(["evaluate", *paths, "nowhere", "--num_prompts", "8", "--out", str(out)]) == 1
    said = capsys.readouterr().err
    assert len(re.findall(r"^icl: ", said, re.MULTILINE)) == 2
    assert "icl: nowhere: There is nothing at nowhere, nor a run" in said
    assert re.match(r"4 runs, \d+ checkpoints: about \d+ (s|min) if no checkpoint is done yet", said)
    assert re.search(r"icl: seed=1: .*step-000000010.safetensors is damaged, or is not a checkpoint", said)
    table = pd.read_csv(out, dtype={"position": str})
    assert set(table["run"]) == {paths[0], paths[2]}
    assert (RunFolder(paths[0]).results / "evaluation.csv").is_file()
    assert not (RunFolder(paths[1]).results / "evaluation.csv").exists()
    assert main(["evaluate", "nowhere", "elsewhere", "--num_prompts", "8", "--out", str(tmp_path / "none.csv")]) == 1
    assert not (tmp_path / "none.csv").exists()
    assert len(re.findall(r"^icl: ", capsys.readouterr().err, re.MULTILINE)) == 2


@pytest.mark.slow
def test_a_run_and_one_of_its_checkpoints_can_be_compared(runs, capsys):
    last = checkpoint_files(runs / "M=4/seed=0")[-1]
    assert main(["evaluate", str(runs / "M=16/seed=0"), str(last), "--num_prompts", "8"]) == 0
    assert str(last) in capsys.readouterr().out
