"""Findings over runs that differ only in their seeds, from tables whose pooled numbers are known."""

import math

import pandas as pd
import pytest
import torch
from tiny_runs import TINY, change

from icl.analysis.over_runs import pool_analysis, summary
from icl.analysis.seeds import over_seeds
from icl.build import build_model
from icl.cli import main
from icl.plotting.over_runs import plot_over_runs
from icl.runs.checkpoints import save_checkpoint
from icl.runs.folder import RunFolder
from icl.runs.status import Status


def config(seed, num_tasks=16):
    return change(TINY, task={"num_tasks": num_tasks}, seeds={"model": seed, "data": seed, "noise": seed})


def behaviour(rise, *, verdict="ok", finding="transient ridge", critical=10.0, loss=2.0):
    """Return a table of `behaviour` with two saved steps and two findings."""
    common = {"predictor": "model", "distribution": "true", "position": "mean", "stderr": 0.01}
    steps = [common | {"step": step, "quantity": "loss", "value": loss + step} for step in (0, 1)]
    reference = [common | {"predictor": "ridge", "quantity": "loss", "value": 0.5}]
    outcome = {"verdict": verdict, "finding": finding, "reasons": ""}
    findings = [
        common | outcome | {"quantity": name, "value": v} for name, v in (("critical_step", critical), ("rise", rise))
    ]
    return pd.DataFrame([*steps, *reference, *findings])


def finding(tables, quantity="rise"):
    runs = {str(seed): table for seed, table in enumerate(tables)}
    pooled = pool_analysis("behaviour", runs, {name: config(int(name)) for name in runs})
    return next(row for row in pooled.findings.to_dict("records") if row["quantity"] == quantity)


def test_a_rise_in_three_seeds_has_the_interval_over_seeds():
    row, known = finding([behaviour(0.5), behaviour(0.6), behaviour(0.7)]), over_seeds([0.5, 0.6, 0.7])
    assert (row["value"], row["seed_stderr"], row["low"], row["high"]) == pytest.approx(
        (known.mean, known.stderr, known.low, known.high)
    )
    assert (row["num_seeds"], row["num_runs"], row["finding"], row["verdict"]) == (3, 3, "transient ridge", "ok")
    assert row["stderr"] == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("tables", "reason"),
    [
        ([behaviour(0.5), behaviour(0.6)], "2 seed(s) give no interval"),
        ([behaviour(0.5), behaviour(0.6), behaviour(0.7, verdict="suspect")], "the verdict of 1 of the runs is not ok"),
        ([behaviour(0.5), behaviour(0.6), behaviour(0.7, finding="none")], "differs between seeds"),
        ([behaviour(0.5), behaviour(0.6), behaviour(0.7), behaviour(math.nan)], "only 3 of 4 seeds have this finding"),
    ],
)
def test_every_doubt_makes_a_finding_suspect(tables, reason):
    row = finding(tables)
    assert row["verdict"] == "suspect"
    assert reason in row["reasons"]


@pytest.mark.parametrize("rises", [(0.021, 0.024, 0.019), (0.0, 0.0, 0.0)])
def test_a_loss_that_rises_in_no_seed_is_none_and_ok(rises):
    row = finding([behaviour(rise, finding="none") for rise in rises])
    assert (row["finding"], row["verdict"], row["reasons"]) == ("none", "ok", "")


def test_a_rise_that_is_unresolved_in_every_seed_is_suspect():
    row = finding([behaviour(0.1, finding="unresolved", verdict="suspect")] * 3)
    assert (row["finding"], row["verdict"]) == ("unresolved", "suspect")


def test_critical_steps_are_averaged_as_logarithms():
    row = finding([behaviour(1.0, critical=step) for step in (9.0, 99.0, 999.0)], "critical_step")
    assert row["value"] == pytest.approx(99)


def test_two_steps_are_printed_themselves():
    tables = {str(seed): behaviour(1.0, critical=step) for seed, step in enumerate((100.0, 10_000.0))}
    pooled = pool_analysis("behaviour", tables, {name: config(int(name)) for name in tables})
    assert "critical step (true): transient ridge; 100, 1e+04 (2 of 2 seeds)" in next(iter(summary(pooled.findings)))


