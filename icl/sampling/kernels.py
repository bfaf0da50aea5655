"""Markov kernels as pure functions: localised SGLD, SGLD preconditioned by RMSprop, and BAOAB.

The target density is exp(-U) with U(w) = nbeta L(w) + localization/2 |w - w0|^2. This density is the posterior at inverse temperature beta
on n samples, under a Gaussian prior around the checkpoint w0 (the anchor).

**SGLD.** One move is w' = w - (lr/2) G grad U(w) + sqrt(lr G) N(0, I).

- `sgld` has G = 1 (Welling and Teh 2011; localised by Lau, Furman et al. 2023).
- `rmsprop` has the diagonal matrix G = 1 / (damping + sqrt(V)) (Li, Chen, Carlson and Carin 2016). V is the bias-corrected running mean of
  squared minibatch gradients of L. Our decay is their alpha, and our damping is their lambda.

Li et al. and the library devinterp 1.3.2 keep adapting G, and neglect the correction term Gamma_i = sum_j dG_ij/dw_j of preconditioned
Langevin dynamics. We adapt G only during burn-in and then keep it fixed. After burn-in, G therefore does not depend on w, so this term is
exactly zero. There are two smaller differences. Their V has no bias correction. And their V already includes the gradient of the current
move, while ours contains only the gradients of earlier moves.

Tests use the exact answer for U = a w^2 / 2: the chain w' = (1 - lr G a/2) w + sqrt(lr G) xi has the stationary variance
1 / (a (1 - lr G a/4)). `icl.sampling.known.quadratic_llc` returns the resulting LLC.

The code of Hoogland et al. (2024) has the parameters gradient_scale, localization_scale and noise_scale.
`icl.sampling.published.from_scales` converts them to ours: nbeta = 2 gradient_scale / noise_scale, localization = 2 localization_scale /
noise_scale, and lr = noise_scale.

**BAOAB** is underdamped Langevin dynamics with one gradient per move. With h = sqrt(lr), a friction factor c in [0, 1) and standard
normals xi, one move is

    v <- v - h grad U(w);   w <- w + h v / 2;   v <- c v + sqrt(1 - c^2) xi;   w <- w + h v / 2

The setting `friction` is c, the share of the velocity that a move keeps. Despite its name, a larger value means less friction.

Source: Leimkuhler and Matthews 2013, "Rational construction of stochastic numerical methods for molecular sampling". Their scheme has two
consecutive half kicks, which we merge into one kick. Our c is exp(-gamma h), where gamma is their friction coefficient. At c = 0 each move
uses the mean of two consecutive noise vectors; this is the overdamped method of Leimkuhler and Matthews.

On quadratics the positions have the exact distribution for every stable step size (lr a < 4, where a is the curvature of U). So there is no
bias from the step size, unlike in SGLD. But momentum amplifies the noise of minibatch gradients. If grad U has noise of variance s, the
stationary variance on U = a w^2 / 2 is (our derivation; tests compare it with chains)

    (1 + lr s (1 + c) / ((1 - c) (4 - lr a))) / a

If c = 0 and the product lr * a is small, this nearly equals the stationary variance of SGLD. The control variates of
`icl.sampling.at_checkpoint` reduce s.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from icl.config import ChainsConfig

NUM_TESTS = {"sgld": 16, "rmsprop": 16, "baoab": 4}
"""Largest number of draws at which a chain's acceptance probability is computed, keyed by kernel.

At each of these draws, one additional gradient is needed. `baoab` needs a second one if there is more than one minibatch. For chains that
may stop early, the limit applies to every `icl.sampling.chains.FIRST_CHECK` draws, not to the whole chain.
"""
DECAY = 0.99
"""Decay of the running mean of squared gradients."""
DAMPING = 0.1
"""Number that is added to the square root of the running mean. So the preconditioner is at most 1 / DAMPING in every direction."""


class SGLDState(NamedTuple):
    """State of N chains of `sgld` or `rmsprop` between moves. Each row holds the P sampled parameters of one chain."""

    position: Float[Tensor, "N P"]
    anchor: Float[Tensor, "N P"]
    """The checkpoint w0, to which the localization pulls the chains back."""
    preconditioner: Float[Tensor, "N P"] | None
    """Diagonal of G; None means 1 (plain SGLD)."""
    mean_square: Float[Tensor, "N P"] | None
    """Running mean of squared gradients, without the bias correction; None for plain SGLD."""
    num_squares: int
    """Number of gradients in the running mean."""


class BAOABState(NamedTuple):
    """State of N chains of `baoab` between moves."""

    position: Float[Tensor, "N P"]
    anchor: Float[Tensor, "N P"]
    """The checkpoint w0, to which the localization pulls the chains back."""
    velocity: Float[Tensor, "N P"]


State: TypeAlias = SGLDState | BAOABState


class MarkovKernel(NamedTuple):
    """A Markov kernel with its settings."""

    init: Callable[[Tensor], Any]
    step: Callable[..., Any]
    log_acceptance: Callable[..., Tensor]
    adapt: Callable[[Any, Tensor], Any] = lambda state, grad: state
    """Function that adapts the state to a gradient during burn-in."""


def kernel_of(settings: ChainsConfig) -> MarkovKernel:
    """Return the kernel that the settings of the chains choose."""
    common: dict[str, Any] = {
        "lr": settings.lr,
        "nbeta": settings.inverse_temperature,
        "localization": settings.localization,
    }
    if settings.kernel == "baoab":
        baoab_arguments = common | {"friction": settings.friction}
        return MarkovKernel(
            init_baoab, partial(baoab_step, **baoab_arguments), partial(log_baoab_acceptance, **baoab_arguments)
        )
    move, test = partial(sgld_step, **common), partial(log_mala_acceptance, **common)
    if settings.kernel == "rmsprop":
        return MarkovKernel(init_rmsprop, move, test, adapt_rmsprop)
    return MarkovKernel(init_sgld, move, test)


def init_sgld(start: Float[Tensor, "N P"]) -> SGLDState:
    """Return the initial state of plain SGLD chains, which start at their anchors."""
    return SGLDState(start, start, None, None, 0)


def sgld_step(
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
        grad: Gradient of L (not of nbeta L) at the positions of the chains.
        noise: Standard normals.
        lr: Step size epsilon.
        nbeta: Effective inverse temperature n beta.
        localization: Strength of the pull back to the anchor.
    """
    position, g = state.position, state.preconditioner
    gradient = potential_gradient(position, state.anchor, grad, nbeta=nbeta, localization=localization)
    # The new positions replace this gradient in memory. For large models, allocating memory takes longer than the arithmetic.
    if g is None:
        moved = torch.add(position, gradient, alpha=-lr / 2, out=gradient).add_(noise, alpha=lr**0.5)
    else:
        moved = torch.addcmul(position, g, gradient, value=-lr / 2, out=gradient)
        moved.addcmul_(g.sqrt(), noise, value=lr**0.5)
    return state._replace(position=moved)


