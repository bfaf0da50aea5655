"""Minima, crossings and rises of made-up curves with known answers and noise of known size."""

import math
import re

import pytest
import torch

from icl.analysis.behaviour.turning_points import crossings, minimum, transience, unresolved_signs

STEPS = torch.cat((torch.tensor([0]), torch.logspace(0, 4, 40).round().long().unique()))
LOGS = STEPS.double().log1p()
ZERO, RIDGE = torch.full((400,), 4.0).double(), torch.full((400,), 1.0).double()


def around(curve, *, noise=0.3, shared=1.0, shake=0.0, seed=0, count=400):
    """Return numbers of prompts around a curve, with noise that all steps share, noise of a prompt at a step, and noise of a step."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    curve = torch.as_tensor(curve).double() + shake * draw(len(curve))
    return curve.unsqueeze(1) + shared * draw(1, count) + noise * draw(len(curve), count)


def step_at(log):
    return math.exp(log) - 1


def test_a_minimum_is_enclosed_by_steps_that_are_clearly_higher():
    for seed in range(20):
        place = minimum(STEPS, around((LOGS - 5.0) ** 2 / 4, seed=seed))
        assert place.verdict == "ok"
        assert place.lower < step_at(5.0) < place.upper
        assert place.lower < place.step < place.upper


def test_without_noise_the_neighbours_enclose_it():
    place = minimum(STEPS, (LOGS - LOGS[20]).abs().unsqueeze(1).expand(-1, 3))
    assert (place.lower, place.step, place.upper) == (STEPS[19], STEPS[20], STEPS[21])


@pytest.mark.parametrize(
    ("curve", "reason"),
    [
        (-LOGS, "lowest at the last"),
        (LOGS, "lowest at the first"),
        (1e-4 * (LOGS - 5) ** 2, "not significantly lower than the curve|lowest at the"),
    ],
)
def test_a_minimum_at_an_end_is_in_doubt(curve, reason):
    place = minimum(STEPS, around(curve))
    assert place.verdict == "suspect"
    assert re.search(reason, " ".join(place.reasons))


@pytest.mark.slow
def test_a_crossing_of_a_line_is_off_by_its_standard_error():
    """Over draws, the z score has mean 0 and deviation 1. The prompts share much of their noise, which moves all steps together."""
    crossing_log, scores = LOGS[20] + 0.4 * (LOGS[21] - LOGS[20]), []
    for seed in range(100):
        (found,) = crossings(STEPS, around(0.5 * (LOGS - crossing_log), noise=0.2, shared=0.2, seed=seed))
        assert found.is_upward
        assert found.point.lower <= found.point.step <= found.point.upper
        assert found.point.verdict == "ok"
        scores.append((math.log1p(found.point.step) - crossing_log) * (found.point.step + 1) / found.point.stderr)
    scores = torch.tensor(scores)
    assert abs(scores.mean()) < 4 / 100**0.5
    assert abs(scores.std() - 1) < 4 / 200**0.5


def test_crossings_there_and_back():
    found = crossings(STEPS, around((LOGS / LOGS[-1] * 3 * math.pi + 0.5).sin(), shared=0.1))
    assert [one.is_upward for one in found] == [False, True, False]
    for number, one in enumerate(found, start=1):
        log = (number * math.pi - 0.5) / (3 * math.pi) * LOGS[-1]
        assert one.point.lower < step_at(log) < one.point.upper


def test_one_step_on_the_other_side_is_in_doubt():
    curve = torch.ones(len(STEPS))
    curve[20] = -1
    found = crossings(STEPS, around(curve, shared=0.1))
    assert [one.point.verdict for one in found] == ["suspect", "suspect"]
    assert "only one saved step" in found[0].point.reasons[0]


def log_steps(num_steps, last=10_000):
    """Return at most `num_steps` steps, spaced evenly in log time."""
    return torch.cat((torch.tensor([0]), torch.logspace(0, math.log10(last), num_steps - 1).round().long().unique()))


@pytest.mark.parametrize("num_steps", [8, pytest.param(38, marks=pytest.mark.slow)])
def test_a_flat_curve_that_fluctuates_has_no_turning_points(num_steps):
    """The fluctuation between steps (0.02) is far above the error over prompts (0.003). One in 20 may be `ok`."""
    steps = log_steps(num_steps)
    flat = [around(torch.zeros(len(steps)), noise=0.06, shared=0.0, shake=0.02, seed=seed) for seed in range(20)]
    assert sum(minimum(steps, curve).verdict == "ok" for curve in flat) <= 1
    assert sum(any(each.point.verdict == "ok" for each in crossings(steps, curve)) for curve in flat) <= 1
    assert sum(unresolved_signs(steps, curve) == () for curve in flat) <= 1


def test_turning_points_of_ten_times_the_scatter_are_found():
    """A minimum and a crossing at half of the log time. The error of the crossing includes the fluctuation of the steps."""
    steps = log_steps(38)
    half = float(steps.double().log1p()[-1]) / 2
    line, scores = steps.double().log1p() / half - 1, []
    for seed in range(20):
        place = minimum(steps, around(0.3 * line.abs(), noise=0.06, shared=0.0, shake=0.02, seed=seed))
        assert place.verdict == "ok"
        assert place.lower < step_at(half) < place.upper
        (found,) = crossings(steps, around(0.2 * line, noise=0.06, shared=0.0, shake=0.02, seed=seed))
        assert found.point.verdict == "ok"
        scores.append((math.log1p(found.point.step) - half) * (found.point.step + 1) / found.point.stderr)
    assert torch.tensor(scores).square().mean().sqrt() < 1 + 4 / 40**0.5


def test_without_a_clear_change_there_is_no_crossing():
    above = around(0.5 + LOGS, shared=0.1)
    assert crossings(STEPS, above) == []
    assert unresolved_signs(STEPS, above) == ()
    for seed in range(10):
        noise = around(torch.zeros(len(STEPS)), noise=1.0, shared=0.0, seed=seed)
        assert crossings(STEPS, noise) == []
        assert "standard errors of zero" in unresolved_signs(STEPS, noise)[0]


@pytest.mark.parametrize("num_steps", [1, 20])
def test_without_a_clear_step_the_sign_is_unresolved(num_steps):
    """All means have the same sign, but they are 0.86 standard errors from zero."""
    prompts = around(torch.zeros(1), noise=1.0, shared=0.0)
    samples = (prompts - prompts.mean() - 0.86 * prompts.std() / 20).expand(num_steps, -1)
    assert f"{num_steps} of {num_steps} saved steps are within" in unresolved_signs(STEPS[:num_steps], samples)[-1]
    assert unresolved_signs(STEPS[:0], samples[:0]) != ()


def test_steps_that_are_not_finite_are_left_out():
    samples = around((LOGS - 5.0) ** 2 / 4)
    samples[-1, 0] = math.nan
    place = minimum(STEPS, samples)
    assert place.upper < STEPS[-1]
    assert place.reasons == ("the values of 1 saved step(s) are not finite",)
    assert minimum(STEPS, samples * math.nan).verdict == "invalid"
    assert transience(STEPS, samples * math.nan, zero=ZERO, ridge=RIDGE).verdict == "invalid"


def test_steps_that_are_not_finite_are_reasons_for_and_against_a_crossing():
    """A curve may cross zero at a step without a value, so both a crossing and its absence are in doubt."""
    samples = around(LOGS - LOGS[20] - 0.1, noise=0.2, shared=0.2)
    samples[20] = math.nan
    (found,) = crossings(STEPS, samples)
    assert (found.point.lower, found.point.upper) == (STEPS[19], STEPS[21])
    assert (found.point.verdict, found.point.reasons) == ("suspect", ("the values of 1 saved step(s) are not finite",))
    assert unresolved_signs(STEPS[18:], samples[18:].abs()) == ("the values of 1 saved step(s) are not finite",)
    few = torch.stack((samples[20], *samples[-4:]))  # a step without a value, then four that are clearly positive
    assert unresolved_signs(STEPS[-5:], few) == (
        "the values of 1 saved step(s) are not finite",
        "4 saved steps are too few to know how much the curve fluctuates between steps",
    )


def falls_and_rises(low, end, *, at=5.0):
    """Return a loss that falls from 4 to `low` at log(t + 1) = `at` and then rises to `end`, in straight lines in log time."""
    down = 4 + (low - 4) * (LOGS / at).clamp(max=1)
    return down + (end - low) * ((LOGS - at) / (LOGS[-1] - at)).clamp(min=0)


@pytest.mark.parametrize(
    ("low", "dip", "finding"),
    [(1.2, 2.8 / 3, "transient ridge"), (3.0, 1 / 3, "partial dip"), (4.0, 0.0, "rise without a dip")],
)
def test_a_loss_that_rises_again(low, dip, finding):
    for seed in range(5):
        found = transience(
            STEPS, around(falls_and_rises(low, low + 0.5), noise=0.1, shared=0.1, seed=seed), zero=ZERO, ridge=RIDGE
        )
        assert (found.finding, found.verdict) == (finding, "ok")
        assert abs(found.rise.value - 0.5) < 4 * found.rise.stderr
        assert abs(found.dip.value - dip) < 5 * found.dip.stderr
        if low < 4:
            assert found.critical.lower < step_at(5.0) < found.critical.upper


@pytest.mark.parametrize(
    ("shake", "end"),
    [(0.02, 1.0), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in [(0.0, 2.0), (0.02, 4.0)])],
)
def test_a_monotone_or_flat_loss_has_no_transience(shake, end):
    """The loss falls to the end, or falls and is then flat, with noise of prompts and steps. One in 200 may be called transient."""
    findings = []
    for seed in range(40):
        curve = 4 + (end - 4) * (LOGS / 7).clamp(max=1 if seed % 2 else 2)
        samples = around(curve, noise=0.05, shake=shake, seed=seed, count=50)
        findings.append(transience(STEPS, samples, zero=ZERO[:50], ridge=RIDGE[:50]).finding)
    assert findings.count("none") >= 34
    assert findings.count("none") + findings.count("unresolved") >= 39


def test_what_is_gone_at_the_end_is_no_rise():
    curve = falls_and_rises(1.2, 1.2)
    curve[-10:-4] += 1.0
    assert transience(STEPS, around(curve, noise=0.1), zero=ZERO, ridge=RIDGE).finding == "none"


@pytest.mark.slow
def test_a_rise_that_may_be_chance_is_unresolved():
    """The scatter of steps is 0.01 and the noise of prompts is small. So a rise of 0.06 is about four standard errors, and 0.2 fourteen."""
    for rise, finding in ((0.06, "unresolved"), (0.2, "transient ridge")):
        curves = (around(falls_and_rises(1.2, 1.2 + rise), noise=0.01, shake=0.01, seed=seed) for seed in range(40))
        found = [transience(STEPS, curve, zero=ZERO, ridge=RIDGE).finding for curve in curves]
        assert found.count(finding) > 10


@pytest.mark.parametrize("num_steps", [4, *(pytest.param(num, marks=pytest.mark.slow) for num in (5, 6, 8, 12))])
def test_few_steps_of_a_flat_loss_do_not_show_transience(num_steps):
    """The fluctuation between steps has standard deviation 0.02. With few steps, a flexible trend would follow it."""
    steps = log_steps(num_steps)
    for seed in range(30):
        curve = around(torch.full((num_steps,), 1.5), noise=0.05, shared=1.0, shake=0.02, seed=seed, count=1024)
        zero, ridge = torch.full((1024,), 4.0).double(), torch.full((1024,), 1.0).double()
        found = transience(steps, curve, zero=zero, ridge=ridge)
        assert found.verdict == "suspect" if num_steps < 8 else found.finding in ("none", "unresolved")
        assert num_steps >= 8 or "too few" in found.reasons[0]


def test_twenty_steps_show_a_rise_of_ten_standard_errors():
    logs = log_steps(20, last=500_000).double().log1p()
    curve = 1.2 + 2.8 / (1 + (2 * (logs - 5)).exp()) + 0.28 * ((logs - 8) / (logs[-1] - 8)).clamp(min=0)
    curves = (around(curve, noise=0.05, shared=0.1, shake=0.02, seed=seed) for seed in range(20))
    found = [transience(log_steps(20, last=500_000), each, zero=ZERO, ridge=RIDGE) for each in curves]
    assert sum((each.finding, each.verdict) == ("transient ridge", "ok") for each in found) >= 10


def test_a_rise_is_in_doubt_if_its_minimum_may_have_been_missed():
    """The loss rises from the first saved step on, which is step 10,000 or, without a dip, step 0."""
    curve = 1.1 + 0.05 * torch.arange(20)
    late = torch.linspace(10_000, 40_000, 20).long()
    found = transience(late, around(curve, noise=0.1, shared=0.1), zero=ZERO, ridge=RIDGE)
    assert (found.finding, found.verdict) == ("transient ridge", "suspect")
    assert found.reasons == found.critical.reasons == ("the curve is lowest at the first saved step",)
    for steps, verdict in ((late, "suspect"), (late - 10_000, "ok")):
        found = transience(steps, around(curve + 3, noise=0.1, shared=0.1), zero=ZERO, ridge=RIDGE)
        assert (found.finding, found.verdict) == ("rise without a dip", verdict)


def test_two_steps_cannot_show_transience():
    found = transience(STEPS[:2], around([4.0, 1.0]), zero=ZERO, ridge=RIDGE)
    assert (found.finding, found.verdict) == ("unresolved", "invalid")
