"""Task vector of a predictor: the weights with which the predictor maps the query to the prediction, at every position.

To measure the weights at position p, we append the query x_p = c e_i to the prompt's first p - 1 examples. Here e_i is a unit vector, and c
is the mean norm of the inputs (as in the code of Hoogland et al. 2024). Weight i is the prediction for this query, divided by c. The
predictions of ridge and dMMSE are linear in the query, so they are exactly the inner product of these weights and the query, for any c. A
transformer need not be linear. Its weights describe how it responds to queries of norm c. We compare the weights with the task t that
generated the prompt:

- `cosine`: the cosine of the angle between the weights and t. We define the cosine as 0 for a vector of zeros, such as the
  weights of ridge at position 1.
- `norm_ratio`: |weights| / |t|.

Both numbers are averaged over prompts. Prompts whose task is zero are left out, because such a task has no direction. They occur under
the prior `sparse`. We cut each prompt at position p, because later examples have no effect on the prediction.
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
"""Function from prompts with k examples each (B, k, D) to predictions (B, k), or (N, B, k) for N models."""


class Similarity(NamedTuple):
    """Similarity of a predictor's weights to the task, for every prompt and position (*N, B, K)."""

    cosine: Tensor
    norm_ratio: Tensor


def effective_weights(predict: Predict, prompts: Prompts) -> Float[Tensor, "*N B K D"]:
    """Return the weights of one predictor, or of many, at every position of every prompt."""
    count, num_examples, task_size = prompts.xs.shape
    length = prompts.xs.norm(dim=-1).mean()
    queries = length * torch.eye(task_size, dtype=prompts.xs.dtype, device=prompts.xs.device)
    by_position = []
    for p in range(num_examples):
        xs = prompts.xs[:, : p + 1].repeat(task_size, 1, 1, 1)  # D B p+1 D
        xs[:, :, p] = queries.unsqueeze(1)
        ys, ws = prompts.ys[:, : p + 1].repeat(task_size, 1), prompts.ws.repeat(task_size, 1)
        weights = predict(Prompts(xs.flatten(0, 1), ys, ws))[..., p] / length  # *N DB
        by_position.append(weights.unflatten(-1, (task_size, count)).mT)  # *N B D
    return torch.stack(by_position, dim=-2)


def compare(weights: Float[Tensor, "*N B K D"], ws: Float[Tensor, "B D"]) -> Similarity:
    """Compare the weights at every position with the task t that generated the prompt: cosine and |weights| / |t|.

    Prompts whose task is zero are left out.
    """
    has_task = ws.any(-1)  # B
    weights, tasks = weights[..., has_task, :, :], ws[has_task].unsqueeze(-2)  # b K D, b 1 D
    return Similarity(torch.cosine_similarity(weights, tasks, dim=-1), weights.norm(dim=-1) / tasks.norm(dim=-1))


def estimates(similarity: Similarity) -> dict[str, tuple[Estimate, Estimate]]:
    """Return `cosine` and `norm_ratio` averaged over prompts: at each position (*N, K), and over positions (*N,)."""
    pairs = similarity._asdict().items()
    return {name: (metrics.position_mean(values), metrics.overall_mean(values)) for name, values in pairs}
