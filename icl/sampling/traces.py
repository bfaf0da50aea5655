"""The numbers that chains record at each draw.

To record another number, write a function of a `Draw` and add it to `QUANTITIES`. The value at each draw is then in `Traces.quantities`,
under the function's name. `icl.sampling.verdict.evidence` computes the averages and standard errors.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils import _pytree as pytree

from icl.config import ChainsConfig
from icl.model.stacked import Params
from icl.sampling import convergence
from icl.sampling.convergence import Drop
from icl.sampling.kernels import BAOABState, State

DIVERGED = 10.0
"""A chain has diverged, and is masked, if the absolute value of its mean excess is above this many nats per sampled dimension.

The limit is our choice. In d dimensions it is 20 times d/2, and d/2 is the largest possible LLC at a minimum (Watanabe 2009).
"""


@dataclass(frozen=True)
class Draw:
    """The state of N chains at a draw, with the gradient of L on the draw's minibatch."""

    state: State
    grad: Float[Tensor, "N P"]
    """The gradient that moves the chains: the gradient of L, minus its control variate if there is one (`icl.sampling.at_checkpoint`)."""
    settings: ChainsConfig
    shift: Float[Tensor, " N"] | float = 0.0
    """Control variate of the loss, if `grad` has a control variate but the excess has none; otherwise 0."""
    noise: Float[Tensor, " N"] | float = 0.0
    """Variance of `grad` over minibatches, summed over the parameters (with the weights G of `rmsprop`); 0 if it was not measured."""
    cycles: bool = False
    """Whether the chains go through the same minibatches again and again, without control variates."""

    @cached_property
    def displacement(self) -> Float[Tensor, "N P"]:
        """Displacement w - w0 from the checkpoint."""
        return self.state.position - self.state.anchor

    @cached_property
    def force(self) -> Float[Tensor, "N P"]:
        """Tempered gradient nbeta grad L."""
        return self.settings.inverse_temperature * self.grad


def pull(draw: Draw) -> Float[Tensor, " N"]:
    """Virial of the data, nbeta (w - w0) . grad L, in nats. It has nearly the same minibatch noise as the excess."""
    return torch.linalg.vecdot(draw.displacement, draw.force) + draw.settings.inverse_temperature * draw.shift


def spread(draw: Draw) -> Float[Tensor, " N"]:
    """Virial of the localization, localization |w - w0|^2, in nats."""
    displacement = draw.displacement
    return draw.settings.localization * torch.linalg.vecdot(displacement, displacement)


def bias_bound(draw: Draw) -> Float[Tensor, " N"]:
    """Upper bound on the bias from step size and minibatch noise, in nats.

    The bound is half of the amount that step size and minibatch noise add to `pull` + `spread`, without the part that comes from the
    localization alone. `icl.sampling.verdict.chains` derives the bound.
    """
    settings, force = draw.settings, draw.force
    noise = settings.inverse_temperature**2 * torch.as_tensor(draw.noise, device=force.device).expand(len(force))
    if isinstance(draw.state, BAOABState):
        c = settings.friction
        return settings.lr / 8 * (1 + c) / (1 - c) * (2 if draw.cycles else 1) * noise
    g = draw.state.preconditioner
    scaled = force if g is None else g * force
    cross = 2 * settings.localization * torch.linalg.vecdot(scaled, draw.displacement)
    squares = torch.linalg.vecdot(scaled, force) + cross  # includes the noise once
    return settings.lr / 8 * (squares + noise if draw.cycles else squares)


def measured_bias(draw: Draw) -> Float[Tensor, " N"]:
    """Measured bias of `baoab` from step size and minibatch noise, in nats; 0 for other kernels.

    The measured bias is half of the amount that step size and minibatch noise add to `pull` + `spread`. Unlike `bias_bound`, it includes
    the bias of large steps on losses that are not quadratic. `icl.sampling.verdict.chains` derives the formula.
    """
    settings = draw.settings
    if not isinstance(draw.state, BAOABState):
        return torch.zeros_like(draw.grad[:, 0])
    c, kick = settings.friction, draw.force.add(draw.displacement, alpha=settings.localization).mul_(settings.lr**0.5)
    return (1 + c) / (8 * (1 - c)) * torch.linalg.vecdot(kick, kick - 2 * draw.state.velocity)


