"""Run chains x checkpoints as one population.

Members are numbered checkpoint by checkpoint and processed in chunks that fit the memory. Each member has its own
generator, seeded from (seed, checkpoint key, chain) and drawn outside `vmap`. So its noise is the same whatever runs
beside it. Draw j is the state after `num_burnin_steps + j * thinning` moves. Its loss is that of the minibatch that also
gives the next move its gradient, evaluated before the move. (So without burn-in, draw 0 is the checkpoint.)

At each draw we also record the excess of the loss over the checkpoint's on the same minibatch, which costs one more forward pass.
The difference has little of the noise of either loss. `icl.sampling.recording` has the other numbers. At up to `NUM_MALA` draws
we compute the probability that MALA would accept the move, with L the loss of that draw's minibatch at both ends.

Checkpoints may differ in their settings, but only in lr, nbeta and localization. A checkpoint under several settings
is several rows of one population, whose chains see the same minibatches and noise. Moves and records are made for each group
of equal settings, gradients for all members at once.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from icl import rng
from icl.config.validation import ConfigError
from icl.model.flat import Layout
from icl.model.stacked import Params, size
from icl.sampling.batches import Batch, Batches, batch_function, fingerprint, stack_batches
from icl.sampling.minimum import BatchLosses, DropsAtMean
from icl.sampling.recording import Draw, Recorder, Traces, mean_over_components, split_by_checkpoint
from icl.sampling.settings import SamplerSettings
from icl.sampling.sgld import KERNELS, SGLDState, log_mala_acceptance, step
from icl.sampling.target import Gradient, StackedLosses

NUM_MALA = 16
"""Number of moves of each chain whose MALA acceptance is computed; each costs one more gradient."""
NUM_COMPARED = 4
"""Number of first moves at which the chains' minibatches are compared; so are twice as many later ones."""

Advance: TypeAlias = Callable[[int], None]
"""Called after moves with their number: one chain's move counts as one."""


def run_chains(
    gradient: Gradient,
    losses: StackedLosses,
    checkpoints: Params,
    batches: Batches,
    settings: SamplerSettings | Sequence[SamplerSettings],
    *,
    layout: Layout,
    keys: Sequence[str],
    chunk_size: int,
    sample_losses: Callable[[Params], Float[Tensor, "n Q"]] | None = None,
    losses_at_mean: BatchLosses | None = None,
    advance: Advance = lambda moves: None,
) -> list[Traces]:
    """Run every chain of every checkpoint; return the traces of each checkpoint.

    Args:
        gradient: The gradient and the loss of stacked parameters.
        losses: The loss alone, of stacked parameters each on its own batch.
        checkpoints: Stacked on a leading axis C.
        batches: Minibatches by (chain, draw), or an iterable.
        settings: The same for all checkpoints, or one for each.
        layout: How the parameters that move lie in rows.
        keys: A text for each checkpoint, from which the noise of its chains is seeded.
        chunk_size: Number of members that may run at once.
        sample_losses: Function from stacked parameters to the losses of Q fixed samples; their variance over draws is recorded.
        losses_at_mean: How to measure the loss at the mean of the draws.
        advance: Called after every move.

    Raises:
        ConfigError: If settings differ in more than lr, nbeta and localization.
    """
    each = [settings] * size(checkpoints) if isinstance(settings, SamplerSettings) else list(settings)
    common = _require_common(each)
    source = _Source(batch_function(batches, num_chains=common.num_chains, seed=common.seed), common.num_moves)
    num_members = size(checkpoints) * common.num_chains
    chunk_size = even_chunks(num_members, chunk_size)
    parts: list[Traces] = []
    with torch.no_grad():
        rows, fixed = layout.to_rows(checkpoints), layout.fixed(checkpoints)
        drops = None
        if losses_at_mean is not None:
            drops = DropsAtMean(losses_at_mean, layout, rows, fixed, common.num_chains)
        population = _Population(
            gradient=gradient,
            losses=losses,
            source=source,
            settings=each,
            layout=layout,
            checkpoints=rows,
            fixed=fixed,
            keys=keys,
            sample_losses=sample_losses,
        )
        for first in range(0, num_members, chunk_size):
            for traces in population.run(range(first, min(first + chunk_size, num_members)), advance):
                if drops is not None:
                    assert traces.mean_position is not None
                    drops.add(traces.mean_position, traces.alive)
                # The positions are the largest part of the traces, so they are released at once.
                parts.append(traces._replace(mean_position=None))
    by_checkpoint = [
        traces._replace(share_batches=source.is_shared(), one_batch=source.is_one())
        for traces in split_by_checkpoint(parts, common.num_chains)
    ]
    if drops is None:
        return by_checkpoint
    return [traces._replace(drop_at_mean=drop) for traces, drop in zip(by_checkpoint, drops.drops, strict=True)]


