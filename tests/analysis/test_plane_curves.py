"""Smoothing and geometry of plane curves with known answers."""

import numpy as np
import pytest

from icl.analysis.essential_dynamics.plane_curves import (
    arc_length,
    candidates,
    fine_grid,
    kernel_widths,
    log_time,
    osculating_circles,
    smooth,
)

UNEVEN = np.sort(np.random.default_rng(0).uniform(0, 6, 60))
DENSE = np.linspace(0, 6, 400)
PLANE = (0, 1)


def smoothed(times, points, *, bandwidth=0.1, noise=0.0, seed=0):
    points = points + noise * np.random.default_rng(seed).normal(size=points.shape)
    return smooth(times, points, fine_grid(times, bandwidth=bandwidth), bandwidth=bandwidth)


def circle(times, radius=2.0):
    return radius * np.stack([np.cos(times), np.sin(times)], axis=1)


def inner(curve, margin=0.6):
    return (curve.times > curve.times[0] + margin) & (curve.times < curve.times[-1] - margin)


def kinds(curve):
    return [one.kind for one in candidates(curve, PLANE)]


def test_cubics_and_their_derivatives_are_exact_at_uneven_times():
    coefficients = np.array([[1.0, -2.0, 0.5, 0.3], [0.2, 1.0, -0.7, 0.1]])
    values = np.stack([np.polynomial.Polynomial(row)(UNEVEN) for row in coefficients], axis=1)
    curve = smoothed(UNEVEN, values, bandwidth=0.2)
    for component, row in enumerate(coefficients):
        polynomial = np.polynomial.Polynomial(row)
        for order in range(3):
            expected = polynomial.deriv(order)(curve.times) if order else polynomial(curve.times)
            np.testing.assert_allclose(curve.derivatives[:, order, component], expected, atol=1e-8)


def test_kernels_widen_where_checkpoints_are_sparse():
    times = log_time(np.array([0, 1, 2, 3, 4, 5, 6, *range(100, 200)]))
    widths = kernel_widths(times, times, 0.1)
    assert widths[0] == pytest.approx(np.log(6) / 2)  # the sixth nearest to step 0, itself included, is step 5
    assert widths[-30] == 0.1


def test_a_circle_has_its_radius_and_centre_and_nothing_else():
    curve = smoothed(DENSE, circle(DENSE) + 5, bandwidth=0.05)
    circles = osculating_circles(curve, PLANE)
    chosen = inner(curve, 0.2)
    np.testing.assert_allclose(circles.curvature[chosen], 0.5, rtol=2 * 0.05**2)
    np.testing.assert_allclose(circles.centre[chosen], 5, atol=2 * 0.05**2 * 2)
    assert arc_length(curve.derivatives[:, 0])[-1] == pytest.approx(12, rel=1e-3)
    assert kinds(curve) == []


def test_the_osculating_circle_is_that_through_three_near_points():
    times = np.linspace(0, 2, 300)
    curve = smoothed(times, np.stack([np.exp(times), np.sin(2 * times)], axis=1), bandwidth=0.03)
    place = int(np.abs(curve.times - 1).argmin())
    a, b, c = (np.array([np.exp(t), np.sin(2 * t)]) for t in curve.times[place] + np.array([-1e-3, 0, 1e-3]))
    sides = np.linalg.norm([a - b, b - c, c - a], axis=1)
    area = 0.5 * np.cross(np.append(b - a, 0), np.append(c - a, 0))[2]
    found = osculating_circles(curve, PLANE).curvature[place]
    assert found == pytest.approx(4 * area / sides.prod(), rel=0.01)


def test_no_two_points_of_a_grid_are_a_rounding_error_apart():
    for times in (np.linspace(-0.8, 2 * np.pi - 0.8, 400), UNEVEN, np.log1p(np.arange(0, 1000, 7.0))):
        grid = fine_grid(times, bandwidth=0.25)
        assert np.isin(times, grid).all()
        assert np.diff(grid).min() > 1e-7


def test_an_ellipse_has_its_evolute_and_four_vertices():
    times = np.linspace(-0.8, 2 * np.pi - 0.8, 400)
    a, b = 3.0, 2.0
    curve = smoothed(times, np.stack([a * np.cos(times), b * np.sin(times)], axis=1), bandwidth=0.05)
    found, chosen = osculating_circles(curve, PLANE), inner(curve, 0.2)
    evolute = np.stack([(a**2 - b**2) / a * np.cos(curve.times) ** 3, (b**2 - a**2) / b * np.sin(curve.times) ** 3], 1)
    np.testing.assert_allclose(found.centre[chosen], evolute[chosen], atol=0.03)
    curve = smoothed(times, np.stack([a * np.cos(times), b * np.sin(times)], axis=1), bandwidth=0.25)
    vertices = candidates(curve, PLANE)
    assert [one.kind for one in vertices] == ["vertex"] * 4
    np.testing.assert_allclose([one.time for one in vertices], np.arange(4) * np.pi / 2, atol=0.03)
    np.testing.assert_allclose([one.radius for one in vertices], [b**2 / a, a**2 / b] * 2, rtol=0.15)


