"""The task vector that a predictor has found: its weights at every position, read by asking for one axis after the other.

The effective weight i at position p of a prompt is the prediction for x_p = c e_i, divided by c, behind the prompt's own p - 1
examples; c is the mean norm of the inputs (the probe of Hoogland et al. 2024's code). For a predictor that is linear in
its query, as ridge and dMMSE are, this is the vector that it multiplies the query with, whatever c is; a transformer need not be
linear, and then the weight is that at this size of query. Against the task t that made the prompt:

- `cosine`: of the angle between the two; 0 for a vector of zeros, so ridge starts at 0.
- `norm_ratio`: |weights| / |t|.

Both averaged over prompts. Only the first p tokens are shown, as nothing later can matter.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from icl import metrics
from icl.metrics import Estimate
from icl.tasks.prompts import Prompts

Predict = Callable[[Prompts], Tensor]
"""Prompts of k examples (B, k, D) to predictions (B, k), or of many members (N, B, k)."""


class Found(NamedTuple):
    """How near the task a predictor's weights are, for every prompt and position (*N, B, K)."""

    cosine: Tensor
    norm_ratio: Tensor


def effective_weights(predict: Predict, prompts: Prompts) -> Float[Tensor, "*N B K D"]:
    """The weights of a predictor, or of each of many, at every position of every prompt."""
    count, num_examples, task_size = prompts.xs.shape
    length = prompts.xs.norm(dim=-1).mean()
    axes = length * torch.eye(task_size, dtype=prompts.xs.dtype, device=prompts.xs.device)
    found = []
    for p in range(num_examples):
        xs = prompts.xs[:, : p + 1].repeat(task_size, 1, 1, 1)  # D B p+1 D
        xs[:, :, p] = axes.unsqueeze(1)
        ys, ws = prompts.ys[:, : p + 1].repeat(task_size, 1), prompts.ws.repeat(task_size, 1)
        asked = predict(Prompts(xs.flatten(0, 1), ys, ws))[..., p] / length  # *N DB
        found.append(asked.unflatten(-1, (task_size, count)).mT)  # *N B D
    return torch.stack(found, dim=-2)


def compare(weights: Float[Tensor, "*N B K D"], ws: Float[Tensor, "B D"]) -> Found:
    """Cosine and ratio of norms to the prompts' own tasks."""
    tasks = ws.unsqueeze(-2)  # B 1 D
    return Found(torch.cosine_similarity(weights, tasks, dim=-1), weights.norm(dim=-1) / tasks.norm(dim=-1))


def estimates(found: Found) -> dict[str, tuple[Estimate, Estimate]]:
    """Per quantity the mean at every position (*N, K), and the mean over positions (*N,)."""
    return {name: (metrics.position_mean(each), metrics.overall_mean(each)) for name, each in found._asdict().items()}
