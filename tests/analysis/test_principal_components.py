"""PCA by two methods, compared with the SVD; PCA of random walks, compared with closed forms and simulation."""

import numpy as np
import pytest
from tiny_runs import TINY

from icl.analysis.essential_dynamics import principal_components as pca
from icl.analysis.essential_dynamics.trajectories import Trajectory, centred_products

NONE = np.zeros((0, 30))


def begins(*lengths):
    return np.concatenate([np.arange(length) == 0 for length in lengths])


def brownian(times, num_features, seed=0):
    """Return a Brownian path at given times, from the origin."""
    deviations = np.sqrt(np.diff(times, prepend=times[0]))
    return np.cumsum(deviations[:, None] * np.random.default_rng(seed).normal(size=(len(times), num_features)), axis=0)


def gram(points):
    centred = points - points.mean(0)
    return centred @ centred.T


@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
def test_both_routes_are_the_svd(shape):
    generator = np.random.default_rng(1)
    matrix = generator.normal(size=shape) * np.geomspace(1, 0.1, shape[1]) + 5
    points = generator.normal(size=(3, shape[1]))
    first = begins(shape[0])
    by_products = pca.from_products(centred_products(list(matrix), points), first, num_components=4)
    by_rows = pca.from_rows(list(matrix), points, first, num_components=4)
    for one, two in zip(by_products, by_rows, strict=True):
        np.testing.assert_allclose(one, two, atol=1e-9)
    centre = matrix.mean(0)
    left, values, right = np.linalg.svd(matrix - centre, full_matrices=False)
    signs = -np.sign(left[0, :4])
    np.testing.assert_allclose(by_rows.scores, left[:, :4] * values[:4] * signs, atol=1e-9)
    np.testing.assert_allclose(by_rows.projected, (points - centre) @ right[:4].T * signs, atol=1e-9)
    np.testing.assert_allclose(by_rows.shares, values[:4] ** 2 / (values**2).sum())
    np.testing.assert_allclose(
        by_rows.captured, (((points - centre) @ right[:4].T) ** 2).sum(1) / ((points - centre) ** 2).sum(1)
    )


def test_signs_do_not_depend_on_the_orientation_of_features():
    matrix = np.random.default_rng(2).normal(size=(9, 30))
    both = [pca.from_rows(list(sign * matrix), NONE, begins(9), num_components=3).scores for sign in (1, -1)]
    np.testing.assert_allclose(*both, atol=1e-12)
    assert (both[0][0] < 0).all()


def test_references_have_no_part_in_the_fit():
    matrix = np.random.default_rng(3).normal(size=(8, 30))
    far = np.full((1, 30), 1e3)
    with_far, without = (
        pca.from_products(centred_products(list(matrix), points), begins(8), num_components=2) for points in (far, NONE)
    )
    np.testing.assert_array_equal(with_far.scores, without.scores)
    assert without.projected.shape == (0, 2)


def test_a_walk_of_equal_steps_has_the_closed_shares():
    size = 400
    points = np.random.default_rng(4).normal(size=(size, 3))
    found = pca.walk_shares(gram(points), begins(size), num_components=5, durations=np.ones(size))
    k = np.arange(1, 6)
    exact = 6 / (4 * np.sin(np.pi * k / (2 * size)) ** 2) / (size**2 - 1)
    np.testing.assert_allclose(found, exact, rtol=1e-7)
    np.testing.assert_allclose(found, 6 / (np.pi * k) ** 2, rtol=1e-3)
    few = pca.walk_shares(gram(points[:4]), begins(4), num_components=3, durations=np.ones(4))
    assert few.sum() == pytest.approx(1)


def test_brownian_motion_at_log_spaced_times_has_the_shares_of_its_null():
    times = np.concatenate([[0.0], np.geomspace(1, 1e4, 40)])
    path = brownian(times, 4000)
    found = pca.from_products(centred_products(list(path), np.zeros((0, 4000))), begins(41), num_components=3).shares
    expected = pca.walk_shares(gram(path), begins(41), num_components=3, durations=np.diff(times, prepend=0))
    own_steps = pca.walk_shares(gram(path), begins(41), num_components=3)
    np.testing.assert_allclose(found, expected, rtol=5 * (2 / 4000) ** 0.5)
    np.testing.assert_allclose(found, own_steps, rtol=5 * (2 / 4000) ** 0.5)
    even = pca.walk_shares(gram(path), begins(41), num_components=1, durations=np.ones(41))
    assert found[0] - even[0] > 2 * abs(found[0] - expected[0])  # even spacing would be the wrong null
    assert pca.displacement_ratios(gram(path), begins(41))[0] == pytest.approx(1, abs=0.1)


