"""The tables and the figure of the task-diversity experiment have the same numbers as separate evaluations of its runs."""

import contextlib
import io
import json
import math
from pathlib import Path

import pandas as pd
import pytest
from tiny_runs import TINY, change

from icl.analysis.seeds import over_seeds
from icl.cli import main
from icl.cli.evaluate_ahead import work_ahead
from icl.config.validation import ConfigError
from icl.diversity import tables
from icl.diversity.experiment import run_experiment
from icl.diversity.runs import find_runs
from icl.diversity.tables import COLUMNS, evaluate_experiment, evaluate_seeds, pool_seeds, require_same_experiment
from icl.plotting.diversity import plot_diversity
from icl.runs.checkpoints import checkpoint_files, load_checkpoint_file, save_checkpoint
from icl.runs.folder import RunFolder
from icl.runs.status import Status
from icl.runs.tasks_file import TasksError
from icl.whole_runs import RunEvaluator, evaluate_run

QUICK = change(TINY, trainer={"max_steps": 10, "log_every": 5}, checkpoints={"every": 5, "num_log": 0})


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experiment") / "base"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEVICE", "cpu")
        patch.setenv("WANDB_MODE", "disabled")
        patch.delenv("AWS_BUCKET_NAME", raising=False)
        assert run_experiment(QUICK, max_power=3, base=folder, say=lambda line: None).is_done
    return folder


