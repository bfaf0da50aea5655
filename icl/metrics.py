"""What predictions are worth: losses per position, gaps between predictors, in-context learning scores.

Pure functions of tensors (..., B, K); leading axes N are members of a population, each with numbers of its own. A
number is a mean over the B prompts and comes with its standard error, the sample deviation over sqrt(B), so prompts
must be independent of each other; positions of one prompt need not be. Squared errors are per target and never divided
by D (Raventos et al. 2023 divide).

- Loss: `position_mean` and `overall_mean` of `squared_error` to the targets (Hoogland et al. 2024, eq. 1 and 4).
- Gap (Delta) to another predictor: the same of the squared distance to its predictions (Raventos et al. 2023, eq. 4).
- ICL score: loss(k2) - loss(k1), so that negative is good; Hoogland et al., eq. 2, write the opposite and plot this.
- Prior-task scores (Hoogland et al.): the gaps to `baselines.zero` and `baselines.task_mean`.

`PositionLoss` accumulates the first over batches and processes.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from icl.validation import ConfigError, plain_number


class Estimate(NamedTuple):
    """A mean over prompts and its standard error, which is NaN for a single prompt."""

    value: Float[Tensor, "..."]
    stderr: Float[Tensor, "..."]


class LossSummary(NamedTuple):
    """The loss at every position, and the mean over positions."""

    positions: Estimate
    mean: Estimate


def squared_error(predictions: Float[Tensor, "*N B K"], targets: Float[Tensor, "*#N B K"]) -> Float[Tensor, "*N B K"]:
    """(prediction - target)^2 at every position; members may share the targets (B, K)."""
    return (predictions - targets).square()


def position_mean(values: Float[Tensor, "*N B K"]) -> Estimate:
    """The mean over prompts at every position, (*N, K)."""
    return _estimate(_moments(values.mT))


def overall_mean(values: Float[Tensor, "*N B K"]) -> Estimate:
    """The mean over positions and prompts, (*N,); its standard error is that of the prompts' own means."""
    return _estimate(_moments(values.mean(-1)))


def gap(predictions: Float[Tensor, "*N B K"], reference: Float[Tensor, "*#N B K"]) -> Estimate:
    """Delta: the mean squared distance between two predictors at every position, (*N, K)."""
    return position_mean(squared_error(predictions, reference))


def icl_score(errors: Float[Tensor, "*N B K"], first: int, second: int) -> Estimate:
    """loss(second) - loss(first) at positions counted from 1, (*N,): negative when more examples help.

    The difference is taken prompt by prompt, so the standard error counts what both positions share.

    Args:
        errors: Squared errors.
        first: The position k1.
        second: The position k2.

    Raises:
        ConfigError: If a position is not from 1 to K.
    """
    num_examples = errors.shape[-1]
    first, second = plain_number(first), plain_number(second)
    for position in (first, second):
        if isinstance(position, bool) or not isinstance(position, int) or not 1 <= position <= num_examples:
            raise ConfigError(f"Positions count from 1 to K = {num_examples}, got {first!r} and {second!r}.")
    return _estimate(_moments(errors[..., second - 1] - errors[..., first - 1]))


def ratio_of_means(numerator: Float[Tensor, "*N B"], denominator: Float[Tensor, "*#N B"]) -> Estimate:
    """mean(numerator) / mean(denominator) over the same prompts, (*N,); the standard error is to first order."""
    below = denominator.mean(-1)
    ratio = numerator.mean(-1) / below
    influence = (numerator - ratio.unsqueeze(-1) * denominator) / below.unsqueeze(-1)
    return Estimate(ratio, _estimate(_moments(influence)).stderr)


def _moments(values: Float[Tensor, "*N B"]) -> Float[Tensor, "3 *N"]:
    """Count, mean and sum of squared deviations."""
    mean = values.mean(-1)
    squares = (values - mean.unsqueeze(-1)).square().sum(-1)
    return torch.stack((torch.full_like(mean, values.shape[-1]), mean, squares))


def _combine(moments: Float[Tensor, "R 3 *N"]) -> Float[Tensor, "3 *N"]:
    """The moments of R samples taken as one; no large sums are subtracted (Chan, Golub, LeVeque 1983)."""
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
    """The class `PositionLoss`, made on first use: importing torchmetrics takes more than a second."""
    from torchmetrics import Metric

    class PositionLoss(Metric):
        """Loss at every position over any number of batches and processes.

        Example:
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
            self.add_state("moments", torch.zeros(3, max_examples + 1), dist_reduce_fx=_combine)

        def update(self, predictions: Float[Tensor, "B K"], targets: Float[Tensor, "B K"]) -> None:
            """Count a batch."""
            errors = squared_error(predictions, targets)
            columns = torch.cat((errors.T, errors.mean(-1).unsqueeze(0)))  # K+1 B
            self.moments = _combine(torch.stack((self.moments, _moments(columns).to(self.moments))))

        def compute(self) -> LossSummary:
            """The losses (K,) and their mean over positions, with standard errors over all prompts so far.

            As everywhere in torchmetrics, tensors of one element (K = 1) come back without axes.
            """
            value, stderr = _estimate(self.moments)
            return LossSummary(Estimate(value[:-1], stderr[:-1]), Estimate(value[-1], stderr[-1]))

    PositionLoss.__qualname__ = "PositionLoss"  # found by this name when it is unpickled
    return PositionLoss
