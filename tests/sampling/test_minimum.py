"""Checkpoints beside a minimum are detected from the mean of their chains: closed forms, saddles, and no false alarms at minima."""

import math

import pytest
import torch
from options import estimate_many, keywords

from icl.sampling import estimate_llc, known
from icl.sampling.convergence import drop_at_mean, significance_threshold

H = torch.tensor([0.3, 1.0, 3.0])
"""Curvatures."""
SETTINGS = {
    "lr": 2e-3,
    "nbeta": 60.0,
    "localization": 10.0,
    "num_chains": 8,
    "num_draws": 600,
    "num_burnin_steps": 300,
    "seed": 0,
}


def estimate(offset, batches=(None,), *, noise=False, **changes):
    """Estimate the LLC of a quadratic whose minimum is `offset` away from the checkpoint."""

    def loss(params, batch):
        value = (H * (params["w"] - offset).square()).sum() / 2
        return value + batch @ params["w"] if noise else value

    settings = keywords(**{**SETTINGS, "trivial_loss": 100.0, **changes})
    return estimate_llc(loss, {"w": torch.zeros(3)}, batches, **settings)


def exact_drop(offset, nbeta, localization):
    """Return, in nats, the loss at the checkpoint minus the loss at the mean of the localised density."""
    left = localization / (nbeta * H + localization)
    return float((nbeta * H * offset**2 / 2 * (1 - left**2)).sum())


def broken(result):
    return " ".join(result.reasons)


@pytest.mark.parametrize("noise", [False, True], ids=["exact gradients", "minibatches"])
def test_the_drop_of_a_quadratic_is_the_closed_form_and_what_the_estimate_lacks(noise):
    def batches(chain, draw):
        return 0.05 * torch.randn(3, generator=torch.Generator().manual_seed(10_000 * chain + draw))

    offset = torch.tensor([0.15, 0.1, 0.05])
    result = estimate(offset, batches if noise else (None,), noise=noise)
    evidence = result
    assert evidence.drop_at_mean == pytest.approx(exact_drop(offset, 60.0, 10.0), abs=4 * evidence.drop_at_mean_stderr)
    assert evidence.drop_at_mean_stderr < 0.3 * evidence.drop_at_mean
    assert result.verdict == "suspect"
    assert "the chains settle" in broken(result)
    truth = known.quadratic_llc(H, nbeta=60.0, localization=10.0, lr=2e-3, gradient_variance=0.05**2 * noise)
    error = math.hypot(result.stderr, evidence.drop_at_mean_stderr)
    assert result.llc + evidence.drop_at_mean == pytest.approx(truth, abs=4 * error)


@pytest.mark.slow
def test_soft_directions_that_a_step_down_the_gradient_misses_are_seen():
    """One steep direction limits the length of the step. The checkpoint is away from the minimum along forty soft directions."""
    curvature = torch.cat([torch.tensor([100.0]), torch.ones(40)])

    def loss(params, batch):
        return (curvature * params["w"].square()).sum() / 2

    start = {"w": torch.cat([torch.tensor([0.014]), torch.full((40,), 0.1)])}
    sizes = {"num_chains": 8, "num_burnin_steps": 250, "num_draws": 150, "thinning": 5, "seed": 0}
    settings = {"lr": 2e-4, "nbeta": 100.0, "localization": 20.0, **sizes}
    result = estimate_llc(loss, start, [None], trivial_loss=100.0, **keywords(**settings))
    off = 100 * 40 * 0.1**2 / 2
    assert result.descent < off / 4
    assert result.drop_at_mean == pytest.approx(off * (1 - (20 / 120) ** 2) + 1, rel=0.2)  # 1: the steep one's
    assert "the chains settle" in broken(result)


def test_a_minimum_raises_no_alarm():
    """The mean of few draws lies far above the minimum. The jackknife removes this bias, and its error covers the remainder."""

    def loss(params, batch):
        return (H * params["w"].square()).sum() / 2

    settings = {**SETTINGS, "num_draws": 60, "num_chains": 4, "trivial_loss": 100.0}
    found = estimate_many(loss, [{"w": torch.zeros(3)}] * 80, [None], **settings)
    assert sum(one.has_significant_drop for one in found) <= 2  # of 80; 0.1 expected of a normal
    settled = torch.tensor([one.drop_at_mean for one in found])
    assert float(settled.mean()) == pytest.approx(0, abs=4 * float(settled.std()) / 80**0.5)


def test_a_saddle_is_seen_by_each_chain_though_not_by_their_mean():
    def batches(chain, draw):
        return 0.1 * torch.randn(2, generator=torch.Generator().manual_seed(10_000 * chain + draw))

    def loss(params, batch):
        w = params["w"]
        return (w[0].square() - 1).square() + w[1].square() / 2 + batch @ w

    settings = {"lr": 5e-3, "nbeta": 12.0, "localization": 0.1, "num_draws": 400, "num_burnin_steps": 600, "seed": 0}
    result = estimate_llc(loss, {"w": torch.zeros(2)}, batches, num_chains=8, trivial_loss=1e3, **settings)
    assert result.drop_at_mean > 6  # of 12 nats from the saddle to either well
    assert result.has_significant_drop
    assert "the chains settle" in broken(result)
    assert result.verdict != "ok"


