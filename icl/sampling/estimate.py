"""Estimates of LLCs: all chains of all checkpoints under all settings run as one population.

A member is one chain of one checkpoint under one choice of settings. Members are numbered checkpoint by checkpoint and run in chunks
that fit into memory. `icl.sampling.chains` runs the members of a chunk.

A caller may give several settings, which differ in lr, nbeta and localization only. The population then contains the chains of every
checkpoint once for each of these settings, with the same minibatches and noise each time. Gradients are computed for all members at once.
Moves and records are made separately for each group of members with equal settings. Numbers that depend only on the checkpoint are computed
once.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from icl.compute.calls import keep_freed_memory
from icl.compute.devices import bytes_made_by
from icl.config import ChainsConfig
from icl.config.validation import ConfigError
from icl.model.flat import Layout, make_layout
from icl.model.stacked import Params, size, stack
from icl.sampling.at_checkpoint import (
    DropsAtMean,
    Variates,
    at_checkpoints,
    losses_by_batch,
    make_variates,
    num_drop_batches,
)
from icl.sampling.batches import Batch, ChainBatches, stack_batches, to_device
from icl.sampling.chains import Advance, Population, SampleLosses, Watch
from icl.sampling.result import CheckpointId, LLCResult, make_result
from icl.sampling.target import Observable, Target
from icl.sampling.traces import Traces, split_by_checkpoint

MEMORY = 2.0 * 2**30
"""Default memory in bytes for the chains that run at once. On CUDA the default is half of the free memory instead."""
MAX_EXPECTED = 500
"""Chains that may stop early are assumed to make at most this many moves. The number of batches for the loss at the mean of the draws
depends on this assumption."""
_COPIES = 10
"""Memory that a member needs in addition to its gradient computation, as a multiple of the memory of its parameters."""


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
    """Estimate the LLC of each checkpoint under each of several settings, with all chains as one population.

    Args:
        target: The loss to sample, with its minibatches.
        checkpoints: Parameters of each checkpoint, keyed by name. All have the same architecture.
        settings_grid: Settings that differ in lr, nbeta and localization only. The chains get the same minibatches and noise under all of
            these settings.
        identities: Step and hash of each checkpoint.
        layout: The parameters that may move, as a layout; None for all.
        sample_losses: Function from parameters to the losses of fixed samples, for the singular fluctuation.
        observables: Functions of the parameters, keyed by name. Their values are recorded at every draw.
        memory: Memory in bytes for the chains that run at once; None for the default (`MEMORY`).
        advance: Function that is called after every move, with the number of chains that made this move.
        watch: Function that is called about every `WATCH_SECONDS` seconds, with each chain's excess at all draws so far. `Watch` in
            `icl.sampling.chains` describes its arguments.

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
    known = at_checkpoints(target, _chunks(params, chunk_size), batches, settings_grid, layout, are_all=are_all)
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
    """Run every chain of every checkpoint, and return the traces of each checkpoint.

    Args:
        target: The loss to sample.
        checkpoints: Parameters, stacked on a leading axis C.
        source: Minibatches of the chains.
        settings: The settings for the chains of each checkpoint. They differ in lr, nbeta and localization only.
        layout: How the moving parameters are arranged in one row of a matrix.
        keys: A string for each checkpoint. The seeds for the noise of a checkpoint's chains depend on this string.
        chunk_size: Largest number of members that run at once.
        sample_losses: Function from parameters to the losses of fixed samples. The variance of these losses is recorded.
        observables: Functions of the parameters, keyed by name. Their values are recorded at every draw.
        losses_at_mean: Function from stacked parameters to their losses on I batches. If it is None, the drop at the mean is not measured.
        are_all_losses: Whether the I batches are all the data.
        variates: Control variates for the gradients and the excess.
        advance: See `estimate`.
        watch: See `estimate`.
    """
    keep_freed_memory()
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
        chunk_size = num_chains  # the chains of a checkpoint stop independently of other checkpoints
    rows, fixed = layout.to_rows(checkpoints), layout.fixed(checkpoints)
    stacked_samples = None if sample_losses is None else target.map_members(sample_losses)
    observed = {name: target.map_members(observable) for name, observable in (observables or {}).items()}
    population = Population(target, source, settings, layout, rows, fixed, keys, stacked_samples, observed, variates)
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

    Equal chunks are better, because a gradient for a GPU is compiled again for every size. But if equal chunks would be smaller than about
    half of `most`, the last chunk is smaller than the others.
    """
    num_chunks = -(-num // most)
    equal = (num // count for count in range(num_chunks, 2 * num_chunks + 1) if num % count == 0)
    return next(equal, -(-num // num_chunks))


def _require_common(settings: Sequence[ChainsConfig]) -> ChainsConfig:
    """Check that the settings differ in lr, nbeta and localization only, and return the first of them."""
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
    """Return how many members fit into memory together: at least one, and exactly one if `target.vectorize` is False."""
    if not target.vectorize:
        return 1
    member = {name: tensor[:1] for name, tensor in params.items()}
    device = next(iter(member.values())).device
    if memory is None:
        memory = torch.cuda.mem_get_info(device)[0] / 2 if device.type == "cuda" else MEMORY
    gradient = target.default_gradient
    if target.part is not None:
        batch, gradient = target.part(member, batch), target.chain_gradient
    rows, fixed, stacked = layout.to_rows(member), layout.fixed(member), stack_batches([batch], device)
    needed = bytes_made_by(lambda: gradient(layout, rows, fixed, stacked))
    return max(1, int(memory // (needed + _COPIES * sum(tensor.nbytes for tensor in member.values()))))
