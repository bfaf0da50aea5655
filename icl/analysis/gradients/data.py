"""Gradients of the expected loss with respect to the six parameters of the data distribution.

A prompt is x = x_mean + x_scale z, w = w_mean + w_scale t, e = noise_mean + noise_scale n, y = w . x + e. Here z (K, D)
and n (K) are standard normal, and t (D) is the task, the same for the whole prompt. Each parameter is one number for
all coordinates; `noise_scale` is a standard deviation. In training, the means are 0, x_scale and w_scale are 1, and
noise_scale is sigma, the square root of `noise_variance`. With finitely many tasks, t is drawn from the pool, so w_mean
and w_scale shift and stretch the whole pool. The model is fixed. The loss of a prompt is the model's training loss,
averaged over the K positions: (f(x, y) - y)^2 for a predictor f, or a negative log-likelihood (`icl.model.heads`).
L(phi) is the expected loss for the six parameters phi. For f = 0, with means m and scales s,

    L = D (m_x^2 + s_x^2)(m_w^2 + s_w^2) + D (D - 1) m_x^2 m_w^2 + 2 D m_x m_w m_e + m_e^2 + s_e^2 .

We compute three estimators of dL/dphi. Each estimator gives a number for each prompt, and the mean over prompts is the estimate
(Mohamed, Rosca, Figurnov, Mnih 2020, "Monte Carlo gradient estimation in machine learning", sections 4 and 5):

- `pathwise`: differentiate through x(phi), y(phi) and the model at fixed z, t, n. This is the estimator to use.
- `score_function`: (loss - mean loss) d log p / d phi. This estimator serves as a check, because it never differentiates the loss. With a
  pool of tasks, w has no density. The parameters of w then change the mean of y given x and t, so we use the gradient of log p(y | x, t).
  Without noise, y has no density either, and the scores that need this density are NaN.
- `finite_difference`: central differences with the same z, t, n on both sides. This estimator serves as a second check.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import grad_and_value

from icl import metrics, rng
from icl.analysis.prompts import prompts_at_once
from icl.analysis.run import Members
from icl.model.stacked import target_losses
from icl.tasks.prompts import Distribution, prompt_source

PARAMETERS = ("x_mean", "x_scale", "w_mean", "w_scale", "noise_mean", "noise_scale")

Losses: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Function from xs (N, B, K, D) and ys (N, B, K) to the losses (N, B, K) of N members."""
_FD_STEP = {torch.float64: 1e-5, torch.float32: 1e-2}
"""Step size of the finite differences for each dtype. It balances truncation errors and rounding errors."""
_FD_PROMPTS = 64
_MAX_Z = 5.0
"""Largest difference between two estimators of a gradient that counts as agreement, in standard errors. The limit is high
because a run makes hundreds of comparisons."""


class Draws(NamedTuple):
    """Standard draws z, t, n of B prompts, before scales and means are applied. They are the same for all checkpoints."""

    inputs: Float[Tensor, "B K D"]
    tasks: Float[Tensor, "B D"]
    noise: Float[Tensor, "B K"]

    def part(self, start: int, stop: int) -> "Draws":
        """Return the draws of prompts `start` to `stop`."""
        return Draws(*(tensor[start:stop] for tensor in self))


def estimates(members: Members, distribution: Distribution, num_prompts: int) -> dict[str, Float[Tensor, "N B 6"]]:
    """Return the gradient of each prompt's loss by each estimator. Finite differences use only the first `_FD_PROMPTS` prompts."""
    draws = _draws(members, distribution, num_prompts)
    dtype, count = draws.inputs.dtype, len(members.checkpoints)
    params = {name: tensor.to(dtype) for name, tensor in members.params.items()}
    losses_of = partial(target_losses, members.config.model, params)
    at = training_point(members.config.task.noise_variance).to(draws.inputs)
    parts = []
    size = max(1, prompts_at_once(members) // count)
    for start in range(0, num_prompts, size):
        batch = draws.part(start, start + size)
        parts.append(pathwise(losses_of, batch, at.expand(count, len(batch.tasks), 6)))
    gradients, losses = (torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True))
    few = draws.part(0, _FD_PROMPTS)
    at_each = at.expand(count, len(few.tasks), 6)
    is_pool = distribution == "pretrain" and not members.config.task.is_gaussian
    return {
        "pathwise": gradients,
        "score_function": score_function(losses, draws, at, is_pool=is_pool),
        "finite_difference": finite_difference(losses_of, few, at_each, step=_FD_STEP[dtype]).detach(),
    }


def doubts_about_pathwise(pathwise: Tensor, score_function: Tensor, finite_difference: Tensor) -> list[list[str]]:
    """Return for each checkpoint and parameter the reason to doubt the pathwise estimate; empty if there is none."""
    from_scores = metrics.position_mean(pathwise - score_function)
    score_differs = from_scores.value.abs() > _MAX_Z * from_scores.stderr  # false where the score function is NaN
    from_differences = metrics.position_mean(pathwise[:, : finite_difference.shape[1]] - finite_difference)
    # Central differences also have a truncation error, which is far below 0.1 % of the gradient's size.
    tolerance = (_MAX_Z * from_differences.stderr).clamp(min=1e-9) + 1e-3 * finite_difference.abs().mean(1)
    difference_differs = from_differences.value.abs() > tolerance
    texts = ["", "finite differences disagree", "the score function disagrees"]
    texts.append(f"{texts[2]}; {texts[1]}")
    codes = 2 * score_differs.int() + difference_differs.int()  # N 6
    return [[texts[code] for code in member] for member in codes.tolist()]


