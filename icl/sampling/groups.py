"""Some members of a population that are told the same: how they move, and what they leave behind at each draw."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from icl.sampling.diagnostics import DIVERGED
from icl.sampling.settings import SamplerSettings
from icl.sampling.sgld import KERNELS, SGLDState, log_mala_acceptance, step
from icl.stacked import Params


class Chunk(NamedTuple):
    """What some members left behind, on the device; one row each."""

    losses: Tensor
    excess: Tensor
    pull: Tensor
    spread: Tensor
    heat: Tensor
    acceptance: Tensor
    sample_variance: Tensor | None
    mean: Tensor
    """Of the draws' positions, packed."""
    alive: Tensor
    """Whether the member stayed finite and did not diverge, up or down."""
    fallen: Tensor
    """Whether it diverged downwards."""


class Group:
    """Neighbouring members with the same settings: where they are, and what they leave behind."""

    def __init__(
        self,
        settings: SamplerSettings,
        start: Float[Tensor, "N P"],
        seeds: Sequence[int],
        params: Callable[[Tensor], Params],
        num_params: int,
        sample_losses: Callable[[Params], Tensor] | None,
    ) -> None:
        self.settings, self.kernel, self.params = settings, KERNELS[settings.kernel], params
        self.num_params = num_params
        self.state, self.size = self.kernel.init(start), len(start)
        self.noise = self._noise(seeds)
        self.losses = start.new_empty(len(start), settings.num_moves)
        self.acceptance: list[Tensor] = []
        self.recorder = _Recorder(settings, num_params, sample_losses)

    def propose(self, grad: Tensor, values: Tensor, move: int, at_anchor: Tensor | None) -> SGLDState:
        """Note the losses, record a draw if the anchor's losses on its minibatch are there, and say where to go."""
        self.losses[:, move] = _mean(values)
        if at_anchor is not None:
            self.recorder.add(self.state, grad, values - at_anchor, partial(self.params, self.state.position))
        return step(self.state, grad, next(self.noise), **self._temper())

    def note_acceptance(self, proposal: SGLDState, here: tuple[Tensor, Tensor], there: tuple[Tensor, Tensor]) -> None:
        """Whether MALA would accept the proposal, from gradients and losses at both ends."""
        grads, losses = (here[0], there[0]), (_mean(here[1]), _mean(there[1]))
        self.acceptance.append(log_mala_acceptance(self.state, proposal, grads, losses, **self._temper()).exp())

    def move(self, proposal: SGLDState, grad: Tensor, *, adapting: bool) -> None:
        """Go there."""
        self.state = self.kernel.adapt(proposal, grad) if adapting else proposal

    def chunk(self) -> Chunk:
        """What is left behind."""
        return self.recorder.chunk(self.losses, torch.stack(self.acceptance, dim=1).mean(1))

    def _temper(self) -> dict[str, float]:
        s = self.settings
        return {"lr": s.lr, "nbeta": s.nbeta, "localization": s.localization}

    def _noise(self, seeds: Sequence[int]) -> Iterator[Tensor]:
        """Standard normals: one buffer that is filled anew for each move, each row from its member's own generator."""
        buffer = torch.zeros_like(self.state.position)
        rows = buffer[:, : self.num_params].unbind()  # the padding stays at zero, so a chain never moves there
        generators = [torch.Generator(buffer.device).manual_seed(seed) for seed in seeds]
        while True:
            for row, generator in zip(rows, generators, strict=True):
                row.normal_(generator=generator)
            yield buffer


class _Recorder:
    """What some members leave behind at each draw."""

    def __init__(
        self, settings: SamplerSettings, num_params: int, sample_losses: Callable[[Params], Tensor] | None
    ) -> None:
        self.settings, self.num_params, self.sample_losses = settings, num_params, sample_losses
        self.excess: list[Tensor] = []
        self.pull: list[Tensor] = []
        self.spread: list[Tensor] = []
        self.heat: list[Tensor] = []
        self.variance = _RunningVariance()
        self.mean: Tensor | None = None

    def add(self, state: SGLDState, grad: Tensor, excess: Tensor, params: Callable[[], Params]) -> None:
        nbeta, localization = self.settings.nbeta, self.settings.localization
        position, g = state.position, state.preconditioner
        away, slope = position - state.anchor, nbeta * grad
        data = slope if g is None else g * slope
        squared = torch.linalg.vecdot(data, slope) + 2 * localization * torch.linalg.vecdot(data, away)
        self.excess.append(excess)
        self.pull.append(torch.linalg.vecdot(away, slope))
        self.spread.append(localization * torch.linalg.vecdot(away, away))
        self.heat.append(self.settings.lr / 8 * squared)
        self.mean = position.clone() if self.mean is None else self.mean.lerp_(position, 1 / len(self.heat))
        if self.sample_losses is not None:
            self.variance.add(self.sample_losses(params()))

    def chunk(self, losses: Tensor, acceptance: Tensor) -> Chunk:
        assert self.mean is not None
        excess, spread = torch.stack(self.excess, dim=1), torch.stack(self.spread, dim=1)
        nats, most = self.settings.nbeta * excess.flatten(1).mean(1), DIVERGED * self.num_params
        finite = losses.isfinite().all(1) & excess.flatten(1).isfinite().all(1) & spread.isfinite().all(1)
        return Chunk(
            losses=losses,
            excess=excess,
            pull=torch.stack(self.pull, dim=1),
            spread=spread,
            heat=torch.stack(self.heat, dim=1),
            acceptance=acceptance,
            sample_variance=None if self.sample_losses is None else self.variance.value(),
            mean=self.mean,
            alive=finite & (nats.abs() <= most),
            fallen=nats < -most,
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


def _mean(values: Tensor) -> Tensor:
    """The loss of each member: the mean of its components, if it has several."""
    return values.mean(1) if values.ndim > 1 else values
