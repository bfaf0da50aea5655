"""How sharply the loss bends at a checkpoint: the largest eigenvalue of its Hessian H, by power iteration.

    H v is approximately (grad L(w + c v) - grad L(w)) / c,   v the normalised product of before, c = 0.01

The eigenvalue limits SGLD's step: lr (nbeta h_max + localization) must stay below 4.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from icl.flat import make_layout
from icl.sampling.batches import Batch, stack_batches
from icl.sampling.gradients import Gradient
from icl.stacked import Params, stack

_ITERATIONS = 10
_NUDGE = 1e-2


def largest_curvature(gradient: Gradient, params: Params, batches: Sequence[Batch]) -> float:
    """Return the magnitude of the Hessian's eigenvalue of largest magnitude, for the mean loss over some batches."""
    layout = make_layout(params)
    start = layout.to_rows(stack([{name: tensor.float() for name, tensor in params.items()}]))  # 1 P
    stacked_batches = stack_batches(list(batches), start.device)

    def mean_gradient(row: Tensor) -> Tensor:
        return gradient(layout, row.repeat(len(batches), 1), {}, stacked_batches)[0].mean(0, keepdim=True)

    here = mean_gradient(start)
    generator = torch.Generator().manual_seed(0)
    normals = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in params.items()}
    direction = layout.to_rows(stack([normals])).to(start.device)
    curvature = 0.0
    for _ in range(_ITERATIONS):
        norm = torch.linalg.vector_norm(direction.double())
        if norm == 0:
            break
        direction = direction / norm.to(direction.dtype)
        product = (mean_gradient(start + _NUDGE * direction) - here) / _NUDGE
        curvature = float((product * direction).double().sum())
        direction = product
    return max(abs(curvature), 1e-6)
