"""Boundaries in one signal: turns and plateaus are found at known steps, and a curve that only bends has no boundary."""

import numpy as np
import pytest

from icl.analysis.stages.boundaries import find_boundaries
from icl.analysis.stages.smoothing import fit

TIMES = np.linspace(0, 9, 60)


def boundaries(curve, noise=0.01, seed=0, given=True, least_change=0.01):
    values = curve + noise * np.random.default_rng(seed).normal(size=len(TIMES))
    smooth = fit(TIMES, values, np.full(len(TIMES), noise if given else 0.0), shortest=0.25, longest=1.0)
    return find_boundaries(smooth, least_change=least_change)


def step(centre, width=1.0):
    """Return a cubic from 0 to 1."""
    part = ((TIMES - centre) / width + 0.5).clip(0, 1)
    return part**2 * (3 - 2 * part)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("given", [True, False])
def test_a_parabola_turns_at_its_vertex(sign, given):
    (found,) = boundaries(sign * (TIMES - 5.2) ** 2, noise=0.3, given=given)
    assert found.kind == "turn"
    assert abs(found.time - 5.2) < 3 * found.stderr
    assert found.stderr < 0.5
    assert found.is_robust


@pytest.mark.parametrize("sign", [1, -1])
def test_two_moves_the_same_way_have_a_plateau_between_them(sign):
    (found,) = boundaries(sign * (step(2.0, 4.0) + 2 * step(6.5, 5.0)))
    assert found.kind == "plateau"
    assert abs(found.time - 4.0) < 3 * found.stderr
    assert found.strength > 4


def test_boundaries_come_in_order_of_time():
    curve = step(1.5, 3.0) + step(4.5, 3.0) - step(7.5, 3.0)
    found = boundaries(curve, noise=0.002)
    assert [one.kind for one in found] == ["plateau", "turn"]
    assert [one.time for one in found] == pytest.approx([3.0, 6.0], abs=0.25)


def test_more_noise_gives_a_larger_error_and_then_none():
    curve = (TIMES - 5.2) ** 2
    (sharp,), (blurred,) = boundaries(curve, noise=0.05), boundaries(curve, noise=1.0)
    assert blurred.stderr > 1.5 * sharp.stderr
    assert boundaries(curve, noise=60.0) == []


@pytest.mark.parametrize(
    "curve",
    [
        TIMES,
        np.exp(-TIMES),
        np.where(TIMES < 4, 0.0, TIMES - 4),
        np.where(TIMES < 4, TIMES, 4 + 4 * (TIMES - 4)),
        step(4.5, 6.0),
    ],
    ids=["line", "power law", "onset", "bend", "one move"],
)
@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_a_bend_is_no_boundary(curve, noise):
    assert [one for one in boundaries(curve, noise=noise) if one.strength > 4] == []


def test_a_move_too_small_for_the_range_does_not_count():
    curve = 100 * step(3.0, 5.0) - 0.5 * step(7.5, 2.0)
    assert len(boundaries(curve, noise=0.01, least_change=0.001)) == 1
    assert boundaries(curve, noise=0.01, least_change=0.02) == []
