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
from functools import partial
from itertools import groupby
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from icl import rng
from icl.flat import Layout
from icl.sampling.batches import Batch, Batches, batch_function, fingerprint, stack_batches
from icl.sampling.drop_at_mean import BatchLosses, DropsAtMean
from icl.sampling.gradients import Gradient
from icl.sampling.recording import Draw, Recorder, Traces, mean_over_components, split_by_checkpoint
from icl.sampling.settings import SamplerSettings
from icl.sampling.sgld import KERNELS, SGLDState, log_mala_acceptance, step
from icl.stacked import Params, size
from icl.validation import ConfigError

NUM_MALA = 16
"""Number of moves of each chain whose MALA acceptance is computed; each costs one more gradient."""
NUM_COMPARED = 4
"""Number of first moves at which the chains' minibatches are compared; so are twice as many later ones."""

Progress: TypeAlias = Callable[[int, int], None]
"""Called with the number of member-moves done and their total."""


def run_chains(
    gradient: Gradient,
    values: Callable[[Params, Batch], Tensor],
    checkpoints: Params,
    batches: Batches,
    settings: SamplerSettings | Sequence[SamplerSettings],
    *,
    layout: Layout,
    keys: Sequence[str],
    chunk_size: int,
    sample_losses: Callable[[Params], Float[Tensor, "n Q"]] | None = None,
    losses_at_mean: BatchLosses | None = None,
    progress: Progress | None = None,
) -> list[Traces]:
    """Run every chain of every checkpoint; return the traces of each checkpoint.

    Args:
        gradient: The gradient and the loss of stacked parameters.
        values: The loss alone, of stacked parameters each on its own batch.
        checkpoints: Stacked on a leading axis C.
        batches: Minibatches by (chain, draw), or an iterable.
        settings: The same for all checkpoints, or one for each.
        layout: How the parameters that move lie in rows.
        keys: A text for each checkpoint, from which the noise of its chains is seeded.
        chunk_size: Number of members that may run at once.
        sample_losses: Function from stacked parameters to the losses of Q fixed samples; their variance over draws is recorded.
        losses_at_mean: How to measure the loss at the mean of the draws.
        progress: Called after every move.

    Raises:
        ConfigError: If settings differ in more than lr, nbeta and localization.
    """
    each = [settings] * size(checkpoints) if isinstance(settings, SamplerSettings) else list(settings)
    common = _common_settings(each)
    source = _Source(batch_function(batches, num_chains=common.num_chains, seed=common.seed), common.num_moves)
    num_members = size(checkpoints) * common.num_chains
    total = num_members * common.num_moves
    chunk_size = even_chunks(num_members, chunk_size)
    parts: list[Traces] = []
    with torch.no_grad():
        rows, fixed = layout.to_rows(checkpoints), layout.fixed(checkpoints)
        drops = None
        if losses_at_mean is not None:
            drops = DropsAtMean(losses_at_mean, layout, rows, fixed, common.num_chains)
        for first in range(0, num_members, chunk_size):
            members = torch.arange(first, min(first + chunk_size, num_members))
            runner = _Runner(gradient, values, source, each, layout, keys, members)
            ticks = _Ticks(progress, first * common.num_moves, total)
            for traces in runner.run(rows, fixed, sample_losses, ticks):
                if drops is not None:
                    assert traces.mean_position is not None
                    drops.add(traces.mean_position, traces.alive)
                parts.append(traces._replace(mean_position=None))
    found = [
        traces._replace(share_batches=source.is_shared(), one_batch=source.is_one())
        for traces in split_by_checkpoint(parts, common.num_chains)
    ]
    if drops is None:
        return found
    return [traces._replace(drop_at_mean=drop) for traces, drop in zip(found, drops.drops, strict=True)]


