"""OOD curves over the multiplier of the inputs, for predictors whose error is known at every multiplier."""

import math

import pytest
import torch
from tiny_runs import TINY, change

from icl import baselines
from icl.analysis.behaviour.ood_curves import FAMILIES, CurveSettings, curve, curve_rows, scaled_prompts, scales
from icl.config.validation import ConfigError
from icl.tasks.prompts import Prompts, sample_prompts
from icl.tasks.shifts import sample_shifted_prompts

CONFIG = change(TINY, task={"task_size": 3, "max_examples": 5, "noise_variance": 0.09})
FACTORS = scales(15)


def prompts(count=2000):
    return Prompts(*(part.double() for part in sample_prompts(CONFIG, stream="true", step=0, batch_size=count)))


def signal(given):
    return (given.xs * given.ws.unsqueeze(-2)).sum(-1)


def test_the_scales_are_those_of_the_paper():
    found = scales(100)
    assert len(found) == 100
    assert (found[0], found[-1]) == pytest.approx((10**-2.5, 10**4.5))
    assert found[51] / found[50] == pytest.approx(10 ** (7 / 99))


@pytest.mark.parametrize(("family", "shift"), [("input_scale", "input_scale_3"), ("task_scale", "task_scale_3")])
def test_scaled_prompts_are_those_of_the_evaluation(family, shift):
    own = scaled_prompts(sample_prompts(CONFIG, stream="true", step=0, batch_size=7), family, [1.0, 3.0])
    for mine, theirs in zip(own, sample_shifted_prompts(CONFIG, shift, batch_size=7), strict=True):
        torch.testing.assert_close(mine[7:], theirs)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("share", [1.0, 0.5, -2.0])
def test_a_predictor_that_knows_a_share_of_the_task(family, share):
    """It predicts a w.x, so loss / g^2 is (1 - a)^2 D + sigma^2 / g^2. The ratio of sizes tends to |a| as the noise vanishes."""
    scaled = scaled_prompts(prompts(), family, FACTORS)
    found = curve(share * signal(scaled), scaled.ys, FACTORS)
    expected = [(1 - share) ** 2 * 3 + 0.09 / g**2 for g in FACTORS]
    error = (found.loss_over_g2.value - torch.tensor(expected)).abs()
    assert (error <= 5 * found.loss_over_g2.stderr).all()
    sizes = [abs(share) * math.sqrt(3 * g**2 / (3 * g**2 + 0.09)) for g in FACTORS]
    error = (found.size_ratio.value - torch.tensor(sizes)).abs()
    assert (error <= 5 * found.size_ratio.stderr + 1e-6).all()
    assert found.size_ratio.value[-1] == pytest.approx(abs(share), rel=1e-4)


def test_the_noise_is_of_deviation_sigma_at_every_scale():
    """The true task's predictions have mean squared error 0.09, which is sigma^2, at every multiplier g."""
    scaled = scaled_prompts(prompts(), "input_scale", FACTORS)
    found = curve(signal(scaled), scaled.ys, FACTORS)
    noise = found.loss_over_g2.value * torch.tensor(FACTORS).square()
    torch.testing.assert_close(noise, noise[:1].expand(len(noise)), rtol=1e-4, atol=0)
    assert abs(noise[0] - 0.09) < 5 * found.loss_over_g2.stderr[0] * FACTORS[0] ** 2


def test_errors_are_those_over_prompts():
    scaled = scaled_prompts(prompts(50), "task_scale", FACTORS)
    predictions = 0.3 * scaled.ys + 1
    found = curve(predictions, scaled.ys, FACTORS)
    one = slice(4 * 50, 5 * 50)
    own = ((predictions[one] - scaled.ys[one]) ** 2).mean(1) / FACTORS[4] ** 2
    assert found.loss_over_g2.value[4].item() == pytest.approx(own.mean().item())
    assert found.loss_over_g2.stderr[4].item() == pytest.approx(own.std().item() / 50**0.5)
    upper, lower = predictions[one].square().mean(1), scaled.ys[one].square().mean(1)
    deleted = torch.tensor([_without(upper, n) / _without(lower, n) for n in range(50)]).double().sqrt()
    jackknife = ((deleted - deleted.mean()).square().sum() * 49 / 50).sqrt()
    assert found.size_ratio.stderr[4].item() == pytest.approx(jackknife.item(), rel=0.1)


def _without(values, place):
    return (values.sum() - values[place]).item()


def test_rows_of_zero_and_of_ridge():
    """Predictions of zero have size 0. Larger inputs do not disturb ridge: its weights are right up to noise / g."""
    few = sample_prompts(CONFIG, stream="true", step=0, batch_size=200)

    def both(_, xs, ys):
        return torch.stack([baselines.zero(xs, ys), baselines.ridge(xs, ys, noise_variance=0.09)])

    zero, ridge = curve_rows(both, {}, few, FACTORS)
    assert {row["value"] for row in zero if row["quantity"] == "size_ratio"} == {0.0}
    assert {row["stderr"] for row in zero if row["quantity"] == "size_ratio"} == {0.0}
    loss = {(row["distribution"], row["scale"]): row for row in ridge if row["quantity"] == "loss_over_g2"}
    assert set(loss) == {(family, g) for family in FAMILIES for g in FACTORS}
    # with k - 1 examples in D dimensions, 1 - (k - 1) / D of the variance of w.x is out of reach
    expected = sum(3 - k for k in range(3)) / 5
    last = loss["input_scale", FACTORS[-1]]
    assert abs(last["value"] - expected) < 5 * last["stderr"]


def test_predictions_that_are_not_finite_have_no_error_either():
    scaled = scaled_prompts(prompts(20), "input_scale", FACTORS)
    found = curve(torch.full_like(scaled.ys, math.nan), scaled.ys, FACTORS)
    for estimate in found:
        assert estimate.value.isnan().all()
        assert estimate.stderr.isnan().all()


@pytest.mark.parametrize("wrong", [{"num_scales": 1}, {"num_scales": -1}, {"num_ood_prompts": 1}])
def test_settings_that_cannot_be_are_sentences(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        CurveSettings(**wrong)
