"""The kernels: one move compared with a written-out move, exact stationary moments on Gaussians, and MALA's acceptance from its definition."""

import math

import pytest
import torch

from icl.config import ChainsConfig
from icl.model.flat import make_layout
from icl.sampling import kernels
from icl.sampling.batches import ChainBatches
from icl.sampling.estimate import run_chains
from icl.sampling.target import Target

H = torch.tensor([0.01, 0.1, 1.0, 10.0], dtype=torch.float64)
NBETA, LOCALIZATION = 66.7, 6.67


def numbers(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape) + shape[0]))


def test_a_move_is_the_formula():
    w, w0, grad, noise = numbers(3, 4), numbers(2, 4)[:1].expand(3, 4), numbers(4, 4)[:3], numbers(5, 4)[:3]
    state = kernels.init_sgld(w0)._replace(position=w)
    moved = kernels.sgld_step(state, grad, noise, lr=0.1, nbeta=7.0, localization=3.0).position
    expected = w - 0.05 * (7 * grad + 3 * (w - w0)) + math.sqrt(0.1) * noise
    assert torch.allclose(moved, expected, rtol=1e-14, atol=1e-14)


def test_a_move_changes_nothing_that_it_is_given():
    w = numbers(3, 4)
    before = w.clone()
    state = kernels.init_rmsprop(w)
    kernels.sgld_step(kernels.adapt_rmsprop(state, w), w, w, lr=0.1, nbeta=1.0, localization=1.0)
    assert torch.equal(w, before)
    assert torch.equal(state.position, before)


def test_the_preconditioned_move_is_the_formula():
    w, grads, noise = numbers(3, 4), [numbers(6, 4)[:3], numbers(7, 4)[:3]], numbers(5, 4)[:3]
    state = kernels.init_rmsprop(w)
    for grad in grads:
        state = kernels.adapt_rmsprop(state, grad)
    # Two gradients, bias-corrected: weights 0.99 and 1 of 1.99.
    g = 1 / (0.1 + ((0.99 * grads[0] ** 2 + grads[1] ** 2) / 1.99).sqrt())
    moved = kernels.sgld_step(state, grads[0], noise, lr=0.1, nbeta=7.0, localization=3.0).position
    assert torch.allclose(moved, w - 0.05 * g * 7 * grads[0] + (0.1 * g).sqrt() * noise, rtol=1e-12)


def _components(params, batch):
    return 4 * H * params["w"] ** 2 / 2


def sampled_components(kernel, lr, thinning):
    """Return h w^2 / 2 of each direction at each draw, for chains that start at the minimum. L is the sum over directions."""
    start = {"w": torch.zeros(4, dtype=torch.float64)}
    settings = ChainsConfig(
        lr=lr,
        nbeta=NBETA,
        localization=LOCALIZATION,
        num_chains=64,
        num_draws=40,
        num_burnin_steps=600,
        seed=3,
        thinning=thinning,
        kernel=kernel,
    )
    target = Target(loss=_components, batches=[None])
    return (
        run_chains(
            target,
            {"w": start["w"][None]},
            ChainBatches(target.batches, settings),
            [settings],
            layout=make_layout(start),
            keys=["0"],
            chunk_size=64,
        )[0].excess
        / 4
    )  # K S T


def test_stationary_moments_of_the_discrete_chain_are_exact():
    """In each direction, nbeta E[h w^2 / 2] = nbeta h / (2 a (1 - lr a / 4)), within 4 standard errors over chains."""
    lr = 5e-3
    means = NBETA * sampled_components("sgld", lr, thinning=15).mean(1)  # K T
    a = NBETA * H + LOCALIZATION
    expected = NBETA * H / (2 * a * (1 - lr * a / 4))
    assert expected[-1] > 2 * 0.5  # the step size doubles and more what the density itself would give
    assert ((means.mean(0) - expected).abs() < 4 * means.std(0) / 8).all()


@pytest.mark.slow
def test_stationary_moments_of_the_preconditioned_chain_are_exact():
    """For a chain's fixed G, the variance is 1 / (a (1 - lr G a / 4)). The test computes G by repeating the burn-in."""
    lr, num = 2e-3, 64
    means = NBETA * sampled_components("rmsprop", lr, thinning=15).mean(1)  # K T
    g = replayed_preconditioner(lr, num)
    a = NBETA * H + LOCALIZATION
    expected = NBETA * H / (2 * a * (1 - lr * g * a / 4))
    error = means - expected
    assert (g.mean(0)[:-1] > g.mean(0)[1:]).all()  # flat directions move faster
    assert (error.mean(0).abs() < 4 * error.std(0) / math.sqrt(num)).all()


def replayed_preconditioner(lr, num):
    """Repeat the burn-in in a plain loop, with the same noise: the generators are those of the chain driver."""
    from icl import rng

    rows = []
    for chain in range(num):
        generator = torch.Generator().manual_seed(rng.stream(3, f"llc/noise/0/{chain}").low)
        w, square, g = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64), torch.ones(4)
        for move in range(1, 601):
            grad = H * w
            noise = torch.empty(4, dtype=torch.float64).normal_(generator=generator)
            w = w - lr / 2 * g * (NBETA * grad + LOCALIZATION * w) + (lr * g).sqrt() * noise
            square = 0.99 * square + 0.01 * grad**2
            g = 1 / (0.1 + (square / (1 - 0.99**move)).sqrt())
        rows.append(g)
    return torch.stack(rows)


@pytest.mark.parametrize("kernel", ["sgld", "rmsprop"])
def test_mala_acceptance_is_the_ratio_of_densities(kernel):
    """The expected value uses torch's own normal densities instead of our formula."""
    h, lr, nbeta, localization = numbers(8).abs() + 2, 0.2, 5.0, 2.0
    w0, w, noise = numbers(2, 8), numbers(2, 8) - 0.5, numbers(4, 8)[:2]
    state = kernels.init_sgld(w0)._replace(position=w)
    if kernel == "rmsprop":
        state = kernels.adapt_rmsprop(kernels.init_rmsprop(w0)._replace(position=w), h * w)
    moved = kernels.sgld_step(state, h * w, noise, lr=lr, nbeta=nbeta, localization=localization)
    after = moved.position
    g = torch.ones_like(w) if state.preconditioner is None else state.preconditioner

    def loss(w):
        return (h * w**2 / 2).sum(1)

    def log_density(w):
        return -nbeta * loss(w) - localization / 2 * (w - w0).square().sum(1)

    def log_move(start, end):
        drift = nbeta * h * start + localization * (start - w0)
        return torch.distributions.Normal(start - lr / 2 * g * drift, (lr * g).sqrt()).log_prob(end).sum(1)

    expected = log_density(after) + log_move(after, w) - log_density(w) - log_move(w, after)
    ours = kernels.log_mala_acceptance(
        state,
        moved,
        (h * w, h * after),
        (loss(w), loss(after)),
        lr=lr,
        nbeta=nbeta,
        localization=localization,
    )
    assert torch.allclose(ours, expected.clamp(max=0), rtol=1e-9)
    assert (ours < 0).any()