def stages(*steps, change=1.0, invalid=(), error=0.05):
    """Return a table of `stages` with boundaries at the given steps, and the change of the loss over each stage.

    `invalid` are the steps of invalid boundaries, and `error` is the standard error of ln(step + 1).
    """
    found = [
        {"quantity": "boundary", "value": step, "stderr": error * (1 + step), "verdict": verdict}
        for part, verdict in ((invalid, "invalid"), (steps, "ok"))
        for step in part
    ]
    changes = [
        {"quantity": "change", "stage": stage, "signal": "loss", "value": change * stage, "stderr": 0.1}
        for stage in range(1, len(steps) + 2)
    ]
    return pd.DataFrame([*found, *(row | {"verdict": "ok"} for row in changes)])


def pooled_stages(*tables):
    runs = {str(seed): table for seed, table in enumerate(tables)}
    return pool_analysis("stages", runs, {name: config(int(name)) for name in runs}).findings


def boundaries(found):
    rows = found[found["quantity"] == "boundary"]
    assert list(rows["number"]) == list(range(1, len(rows) + 1))
    return [(round(row["value"]), row["num_seeds"], row["verdict"]) for row in rows.to_dict("records")]


def test_boundaries_are_matched_by_their_steps():
    found = pooled_stages(stages(100.0, 1000.0), stages(1000.0, 10_000.0), stages(100.0, 1000.0))
    assert boundaries(found) == [(100, 2, "suspect"), (1000, 3, "ok"), (10_000, 1, "suspect")]
    assert "only 2 of 3 seeds have this finding, so changes over stages are not pooled" in found["reasons"].iloc[0]
    assert "change" not in set(found["quantity"])
    assert any("boundary 2: 1000 ± " in line and "(3 of 3 seeds); ok." in line for line in summary(found))


def test_invalid_boundaries_take_no_number_and_changes_of_the_same_stages_are_pooled():
    found = pooled_stages(stages(100.0, 1000.0, invalid=[3.0]), stages(110.0, 900.0), stages(90.0, 1100.0, change=1.2))
    assert [row[1:] for row in boundaries(found)] == [(3, "ok"), (3, "ok")]
    changes = found[found["quantity"] == "change"]
    assert list(changes["labels"]) == ["1, loss", "2, loss", "3, loss"]
    assert changes["value"].to_numpy() == pytest.approx([3.2 / 3, 6.4 / 3, 3.2])
    assert set(changes["verdict"]) == {"ok"}


def test_a_change_whose_interval_contains_zero_is_suspect():
    found = pooled_stages(*(stages(100.0, change=change) for change in (1.0, 1.0, -1.0)))
    assert all("contains zero" in reasons for reasons in found.loc[found["quantity"] == "change", "reasons"])


def test_each_seed_gives_a_boundary_at_most_once():
    found = pooled_stages(stages(100.0, 120.0), stages(119.0), stages(125.0))
    assert boundaries(found) == [(100, 1, "suspect"), (121, 3, "ok")]


@pytest.mark.parametrize(("error", "num_boundaries"), [(0.1, 3), (0.6, 1)])
def test_large_errors_explain_a_large_difference(error, num_boundaries):
    found = pooled_stages(*(stages(step, error=error) for step in (100.0, 220.0, 500.0)))
    assert len(boundaries(found)) == num_boundaries


def test_curves_are_pooled_at_each_step_and_without_the_baselines():
    tables = {"a": behaviour(1.0, loss=2.0), "b": behaviour(1.0, loss=4.0), "other": behaviour(1.0, loss=9.0)}
    configs = {"a": config(0), "b": config(1), "other": config(0, num_tasks=4)}
    pooled = pool_analysis("behaviour", tables, configs)
    assert pooled.curves[["runs", "step", "value", "seed_stderr", "num_seeds"]].to_numpy().tolist() == [
        ["M=16", 0, 3.0, 1.0, 2],
        ["M=16", 1, 4.0, 1.0, 2],
    ]
    assert set(pooled.table()["runs"]) == {"M=16"}
    lines = list(summary(pooled.findings))
    assert lines[1].startswith("M=16: rise (true): transient ridge; 1, 1 (2 of 2 seeds); suspect: 2 seed(s)")
    figure = plot_over_runs("behaviour", tables, configs, title="ladder")
    assert [line.get_label() for line in figure.axes[1].lines if not line.get_label().startswith("_")] == [
        "M=16",
        "M=4",
    ]


