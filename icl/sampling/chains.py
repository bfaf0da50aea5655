"""Runs chains x checkpoints as one population, and records what every later number is made of.

Members are numbered checkpoint by checkpoint and processed in chunks that fit the memory. Each member has a generator
of its own, seeded from (seed, checkpoint key, chain) and drawn outside `vmap`, so its noise is the same whatever runs
beside it. Draw j is the state after `num_burnin_steps + j * thinning` moves; its loss is that of the minibatch that also
gives the next move its gradient, evaluated before the move. (So without burn-in draw 0 is the checkpoint.)

Recorded at each draw, beside the loss: its excess over the checkpoint's loss on the same minibatch, one more forward pass,
as the difference of both has little of the noise of either; the pull nbeta (w - w0) . grad L, the spread
localization |w - w0|^2 and the heat (`icl.sampling.diagnostics`). At up to `NUM_MALA` draws the probability that MALA
would accept the move, with L the loss of that draw's minibatch at both ends.

Checkpoints may have settings of their own, if only in lr, nbeta and localization: a checkpoint under several settings
is several rows of one population, whose chains see the same minibatches and noise. Moves and records are then made group by
group, and gradients for all at once.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from icl import rng
from icl.checks import ConfigError
from icl.flat import Layout
from icl.sampling.batches import Batch, Batches, batch_function, fingerprint, stack_batches
from icl.sampling.gradients import Gradient
from icl.sampling.groups import Chunk, Group
from icl.sampling.settings import SamplerSettings
from icl.sampling.settling import Losses, Settling
from icl.sampling.sgld import SGLDState
from icl.stacked import Params, size

NUM_MALA = 16
"""Moves of each chain whose MALA acceptance is found; each costs one more gradient."""
NUM_COMPARED = 4
"""First moves at which the chains' minibatches are compared with each other; twice as many later ones are, too."""

Progress: TypeAlias = Callable[[int, int], None]
"""Called with the member-moves done and those there are."""


class Traces(NamedTuple):
    """What C checkpoints x K chains left behind, in float64 on the CPU; S draws, T components of the loss."""

    losses: Float[Tensor, "C K S"]
    burnin: Float[Tensor, "C K burnin"]
    excess: Float[Tensor, "C K S *T"]
    """Losses less the checkpoint's on the same minibatch; of every component where the loss is a vector."""
    pull: Float[Tensor, "C K S"]
    spread: Float[Tensor, "C K S"]
    heat: Float[Tensor, "C K S"]
    acceptance: Float[Tensor, "C K"]
    sample_variance: Float[Tensor, "C K Q"] | None
    """Over the draws, of each sample's loss."""
    alive: Bool[Tensor, "C K"]
    """Whether each chain stayed finite and did not diverge."""
    fallen: Bool[Tensor, "C K"]
    """Whether it diverged downwards."""
    settled: Float[Tensor, "C 3"]
    """How much lower the loss is where the chains settle, its standard error and degrees of freedom (`icl.sampling.settling`);
    NaN if not asked."""
    share_batches: bool
    """Whether two chains saw the same minibatches though there were different ones."""
    one_batch: bool
    """Whether there was one batch for all moves: the loss has no noise."""


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
    losses_at_rest: Losses | None = None,
    progress: Progress | None = None,
) -> Traces:
    """Run every chain of every checkpoint.

    Args:
        gradient: The gradient and the loss of stacked parameters.
        values: The loss alone, of stacked parameters each on a batch of its own.
        checkpoints: Stacked on a leading axis C.
        batches: Minibatches by (chain, draw), or an iterable.
        settings: What each chain is told: the same for all, or for each checkpoint its own.
        layout: How the parameters that move lie in rows.
        keys: A text for each checkpoint, from which its chains' noise is seeded.
        chunk_size: Members that may run at once.
        sample_losses: Stacked parameters to the loss of each of Q fixed samples; their variance over draws is kept.
        losses_at_rest: How the loss is measured where the chains settle.
        progress: Told how far it is.

    Raises:
        ConfigError: If settings differ in more than lr, nbeta and localization.
    """
    each = [settings] * size(checkpoints) if isinstance(settings, SamplerSettings) else list(settings)
    lengths = _same_lengths(each)
    source = _Source(batch_function(batches, num_chains=lengths.num_chains, seed=lengths.seed), lengths.num_moves)
    num_members = size(checkpoints) * lengths.num_chains
    total = num_members * lengths.num_moves
    chunk_size = even_chunks(num_members, chunk_size)
    chunks: list[Chunk] = []
    with torch.no_grad():
        rows, fixed = layout.to_rows(checkpoints), layout.fixed(checkpoints)
        settling = None
        if losses_at_rest is not None:
            settling = Settling(losses_at_rest, layout, rows, fixed, lengths.num_chains)
        for first in range(0, num_members, chunk_size):
            members = torch.arange(first, min(first + chunk_size, num_members))
            runner = _Runner(gradient, values, source, each, layout, keys, members)
            ticks = _Ticks(progress, first * lengths.num_moves, total)
            for chunk in runner.run(rows, fixed, sample_losses, ticks):
                if settling is not None:
                    settling.add(chunk.mean, chunk.alive)
                chunks.append(chunk._replace(mean=chunk.mean.new_empty(0)))
    settled = torch.stack(settling.drops) if settling else torch.full((size(checkpoints), 3), torch.nan).double()
    flags = {"settled": settled, "share_batches": source.is_shared(), "one_batch": source.is_one()}
    return _traces(chunks, size(checkpoints), lengths, flags)


