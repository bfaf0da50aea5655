"""Smoothing of known curves: slopes and their errors, scatter of changing size, and many points."""

import numpy as np
import pytest

from icl.analysis.stages.smoothing import MAX_POINTS, fit, in_bins, is_too_sparse

TIMES = np.linspace(0, 8, 60)
LENGTHS = {"shortest": 0.25, "longest": 1.0}


def noisy(curve, noise, seed):
    return curve + noise * np.random.default_rng(seed).normal(size=len(curve))


def test_without_noise_value_and_slope_are_the_curves():
    curve = fit(TIMES, np.sin(TIMES), np.zeros(60), **LENGTHS).curve
    inside = (curve.times > 0.5) & (curve.times < 7.5)
    assert np.abs(curve.values - np.sin(curve.times))[inside].max() < 1e-3
    assert np.abs(curve.slopes()[0] - np.cos(curve.times))[inside].max() < 0.02


@pytest.mark.parametrize("given", [True, False])
def test_errors_cover_value_and_slope_whether_the_noise_is_given_or_found(given):
    off = []
    for seed in range(12):
        found = fit(TIMES, noisy(np.sin(TIMES), 0.1, seed), np.full(60, 0.1 if given else 0.0), **LENGTHS)
        curve, places = found.curve, np.searchsorted(found.curve.times, [2.0, 4.0, 6.0])
        slopes, covariance = curve.slopes()
        off.append(((curve.values - np.sin(curve.times)) / curve.stderr)[places])
        off.append(((slopes - np.cos(curve.times)) / np.sqrt(np.diag(covariance)))[places])
        assert found.points.noise.mean() == pytest.approx(0.1, rel=0.45)
    inside = np.mean(np.abs(off) < 2)
    assert inside > 0.95 - 3 * np.sqrt(0.95 * 0.05 / (12 * 6))
    assert np.mean(np.square(off)) > 0.3  # nor are they much too large


def test_pure_noise_is_flat_within_errors():
    curve = fit(TIMES, noisy(np.zeros(60), 1.0, 3), np.ones(60), **LENGTHS).curve
    slopes, covariance = curve.slopes()
    assert np.abs(slopes / np.sqrt(np.diag(covariance))).max() < 3.5
    assert curve.stderr.max() < 1.0


def test_scatter_that_grows_is_found_where_it_is():
    noise = np.where(TIMES < 4, 0.01, 0.3)
    points = fit(TIMES, noisy(TIMES, noise, 0), np.zeros(60), **LENGTHS).points
    assert points.noise[-10:].mean() > 3 * points.noise[:10].mean()


def test_given_errors_are_never_undercut():
    assert fit(TIMES, np.sin(TIMES), np.full(60, 0.2), **LENGTHS).points.noise == pytest.approx(np.full(60, 0.2))


def test_a_constant_stays_one():
    curve = fit(TIMES, np.full(60, 5.0), np.zeros(60), **LENGTHS).curve
    assert curve.values == pytest.approx(np.full(len(curve.times), 5.0))


def test_many_points_are_averaged_in_bins():
    times = np.linspace(0, 10, 10 * MAX_POINTS)
    means = in_bins(times, 2 * times, np.ones(len(times)))
    assert [len(one) for one in means] == [MAX_POINTS] * 3
    assert means[1] == pytest.approx(2 * means[0])
    assert means[2] == pytest.approx(np.full(MAX_POINTS, 10**-0.5), rel=0.06)


@pytest.mark.parametrize(
    ("distance", "longest", "expected"), [(0.55, 1.0, False), (0.65, 1.0, True), (0.55, 0.5, True)]
)
def test_sparse_points_are_those_far_apart_for_the_longest_kernel(distance, longest, expected):
    times = distance * np.arange(12)
    assert is_too_sparse(times, longest=longest) == expected
    assert (
        is_too_sparse(np.r_[times[0] - 9, times], longest=longest) == expected
    )  # one gap, as after step 0, does no harm


def test_samples_have_the_curves_mean_and_covariance():
    curve = fit(TIMES, noisy(np.sin(TIMES), 0.1, 0), np.full(60, 0.1), **LENGTHS).curve
    drawn = curve.sample(4000, np.random.default_rng(0))
    assert drawn.mean(0) == pytest.approx(curve.values, abs=5 * curve.stderr.max() / 4000**0.5)
    assert drawn.std(0) == pytest.approx(curve.stderr, rel=0.08)


@pytest.mark.parametrize("values", [np.ones(3), np.array([1.0, np.nan, 2.0, 3.0, 4.0])])
def test_too_little_is_refused(values):
    with pytest.raises(ValueError, match="at least four finite points"):
        fit(np.arange(len(values)) * 1.0, values, np.zeros(len(values)), **LENGTHS)