def init_rmsprop(start: Float[Tensor, "N P"]) -> SGLDState:
    """Return the initial state of preconditioned chains, which start at their anchors. G is 1 until the first gradient."""
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
    `grads` and `losses` are the gradients and the values of L at w and at w'. If all gradients and
    losses use the same minibatch, the result is exact for the loss on this minibatch.
    """
    before, after, anchor = state.position, proposal.position, state.anchor
    g = torch.ones_like(before) if state.preconditioner is None else state.preconditioner
    gradient, gradient_after = (
        potential_gradient(w, anchor, grad, nbeta=nbeta, localization=localization)
        for w, grad in ((before, grads[0]), (after, grads[1]))
    )
    # -2 lr log q, for the move and for the reverse move. We leave out the normalisation: it cancels, because both have the same G.
    forth = (after - before + lr / 2 * g * gradient).square() / g
    back = (before - after + lr / 2 * g * gradient_after).square() / g
    prior = localization / 2 * ((before - anchor).square() - (after - anchor).square())
    prior_and_moves = (prior + (forth - back) / (2 * lr)).cpu().sum(1, dtype=torch.float64)  # N
    return (nbeta * (losses[0] - losses[1]).cpu().double() + prior_and_moves).clamp(max=0.0)


def init_baoab(start: Float[Tensor, "N P"]) -> BAOABState:
    """Return the initial state of the chains, which start at their anchors with zero velocity."""
    return BAOABState(start, start, torch.zeros_like(start))


def baoab_step(
    state: BAOABState,
    grad: Float[Tensor, "N P"],
    noise: Float[Tensor, "N P"],
    *,
    lr: float,
    nbeta: float,
    localization: float,
    friction: float,
) -> BAOABState:
    """Make one move of every chain. The function is pure, so the noise is an argument.

    Args:
        state: State of the chains.
        grad: Gradient of L (not of nbeta L) at the positions of the chains.
        noise: Standard normals.
        lr: Step size: lr = h^2, where h is the integrator's time step.
        nbeta: Effective inverse temperature n beta.
        localization: Strength of the pull back to the anchor.
        friction: Factor c, the share of the velocity that a move keeps. Despite its name, a larger value means less friction.
    """
    h = lr**0.5
    gradient = potential_gradient(state.position, state.anchor, grad, nbeta=nbeta, localization=localization)
    kicked = state.velocity.sub(gradient, alpha=h)
    velocity = (friction * kicked).add_(noise, alpha=(1 - friction**2) ** 0.5)
    # Make both half drifts at once: w + h (v before the noise + v after the noise) / 2.
    return state._replace(position=state.position.add(kicked.add_(velocity), alpha=h / 2), velocity=velocity)


def log_baoab_acceptance(
    state: BAOABState,
    proposal: BAOABState,
    grads: tuple[Float[Tensor, "N P"], Float[Tensor, "N P"]],
    losses: tuple[Float[Tensor, " N"], Float[Tensor, " N"]],
    *,
    lr: float,
    nbeta: float,
    localization: float,
    friction: float,
) -> Float[Tensor, " N"]:
    """Return the log-probability that a Metropolis test would accept a move, in float64 on the CPU.

    It is the minimum of 0 and -W. The shadow work W is the change of energy due to the kicks and drifts of the move (Sivak, Chodera
    and Crooks 2013, Phys. Rev. X 3, 011007). The noise preserves the distribution of velocities, so it adds no shadow work. `grads` and
    `losses` are the gradients and the values of L at both ends of the move.
    """
    h = lr**0.5
    before, after, anchor = state.position, proposal.position, state.anchor
    gradient, gradient_after = (
        potential_gradient(w, anchor, grad, nbeta=nbeta, localization=localization)
        for w, grad in ((before, grads[0]), (after, grads[1]))
    )
    # Each of these terms is twice a change of energy, and `work` halves their sum. `first` and `last` are changes of kinetic energy, by
    # half a kick before the drifts and half a kick after them. `prior` is the change of the localization's energy.
    first = h * gradient * (3 * h / 4 * gradient - state.velocity)
    last = h * gradient_after * (h / 4 * gradient_after - proposal.velocity)
    prior = localization * ((after - anchor).square() - (before - anchor).square())
    work = (first + last + prior).cpu().sum(1, dtype=torch.float64) / 2  # N
    return (nbeta * (losses[0] - losses[1]).cpu().double() - work).clamp(max=0.0)


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
