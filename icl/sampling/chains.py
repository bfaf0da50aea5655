"""Estimates of LLCs: all chains of all checkpoints under all settings run as one population.

A member is one chain of one checkpoint under some settings. Members are numbered checkpoint by checkpoint and run in chunks
that fit into memory. Each member has its own generator, which is seeded from (seed, checkpoint key, chain) and used outside
`vmap`. So its noise does not depend on the other members.

Draw j is the state after `num_burnin_steps + j * thinning` moves. Its loss is measured on the minibatch of the next move, before
this move. (So without burn-in, draw 0 is the checkpoint.) At each draw we also record the excess: the loss minus the checkpoint's
loss on the same minibatch. This costs one more forward pass, but most of the minibatch noise cancels. `icl.sampling.traces` lists
the other numbers. At some draws (`NUM_TESTS`) we compute the probability that a Metropolis test would accept the next move. Then
the loss at both ends of the move is measured on the minibatch of this draw.

Settings may differ in lr, nbeta and localization only. A checkpoint under several settings occurs several times in the
population, and its chains see the same minibatches and noise each time. Gradients are computed for all members at once. Moves and
records are made separately for each group of members with equal settings. Numbers that depend only on the checkpoint are computed
once.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from icl import rng
from icl.compute.memory import bytes_made_by
from icl.config import ChainsConfig
from icl.config.validation import ConfigError
from icl.model.flat import Layout, make_layout
from icl.model.stacked import Params, size, stack
from icl.sampling import baoab, sgld
from icl.sampling.batches import Batch, ChainBatches, stack_batches, to_device
from icl.sampling.minimum import DropsAtMean, at_checkpoints, losses_by_batch, num_drop_batches
from icl.sampling.result import CheckpointId, LLCResult, make_result
from icl.sampling.target import Observable, Target
from icl.sampling.traces import Draw, Recorder, State, Traces, mean_over_components, split_by_checkpoint
from icl.sampling.variates import Variates, make_variates

NUM_TESTS = {"sgld": 16, "rmsprop": 16, "baoab": 4}
"""Number of moves of each chain for which the acceptance is computed, by kernel. Each costs one more gradient, with `baoab` two."""
MEMORY = 2.0 * 2**30
"""Default memory in bytes for the chains that run at once. On CUDA the default is half of the free memory instead."""
FIRST_CHECK = 100
"""Number of draws after which chains first compare their standard error with `target_stderr`. It grows by an eighth per comparison."""
MAX_EXPECTED = 500
"""Chains that may stop early are expected to make at most this many moves. This limits the work for the loss at their mean."""
_COPIES = 10
"""Number of tensors, each as large as the parameters, that a member needs at once."""

Advance: TypeAlias = Callable[[int], None]
"""Function that is called with the number of moves just made. A move of one chain counts as one."""
Watch: TypeAlias = Callable[[Sequence[int], Sequence[int], Float[Tensor, "N S"]], None]
"""Function that is called while chains run, with each member's checkpoint number, chain number and excess so far, in nats."""
WATCH_SECONDS = 10.0
"""Seconds between two calls of a `Watch`."""
SampleLosses: TypeAlias = Callable[[Params], Float[Tensor, " Q"]]
"""Function from one member's parameters to the losses of Q fixed samples."""