def test_signs_do_not_matter_where_steps_are_orthogonal():
    lengths = np.array([3.0, 1, 2, 1, 5, 2])
    points = np.concatenate([np.zeros((1, 6)), np.cumsum(np.diag(lengths), axis=0)])
    walks = pca.flipped_walks(gram(points), begins(7), num_components=3)
    expected = pca.from_rows(list(points), np.zeros((0, 6)), begins(7), num_components=3).shares
    np.testing.assert_allclose(walks.shares, np.tile(expected, (99, 1)), atol=1e-12)
    np.testing.assert_allclose(pca.walk_shares(gram(points), begins(7), num_components=3), expected)
    np.testing.assert_allclose(walks.displacement, 1)


def test_a_line_goes_as_far_as_it_can_and_its_random_signs_do_not():
    line = np.outer(np.arange(51.0), np.ones(30))
    assert pca.displacement_ratios(gram(line), begins(51))[0] == pytest.approx(50)
    walks = pca.flipped_walks(gram(line), begins(51), num_components=1)
    np.testing.assert_allclose(walks.shares, 1)
    assert walks.displacement.mean() == pytest.approx(1, abs=5 * (2 / 99) ** 0.5)  # a squared normal: variance 2


def test_walks_of_several_runs_begin_where_the_runs_do():
    generator = np.random.default_rng(5)
    runs = [brownian(np.arange(length), 30, seed) + 4 * generator.normal(size=30) for seed, length in ((1, 5), (2, 7))]
    points, first = np.concatenate(runs), begins(5, 7)
    expected = np.zeros((12, 12))
    origin = points.mean(0)
    for i in range(12):
        for j in range(12):
            a, b = int(i >= 5), int(j >= 5)
            expected[i, j] = (runs[a][0] - origin) @ (runs[b][0] - origin)
            if a == b:
                steps = np.diff(runs[a], axis=0)[: min(i, j) - 5 * a]
                expected[i, j] += (steps**2).sum()
    centre = np.eye(12) - 1 / 12
    values = np.linalg.eigvalsh(centre @ expected @ centre)[::-1]
    found = pca.walk_shares(gram(points), first, num_components=4)
    np.testing.assert_allclose(found, values[:4] / values.sum())
    assert pca.displacement_ratios(gram(points), first).shape == (2,)
    assert pca.flipped_walks(gram(points), first, num_components=2).displacement.shape == (99, 2)


def compared(*runs, num_components=6):
    """Return the PCA of runs whose states are given, saved at steps 0, 1, 2 and so on."""
    trajectories = [
        Trajectory(f"run {number}", TINY, list(range(len(states))), ["x"] * len(states), list(states), [])
        for number, states in enumerate(runs)
    ]
    return pca.fit_components(trajectories, {}, num_components=num_components)


def noisy_line(size, seed):
    """Return a straight line in 200 dimensions, with noise."""
    return np.outer(np.arange(float(size)), np.ones(200)) + 0.3 * np.random.default_rng(seed).normal(size=(size, 200))


@pytest.mark.parametrize("size", [4, 5, 6])
def test_few_states_are_too_few_for_a_test_at_five_percent(size):
    """At least 6 % of the walks are then the run itself. Rounding used to decide."""
    assert all(compared(noisy_line(size, seed)).is_reached.all() for seed in range(10))


def test_a_sum_of_shares_that_every_walk_reaches_is_reached():
    """The last component of seven states brings every sum to 1, in the run and in the walks."""
    for seed in range(10):
        fit = compared(noisy_line(7, seed))
        assert len(fit.is_reached) == 6
        assert fit.is_reached[-1]
    assert not compared(noisy_line(12, 0)).is_reached[0]


def test_short_runs_together_have_as_many_walks_as_signs_of_their_steps():
    """Two runs of three states have 16 walks, so each of them is 6 %; with one state more there are 32."""
    runs = noisy_line(3, 0), -3 - noisy_line(4, 1)
    assert compared(runs[0], runs[1][:3]).is_reached.all()
    assert not compared(*runs).is_reached.all()