@pytest.fixture(scope="module")
def files(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("analysis") / "analysis.json"
    words = [
        "--checkpoint_base_dir",
        str(base),
        "--output_file",
        str(out),
        "--n_prompts",
        "16",
        "--n_ood_samples",
        "32",
    ]
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setenv("DEVICE", "cpu")
        assert main(["evaluate", *words]) == 0
    assert str(out) in said.getvalue()
    assert str(out.with_suffix(".csv")) in said.getvalue()
    return out, out.with_suffix(".csv")


@pytest.fixture
def other(base, tmp_path):
    """Return the same experiment with other seeds. Its checkpoints have other weights, without training."""
    for label, run in find_runs(base).items():
        folder = RunFolder(tmp_path / "other" / f"checkpoints_M{label}")
        config = change(run.read_config(), seeds={"model": 7, "data": 7, "noise": 7})
        folder.write_config(config)
        folder.write_status(Status(state="finished", step=10, max_steps=10))
        saved = load_checkpoint_file(checkpoint_files(run.path)[-1])
        save_checkpoint(folder.checkpoints, 10, config, {name: 0.5 * tensor for name, tensor in saved.params.items()})
    return tmp_path / "other"


def test_experiments_with_other_seeds_are_pooled(base, other, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DEVICE", "cpu")
    experiments = {name: find_runs(path) for name, path in (("a", base), ("b", other))}
    evaluator = RunEvaluator(num_prompts=16, shifts=[])
    table, problems = evaluate_seeds(experiments, evaluator)
    assert problems == {}
    alone = evaluate_experiment(experiments["b"], num_prompts=16, shifts=[]).table
    own = table[table["run"] == "b"].drop(columns="run").reset_index(drop=True)
    pd.testing.assert_frame_equal(own, alone)
    keys = {"num_tasks": "8", "distribution": "true", "quantity": "bayes_excess", "position": "mean"}
    values, pooled = (part[(part[list(keys)] == pd.Series(keys)).all(axis=1)] for part in (table, pool_seeds(table)))
    known = over_seeds(values["value"])
    assert pooled[["value", "seed_stderr", "num_seeds"]].to_numpy().tolist() == [[known.mean, known.stderr, 2]]
    axes = plot_diversity(table, title="two").axes[0]
    assert "over seeds" in axes.get_ylabel()


def test_experiments_that_differ_in_more_than_seeds_are_refused(base, other, capsys):
    with pytest.raises(ConfigError, match="they differ in no setting"):
        require_same_experiment({"a": find_runs(base), "b": find_runs(base)})
    run = find_runs(other)["4"]
    run.write_config(change(run.read_config(), optim={"lr": 0.5}))
    assert main(["evaluate", "--checkpoint_base_dir", f"{base},{other}"]) == 2
    assert "`optim.lr` was" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_writes_tables_and_a_figure_over_seeds(base, other, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DEVICE", "cpu")
    out = tmp_path / "both.json"
    words = ["--checkpoint_base_dir", f"{base},{other}", "--n_prompts", "16", "--out", str(out)]
    assert main(["evaluate", *words]) == 0
    assert "Over seeds" in capsys.readouterr().out
    for name in ("both.csv", "both.json", "both-seeds.csv", "both-seeds.json", "both-seeds.png", "both-threshold.csv"):
        assert (tmp_path / name).is_file()
    assert set(pd.read_csv(tmp_path / "both.csv")["run"]) == {str(base), str(other)}


def test_json_and_csv_hold_the_same_table_with_the_agreed_columns(files):
    records = json.loads(files[0].read_text())
    table = pd.read_csv(files[1], dtype={"num_tasks": str, "position": str})
    assert tuple(table.columns) == COLUMNS
    assert len(records) == len(table)
    assert list(records[0]) == list(COLUMNS)
    assert list(dict.fromkeys(record["num_tasks"] for record in records)) == ["2", "4", "8", "inf"]
    values = pd.Series([math.nan if record["value"] is None else record["value"] for record in records])
    pd.testing.assert_series_equal(values, table["value"], check_names=False)


@pytest.mark.parametrize("label", ["4", "inf"])
def test_the_rows_of_a_run_are_those_of_evaluating_it_alone(files, base, label):
    table = pd.read_csv(files[1], dtype={"num_tasks": str, "position": str})
    own = table[table["num_tasks"] == label]
    assert set(own["step"]) == {10}
    last = checkpoint_files(find_runs(base)[label].path)[-1]
    keys = ["distribution", "quantity", "position"]
    for num_prompts, names in (
        (16, ["pretrain"]),
        (32, [name for name in own["distribution"].unique() if name != "pretrain"]),
    ):
        expected = pd.concat(evaluate_run(last, num_prompts=num_prompts))
        expected = expected[expected["distribution"].isin(names)].set_index(keys)[["value", "stderr"]].sort_index()
        found = own[own["distribution"].isin(names)].set_index(keys)[["value", "stderr"]].sort_index()
        pd.testing.assert_frame_equal(found, expected, rtol=1e-6)


def test_there_are_baselines_beside_every_model_and_no_dmmse_for_infinitely_many_tasks(files):
    table = pd.read_csv(files[1], dtype=str)
    per_run = table.groupby("num_tasks")["quantity"].agg(set)
    assert all({"loss", "delta_ridge", "ridge", "zero", "ols"} <= quantities for quantities in per_run)
    assert {label for label, quantities in per_run.items() if "dmmse" in quantities} == {"2", "4", "8"}


def test_all_steps_have_their_rows_and_their_baselines(base):
    table, problems = evaluate_experiment(find_runs(base), num_prompts=8, all_steps=True, shifts=())
    assert not problems
    sizes = table.groupby(["num_tasks", "step"]).size().unstack("num_tasks")
    assert list(sizes.index) == [0, 5, 10]
    assert (sizes.nunique() == 1).all()


def test_a_run_without_a_checkpoint_is_left_out_and_said(base, tmp_path, capsys):
    copy = tmp_path / "copy"
    for label in ("2", "8"):
        (copy / f"checkpoints_M{label}").mkdir(parents=True)
    source = find_runs(base)["8"].checkpoints.root
    (copy / "checkpoints_M8" / "checkpoints").symlink_to(source)
    assert main(["evaluate", "--checkpoint_base_dir", str(copy), "--n_prompts", "8"]) == 1
    captured = capsys.readouterr()
    assert "M = 2 is left out" in captured.err
    assert set(pd.read_csv(copy / "evaluation.csv", dtype=str)["num_tasks"]) == {"8"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "needs one of the two, not both"),
        (["run", "--checkpoint_base_dir", "b"], "needs one of the two, not both"),
        (["run", "--all_steps"], "--checkpoint_base_dir"),
        (["--checkpoint_base_dir", "nowhere"], "icl diversity"),
        (["--checkpoint_base_dir", "nowhere", "--output_file", "x.txt"], ".csv or .json"),
        (["--checkpoint_base_dir", "nowhere", "--n_ood_samples", "1"], "at least 2"),
    ],
)
def test_a_mistake_is_one_sentence(words, said, capsys):
    assert main(["evaluate", *words]) in (1, 2)
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1


def test_the_older_spellings_serve_a_single_run_too(base, tmp_path, capsys):
    out = tmp_path / "one.csv"
    checkpoint = checkpoint_files(find_runs(base)["4"].path)[-1]
    assert (
        main(["evaluate", str(checkpoint), "--output_file", str(out), "--n_prompts", "8", "--n_ood_samples", "8"]) == 0
    )
    modern = evaluate_run(checkpoint, num_prompts=8)[0]
    pd.testing.assert_series_equal(pd.read_csv(out)["value"], modern["value"], rtol=1e-12)


def test_the_figure_shows_the_gaps_of_the_last_step_with_two_standard_errors(base):
    table, _ = evaluate_experiment(find_runs(base), num_prompts=16, all_steps=True, shifts=())
    figure = plot_diversity(table, title="tiny")
    for axes, distribution in zip(figure.axes, ("pretrain", "true"), strict=True):
        rows = table[(table["step"] == 10) & (table["distribution"] == distribution) & (table["position"] == "mean")]
        curves = [container for container in axes.containers if len(container.lines[0].get_xdata()) > 1]
        for container, quantity in zip(curves, ("delta_ridge", "delta_dmmse"), strict=True):
            gaps = rows[(rows["quantity"] == quantity) & (rows["num_tasks"] != "inf")]
            line, _, (bars,) = container.lines
            assert list(line.get_xdata()) == [1, 2, 3]
            assert list(line.get_ydata()) == pytest.approx(list(gaps["value"]))
            heights = [segment[1][1] - segment[0][1] for segment in bars.get_segments()]
            assert heights == pytest.approx(list(4 * gaps["stderr"]))
        lonely = [container.lines[0] for container in axes.containers if len(container.lines[0].get_xdata()) == 1]
        (infinite,) = lonely
        assert infinite.get_xdata()[0] > 3.5
        assert infinite.get_ydata()[0] == pytest.approx(
            rows[(rows["num_tasks"] == "inf") & (rows["quantity"] == "delta_ridge")]["value"].item()
        )
        assert [tick.get_text() for tick in axes.get_xticklabels()][-1] == "∞"
        low, high = axes.get_ylim()
        gaps = rows[rows["quantity"].isin(["delta_ridge", "delta_dmmse"])]["value"]
        assert low < gaps.min() <= gaps.max() < high
        assert axes.get_yscale() == "log"


def test_a_figure_of_infinity_alone_or_of_nothing_finite_can_be_drawn():
    row = {"step": 1, "distribution": "true", "quantity": "delta_ridge", "position": "mean", "stderr": 0.1}
    for label, value in (("inf", 1.0), ("8", math.nan)):
        figure = plot_diversity(pd.DataFrame([{"num_tasks": label, "value": value, **row}]), title="one")
        assert len(figure.axes) == 2


def test_a_run_with_a_damaged_table_of_tasks_is_left_out_and_the_others_are_evaluated(base):
    def evaluator(path):
        if path.name == "checkpoints_M4":
            raise TasksError("The table of tasks is damaged.")
        return pd.DataFrame({"step": [1], "checkpoint_hash": ["a"], "value": [2.0]}), pd.DataFrame({"value": [3.0]})

    columns = [name for name in COLUMNS if name not in ("num_tasks", "step", "checkpoint_hash", "value")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "COLUMNS", [name for name in COLUMNS if name not in columns])
        table, problems = evaluate_seeds({"": find_runs(base)}, evaluator, all_steps=True)
    assert problems == {("", "4"): "The table of tasks is damaged."}
    assert list(table["num_tasks"].unique()) == ["2", "8", "inf"]


def test_the_estimate_of_the_work_leaves_out_a_run_with_a_damaged_table_of_tasks(monkeypatch):
    def fail(path):
        raise TasksError("The table of tasks is damaged.")

    monkeypatch.setattr("icl.runs.checkpoints.load_checkpoint_file", fail)
    assert work_ahead([[Path("a")]], num_prompts=2, num_ood_prompts=2).startswith("1 runs, 1 checkpoints: about 1 s")
