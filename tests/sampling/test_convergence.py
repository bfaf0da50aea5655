"""Convergence diagnostics, compared with arviz and with known values for independent and AR(1) draws."""

import math

import numpy as np
import pytest
from scipy import stats

from icl.sampling import convergence


def ar1(r, num_chains=8, num_draws=2000, seed=0):
    """Return stationary chains with lag-1 correlation r and unit variance."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((num_chains, num_draws))
    for t in range(1, num_draws):
        x[:, t] = r * x[:, t - 1] + math.sqrt(1 - r * r) * x[:, t]
    return x


CHAINS = {
    "independent": ar1(0.0),
    "correlated": ar1(0.9),
    "alternating": ar1(-0.5),
    "apart": ar1(0.5) + np.arange(8)[:, None],
    "heavy": ar1(0.5) ** 5,
    "odd": ar1(0.7, 3, 101),
}


@pytest.mark.parametrize("draws", CHAINS.values(), ids=CHAINS)
def test_rhat_and_ess_are_those_of_arviz(draws):
    """The ESS agrees to two percent, because rounding decides at which lag the sum ends."""
    array_stats = pytest.importorskip("arviz_stats.base").array_stats
    assert convergence.rhat(draws) == pytest.approx(float(array_stats.rhat(draws, method="rank")), rel=1e-6)
    assert convergence.ess(draws) == pytest.approx(float(array_stats.ess(draws, method="mean")), rel=0.02)


@pytest.mark.parametrize("r", [0.0, 0.5, 0.9, -0.5])
def test_ess_of_an_ar1_chain(r):
    """The expected value is N (1 - r) / (1 + r). With 16,000 draws, the estimate is within fifteen percent of it."""
    draws = ar1(r)
    assert convergence.ess(draws) == pytest.approx(draws.size * (1 - r) / (1 + r), rel=0.15)


def test_rhat_of_good_chains_is_one_and_of_chains_apart_is_not():
    assert convergence.rhat(CHAINS["independent"]) < 1.01
    assert convergence.rhat(CHAINS["apart"]) > 1.5
    wider = CHAINS["independent"] * np.array([1] * 7 + [20])[:, None]  # same centre, another scale
    assert convergence.rhat(wider) > 1.1


def test_rhat_of_one_chain_is_not_a_number():
    assert math.isnan(convergence.rhat(ar1(0.0, 1)))


def test_constant_draws_are_all_worth_their_number():
    draws = np.full((4, 100), 3.0)
    assert convergence.ess(draws) == 400
    assert convergence.rhat(draws) == 1
    assert convergence.standard_error(draws) == 0


@pytest.mark.parametrize("num_chains", [1, 4, 8])
def test_standard_errors_cover(num_chains):
    """At least 92 percent of 150 means should be within two standard errors. The test allows three standard deviations (2.2 percent) less."""
    hits = []
    for seed in range(150):
        draws = ar1(0.9, num_chains, 400, seed + 1)
        hits.append(abs(draws.mean()) < 2 * convergence.standard_error(draws))
    assert 0.92 - 3 * 0.022 < np.mean(hits) <= 1


def test_chains_that_disagree_have_a_wide_error():
    assert convergence.standard_error(CHAINS["apart"]) >= np.arange(8).std(ddof=1) / math.sqrt(8) * 0.9


def test_drift_is_the_difference_of_halves():
    draws = ar1(0.5) + np.linspace(0, 1, 2000)
    difference, stderr = convergence.drift(draws)
    assert difference == pytest.approx(0.5, abs=4 * stderr)
    assert difference > 5 * stderr
    still, stderr = convergence.drift(ar1(0.5, seed=9))
    assert abs(still) < 4 * stderr


def test_the_error_at_a_stop_is_the_larger_of_two_estimates_with_students_t():
    factor = stats.t.ppf(0.975, 15) / stats.norm.ppf(0.975)  # four batches of each of four chains
    rng = np.random.default_rng(0)
    draws = rng.standard_normal((4, 400))
    errors = [convergence.standard_error_at_stop(chains) for chains in rng.standard_normal((100, 4, 400))]
    assert np.mean(errors) == pytest.approx(
        factor / 40, rel=0.25
    )  # independent draws; the larger of two is above the mean
    assert min(errors) >= 0.75 * factor / 40
    slow = draws + np.repeat(rng.standard_normal((4, 4)), 100, axis=1)  # each batch has its own level
    means = slow.reshape(16, 100).mean(1)
    assert convergence.standard_error_at_stop(slow) >= factor * means.std(ddof=1) / 4
    assert convergence.standard_error_at_stop(draws[:, :3]) == convergence.standard_error(
        draws[:, :3]
    )  # shorter than the batches


def test_chains_that_all_still_spread_do_not_change_the_sensitivity():
    """The excess and the spread of all chains grow together, but their fluctuations are independent. A covariance over draws would be 1,300."""
    rng = np.random.default_rng(0)
    trend = np.arange(400.0)
    excess = 0.01 * trend + rng.standard_normal((8, 400))
    spread = 10 * trend + 30 * rng.standard_normal((8, 400))
    pull = 100 * rng.standard_normal((8, 400))  # its extrapolation is too imprecise to be chosen
    value, stderr = convergence.sensitivity(excess, pull, spread)
    assert abs(value) < 4 * stderr
    assert stderr < 1
    assert abs(float(((excess - excess.mean()) * (spread - spread.mean())).mean())) > 1000