def even_chunks(num: int, most: int) -> int:
    """The size of equal chunks, at most `most`, if half of that is enough; else of chunks that are equal but for the last.

    A gradient compiled for a GPU is compiled anew for every size.
    """
    num_chunks = -(-num // most)
    equal = (num // count for count in range(num_chunks, 2 * num_chunks + 1) if num % count == 0)
    return next(equal, -(-num // num_chunks))


def _same_lengths(settings: Sequence[SamplerSettings]) -> SamplerSettings:
    """One of the settings, which all have its lengths, chains, seed and kernel."""
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
        self.lengths = settings[0]
        self.checkpoint_of = members // self.lengths.num_chains
        self.chains = (members % self.lengths.num_chains).tolist()
        self.settings = [settings[i] for i in self.checkpoint_of.tolist()]
        self.seeds = [
            int(rng.stream(self.lengths.seed, f"llc/noise/{keys[checkpoint]}/{chain}").low)
            for checkpoint, chain in zip(self.checkpoint_of.tolist(), self.chains, strict=True)
        ]

    def run(
        self,
        checkpoints: Float[Tensor, "C P"],
        fixed: Params,
        sample_losses: Callable[[Params], Tensor] | None,
        ticks: _Ticks,
    ) -> list[Chunk]:
        """All moves of these members, by groups of equal settings."""
        lengths, device = self.lengths, checkpoints.device
        index = self.checkpoint_of.to(device)
        fixed = {name: t.expand(len(index), *t.shape[1:]) if len(t) == 1 else t[index] for name, t in fixed.items()}
        start = checkpoints[index]
        groups = self._groups(start, fixed, sample_losses)
        anchors, sizes = self.layout.to_params(start, fixed), [group.size for group in groups]
        for move in range(lengths.num_moves):
            batch = self.source.stacked(self.chains, move, device)
            found = self._gradients([group.state for group in groups], fixed, batch)
            draw, rest = divmod(move - lengths.num_burnin_steps, lengths.thinning)
            is_draw = draw >= 0 and rest == 0
            at_anchors = self.values(anchors, batch).split(sizes) if is_draw else [None] * len(groups)
            proposals = [
                group.propose(*one, move, at_anchor)
                for group, one, at_anchor in zip(groups, found, at_anchors, strict=True)
            ]
            if is_draw and draw % -(-lengths.num_draws // NUM_MALA) == 0:
                there = self._gradients(proposals, fixed, batch)
                for group, here, proposal, one in zip(groups, found, proposals, there, strict=True):
                    group.note_acceptance(proposal, here, one)
            for group, (grad, _), proposal in zip(groups, found, proposals, strict=True):
                group.move(proposal, grad, adapting=move < lengths.num_burnin_steps)
            ticks((move + 1) * len(index))
        return [group.chunk() for group in groups]

    def _groups(
        self, start: Float[Tensor, "N P"], fixed: Params, sample_losses: Callable[[Params], Tensor] | None
    ) -> list[Group]:
        groups, first = [], 0
        for settings, members in groupby(self.settings):
            here = slice(first, first + len(list(members)))
            still = {name: tensor[here] for name, tensor in fixed.items()}
            params = partial(self.layout.to_params, fixed=still)
            groups.append(Group(settings, start[here], self.seeds[here], params, self.layout.size, sample_losses))
            first = here.stop
        return groups

    def _gradients(self, states: Sequence[SGLDState], fixed: Params, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """The gradients and the losses of all members, split by group."""
        positions = [state.position for state in states]
        rows = positions[0] if len(positions) == 1 else torch.cat(positions)
        grads, values = self.gradient(self.layout, rows, fixed, batch)
        sizes = [len(position) for position in positions]
        return list(zip(grads.split(sizes), values.split(sizes), strict=True))


def _traces(chunks: Sequence[Chunk], num_checkpoints: int, settings: SamplerSettings, flags: dict[str, Any]) -> Traces:
    def joined(name: str) -> Tensor | None:
        parts = [getattr(chunk, name) for chunk in chunks]
        if parts[0] is None:
            return None
        whole = torch.cat(parts).cpu().unflatten(0, (num_checkpoints, settings.num_chains))
        return whole.double() if whole.is_floating_point() else whole

    losses = joined("losses")
    assert losses is not None
    start = settings.num_burnin_steps
    fields = {name: joined(name) for name in Chunk._fields if name not in ("losses", "mean")}
    return Traces(
        losses=losses[..., start :: settings.thinning],
        burnin=losses[..., :start],
        **flags,
        **fields,  # type: ignore[arg-type]
    )
