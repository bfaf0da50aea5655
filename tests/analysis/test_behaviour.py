"""Behaviour measures of predictors that are exactly ridge, dMMSE or zero, of paths between these predictors, and of a run."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_runs import TINY, change

from icl.analysis.behaviour import (
    Settings,
    StepSettings,
    analyse,
    evaluation_sets,
    measure_members,
    prompt_numbers,
    set_rows,
    spread,
)
from icl.analysis.behaviour.findings import findings, summary
from icl.analysis.run import Members
from icl.build import build_model
from icl.cli import main
from icl.config.validation import ConfigError
from icl.evaluation.scores import evaluate
from icl.model.stacked import apply, stack
from icl.plotting.behaviour import plot
from icl.runs.checkpoints import Checkpoint, save_checkpoint
from icl.runs.folder import RunFolder
from icl.runs.measure import Entry

CONFIG = change(TINY, task={"num_tasks": 4, "max_examples": 8})
GAUSSIAN = change(CONFIG, task={"num_tasks": math.inf})
QUICK = ["--num_prompts", "24", "--num_probe_prompts", "4", "--num_scales", "5", "--num_ood_prompts", "4"]


def sets(config=CONFIG, count=300):
    return evaluation_sets(config, count, "cpu")


def numbers(one, predictions):
    return {(row["quantity"], row["position"]): row["value"] for row in set_rows(one, predictions)}


def path_parts(path, config=CONFIG):
    """Return the parts of a made-up run. `path` gives the predictions on a set, for every step."""
    return [
        Entry(
            step,
            "digest",
            [row for one in sets(config) for row in set_rows(one, predict(one))],
            {
                f"{one.name}/{name}": values.numpy()
                for one in sets(config)
                for name, values in prompt_numbers(one, predict(one)).items()
            },
        )
        for step, predict in path.items()
    ]


def mixture(first, second, share):
    return lambda one: (1 - share) * one.baselines[first] + share * one.baselines[second]


def by_name(rows, quantity, distribution="true"):
    return [row for row in rows if row["quantity"] == quantity and row["distribution"] == distribution]


@pytest.mark.parametrize("index", [0, 1])
def test_a_model_that_is_ridge_dmmse_or_zero(index):
    one = sets()[index]
    found = {name: numbers(one, one.baselines[name]) for name in ("ridge", "dmmse", "zero", "task_mean")}
    apart = (one.baselines["ridge"] - one.baselines["dmmse"]).square().mean().item()
    assert found["ridge"]["delta_ridge", "mean"] == 0
    assert found["dmmse"]["delta_dmmse", "mean"] == 0
    assert found["ridge"]["delta_difference", "mean"] == pytest.approx(-apart, rel=1e-5)
    assert found["dmmse"]["delta_difference", "mean"] == pytest.approx(apart, rel=1e-5)
    assert found["zero"]["prior_zero", "sum"] == 0
    assert found["task_mean"]["prior_task_mean", "sum"] == 0
    squares = one.baselines["ridge"].square().sum(1).mean().item()
    assert found["ridge"]["prior_zero", "sum"] == pytest.approx(squares, rel=1e-5)
    assert found["ridge"]["prior_zero", "mean"] == pytest.approx(squares / 8, rel=1e-5)
    for first, second in ((1, 4), (4, 8), (1, 8)):
        errors = (one.baselines["ridge"] - one.prompts.ys).square().mean(0)
        score = (errors[second - 1] - errors[first - 1]).item()
        assert found["ridge"]["icl_score", f"{first}:{second}"] == pytest.approx(score, rel=1e-4)
        assert score < 0
    assert found["ridge"]["loss", "mean"] < found["zero"]["loss", "mean"]


def test_prompt_numbers_average_to_the_rows():
    one = sets()[1]
    predictions = 0.5 * one.prompts.ys
    rows = numbers(one, predictions)
    for name, values in prompt_numbers(one, predictions).items():
        assert values.mean().item() == pytest.approx(rows[name, "mean"], rel=1e-5)


def test_a_run_from_zero_through_ridge_to_dmmse_is_transient():
    """The path is known: it is at ridge at step 100, and halfway to dMMSE, in log(t + 1), at step 1,000."""
    path = {0: mixture("zero", "ridge", 0.0)}
    halfway = math.log(1001 / 101)
    for step in np.unique(np.logspace(0, 4, 50).round()).astype(int):
        log = math.log((1 + step) / 101)
        path[int(step)] = (
            mixture("zero", "ridge", math.log1p(step) / math.log(101))
            if log < 0
            else mixture("ridge", "dmmse", log / halfway / 2)
        )
    path[100] = mixture("zero", "ridge", 1.0)
    parts = path_parts(dict(sorted(path.items())))
    found = findings(parts, sets())
    (critical,), (rise,), (dip,) = (by_name(found, name) for name in ("critical_step", "rise", "dip"))
    assert critical["value"] == 100
    assert critical["lower"] < 100 < critical["upper"]
    assert (rise["finding"], rise["verdict"]) == ("transient ridge", "ok")
    loss = {name: numbers(sets()[1], sets()[1].baselines[name])["loss", "mean"] for name in ("zero", "ridge")}
    assert dip["value"] == pytest.approx(1, abs=1e-6)
    assert rise["value"] == pytest.approx(parts[-1].arrays["true/loss"].mean() - loss["ridge"], rel=1e-4)
    crossing = by_name(found, "crossing_step")[-1]
    assert (crossing["finding"], crossing["verdict"]) == ("to dMMSE", "ok")
    assert crossing["lower"] < 1000 < crossing["upper"]
    assert crossing["value"] == pytest.approx(1000, rel=0.01)
    said = summary(parts, found)
    assert said[0].startswith("Transient ridge: transient ridge; ok")
    assert any("predictor on pretrain: to dMMSE at step" in line for line in said)


def test_a_run_that_goes_straight_to_ridge_is_not_transient():
    steps = [0, *np.unique(np.logspace(0, 4, 30).round()).astype(int).tolist()]
    path = {step: mixture("zero", "ridge", math.log1p(step) / math.log(10001)) for step in steps}
    found = findings(path_parts(path), sets())
    (rise,) = by_name(found, "rise")
    assert (rise["finding"], rise["verdict"], rise["value"]) == ("none", "ok", 0)
    (place,) = by_name(found, "prior_zero_minimum_step", "pretrain")
    assert (place["value"], place["verdict"]) == (0, "suspect")


def test_a_run_halfway_between_ridge_and_dmmse_is_closest_to_neither():
    """At the only saved step, the mean difference of the gaps is zero, which does not say that there is no crossing."""
    found = findings(path_parts({7: mixture("ridge", "dmmse", 0.5)}), sets())
    for distribution in ("pretrain", "true"):
        (row,) = by_name(found, "crossing_step", distribution)
        assert (row["finding"], row["verdict"]) == ("unresolved", "suspect")


def test_with_infinitely_many_tasks_ridge_is_the_optimum():
    path = {step: mixture("zero", "ridge", share) for step, share in enumerate([0, 0.5, 1, 0.8, 0.6, 0.4])}
    parts = path_parts(path, GAUSSIAN)
    found = findings(parts, sets(GAUSSIAN))
    assert not [row for row in found if row["quantity"] == "crossing_step"]
    (rise,) = by_name(found, "rise")
    assert rise["verdict"] == "suspect"
    assert not {row["quantity"] for row in parts[0].rows} & {"delta_dmmse", "delta_difference", "prior_task_mean"}


def test_steps_are_spread_over_the_run():
    assert spread([0, 1, 3, 7, 15, 31, 63], 3) == [0, 3, 6]
    assert spread([0, 1, 3, 7], 100) == [0, 1, 2, 3]
    assert spread([0, 10, 20], 1) == [2]


def members(seeds=(0, 1), config=CONFIG):
    params = [dict(build_model(change(config, seeds={"model": seed})).named_parameters()) for seed in seeds]
    params = [{name: parameter.detach() for name, parameter in one.items()} for one in params]
    checkpoints = [Checkpoint(seed, config, one, "digest") for seed, one in zip(seeds, params, strict=True)]
    return Members(config, checkpoints, stack(params), 0)


def test_a_population_has_the_numbers_of_its_members_and_of_the_evaluation():
    settings = StepSettings(num_prompts=40, num_probe_prompts=5)
    together = measure_members(members(), settings=settings)
    for seed, found in enumerate(together):
        (alone,) = measure_members(members((seed,)), settings=settings)
        assert [row["value"] for row in found.rows] == pytest.approx([row["value"] for row in alone.rows], abs=1e-5)
    whole = members((0,))
    (rows,) = evaluate(lambda p, xs, ys: apply(whole.config.model, p, xs, ys), whole.params, sets(count=40))
    own = {(r["distribution"], r["quantity"], r["position"]): (r["value"], r["stderr"]) for r in together[0].rows}
    for row in rows:
        found = own[row["distribution"], row["quantity"], row["position"]]
        assert found == pytest.approx((row["value"], row["stderr"]), abs=1e-5)


def saved_run(path, config=CONFIG, steps=(0, 3, 9, 30)):
    folder = RunFolder(path)
    folder.write_config(config)
    for step in steps:
        add_step(folder, step, config)
    return folder


def add_step(folder, step, config=CONFIG):
    save_checkpoint(folder.checkpoints, step, config, build_model(change(config, seeds={"model": step})).state_dict())


@pytest.mark.slow
def test_the_behaviour_of_a_run_from_the_command_line(tmp_path, capsys):
    folder = saved_run(tmp_path / "r")
    words = ["analyse", str(folder.path), "--what", "behaviour", *QUICK, "--num_ood_steps", "2"]
    assert main(words) == 0
    assert "Transient ridge: " in capsys.readouterr().out
    assert (folder.figures / "behaviour.png").read_bytes().startswith(b"\x89PNG")
    table = pd.read_csv(folder.results / "behaviour.csv")
    curves = table[table["distribution"].isin(("input_scale", "task_scale"))]
    assert set(curves.loc[curves["predictor"] == "model", "step"]) == {0, 30}
    assert (curves.groupby(["predictor", "step", "distribution", "quantity"], dropna=False).size() == 5).all()
    assert set(table.loc[table["step"].isna() & table["verdict"].isna(), "predictor"]) == {"ridge", "dmmse", "zero"}
    assert table["value"].notna().mean() > 0.99
    assert set(table["num_prompts"]) == {24}
    before = {file: file.stat().st_mtime_ns for file in folder.results.glob("behaviour*/*.json")}
    assert len(before) == 4 + 2
    add_step(folder, 60)
    analyse(
        folder.path,
        Settings(num_prompts=24, num_probe_prompts=4, num_scales=5, num_ood_prompts=4, num_ood_steps=2),
    )
    after = {file: file.stat().st_mtime_ns for file in folder.results.glob("behaviour*/*.json")}
    assert {name: time for name, time in after.items() if name in before} == before
    assert len(after) == 5 + 3


@pytest.mark.parametrize(
    ("changes", "num_scales"), [({"num_tasks": math.inf}, 3), ({"noise_variance": 0.0}, 0), ({"max_examples": 1}, 3)]
)
def test_other_runs_have_a_table_and_a_figure(tmp_path, changes, num_scales):
    folder = saved_run(tmp_path / "r", change(CONFIG, task=changes), steps=(0, 5))
    settings = Settings(num_prompts=8, num_probe_prompts=4, num_scales=num_scales, num_ood_prompts=4)
    table, said = analyse(folder.path, settings)
    assert said[0] == "Transient ridge: unresolved; invalid: at least three saved steps with finite losses are needed."
    assert len(plot(table, title="t").axes) == (9 if num_scales else 8)


def test_a_run_that_diverged_is_told(tmp_path):
    folder = saved_run(tmp_path / "r")
    broken = {name: torch.full_like(t, math.nan) for name, t in build_model(CONFIG).state_dict().items()}
    save_checkpoint(folder.checkpoints, 99, CONFIG, broken)
    table, said = analyse(folder.path, Settings(num_prompts=8, num_probe_prompts=4, num_scales=3, num_ood_prompts=4))
    assert "the values of 1 saved step(s) are not finite" in said[0]
    plot(table, title="t")


@pytest.mark.parametrize("wrong", [{"num_probe_prompts": 1}, {"num_ood_steps": 0}, {"num_scales": 1}])
def test_settings_that_cannot_be_are_sentences(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Settings(**wrong)
