"""Observables of the draws, susceptibilities that are computed from them, and their export."""

import math

import pytest
import torch
from options import estimate_many, keywords

from icl.config import ChainsConfig
from icl.config.validation import ConfigError
from icl.sampling import estimate_llc, estimate_llcs, susceptibility_of
from icl.sampling.susceptibility import susceptibility

H = torch.tensor([0.3, 1.0, 3.0], dtype=torch.float64)
PARTS = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.5], [0.3, 1.0, 3.0]], dtype=torch.float64)
"""Curvatures of the losses of three parts of the data; the last is the loss itself."""
SETTINGS = {
    "lr": 2e-3,
    "nbeta": 60.0,
    "localization": 10.0,
    "num_chains": 8,
    "num_draws": 600,
    "num_burnin_steps": 100,
    "seed": 0,
    "trivial_loss": 10.0,
    "kernel": "baoab",
}
TRUTH = -60.0 * (H * (PARTS - H) / (60.0 * H + 10.0).square() / 2).sum(1)
START = {"w": torch.zeros(3, dtype=torch.float64)}


def quadratic(params, batch):
    return (H * params["w"].square()).sum() / 2


def part_losses(params):
    return (PARTS * params["w"].square()).sum(1) / 2


def estimate(loss=quadratic, params=START, batches=(None,), **changes):
    return estimate_llc(loss, params, list(batches), **keywords(**{**SETTINGS, **changes}))


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("kernel", ["sgld", "rmsprop", "baoab"])
def test_an_observable_is_recorded_at_every_draw_of_every_chain(kernel, vectorize):
    sizes = {"num_draws": 5, "num_burnin_steps": 2, "thinning": 2, "kernel": kernel, "vectorize": vectorize}
    result = estimate(observables={"w": lambda params: params["w"], "loss": lambda p: quadratic(p, None)}, **sizes)
    assert result.observables["w"].shape == (8, 5, 3)
    assert result.observables["loss"].shape == (8, 5)
    torch.testing.assert_close(result.observables["loss"], result.loss_trace)
    torch.testing.assert_close((H * result.observables["w"].square()).sum(2) / 2, result.loss_trace)
    torch.testing.assert_close(result.excess_trace.mean(), torch.tensor(result.llc, dtype=torch.float64))
    plain = estimate(**sizes)
    assert plain.observables == {}
    assert torch.equal(plain.loss_trace, result.loss_trace)  # looking changes nothing


def test_observables_are_the_same_alone_and_together():
    starts = [{"w": torch.full((3,), value, dtype=torch.float64)} for value in (0.0, 0.1)]
    common = {**SETTINGS, "observables": {"w": lambda params: params["w"]}, "num_draws": 6}
    settings = {name: common.pop(name) for name in list(common) if name in ChainsConfig.__dataclass_fields__}
    together = estimate_many(quadratic, starts, [None], **settings, **common)
    alone = [estimate_many(quadratic, [start], [None], **settings, **common)[0] for start in starts]
    for ours, theirs in zip(together, alone, strict=True):
        # The noise is seeded from the number of the checkpoint, so the second one alone has other noise.
        assert ours.observables["w"].shape == theirs.observables["w"].shape
    torch.testing.assert_close(together[0].observables["w"], alone[0].observables["w"])


def test_susceptibilities_of_a_quadratic_have_their_closed_form():
    """w_i is normal with variance v_i, so Cov(h w^2 / 2, g w^2 / 2) = h g v^2 / 2. The errors equal the spread of 20 repetitions."""
    observables = {"parts": part_losses, "loss": lambda params: quadratic(params, None)}
    settings = ChainsConfig(**{name: value for name, value in SETTINGS.items() if name != "trivial_loss"})
    results = estimate_llcs(quadratic, [START] * 20, [None], settings, observables=observables)
    found = [susceptibility_of(result, "parts", reference="loss") for result in results]
    scores = torch.stack([(values - TRUTH) / errors for values, errors in found])[:, :2]
    assert scores.mean(0).abs().max() < 3 / math.sqrt(20)
    # Three standard errors of the deviation of 20 normal scores.
    assert 1 - 3 / math.sqrt(40) < scores.std(0).min() <= scores.std(0).max() < 1 + 3 / math.sqrt(40)
    assert all(abs(values[2]) < 1e-12 for values, _ in found)  # the loss itself does not differ from the loss


def test_what_does_not_move_has_no_susceptibility():
    third = {"third": lambda params: 1.5 * params["w"][2] ** 2, "loss": lambda params: quadratic(params, None)}
    result = estimate(observables=third, restrict={"w": torch.tensor([True, True, False])}, num_draws=50)
    assert not result.observables["third"].any()
    moving = susceptibility_of(result, "third", reference="loss").value
    assert float(moving) == pytest.approx(float(result.excess_trace.var()) / 60, rel=1e-9)  # -Cov(f, 0 - L)


@pytest.mark.slow
def test_minibatch_noise_does_not_move_a_susceptibility():
    """The noise in the excess is independent of values that are measured on other data."""

    def noisy(params, batch):
        return quadratic(params, None) + batch @ params["w"]

    def batches(chain, draw):
        generator = torch.Generator().manual_seed(10_000 * chain + draw)
        return 0.05 * torch.randn(3, generator=generator, dtype=torch.float64)

    result = estimate_llc(
        noisy, START, batches, observables={"parts": part_losses}, **{**SETTINGS, "num_draws": 1500, "kernel": "sgld"}
    )
    reference = result.observables["parts"][..., 2:]
    found = susceptibility(result.excess_trace, result.observables["parts"] - reference)
    assert ((found.value - TRUTH).abs()[:2] < 4 * found.stderr[:2] + 0.03 * TRUTH.abs()[:2]).all()


def test_a_wrong_name_or_shape_is_one_sentence():
    result = estimate(observables={"parts": part_losses}, num_draws=5)
    with pytest.raises(ConfigError, match=r"no observable `heads`\. Its observables are: parts"):
        susceptibility_of(result, "heads")
    with pytest.raises(ConfigError, match="must have as many chains and draws"):
        susceptibility(torch.zeros(1, 1), torch.zeros(1, 1))


def test_the_draws_are_exported_to_arviz():
    array_stats = pytest.importorskip("arviz_stats.base").array_stats
    pytest.importorskip("arviz_base")
    result = estimate(observables={"parts": part_losses}, num_draws=400)
    tree = result.to_arviz()
    assert tree["posterior"]["llc"].dims == ("chain", "draw")
    assert tree["posterior"]["parts"].shape == (8, 400, 3)
    assert tree["sample_stats"]["loss"].shape == (8, 400)
    assert tree["posterior"].attrs["verdict"] == result.verdict
    draws = tree["posterior"]["llc"].values
    assert draws.mean() == pytest.approx(result.llc)
    assert array_stats.ess(draws, chain_axis=0, draw_axis=1, method="mean") == pytest.approx(result.ess, rel=0.01)
