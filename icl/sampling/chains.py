"""Runs chains x checkpoints as one population, and records what every later number is made of.

Members are numbered checkpoint by checkpoint and processed in chunks that fit the memory. Each member has a generator
of its own, seeded from (seed, checkpoint key, chain) and drawn outside `vmap`, so its noise is the same whatever runs
beside it. Draw j is the state after `num_burnin_steps + j * thinning` moves; its loss is that of the minibatch that also
gives the next move its gradient, evaluated before the move. (So without burn-in draw 0 is the checkpoint.)

Recorded at each draw, beside the loss: the pull nbeta (w - w0) . grad L and the spread localization |w - w0|^2. At up to
`NUM_MALA` draws the probability that MALA would accept the move, with L the loss of that draw's minibatch at both ends.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from icl import rng
from icl.population import Params, size
from icl.sampling.batches import Batch, Batches, batch_function, fingerprint, stack_batches
from icl.sampling.gradients import Gradient
from icl.sampling.packing import Packing
from icl.sampling.settings import SamplerSettings
from icl.sampling.sgld import KERNELS, SGLDState, log_mala_acceptance, step

NUM_MALA = 16
"""Moves of each chain whose MALA acceptance is found; each costs one more gradient."""
NUM_COMPARED = 4
"""First moves at which the chains' minibatches are compared with each other."""
_PACKED = ""  # the name of the one tensor that a chunk's free parameters are packed in

Progress: TypeAlias = Callable[[int, int], None]
"""Called with the member-moves done and those there are."""


class Traces(NamedTuple):
    """What C checkpoints x K chains left behind, in float64 on the CPU; S draws, T components of the loss."""

    losses: Float[Tensor, "C K S"]
    burnin: Float[Tensor, "C K burnin"]
    components: Float[Tensor, "C K S T"] | None
    """The losses' components where the loss is a vector."""
    pull: Float[Tensor, "C K S"]
    spread: Float[Tensor, "C K S"]
    cool_spread: Float[Tensor, "C K S"]
    """The spread with each direction's share times 1 - lr G localization / 4: 1 for a flat one, steps counted."""
    acceptance: Float[Tensor, "C K"]
    sample_variance: Float[Tensor, "C K Q"] | None
    """Over the draws, of each sample's loss."""
    share_batches: bool
    """Whether two chains saw the same minibatches though there were different ones."""


class _Chunk(NamedTuple):
    """What some members left behind, on the device; one row each."""

    losses: Tensor
    components: Tensor | None
    pull: Tensor
    spread: Tensor
    cool_spread: Tensor
    acceptance: Tensor
    sample_variance: Tensor | None


def run_chains(
    gradient: Gradient,
    checkpoints: Params,
    batches: Batches,
    settings: SamplerSettings,
    *,
    packing: Packing,
    keys: Sequence[str],
    chunk_size: int,
    sample_losses: Callable[[Params], Float[Tensor, "n Q"]] | None = None,
    progress: Progress | None = None,
) -> Traces:
    """Run every chain of every checkpoint.

    Args:
        gradient: The gradient and the loss of stacked parameters.
        checkpoints: Stacked on a leading axis C.
        batches: Minibatches by (chain, draw), or an iterable.
        settings: What each chain is told.
        packing: What may move.
        keys: A text for each checkpoint, from which its chains' noise is seeded.
        chunk_size: Members that may run at once.
        sample_losses: Stacked parameters to the loss of each of Q fixed samples; their variance over draws is kept.
        progress: Told how far it is.
    """
    source = _Source(batch_function(batches, num_chains=settings.num_chains, seed=settings.seed))
    num_members = size(checkpoints) * settings.num_chains
    total = num_members * settings.num_moves
    chunk_size = -(
        -num_members // -(-num_members // chunk_size)
    )  # as even as may be: compiled gradients like one shape
    chunks = []
    with torch.no_grad():
        packed = packing.pack(checkpoints)
        for first in range(0, num_members, chunk_size):
            members = torch.arange(first, min(first + chunk_size, num_members))
            chunk = _Runner(gradient, source, settings, packing, keys, members)
            ticks = _Ticks(progress, first * settings.num_moves, total)
            chunks.append(chunk.run(packed, packing.frozen(checkpoints), sample_losses, ticks))
    return _traces(chunks, size(checkpoints), settings, share_batches=source.is_shared())


