"""Is a checkpoint at a minimum? What one step down its gradient would gain, in nats, on batches not used to find it.

The mean gradient g and its curvature along g (a finite difference of gradients) come from one half of some batches; so
does the best of four steps around the localised Newton step nbeta / (nbeta curvature + localization). The gain is then
measured, with its standard error, on the other half. At a minimum it is zero or less; it is a lower bound on how far
the checkpoint's loss, and with it the LLC, is off.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from icl.population import Params, size
from icl.sampling.batches import Batch, stack_batches
from icl.sampling.gradients import Gradient
from icl.sampling.packing import Packing

STEPS = (1 / 16, 1 / 4, 1.0, 4.0)
"""Multiples of the Newton step that are tried."""
NUM_BATCHES = 32
"""At most so many batches are used, half to find the step and half to measure what it gains."""
_NUDGE = 1e-3  # length of the finite difference, relative to the parameters


def descent(
    gradient: Gradient,
    losses: Callable[[Params, Batch], Tensor],
    checkpoints: Params,
    batches: Sequence[Batch],
    *,
    packing: Packing,
    nbeta: float,
    localization: float,
) -> tuple[Float[Tensor, " C"], Float[Tensor, " C"]]:
    """The gain nbeta (L(w0) - L(w0 - step g)) of each stacked checkpoint, and its standard error.

    One batch alone serves as both halves, and its gain has no error.
    """
    batches = batches[:NUM_BATCHES]
    frozen, start = packing.frozen(checkpoints), packing.pack(checkpoints)
    finding, measuring = (batches, batches) if len(batches) == 1 else (batches[::2], batches[1::2])

    def mean_gradient(packed: Tensor) -> Tensor:
        moving = packing.unpack(packed, frozen)
        still = {name: tensor for name, tensor in frozen.items() if name not in moving}
        grads = [
            packing.pack(gradient(moving, still, stack_batches([batch] * size(moving), packed.device))[0])
            for batch in finding
        ]
        return torch.stack(grads).mean(0)

    def batch_losses(packed: Tensor, some: Sequence[Batch]) -> Tensor:
        params = {**frozen, **packing.unpack(packed, frozen)}
        values = [losses(params, batch) for batch in some]
        return torch.stack([v.flatten(1).mean(1) if v.ndim > 1 else v for v in values]).cpu().double()  # batches C

    g = mean_gradient(start)
    norm = torch.linalg.vector_norm(g, dim=1, keepdim=True)
    direction = g / norm.clamp(min=torch.finfo(g.dtype).tiny)
    nudge = _NUDGE * (1 + torch.linalg.vector_norm(start, dim=1, keepdim=True)) / start.shape[1] ** 0.5
    curvature = ((mean_gradient(start + nudge * direction) - g) * direction).sum(1, keepdim=True) / nudge
    newton = nbeta / (nbeta * curvature.abs() + localization).clamp(min=torch.finfo(g.dtype).tiny)
    tried = torch.stack([batch_losses(start - s * newton * g, finding).mean(0) for s in STEPS])  # steps C
    best = torch.tensor(STEPS, dtype=g.dtype, device=g.device)[tried.nan_to_num(nan=torch.inf).argmin(0).to(g.device)]
    moved = start - best[:, None] * newton * g
    gains = nbeta * (batch_losses(start, measuring) - batch_losses(moved, measuring))  # batches C
    stderr = gains.std(0) / len(gains) ** 0.5 if len(gains) > 1 else torch.zeros_like(gains[0])
    return gains.mean(0).cpu(), stderr.cpu()