def even_chunks(num: int, most: int) -> int:
    """Return the size of equal chunks, at most `most` and at least half of it; if there is none, the last chunk is smaller.

    A gradient that is compiled for a GPU is compiled again for every size.
    """
    num_chunks = -(-num // most)
    equal = (num // count for count in range(num_chunks, 2 * num_chunks + 1) if num % count == 0)
    return next(equal, -(-num // num_chunks))


def _common_settings(settings: Sequence[SamplerSettings]) -> SamplerSettings:
    """The first of the settings; all share its lengths, chains, seed and kernel."""
    first = settings[0]
    for other in settings:
        if dataclasses.replace(other, lr=first.lr, nbeta=first.nbeta, localization=first.localization) != first:
            raise ConfigError(
                f"Chains that run together may differ in lr, nbeta and localization only, got {first} and {other}."
            )
    return first


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

    def __init__(self, batches: Callable[[int, int], Batch], num_moves: int) -> None:
        self.batches = batches
        later = range(NUM_COMPARED, num_moves, max(1, (num_moves - NUM_COMPARED) // (2 * NUM_COMPARED)))
        self.compared = frozenset(range(NUM_COMPARED)), frozenset(later[: 2 * NUM_COMPARED])
        self.digests: dict[tuple[int, int], bytes] = {}

    def stacked(self, chains: Sequence[int], draw: int, device: torch.device) -> Batch:
        """One move's batches, a row for each of `chains`; equal chains get the same object."""
        found = {chain: self.batches(chain, draw) for chain in dict.fromkeys(chains)}
        if any(draw in draws for draws in self.compared):
            self.digests |= {(chain, draw): fingerprint(batch) for chain, batch in found.items()}
        return stack_batches([found[chain] for chain in chains], device)

    def is_one(self) -> bool:
        """Whether all chains saw one and the same batch at every compared move: the whole data."""
        return len(set(self.digests.values())) <= 1

    def is_shared(self) -> bool:
        """Whether two chains saw the same at every first or later move, though there were different ones."""
        if self.is_one():
            return False
        chains = {chain for chain, _ in self.digests}
        for wanted in self.compared:
            draws = sorted({draw for _, draw in self.digests} & wanted)
            rows = {tuple(self.digests[chain, draw] for draw in draws) for chain in chains}
            if draws and len(rows) < len(chains):
                return True
        return False


class _Runner:
    """Some members of the population, run together."""

    def __init__(
        self,
        gradient: Gradient,
        values: Callable[[Params, Batch], Tensor],
        source: _Source,
        settings: Sequence[SamplerSettings],
        layout: Layout,
        keys: Sequence[str],
        members: Tensor,
    ) -> None:
        self.gradient, self.values, self.source, self.layout = gradient, values, source, layout
        self.common = settings[0]
        self.checkpoint_of = members // self.common.num_chains
        self.chains = (members % self.common.num_chains).tolist()
        self.settings = [settings[i] for i in self.checkpoint_of.tolist()]
        self.seeds = [
            int(rng.stream(self.common.seed, f"llc/noise/{keys[checkpoint]}/{chain}").low)
            for checkpoint, chain in zip(self.checkpoint_of.tolist(), self.chains, strict=True)
        ]

    def run(
        self,
        checkpoints: Float[Tensor, "C P"],
        fixed: Params,
        sample_losses: Callable[[Params], Tensor] | None,
        ticks: _Ticks,
    ) -> list[Traces]:
        """Make all moves of these members; return the traces of each group of equal settings."""
        common, device = self.common, checkpoints.device
        index = self.checkpoint_of.to(device)
        fixed = {name: t.expand(len(index), *t.shape[1:]) if len(t) == 1 else t[index] for name, t in fixed.items()}
        start = checkpoints[index]
        groups = self._groups(start, fixed, sample_losses)
        anchors, sizes = self.layout.to_params(start, fixed), [group.size for group in groups]
        for move in range(common.num_moves):
            batch = self.source.stacked(self.chains, move, device)
            here = self._gradients([group.state for group in groups], fixed, batch)
            draw, rest = divmod(move - common.num_burnin_steps, common.thinning)
            is_draw = draw >= 0 and rest == 0
            if is_draw:
                anchor_losses = self.values(anchors, batch).split(sizes)
                for group, (grad, losses), anchor_loss in zip(groups, here, anchor_losses, strict=True):
                    group.record_draw(grad, losses - anchor_loss)
            proposals = [group.propose(grad, losses) for group, (grad, losses) in zip(groups, here, strict=True)]
            if is_draw and draw % -(-common.num_draws // NUM_MALA) == 0:
                there = self._gradients(proposals, fixed, batch)
                for group, proposal, *ends in zip(groups, proposals, here, there, strict=True):
                    group.record_acceptance(proposal, *ends)
            for group, (grad, _), proposal in zip(groups, here, proposals, strict=True):
                group.move(proposal, grad, adapting=move < common.num_burnin_steps)
            ticks((move + 1) * len(index))
        return [group.recorder.traces() for group in groups]

    def _groups(
        self, start: Float[Tensor, "N P"], fixed: Params, sample_losses: Callable[[Params], Tensor] | None
    ) -> list["_Group"]:
        groups, first = [], 0
        for settings, members in groupby(self.settings):
            rows = slice(first, first + len(list(members)))
            params = partial(self.layout.to_params, fixed={name: tensor[rows] for name, tensor in fixed.items()})
            recorder = Recorder(settings, self.layout.size, sample_losses)
            groups.append(_Group(settings, start[rows], self.seeds[rows], params, recorder))
            first = rows.stop
        return groups

    def _gradients(self, states: Sequence[SGLDState], fixed: Params, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """The gradients and the losses of all members, split by group."""
        positions = [state.position for state in states]
        rows = positions[0] if len(positions) == 1 else torch.cat(positions)
        grads, values = self.gradient(self.layout, rows, fixed, batch)
        sizes = [len(position) for position in positions]
        return list(zip(grads.split(sizes), values.split(sizes), strict=True))


class _Group:
    """Neighbouring members with equal settings: where they are, and how they move."""

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
        """Standard normals: one buffer that is filled again for each move, each row from its member's own generator."""
        buffer = torch.zeros_like(self.state.position)
        rows = buffer[:, : self.recorder.num_params].unbind()  # the padding stays zero, so chains do not move there
        generators = [torch.Generator(buffer.device).manual_seed(seed) for seed in seeds]
        while True:
            for row, generator in zip(rows, generators, strict=True):
                row.normal_(generator=generator)
            yield buffer
