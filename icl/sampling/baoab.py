"""Markov kernel BAOAB: underdamped Langevin dynamics with one gradient per move.

The target density is exp(-U), as for `icl.sampling.sgld`. With h = sqrt(lr), a friction factor c in [0, 1) and standard normals
xi, one move is

    v <- v - h grad U(w);   w <- w + h v / 2;   v <- c v + sqrt(1 - c^2) xi;   w <- w + h v / 2

Source: Leimkuhler and Matthews 2013, "Rational construction of stochastic numerical methods for molecular sampling". Their scheme
has two consecutive half kicks, which we merge into one kick. Our c is exp(-gamma h) for their friction coefficient gamma. At c = 0
each move uses the mean of two consecutive noise vectors; this is the overdamped method of Leimkuhler and Matthews.

On quadratics the positions have the exact distribution at every stable step, lr a < 4 for the curvature a of U. So there is no
bias from the step size, unlike in SGLD. Momentum amplifies the noise of minibatch gradients: if grad U has noise of variance s,
the stationary variance on U = a w^2 / 2 is (our derivation; tests compare it with chains)

    (1 + lr s (1 + c) / ((1 - c) (4 - lr a))) / a

At c = 0 and small lr a, this is the variance of SGLD. The control variates of `icl.sampling.variates` reduce s.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from icl.sampling.sgld import potential_gradient


class BAOABState(NamedTuple):
    """State of N chains between moves."""

    position: Float[Tensor, "N P"]
    anchor: Float[Tensor, "N P"]
    """The checkpoint w0, to which localization pulls back."""
    velocity: Float[Tensor, "N P"]


def init(start: Float[Tensor, "N P"]) -> BAOABState:
    """Return the state of chains at rest at their anchors."""
    return BAOABState(start, start, torch.zeros_like(start))


def step(
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
        grad: Gradient of L (not of nbeta L) at their positions.
        noise: Standard normals.
        lr: Step size h^2.
        nbeta: Effective inverse temperature n beta.
        localization: Strength gamma of the pull back to the anchor.
        friction: Factor c, the share of the velocity that a move keeps.
    """
    h = lr**0.5
    force = potential_gradient(state.position, state.anchor, grad, nbeta=nbeta, localization=localization)
    kicked = state.velocity.sub(force, alpha=h)
    velocity = (friction * kicked).add_(noise, alpha=(1 - friction**2) ** 0.5)
    # Both half drifts in one: w + h (v before the noise + v after it) / 2.
    return state._replace(position=state.position.add(kicked.add_(velocity), alpha=h / 2), velocity=velocity)


def log_acceptance(
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
    and Crooks 2014). The noise conserves the distribution, so it does no work. `grads` and `losses` are the gradients and the values
    of L at both ends of the move.
    """
    h = lr**0.5
    before, after, anchor = state.position, proposal.position, state.anchor
    force, force_after = (
        potential_gradient(w, anchor, grad, nbeta=nbeta, localization=localization)
        for w, grad in ((before, grads[0]), (after, grads[1]))
    )
    # Kinetic energy that the kicks add: half a kick before the drifts, and half a kick after them.
    first = h * force * (3 * h / 4 * force - state.velocity)
    last = h * force_after * (h / 4 * force_after - proposal.velocity)
    prior = localization * ((after - anchor).square() - (before - anchor).square())
    work = (first + last + prior).cpu().sum(1, dtype=torch.float64) / 2  # N
    return (nbeta * (losses[0] - losses[1]).cpu().double() - work).clamp(max=0.0)
