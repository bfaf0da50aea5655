"""Checkpoint steps compared with exact integer arithmetic, and learning rates compared with PyTorch's schedulers."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from icl.config.schedules import checkpoint_steps, linear_steps, log_steps, rate_factor
from icl.presets import preset

LAST = 500_000


def log_steps_by_hand(last, num):
    """Return the exact floor of last^(j / (num - 1)): the whole number r with r^(num - 1) <= last^j < (r + 1)^(num - 1)."""
    steps = set()
    for j in range(num):
        target, r = last**j, round(last ** (j / (num - 1)))
        r -= r ** (num - 1) > target
        assert r ** (num - 1) <= target < (r + 1) ** (num - 1)
        steps.add(r)
    return steps


def linear_steps_by_hand(last, num):
    return {math.floor(Fraction(last * j, num - 1)) for j in range(num)}


# Grids


def test_published_grid_of_l2h4_has_190_steps():
    """Hoogland et al. save 100 log-spaced and 100 linear steps of 500,000, and count 190 (PAPERS.md, 1.1 and Q3).

    By exact arithmetic, flooring leaves 91 distinct log-spaced steps and 100 linear ones. Only the last step is in
    both, so there are 91 + 100 - 1 = 190. Their code also saves 190 steps: its log grid ends at 499,999 by a
    rounding error, and its loop never reaches the last linear step, 500,000.
    """
    logs, lines = log_steps_by_hand(LAST, 100), linear_steps_by_hand(LAST, 100)
    assert (len(logs), len(lines), logs & lines) == (91, 100, {LAST})
    steps = checkpoint_steps(LAST, num_log=100, num_linear=100)
    assert steps == sorted(logs | lines)
    assert len(steps) == 190


def test_preset_l2h4_asks_for_the_published_grid():
    grid = preset("L2H4").checkpoints
    assert (grid.every, grid.num_log, grid.num_linear) == (None, 100, 100)


def test_carroll_grid_has_the_published_2203_steps():
    """Carroll et al. 2025 save 1,501 multiples of a hundred and 711 floored powers, which share 9 steps."""
    grid = preset("carroll").checkpoints
    ours = checkpoint_steps(150_000, every=grid.every, num_log=grid.num_log, num_linear=grid.num_linear)
    hundreds = set(range(0, 150_001, 100))
    assert set(ours) == hundreds | log_steps_by_hand(150_000, 1000)
    assert len(ours) == 2203


@pytest.mark.parametrize(("last", "num"), [(100, 3), (12_000, 20), (150_000, 17), (7, 50), (1, 5)])
def test_log_steps_are_floored_powers(last, num):
    assert log_steps(last, num) == log_steps_by_hand(last, num)


@pytest.mark.parametrize(("last", "num"), [(100, 5), (12_000, 10), (7, 50), (LAST, 100)])
def test_linear_steps_are_floored_multiples(last, num):
    assert linear_steps(last, num) == linear_steps_by_hand(last, num)


@given(
    last=st.integers(1, 10**7),
    every=st.none() | st.integers(10**4, 10**8),
    num_log=st.integers(0, 300),
    num_linear=st.integers(0, 300),
)
def test_checkpoint_steps_are_sorted_distinct_and_hold_both_ends(last, every, num_log, num_linear):
    steps = checkpoint_steps(last, every=every, num_log=num_log, num_linear=num_linear)
    assert steps == sorted(set(steps))
    assert (steps[0], steps[-1]) == (0, last)


def test_checkpoint_steps_without_a_grid_are_the_two_ends():
    assert checkpoint_steps(10) == [0, 10]


def test_checkpoint_steps_every_so_often_keep_the_last_step():
    assert checkpoint_steps(10, every=4) == [0, 4, 8, 10]


def test_checkpoint_steps_are_a_union():
    assert checkpoint_steps(100, every=50, num_log=3, num_linear=5) == [0, 1, 10, 25, 50, 75, 100]


def test_checkpoint_steps_are_python_ints():
    assert {type(step) for step in checkpoint_steps(1000, every=7, num_log=9, num_linear=9)} == {int}


# Learning rates


def one_cycle_rates(total):
    """Return the rates of updates 1, ..., total with the published arguments (PAPERS.md, 1.1) and the peak 3e-3."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=3e-3,
        total_steps=total,
        pct_start=0.5,
        anneal_strategy="linear",
        div_factor=total / 2 - 1,
        final_div_factor=total / 2 - 1,
        cycle_momentum=False,
    )
    rates = []
    for step in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step < total - 1:
            scheduler.step()
    return np.array(rates)