def test_several_transitions_of_a_run_are_told_apart_by_direction_and_step():
    def mixture(*transitions):
        common = {"mixture": "fixed", "distribution": "pretrain", "position": "mean", "stderr": 0.5, "verdict": "ok"}
        rows = [common | {"quantity": "transition_step", "finding": f, "value": float(v)} for f, v in transitions]
        return pd.DataFrame(rows).assign(step=pd.NA)

    tables = {
        "a": mixture(("to dMMSE", 100), ("to ridge", 10), ("to dMMSE", 5)),
        "b": mixture(("to dMMSE", 120)),
        "c": mixture(("none (always ridge)", math.nan)),
    }
    pooled = pool_analysis("mixture", tables, {name: config(seed) for seed, name in enumerate(tables)})
    found = {(row["finding"], row["number"]): row for row in pooled.findings.to_dict("records")}
    assert set(found) == {("to dMMSE", 1), ("to dMMSE", 2), ("to ridge", 1)}
    assert (found["to dMMSE", 1]["num_seeds"], found["to dMMSE", 1]["value"]) == (1, pytest.approx(5))
    assert found["to dMMSE", 2]["num_seeds"] == 2
    assert found["to dMMSE", 2]["value"] == pytest.approx(math.expm1((math.log1p(100) + math.log1p(120)) / 2))
    assert found["to ridge", 1]["num_seeds"] == 1


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return a folder with three seeds of one run, whose checkpoints are initial weights."""
    monkeypatch.setenv("DEVICE", "cpu")
    for seed in range(3):
        run = RunFolder(tmp_path / "ladder" / f"seed={seed}")
        own = config(seed)
        run.path.mkdir(parents=True)
        run.write_config(own)
        run.write_status(Status(state="finished", step=20, max_steps=20))
        weights = {name: p.detach() for name, p in build_model(own).named_parameters()}
        for step in (0, 10, 20):
            noise = torch.Generator().manual_seed(step)
            moved = {name: p + 0.01 * step * torch.randn(p.shape, generator=noise) for name, p in weights.items()}
            save_checkpoint(run.checkpoints, step, own, moved)
    return tmp_path / "ladder"


@pytest.mark.slow
def test_the_command_analyses_all_runs_of_a_folder_and_pools_them(folder, capsys):
    words = ["--num_prompts", "32", "--num_probe_prompts", "2", "--num_scales", "0"]
    assert main(["analyse", str(folder), "--what", "behaviour", *words]) == 0
    said = capsys.readouterr().out
    assert "all runs: rise (true)" in said
    table = pd.read_csv(folder / "behaviour-seeds.csv")
    own = [pd.read_csv(folder / f"seed={seed}" / "results" / "behaviour.csv") for seed in range(3)]
    last = [
        part[
            (part["step"] == 20)
            & (part["quantity"] == "loss")
            & (part["position"] == "mean")
            & (part["distribution"] == "true")
        ]
        for part in own
    ]
    row = table[(table["step"] == 20) & (table["quantity"] == "loss") & (table["position"] == "mean")]
    row = row[row["distribution"] == "true"].iloc[0]
    known = over_seeds(float(part["value"].iloc[0]) for part in last)
    assert (row["value"], row["seed_stderr"], row["low"]) == pytest.approx((known.mean, known.stderr, known.low))
    assert (folder / "behaviour-seeds.png").is_file()
    assert main(["analyse", str(folder), "--what", "behaviour", "--out", str(folder / "x.csv")]) == 2
    assert "is for one run" in capsys.readouterr().err


@pytest.mark.slow
def test_evaluate_gives_the_spread_over_seeds(folder, tmp_path, capsys):
    out = tmp_path / "all.csv"
    assert main(["evaluate", str(folder), "--num_prompts", "16", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    table, seeds = (
        pd.read_csv(out, dtype={"position": str}),
        pd.read_csv(tmp_path / "all-seeds.csv", dtype={"position": str}),
    )
    for part in (table, seeds):
        assert set(part["prompts"]) == {"report"}
    keys = {"step": 20, "distribution": "pretrain", "quantity": "bayes_excess", "position": "mean"}
    values, pooled = (part.loc[(part[list(keys)] == pd.Series(keys)).all(axis=1)] for part in (table, seeds))
    known = over_seeds(values["value"])
    assert pooled[["value", "seed_stderr", "num_seeds"]].to_numpy()[0] == pytest.approx((known.mean, known.stderr, 3))
    assert f"{known.mean:.4g} ± {known.stderr:.2g}" in said