@torch.no_grad()
def estimate(
    target: Target,
    checkpoints: Sequence[Mapping[str, Tensor]],
    settings_grid: Sequence[ChainsConfig],
    *,
    identities: Sequence[CheckpointId],
    layout: Layout | None = None,
    sample_losses: SampleLosses | None = None,
    observables: Mapping[str, Observable] | None = None,
    memory: float | None = None,
    advance: Advance = lambda moves: None,
    watch: Watch | None = None,
) -> list[list[LLCResult]]:
    """Estimate the LLC of each checkpoint under each of some settings, as one population.

    Args:
        target: The loss to sample, with its minibatches.
        checkpoints: Parameters by name, all of one architecture.
        settings_grid: Settings that differ in lr, nbeta and localization only. Chains see the same minibatches and noise under
            each of them.
        identities: Step and hash of each checkpoint.
        layout: Which parameters may move; None for all.
        sample_losses: Function from parameters to the losses of fixed samples, for the singular fluctuation.
        observables: Functions of the parameters whose values are recorded at every draw.
        memory: Memory in bytes for the chains that run at once.
        advance: Called after every move, with the number of chains that made it.
        watch: Called every `WATCH_SECONDS` with the draws so far.

    Returns:
        One list for each element of `settings_grid`, with one result for each checkpoint.

    Raises:
        ConfigError: If settings differ in more than lr, nbeta and localization.
    """
    common = _require_common(settings_grid)
    params = stack([{name: tensor.detach() for name, tensor in member.items()} for member in checkpoints])
    layout = make_layout(checkpoints[0]) if layout is None else layout
    device = next(iter(params.values())).device
    source = ChainBatches(target.batches, common)
    batches, are_all = source.first_distinct(common.num_init_batches, device)
    if target.must_depend:
        target.require_dependence(layout, {name: tensor[:1] for name, tensor in params.items()}, batches[0])
    chunk_size = _chunk_size(target, params, batches[0], layout, memory)
    variates = None
    if common.kernel == "baoab":
        variates = make_variates(target, params, source, common, layout, chunk_size=chunk_size)
    if variates is not None and source.pool is not None and source.pool.size <= common.num_init_batches:
        batches, are_all = [to_device(source.pool.get(i), device) for i in range(source.pool.size)], True
    known = at_checkpoints(target, _chunks(params, chunk_size), batches, settings_grid, layout)
    expected = common.num_moves if common.target_stderr is None else min(common.num_moves, MAX_EXPECTED)
    drop_batches = batches[: num_drop_batches(expected, common.num_chains)]

    def losses_at_mean(params: Params) -> Float[Tensor, "N I"]:
        chunks, losses = _chunks(params, chunk_size), target.losses_on_shared_batch
        return torch.cat([losses_by_batch(losses, chunk, drop_batches).mean(2) for chunk in chunks])

    traces = run_chains(
        target,
        {name: tensor.repeat(len(settings_grid), *[1] * (tensor.ndim - 1)) for name, tensor in params.items()},
        source,
        [settings for settings in settings_grid for _ in checkpoints],
        layout=layout,
        keys=[identity.checkpoint_hash or str(i) for i, identity in enumerate(identities)] * len(settings_grid),
        chunk_size=chunk_size,
        sample_losses=sample_losses,
        observables=observables,
        losses_at_mean=losses_at_mean,
        are_all_losses=are_all and len(drop_batches) == len(batches),
        variates=variates,
        advance=advance,
        watch=watch,
    )
    remaining = iter(traces)
    return [
        [
            make_result(next(remaining), at_checkpoint, settings, identity, target=target, num_params=layout.size)
            for at_checkpoint, identity in zip(row, identities, strict=True)
        ]
        for row, settings in zip(known, settings_grid, strict=True)
    ]