def one_cycle_rate(step, total):
    """Return the same rate in closed form: linear from max / d at 0 to max at d = total / 2 - 1, then to max / d^2 at total - 1."""
    d = total / 2 - 1
    if step <= d:
        return 3e-3 * (1 / d + (1 - 1 / d) * step / d)
    return 3e-3 * (1 - (1 - 1 / d**2) * (step - d) / (total - 1 - d))


def triangle(total, warmup_steps=None):
    return rate_factor("triangle", warmup_steps=warmup_steps, schedule_steps=total)


def test_triangle_is_the_published_one_cycle_at_every_step_of_a_small_schedule():
    factor = triangle(2000)
    ours = np.array([3e-3 * factor(step) for step in range(2000)])
    np.testing.assert_allclose(ours, one_cycle_rates(2000), rtol=0, atol=1e-8)


def test_closed_form_of_the_one_cycle_is_that_of_pytorch():
    closed = [one_cycle_rate(step, 2000) for step in range(2000)]
    np.testing.assert_allclose(closed, one_cycle_rates(2000), rtol=0, atol=1e-15)


@pytest.mark.parametrize("step", [0, 1, 1000, 124_999, 249_998, 249_999, 250_000, 375_000, 499_998, 499_999])
def test_triangle_is_the_published_one_cycle_of_500_000_steps(step):
    assert abs(3e-3 * triangle(LAST)(step) - one_cycle_rate(step, LAST)) < 1e-13


@pytest.mark.parametrize(("step", "rate"), [(0, 1.2e-8), (249_999, 3e-3), (499_999, 0.0)])
def test_triangle_starts_peaks_and_ends_as_published(step, rate):
    """PAPERS.md, 1.1: the start is 1.2e-8, the peak 3e-3 is at 249,999, and the end is 4.8e-14."""
    assert 3e-3 * triangle(LAST)(step) == pytest.approx(rate, rel=1e-4, abs=1e-13)


@given(total=st.integers(2, 10_000), share=st.floats(0, 1))
def test_triangle_peaks_at_the_warmup_and_ends_at_zero(total, share):
    warmup = 1 + int(share * (total - 2))
    factor = triangle(total, warmup)
    rates = [factor(step) for step in range(total)]
    assert max(rates) == rates[warmup - 1] == 1.0
    assert rates[-1] == 0.0


@given(total=st.integers(3, 300), share=st.floats(0, 1))
def test_triangle_has_two_straight_sides(total, share):
    warmup = 1 + int(share * (total - 2))
    rates = [triangle(total, warmup)(step) for step in range(total)]
    np.testing.assert_allclose(np.diff(rates[:warmup]), 1 / warmup, atol=1e-12)
    np.testing.assert_allclose(np.diff(rates[warmup - 1 :]), -1 / (total - warmup), atol=1e-12)


def test_triangle_stays_at_zero_past_its_end():
    assert triangle(100)(150) == 0.0


def test_warmup_is_linear_to_the_peak_then_constant():
    factor = rate_factor("warmup", warmup_steps=4, schedule_steps=100)
    assert [factor(step) for step in (0, 1, 2, 3, 4, 50, 99)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]


def test_constant_rate_is_the_peak_throughout():
    factor = rate_factor("constant", warmup_steps=None, schedule_steps=100)
    assert {factor(step) for step in range(100)} == {1.0}
