"""Gradients of the expected loss in the six parameters of the data distribution.

A prompt is x = x_mean + x_scale z, w = w_mean + w_scale t, e = noise_mean + noise_scale n, y = w . x + e. Here z (K, D)
and n (K) are standard normal, and t (D) is the task, the same for the whole prompt. Each parameter is one number for
all coordinates; `noise_scale` is a standard deviation. Training uses means 0, scales 1 and noise_scale sigma, the
square root of `noise_variance`. With finitely many tasks, t is one of the pool, so w_mean and w_scale shift and stretch
the whole pool. L(phi) = E loss is the mean over the K positions of (f(x, y) - y)^2 for a fixed predictor f. For f = 0,
with means m and scales s, the expected loss is

    L = D (m_x^2 + s_x^2)(m_w^2 + s_w^2) + D (D - 1) m_x^2 m_w^2 + 2 D m_x m_w m_e + m_e^2 + s_e^2 .

We compute three estimators of dL/dphi. Each gives a number for each prompt, and the mean over prompts is the estimate
(Mohamed, Rosca, Figurnov, Mnih 2020, "Monte Carlo gradient estimation in machine learning", sections 4 and 5):

- `pathwise`: differentiate through x(phi), y(phi) and the predictor at fixed z, t, n. This is the estimator to use.
- `score_function`: (loss - mean loss) d log p / d phi. This is a check that never differentiates the predictor. With a pool of
  tasks, w has no density. The parameters of w then act on the mean of y given x and t, so their score is the score of y.
  Without noise, y has no density either, and the scores that need this density are NaN.
- `finite_difference`: central differences with the same z, t, n on both sides. This is a second check.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import grad_and_value

from icl import metrics

PARAMETERS = ("x_mean", "x_scale", "w_mean", "w_scale", "noise_mean", "noise_scale")

Predict: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Function from xs (N, B, K, D) and ys (N, B, K) to the predictions (N, B, K) of N members."""


class Draws(NamedTuple):
    """Standard draws z, t, n of B prompts, before scales and means are applied. All members share them."""

    inputs: Float[Tensor, "B K D"]
    tasks: Float[Tensor, "B D"]
    noise: Float[Tensor, "B K"]

    def part(self, start: int, stop: int) -> "Draws":
        """Return the draws of prompts `start` to `stop`."""
        return Draws(*(tensor[start:stop] for tensor in self))


def training_point(noise_variance: float) -> Float[Tensor, " 6"]:
    """Return the values of the six parameters with which runs are trained."""
    return torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, noise_variance**0.5], dtype=torch.float64)


def prompt_losses(predict: Predict, draws: Draws, at: Float[Tensor, "N B 6"]) -> Float[Tensor, "N B"]:
    """Return the loss of each member on each prompt. Every prompt has its own values `at` of the six parameters."""
    x_mean, x_scale, w_mean, w_scale, noise_mean, noise_scale = at.unsqueeze(-1).unbind(-2)  # each N B 1
    xs = x_mean.unsqueeze(-1) + x_scale.unsqueeze(-1) * draws.inputs  # N B K D
    ws = w_mean + w_scale * draws.tasks  # N B D
    ys = (xs * ws.unsqueeze(-2)).sum(-1) + noise_mean + noise_scale * draws.noise  # N B K
    return metrics.squared_error(predict(xs, ys), ys).mean(-1)


def pathwise(
    predict: Predict, draws: Draws, at: Float[Tensor, "N B 6"]
) -> tuple[Float[Tensor, "N B 6"], Float[Tensor, "N B"]]:
    """Return the gradient of each prompt's loss, through the prompt and the predictor, and the losses themselves."""

    def total(point: Tensor) -> tuple[Tensor, Tensor]:
        losses = prompt_losses(predict, draws, point)
        return losses.sum(), losses  # prompts do not interact, so the sum gives each prompt its own gradient

    gradients, (_, losses) = grad_and_value(total, has_aux=True)(at)
    return gradients.detach(), losses.detach()


def finite_difference(
    predict: Predict, draws: Draws, at: Float[Tensor, "N B 6"], *, step: float
) -> Float[Tensor, "N B 6"]:
    """Return central differences of each prompt's loss."""
    shifts = step * torch.eye(6, dtype=at.dtype, device=at.device)
    differences = [prompt_losses(predict, draws, at + dx) - prompt_losses(predict, draws, at - dx) for dx in shifts]
    return torch.stack(differences, dim=-1) / (2 * step)


def score_function(
    losses: Float[Tensor, "N B"], draws: Draws, at: Float[Tensor, " 6"], *, is_pool: bool
) -> Float[Tensor, "N B 6"]:
    """Return (loss - mean loss)(score - mean score) B / (B - 1) of each prompt. Its mean is unbiased for the gradient.

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
    """Return the gradient of log p(prompt) in the six parameters."""
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