def run_chains(
    target: Target,
    checkpoints: Params,
    source: ChainBatches,
    settings: Sequence[ChainsConfig],
    *,
    layout: Layout,
    keys: Sequence[str],
    chunk_size: int,
    sample_losses: SampleLosses | None = None,
    observables: Mapping[str, Observable] | None = None,
    losses_at_mean: Callable[[Params], Float[Tensor, "N I"]] | None = None,
    are_all_losses: bool = False,
    variates: Variates | None = None,
    advance: Advance = lambda moves: None,
    watch: Watch | None = None,
) -> list[Traces]:
    """Run every chain of every checkpoint; return the traces of each checkpoint.

    Args:
        target: The loss to sample.
        checkpoints: Parameters, stacked on a leading axis C.
        source: Minibatches of the chains.
        settings: The settings of each checkpoint, which differ in lr, nbeta and localization only.
        layout: Layout of the moving parameters in a row.
        keys: A string for each checkpoint, which is part of the seed for the noise of its chains.
        chunk_size: Largest number of members that run at once.
        sample_losses: Function from parameters to the losses of fixed samples. The variance of these losses is recorded.
        observables: Functions of the parameters whose values are recorded at every draw.
        losses_at_mean: Function from stacked parameters to their losses on I batches, for the loss at the mean of the draws.
        are_all_losses: Whether the I batches are all the data.
        variates: Control variates for the gradients and the excess.
        advance: As for `estimate`.
        watch: As for `estimate`.
    """
    num_chains = settings[0].num_chains
    num_members = size(checkpoints) * num_chains
    if settings[0].target_stderr is None:
        chunk_size = even_chunks(num_members, chunk_size)
    elif target.vectorize and chunk_size < num_chains:
        raise ConfigError(
            f"`target_stderr` needs all {num_chains} chains of a checkpoint at once, but only {chunk_size} fit into memory: lower "
            "`num_chains`, or raise `memory`."
        )
    else:
        chunk_size = num_chains  # the chains of each checkpoint stop on their own
    rows, fixed = layout.to_rows(checkpoints), layout.fixed(checkpoints)
    stacked_samples = None if sample_losses is None else target.map_members(sample_losses)
    observed = {name: target.map_members(observable) for name, observable in (observables or {}).items()}
    population = _Population(target, source, settings, layout, rows, fixed, keys, stacked_samples, observed, variates)
    drops = None
    if losses_at_mean is not None:
        drops = DropsAtMean(losses_at_mean, are_all_losses, layout, rows, fixed, num_chains)
    parts: list[Traces] = []
    for first in range(0, num_members, chunk_size):
        for traces in population.run(range(first, min(first + chunk_size, num_members)), advance, watch):
            if drops is not None:
                assert traces.mean_position is not None
                drops.add(traces.mean_position, traces.alive)
            # The positions are the largest part of the traces, so they are released at once.
            parts.append(traces._replace(mean_position=None))
    # If chains may stop early, each part belongs to one checkpoint, and parts differ in length.
    split = parts if settings[0].target_stderr is not None else split_by_checkpoint(parts, num_chains)
    by_checkpoint = [
        traces._replace(share_batches=source.is_shared(), one_batch=source.is_one(), few_batches=source.is_short_list())
        for traces in split
    ]
    if drops is None:
        return by_checkpoint
    return [traces._replace(drop_at_mean=drop) for traces, drop in zip(by_checkpoint, drops.drops, strict=True)]