def training_point(noise_variance: float) -> Float[Tensor, " 6"]:
    """Return the values of the six parameters during training."""
    return torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, noise_variance**0.5], dtype=torch.float64)


def prompt_losses(losses_of: Losses, draws: Draws, at: Float[Tensor, "N B 6"]) -> Float[Tensor, "N B"]:
    """Return the mean loss of each checkpoint on each prompt. Every prompt has its own values `at` of the six parameters."""
    x_mean, x_scale, w_mean, w_scale, noise_mean, noise_scale = at.unsqueeze(-1).unbind(-2)  # each N B 1
    xs = x_mean.unsqueeze(-1) + x_scale.unsqueeze(-1) * draws.inputs  # N B K D
    ws = w_mean + w_scale * draws.tasks  # N B D
    ys = (xs * ws.unsqueeze(-2)).sum(-1) + noise_mean + noise_scale * draws.noise  # N B K
    return losses_of(xs, ys).mean(-1)


def pathwise(
    losses_of: Losses, draws: Draws, at: Float[Tensor, "N B 6"]
) -> tuple[Float[Tensor, "N B 6"], Float[Tensor, "N B"]]:
    """Return the gradient of each prompt's loss by the pathwise estimator, and the losses."""

    def total(point: Tensor) -> tuple[Tensor, Tensor]:
        losses = prompt_losses(losses_of, draws, point)
        return losses.sum(), losses  # prompts do not interact, so the sum gives each prompt its own gradient

    gradients, (_, losses) = grad_and_value(total, has_aux=True)(at)
    return gradients.detach(), losses.detach()


def finite_difference(
    losses_of: Losses, draws: Draws, at: Float[Tensor, "N B 6"], *, step: float
) -> Float[Tensor, "N B 6"]:
    """Return central differences of each prompt's loss with respect to the six parameters."""
    shifts = step * torch.eye(6, dtype=at.dtype, device=at.device)
    differences = [prompt_losses(losses_of, draws, at + dx) - prompt_losses(losses_of, draws, at - dx) for dx in shifts]
    return torch.stack(differences, dim=-1) / (2 * step)


def score_function(
    losses: Float[Tensor, "N B"], draws: Draws, at: Float[Tensor, " 6"], *, is_pool: bool
) -> Float[Tensor, "N B 6"]:
    """Return (loss - mean loss)(score - mean score) B / (B - 1) for each prompt.

    The mean of these numbers over prompts is an unbiased estimate of the gradient.

    Args:
        losses: Losses from `prompt_losses`, for all prompts at the same parameters `at`.
        draws: The draws of the prompts.
        at: Values of the six parameters.
        is_pool: Whether the tasks are a finite pool, so that w has no density.
    """
    scores = _scores(draws, at, is_pool)  # B 6
    count = len(scores)
    centred = (losses - losses.mean(-1, keepdim=True)).unsqueeze(-1) * (scores - scores.mean(0))
    return centred * (count / (count - 1))


def _scores(draws: Draws, at: Float[Tensor, " 6"], is_pool: bool) -> Float[Tensor, "B 6"]:
    """Return the gradient of log p(prompt) with respect to the six parameters."""
    x_mean, x_scale, _, w_scale, _, noise_scale = at
    inputs, tasks = draws.inputs.flatten(1), draws.tasks
    noise = torch.where(noise_scale > 0, draws.noise / noise_scale, torch.nan)  # B K, the score for the mean of y
    if is_pool:
        xs = x_mean + x_scale * draws.inputs  # B K D
        w_scores = ((noise * xs.sum(-1)).sum(-1), (noise * (xs * tasks.unsqueeze(-2)).sum(-1)).sum(-1))
    else:
        w_scores = (tasks.sum(-1) / w_scale, (tasks.square() - 1).sum(-1) / w_scale)
    x_scores = (inputs.sum(-1) / x_scale, (inputs.square() - 1).sum(-1) / x_scale)
    noise_scores = (noise.sum(-1), (noise * draws.noise - 1 / noise_scale).sum(-1))
    return torch.stack([*x_scores, *w_scores, *noise_scores], dim=-1)


def _draws(members: Members, distribution: Distribution, count: int) -> Draws:
    """Return standard draws of inputs, tasks and noise, in float64 if the device supports it."""
    device = next(iter(members.params.values())).device
    source = prompt_source(members.config, stream="gradients/data", distribution=distribution)
    prompts = source.sample(range(1), range(count), device=device)
    zero, indices = torch.zeros(1, dtype=torch.int64, device=device), torch.arange(count, device=device)
    noise = rng.normal(source.noise_key, zero, indices, source.max_examples)
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return Draws(*(tensor[0].to(dtype) for tensor in (prompts.xs, prompts.ws, noise)))
