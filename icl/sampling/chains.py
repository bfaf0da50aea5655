"""Chains of a population: the moves of all members, and their draws.

A member is one chain of one checkpoint (`icl.sampling.estimate`). Each member has its own generator, which is used outside `vmap`. Its seed
is computed from `seed`, the checkpoint's key and the index of the chain. So the noise of a member does not depend on the other members.

Draw j is the state after `num_burnin_steps + j * thinning` moves. (So without burn-in, draw 0 is the checkpoint.) We measure the draw's
loss on the minibatch of the next move, before the chain moves. At each draw we also record the excess: the loss minus the checkpoint's loss
on the same minibatch. The excess needs one more forward pass for each new minibatch, but most of the minibatch noise cancels in the
difference. `icl.sampling.traces` lists the other recorded numbers. At a few draws of a chain (`NUM_TESTS` is the upper limit) we compute
the probability that a Metropolis test would accept the next move. For this test, the losses at both ends of the move are measured on the
draw's minibatch.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from icl import rng
from icl.compute.calls import in_parallel
from icl.config import ChainsConfig
from icl.model.flat import Layout
from icl.model.stacked import Params
from icl.sampling.at_checkpoint import AnchorLosses, Variates
from icl.sampling.batches import Batch, ChainBatches
from icl.sampling.kernels import NUM_TESTS, SGLDState, State, kernel_of
from icl.sampling.target import Target
from icl.sampling.traces import Draw, Recorder, Traces, mean_over_components

FIRST_CHECK = 100
"""Number of draws after which the chains' standard error is first compared with `target_stderr`. Each later comparison is made when the
number of draws has grown by an eighth."""

Advance: TypeAlias = Callable[[int], None]
"""Function that is called with the number of moves just made. A move of one chain counts as one. If chains stop early, the moves that they
skip are counted too."""
Watch: TypeAlias = Callable[[Sequence[int], Sequence[int], Float[Tensor, "N S"]], None]
"""Function that is called while chains run. Its arguments are the index of each member's checkpoint, the index of its chain, and its excess
at all draws so far, in nats."""
WATCH_SECONDS = 10.0
"""Minimum number of seconds between two calls of a `Watch` function."""
_NUM_NOISE_TESTS = 4
"""Largest number of draws at which the variance of a chain's gradient over minibatches is measured."""
_LARGE = 2**16
"""Minimum number of parameters at which the CPU cores draw the noise of several members in parallel."""
_STRIDE = 7919
"""A prime number, with which `Population._other_move` varies the distance between two minibatches of a list."""
SampleLosses: TypeAlias = Callable[[Params], Float[Tensor, " Q"]]
"""Function from one member's parameters to the losses of Q fixed samples."""