QUANTITIES: dict[str, Callable[[Draw], Tensor]] = {f.__name__: f for f in (pull, spread, bias_bound, measured_bias)}
"""Numbers that are recorded at every draw, in addition to the losses."""


class Traces(NamedTuple):
    """All records of N chains, with S draws and T components of the loss."""

    losses: Float[Tensor, "N S"]
    """Minibatch losses at the draws."""
    burnin: Float[Tensor, "N burnin"]
    """Minibatch losses at the moves before the first draw."""
    excess: Float[Tensor, "N S *T"]
    """Losses minus the checkpoint's losses on the same minibatch. If the loss is a vector, there is a number for each component."""
    quantities: dict[str, Float[Tensor, "N S"]]
    """Values of the functions in `QUANTITIES` at the draws."""
    observables: dict[str, Float[Tensor, "N S ..."]]
    """Values of the caller's own functions of the parameters."""
    acceptance: Float[Tensor, " N"]
    """Mean probability that a Metropolis test would accept a move."""
    sample_variance: Float[Tensor, "N Q"] | None
    """Variance over the draws of each fixed sample's loss."""
    sample_mean: Float[Tensor, "N Q"] | None
    """Mean over the draws of each fixed sample's loss."""
    mean_position: Float[Tensor, "N P"] | None
    """Mean of the positions over the draws. It is set to None once the loss at this mean has been measured."""
    alive: Bool[Tensor, " N"]
    """Whether each chain stayed finite and did not diverge upwards or downwards."""
    diverged_down: Bool[Tensor, " N"]
    """Whether each chain diverged to a loss far below the checkpoint's loss."""
    first_not_finite: Float[Tensor, " N"]
    """The first move at which each chain's loss was not finite, or infinity if the loss was always finite."""
    bad_data: Bool[Tensor, " N"]
    """Whether each chain met a minibatch on which even the checkpoint's own loss or gradient is not finite."""
    drop_at_mean: Drop = Drop()
    share_batches: bool = False
    """Whether there are several minibatches, but two chains saw the same ones."""
    one_batch: bool = False
    """Whether there was only one batch for all moves, so that the loss has no noise."""
    few_batches: bool = False
    """Whether the chains go repeatedly through a short list of batches, so that the noise of consecutive draws is correlated."""

    @property
    def mean_excess(self) -> Float[Tensor, "N S"]:
        """Excess of the loss, averaged over its components."""
        return self.excess.mean(2) if self.excess.ndim > 2 else self.excess