def even_chunks(num: int, most: int) -> int:
    """Return a chunk size of at most `most`, if possible one that divides `num` into equal chunks.

    Equal chunks are better, because a gradient that is compiled for a GPU is compiled again for every size. But if they would be
    smaller than about half of `most`, the last chunk is smaller than the others.
    """
    num_chunks = -(-num // most)
    equal = (num // count for count in range(num_chunks, 2 * num_chunks + 1) if num % count == 0)
    return next(equal, -(-num // num_chunks))


def _require_common(settings: Sequence[ChainsConfig]) -> ChainsConfig:
    """Return the first settings, after a check that the others differ from it in lr, nbeta and localization only."""
    first = settings[0]
    for other in settings:
        if dataclasses.replace(other, lr=first.lr, nbeta=first.nbeta, localization=first.localization) != first:
            raise ConfigError(
                f"Chains that run together may differ in lr, nbeta and localization only, got {first} and {other}."
            )
    return first


def _chunks(params: Params, chunk_size: int) -> list[Params]:
    starts = range(0, size(params), chunk_size)
    return [{name: tensor[i : i + chunk_size] for name, tensor in params.items()} for i in starts]


def _chunk_size(target: Target, params: Params, batch: Batch, layout: Layout, memory: float | None) -> int:
    """Return the number of members that fit into memory together: at least one, and one if `target.vectorize` is False."""
    if not target.vectorize:
        return 1
    member = {name: tensor[:1] for name, tensor in params.items()}
    device = next(iter(member.values())).device
    if memory is None:
        memory = torch.cuda.mem_get_info(device)[0] / 2 if device.type == "cuda" else MEMORY
    rows, fixed, stacked = layout.to_rows(member), layout.fixed(member), stack_batches([batch], device)
    needed = bytes_made_by(lambda: target.default_gradient(layout, rows, fixed, stacked))
    return max(1, int(memory // (needed + _COPIES * sum(tensor.nbytes for tensor in member.values()))))


class Kernel(NamedTuple):
    """A Markov kernel with its settings."""

    init: Callable[[Tensor], Any]
    step: Callable[..., Any]
    log_acceptance: Callable[..., Tensor]
    adapt: Callable[[Any, Tensor], Any] = lambda state, grad: state
    """Function that adapts the state to a gradient during burn-in."""


def _kernel(settings: ChainsConfig) -> Kernel:
    density: dict[str, Any] = {
        "lr": settings.lr,
        "nbeta": settings.inverse_temperature,
        "localization": settings.localization,
    }
    if settings.kernel == "baoab":
        moving = density | {"friction": settings.friction}
        return Kernel(baoab.init, partial(baoab.step, **moving), partial(baoab.log_acceptance, **moving))
    move, test = partial(sgld.step, **density), partial(sgld.log_mala_acceptance, **density)
    if settings.kernel == "rmsprop":
        return Kernel(sgld.init_rmsprop, move, test, sgld.adapt_rmsprop)
    return Kernel(sgld.init, move, test)


class _Population(NamedTuple):
    """All members of a population. `run` runs some of them at a time."""

    target: Target
    source: ChainBatches
    settings: Sequence[ChainsConfig]
    """The settings of each checkpoint."""
    layout: Layout
    checkpoints: Float[Tensor, "C P"]
    """The moving parameters of each checkpoint."""
    fixed: Params
    keys: Sequence[str]
    """A string for each checkpoint, which is part of the seed for the noise of its chains."""
    sample_losses: Callable[[Params], Tensor] | None
    """Function from stacked parameters to the losses of fixed samples."""
    observables: Mapping[str, Callable[[Params], Tensor]]
    """Functions of stacked parameters."""
    variates: Variates | None

    def run(self, members: range, advance: Advance, watch: Watch | None) -> list[Traces]:
        """Make all moves of some members; return the traces of each group of equal settings."""
        common, device = self.settings[0], self.checkpoints.device
        checkpoints, chains = [m // common.num_chains for m in members], [m % common.num_chains for m in members]
        index = torch.tensor(checkpoints, device=device)
        # Tensors that all checkpoints share (length 1) are expanded, not copied.
        fixed = {n: t.expand(len(index), *t.shape[1:]) if len(t) == 1 else t[index] for n, t in self.fixed.items()}
        start = self.checkpoints[index]
        groups = self._groups(checkpoints, chains, start, fixed)
        anchors, sizes = self.layout.to_params(start, fixed), [group.size for group in groups]
        # Chains that may stop early are tested as often as chains of FIRST_CHECK draws.
        num_draws = common.num_draws if common.target_stderr is None else min(common.num_draws, FIRST_CHECK)
        next_check, next_look = FIRST_CHECK, time.monotonic() + WATCH_SECONDS
        for move in range(common.num_moves):
            batch = self._minibatch(checkpoints, chains, move)
            here = self._points(groups, fixed, batch)
            draw, remainder = divmod(move - common.num_burnin_steps, common.thinning)
            is_draw = draw >= 0 and remainder == 0
            is_tested = is_draw and draw % -(-num_draws // NUM_TESTS[common.kernel]) == 0
            if is_tested and common.kernel == "baoab" and not self.source.is_one():
                # The gradients at the same positions on other minibatches give the variance of the minibatch noise.
                others = self._points(groups, fixed, self._minibatch(checkpoints, chains, move - 1 if move else 1))
                for group, point, other in zip(groups, here, others, strict=True):
                    group.gradient_variance = (point.grad - other.grad).square().sum(1) / 2
            if is_draw:
                losses = batch.anchor_losses
                if losses is None:
                    losses = self.target.losses_on_own_batches(anchors, batch.content)
                for group, point, anchor_losses in zip(groups, here, losses.split(sizes), strict=True):
                    group.record_draw(point, anchor_losses)
            proposals = [group.propose(point) for group, point in zip(groups, here, strict=True)]
            if is_tested:
                there = self._points(groups, fixed, batch, proposals)
                for group, proposal, *ends in zip(groups, proposals, here, there, strict=True):
                    group.record_acceptance(proposal, *ends)
            for group, point, proposal in zip(groups, here, proposals, strict=True):
                group.move(proposal, point.grad, adapting=move < common.num_burnin_steps)
            advance(len(members))
            if watch is not None and is_draw and time.monotonic() >= next_look:
                watch(checkpoints, chains, torch.cat([group.recorder.nats() for group in groups]).cpu())
                next_look = time.monotonic() + WATCH_SECONDS
            if common.target_stderr is not None and is_draw and groups[0].recorder.num_draws == next_check:
                if groups[0].recorder.is_precise(common.target_stderr):
                    advance(len(members) * (common.num_moves - move - 1))
                    break
                next_check += max(1, next_check // 8)
        return self._mark_bad_data([group.recorder.traces() for group in groups], checkpoints, chains, fixed)

    def _mark_bad_data(
        self, parts: Sequence[Traces], checkpoints: Sequence[int], chains: Sequence[int], fixed: Params
    ) -> list[Traces]:
        """Mark the chains that met a minibatch on which the loss or its gradient is not finite even at the checkpoint."""
        is_bad = torch.zeros(len(chains), dtype=torch.bool)
        first_bad = torch.cat([traces.first_not_finite for traces in parts])
        for member in first_bad.isfinite().nonzero().flatten().tolist():
            rows = self.checkpoints[checkpoints[member]][None]
            own = {name: tensor[member : member + 1] for name, tensor in fixed.items()}
            # A gradient that is not finite makes the loss non-finite one move later.
            for move in {int(first_bad[member]), max(0, int(first_bad[member]) - 1)}:
                batch = self.source.stacked([chains[member]], move, rows.device)
                values = self.target.chain_gradient(self.layout, rows, own, batch)
                is_bad[member] |= not all(bool(value.isfinite().all()) for value in values)
        sizes = [len(traces.alive) for traces in parts]
        return [traces._replace(bad_data=bad) for traces, bad in zip(parts, is_bad.split(sizes), strict=True)]

    def _groups(
        self, checkpoints: Sequence[int], chains: Sequence[int], start: Float[Tensor, "N P"], fixed: Params
    ) -> list["_Group"]:
        streams = [f"llc/noise/{self.keys[i]}/{chain}" for i, chain in zip(checkpoints, chains, strict=True)]
        seeds = [int(rng.stream(self.settings[0].seed, stream).low) for stream in streams]
        groups, first = [], 0
        for settings, members in groupby(self.settings[i] for i in checkpoints):
            rows = slice(first, first + len(list(members)))
            params = partial(self.layout.to_params, fixed={name: tensor[rows] for name, tensor in fixed.items()})
            recorder = Recorder(settings, self.layout.size, self.sample_losses, self.observables)
            has_excess_variate = self.variates is not None and self.variates.is_uniform
            groups.append(_Group(settings, start[rows], seeds[rows], params, recorder, has_excess_variate))
            first = rows.stop
        return groups

    def _minibatch(self, checkpoints: Sequence[int], chains: Sequence[int], move: int) -> "_Minibatch":
        """Return the minibatches of all members at a move."""
        content = self.source.stacked(chains, move, self.checkpoints.device)
        if self.variates is None:
            return _Minibatch(content)
        return _Minibatch(content, *self.variates.of_members(checkpoints, chains, move))

    def _points(
        self,
        groups: Sequence["_Group"],
        fixed: Params,
        batch: "_Minibatch",
        states: Sequence[State] | None = None,
    ) -> list["_Point"]:
        """Return the gradients and losses of all members, split by group, at `states` or by default at their present states."""
        states = [group.state for group in groups] if states is None else states
        sizes = [group.size for group in groups]
        # A single group, the usual case, needs no copy.
        rows = states[0].position if len(states) == 1 else torch.cat([state.position for state in states])
        grads, losses = self.target.chain_gradient(self.layout, rows, fixed, batch.content)
        if batch.deviation is None:
            return [_Point(*parts) for parts in zip(grads.split(sizes), losses.split(sizes), strict=True)]
        moved = torch.cat([state.position - state.anchor for state in states])
        columns = grads - batch.deviation, losses, torch.linalg.vecdot(batch.deviation, moved)
        return [_Point(*parts) for parts in zip(*(column.split(sizes) for column in columns), strict=True)]


class _Minibatch(NamedTuple):
    """The minibatches of N members at a move."""

    content: Batch
    """The batches, stacked on a leading axis N."""
    deviation: Float[Tensor, "N P"] | None = None
    """The control variate of the gradients (`icl.sampling.variates`)."""
    anchor_losses: Float[Tensor, "N *T"] | None = None
    """Losses of the checkpoints on these minibatches, if the control variates have them."""


class _Point(NamedTuple):
    """Gradients and losses of N members on their minibatches."""

    grad: Float[Tensor, "N P"]
    """Gradient of L minus its control variate."""
    losses: Float[Tensor, "N *T"]
    shift: Float[Tensor, " N"] | None = None
    """Control variate of the losses."""

    @property
    def energy(self) -> Float[Tensor, " N"]:
        """The loss whose gradient is `grad`."""
        losses = mean_over_components(self.losses)
        return losses if self.shift is None else losses - self.shift


class _Group:
    """Consecutive members with equal settings: their states, kernel and records."""

    def __init__(
        self,
        settings: ChainsConfig,
        start: Float[Tensor, "N P"],
        seeds: Sequence[int],
        params: Callable[[Tensor], Params],
        recorder: Recorder,
        has_excess_variate: bool,
    ) -> None:
        self.settings, self.kernel, self.params, self.recorder = settings, _kernel(settings), params, recorder
        self.state, self.size = self.kernel.init(start), len(start)
        self.noise = self._noise(seeds)
        self.has_excess_variate = has_excess_variate
        self.gradient_variance: Tensor | float = 0.0

    def record_draw(self, point: _Point, anchor_losses: Float[Tensor, "N *T"]) -> None:
        """Record the present state as a draw."""
        excess = point.losses - anchor_losses
        shift: Tensor | float = 0.0 if point.shift is None else point.shift
        if isinstance(shift, Tensor) and self.has_excess_variate:
            excess, shift = excess - shift.view(-1, *[1] * (excess.ndim - 1)), 0.0
        draw = Draw(self.state, point.grad, self.settings, shift, self.gradient_variance)
        self.recorder.add_draw(draw, excess, partial(self.params, self.state.position))

    def propose(self, point: _Point) -> State:
        """Record the losses at the present state, and return the proposed next state."""
        self.recorder.add_losses(point.losses)
        return self.kernel.step(self.state, point.grad, next(self.noise))

    def record_acceptance(self, proposal: State, here: _Point, there: _Point) -> None:
        """Record the probability that a Metropolis test would accept the proposal, from gradients and losses at both ends."""
        grads, losses = (here.grad, there.grad), (here.energy, there.energy)
        self.recorder.acceptance.append(self.kernel.log_acceptance(self.state, proposal, grads, losses).exp())

    def move(self, proposal: State, grad: Float[Tensor, "N P"], *, adapting: bool) -> None:
        """Replace the state by the proposal. If `adapting`, also adapt the kernel to the gradient."""
        self.state = self.kernel.adapt(proposal, grad) if adapting else proposal

    def _noise(self, seeds: Sequence[int]) -> Iterator[Tensor]:
        """Yield standard normals for each move, in one buffer that is reused. Each row comes from its member's own generator."""
        buffer = torch.zeros_like(self.state.position)
        rows = buffer[:, : self.recorder.num_params].unbind()  # the padding stays zero, so chains do not move there
        generators = [torch.Generator(buffer.device).manual_seed(seed) for seed in seeds]
        while True:
            for row, generator in zip(rows, generators, strict=True):
                row.normal_(generator=generator)
            yield buffer
