"""How sharply the loss bends at a checkpoint: the largest eigenvalue of its Hessian H, by power iteration.

    H v is approximately (grad L(w + c v) - grad L(w)) / c,   v the normalised product of before, c = 0.01

The eigenvalue limits SGLD's step: lr (nbeta h_max + localization) must stay below 4.
"""

import math
from collections.abc import Sequence

import torch

from icl.population import Params
from icl.sampling.batches import Batch, stack_batches
from icl.sampling.gradients import Gradient

_ITERATIONS = 10
_NUDGE = 1e-2


def largest_curvature(gradient: Gradient, params: Params, batches: Sequence[Batch]) -> float:
    """The size of the eigenvalue of largest size, of the mean loss over some batches."""
    device = next(iter(params.values())).device
    stacked = stack_batches(list(batches), device)

    def mean_gradient(at: Params) -> Params:
        copies = {name: tensor.expand(len(batches), *tensor.shape).contiguous() for name, tensor in at.items()}
        return {name: grads.mean(0) for name, grads in gradient(copies, {}, stacked)[0].items()}

    start = {name: tensor.float() for name, tensor in params.items()}
    here = mean_gradient(start)
    generator = torch.Generator().manual_seed(0)
    direction = {name: torch.randn(tensor.shape, generator=generator).to(device) for name, tensor in start.items()}
    curvature = 0.0
    for _ in range(_ITERATIONS):
        norm = math.sqrt(_dot(direction, direction))
        if norm == 0:
            break
        direction = {name: tensor / norm for name, tensor in direction.items()}
        there = mean_gradient({name: start[name] + _NUDGE * direction[name] for name in start})
        product = {name: (there[name] - here[name]) / _NUDGE for name in start}
        curvature = _dot(product, direction)
        direction = product
    return max(abs(curvature), 1e-6)


def _dot(one: Params, other: Params) -> float:
    return float(torch.stack([(one[name] * other[name]).sum() for name in one]).double().sum())
