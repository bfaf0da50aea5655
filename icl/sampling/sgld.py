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

from icl.population import Params

DECAY = 0.99
"""Of the running mean of squared gradients."""
DAMPING = 0.1
"""Added to the root of that mean: the largest speed-up of a flat direction is 1 / DAMPING."""


class SGLDState(NamedTuple):
    """What a step carries on, stacked on a leading axis N of chains."""

    params: Params
    anchor: Params
    """The checkpoint w0 that localisation pulls back to."""
    preconditioner: Params
    """The diagonal G; for plain SGLD empty, which stands for 1."""
    mean_square: Params
    """The running mean of squared gradients, not corrected for bias; empty for plain SGLD."""
    num_squares: int
    """How many gradients it has seen."""


class Kernel(NamedTuple):
    """A way to move: how its state begins, and how it learns from a gradient before it is frozen."""

    name: str
    init: Callable[[Params], SGLDState]
    adapt: Callable[[SGLDState, Params], SGLDState]


def init(params: Params) -> SGLDState:
    """A chain of plain SGLD that starts at its anchor."""
    return SGLDState(dict(params), dict(params), {}, {}, 0)


def step(state: SGLDState, grad: Params, noise: Params, *, lr: float, nbeta: float, localization: float) -> SGLDState:
    """One move on stacked parameters; pure, so the noise is an argument.

    Args:
        state: Where the chains are.
        grad: The gradient of L (not of nbeta L) there.
        noise: Standard normals.
        lr: The step size epsilon.
        nbeta: The effective inverse temperature n beta.
        localization: The pull gamma back to the anchor.
    """
    moved = {}
    for name, params in state.params.items():
        drift = potential_gradient(params, state.anchor[name], grad[name], nbeta=nbeta, localization=localization)
        g = state.preconditioner.get(name)
        if g is None:
            moved[name] = params.add(drift, alpha=-lr / 2).add_(noise[name], alpha=lr**0.5)
        else:
            moved[name] = params.addcmul(g, drift, value=-lr / 2).addcmul_(g.sqrt(), noise[name], value=lr**0.5)
    return state._replace(params=moved)


def potential_gradient(
    params: Float[Tensor, "*shape"],
    anchor: Float[Tensor, "*shape"],
    grad: Float[Tensor, "*shape"],
    *,
    nbeta: float,
    localization: float,
) -> Float[Tensor, "*shape"]:
    """Grad U = nbeta grad L + localization (w - w0)."""
    return torch.sub(params, anchor).mul_(localization).add_(grad, alpha=nbeta)


def init_rmsprop(params: Params) -> SGLDState:
    """A preconditioned chain at its anchor, with G = 1 until it has seen a gradient."""
    ones = {name: torch.ones_like(tensor) for name, tensor in params.items()}
    zeros = {name: torch.zeros_like(tensor) for name, tensor in params.items()}
    return SGLDState(dict(params), dict(params), ones, zeros, 0)


def adapt_rmsprop(state: SGLDState, grad: Params) -> SGLDState:
    """The state with G renewed from one more gradient."""
    num = state.num_squares + 1
    squares = {name: s * DECAY + grad[name].square() * (1 - DECAY) for name, s in state.mean_square.items()}
    correction = 1 - DECAY**num
    g = {name: 1 / (DAMPING + (s / correction).sqrt()) for name, s in squares.items()}
    return state._replace(preconditioner=g, mean_square=squares, num_squares=num)


def log_mala_acceptance(
    state: SGLDState,
    proposal: SGLDState,
    grads: tuple[Params, Params],
    losses: tuple[Float[Tensor, " N"], Float[Tensor, " N"]],
    *,
    lr: float,
    nbeta: float,
    localization: float,
) -> Float[Tensor, " N"]:
    """The log of the probability with which MALA would accept a move (Roberts and Tweedie 1996), in float64 on the CPU.

    log alpha = U(w) - U(w') + log q(w | w') - log q(w' | w), q the move's own density with G held fixed. `grads` and
    `losses` are those of L at w and at w': for an exact answer both of the same minibatch.
    """
    log_ratio = nbeta * (losses[0] - losses[1]).cpu().double()
    for name, before in state.params.items():
        after, anchor = proposal.params[name], state.anchor[name]
        g = state.preconditioner.get(name, torch.ones_like(before))
        drift, back = (
            potential_gradient(w, anchor, grad[name], nbeta=nbeta, localization=localization)
            for w, grad in ((before, grads[0]), (after, grads[1]))
        )
        forth = (after - before + lr / 2 * g * drift).square() / g
        reverse = (before - after + lr / 2 * g * back).square() / g
        prior = localization / 2 * ((before - anchor).square() - (after - anchor).square())
        log_ratio = log_ratio + (prior + (forth - reverse) / (2 * lr)).flatten(1).cpu().double().sum(1)
    return log_ratio.clamp(max=0.0)


SGLD = Kernel("sgld", init, lambda state, _: state)
RMSPROP = Kernel("rmsprop", init_rmsprop, adapt_rmsprop)
KERNELS = {kernel.name: kernel for kernel in (SGLD, RMSPROP)}
