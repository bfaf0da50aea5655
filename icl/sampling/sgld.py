"""The Markov kernels: SGLD, tempered and localised, and its RMSprop-preconditioned form, as pure functions.

The target is exp(-U) with U(w) = nbeta L(w) + localization/2 |w - w0|^2, the posterior at inverse temperature beta on n
samples under a Gaussian prior around the checkpoint w0 (the anchor). One move is

    w' = w - (lr/2) G grad U(w) + sqrt(lr G) N(0, I)

with G = 1 for `SGLD` (Welling and Teh 2011; localised: Lau, Furman et al. 2023). For `RMSPROP`, G is diagonal,
G = 1 / (damping + sqrt(V)), V the bias-corrected running mean of squared minibatch gradients of L at decay 0.99 (Li, Chen,
Carlson and Carin 2016, their alpha and lambda). G is adapted during burn-in only and then frozen, so it no longer depends
on w: their Gamma term, sum_j dG_ij/dw_j, is exactly zero, not dropped. (They, and devinterp 1.3.2, go on adapting.) A move
uses the V of the moves before it, never its own gradient's.

On U = a w^2 / 2 the chain w' = (1 - lr G a/2) w + sqrt(lr G) xi has the stationary variance 1 / (a (1 - lr G a/4)):
that is the exact answer the tests hold both kernels to; `known.quadratic_llc` has the LLC that follows.

The published parametrisation (gradient_scale, localization_scale, noise_scale) is nbeta = 2 gradient/noise,
localization = 2 localization/noise, lr = noise.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

DECAY = 0.99
"""Decay of the running mean of squared gradients."""
DAMPING = 0.1
"""Added to the root of that mean; it limits the speed-up of a flat direction to 1 / DAMPING."""


class SGLDState(NamedTuple):
    """State of N chains between moves; every row holds the P moving parameters of a chain."""

    position: Float[Tensor, "N P"]
    anchor: Float[Tensor, "N P"]
    """The checkpoint w0 that localization pulls back to."""
    preconditioner: Float[Tensor, "N P"] | None
    """The diagonal of G; None stands for 1 (plain SGLD)."""
    mean_square: Float[Tensor, "N P"] | None
    """Running mean of squared gradients, not corrected for bias; None for plain SGLD."""
    num_squares: int
    """Number of gradients in the running mean."""


class Kernel(NamedTuple):
    """A way to move: how its state begins, and how it adapts to a gradient during burn-in."""

    name: str
    init: Callable[[Tensor], SGLDState]
    adapt: Callable[[SGLDState, Tensor], SGLDState]


def init(start: Float[Tensor, "N P"]) -> SGLDState:
    """Start plain SGLD at its anchor."""
    return SGLDState(start, start, None, None, 0)


def step(
    state: SGLDState,
    grad: Float[Tensor, "N P"],
    noise: Float[Tensor, "N P"],
    *,
    lr: float,
    nbeta: float,
    localization: float,
) -> SGLDState:
    """Make one move of every chain; pure, so the noise is an argument.

    Args:
        state: Where the chains are.
        grad: The gradient of L (not of nbeta L) there.
        noise: Standard normals.
        lr: The step size epsilon.
        nbeta: The effective inverse temperature n beta.
        localization: The pull gamma back to the anchor.
    """
    position, g = state.position, state.preconditioner
    drift = potential_gradient(position, state.anchor, grad, nbeta=nbeta, localization=localization)
    if g is None:
        moved = position.add(drift, alpha=-lr / 2).add_(noise, alpha=lr**0.5)
    else:
        moved = position.addcmul(g, drift, value=-lr / 2).addcmul_(g.sqrt(), noise, value=lr**0.5)
    return state._replace(position=moved)


def potential_gradient(
    position: Float[Tensor, "N P"],
    anchor: Float[Tensor, "N P"],
    grad: Float[Tensor, "N P"],
    *,
    nbeta: float,
    localization: float,
) -> Float[Tensor, "N P"]:
    """Return grad U = nbeta grad L + localization (w - w0)."""
    return torch.sub(position, anchor).mul_(localization).add_(grad, alpha=nbeta)


def init_rmsprop(start: Float[Tensor, "N P"]) -> SGLDState:
    """Start a preconditioned chain at its anchor, with G = 1 until it has seen a gradient."""
    return SGLDState(start, start, torch.ones_like(start), torch.zeros_like(start), 0)


def adapt_rmsprop(state: SGLDState, grad: Float[Tensor, "N P"]) -> SGLDState:
    """Renew G with one more gradient."""
    assert state.mean_square is not None
    num = state.num_squares + 1
    mean_square = state.mean_square * DECAY + grad.square() * (1 - DECAY)
    g = 1 / (DAMPING + (mean_square / (1 - DECAY**num)).sqrt())
    return state._replace(preconditioner=g, mean_square=mean_square, num_squares=num)


def log_mala_acceptance(
    state: SGLDState,
    proposal: SGLDState,
    grads: tuple[Float[Tensor, "N P"], Float[Tensor, "N P"]],
    losses: tuple[Float[Tensor, " N"], Float[Tensor, " N"]],
    *,
    lr: float,
    nbeta: float,
    localization: float,
) -> Float[Tensor, " N"]:
    """Log of the probability that MALA would accept a move (Roberts and Tweedie 1996), in float64 on the CPU.

    log alpha = U(w) - U(w') + log q(w | w') - log q(w' | w), where q is the density of the move with G held fixed. `grads` and
    `losses` are those of L at w and at w'; the answer is exact if both are of the same minibatch.
    """
    before, after, anchor = state.position, proposal.position, state.anchor
    g = torch.ones_like(before) if state.preconditioner is None else state.preconditioner
    drift, back = (
        potential_gradient(w, anchor, grad, nbeta=nbeta, localization=localization)
        for w, grad in ((before, grads[0]), (after, grads[1]))
    )
    forth = (after - before + lr / 2 * g * drift).square() / g
    reverse = (before - after + lr / 2 * g * back).square() / g
    prior = localization / 2 * ((before - anchor).square() - (after - anchor).square())
    of_moves = (prior + (forth - reverse) / (2 * lr)).cpu().double().sum(1)
    return (nbeta * (losses[0] - losses[1]).cpu().double() + of_moves).clamp(max=0.0)


SGLD = Kernel("sgld", init, lambda state, _: state)
RMSPROP = Kernel("rmsprop", init_rmsprop, adapt_rmsprop)
KERNELS = {kernel.name: kernel for kernel in (SGLD, RMSPROP)}
