"""The search for sampler settings, on a quadratic loss with a known answer."""

import dataclasses
import math

import pytest
import torch

from icl.config import SamplerConfig
from icl.sampling import CheckpointId, known
from icl.sampling.curvature import largest_curvature
from icl.sampling.estimate import estimate as estimate_population
from icl.sampling.search import (
    LENGTH_RULES,
    LR_RULES,
    NBETAS,
    RATES,
    RATIOS,
    SURVEY,
    SearchResult,
    burnin,
    extrapolated,
    is_healthy,
    num_draws,
    on_plateau,
    search,
)
from icl.sampling.target import Target, vmapped_gradient

pytestmark = pytest.mark.slow
H = torch.logspace(-1, 1, 12)
BASE = SamplerConfig(kernel="sgld", num_chains=6, num_draws=60, num_burnin_steps=60)
START = {"w": torch.zeros(12)}


def quadratic(params, batch):
    return (H * params["w"].square()).sum() / 2


def estimate(points, *, loss=quadratic, start=START):
    """Run all settings of one call as one population, as `icl llc RUN --calibrate` does."""
    target = Target(loss=loss, batches=(None,), trivial_loss=5.0)
    settings = [point.sampler(BASE) for point in points]
    return estimate_population(target, [start], settings, identities=[CheckpointId()])


def test_the_largest_curvature_is_that_of_the_hessian():
    """The Hessians on the two batches are 2H and 0, with mean H."""

    def halved(params, batch):
        return batch * quadratic(params, None)

    gradient, factors = vmapped_gradient(halved), [torch.tensor(2.0), torch.tensor(0.0)]
    assert largest_curvature(gradient, START, factors) == pytest.approx(10.0, rel=1e-3)


@pytest.fixture(scope="module")
def asked() -> list:
    return []


@pytest.fixture(scope="module")
def found(asked) -> SearchResult:
    def noting(points):
        asked.append(list(points))
        return estimate(points)

    return search(noting, height=5.0, curvature=10.0)


def test_all_settings_of_a_ratio_are_asked_for_in_one_go_and_their_chains_are_equally_long(found, asked):
    surveyed, rates = asked[: len(RATIOS)], asked[len(RATIOS) :]
    for points in surveyed:
        assert [point.stage for point in points] == [SURVEY] * len(NBETAS)
        assert len({point.ratio for point in points}) == 1
        samplers = [point.sampler(BASE) for point in points]
        assert len({(sampler.num_draws, sampler.num_burnin_steps) for sampler in samplers}) == 1
    assert {point.stage for points in rates for point in points} == {RATES}


def test_chains_are_long_enough_for_the_localisation_to_fill_flat_directions(found):
    """After t moves, the variance is 1 - exp(-lr localization t) of its final value.

    This is 86% at the first draw of the survey, and 95% at the first draw under the chosen settings.
    """
    for one in found.trials[: len(NBETAS) * len(RATIOS)]:
        sampler = one.point.sampler(BASE)
        assert 1 - math.exp(-sampler.lr * sampler.localization * sampler.num_burnin_steps) > 0.85
    chosen = found.chosen.point
    assert 1 - math.exp(-chosen.lr * chosen.localization * found.num_burnin_steps) > 0.94


def test_chains_that_have_not_filled_flat_directions_are_not_healthy(found):
    """This holds whatever other rules the estimate breaks."""
    result = found.chosen.last
    assert result.num_params == 12
    assert not is_healthy(dataclasses.replace(result, spread=0.0, pull=2.0, filled_stderr=0.1))


def test_the_chosen_settings_of_a_quadratic_has_the_known_answer(found):
    assert found.chosen is not None
    point, result = found.chosen.point, found.chosen.last
    truth = known.quadratic_llc(H, nbeta=point.nbeta, localization=point.localization, lr=point.lr)
    assert is_healthy(result)
    assert result.llc == pytest.approx(truth, abs=4 * result.stderr)
    assert point.ratio == min(
        one.point.ratio for one in found.trials if is_healthy(one.last, but=(*LENGTH_RULES, *LR_RULES))
    )


def test_the_search_shows_failed_settings_and_an_lr_plateau(found):
    rates = [one for one in found.trials if one.point.stage == RATES]
    surveyed = [one.point for one in found.trials if one.point.stage == SURVEY]
    (first,) = [one for one in surveyed if one[1:3] == found.chosen.point[1:3]]
    assert rates[0].point.lr == pytest.approx(10 * first.lr, rel=0.1)
    assert not is_healthy(rates[0].last)
    assert on_plateau(found.chosen.last, rates[-1].last)
    assert rates[-1].point.lr < found.chosen.point.lr
    assert rates[-1].last.settings.num_burnin_steps == 3 * found.chosen.last.settings.num_burnin_steps
    assert rates[-1].last.settings.num_draws == 3 * found.chosen.last.settings.num_draws
    assert "Chosen" in found.reason


@pytest.mark.slow
def test_nothing_is_chosen_where_nothing_is_healthy():
    """The checkpoint is a saddle, so every chain finds a lower loss."""

    def saddle(params, batch):
        return -(H * params["w"].square()).sum() / 2

    nothing = search(lambda points: estimate(points, loss=saddle), height=5.0, curvature=10.0)
    assert nothing.chosen is None
    assert "No choice" in nothing.reason


@pytest.mark.slow
def test_a_checkpoint_beside_its_minimum_is_named_as_the_reason():
    def beside(params, batch):
        return (H * (params["w"] - 1).square()).sum() / 2

    nothing = search(lambda points: estimate(points, loss=beside), height=5.0, curvature=10.0)
    assert nothing.chosen is None
    assert "the checkpoint is not at a minimum, which no settings can change" in nothing.reason


def test_burn_in_is_longer_where_chains_start_far_away(found):
    result = found.chosen.last
    far = dataclasses.replace(
        result, burnin_trace=result.burnin_trace + torch.linspace(5, 0, result.burnin_trace.shape[1]) ** 3
    )
    assert burnin(far) > burnin(result)
    assert burnin(far) >= 0.75 * result.burnin_trace.shape[1]


def test_a_burn_in_is_counted_in_moves_and_not_in_draws(found):
    result = found.chosen.last
    every_move = dataclasses.replace(
        result, burnin_trace=result.burnin_trace + torch.linspace(5, 0, result.burnin_trace.shape[1]) ** 3
    )
    every_second = dataclasses.replace(
        every_move,
        loss_trace=every_move.loss_trace[:, ::2],
        settings=dataclasses.replace(every_move.settings, thinning=2),
    )
    assert burnin(every_second) == pytest.approx(burnin(every_move), rel=0.3)


def test_draws_are_no_fewer_than_asked_for_and_enough_for_the_effective_sample_size(found):
    result = dataclasses.replace(found.trials[0].last, ess=75.0)  # of 60 draws of each chain; 300 takes 240
    assert num_draws(result, 100) == 250
    assert num_draws(result, 300) == 300


def test_a_plateau_is_one_joint_error_and_three_per_cent(found):
    """An earlier rule accepted 50.9 +- 0.6, although a third of lr gave 46.4 +- 1.9."""
    first, second = (dataclasses.replace(found.chosen.last, llc=llc, stderr=e) for llc, e in ((50.9, 0.6), (46.4, 1.9)))
    assert not on_plateau(first, second)
    assert on_plateau(dataclasses.replace(first, llc=49.7), second)
    assert extrapolated(first, second) == pytest.approx((46.4 - 4.5 / 2, math.hypot(1.5 * 1.9, 0.5 * 0.6)))
