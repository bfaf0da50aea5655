"""Draws of sweep parameters are pure functions, stay in range, and have the moments of their distributions."""

import math

import numpy as np
import pytest
from scipy import stats

from icl.sweeps.distributions import DISTRIBUTIONS, Parameter, draw, grid_values

NUM_DRAWS = 4000
OPTIONS = {
    "uniform": {"min": -1.0, "max": 3.0},
    "log_uniform": {"min": -2.0, "max": 1.0},
    "log_uniform_values": {"min": 1e-5, "max": 1e-1},
    "inv_log_uniform": {"min": -2.0, "max": 1.0},
    "inv_log_uniform_values": {"min": 1e-5, "max": 1e-1},
    "normal": {"mu": 2.0, "sigma": 0.5},
    "log_normal": {"mu": -1.0, "sigma": 0.5},
    "beta": {"a": 2.0, "b": 5.0},
}
REFERENCES = {
    "uniform": stats.uniform(-1, 4),
    "log_uniform": stats.loguniform(math.exp(-2), math.exp(1)),
    "log_uniform_values": stats.loguniform(1e-5, 1e-1),
    "inv_log_uniform": stats.loguniform(math.exp(-1), math.exp(2)),
    "inv_log_uniform_values": stats.loguniform(1e-5, 1e-1),
    "normal": stats.norm(2, 0.5),
    "log_normal": stats.lognorm(0.5, scale=math.exp(-1)),
    "beta": stats.beta(2, 5),
}


def parameter(kind, name="key", **options):
    return Parameter(path=(name,), distribution=kind, options=DISTRIBUTIONS[kind].defaults | options)


def draws(swept, num=NUM_DRAWS, seed=0):
    return [draw(swept, seed=seed, index=index) for index in range(num)]


@pytest.mark.parametrize("kind", OPTIONS)
def test_continuous_draws_have_mean_and_variance_of_their_distribution(kind):
    values, reference = np.array(draws(parameter(kind, **OPTIONS[kind]))), REFERENCES[kind]
    mean, variance, kurtosis = (float(moment) for moment in reference.stats("mvk"))
    assert abs(values.mean() - mean) < 4 * math.sqrt(variance / NUM_DRAWS)
    assert abs(values.var() - variance) < 4 * variance * math.sqrt((kurtosis + 2) / NUM_DRAWS)
    low, high = reference.support()
    assert low * (1 - 1e-12) <= values.min() <= values.max() <= high * (1 + 1e-12) or low < 0


@pytest.mark.parametrize("kind", OPTIONS)
def test_quantiles_are_those_of_scipy(kind):
    swept = DISTRIBUTIONS[kind]
    shares = [0.001, 0.2, 0.5, 0.9, 0.999]
    values = [swept.quantile(share, swept.defaults | OPTIONS[kind]) for share in shares]
    np.testing.assert_allclose(values, REFERENCES[kind].ppf(shares), rtol=1e-9)


def test_whole_numbers_reach_both_ends_equally_often():
    values = draws(parameter("int_uniform", min=3, max=6))
    assert set(values) == {3, 4, 5, 6}
    counts = np.array([values.count(k) for k in range(3, 7)])
    assert stats.chisquare(counts).pvalue > 1e-4
    assert all(isinstance(value, int) for value in values)


def test_categories_come_as_often_as_they_should():
    even = draws(parameter("categorical", values=["a", "inf", None]))
    assert stats.chisquare([even.count(value) for value in ("a", "inf", None)]).pvalue > 1e-4
    weighted = draws(parameter("categorical_w_probabilities", values=[1, 2, 3], probabilities=[0.7, 0.3, 0.0]))
    assert 3 not in weighted
    assert abs(weighted.count(1) / NUM_DRAWS - 0.7) < 4 * math.sqrt(0.21 / NUM_DRAWS)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("q_uniform", {"min": 0, "max": 1}),
        ("q_log_uniform", {"min": -1, "max": 1}),
        ("q_log_uniform_values", {"min": 0.1, "max": 2}),
        ("q_normal", {}),
        ("q_log_normal", {}),
        ("q_beta", {}),
    ],
)
def test_quantised_draws_are_multiples_of_q(kind, options):
    values = draws(parameter(kind, **options, q=0.25), num=200)
    assert all(value / 0.25 == round(value / 0.25) for value in values)
    assert len(set(values)) > 2


def test_a_whole_q_gives_whole_numbers():
    assert {type(value) for value in draws(parameter("q_uniform", min=1, max=50, q=5), num=50)} == {int}


def test_a_draw_is_a_pure_function_of_seed_name_and_index():
    swept = parameter("uniform", min=0.0, max=1.0)
    assert draws(swept, 20) == draws(swept, 20)
    assert draws(swept, 20)[13] == draw(swept, seed=0, index=13)
    assert not set(draws(swept, 20)) & set(draws(swept, 20, seed=1))
    assert not set(draws(swept, 20)) & set(draws(parameter("uniform", "other", min=0.0, max=1.0), 20))


def test_parameters_are_drawn_independently():
    first, second = (draws(parameter("normal", name)) for name in ("a", "b"))
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / math.sqrt(NUM_DRAWS)


def test_the_values_of_a_grid():
    assert grid_values(parameter("constant", value=None)) == [None]
    assert grid_values(parameter("categorical", values=[3, "inf"])) == [3, "inf"]
    assert grid_values(parameter("int_uniform", min=2, max=4)) == [2, 3, 4]
    assert grid_values(parameter("q_uniform", min=0, max=1, q=0.25)) == [0, 0.25, 0.5, 0.75]
    assert grid_values(parameter("uniform", min=0.0, max=1.0)) is None
    assert grid_values(parameter("categorical_w_probabilities", values=[1], probabilities=[1])) is None
