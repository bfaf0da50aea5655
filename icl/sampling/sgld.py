"""Markov kernels as pure functions: localised SGLD, and SGLD preconditioned by RMSprop.

The target density is exp(-U) with U(w) = nbeta L(w) + localization/2 |w - w0|^2. It is the posterior at inverse temperature
beta on n samples, under a Gaussian prior around the checkpoint w0 (the anchor). One move is

    w' = w - (lr/2) G grad U(w) + sqrt(lr G) N(0, I)

- `sgld` has G = 1 (Welling and Teh 2011; localised by Lau, Furman et al. 2023).
- `rmsprop` has the diagonal matrix G = 1 / (damping + sqrt(V)) (Li, Chen, Carlson and Carin 2016). V is the bias-corrected
  running mean of squared minibatch gradients of L. Our decay is their alpha, our damping their lambda. A move uses the V
  of the moves before it.

We differ from Li et al. and from devinterp 1.3.2: we adapt G only during burn-in and then keep it fixed. So G does not
depend on w, and the term Gamma_i = sum_j dG_ij/dw_j is exactly zero. They keep adapting G and neglect the term.

Tests use the exact answer for U = a w^2 / 2: the chain w' = (1 - lr G a/2) w + sqrt(lr G) xi has the stationary variance
1 / (a (1 - lr G a/4)). `known.quadratic_llc` returns the resulting LLC.

The published parameters (gradient_scale, localization_scale, noise_scale) translate to nbeta = 2 gradient_scale /
noise_scale, localization = 2 localization_scale / noise_scale, lr = noise_scale.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

DECAY = 0.99
"""Decay of the running mean of squared gradients."""
DAMPING = 0.1
"""Number added to the square root of the running mean. It limits the preconditioner of a flat direction to 1 / DAMPING."""


class SGLDState(NamedTuple):
    """State of N chains between moves. A row holds the P moving parameters of a chain."""

    position: Float[Tensor, "N P"]
    anchor: Float[Tensor, "N P"]
    """The checkpoint w0, to which localization pulls back."""
    preconditioner: Float[Tensor, "N P"] | None
    """Diagonal of G; None means 1 (plain SGLD)."""
    mean_square: Float[Tensor, "N P"] | None
    """Running mean of squared gradients before the bias correction; None for plain SGLD."""
    num_squares: int
    """Number of gradients in the running mean."""


def init(start: Float[Tensor, "N P"]) -> SGLDState:
    """Return the state of plain SGLD chains at their anchors."""
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
    """Make one move of every chain. The function is pure, so the noise is an argument.

    Args:
        state: State of the chains.
        grad: Gradient of L (not of nbeta L) at their positions.
        noise: Standard normals.
        lr: Step size epsilon.
        nbeta: Effective inverse temperature n beta.
        localization: Strength gamma of the pull back to the anchor.
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
    """Return the state of preconditioned chains at their anchors, with G = 1 until the first gradient."""
    return SGLDState(start, start, torch.ones_like(start), torch.zeros_like(start), 0)


def adapt_rmsprop(state: SGLDState, grad: Float[Tensor, "N P"]) -> SGLDState:
    """Update G with one more gradient."""
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
    """Return the log-probability that MALA would accept a move (Roberts and Tweedie 1996), in float64 on the CPU.

    It is the minimum of 0 and U(w) - U(w') + log q(w | w') - log q(w' | w), where q is the density of a move with G fixed.
    `grads` and `losses` are the gradients and the values of L at w and at w'. The result is exact if both come from the same minibatch.
    """
    before, after, anchor = state.position, proposal.position, state.anchor
    g = torch.ones_like(before) if state.preconditioner is None else state.preconditioner
    drift, drift_back = (
        potential_gradient(w, anchor, grad, nbeta=nbeta, localization=localization)
        for w, grad in ((before, grads[0]), (after, grads[1]))
    )
    # -log q of the move and of the move back, both times 2 lr. Their normalisation cancels, as G is the same.
    forth = (after - before + lr / 2 * g * drift).square() / g
    back = (before - after + lr / 2 * g * drift_back).square() / g
    prior = localization / 2 * ((before - anchor).square() - (after - anchor).square())
    prior_and_moves = (prior + (forth - back) / (2 * lr)).cpu().sum(1, dtype=torch.float64)  # N
    return (nbeta * (losses[0] - losses[1]).cpu().double() + prior_and_moves).clamp(max=0.0)
