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
        ([behaviour(0.5), behaviour(0.6), behaviour(-0.7)], "contains zero"),
        ([behaviour(0.5), behaviour(0.6), behaviour(0.7, verdict="suspect")], "the verdict of 1 of the runs is not ok"),
        ([behaviour(0.5), behaviour(0.6), behaviour(0.7, finding="none")], "differs between seeds"),
        ([behaviour(0.5), behaviour(0.6), behaviour(0.7), behaviour(math.nan)], "only 3 of 4 seeds have this finding"),
    ],
)
def test_every_doubt_makes_a_finding_suspect(tables, reason):
    row = finding(tables)
    assert row["verdict"] == "suspect"
    assert reason in row["reasons"]


def test_critical_steps_are_averaged_as_logarithms():
    row = finding([behaviour(1.0, critical=step) for step in (9.0, 99.0, 999.0)], "critical_step")
    assert row["value"] == pytest.approx(99)


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


def test_several_transitions_of_a_run_are_told_apart_by_direction_and_order():
    def mixture(*transitions):
        common = {"mixture": "fixed", "distribution": "pretrain", "position": "mean", "stderr": 1.0, "verdict": "ok"}
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
    assert found["to dMMSE", 1]["num_seeds"] == 2
    assert found["to dMMSE", 1]["value"] == pytest.approx(math.expm1((math.log1p(5) + math.log1p(120)) / 2))
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
