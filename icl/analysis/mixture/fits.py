"""Mixtures of dMMSE and ridge that are closest to a model: one with a fixed weight, and one with the weights of Bayes' rule.

At position k, let r_k be the model's prediction minus the prediction of ridge, and d_k the prediction of dMMSE minus the prediction of
ridge. A mixture predicts ridge + w_k d_k. The best mixture has the smallest mean of (r_k - w_k d_k)^2 over prompts.

- `fixed`: w_k = p for all prompts. The best p is mean(r d) / mean(d^2), limited to [0, 1]. For squared distances, this p equals the
  relative distance of Wurgaft et al. 2025 (arXiv 2506.17859; the formula is from their code).
- `bayes`: the Bayes predictor under the prior that draws w from the M tasks with probability pi, and from N(0, I) otherwise. The
  posterior probability of the discrete prior is w_k = sigmoid(lambda + log_ratio_k). Here lambda = log(pi / (1 - pi)) are the prior
  log odds. log_ratio_k is the logarithm of the Bayes factor: the marginal likelihood of the examples before position k under the
  discrete prior, divided by their marginal likelihood under the Gaussian prior.

Standard errors are over prompts, by the delta method. The score of a prompt is minus half the derivative of its squared
residual (r_k - w_k d_k)^2 with respect to lambda. The best lambda solves mean(score) = 0. Its standard error is
std(score) / (sqrt(B) |mean(d score / d lambda)|). All numbers are float64.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from icl import metrics
from icl.metrics import Estimate

MAX_LOG_ODDS = 20.0
"""The search covers log odds between minus and plus this number. Pure ridge and pure dMMSE are tried as well."""
_NUM_GRID = 81
_NUM_BISECTIONS = 48
_TIE = 1e-12
"""Two mean squared differences count as equal if they differ by less than this share of the mean squared difference between dMMSE and
ridge."""


class Pair(NamedTuple):
    """The predictions of ridge and dMMSE on fixed prompts."""

    ridge: Float[Tensor, "B K"]
    difference: Float[Tensor, "B K"]
    """The difference d: the prediction of dMMSE minus the prediction of ridge."""
    log_ratio: Float[Tensor, "B K"]
    """Logarithm of the Bayes factor of the discrete prior, from the examples before each position."""


class Fit(NamedTuple):
    """The best mixture at each position 1..K. The last entry is the best single mixture for all positions."""

    parameter: Estimate
    """The weight p, or the prior log odds lambda."""
    residual: Estimate
    """Mean squared difference between the model and the best mixture."""
    share: Estimate
    """The residual divided by the mean squared difference between dMMSE and ridge."""
    excess: Float[Tensor, " C"]
    """Number that shows whether the parameter is at a limit.

    For p, the distance by which the best unlimited p lies outside [0, 1], in standard errors. For lambda, -inf or inf if lambda is at a
    limit of the search; NaN if all log odds fit equally well; else 0.
    """


def log_bayes_factors(pool: Float[Tensor, "B K"], new: Float[Tensor, "B K"]) -> Float[Tensor, "B K"]:
    """Return log p(y_1..y_{k-1} | M tasks) - log p(y_1..y_{k-1} | new tasks) at every position k; it is 0 at k = 1.

    The arguments are the log densities of the first k targets, for k = 1..K.
    """
    return F.pad((pool - new)[:, :-1], (1, 0))


def fixed_scores(difference: Float[Tensor, "B K"], offset: Float[Tensor, "B K"]) -> Float[Tensor, " B"]:
    """Return a score of every prompt. The mean score is positive if and only if the best fixed weight exceeds 1/2.

    `difference` is d and `offset` is r; the module's docstring defines both.
    """
    return (difference * (offset - difference / 2)).mean(-1)


def bayes_scores(pair: Pair, offset: Float[Tensor, "B K"], log_odds: float = 0.0) -> Float[Tensor, " B"]:
    """Return a score of every prompt. The mean score is positive if slightly larger prior odds bring the mixture closer to the model."""
    return _slope(pair, offset, torch.tensor(log_odds, dtype=torch.float64)).mean(-1)


def fit_fixed(pair: Pair, predictions: Float[Tensor, "B K"]) -> Fit:
    """Return the best fixed weights."""
    offset = predictions - pair.ridge
    square = _columns(pair.difference.square())
    best = metrics.ratio_of_means(_columns(offset * pair.difference).mT, square.mT)
    weight = best.value.clamp(0, 1)
    excess = (best.value - weight).abs() / best.stderr.clamp(min=torch.finfo(torch.float64).tiny)
    return Fit(Estimate(weight, best.stderr), *_residual(pair, offset, weight.expand(len(offset), -1)), excess)


def fit_bayes(pair: Pair, predictions: Float[Tensor, "B K"]) -> Fit:
    """Return the best prior log odds. We take the best value on a grid, then find the zero of the derivative near it by bisection."""
    offset = predictions - pair.ridge
    grid = torch.linspace(-MAX_LOG_ODDS, MAX_LOG_ODDS, _NUM_GRID, dtype=torch.float64)
    heights = torch.stack([_mean_squares(pair, offset, (odds + pair.log_ratio).sigmoid()) for odds in grid])
    best = heights.argmin(0)
    low, high = grid[(best - 1).clamp(min=0)], grid[(best + 1).clamp(max=len(grid) - 1)]
    for _ in range(_NUM_BISECTIONS):
        middle = (low + high) / 2
        is_below = _scores(pair, offset, middle).mean(0) > 0
        low, high = torch.where(is_below, middle, low), torch.where(is_below, high, middle)
    # Pure ridge and pure dMMSE correspond to the log odds -inf and inf.
    parts = torch.stack([_mean_squares(pair, offset, torch.full_like(offset, weight)) for weight in (0.0, 1.0)])
    ends = torch.minimum(parts, heights[[0, -1]])
    close = torch.minimum(heights.amin(0), ends.amin(0)) + _TIE * _columns(pair.difference.square()).mean(0)
    at_low, at_high = ends <= close
    excess = torch.where(at_low, -math.inf, 0.0) + torch.where(
        at_high, math.inf, 0.0
    )  # NaN if both limits fit equally well
    bound = torch.where(excess == 0, (low + high) / 2, MAX_LOG_ODDS * excess.sign())
    is_part = torch.where(at_low, parts[0] <= heights[0], parts[1] <= heights[-1]) & excess.isinf()
    log_odds = torch.where(is_part, excess.double(), bound)
    scores = _scores(pair, offset, log_odds)
    stderr = scores.std(0) / len(scores) ** 0.5 / _curvature(pair, offset, log_odds).mean(0).abs()
    stderr = stderr.where(excess == 0, math.nan)
    return Fit(Estimate(bound, stderr), *_residual(pair, offset, _weights(pair, log_odds)), excess)


def _columns(values: Float[Tensor, "B K"]) -> Float[Tensor, "B C"]:
    """Append the mean over positions to the values at each position, so C = K + 1."""
    return torch.cat((values, values.mean(-1, keepdim=True)), dim=-1)


def _mean_squares(pair: Pair, offset: Float[Tensor, "B K"], weights: Float[Tensor, "B K"]) -> Float[Tensor, " C"]:
    """Return the mean over prompts of the squared residual at each of K positions, and then the mean of these K numbers.

    The residual is `offset - weights * pair.difference`. There is one weight for each prompt and position.
    """
    squares = (offset - weights * pair.difference).square().mean(0)  # K
    return torch.cat((squares, squares.mean(0, keepdim=True)))


def _weights(pair: Pair, log_odds: Float[Tensor, " C"]) -> Float[Tensor, "B 2 K"]:
    """Return two sets of weights: with the best log odds of each position, and with the best log odds of all positions together."""
    both = torch.stack((log_odds[:-1], log_odds[-1].expand(len(log_odds) - 1)))  # 2 K
    return (both + pair.log_ratio.unsqueeze(1)).sigmoid()


def _join(values: Float[Tensor, "B 2 K"]) -> Float[Tensor, "B C"]:
    """Return the values of the first set at each position, and the mean over positions of the second set (see `_weights`)."""
    return torch.cat((values[:, 0], values[:, 1].mean(-1, keepdim=True)), dim=-1)


def _residuals(pair: Pair, offset: Float[Tensor, "B K"], weights: Float[Tensor, "B 2 K"]) -> Float[Tensor, "B C"]:
    return _join((offset.unsqueeze(1) - weights * pair.difference.unsqueeze(1)).square())


def _residual(pair: Pair, offset: Float[Tensor, "B K"], weights: Tensor) -> tuple[Estimate, Estimate]:
    """Return the mean squared residual, and its ratio to the mean of d^2.

    Weights have the shape (B, C) for `fixed`, and (B, 2, K) for `bayes` (see `_weights`).
    """
    if weights.ndim == 2:
        weights = torch.stack((weights[:, :-1], weights[:, -1:].expand(-1, weights.shape[1] - 1)), dim=1)
    squares = _residuals(pair, offset, weights)
    share = metrics.ratio_of_means(squares.mT, _columns(pair.difference.square()).mT)
    # At the best parameter, the derivative of the residual is zero. So to first order, the error of the parameter does not change the
    # residual.
    return metrics.position_mean(squares), share


def _slope(pair: Pair, offset: Float[Tensor, "*S K"], log_odds: Tensor) -> Float[Tensor, "*S K"]:
    """Return minus half the derivative of the squared residual with respect to the log odds."""
    weights = (log_odds + pair.log_ratio).sigmoid()
    return (offset - weights * pair.difference) * pair.difference * weights * (1 - weights)


def _scores(pair: Pair, offset: Float[Tensor, "B K"], log_odds: Float[Tensor, " C"]) -> Float[Tensor, "B C"]:
    own, common = _slope(pair, offset, log_odds[:-1]), _slope(pair, offset, log_odds[-1])
    return torch.cat((own, common.mean(-1, keepdim=True)), dim=-1)


def _curvature(pair: Pair, offset: Float[Tensor, "B K"], log_odds: Float[Tensor, " C"]) -> Float[Tensor, "B C"]:
    """Return the derivatives of the scores with respect to the log odds."""
    weights = _weights(pair, log_odds)
    rates = weights * (1 - weights)
    difference = pair.difference.unsqueeze(1)
    residuals = offset.unsqueeze(1) - weights * difference
    return _join(difference * rates * (residuals * (1 - 2 * weights) - difference * rates))