class Population(NamedTuple):
    """All members of a population. Each call of `run` makes all moves of some of these members."""

    target: Target
    source: ChainBatches
    settings: Sequence[ChainsConfig]
    """The settings of the chains of each checkpoint."""
    layout: Layout
    checkpoints: Float[Tensor, "C P"]
    """The sampled parameters of each checkpoint."""
    fixed: Params
    keys: Sequence[str]
    """A string for each checkpoint. The seeds for the noise of a checkpoint's chains depend on this string."""
    sample_losses: Callable[[Params], Tensor] | None
    """Function from stacked parameters to the losses of fixed samples."""
    observables: Mapping[str, Callable[[Params], Tensor]]
    """Functions of stacked parameters."""
    variates: Variates | None

    def run(self, members: range, advance: Advance, watch: Watch | None) -> list[Traces]:
        """Make all moves of some members. Return one `Traces` for each group of members with equal settings."""
        common, device = self.settings[0], self.checkpoints.device
        checkpoints, chains = [m // common.num_chains for m in members], [m % common.num_chains for m in members]
        index = torch.tensor(checkpoints, device=device)
        # Tensors that all checkpoints share (length 1) are expanded, not copied.
        fixed = {n: t.expand(len(index), *t.shape[1:]) if len(t) == 1 else t[index] for n, t in self.fixed.items()}
        start = self.checkpoints[index]
        groups = self._groups(checkpoints, chains, start, fixed)
        anchors, sizes = self.layout.to_params(start, fixed), [group.size for group in groups]
        anchor_losses = AnchorLosses(self.source)
        # If chains may stop early, the Metropolis tests are spaced as for chains of FIRST_CHECK draws.
        num_draws = common.num_draws if common.target_stderr is None else min(common.num_draws, FIRST_CHECK)
        next_check, next_look = FIRST_CHECK, time.monotonic() + WATCH_SECONDS
        for move in range(common.num_moves):
            batch = self._minibatch(checkpoints, chains, move)
            here = self._points(groups, fixed, batch)
            draw, remainder = divmod(move - common.num_burnin_steps, common.thinning)
            is_draw = draw >= 0 and remainder == 0
            is_tested = is_draw and draw % -(-num_draws // NUM_TESTS[common.kernel]) == 0
            # The measured variance is used until it is measured again.
            if is_draw and draw % -(-num_draws // _NUM_NOISE_TESTS) == 0 and self._measures_noise():
                others = self._points(groups, fixed, self._minibatch(checkpoints, chains, self._other_move(move)))
                for group, point, other in zip(groups, here, others, strict=True):
                    group.measure_noise(point, other)
            if is_draw:
                losses = batch.anchor_losses
                if losses is None:
                    compute = partial(self.target.losses_on_own_batches, anchors, batch.content)
                    losses = anchor_losses.of_members(checkpoints, chains, move, compute)
                for group, point, own_losses in zip(groups, here, losses.split(sizes), strict=True):
                    group.record_draw(point, own_losses)
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

    def _cycles(self) -> bool:
        """Return whether the chains go through the same minibatches again and again, without control variates."""
        return self.source.is_cyclic and self.variates is None

    def _measures_noise(self) -> bool:
        """Return whether the bound on the bias needs the variance of the gradient over minibatches."""
        return self._cycles() or (self.settings[0].kernel == "baoab" and not self.source.is_one())

    def _other_move(self, move: int) -> int:
        """Return another move, at which the chains have other minibatches.

        For a list of minibatches, the distance to this other move varies from move to move, because a list may be sorted.
        """
        pool = self.source.pool
        if pool is None or not self._cycles():
            return move - 1 if move else 1
        return move + 1 + _STRIDE * move % (pool.size - 1)

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
            groups.append(
                _Group(settings, start[rows], seeds[rows], params, recorder, has_excess_variate, self._cycles())
            )
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
        """Return the gradients and losses of all members at `states` (by default at the present states), split by group."""
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
    """The control variate of the gradients (`icl.sampling.at_checkpoint`)."""
    anchor_losses: Float[Tensor, "N *T"] | None = None
    """Losses of the checkpoints on these minibatches, if they are known from the control variates."""


class _Point(NamedTuple):
    """Gradients and losses of N members on their minibatches."""

    grad: Float[Tensor, "N P"]
    """Gradient of L minus its control variate."""
    losses: Float[Tensor, "N *T"]
    shift: Float[Tensor, " N"] | None = None
    """Control variate of the losses."""

    @property
    def energy(self) -> Float[Tensor, " N"]:
        """The loss minus its control variate. The gradient of this difference is `grad`."""
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
        cycles: bool,
    ) -> None:
        self.settings, self.kernel, self.params, self.recorder = settings, kernel_of(settings), params, recorder
        self.state, self.size = self.kernel.init(start), len(start)
        self.noise = self._noise(seeds)
        self.has_excess_variate, self.cycles = has_excess_variate, cycles
        self.gradient_variance: Tensor | float = 0.0

    def measure_noise(self, point: _Point, other: _Point) -> None:
        """Measure the variance of the minibatch noise, from gradients at the same positions on two minibatches."""
        squares = (point.grad - other.grad).square()
        g = self.state.preconditioner if isinstance(self.state, SGLDState) else None
        self.gradient_variance = (squares if g is None else g * squares).sum(1) / 2

    def record_draw(self, point: _Point, anchor_losses: Float[Tensor, "N *T"]) -> None:
        """Record the present state as a draw."""
        excess = point.losses - anchor_losses
        shift: Tensor | float = 0.0 if point.shift is None else point.shift
        if isinstance(shift, Tensor) and self.has_excess_variate:
            excess, shift = excess - shift.view(-1, *[1] * (excess.ndim - 1)), 0.0
        draw = Draw(self.state, point.grad, self.settings, shift, self.gradient_variance, self.cycles)
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
        rows = buffer[:, : self.recorder.num_params].unbind()  # the padding columns get no noise, so they stay zero
        generators = [torch.Generator(buffer.device).manual_seed(seed) for seed in seeds]
        members = list(zip(rows, generators, strict=True))
        # Drawing the noise of a large model takes as long as its gradient, so the CPU cores share the members between them.
        in_threads = buffer.device.type == "cpu" and self.recorder.num_params >= _LARGE
        fill_each = in_parallel(_fill_with_noise)
        while True:
            if in_threads:
                fill_each(members)
            else:
                for member in members:
                    _fill_with_noise(*member)
            yield buffer


def _fill_with_noise(row: Tensor, generator: torch.Generator) -> None:
    row.normal_(generator=generator)
