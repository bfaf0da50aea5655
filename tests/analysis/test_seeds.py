"""Errors over seeds: against closed forms, and against the coverage of the interval on simulated seeds."""

import math
import statistics

import numpy as np
import pandas as pd
import pytest
from tiny_runs import TINY, change

from icl.analysis.seeds import over_seeds, pool, pool_runs, pooled_text, seed_groups


def test_three_seeds_have_a_mean_an_error_and_students_interval():
    found = over_seeds([1.0, 2.0, 4.5])
    error = statistics.stdev([1.0, 2.0, 4.5]) / 3**0.5
    assert found.mean == pytest.approx(2.5)
    assert found.stderr == pytest.approx(error)
    # Student's t for 2 degrees of freedom and 97.5 % is 4.302653, from tables.
    assert (found.low, found.high) == pytest.approx((2.5 - 4.302653 * error, 2.5 + 4.302653 * error))
    assert found.text == "2.5 ± 1"


def test_one_or_two_seeds_are_shown_as_points_without_an_interval():
    one, two = over_seeds([3.0]), over_seeds([3.0, 4.0])
    assert math.isnan(one.stderr)
    assert two.stderr == pytest.approx(0.5)
    assert np.isnan([one.low, one.high, two.low, two.high]).all()
    assert (one.text, two.text, over_seeds([]).text) == ("3", "3, 4", "-")


def test_a_seed_that_diverged_is_left_out_and_not_counted():
    assert over_seeds([1.0, math.nan, math.inf, 2.0]).values == (1.0, 2.0)


def test_steps_are_averaged_as_logarithms():
    found = over_seeds([49.0, 99.0, 199.0], is_step=True)
    assert found.mean == pytest.approx(99)
    error = math.log(2) / 3**0.5
    assert found.stderr == pytest.approx(100 * error)
    assert found.low == pytest.approx(100 * math.exp(-4.302653 * error) - 1, rel=1e-5)


def test_the_interval_of_a_step_does_not_end_below_zero():
    steps = 34 * np.exp([-1.885, 0.0, 1.885]) - 1
    found = over_seeds(steps, is_step=True)
    assert found.text == "33 ± 37"
    assert 34 * math.exp(-4.302653 * 1.885 / 3**0.5) - 1 < -0.6
    assert found.low == 0
    assert found.high == pytest.approx(34 * math.exp(4.302653 * 1.885 / 3**0.5) - 1, rel=1e-5)


@pytest.mark.parametrize(
    ("steps", "text"), [((100, 10_000), "100, 1e+04"), ((0, 7), "0, 7"), ((0, 0), "0, 0"), ((5, 5), "5, 5")]
)
def test_two_steps_are_printed_themselves(steps, text):
    (row,) = pool(pd.DataFrame({"value": steps, "all": 0}), by=["all"], is_step=True).to_dict("records")
    assert pooled_text(row, is_step=True) == text == over_seeds(steps, is_step=True).text


@pytest.mark.parametrize("num_seeds", [3, 5])
def test_the_interval_contains_the_truth_in_95_percent(num_seeds):
    count = 4000
    table = pd.DataFrame(
        {
            "trial": np.repeat(np.arange(count), num_seeds),
            "value": np.random.default_rng(0).normal(7, 2, count * num_seeds),
        }
    )
    pooled = pool(table, by=["trial"])
    share = ((pooled["low"] < 7) & (pooled["high"] > 7)).mean()
    assert share == pytest.approx(0.95, abs=4 * (0.95 * 0.05 / count) ** 0.5)


def test_the_error_over_prompts_is_the_bound_for_shared_prompts():
    table = pd.DataFrame({"run": ["a", "b"], "step": 5, "value": [1.0, 3.0], "stderr": [0.2, 0.4]})
    (row,) = pool_runs(table, {"M=2": ["a", "b"]}, by=["step"]).to_dict("records")
    assert row["stderr"] == pytest.approx(0.3)
    assert (row["runs"], row["step"], row["value"], row["seed_stderr"], row["num_seeds"]) == ("M=2", 5, 2.0, 1.0, 2)


def test_runs_are_grouped_by_all_settings_but_seeds():
    configs = {
        f"{m}-{seed}": change(TINY, task={"num_tasks": m}, seeds={"model": seed, "data": seed, "noise": seed})
        for m in (4, math.inf)
        for seed in (0, 1)
    }
    configs["again"] = configs["4-1"]
    configs["wide"] = change(TINY, task={"num_tasks": 4}, model={"mlp_size": 16})
    groups = seed_groups(configs)
    assert list(groups.values()) == [["4-0", "4-1"], ["inf-0", "inf-1"], ["wide"]]
    assert list(groups) == ["M=4, mlp_size=8", "M=inf, mlp_size=8", "M=4, mlp_size=16"]
    assert seed_groups({name: configs[name] for name in ("4-0", "4-1")}) == {"all runs": ["4-0", "4-1"]}
    assert seed_groups({}) == {}


def test_only_groups_of_several_runs_are_pooled():
    table = pd.DataFrame({"run": ["a", "b", "c"], "quantity": "loss", "value": [1.0, 2.0, 3.0], "stderr": 0.1})
    pooled = pool_runs(table, {"x": ["a", "b"], "y": ["c"]}, by=["quantity"])
    assert list(pooled["runs"]) == ["x"]
