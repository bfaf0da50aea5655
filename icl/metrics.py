"""Metrics of predictions: losses by position, gaps to other predictors, in-context learning scores.

All metrics are pure functions of tensors (..., B, K). Leading axes are members of a population, and each member gets its own results. A
result is a mean over the B prompts, with its standard error: the sample standard deviation divided by sqrt(B). The standard error is
correct if the prompts are independent; the positions of one prompt may be correlated. Squared errors are per target and never divided by D
(Raventos et al. 2023 divide by D).

- Loss: `position_mean` and `overall_mean` of the `squared_error` to the targets (Hoogland et al. 2024, eq. 1 and 4).
- Gap to another predictor (delta): the same means of the squared difference between the two predictions (Raventos et al. 2023, eq. 4).
- ICL score: loss(k2) - loss(k1), so negative values are good. In eq. 2, Hoogland et al. define the score with the opposite sign, but their
  plots have our sign.
- Prior-task scores (Hoogland et al.): the gaps to `baselines.zero` and `baselines.task_mean`.

`PositionLoss` accumulates losses over batches and processes.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from icl.config.validation import whole


class Estimate(NamedTuple):
    """Mean over prompts with its standard error, which is NaN for a single prompt."""

    value: Float[Tensor, "..."]
    stderr: Float[Tensor, "..."]


class LossSummary(NamedTuple):
    """Loss at every position, and its mean over positions."""

    positions: Estimate
    mean: Estimate


def squared_error(predictions: Float[Tensor, "*N B K"], targets: Float[Tensor, "*#N B K"]) -> Float[Tensor, "*N B K"]:
    """Return (prediction - target)^2 at every position, in float32 or float64. Members may share the targets (B, K)."""
    return (_widen(predictions) - _widen(targets)).square()


def position_mean(values: Float[Tensor, "*N B K"]) -> Estimate:
    """Return the mean over prompts at every position, of shape (*N, K)."""
    return _estimate(_moments(values.mT))


def overall_mean(values: Float[Tensor, "*N B K"]) -> Estimate:
    """Return the mean over positions and prompts, of shape (*N,). The standard error is computed from each prompt's mean over positions."""
    return _estimate(_moments(_widen(values).mean(-1)))


def icl_score(errors: Float[Tensor, "*N B K"], first: int, second: int) -> Estimate:
    """Return the score loss(second) - loss(first), of shape (*N,). The score is negative if more examples help. Positions count from 1.

    The difference is taken within each prompt, so the standard error accounts for the correlation between the two positions.

    Args:
        errors: Squared errors.
        first: The position k1.
        second: The position k2.

    Raises:
        ConfigError: If a position is not a whole number from 1 to K.
    """
    num_examples = errors.shape[-1]
    first, second = whole("first", first, 1, num_examples), whole("second", second, 1, num_examples)
    return _estimate(_moments(_widen(errors[..., second - 1]) - _widen(errors[..., first - 1])))


def ratio_of_means(numerator: Float[Tensor, "*N B"], denominator: Float[Tensor, "*#N B"]) -> Estimate:
    """Return mean(numerator) / mean(denominator) over the same prompts, of shape (*N,).

    The standard error is computed from the first-order expansion in both means (the delta method).
    """
    numerator, denominator = _widen(numerator), _widen(denominator)
    denominator_mean = denominator.mean(-1)
    ratio = numerator.mean(-1) / denominator_mean
    influence = (numerator - ratio.unsqueeze(-1) * denominator) / denominator_mean.unsqueeze(-1)
    return Estimate(ratio, _estimate(_moments(influence)).stderr)


def _widen(values: Tensor) -> Tensor:
    """Convert numbers with fewer than 32 bits to float32. In float16, squares overflow; in bfloat16, counts above 256 are rounded."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _moments(values: Float[Tensor, "*N B"]) -> Float[Tensor, "3 *N"]:
    """Return the count, the mean and the sum of squared deviations from the mean."""
    values = _widen(values)
    mean = values.mean(-1)
    squares = (values - mean.unsqueeze(-1)).square().sum(-1)
    return torch.stack((torch.full_like(mean, values.shape[-1]), mean, squares))


def _combine(moments: Float[Tensor, "R 3 *N"]) -> Float[Tensor, "3 *N"]:
    """Join R samples into one and return its moments, without subtracting large sums (Chan, Golub and LeVeque 1983)."""
    counts, means, squares = moments.unbind(1)  # each R *N
    count = counts.sum(0)
    mean = (counts * means).sum(0) / count.clamp(min=1)
    return torch.stack((count, mean, (squares + counts * (means - mean).square()).sum(0)))


def _estimate(moments: Float[Tensor, "3 *N"]) -> Estimate:
    count, mean, squares = moments
    return Estimate(mean, (squares / (count - 1) / count).sqrt())


def __getattr__(name: str) -> Any:
    if name == "PositionLoss":
        return _position_loss()
    raise AttributeError(f"module 'icl.metrics' has no attribute '{name}'")


@cache
def _position_loss() -> type:
    """Return the class `PositionLoss`. The class is made on first use, because importing torchmetrics takes more than a second."""
    from torchmetrics import Metric

    class PositionLoss(Metric):
        """Loss at every position, accumulated over any number of batches and processes.

        Examples:
            >>> loss = PositionLoss(max_examples=2)
            >>> loss.update(torch.zeros(3, 2), torch.tensor([[1.0, 2.0]] * 3))
            >>> loss.compute().positions.value.tolist()
            [1.0, 4.0]
        """

        is_differentiable = False
        higher_is_better = False
        full_state_update = False
        moments: Tensor

        def __init__(self, max_examples: int, **options: Any) -> None:
            super().__init__(**options)
            self.add_state("moments", torch.zeros(3, max_examples + 1, dtype=torch.float64), dist_reduce_fx=_combine)

        def update(self, predictions: Float[Tensor, "B K"], targets: Float[Tensor, "B K"]) -> None:
            """Add a batch of predictions and targets."""
            errors = squared_error(predictions, targets)
            columns = torch.cat((errors.T, errors.mean(-1).unsqueeze(0)))  # K+1 B
            self.moments = _combine(torch.stack((self.moments, _moments(columns).to(self.moments))))

        def compute(self) -> LossSummary:
            """Return the losses (K,) and their mean over positions, with standard errors over all prompts so far.

            For K = 1, torchmetrics returns the losses without an axis.
            """
            value, stderr = _estimate(self.moments)
            return LossSummary(Estimate(value[:-1], stderr[:-1]), Estimate(value[-1], stderr[-1]))

    PositionLoss.__qualname__ = "PositionLoss"  # the name by which pickle looks it up
    return PositionLoss