class _Ticks(NamedTuple):
    """Progress of a chunk as progress of the whole."""

    progress: Progress | None
    before: int
    total: int

    def __call__(self, done: int) -> None:
        if self.progress is not None:
            self.progress(self.before + done, self.total)


class _Source:
    """The minibatches, with a memory of which chains saw the same."""

    def __init__(self, batches: Callable[[int, int], Batch]) -> None:
        self.batches = batches
        self.digests: dict[tuple[int, int], bytes] = {}

    def stacked(self, chains: Sequence[int], draw: int, device: torch.device) -> Batch:
        """One move's batches, a row for each of `chains`; equal chains get the same object."""
        found = {chain: self.batches(chain, draw) for chain in dict.fromkeys(chains)}
        if draw < NUM_COMPARED:
            self.digests |= {(chain, draw): fingerprint(batch) for chain, batch in found.items()}
        return stack_batches([found[chain] for chain in chains], device)

    def is_shared(self) -> bool:
        """Whether two chains saw the same at every compared move; one batch for all moves is the whole data."""
        if len(set(self.digests.values())) <= 1:
            return False
        draws = sorted({draw for _, draw in self.digests})
        rows = [tuple(self.digests[chain, draw] for draw in draws) for chain in sorted({c for c, _ in self.digests})]
        return len(set(rows)) < len(rows)