def drops_of(means):
    """Return the drops for a quadratic of unit curvature with its minimum at 0, from w0 = 1, on one batch."""
    num = len(means)
    without = (means.sum() - means) / max(1, num - 1)
    places = torch.cat([means, without, means.mean().reshape(1)])
    return ((1 - places.square()) / 2).unsqueeze(1).split([num, num, 1])


def test_the_jackknife_is_exact_for_quadratics_and_its_error_honest():
    """The estimate of (1 - mu^2) / 2 from means m_k = mu + noise is unbiased, and its error equals its root mean square deviation."""
    mu, found = 0.3, []
    generator = torch.Generator().manual_seed(0)
    for _ in range(4000):
        means = mu + 0.2 * torch.randn(5, generator=generator, dtype=torch.float64)
        found.append(drop_at_mean(*drops_of(means), are_all=True))
    values, errors, freedom = torch.tensor(found, dtype=torch.float64).unbind(1)
    assert float(values.mean()) == pytest.approx((1 - mu**2) / 2, abs=4 * float(values.std()) / 4000**0.5)
    assert float(errors.square().mean()) == pytest.approx(float(values.var()), rel=0.15)
    assert freedom.unique().tolist() == [4.0]


def test_few_chains_need_more_standard_errors():
    assert significance_threshold(math.inf) == pytest.approx(3)
    assert significance_threshold(1.0) > significance_threshold(3.0) > significance_threshold(7.0) > 3
    assert significance_threshold(3.0) == pytest.approx(
        9.22, abs=0.01
    )  # Student's t at 0.99865, three degrees of freedom


def test_batches_that_are_all_the_data_have_no_error_and_others_do():
    drops = [torch.tensor([[1.0, 3.0]] * num, dtype=torch.float64) for num in (4, 4, 1)]
    assert drop_at_mean(*drops) == (2.0, 1.0, 1.0)  # sd sqrt(2) of two batches, one degree of freedom
    assert drop_at_mean(*drops, are_all=True)[:2] == (2.0, 0.0)
    assert drop_at_mean(*drops, are_all=True, rounding=0.5)[1] == 0.5


def test_one_chain_has_its_own_mean_alone_and_without_batches_there_is_nothing():
    parts = drops_of(torch.tensor([0.5], dtype=torch.float64))
    one = drop_at_mean(*parts, are_all=True)
    assert one[:2] == (0.375, 0.0)
    assert drop_at_mean(*parts)[:2] == (0.375, math.inf)  # one batch of many has no known error
    nothing = drop_at_mean(*(torch.zeros(num, 0, dtype=torch.float64) for num in (2, 2, 1)))
    assert all(math.isnan(number) for number in nothing)


@pytest.mark.slow
def test_a_fixed_list_of_batches_is_the_whole_data():
    """The minimum on these batches is ten nats below the checkpoint. Their spread is far larger, but is not an error."""
    pushes = [torch.tensor([push, 0.0, 0.0]) for push in (-1.0, 0.0, 1.0)]
    start = {"w": torch.tensor([0.0, 0.6, 0.0])}

    def loss(params, batch):
        return (H * params["w"].square()).sum() / 2 + batch @ params["w"]

    found = estimate_llc(loss, start, pushes, **SETTINGS, trivial_loss=100.0)
    assert found.drop_at_mean == pytest.approx(60 * 0.36 / 2 * (1 - (10 / 70) ** 2), abs=4 * found.drop_at_mean_stderr)
    assert found.has_significant_drop


@pytest.mark.slow
def test_a_chain_that_is_masked_is_not_among_those_that_settle():
    """One of eight chains is pushed up a wall and back. Its mean is finite, but far away."""

    def loss(params, batch):
        return (H * params["w"].square()).sum() / 2 + batch * params["w"].sum()

    def batches(chain, draw):
        return torch.tensor(-60.0 if chain == 3 and draw > 600 else 0.0)

    found = estimate_llc(loss, {"w": torch.zeros(3)}, batches, **SETTINGS, trivial_loss=100.0)
    assert found.num_chains_used == 7
    assert abs(found.drop_at_mean) < 3 * found.drop_at_mean_stderr + 0.1
    assert found.drop_at_mean_stderr < 1


@pytest.mark.slow
def test_batches_and_chains_that_are_not_finite_are_left_out():
    offset = torch.tensor([0.4, 0.2, 0.1])

    def loss(params, batch):
        return (H * (params["w"] - offset).square()).sum() / 2 + batch * params["w"].sum()

    def batches(chain, draw):
        return torch.tensor(math.nan if chain == 3 and draw > 400 else 0.0)

    settings = {**SETTINGS, "trivial_loss": 100.0}
    dead = estimate_llc(loss, {"w": torch.zeros(3)}, batches, **settings)
    assert dead.num_chains_used == 7
    assert dead.drop_at_mean == pytest.approx(exact_drop(offset, 60.0, 10.0), abs=4 * dead.drop_at_mean_stderr)


def test_chunks_and_loops_give_the_same_drop():
    offset = torch.tensor([0.4, 0.2, 0.1])
    few = {"num_draws": 40, "num_burnin_steps": 10}
    whole = estimate(offset, **few)
    for changes in ({"memory": 1.0}, {"vectorize": False}):
        assert estimate(offset, **few, **changes).drop_at_mean == pytest.approx(whole.drop_at_mean, rel=1e-4)
