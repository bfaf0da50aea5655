"""The estimates of a problem: checkpoints x settings x chains as one population, from the losses to the verdicts.

What depends on a checkpoint alone, its loss on many batches and the way down from it, is found once, whatever the number
of settings that its chains are run under.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils import _pytree as pytree

from icl.checks import ConfigError
from icl.flat import Layout
from icl.sampling import settling
from icl.sampling.batches import Batch, Batches, batch_function, fingerprint, stack_batches
from icl.sampling.chains import Progress, run_chains
from icl.sampling.gradients import (
    Gradient,
    Loss,
    allocated_bytes,
    looped_gradient,
    own_losses,
    stacked_loss,
    vmapped_gradient,
)
from icl.sampling.minimum import drop, gain, slope
from icl.sampling.restriction import Restriction, restricted_layout
from icl.sampling.result import Label, LLCResult
from icl.sampling.settings import SamplerSettings
from icl.sampling.summary import select, summarise
from icl.stacked import Params, size, stack

MEMORY = 2.0 * 2**30
"""Bytes that chains running at once may need, if nothing else is said; on CUDA half of what is free."""
_COPIES = 10  # tensors of the size of the parameters that a member holds at once


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What chains sample, and what is found beside them; `icl.sampling.llc` says what each means."""

    loss: Loss
    batches: Batches
    restrict: Restriction = None
    num_samples: int | None = None
    num_init_batches: int = 32
    trivial_loss: float | None = None
    vectorize: bool = True
    sample_losses: Callable[[Params], Float[Tensor, " Q"]] | None = None
    gradient: Gradient | None = None
    losses: Callable[[Params, Batch], Tensor] | None = None
    """A faster loss of stacked parameters on one batch, in place of vmap's."""
    own_losses: Callable[[Params, Batch], Tensor] | None = None
    """The same on a batch for each."""
    memory: float | None = None
    loss_name: str = "loss"

    def __post_init__(self) -> None:
        if self.num_init_batches < 1:
            raise ConfigError(f"`num_init_batches` must be at least 1, got {self.num_init_batches}.")

    @property
    def default_gradient(self) -> Gradient:
        """Of the loss itself, for any of stacked parameters."""
        return vmapped_gradient(self.loss) if self.vectorize else looped_gradient(self.loss)

    @property
    def all_losses(self) -> Callable[[Params, Batch], Tensor]:
        """Of stacked parameters on one batch."""
        return self.losses or stacked_loss(self.loss, vectorize=self.vectorize)


def estimate(
    problem: Problem,
    checkpoints: Sequence[Mapping[str, Tensor]],
    corners: Sequence[SamplerSettings],
    *,
    labels: Sequence[Label],
    progress: Progress | None = None,
) -> list[list[LLCResult]]:
    """The LLC of each checkpoint under each of some settings, as one population.

    Args:
        problem: What is sampled.
        checkpoints: Parameters by name, all of one architecture.
        corners: Settings, which may differ in lr, nbeta and localization; chains see the same minibatches and noise at each.
        labels: Step and hash of each checkpoint.
        progress: Called with the moves done and those there are, over all chains.
    """
    stacked = {name: tensor.detach() for name, tensor in stack([_detached(one) for one in checkpoints]).items()}
    layout = restricted_layout(checkpoints[0], problem.restrict)
    source = batch_function(problem.batches, num_chains=corners[0].num_chains, seed=corners[0].seed)
    device = next(iter(stacked.values())).device
    distinct = _distinct_batches(source, corners[0], problem.num_init_batches)
    init_batches = [_on(batch, device) for batch in distinct.batches]
    resting = init_batches[: settling.num_batches(corners[0].num_moves, corners[0].num_chains)]
    members = _chunk_size(problem, stacked, init_batches[0], layout)
    init, gains = _at_checkpoints(problem, stacked, init_batches, corners, layout, members)
    traces = run_chains(
        problem.gradient or problem.default_gradient,
        problem.own_losses or own_losses(problem.loss, vectorize=problem.vectorize),
        {name: tensor.repeat(len(corners), *[1] * (tensor.ndim - 1)) for name, tensor in stacked.items()},
        source,
        [settings for settings in corners for _ in checkpoints],
        layout=layout,
        keys=[label.checkpoint_hash or str(i) for i, label in enumerate(labels)] * len(corners),
        chunk_size=members,
        sample_losses=_mapped(problem),
        losses_at_rest=settling.Losses(
            partial(_losses_on, problem.all_losses, resting, members),
            distinct.are_all and len(resting) == len(init_batches),
        ),
        progress=progress,
    )
    return [
        [
            summarise(
                select(traces, number * len(checkpoints) + i),
                init[i],
                (float(gains[number][0][i]), float(gains[number][1][i])),
                settings,
                label,
                num_params=layout.size,
                num_samples=problem.num_samples,
                trivial_loss=problem.trivial_loss,
                loss_name=problem.loss_name,
            )
            for i, label in enumerate(labels)
        ]
        for number, settings in enumerate(corners)
    ]


