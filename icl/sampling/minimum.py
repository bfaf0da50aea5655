"""Is a checkpoint at a minimum? What one step down its gradient would gain, in nats, on batches not used to find it.

The mean gradient g and its curvature along g (a finite difference of gradients) come from one half of some batches; so
does the best of four steps around the localised Newton step nbeta / (nbeta curvature + localization). The gain is then
measured, with its standard error, on the other half. At a minimum it is zero or less; it is a lower bound on how far
the checkpoint's loss, and with it the LLC, is off.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from icl.flat import Layout
from icl.sampling.batches import Batch, stack_batches
from icl.sampling.gradients import Gradient
from icl.stacked import Params

STEPS = (1 / 16, 1 / 4, 1.0, 4.0)
"""Multiples of the Newton step that are tried."""
NUM_BATCHES = 32
"""At most so many batches are used, half to find the step and half to measure what it gains."""
_NUDGE = 1e-3  # length of the finite difference, relative to the parameters


class Slope(NamedTuple):
    """The way down from C stacked checkpoints, whatever their chains are told."""

    start: Float[Tensor, "C P"]
    gradient: Float[Tensor, "C P"]
    """Mean over the batches that find."""
    curvature: Float[Tensor, "C 1"]
    """Along the gradient."""
    losses: Callable[[Tensor, Sequence[Batch]], Float[Tensor, "I C"]]
    """Function from rows to their losses on each of I batches."""
    finding: Sequence[Batch]
    measuring: Sequence[Batch]
    here: Float[Tensor, "I C"]
    """Losses of the checkpoints on the batches that measure."""


def slope(
    gradient: Gradient,
    losses: Callable[[Params, Batch], Tensor],
    checkpoints: Params,
    batches: Sequence[Batch],
    *,
    layout: Layout,
) -> Slope:
    """The mean gradient of each stacked checkpoint and the curvature along it; one batch alone serves as both halves."""
    batches = batches[:NUM_BATCHES]
    fixed, start = layout.fixed(checkpoints), layout.to_rows(checkpoints)
    finding, measuring = (batches, batches) if len(batches) == 1 else (batches[::2], batches[1::2])

    def mean_gradient(rows: Tensor) -> Tensor:
        batches = (stack_batches([batch] * len(rows), rows.device) for batch in finding)
        return torch.stack([gradient(layout, rows, fixed, batch)[0] for batch in batches]).mean(0)

    def batch_losses(rows: Tensor, some: Sequence[Batch]) -> Tensor:
        params = layout.to_params(rows, fixed)
        values = [losses(params, batch) for batch in some]
        return torch.stack([v.flatten(1).mean(1) if v.ndim > 1 else v for v in values]).cpu().double()

    g = mean_gradient(start)
    direction = g / torch.linalg.vector_norm(g, dim=1, keepdim=True).clamp(min=torch.finfo(g.dtype).tiny)
    nudge = _NUDGE * (1 + torch.linalg.vector_norm(start, dim=1, keepdim=True)) / layout.size**0.5
    curvature = ((mean_gradient(start + nudge * direction) - g) * direction).sum(1, keepdim=True) / nudge
    return Slope(start, g, curvature, batch_losses, finding, measuring, batch_losses(start, measuring))


def drop(down: Slope, ratio: float) -> Float[Tensor, "I C"]:
    """How much lower each checkpoint's loss is on each batch after the best step, at localization / nbeta = `ratio`."""
    start, g = down.start, down.gradient
    newton = 1 / (down.curvature.abs() + ratio).clamp(min=torch.finfo(g.dtype).tiny)
    tried = torch.stack([down.losses(start - s * newton * g, down.finding).mean(0) for s in STEPS])  # steps C
    best = torch.tensor(STEPS, dtype=g.dtype, device=g.device)[tried.nan_to_num(nan=torch.inf).argmin(0).to(g.device)]
    return down.here - down.losses(start - best[:, None] * newton * g, down.measuring)


def gain(drops: Float[Tensor, "I C"], nbeta: float) -> tuple[Float[Tensor, " C"], Float[Tensor, " C"]]:
    """In nats, nbeta times the mean drop of each checkpoint, and its standard error; of one batch it has none."""
    gains = nbeta * drops
    stderr = gains.std(0) / len(gains) ** 0.5 if len(gains) > 1 else torch.zeros_like(gains[0])
    return gains.mean(0).cpu(), stderr.cpu()
