"""The task-diversity threshold of synthetic ladders is the M at which their gaps were made equal."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from tiny_runs import TINY, change

from icl.analysis.seeds import over_seeds
from icl.diversity.threshold import ALL, _of_seed, ladder_table, sentences, thresholds

SIZES = (4, 8, 16, 32, 64)


def ladder(ratios, *, run="s", sizes=SIZES, error=0.05, infinite=True):
    """Return a table in which ln(gap to ridge / gap to dMMSE) has the given values."""
    rows = []
    for size, ratio in zip(sizes, ratios, strict=True):
        for quantity, value in (
            ("delta_ridge", 0.2 * math.exp(ratio / 2)),
            ("delta_dmmse", 0.2 * math.exp(-ratio / 2)),
        ):
            rows.append((run, str(size), 100, "true", quantity, "mean", value, error / 2 * value))
            rows.append((run, str(size), 50, "true", quantity, "mean", 7.0, 0.1))  # an earlier step
            rows.append((run, str(size), 100, "pretrain", quantity, "mean", 5.0, 0.1))
    if infinite:  # dMMSE is ridge there
        rows += [(run, "inf", 100, "true", quantity, "mean", 0.1, 0.01) for quantity in ("delta_ridge", "delta_dmmse")]
    columns = ["run", "num_tasks", "step", "distribution", "quantity", "position", "value", "stderr"]
    return pd.DataFrame(rows, columns=columns)


def line(threshold: float, slope: float = -0.8) -> np.ndarray:
    return slope * (np.log2(SIZES) - math.log2(threshold))


@pytest.mark.parametrize("true", [4.5, 13.0, 16.0, 50.0])
def test_a_linear_ratio_gives_its_zero(true):
    (row,) = thresholds(ladder(line(true), error=1e-3)).to_dict("records")
    assert row["threshold"] == pytest.approx(true, rel=1e-9)
    assert row["verdict"] == "ok"
    assert row["lower"] <= true <= row["upper"] <= 2 * row["lower"]


def test_the_error_over_prompts_is_that_of_repeated_measurements():
    """The bound is exact if the errors of the two gaps are opposite, and equal at all M, as in these measurements."""
    draw, truth, error = np.random.default_rng(0), line(13.0), 0.05
    repeats = [ladder(truth + draw.normal(0, error), run=str(i), error=error, infinite=False) for i in range(200)]
    found = thresholds(pd.concat(repeats)).iloc[:-1]
    logs = np.log2(found["threshold"])
    assert logs.std(ddof=1) == pytest.approx(found["stderr_log2"].mean(), rel=4 / math.sqrt(400))
    assert abs(logs.mean() - math.log2(13)) < 4 * logs.std() / math.sqrt(200)


def test_the_row_over_seeds_is_the_mean_of_log2_with_its_interval():
    found = thresholds(pd.concat([ladder(line(true), run=str(true)) for true in (10.0, 12.0, 14.0, 15.0)]))
    pooled, last = over_seeds(math.log2(true) for true in (10, 12, 14, 15)), found.iloc[-1]
    assert (last["run"], last["num_seeds"], last["verdict"]) == (ALL, 4, "ok")
    expected = (2**pooled.mean, pooled.stderr, 2**pooled.low, 2**pooled.high)
    np.testing.assert_allclose([last["threshold"], last["stderr_log2"], last["lower"], last["upper"]], expected)
    assert list(sentences(found))[-1].startswith(
        "Task-diversity threshold (all seeds): M = 12.6 (95 % over 4 seeds 9.4"
    )


@pytest.mark.parametrize(
    ("ratios", "reason"),
    [
        ([2.0, 1.5, 1.0, 0.5, 0.3], "no model is significantly closer to ridge"),
        ([-0.3, -0.5, -1.0, -1.5, -2.0], "no model is significantly closer to dMMSE"),
        ([2.0, 1.0, 0.02, -0.01, -0.03], "no model is significantly closer to ridge"),
        ([-1.0, -0.5, 0.5, 1.0, 2.0], "the models with more tasks are closer to dMMSE"),
    ],
)
def test_a_ladder_without_a_threshold_says_why(ratios, reason):
    found = thresholds(ladder(ratios))
    (row,) = found.to_dict("records")
    assert math.isnan(row["threshold"])
    assert (row["verdict"], row["reasons"]) == ("suspect", reason)
    assert list(sentences(found)) == [f"Task-diversity threshold: none; suspect: {reason}."]


def test_a_ratio_that_changes_its_sign_again_is_suspect():
    (row,) = thresholds(ladder([2.0, 1.0, -1.0, 0.5, -1.0])).to_dict("records")
    assert row["threshold"] == pytest.approx(8 * math.sqrt(2))
    assert (row["verdict"], row["reasons"]) == (
        "suspect",
        "the models switch 3 times between dMMSE and ridge as M grows",
    )


@pytest.mark.parametrize(
    ("sizes", "ratios"), [([2, 8, 32], [0.01, -5.0, 5.0]), ([2, 8, 32, 128], [-5.0, 0.01, -0.01, 5.0])]
)
def test_a_change_from_ridge_to_dmmse_is_no_threshold(sizes, ratios):
    row = _of_seed(np.array(sizes), np.array(ratios), np.full(len(sizes), 0.1))
    assert math.isnan(row["threshold"])
    assert (row["verdict"], row["reasons"]) == ("suspect", "the models with more tasks are closer to dMMSE")


@pytest.mark.parametrize(
    ("ratios", "reason"),
    [
        (
            [5.0, 0.01, -0.01, -5.0],
            "the standard error of the threshold is 10 octaves (factors of 2 in M), more than 0.5",
        ),
        ([5.0, -0.01, 0.01, -5.0], "between M = 2 and 128, r falls to zero 2 times"),
    ],
)
def test_a_threshold_between_models_that_are_close_to_neither_is_suspect(ratios, reason):
    row = _of_seed(np.array([2, 8, 32, 128]), np.array(ratios), np.full(4, 0.1))
    assert row["verdict"] == "suspect"
    assert row["reasons"] == reason


def test_different_last_steps_are_suspect_and_named():
    table = ladder([2.0, 1.0, -1.0], sizes=(2, 8, 32))
    table = table[table["step"] == 100]
    steps = {"2": 10, "8": 500_000, "32": 10, "inf": 7}
    (row,) = thresholds(table.assign(step=table["num_tasks"].map(steps))).to_dict("records")
    reason = "the threshold depends on the step, but the last steps differ: "
    assert (row["verdict"], row["reasons"]) == ("suspect", f"{reason}10 (M = 2, 32), 500,000 (M = 8)")
    short = [ladder(line(13.0), run=str(seed)) for seed in range(3)]
    short[2]["step"] //= 2
    last = thresholds(pd.concat(short)).iloc[-1]
    assert (last["verdict"], last["reasons"]) == ("suspect", f"{reason}50 (2), 100 (0, 1)")


def test_two_seeds_have_no_interval_and_a_missing_threshold_is_told():
    seeds = [ladder(line(10.0), run="a"), ladder(line(14.0), run="b")]
    last = thresholds(pd.concat(seeds)).iloc[-1]
    assert last["verdict"] == "suspect"
    assert last["threshold"] == pytest.approx(math.sqrt(140))
    assert math.isnan(last["lower"])
    three = thresholds(pd.concat([*seeds, ladder([2, 1.5, 1.2, 1.1, 1.0], run="c")])).iloc[-1]
    assert "only 2 of 3 seeds have a threshold" in three["reasons"]


def test_runs_that_differ_only_in_m_and_seeds_are_a_ladder():
    configs = {}
    for seed in (0, 1):
        for size in (4, 8, 16, math.inf):
            config = change(TINY, task={"num_tasks": size}, seeds={"model": seed, "data": seed, "noise": seed})
            configs[f"{seed}-{size}"] = replace(config, run_name=f"{seed}-{size}")
    numbers = pd.DataFrame({"run": list(configs), "value": 1.0})
    found = ladder_table(numbers, configs)
    assert found is not None
    assert found["num_tasks"].tolist() == ["4", "8", "16", "inf"] * 2
    assert found["run"].nunique() == 2
    assert ladder_table(numbers, configs | {"0-4": change(configs["0-4"], optim={"lr": 0.5})}) is None
    walking = {"task": {"num_tasks": 8, "pool": "walk", "pool_steps": 5}}
    assert ladder_table(numbers, configs | {"0-8": change(configs["0-8"], **walking)}) is None
    assert ladder_table(numbers, {name: config for name, config in configs.items() if name[2:] != "16"}) is None


def test_a_rerun_with_equal_settings_and_seeds_is_left_out():
    configs = {f"{size}": change(TINY, task={"num_tasks": size}) for size in SIZES}
    rows = ladder(line(13.0), infinite=False)
    rows = rows.assign(run=rows["num_tasks"])
    again = rows[rows["run"] == "8"].assign(run="again", value=9.0)
    configs["again"] = replace(configs["8"], run_name="again")
    found = ladder_table(pd.concat([rows, again]), configs)
    assert found is not None
    assert len(found) == len(rows)
    assert thresholds(found)["threshold"].tolist() == pytest.approx([13.0])