class Recorder:
    """Collects the draws of N chains with equal settings."""

    def __init__(
        self,
        settings: ChainsConfig,
        num_params: int,
        sample_losses: Callable[[Params], Tensor] | None,
        observables: Mapping[str, Callable[[Params], Tensor]],
    ) -> None:
        self.settings, self.num_params = settings, num_params
        self.sample_losses, self.observables = sample_losses, observables
        self.losses: list[Tensor] = []
        self.excess: list[Tensor] = []
        self.acceptance: list[Tensor] = []
        self.quantities: dict[str, list[Tensor]] = {name: [] for name in QUANTITIES}
        self.observed: dict[str, list[Tensor]] = {name: [] for name in observables}
        self.variance = _RunningVariance()
        self.mean: Tensor | None = None

    def add_losses(self, values: Float[Tensor, "N *T"]) -> None:
        """Record the losses of one move."""
        self.losses.append(mean_over_components(values))

    def add_draw(self, draw: Draw, excess: Float[Tensor, "N *T"], params: Callable[[], Params]) -> None:
        """Record a draw. `params` is a function that returns the parameters at the draw."""
        self.excess.append(excess)
        for name, quantity in QUANTITIES.items():
            self.quantities[name].append(quantity(draw))
        position = draw.state.position
        self.mean = position.clone() if self.mean is None else self.mean.lerp_(position, 1 / len(self.excess))
        if self.sample_losses is not None:
            self.variance.add(self.sample_losses(params()))
        for name, observable in self.observables.items():
            self.observed[name].append(observable(params()).cpu())

    @property
    def num_draws(self) -> int:
        """Number of draws so far."""
        return len(self.excess)

    def nats(self) -> Float[Tensor, "N S"]:
        """Return the excess of all draws so far, in nats."""
        return self.settings.inverse_temperature * torch.stack([mean_over_components(e) for e in self.excess], dim=1)

    def is_precise(self, stderr: float) -> bool:
        """Return whether the mean excess, in nats, has a standard error of at most `stderr` and a sufficient effective sample size."""
        nats = self.nats()
        used = _to_float64(nats[nats.isfinite().all(1)]).numpy()
        if not len(used):
            return False
        is_long = convergence.ess(used) >= convergence.needed_ess(len(used))
        return is_long and convergence.standard_error_at_stop(used) <= stderr

    def traces(self) -> Traces:
        """Return everything that was recorded. All of it is on the CPU in float64, except the mean position."""
        losses, excess = torch.stack(self.losses, dim=1), torch.stack(self.excess, dim=1)
        quantities = {name: torch.stack(draws, dim=1) for name, draws in self.quantities.items()}
        nats, limit = self.settings.inverse_temperature * excess.flatten(1).mean(1), DIVERGED * self.num_params
        finite = losses.isfinite().all(1) & excess.flatten(1).isfinite().all(1)
        for draws in quantities.values():
            finite &= draws.isfinite().all(1)
        start = self.settings.num_burnin_steps
        return Traces(
            losses=_to_float64(losses[:, start :: self.settings.thinning]),
            burnin=_to_float64(losses[:, :start]),
            excess=_to_float64(excess),
            quantities={name: _to_float64(draws) for name, draws in quantities.items()},
            observables={name: _to_float64(torch.stack(draws, dim=1)) for name, draws in self.observed.items()},
            acceptance=torch.stack(self.acceptance, dim=1).mean(1).cpu(),
            sample_variance=None if self.sample_losses is None else self.variance.value(),
            sample_mean=None if self.sample_losses is None else self.variance.mean,
            mean_position=self.mean,
            alive=(finite & (nats.abs() <= limit)).cpu(),
            diverged_down=(nats < -limit).cpu(),
            first_not_finite=_first_move(~losses.isfinite()),
            bad_data=torch.zeros(len(losses), dtype=torch.bool),
        )


class _RunningVariance:
    """Variance over draws, updated draw by draw (Welford 1962), in float64 on the CPU."""

    def __init__(self) -> None:
        self.num = 0

    def add(self, values: Tensor) -> None:
        values = values.cpu().double()
        if not self.num:
            self.mean, self.squares = torch.zeros_like(values), torch.zeros_like(values)
        self.num += 1
        deviation = values - self.mean
        self.mean += deviation / self.num
        self.squares += deviation * (values - self.mean)

    def value(self) -> Tensor:
        return self.squares / (self.num - 1)


def split_by_checkpoint(parts: Sequence[Traces], num_chains: int) -> list[Traces]:
    """Join the traces of all members, and split them by checkpoint. The parts must be in the order of the members."""
    joined = pytree.tree_map(lambda *values: torch.cat(values) if isinstance(values[0], Tensor) else values[0], *parts)
    starts = range(0, len(joined.alive), num_chains)
    return [_members(joined, slice(start, start + num_chains)) for start in starts]


def _members(traces: Traces, members: slice) -> Traces:
    return pytree.tree_map(lambda value: value[members] if isinstance(value, Tensor) else value, traces)


def mean_over_components(values: Float[Tensor, "N *T"]) -> Float[Tensor, " N"]:
    """Return the loss of each member: the mean of its components if it has several."""
    return values.mean(1) if values.ndim > 1 else values


def _first_move(is_bad: Bool[Tensor, "N moves"]) -> Float[Tensor, " N"]:
    moves = is_bad.int().argmax(1).double()
    return moves.where(is_bad.any(1), torch.inf).cpu()


def _to_float64(values: Tensor) -> Tensor:
    return values.cpu().double()
