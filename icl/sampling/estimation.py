"""Estimate the LLCs of checkpoints x settings x chains as one population, from the losses to the verdicts.

Numbers that depend on a checkpoint alone (its loss on many batches, the step down its gradient) are computed once,
whatever the number of settings that its chains run under.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from icl.model.flat import Layout, make_layout
from icl.model.stacked import Params, size, stack
from icl.sampling.batches import Batch, batch_function, fingerprint, stack_batches
from icl.sampling.chains import Advance, run_chains
from icl.sampling.minimum import BatchLosses, GradientStep, num_drop_batches
from icl.sampling.result import CheckpointId, LLCResult, make_result
from icl.sampling.settings import SamplerSettings
from icl.sampling.target import StackedLosses, Target, stacked_losses, vmapped_gradient
from icl.sampling.verdict import AtCheckpoint

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
    layout: Layout | None = None,
    num_samples: int | None = None,
    num_init_batches: int = 32,
    sample_losses: Callable[[Params], Float[Tensor, " Q"]] | None = None,
    memory: float | None = None,
    advance: Advance = lambda moves: None,
) -> list[list[LLCResult]]:
    """Estimate the LLC of each checkpoint under each of some settings, as one population.

    Args:
        target: What is sampled.
        checkpoints: Parameters by name, all of one architecture.
        settings_grid: Settings that differ in lr, nbeta and localization only; chains see the same minibatches and noise under each.
        identities: Step and hash of each checkpoint.
        layout: Which parameters may move; None for all.
        num_samples: The sample size n.
        num_init_batches: Number of distinct batches for the checkpoint's own loss.
        sample_losses: Function from parameters to the losses of fixed samples, for the singular fluctuation.
        memory: Bytes that the chains running at once may need.
        advance: Called after every move of the chains that run together, with their number.

    Returns:
        A list for each settings, with a result for each checkpoint.
    """
    common = settings_grid[0]
    params = stack([{name: tensor.detach() for name, tensor in member.items()} for member in checkpoints])
    layout = make_layout(checkpoints[0]) if layout is None else layout
    source = batch_function(target.batches, num_chains=common.num_chains, seed=common.seed)
    device = next(iter(params.values())).device
    distinct, are_all = _distinct_batches(source, common, num_init_batches)
    batches = [_to_device(batch, device) for batch in distinct]
    chunk_size = _chunk_size(target, params, batches[0], layout, memory)
    at_checkpoints = _at_checkpoints(target, params, batches, settings_grid, layout, chunk_size)
    drop_batches = batches[: num_drop_batches(common.num_moves, common.num_chains)]
    traces = run_chains(
        target.chain_gradient,
        target.losses_on_own_batches,
        {name: tensor.repeat(len(settings_grid), *[1] * (tensor.ndim - 1)) for name, tensor in params.items()},
        source,
        [settings for settings in settings_grid for _ in checkpoints],
        layout=layout,
        keys=[identity.checkpoint_hash or str(i) for i, identity in enumerate(identities)] * len(settings_grid),
        chunk_size=chunk_size,
        sample_losses=_stacked_sample_losses(sample_losses, vectorize=target.vectorize),
        losses_at_mean=BatchLosses(
            partial(_mean_losses, target.losses_on_shared_batch, drop_batches, chunk_size),
            are_all and len(drop_batches) == len(batches),
        ),
        advance=advance,
    )
    finish = partial(make_result, num_samples=num_samples, loss_name=target.name)
    remaining = iter(traces)
    return [
        [finish(next(remaining), known, settings, identity) for known, identity in zip(row, identities, strict=True)]
        for row, settings in zip(at_checkpoints, settings_grid, strict=True)
    ]


def _at_checkpoints(
    target: Target,
    params: Params,
    batches: Sequence[Batch],
    settings_grid: Sequence[SamplerSettings],
    layout: Layout,
    chunk_size: int,
) -> list[list[AtCheckpoint]]:
    """Return what is known of each checkpoint without its chains, for each settings."""
    losses, gradient = target.losses_on_shared_batch, target.default_gradient
    if next(iter(params.values())).device.type == "cpu":
        # On a GPU the chains' gradient may be a compiled graph, which would be compiled again for so few members.
        gradient = target.chain_gradient
    # Rounded, because the same ratio of settings that were themselves rounded may differ in the last digits.
    ratios = [float(f"{settings.localization / settings.nbeta:.6g}") for settings in settings_grid]
    table: list[list[AtCheckpoint]] = [[] for _ in settings_grid]
    for chunk in _chunks(params, chunk_size):
        with torch.no_grad():
            init_losses = _losses_by_batch(losses, chunk, batches)
            finite = init_losses.isfinite().all(2).all(0).tolist()
            usable = [batch for batch, is_usable in zip(batches, finite, strict=True) if is_usable] or batches
            step = GradientStep(gradient, losses, chunk, usable, layout=layout)
            decreases = {ratio: step.decrease(ratio) for ratio in dict.fromkeys(ratios)}
        for row, ratio, settings in zip(table, ratios, settings_grid, strict=True):
            nats = settings.nbeta * decreases[ratio]  # I C
            stderr = nats.std(0) / len(nats) ** 0.5 if len(nats) > 1 else torch.zeros_like(nats[0])
            row += [
                AtCheckpoint(*values, target.trivial_loss, layout.size)
                for values in zip(init_losses, nats.mean(0).tolist(), stderr.tolist(), strict=True)
            ]
    return table


def _distinct_batches(
    source: Callable[[int, int], Batch], settings: SamplerSettings, num_wanted: int
) -> tuple[list[Batch], bool]:
    """Return the first distinct batches that the chains get, and whether a search for more was in vain."""
    batches: dict[bytes, Batch] = {}
    num_repeats, patience = 0, 2 * settings.num_chains
    for number in range(settings.num_moves * settings.num_chains):
        draw, chain = divmod(number, settings.num_chains)
        batch = source(chain, draw)
        num_repeats = num_repeats + 1 if batches.setdefault(fingerprint(batch), batch) is not batch else 0
        if len(batches) == num_wanted or num_repeats > patience + len(batches):
            break
    return list(batches.values()), num_repeats > patience + len(batches)


def _losses_by_batch(losses: StackedLosses, params: Params, batches: Sequence[Batch]) -> Float[Tensor, "N I T"]:
    """Return the losses of every member on every batch, in float64 on the CPU; T = 1 if the loss is a number."""
    values = [losses(params, batch) for batch in batches]
    return torch.stack([v if v.ndim > 1 else v[:, None] for v in values], dim=1).double().cpu()


def _mean_losses(
    losses: StackedLosses, batches: Sequence[Batch], chunk_size: int, params: Params
) -> Float[Tensor, "N I"]:
    """Return the losses of stacked parameters on each batch, averaged over components."""
    return torch.cat([_losses_by_batch(losses, chunk, batches).mean(2) for chunk in _chunks(params, chunk_size)])


def _stacked_sample_losses(
    sample_losses: Callable[[Params], Tensor] | None, *, vectorize: bool
) -> Callable[[Params], Tensor] | None:
    if sample_losses is None:
        return None
    losses = stacked_losses(lambda params, _: sample_losses(params), own_batches=False, vectorize=vectorize)
    return lambda params: losses(params, None)


def _to_device(batch: Batch, device: torch.device) -> Batch:
    """Move a batch to a device, with its arrays as tensors."""
    return pytree.tree_map(lambda x: x[0] if isinstance(x, Tensor) else x, stack_batches([batch], device))


def _chunks(params: Params, chunk_size: int) -> list[Params]:
    starts = range(0, size(params), chunk_size)
    return [{name: tensor[i : i + chunk_size] for name, tensor in params.items()} for i in starts]


def _chunk_size(target: Target, params: Params, batch: Batch, layout: Layout, memory: float | None) -> int:
    """Return the number of members that fit the memory together: at least one, and one if they are not mapped."""
    if not target.vectorize:
        return 1
    member = {name: tensor[:1] for name, tensor in params.items()}
    device = next(iter(member.values())).device
    if memory is None:
        memory = torch.cuda.mem_get_info(device)[0] / 2 if device.type == "cuda" else MEMORY
    gradient, rows, fixed = vmapped_gradient(target.loss), layout.to_rows(member), layout.fixed(member)
    stacked_batch = stack_batches([batch], device)
    with torch.no_grad(), _Allocations() as allocations:
        gradient(layout, rows, fixed, stacked_batch)
    needed = sum(allocations.sizes.values()) + _COPIES * sum(tensor.nbytes for tensor in member.values())
    return max(1, int(memory // needed))


class _Allocations(TorchDispatchMode):
    """Records the size of every tensor that a block makes; views of one storage count once."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                self.sizes[storage.data_ptr()] = max(self.sizes.get(storage.data_ptr(), 0), storage.nbytes())
        return result
