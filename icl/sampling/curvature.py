"""Largest curvature of the loss at a checkpoint w: the largest absolute value of an eigenvalue of the Hessian H, by Lanczos.

    H v is approximately (grad L(w + c v) - grad L(w)) / c,   |v| = 1, c = 0.01

We use differences of gradients because some losses have no second derivative. The largest eigenvalue h_max limits the step size of SGLD: lr
(nbeta h_max + localization) must be below 4.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from icl.compute.linalg import lanczos, ritz
from icl.model.flat import make_layout
from icl.model.stacked import Params, stack
from icl.sampling.batches import Batch, stack_batches
from icl.sampling.target import Gradient

_NUM_STEPS = 10
"""Number of Lanczos steps."""
_NUDGE = 1e-2
"""The length c of the finite difference."""


def largest_curvature(gradient: Gradient, params: Params, batches: Sequence[Batch]) -> float:
    """Return the largest absolute value of an eigenvalue of the Hessian, for the mean loss over some batches."""
    layout = make_layout(params)
    start = layout.to_rows(stack([{name: tensor.float() for name, tensor in params.items()}]))  # 1 P
    stacked_batches = stack_batches(list(batches), start.device)

    def mean_gradient(row: Tensor) -> Tensor:
        return gradient(layout, row.repeat(len(batches), 1), {}, stacked_batches)[0].mean(0, keepdim=True)

    here = mean_gradient(start)
    generator = torch.Generator().manual_seed(0)
    normals = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in params.items()}
    direction = layout.to_rows(stack([normals])).to(start.device)

    def products(vectors: Tensor) -> Tensor:
        return ((mean_gradient(start + _NUDGE * vectors) - here) / _NUDGE).unsqueeze(1)  # 1 1 P

    eigenvalues = ritz(lanczos(products, direction, _NUM_STEPS)).values
    return max(float(eigenvalues.abs().max()), 1e-6)
