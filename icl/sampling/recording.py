"""What chains record at each draw.

To trace another number, write a function of a `Draw` and add it to `QUANTITIES`. Its draws are then in `Traces.quantities` under the
function's name; `icl.sampling.verdict.evidence` makes an average and an error of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from icl.sampling.drop_at_mean import Drop
from icl.sampling.settings import SamplerSettings
from icl.sampling.sgld import SGLDState
from icl.stacked import Params

DIVERGED = 10.0
"""A chain has diverged, and is masked, if its mean excess is above this times d nats. (Our choice: 20 times the LLC of a
nondegenerate minimum, which is the largest LLC at a minimum; Watanabe 2009.)"""


@dataclass(frozen=True)
class Draw:
    """The state of N chains at a draw, with the gradient of L on the draw's minibatch."""

    state: SGLDState
    grad: Float[Tensor, "N P"]
    settings: SamplerSettings

    @cached_property
    def displacement(self) -> Float[Tensor, "N P"]:
        """The vector w - w0 from the checkpoint."""
        return self.state.position - self.state.anchor

    @cached_property
    def force(self) -> Float[Tensor, "N P"]:
        """The gradient nbeta grad L."""
        return self.settings.nbeta * self.grad


def pull(draw: Draw) -> Float[Tensor, " N"]:
    """The virial of the data, nbeta (w - w0) . grad L, in nats."""
    return torch.linalg.vecdot(draw.displacement, draw.force)


def spread(draw: Draw) -> Float[Tensor, " N"]:
    """The virial of the localization, localization |w - w0|^2, in nats."""
    displacement = draw.displacement
    return draw.settings.localization * torch.linalg.vecdot(displacement, displacement)


def bias_bound(draw: Draw) -> Float[Tensor, " N"]:
    """Half of what the step size and the minibatch noise add to pull + spread, in nats (`icl.sampling.verdict`)."""
    g, force = draw.state.preconditioner, draw.force
    scaled = force if g is None else g * force
    cross = 2 * draw.settings.localization * torch.linalg.vecdot(scaled, draw.displacement)
    return draw.settings.lr / 8 * (torch.linalg.vecdot(scaled, force) + cross)


QUANTITIES: dict[str, Callable[[Draw], Tensor]] = {each.__name__: each for each in (pull, spread, bias_bound)}
"""The numbers that are recorded at every draw, beside the losses."""


class Traces(NamedTuple):
    """Everything that N chains leave behind; S draws, T components of the loss."""

    losses: Float[Tensor, "N S"]
    """Minibatch losses at the draws."""
    burnin: Float[Tensor, "N burnin"]
    """Minibatch losses at the moves before the first draw."""
    excess: Float[Tensor, "N S *T"]
    """Losses minus the checkpoint's on the same minibatch; for each component if the loss is a vector."""
    quantities: dict[str, Float[Tensor, "N S"]]
    """What `QUANTITIES` recorded."""
    acceptance: Float[Tensor, " N"]
    """Mean probability that MALA would accept a move."""
    sample_variance: Float[Tensor, "N Q"] | None
    """Variance over the draws of each fixed sample's loss."""
    mean_position: Float[Tensor, "N P"] | None
    """Mean over the draws; dropped once the loss there is known."""
    alive: Bool[Tensor, " N"]
    """Whether each chain stayed finite and did not diverge, up or down."""
    diverged_down: Bool[Tensor, " N"]
    """Whether it found far lower loss than the checkpoint's."""
    drop_at_mean: Drop = Drop()
    share_batches: bool = False
    """Whether two chains saw the same minibatches although there were different ones."""
    one_batch: bool = False
    """Whether there was one batch for all moves, so that the loss has no noise."""

    @property
    def mean_excess(self) -> Float[Tensor, "N S"]:
        """The excess of the loss, the mean over its components."""
        return self.excess.mean(2) if self.excess.ndim > 2 else self.excess


class Recorder:
    """Collects the draws of N chains with equal settings."""

    def __init__(
        self, settings: SamplerSettings, num_params: int, sample_losses: Callable[[Params], Tensor] | None
    ) -> None:
        self.settings, self.num_params, self.sample_losses = settings, num_params, sample_losses
        self.losses: list[Tensor] = []
        self.excess: list[Tensor] = []
        self.acceptance: list[Tensor] = []
        self.quantities: dict[str, list[Tensor]] = {name: [] for name in QUANTITIES}
        self.variance = _RunningVariance()
        self.mean: Tensor | None = None

    def add_losses(self, values: Float[Tensor, "N *T"]) -> None:
        """Record the losses of one move."""
        self.losses.append(mean_over_components(values))

    def add_draw(self, draw: Draw, excess: Float[Tensor, "N *T"], params: Callable[[], Params]) -> None:
        """Record a draw; `params` gives the parameters there."""
        self.excess.append(excess)
        for name, quantity in QUANTITIES.items():
            self.quantities[name].append(quantity(draw))
        position = draw.state.position
        self.mean = position.clone() if self.mean is None else self.mean.lerp_(position, 1 / len(self.excess))
        if self.sample_losses is not None:
            self.variance.add(self.sample_losses(params()))

    def traces(self) -> Traces:
        """Everything recorded, on the CPU in float64, except for the mean position."""
        losses, excess = torch.stack(self.losses, dim=1), torch.stack(self.excess, dim=1)
        quantities = {name: torch.stack(draws, dim=1) for name, draws in self.quantities.items()}
        nats, most = self.settings.nbeta * excess.flatten(1).mean(1), DIVERGED * self.num_params
        finite = losses.isfinite().all(1) & excess.flatten(1).isfinite().all(1)
        finite &= quantities["spread"].isfinite().all(1)
        start = self.settings.num_burnin_steps
        return Traces(
            losses=_kept(losses[:, start :: self.settings.thinning]),
            burnin=_kept(losses[:, :start]),
            excess=_kept(excess),
            quantities={name: _kept(draws) for name, draws in quantities.items()},
            acceptance=torch.stack(self.acceptance, dim=1).mean(1).cpu(),
            sample_variance=None if self.sample_losses is None else self.variance.value(),
            mean_position=self.mean,
            alive=(finite & (nats.abs() <= most)).cpu(),
            diverged_down=(nats < -most).cpu(),
        )


class _RunningVariance:
    """Mean and variance over draws as they come (Welford 1962), in float64 on the CPU."""

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
    """The traces of each checkpoint's chains, from those of all members in order."""
    joined: list[Any] = []
    for values in zip(*parts, strict=True):
        first = values[0]
        if isinstance(first, dict):
            joined.append({name: torch.cat([each[name] for each in values]) for name in first})
        else:
            joined.append(torch.cat(values) if isinstance(first, Tensor) else first)
    whole = Traces(*joined)
    starts = range(0, len(whole.alive), num_chains)
    return [_rows(whole, slice(start, start + num_chains)) for start in starts]


def _rows(traces: Traces, chosen: slice) -> Traces:
    def pick(value: object) -> object:
        if isinstance(value, dict):
            return {name: draws[chosen] for name, draws in value.items()}
        return value[chosen] if isinstance(value, Tensor) else value

    return Traces(*map(pick, traces))  # type: ignore[arg-type]


def mean_over_components(values: Float[Tensor, "N *T"]) -> Float[Tensor, " N"]:
    """The loss of each member: the mean of its components if it has several."""
    return values.mean(1) if values.ndim > 1 else values


def _kept(values: Tensor) -> Tensor:
    return values.cpu().double()