class _Runner:
    """Some members of the population, run together."""

    def __init__(
        self,
        gradient: Gradient,
        source: _Source,
        settings: SamplerSettings,
        packing: Packing,
        keys: Sequence[str],
        members: Tensor,
    ) -> None:
        self.gradient, self.source, self.settings, self.packing = gradient, source, settings, packing
        self.checkpoint_of = members // settings.num_chains
        self.chains = (members % settings.num_chains).tolist()
        self.seeds = [
            rng.stream(settings.seed, f"llc/noise/{keys[checkpoint]}/{chain}").low
            for checkpoint, chain in zip(self.checkpoint_of.tolist(), self.chains, strict=True)
        ]

    def run(
        self,
        packed: Float[Tensor, "C P"],
        frozen: Params,
        sample_losses: Callable[[Params], Tensor] | None,
        ticks: _Ticks,
    ) -> _Chunk:
        """All moves of these members."""
        settings, kernel = self.settings, KERNELS[self.settings.kernel]
        device = packed.device
        rows = self.checkpoint_of.to(device)
        frozen = {name: t.expand(len(rows), *t.shape[1:]) if len(t) == 1 else t[rows] for name, t in frozen.items()}
        state = kernel.init({_PACKED: packed[rows]})
        noise, recorder = self._noise(state), _Recorder(settings, sample_losses)
        losses = torch.empty(len(rows), settings.num_moves, dtype=packed.dtype, device=device)
        acceptance = []
        for move in range(settings.num_moves):
            batch = self.source.stacked(self.chains, move, device)
            grad, values = self._gradient(state, frozen, batch)
            losses[:, move] = _mean(values)
            proposal = self._step(state, grad, next(noise))
            draw, rest = divmod(move - settings.num_burnin_steps, settings.thinning)
            if draw >= 0 and rest == 0:
                recorder.add(state, grad, values, partial(self._params, state, frozen))
                if draw % -(-settings.num_draws // NUM_MALA) == 0:
                    acceptance.append(self._acceptance(state, proposal, grad, losses[:, move], frozen, batch))
            state = kernel.adapt(proposal, grad) if move < settings.num_burnin_steps else proposal
            ticks((move + 1) * len(rows))
        return recorder.chunk(losses, torch.stack(acceptance, dim=1).mean(1))

    def _params(self, state: SGLDState, frozen: Params) -> Params:
        return {**frozen, **self.packing.unpack(state.params[_PACKED], frozen)}

    def _gradient(self, state: SGLDState, frozen: Params, batch: Batch) -> tuple[Params, Tensor]:
        params = self.packing.unpack(state.params[_PACKED], frozen)
        grads, values = self.gradient(params, {n: t for n, t in frozen.items() if n not in params}, batch)
        return {_PACKED: self.packing.pack(grads)}, values

    def _step(self, state: SGLDState, grad: Params, noise: Params) -> SGLDState:
        s = self.settings
        return step(state, grad, noise, lr=s.lr, nbeta=s.nbeta, localization=s.localization)

    def _acceptance(
        self, state: SGLDState, proposal: SGLDState, grad: Params, losses: Tensor, frozen: Params, batch: Batch
    ) -> Tensor:
        there, values = self._gradient(proposal, frozen, batch)
        pair, s = (losses, _mean(values)), self.settings
        log = log_mala_acceptance(
            state, proposal, (grad, there), pair, lr=s.lr, nbeta=s.nbeta, localization=s.localization
        )
        return log.exp()

    def _noise(self, state: SGLDState) -> Iterator[Params]:
        """Standard normals, one buffer filled anew for each move, a row from each member's own generator."""
        buffer = torch.empty_like(state.params[_PACKED])
        rows = buffer.unbind()
        generators = [torch.Generator(buffer.device).manual_seed(int(seed)) for seed in self.seeds]
        while True:
            for row, generator in zip(rows, generators, strict=True):
                row.normal_(generator=generator)
            yield {_PACKED: buffer}


class _Recorder:
    """What some members leave behind at each draw."""

    def __init__(self, settings: SamplerSettings, sample_losses: Callable[[Params], Tensor] | None) -> None:
        self.settings, self.sample_losses = settings, sample_losses
        self.components: list[Tensor] = []
        self.pull: list[Tensor] = []
        self.spread: list[Tensor] = []
        self.cool_spread: list[Tensor] = []
        self.variance = _RunningVariance()

    def add(self, state: SGLDState, grad: Params, values: Tensor, params: Callable[[], Params]) -> None:
        nbeta, localization = self.settings.nbeta, self.settings.localization
        away = state.params[_PACKED] - state.anchor[_PACKED]
        spread = localization * torch.linalg.vecdot(away, away)
        g = state.preconditioner.get(_PACKED)
        preconditioned = spread if g is None else localization * torch.linalg.vecdot(away * g, away)
        self.pull.append(nbeta * torch.linalg.vecdot(away, grad[_PACKED]))
        self.spread.append(spread)
        self.cool_spread.append(spread - self.settings.lr * localization / 4 * preconditioned)
        if values.ndim > 1:
            self.components.append(values)
        if self.sample_losses is not None:
            self.variance.add(self.sample_losses(params()))

    def chunk(self, losses: Tensor, acceptance: Tensor) -> _Chunk:
        return _Chunk(
            losses,
            torch.stack(self.components, dim=1) if self.components else None,
            torch.stack(self.pull, dim=1),
            torch.stack(self.spread, dim=1),
            torch.stack(self.cool_spread, dim=1),
            acceptance,
            None if self.sample_losses is None else self.variance.value(),
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


def _traces(
    chunks: Sequence[_Chunk], num_checkpoints: int, settings: SamplerSettings, *, share_batches: bool
) -> Traces:
    def joined(name: str) -> Tensor | None:
        parts = [getattr(chunk, name) for chunk in chunks]
        if parts[0] is None:
            return None
        return torch.cat(parts).cpu().double().unflatten(0, (num_checkpoints, settings.num_chains))

    losses = joined("losses")
    assert losses is not None
    start = settings.num_burnin_steps
    fields = {name: joined(name) for name in _Chunk._fields if name != "losses"}
    return Traces(
        losses=losses[..., start :: settings.thinning],
        burnin=losses[..., :start],
        share_batches=share_batches,
        **fields,  # type: ignore[arg-type]
    )
