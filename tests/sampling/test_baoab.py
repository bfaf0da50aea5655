"""BAOAB: one move compared with a written-out move, exact stationary moments, mean shadow work, and control variates that keep the mean."""

import functools
import math

import pytest
import torch
from options import estimate_many, keywords

from icl.config import ChainsConfig
from icl.model.flat import make_layout
from icl.sampling import CheckpointId, EstimateOptions, estimate_llc, kernels, known
from icl.sampling.at_checkpoint import make_variates
from icl.sampling.batches import ChainBatches, Pool
from icl.sampling.target import Target


def numbers(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_a_move_is_two_half_drifts_around_the_noise():
    w, w0, v, grad, noise = (numbers(3, 4, seed=seed) for seed in range(5))
    moved = kernels.baoab_step(
        kernels.BAOABState(w, w0, v), grad, noise, lr=0.09, nbeta=7.0, localization=3.0, friction=0.6
    )
    v1 = v - 0.3 * (7 * grad + 3 * (w - w0))
    v2 = 0.6 * v1 + 0.8 * noise
    assert torch.allclose(moved.velocity, v2, rtol=1e-14)
    assert torch.allclose(moved.position, w + 0.15 * v1 + 0.15 * v2, rtol=1e-14)


def test_a_chain_that_is_continued_from_its_state_is_one_that_was_never_stopped():
    def run(state, noises):
        for noise in noises:
            state = kernels.baoab_step(state, state.position, noise, lr=0.1, nbeta=2.0, localization=1.0, friction=0.5)
        return state

    start, noises = kernels.init_baoab(numbers(2, 3)), numbers(10, 2, 3, seed=1)
    whole, half = run(start, noises), run(start, noises[:5])
    again = run(kernels.BAOABState(*(part.clone() for part in half)), noises[5:])
    assert all(map(torch.equal, whole, again))


def moments(friction, lr, *, gradient_deviation=0.0, num_chains=4000, num_moves=400):
    """Return the mean square of positions on U = w^2 / 2 and its standard error, over independent chains from the stationary density."""
    generator = torch.Generator().manual_seed(1)

    def normals():
        return torch.randn(num_chains, 1, dtype=torch.float64, generator=generator)

    state = kernels.BAOABState(normals(), torch.zeros(num_chains, 1, dtype=torch.float64), normals())
    squares = torch.zeros(num_chains, 1, dtype=torch.float64)
    for move in range(num_moves):
        grad = state.position + gradient_deviation * normals()
        state = kernels.baoab_step(state, grad, normals(), lr=lr, nbeta=1.0, localization=0.0, friction=friction)
        squares += state.position.square() * (move >= num_moves // 2) / (num_moves - num_moves // 2)
    return float(squares.mean()), float(squares.std()) / num_chains**0.5


@pytest.mark.parametrize("friction", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("lr", [0.1, 1.0, 3.0])
def test_the_stationary_variance_on_a_quadratic_is_exact_at_every_step(friction, lr):
    """The variance of SGLD would be 1 / (1 - lr / 4), four times too large at the last step size."""
    variance, stderr = moments(friction, lr)
    assert variance == pytest.approx(1.0, abs=4 * stderr)
    assert stderr < 0.03


@pytest.mark.parametrize(("friction", "lr"), [(0.0, 0.3), (0.5, 0.3), (0.5, 2.0), (0.8, 1.0)])
def test_gradient_noise_adds_what_the_formula_says(friction, lr):
    variance, stderr = moments(friction, lr, gradient_deviation=0.8)
    truth = 2 * known.quadratic_llc(
        torch.ones(1), nbeta=1.0, localization=0.0, lr=lr, gradient_variance=0.64, friction=friction
    )
    assert truth > 1.04
    assert variance == pytest.approx(truth, abs=4 * stderr)


@pytest.mark.parametrize("friction", [0.0, 0.7])
def test_the_exponential_of_the_shadow_work_averages_to_one(friction):
    """In equilibrium this holds for any U, by the fluctuation theorem (Crooks 1999). Here U = w^4 / 4 + w^2 / 2."""
    num, lr = 200_000, 0.25
    grid = torch.linspace(-5, 5, 20_001, dtype=torch.float64)
    density = (-(grid**4) / 4 - grid**2 / 2).exp().cumsum(0)
    uniforms = torch.rand(num, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    w = grid[torch.searchsorted(density / density[-1], uniforms).clamp(max=20_000)][:, None]
    # The velocity between two kicks is normal; the state has it after half of the kick before.
    v = numbers(num, 1, seed=4) + lr**0.5 / 2 * (w**3 + w)
    settings = {"lr": lr, "nbeta": 1.0, "localization": 1.0, "friction": friction}
    before = kernels.BAOABState(w, torch.zeros_like(w), v)
    after = kernels.baoab_step(before, w**3, numbers(num, 1, seed=5), **settings)
    grads, losses = (w**3, after.position**3), (w[:, 0] ** 4 / 4, after.position[:, 0] ** 4 / 4)
    # The test's minimum is cut here: both signs of the work are wanted.
    force, force_after = w**3 + w, after.position**3 + after.position
    kicked = before.velocity - lr**0.5 * force
    middle, middle_after = before.velocity - lr**0.5 / 2 * force, after.velocity - lr**0.5 / 2 * force_after
    kinetic = (kicked.square() - middle.square() + middle_after.square() - after.velocity.square()).sum(1) / 2
    potential = losses[1] - losses[0] + (after.position.square() - w.square()).sum(1) / 2
    weights = (-potential - kinetic).exp()
    assert float(weights.mean()) == pytest.approx(1.0, abs=4 * float(weights.std()) / num**0.5)
    accepted = kernels.log_baoab_acceptance(before, after, grads, losses, **settings)
    assert torch.allclose(accepted, (-potential - kinetic).clamp(max=0), atol=1e-10)


# Control variates

NUM_BATCHES = 24


def regression(batch_size=8, p=5):
    """Return a linear regression on a fixed pool of minibatches, started at the minimum of the whole pool, and its Hessian's eigenvalues."""
    generator = torch.Generator().manual_seed(0)
    xs = torch.randn(NUM_BATCHES, batch_size, p, generator=generator, dtype=torch.float64)
    ys = xs @ torch.ones(p, dtype=torch.float64) + 0.5 * torch.randn(
        NUM_BATCHES, batch_size, generator=generator, dtype=torch.float64
    )

    def loss(params, batch):
        xs, ys = batch
        return (xs @ params["w"] - ys).square().mean() / 2

    best = torch.linalg.lstsq(xs.flatten(0, 1), ys.flatten()[:, None]).solution[:, 0]
    h = xs.flatten(0, 1).T @ xs.flatten(0, 1) / xs.shape[:2].numel()
    return loss, {"w": best}, list(zip(xs, ys, strict=True)), torch.linalg.eigvalsh(h)


SETTINGS = {
    "lr": 4e-3,
    "nbeta": 100.0,
    "localization": 5.0,
    "num_chains": 16,
    "num_draws": 800,
    "num_burnin_steps": 200,
    "seed": 0,
    "kernel": "baoab",
    "friction": 0.5,
    "trivial_loss": 10.0,
}


def test_variates_are_the_checkpoints_gradients_less_their_mean():
    loss, params, batches, _ = regression()
    settings = ChainsConfig(num_chains=2, num_draws=50, kernel="baoab")
    source = ChainBatches(batches, settings)
    layout, stacked = make_layout(params), {"w": params["w"][None] + 0.1}
    target = Target(loss=loss, batches=batches)
    variates = make_variates(target, stacked, source, settings, layout, chunk_size=5)
    grads = torch.stack([torch.func.grad(loss)({"w": stacked["w"][0]}, batch)["w"] for batch in batches])
    assert torch.allclose(variates.deviations[0, :, :5], grads - grads.mean(0), atol=1e-12)
    deviation, losses = variates.of_members([0, 0], [0, 1], 7)
    assert torch.allclose(deviation[1, :5], (grads - grads.mean(0))[7 * 2 + 1], atol=1e-12)
    assert float(losses[1]) == pytest.approx(float(loss({"w": stacked["w"][0]}, source.get(1, 7))))


@pytest.mark.parametrize(
    ("changes", "batches"),
    [
        ({"num_draws": 2, "num_burnin_steps": 0}, None),
        ({}, lambda chain, draw: torch.zeros(1)),
        ({}, "one batch"),
        ({}, "iterator"),
    ],
    ids=["few moves", "endless batches", "one batch", "an iterator"],
)
def test_there_are_no_variates_without_a_pool_that_pays(changes, batches):
    loss, params, pool, _ = regression()
    batches = {"one batch": pool[:1], "iterator": iter(pool), None: pool}.get(batches, batches)
    settings = ChainsConfig(**{"num_chains": 4, "num_draws": 50, "kernel": "baoab", **changes})
    source, layout = ChainBatches(batches, settings), make_layout(params)
    target = Target(loss=loss, batches=batches)
    assert make_variates(target, {"w": params["w"][None]}, source, settings, layout, chunk_size=5) is None


@pytest.mark.slow
def test_an_estimate_with_variates_agrees_with_the_truth_and_one_without_is_too_hot():
    """The bias bound includes the remaining noise, which is due to the minibatches' curvatures.

    For a list of batches that chains go through in passes, this noise is slightly smaller.
    """
    loss, params, batches, h = regression(batch_size=64)
    truth = known.quadratic_llc(h, nbeta=100.0, localization=5.0)
    order = torch.randint(NUM_BATCHES, (16, 1000), generator=torch.Generator().manual_seed(0))

    def drawn(chain, draw):
        return batches[order[chain, draw]]

    drawn.pool = Pool(NUM_BATCHES, lambda chain, draw: int(order[chain, draw]), batches.__getitem__, is_uniform=True)
    for pool in (batches, drawn):
        result = estimate_llc(loss, params, pool, **SETTINGS)
        assert truth - 4 * result.stderr < result.llc < truth + 2 * result.bias_bound + 4 * result.stderr
        assert result.bias_bound < 0.05 * truth
    without = estimate_llc(loss, params, functools.partial(drawn), **SETTINGS)
    assert without.llc > truth + 0.1 * truth
    assert result.bias_bound < 0.3 * without.bias_bound
    assert result.stderr < without.stderr


@pytest.mark.slow
def test_noise_is_bounded_by_the_measured_bias():
    """The gradient noise is known here: w times the mean of one normal variable of variance 4. So the bound is known, too."""

    def loss(params, batch):
        return params["w"].square().sum() / 2 + (batch * params["w"]).sum()

    def batches(chain, draw):
        return 2 * torch.randn(3, generator=torch.Generator().manual_seed(10_000 * chain + draw))

    settings = SETTINGS | {"lr": 1e-3, "nbeta": 20.0, "num_draws": 1500}
    result = estimate_llc(loss, {"w": torch.zeros(3)}, batches, **keywords(**settings))
    exact = known.quadratic_llc(
        torch.ones(3), nbeta=20.0, localization=5.0, lr=1e-3, gradient_variance=4.0, friction=0.5
    )
    bound = 1e-3 / 8 * 3 * 20**2 * 4.0 * 3
    assert result.bias_bound == pytest.approx(bound, rel=4 * (2 / (3 * 4 * 16)) ** 0.5)
    assert result.llc == pytest.approx(exact, abs=4 * result.stderr)
    assert exact - known.quadratic_llc(torch.ones(3), nbeta=20.0, localization=5.0) < bound
    assert math.isfinite(result.mala_acceptance)


def test_checkpoints_with_variates_are_together_as_they_are_alone_and_in_chunks():
    loss, params, batches, _ = regression()
    moved = {"w": params["w"] + 0.05}
    settings = {**SETTINGS, "num_chains": 3, "num_draws": 12, "num_burnin_steps": 8}
    alone = [estimate_llc(loss, member, batches, **settings) for member in (params, moved)]
    for memory in (None, 1.0):
        options = EstimateOptions(memory=memory, identities=[CheckpointId(0, "0"), CheckpointId(1, "0")])
        together = estimate_many(loss, [params, moved], batches, **settings, options=options)
        for result, other in zip(together, alone, strict=True):
            assert torch.allclose(result.loss_trace, other.loss_trace, rtol=1e-12)
            assert result.llc == pytest.approx(other.llc, rel=1e-9)


# Chains that stop by themselves


@pytest.mark.slow
def test_chains_stop_once_the_standard_error_is_reached_and_their_draws_are_those_of_longer_ones():
    h = torch.tensor([0.5, 2.0])

    def loss(params, batch):
        return (h * params["w"].square()).sum() / 2

    starts = [{"w": torch.zeros(2)}, {"w": torch.full((2,), 1e-3)}]
    settings = {**SETTINGS, "lr": 0.01, "num_draws": 2000, "num_burnin_steps": 100, "num_chains": 4}
    alone = [estimate_llc(loss, start, [None], **settings, target_stderr=0.03) for start in starts]
    full = estimate_llc(loss, starts[0], [None], **settings)
    truth = known.quadratic_llc(h, nbeta=100.0, localization=5.0)
    for result in alone:
        assert 100 <= result.loss_trace.shape[1] < 1800
        assert result.settings.num_draws == result.loss_trace.shape[1]
        assert result.stderr <= 0.03
        assert result.llc == pytest.approx(truth, abs=4 * 0.03)
    length = alone[0].loss_trace.shape[1]
    assert torch.equal(alone[0].loss_trace, full.loss_trace[:, :length])
    options = EstimateOptions(identities=[CheckpointId(0, "0"), CheckpointId(1, "0")])
    together = estimate_many(loss, starts, [None], **settings, target_stderr=0.03, options=options)
    for result, other in zip(together, alone, strict=True):
        assert torch.allclose(result.loss_trace, other.loss_trace, rtol=1e-5)
        assert result.llc == pytest.approx(other.llc, rel=1e-4)


def test_chains_that_do_not_reach_the_standard_error_say_so():
    def loss(params, batch):
        return params["w"].square().sum() / 2

    settings = {**SETTINGS, "lr": 0.01, "num_draws": 150}
    result = estimate_llc(loss, {"w": torch.zeros(2)}, [None], **settings, target_stderr=1e-4)
    assert result.settings.num_draws == 150
    assert any("`target_stderr`" in reason for reason in result.reasons)