def _at_checkpoints(
    problem: Problem,
    stacked: Params,
    batches: Sequence[Batch],
    corners: Sequence[SamplerSettings],
    layout: Layout,
    members: int,
) -> tuple[Float[Tensor, "C I T"], list[tuple[Tensor, Tensor]]]:
    """The checkpoints' own losses, and under each settings what a step down gains, with its error."""
    losses, gradient = problem.all_losses, problem.default_gradient
    if problem.gradient is not None and next(iter(stacked.values())).device.type == "cpu":
        gradient = problem.gradient  # elsewhere it may be one graph, and would be compiled anew for so few members
    ratios = [float(f"{settings.localization / settings.nbeta:.6g}") for settings in corners]
    init: list[Tensor] = []
    drops: dict[float, list[Tensor]] = {ratio: [] for ratio in ratios}
    with torch.no_grad():
        for part in _in_chunks(stacked, members):
            init.append(_init_losses(losses, part, batches))
            finite = init[-1].isfinite().all(2).all(0).tolist()
            usable = [batch for batch, is_usable in zip(batches, finite, strict=True) if is_usable] or batches
            down = slope(gradient, losses, part, usable, layout=layout)
            for ratio, found in drops.items():
                found.append(drop(down, ratio))
    return torch.cat(init), [
        _gains(drops[ratio], settings.nbeta) for ratio, settings in zip(ratios, corners, strict=True)
    ]


def _gains(parts: Sequence[Tensor], nbeta: float) -> tuple[Tensor, Tensor]:
    """Of the checkpoints of all parts, each of which has batches of its own."""
    means, errors = zip(*(gain(part, nbeta) for part in parts), strict=True)
    return torch.cat(means), torch.cat(errors)


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


def _init_losses(losses: Callable[[Params, Batch], Tensor], params: Params, batches: Sequence[Batch]) -> Tensor:
    """Of every checkpoint on every batch, (C, batches, T), in float64 on the CPU; T = 1 for a number."""
    values = [losses(params, batch) for batch in batches]
    return torch.stack([v if v.ndim > 1 else v[:, None] for v in values], dim=1).double().cpu()


def _losses_on(
    losses: Callable[[Params, Batch], Tensor], batches: Sequence[Batch], members: int, params: Params
) -> Float[Tensor, "N I"]:
    """Of stacked parameters on each batch, so many members at once."""
    return torch.cat([_init_losses(losses, part, batches).mean(2) for part in _in_chunks(params, members)])


def _on(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device, as the stacked ones are."""
    return pytree.tree_map(lambda x: x[0] if isinstance(x, Tensor) else x, stack_batches([batch], device))


def _chunk_size(problem: Problem, params: Params, batch: Batch, layout: Layout) -> int:
    """Members that fit the memory together, at least one; one where they are not mapped."""
    if not problem.vectorize:
        return 1
    one = {name: tensor[:1] for name, tensor in params.items()}
    device = next(iter(one.values())).device
    memory = problem.memory
    if memory is None:
        memory = torch.cuda.mem_get_info(device)[0] / 2 if device.type == "cuda" else MEMORY
    gradient = partial(vmapped_gradient(problem.loss), layout, layout.to_rows(one), layout.fixed(one))
    with torch.no_grad():
        need = allocated_bytes(gradient, stack_batches([batch], device))
    need += _COPIES * sum(tensor.nbytes for tensor in one.values())
    return max(1, int(memory // need))


def _in_chunks(params: Params, members: int) -> list[Params]:
    starts = range(0, size(params), members)
    return [{name: tensor[i : i + members] for name, tensor in params.items()} for i in starts]


def _mapped(problem: Problem) -> Callable[[Params], Tensor] | None:
    """The losses of the fixed samples, of stacked parameters."""
    sample_losses = problem.sample_losses
    if sample_losses is None:
        return None
    losses = stacked_loss(lambda params, _: sample_losses(params), vectorize=problem.vectorize)
    return lambda params: losses(params, None)
