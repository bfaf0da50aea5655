"""Estimates of checkpoints x settings x chains as one population, from the losses to the verdicts.

What depends on a checkpoint alone (its loss on many batches, and the way down from it) is computed once, whatever the number
of settings that its chains are run under.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils import _pytree as pytree

from icl.flat import Layout
from icl.sampling import drop_at_mean
from icl.sampling.batches import Batch, batch_function, fingerprint, stack_batches
from icl.sampling.chains import Progress, run_chains
from icl.sampling.gradients import allocated_bytes, stacked_loss, vmapped_gradient
from icl.sampling.minimum import drop, gain, slope
from icl.sampling.restriction import Restriction, restricted_layout
from icl.sampling.result import CheckpointId, LLCResult, make_result
from icl.sampling.settings import SamplerSettings
from icl.sampling.target import Target
from icl.sampling.verdict import AtCheckpoint
from icl.stacked import Params, size, stack

MEMORY = 2.0 * 2**30
"""Default bytes that chains running at once may need; on CUDA it is half of the free memory."""
_COPIES = 10
"""Number of tensors of the size of the parameters that a member holds at once."""


def estimate(
    target: Target,
    checkpoints: Sequence[Mapping[str, Tensor]],
    settings_grid: Sequence[SamplerSettings],
    *,
    identities: Sequence[CheckpointId],
    restrict: Restriction = None,
    num_samples: int | None = None,
    num_init_batches: int = 32,
    sample_losses: Callable[[Params], Float[Tensor, " Q"]] | None = None,
    memory: float | None = None,
    progress: Progress | None = None,
) -> list[list[LLCResult]]:
    """Estimate the LLC of each checkpoint under each of some settings, as one population.

    Args:
        target: What is sampled.
        checkpoints: Parameters by name, all of one architecture.
        settings_grid: Settings that differ in lr, nbeta and localization only; chains see the same minibatches and noise under each.
        identities: Step and hash of each checkpoint.
        restrict: Which parameters may move.
        num_samples: The sample size n.
        num_init_batches: Number of distinct batches for the checkpoint's own loss.
        sample_losses: Function from parameters to the losses of fixed samples, for the singular fluctuation.
        memory: Bytes that the chains running at once may need.
        progress: Called with the moves done and their total, over all chains.

    Returns:
        A list for each settings, with a result for each checkpoint.
    """
    common = settings_grid[0]
    params = {name: tensor.detach() for name, tensor in stack([_detached(one) for one in checkpoints]).items()}
    layout = restricted_layout(checkpoints[0], restrict)
    source = batch_function(target.batches, num_chains=common.num_chains, seed=common.seed)
    device = next(iter(params.values())).device
    distinct = _distinct_batches(source, common, num_init_batches)
    batches = [_on(batch, device) for batch in distinct.batches]
    members = _chunk_size(target, params, batches[0], layout, memory)
    at_checkpoints = _at_checkpoints(target, params, batches, settings_grid, layout, members)
    drop_batches = batches[: drop_at_mean.num_batches(common.num_moves, common.num_chains)]
    traces = run_chains(
        target.chain_gradient,
        target.losses_on_own_batches,
        {name: tensor.repeat(len(settings_grid), *[1] * (tensor.ndim - 1)) for name, tensor in params.items()},
        source,
        [settings for settings in settings_grid for _ in checkpoints],
        layout=layout,
        keys=[identity.checkpoint_hash or str(i) for i, identity in enumerate(identities)] * len(settings_grid),
        chunk_size=members,
        sample_losses=_mapped(sample_losses, vectorize=target.vectorize),
        losses_at_mean=drop_at_mean.BatchLosses(
            partial(_losses_on, target.losses_on_shared_batch, drop_batches, members),
            distinct.are_all and len(drop_batches) == len(batches),
        ),
        progress=progress,
    )
    finish = partial(make_result, num_samples=num_samples, loss_name=target.name)
    rows = iter(traces)
    return [
        [finish(next(rows), known, settings, identity) for known, identity in zip(row, identities, strict=True)]
        for row, settings in zip(at_checkpoints, settings_grid, strict=True)
    ]


def _at_checkpoints(
    target: Target,
    params: Params,
    batches: Sequence[Batch],
    settings_grid: Sequence[SamplerSettings],
    layout: Layout,
    members: int,
) -> list[list[AtCheckpoint]]:
    """The checkpoints' own losses, and what a step down gains under each settings."""
    losses, gradient = target.losses_on_shared_batch, target.default_gradient
    if next(iter(params.values())).device.type == "cpu":
        gradient = (
            target.chain_gradient
        )  # elsewhere it may be one graph, and would be compiled again for so few members
    ratios = [float(f"{settings.localization / settings.nbeta:.6g}") for settings in settings_grid]
    init: list[Tensor] = []
    drops: dict[float, list[Tensor]] = {ratio: [] for ratio in ratios}
    with torch.no_grad():
        for part in _in_chunks(params, members):
            init.append(_losses_by_batch(losses, part, batches))
            finite = init[-1].isfinite().all(2).all(0).tolist()
            usable = [batch for batch, is_usable in zip(batches, finite, strict=True) if is_usable] or batches
            down = slope(gradient, losses, part, usable, layout=layout)
            for ratio, found in drops.items():
                found.append(drop(down, ratio))
    whole, table = torch.cat(init), []
    for ratio, settings in zip(ratios, settings_grid, strict=True):
        gains = [gain(part, settings.nbeta) for part in drops[ratio]]  # each part has its own batches
        means, errors = (torch.cat(parts).tolist() for parts in zip(*gains, strict=True))
        table.append(
            [
                AtCheckpoint(own, descent, stderr, target.trivial_loss, layout.size)
                for own, descent, stderr in zip(whole, means, errors, strict=True)
            ]
        )
    return table


