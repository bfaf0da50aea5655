"""Gradients of the expected loss in the six parameters of the data distribution.

A prompt is x = x_mean + x_scale z, w = w_mean + w_scale t, e = noise_mean + noise_scale n, y = w . x + e, with standard
normal z (K, D), n (K) and, ONE for the whole prompt, a task t (D). Each parameter is one number for all coordinates;
`noise_scale` is a deviation. Training has means 0, scales 1 and noise_scale sigma. For finitely many tasks t is one of the
pool, so w_mean and w_scale shift and stretch the pool itself, affinely. L(phi) = E loss is the mean over the K positions
of (f(x, y) - y)^2, the predictor f being fixed; for f = 0 it is, with m and s for means and scales,

    L = D (m_x^2 + s_x^2)(m_w^2 + s_w^2) + D (D - 1) m_x^2 m_w^2 + 2 D m_x m_w m_e + m_e^2 + s_e^2 .

Three estimators of dL/dphi, a number for each prompt; their mean is the estimate (Mohamed, Rosca, Figurnov, Mnih 2020,
"Monte Carlo gradient estimation in machine learning", sections 4 and 5):

- `pathwise`: differentiate through x(phi), y(phi) and the predictor at fixed z, t, n. The one to use.
- `score_function`: (loss - mean loss) d log p / d phi, a check that never differentiates the predictor. Of a pool the law
  of w has no density; there the score of w's parameters is that of y given x and t, whose mean they move. Without noise
  those that need its density are NaN.
- `finite_difference`: central differences with the same z, t, n on both sides.
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
"""xs (N, B, K, D) and ys (N, B, K) to the N members' predictions (N, B, K)."""


class Draws(NamedTuple):
    """What is drawn of B prompts, before scales and means; every member sees the same."""

    inputs: Float[Tensor, "B K D"]
    tasks: Float[Tensor, "B D"]
    noise: Float[Tensor, "B K"]

    def part(self, start: int, stop: int) -> "Draws":
        """Some of the prompts."""
        return Draws(*(tensor[start:stop] for tensor in self))


def training_point(noise_variance: float) -> Float[Tensor, " 6"]:
    """The parameters under which runs are trained."""
    return torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, noise_variance**0.5], dtype=torch.float64)


def prompt_losses(predict: Predict, draws: Draws, at: Float[Tensor, "N B 6"]) -> Float[Tensor, "N B"]:
    """The loss of each member on each prompt, every prompt under parameters of its own."""
    xs, ys = _prompts(draws, at)
    return metrics.squared_error(predict(xs, ys), ys).mean(-1)


def pathwise(
    predict: Predict, draws: Draws, at: Float[Tensor, "N B 6"]
) -> tuple[Float[Tensor, "N B 6"], Float[Tensor, "N B"]]:
    """The gradient of each prompt's loss, through the prompt and the predictor, and the losses themselves."""

    def total(point: Tensor) -> tuple[Tensor, Tensor]:
        losses = prompt_losses(predict, draws, point)
        return losses.sum(), losses  # a prompt's loss has no other's part, so the gradient of the sum is each one's own

    gradients, (_, losses) = grad_and_value(total, has_aux=True)(at)
    return gradients.detach(), losses.detach()


def finite_difference(
    predict: Predict, draws: Draws, at: Float[Tensor, "N B 6"], *, step: float
) -> Float[Tensor, "N B 6"]:
    """Central differences of each prompt's loss."""
    shifts = step * torch.eye(6, dtype=at.dtype, device=at.device)
    sides = [(prompt_losses(predict, draws, at + one), prompt_losses(predict, draws, at - one)) for one in shifts]
    return torch.stack([(above - below) / (2 * step) for above, below in sides], dim=-1)


def score_function(
    losses: Float[Tensor, "N B"], draws: Draws, at: Float[Tensor, " 6"], *, is_pool: bool
) -> Float[Tensor, "N B 6"]:
    """(loss - mean loss)(score - mean score) B / (B - 1) of each prompt: its mean is unbiased for the gradient.

    Args:
        losses: Of `prompt_losses`, all prompts under the same parameters `at`.
        draws: The draws behind them.
        at: The parameters.
        is_pool: Whether the tasks are a finite pool, so that w has no density.
    """
    scores = _scores(draws, at, is_pool)  # B 6
    count = len(scores)
    centred = (losses - losses.mean(-1, keepdim=True)).unsqueeze(-1) * (scores - scores.mean(0))
    return centred * (count / (count - 1))


def _prompts(draws: Draws, at: Float[Tensor, "N B 6"]) -> tuple[Float[Tensor, "N B K D"], Float[Tensor, "N B K"]]:
    x_mean, x_scale, w_mean, w_scale, noise_mean, noise_scale = at.unsqueeze(-1).unbind(-2)  # each N B 1
    xs = x_mean.unsqueeze(-1) + x_scale.unsqueeze(-1) * draws.inputs  # N B K D
    ws = w_mean + w_scale * draws.tasks  # N B D
    ys = (xs * ws.unsqueeze(-2)).sum(-1) + noise_mean + noise_scale * draws.noise  # N B K
    return xs, ys


def _scores(draws: Draws, at: Float[Tensor, " 6"], is_pool: bool) -> Float[Tensor, "B 6"]:
    """The gradient of log p(prompt) in the parameters."""
    x_mean, x_scale, _, w_scale, _, noise_scale = at
    inputs, tasks = draws.inputs.flatten(1), draws.tasks
    noise = torch.where(noise_scale > 0, draws.noise / noise_scale, torch.nan)  # B K, the score of y's mean
    if is_pool:
        xs = x_mean + x_scale * draws.inputs  # B K D
        w_scores = ((noise * xs.sum(-1)).sum(-1), (noise * (xs * tasks.unsqueeze(-2)).sum(-1)).sum(-1))
    else:
        w_scores = (tasks.sum(-1) / w_scale, (tasks.square() - 1).sum(-1) / w_scale)
    x_scores = (inputs.sum(-1) / x_scale, (inputs.square() - 1).sum(-1) / x_scale)
    noise_scores = (noise.sum(-1), (noise * draws.noise - 1 / noise_scale).sum(-1))
    return torch.stack([*x_scores, *w_scores, *noise_scores], dim=-1)