def even_chunks(num: int, most: int) -> int:
    """Return the size of equal chunks, at most `most` and at least half of it; if there is none, the last chunk is smaller.

    A gradient that is compiled for a GPU is compiled again for every size.
    """
    num_chunks = -(-num // most)
    equal = (num // count for count in range(num_chunks, 2 * num_chunks + 1) if num % count == 0)
    return next(equal, -(-num // num_chunks))


def _require_common(settings: Sequence[SamplerSettings]) -> SamplerSettings:
    """Return the first of the settings; all must have its lengths, chains, seed and kernel."""
    first = settings[0]
    for other in settings:
        if dataclasses.replace(other, lr=first.lr, nbeta=first.nbeta, localization=first.localization) != first:
            raise ConfigError(
                f"Chains that run together may differ in lr, nbeta and localization only, got {first} and {other}."
            )
    return first


class _Source:
    """Minibatches of the chains; it records which chains saw the same ones."""

    def __init__(self, batches: Callable[[int, int], Batch], num_moves: int) -> None:
        self.batches = batches
        later = range(NUM_COMPARED, num_moves, max(1, (num_moves - NUM_COMPARED) // (2 * NUM_COMPARED)))
        self.compared = frozenset(range(NUM_COMPARED)), frozenset(later[: 2 * NUM_COMPARED])
        self.digests: dict[tuple[int, int], bytes] = {}

    def stacked(self, chains: Sequence[int], draw: int, device: torch.device) -> Batch:
        """Return one move's batches, a row for each of `chains`; equal chains get the same object."""
        batches = {chain: self.batches(chain, draw) for chain in dict.fromkeys(chains)}
        if any(draw in draws for draws in self.compared):
            self.digests |= {(chain, draw): fingerprint(batch) for chain, batch in batches.items()}
        return stack_batches([batches[chain] for chain in chains], device)

    def is_one(self) -> bool:
        """Return whether all chains saw the same single batch at every compared move: the whole data."""
        return len(set(self.digests.values())) <= 1

    def is_shared(self) -> bool:
        """Return whether two chains saw the same batches at all first or all later moves, although there were different ones."""
        if self.is_one():
            return False
        chains = {chain for chain, _ in self.digests}
        for compared in self.compared:
            draws = sorted({draw for _, draw in self.digests} & compared)
            rows = {tuple(self.digests[chain, draw] for draw in draws) for chain in chains}
            if draws and len(rows) < len(chains):
                return True
        return False


@dataclass(frozen=True, kw_only=True)
class _Population:
    """All members, of which some run at a time."""

    gradient: Gradient
    losses: StackedLosses
    source: _Source
    settings: Sequence[SamplerSettings]
    """The settings of each checkpoint."""
    layout: Layout
    checkpoints: Float[Tensor, "C P"]
    """The moving parameters of each checkpoint."""
    fixed: Params
    keys: Sequence[str]
    """A text for each checkpoint, from which the noise of its chains is seeded."""
    sample_losses: Callable[[Params], Tensor] | None

    def run(self, members: range, advance: Advance) -> list[Traces]:
        """Make all moves of some members; return the traces of each group of equal settings."""
        common, device = self.settings[0], self.checkpoints.device
        checkpoints, chains = [m // common.num_chains for m in members], [m % common.num_chains for m in members]
        index = torch.tensor(checkpoints, device=device)
        # What all checkpoints share (length 1) is expanded, not copied.
        fixed = {n: t.expand(len(index), *t.shape[1:]) if len(t) == 1 else t[index] for n, t in self.fixed.items()}
        start = self.checkpoints[index]
        groups = self._groups(checkpoints, chains, start, fixed)
        anchors, sizes = self.layout.to_params(start, fixed), [group.size for group in groups]
        for move in range(common.num_moves):
            batch = self.source.stacked(chains, move, device)
            here = self._gradients([group.state for group in groups], fixed, batch)
            draw, remainder = divmod(move - common.num_burnin_steps, common.thinning)
            is_draw = draw >= 0 and remainder == 0
            if is_draw:
                anchor_losses = self.losses(anchors, batch).split(sizes)
                for group, (grad, losses), anchor_loss in zip(groups, here, anchor_losses, strict=True):
                    group.record_draw(grad, losses - anchor_loss)
            proposals = [group.propose(grad, losses) for group, (grad, losses) in zip(groups, here, strict=True)]
            if is_draw and draw % -(-common.num_draws // NUM_MALA) == 0:
                there = self._gradients(proposals, fixed, batch)
                for group, proposal, *ends in zip(groups, proposals, here, there, strict=True):
                    group.record_acceptance(proposal, *ends)
            for group, (grad, _), proposal in zip(groups, here, proposals, strict=True):
                group.move(proposal, grad, adapting=move < common.num_burnin_steps)
            advance(len(members))
        return [group.recorder.traces() for group in groups]

    def _groups(
        self, checkpoints: Sequence[int], chains: Sequence[int], start: Float[Tensor, "N P"], fixed: Params
    ) -> list["_Group"]:
        streams = [f"llc/noise/{self.keys[i]}/{chain}" for i, chain in zip(checkpoints, chains, strict=True)]
        seeds = [int(rng.stream(self.settings[0].seed, stream).low) for stream in streams]
        groups, first = [], 0
        for settings, members in groupby(self.settings[i] for i in checkpoints):
            rows = slice(first, first + len(list(members)))
            params = partial(self.layout.to_params, fixed={name: tensor[rows] for name, tensor in fixed.items()})
            recorder = Recorder(settings, self.layout.size, self.sample_losses)
            groups.append(_Group(settings, start[rows], seeds[rows], params, recorder))
            first = rows.stop
        return groups

    def _gradients(self, states: Sequence[SGLDState], fixed: Params, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """Return the gradients and the losses of all members, split by group."""
        positions = [state.position for state in states]
        # A single group, the usual case, needs no copy.
        rows = positions[0] if len(positions) == 1 else torch.cat(positions)
        grads, values = self.gradient(self.layout, rows, fixed, batch)
        sizes = [len(position) for position in positions]
        return list(zip(grads.split(sizes), values.split(sizes), strict=True))


class _Group:
    """Neighbouring members with equal settings: their states and how they move."""

    def __init__(
        self,
        settings: SamplerSettings,
        start: Float[Tensor, "N P"],
        seeds: Sequence[int],
        params: Callable[[Tensor], Params],
        recorder: Recorder,
    ) -> None:
        self.settings, self.kernel, self.params, self.recorder = settings, KERNELS[settings.kernel], params, recorder
        self.state, self.size = self.kernel.init(start), len(start)
        self.noise = self._noise(seeds)
        self.target = {"lr": settings.lr, "nbeta": settings.nbeta, "localization": settings.localization}

    def record_draw(self, grad: Float[Tensor, "N P"], excess: Float[Tensor, "N *T"]) -> None:
        """Record the present state as a draw."""
        draw = Draw(self.state, grad, self.settings)
        self.recorder.add_draw(draw, excess, partial(self.params, self.state.position))

    def propose(self, grad: Float[Tensor, "N P"], losses: Float[Tensor, "N *T"]) -> SGLDState:
        """Record the losses here and return the next state."""
        self.recorder.add_losses(losses)
        return step(self.state, grad, next(self.noise), **self.target)

    def record_acceptance(self, proposal: SGLDState, here: tuple[Tensor, Tensor], there: tuple[Tensor, Tensor]) -> None:
        """Record whether MALA would accept the proposal, from the gradients and losses at both ends."""
        grads, losses = (here[0], there[0]), (mean_over_components(here[1]), mean_over_components(there[1]))
        acceptance = log_mala_acceptance(self.state, proposal, grads, losses, **self.target).exp()
        self.recorder.acceptance.append(acceptance)

    def move(self, proposal: SGLDState, grad: Float[Tensor, "N P"], *, adapting: bool) -> None:
        """Go to the proposal."""
        self.state = self.kernel.adapt(proposal, grad) if adapting else proposal

    def _noise(self, seeds: Sequence[int]) -> Iterator[Tensor]:
        """Yield standard normals for each move, each row from its member's own generator, in one buffer that is reused."""
        buffer = torch.zeros_like(self.state.position)
        rows = buffer[:, : self.recorder.num_params].unbind()  # the padding stays zero, so chains do not move there
        generators = [torch.Generator(buffer.device).manual_seed(seed) for seed in seeds]
        while True:
            for row, generator in zip(rows, generators, strict=True):
                row.normal_(generator=generator)
            yield buffer