@pytest.mark.parametrize("speed", [0.25, 0.5, 1.0])
def test_vertices_do_not_depend_on_the_speed_along_the_curve(speed):
    """The same turn around an ellipse takes more or less time."""
    angles = np.linspace(-0.8, 2 * np.pi - 0.8, 400)
    ellipse = np.stack([3 * np.cos(angles), 2 * np.sin(angles)], axis=1)
    vertices = candidates(smoothed(angles / speed, ellipse, bandwidth=0.25), PLANE)
    assert [one.kind for one in vertices] == ["vertex"] * 4
    np.testing.assert_allclose([one.time * speed for one in vertices], np.arange(4) * np.pi / 2, atol=0.03)


def test_a_semicubical_parabola_has_one_cusp_where_it_should():
    turn = 3.1
    curve = smoothed(UNEVEN, np.stack([(UNEVEN - turn) ** 2, (UNEVEN - turn) ** 3], axis=1), bandwidth=0.2)
    found = candidates(curve, PLANE)
    assert [one.kind for one in found] == ["cusp"]
    assert found[0].time == pytest.approx(turn, abs=0.02)
    assert found[0].point == pytest.approx((0, 0), abs=1e-3)


def test_a_noisy_cusp_is_still_found():
    points = np.stack([(DENSE - 3) ** 2, (DENSE - 3) ** 3], axis=1)
    found = [one for one in candidates(smoothed(DENSE, points, bandwidth=0.3, noise=0.02), PLANE) if one.kind == "cusp"]
    assert len(found) == 1
    assert found[0].time == pytest.approx(3, abs=0.1)


@pytest.mark.parametrize("noise", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("speed", ["even", "stop and go"])
def test_a_straight_line_has_no_cusps(noise, speed):
    along = DENSE if speed == "even" else DENSE + np.sin(2 * np.pi * DENSE) / (2 * np.pi)
    curve = smoothed(DENSE, np.outer(along, [1.0, 2.0]), bandwidth=0.25, noise=noise)
    assert "cusp" not in kinds(curve)


def test_a_straight_line_has_no_vertices():
    for seed in range(5):
        assert kinds(smoothed(DENSE, np.outer(DENSE, [1.0, 2.0]), noise=0.05, seed=seed)) == []
    assert kinds(smoothed(DENSE, np.outer(DENSE, [1.0, 2.0]))) == []


def test_setting_out_slowly_is_no_cusp():
    """In log time, every run starts at rest."""
    times = log_time(np.unique(np.geomspace(1, 1000, 80).astype(int)) - 1)
    points = np.stack([np.expm1(times), np.expm1(times) ** 2 / 1000], axis=1)
    assert "cusp" not in kinds(smoothed(times, points, noise=1e-6))


def test_pure_noise_has_no_cusps():
    for seed in range(5):
        assert "cusp" not in kinds(smoothed(DENSE, np.zeros((400, 2)), noise=1.0, seed=seed))


def test_the_error_of_curvature_is_its_scatter():
    at = np.array([2.0, 3.0])
    found = []
    times = DENSE[::2]
    for seed in range(200):
        points = circle(times) + 0.02 * np.random.default_rng(seed).normal(size=(200, 2))
        found.append(osculating_circles(smooth(times, points, at, bandwidth=0.3), PLANE))
    scatter = np.std([one.curvature for one in found], axis=0)
    np.testing.assert_allclose(np.mean([one.stderr for one in found], axis=0), scatter, rtol=5 * (1 / 400) ** 0.5)


def test_noise_is_found_where_it_is():
    values = np.where(DENSE < 3, 0.01, 1.0)[:, None] * np.random.default_rng(6).normal(size=(400, 1))
    curve = smooth(DENSE, values, np.array([1.0, 5.0]), bandwidth=0.25)
    np.testing.assert_allclose(curve.noise[:, 0], [0.01, 1.0], rtol=5 / (2 * 66) ** 0.5)  # 66 points in a window


def test_too_few_checkpoints_are_not_smoothed():
    with pytest.raises(ValueError, match="at least 8"):
        smooth(np.arange(7.0), np.zeros((7, 1)), np.array([1.0]), bandwidth=0.2)
