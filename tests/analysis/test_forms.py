"""Forms of essential dynamics: a cusp or vertex must appear in every plane at the same time, whatever the smoothing."""

import math

import numpy as np
import pytest

from icl.analysis.essential_dynamics.forms import JudgedCandidate, find_forms, judged_candidates, planes, smooth_by_all
from icl.analysis.essential_dynamics.plane_curves import smooth

TIMES = np.linspace(0, 6, 300)


def judged(points, *, bandwidth=0.2, noise=0.0):
    points = points + noise * np.random.default_rng(0).normal(size=points.shape)
    return judged_candidates(smooth_by_all(TIMES, points, bandwidth=bandwidth))


def at(kind, plane, time, point, radius=0.0, reasons=""):
    return JudgedCandidate(kind, plane, time, 0.01, point, radius, 0.2, reasons)


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_a_curve_that_turns_back_in_every_plane_has_one_form(noise):
    away = TIMES - 3
    points = np.stack([away**2, away**3, 0.5 * away**2 - away**3], axis=1) + np.array([1.0, 2, 3])
    found = judged(points, noise=noise)
    cusps = [one for one in found if one.kind == "cusp"]
    assert [one.plane for one in cusps] == [(0, 1), (0, 2), (1, 2)]
    assert [one.reasons for one in cusps] == [""] * 3
    (form,) = find_forms(found, extent=30.0)
    assert form.time == pytest.approx(3, abs=0.05)
    assert form.point == pytest.approx([1, 2, 3], abs=0.05)
    assert form.reasons == ""
    assert form.mismatch < 0.05


def test_a_cusp_that_only_one_kernel_sees_is_in_doubt():
    """A cycloid has cusps, and a longer or shorter trochoid has none. A wider kernel shortens the radius, but not the path."""
    rate = 2 * np.pi
    wave = smooth(TIMES, np.sin(rate * TIMES)[:, None], np.array([3.0]), bandwidth=0.2).derivatives[0, 1, 0] / rate
    points = np.stack([np.sin(rate * TIMES) - wave * rate * TIMES, np.cos(rate * TIMES)], axis=1)
    found = [one for one in judged(points) if one.kind == "cusp"]
    assert np.allclose([one.time for one in found], [1, 2, 3, 4, 5], atol=0.02)
    assert all("1.5 times as wide" in one.reasons for one in found)


def test_a_line_and_noise_have_no_forms():
    for points in (np.outer(TIMES, [3.0, 2, 1]), np.zeros((300, 3))):
        assert find_forms(judged(points, noise=0.1), extent=1.0) == []


def test_circles_that_share_a_centre_are_a_form_and_others_are_in_doubt():
    plane_centres = {(0, 1): (1.0, 2.0), (0, 2): (1.1, 3.0), (1, 2): (2.0, 3.0)}
    members = [at("vertex", plane, 2.0 + 0.05 * n, c, 2.0) for n, (plane, c) in enumerate(plane_centres.items())]
    (form,) = find_forms(members, extent=10.0)
    assert form.point == pytest.approx([1.05, 2, 3])
    assert form.mismatch == pytest.approx(0.05)
    assert form.time == pytest.approx(2.05)
    assert form.reasons == ""
    (far,) = find_forms([members[0]._replace(point=(5.0, 2.0)), *members[1:]], extent=10.0)
    assert "differ by 1.9 times the mean radius" in far.reasons  # 3.9 over a radius of 2
    (doubtful,) = find_forms([members[0]._replace(reasons="x"), *members[1:]], extent=10.0)
    assert "vertex in PC1-PC2 is suspect" in doubtful.reasons


def test_a_form_needs_every_plane_at_one_time_and_takes_each_candidate_once():
    point = (0.0, 0.0)
    both = [at("cusp", (0, 1), 1.0, point), at("cusp", (0, 2), 1.05, point)]
    assert find_forms(both, extent=1.0) == []
    assert find_forms([*both, at("cusp", (1, 2), 1.3, point)], extent=1.0) == []
    near, also = at("cusp", (1, 2), 1.1, point), at("cusp", (1, 2), 0.9, point)
    (form,) = find_forms([*both, near, also], extent=1.0)
    assert form.time == pytest.approx(1.05)
    assert form.stderr == pytest.approx(0.05)
    assert not math.isnan(form.mismatch)


def test_planes_are_those_of_the_components_there_are():
    assert [planes(count) for count in (1, 2, 5)] == [[], [(0, 1)], [(0, 1), (0, 2), (1, 2)]]
