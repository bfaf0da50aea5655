"""Scatter about a trend: the estimates recover its size and correlation, and find no scatter in a smooth curve."""

import numpy as np
import pytest

from icl.analysis.scatter import Scatter, estimate_scatter
from tools.verdict_rates import TIMES, Case, autoregression, rate

TREND = 2.0 / (1 + np.exp(2 * (TIMES - 4)))


def estimates(phi, *, white=0.0, wander=0.0, stderr=0.0, count=12):
    """Return estimates from simulated curves."""
    found = []
    for seed in range(count):
        rng = np.random.default_rng([seed, 11])
        noise = np.hypot(white, stderr) * rng.standard_normal(len(TIMES))
        found.append(estimate_scatter(TIMES, TREND + wander * autoregression(phi, len(TIMES), rng) + noise, stderr))
    return found


def within(values, truth, num_errors=4.0):
    """Return whether the distance of a mean from the truth is below `num_errors` standard errors."""
    return abs(np.mean(values) - truth) < num_errors * np.std(values, ddof=1) / np.sqrt(len(values))


def test_independent_scatter_is_recovered_and_does_not_wander():
    found = estimates(0.0, white=0.05)
    assert within([each.total for each in found], 0.05)
    assert np.median([each.wander for each in found]) < 0.01


@pytest.mark.parametrize("phi", [0.5, 0.8])
def test_correlated_scatter_is_recovered(phi):
    """A flexible trend absorbs part of the slow scatter: up to a fifth of its standard deviation at these lengths."""
    found = estimates(phi, wander=0.05)
    assert 0.75 * 0.05 < np.mean([each.total for each in found]) < 1.1 * 0.05
    neighbours = [each.covariance(2)[0, 1] / each.total**2 for each in found]
    assert np.mean(neighbours) == pytest.approx(phi, abs=0.15)


def test_errors_that_are_known_are_no_scatter():
    assert np.mean([each.total for each in estimates(0.0, stderr=0.05)]) < 0.02


@pytest.mark.parametrize("values", [0 * TIMES, TIMES, TREND])
def test_a_smooth_curve_has_none(values):
    assert estimate_scatter(TIMES, values).total < 1e-3


def test_units_do_not_matter():
    values = TREND + 0.05 * autoregression(0.5, len(TIMES), np.random.default_rng(0))
    first, second = estimate_scatter(TIMES, values), estimate_scatter(TIMES, 7 - 1000 * values)
    assert second.total == pytest.approx(1000 * first.total, rel=1e-3)
    assert second.tau == pytest.approx(first.tau, rel=1e-2)


def test_the_covariance_is_that_of_an_autoregression():
    covariance = Scatter(white=3.0, wander=2.0, tau=-1 / np.log(0.8)).covariance(3)
    expected = 4 * np.array([[1, 0.8, 0.64], [0.8, 1, 0.8], [0.64, 0.8, 1]]) + 9 * np.eye(3)
    assert covariance == pytest.approx(expected)


def test_the_variance_of_a_difference_is_that_of_the_covariance():
    scatter = Scatter(white=3.0, wander=2.0, tau=2.5)
    covariance = scatter.covariance(5)
    for lag in (1, 4):
        assert scatter.difference_variance(lag) == pytest.approx(2 * (covariance[0, 0] - covariance[0, lag]))


@pytest.mark.parametrize(
    ("kind", "phi", "num_runs", "low", "high"),
    [
        ("flat tail", 0.8, 30, 0.0, 0.01 + 3 * 0.018),
        pytest.param("flat tail", 0.9, 400, 0.0, 0.01 + 3 * 0.005, marks=pytest.mark.slow),
        ("rise", 0.8, 15, 0.5, 1.0),
        pytest.param("line", 0.8, 60, 0.0, 0.05, marks=pytest.mark.slow),
        pytest.param("noise", 0.8, 100, 0.0, 0.01 + 3 * 0.01, marks=pytest.mark.slow),
        pytest.param("turn", 0.8, 60, 0.5, 1.0, marks=pytest.mark.slow),
    ],
)
def test_verdicts_survive_correlated_scatter(kind, phi, num_runs, low, high):
    """Where there is no effect, hardly any run is `ok`. Where there is one, at least half of the runs are `ok`.

    The limits are 1 % and 50 %, plus or minus three standard errors of the share.
    """
    assert low <= rate(Case(kind, phi, num_runs))["ok"] <= high