def _detached(params: Mapping[str, Tensor]) -> Params:
    return {name: tensor.detach() for name, tensor in params.items()}


class _Distinct(NamedTuple):
    """Different batches that the chains are dealt."""

    batches: list[Batch]
    are_all: bool
    """Whether others were looked for in vain."""


def _distinct_batches(source: Callable[[int, int], Batch], settings: SamplerSettings, wanted: int) -> _Distinct:
    """The first `wanted` different batches that the chains are dealt, or all there are."""
    found: dict[bytes, Batch] = {}
    repeats, patience = 0, 2 * settings.num_chains
    for number in range(settings.num_moves * settings.num_chains):
        draw, chain = divmod(number, settings.num_chains)
        batch = source(chain, draw)
        repeats = repeats + 1 if found.setdefault(fingerprint(batch), batch) is not batch else 0
        if len(found) == wanted or repeats > patience + len(found):
            break
    return _Distinct(list(found.values()), repeats > patience + len(found))


def _losses_by_batch(losses: Callable[[Params, Batch], Tensor], params: Params, batches: Sequence[Batch]) -> Tensor:
    """Of every checkpoint on every batch, (C, batches, T), in float64 on the CPU; T = 1 for a number."""
    values = [losses(params, batch) for batch in batches]
    return torch.stack([v if v.ndim > 1 else v[:, None] for v in values], dim=1).double().cpu()


def _losses_on(
    losses: Callable[[Params, Batch], Tensor], batches: Sequence[Batch], members: int, params: Params
) -> Float[Tensor, "N I"]:
    """Of stacked parameters on each batch, so many members at once."""
    return torch.cat([_losses_by_batch(losses, part, batches).mean(2) for part in _in_chunks(params, members)])


def _on(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device, as the stacked ones are."""
    return pytree.tree_map(lambda x: x[0] if isinstance(x, Tensor) else x, stack_batches([batch], device))


def _chunk_size(target: Target, params: Params, batch: Batch, layout: Layout, memory: float | None) -> int:
    """Members that fit the memory together, at least one; one where they are not mapped."""
    if not target.vectorize:
        return 1
    one = {name: tensor[:1] for name, tensor in params.items()}
    device = next(iter(one.values())).device
    if memory is None:
        memory = torch.cuda.mem_get_info(device)[0] / 2 if device.type == "cuda" else MEMORY
    gradient = partial(vmapped_gradient(target.loss), layout, layout.to_rows(one), layout.fixed(one))
    with torch.no_grad():
        need = allocated_bytes(gradient, stack_batches([batch], device))
    need += _COPIES * sum(tensor.nbytes for tensor in one.values())
    return max(1, int(memory // need))


def _in_chunks(params: Params, members: int) -> list[Params]:
    starts = range(0, size(params), members)
    return [{name: tensor[i : i + members] for name, tensor in params.items()} for i in starts]


def _mapped(sample_losses: Callable[[Params], Tensor] | None, *, vectorize: bool) -> Callable[[Params], Tensor] | None:
    """The losses of the fixed samples, of stacked parameters."""
    if sample_losses is None:
        return None
    losses = stacked_loss(lambda params, _: sample_losses(params), vectorize=vectorize)
    return lambda params: losses(params, None)
