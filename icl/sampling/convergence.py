"""Statistics of chains, in float64: R-hat, effective sample size, standard error, drift, and the drop of the loss at the mean of the draws.

R-hat is the larger of two rank-normalised split R-hats: one of the draws, and one of their absolute deviations from the median (folded
draws). The effective sample size (ESS) of the mean of the draws is computed from split chains with Geyer's initial monotone sequence.
Source: Vehtari, Gelman, Simpson, Carpenter, Buerkner 2021, "Rank-normalization, folding, and localization", sections 3 and 4.

The standard error of a mean over chains is the larger of two estimates. One estimate is the standard deviation of the
draws divided by sqrt(ESS). This estimate accounts for autocorrelation, and also for chains that disagree, because the
ESS is then smaller. The other estimate is the standard deviation of the chains' means, divided by the square root of
the number of chains. This estimate assumes nothing about the draws within a chain.

The drop is the checkpoint's loss minus the loss at the mean of the draws (`icl.sampling.at_checkpoint`). The mean of finitely many draws
has a sampling error. This error raises the loss at the mean, and so biases the drop. The jackknife over chains removes the bias to first
order. For quadratics it removes the bias completely. The jackknife also gives the standard error (Efron and Stein 1981). With few chains
the standard error is itself uncertain, so the rules of the verdict use Student's t.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy import fft, stats
from scipy.special import ndtr, ndtri, stdtrit
from torch import Tensor

MANY_CHAINS = 16
"""Minimum number of chains for a reliable standard error from the spread between chains alone."""
MIN_FOR_SPREAD = 4
"""Minimum number of chains for which `sensitivity` uses the spread."""
SLOW = 0.7
"""`sensitivity` extrapolates a covariance to lag zero only if the covariance at a lag of two draws is at least this fraction of the
covariance at a lag of one draw. At this fraction, the extrapolated covariance is too small by 9 %."""
NUM_BATCHES = 4
"""Number of batches (sets of consecutive draws) into which a chain is divided, for `standard_error_at_stop`."""


class Drop(NamedTuple):
    """The checkpoint's loss minus the loss at the mean of the draws; NaN if it was not measured."""

    value: float = math.nan
    stderr: float = math.nan
    degrees_of_freedom: float = math.nan
    """Degrees of freedom of the standard error (Satterthwaite 1946)."""


def needed_ess(num_chains: int) -> int:
    """Return the effective sample size that the verdict requires of all chains together.

    One to three chains need an effective sample size of 400, because so few chains can hardly show whether they sample
    the same distribution. At least `MANY_CHAINS` chains need only 100, because the spread between many chains gives a
    reliable standard error. Any other number of chains needs 200.
    """
    return 400 if num_chains < 4 else 200 if num_chains < MANY_CHAINS else 100


def rhat(draws: Float[ndarray, "K S"]) -> float:
    """Return the rank-normalised split R-hat; NaN for a single chain or fewer than four draws."""
    if len(draws) < 2 or draws.shape[1] < 4:
        return math.nan
    folded = np.abs(draws - np.median(draws))
    return max(_plain_rhat(_normal_scores(_split(values))) for values in (draws, folded))


def ess(draws: Float[ndarray, "K S"]) -> float:
    """Return the effective sample size: the number of independent draws whose mean would be as precise as the mean of these draws.

    The result is NaN for chains of fewer than four draws.
    """
    if draws.shape[1] < 4:
        return math.nan
    split = _split(draws)
    num_draws = split.shape[1]
    total = split.size
    if np.ptp(split) <= np.finfo(float).eps * np.abs(split).max():
        return float(total)
    covariance = _autocovariance(split).mean(0)
    within = covariance[0] * num_draws / (num_draws - 1)
    variance = covariance[0] + split.mean(1).var(ddof=1)
    correlation = 1 - (within - covariance) / variance
    correlation[0] = 1.0
    pairs = (
        correlation[: num_draws // 2 * 2].reshape(-1, 2).sum(1)
    )  # sums of neighbouring lags are positive for a reversible chain
    end = int(np.argmax(np.append(pairs, -1.0) < 0))
    tail = max(correlation[2 * end], 0.0) if end < len(pairs) else 0.0
    time = max(2 * np.minimum.accumulate(pairs[:end]).sum() - 1 + tail, 1 / math.log10(total))
    return float(total / time)


def standard_error(draws: Float[ndarray, "K S"]) -> float:
    """Return the standard error of the mean over all draws of all chains.

    The result is NaN without chains, and for a single chain with fewer than four draws.
    """
    if not len(draws):
        return math.nan
    within = math.sqrt(draws.var(ddof=1) / ess(draws)) if draws.shape[1] >= 4 else math.nan
    between = draws.mean(1).std(ddof=1) / math.sqrt(len(draws)) if len(draws) > 1 else math.nan
    return float(np.fmax(within, between))


def standard_error_at_stop(draws: Float[ndarray, "K S"]) -> float:
    """Return an enlarged standard error of the mean, for chains that stop once this error is small enough.

    An estimated standard error is sometimes too small by chance, and then chains are most likely to stop. So we take the larger of
    two estimates. One is `standard_error`. For the other, each chain is divided into `NUM_BATCHES` batches of consecutive draws, and the
    estimate comes from the spread of the batches' means.

    The larger estimate is then multiplied by a ratio of two 97.5 % quantiles: that of Student's t and that of the normal distribution.
    If there are n batches, Student's t has n - 1 degrees of freedom. For example, four chains have 16 batches, and the ratio is 1.09.
    """
    length = draws.shape[1] // NUM_BATCHES
    if not len(draws) or length < 1:
        return standard_error(draws)
    num_means = len(draws) * NUM_BATCHES
    means = draws[:, -NUM_BATCHES * length :].reshape(num_means, length).mean(1)
    larger = np.fmax(standard_error(draws), means.std(ddof=1) / math.sqrt(num_means))
    return float(larger * stdtrit(num_means - 1, 0.975) / ndtri(0.975))


def drift(draws: Float[ndarray, "K S"]) -> tuple[float, float]:
    """Return the mean of the second half of the draws minus the mean of the first half, and its standard error (after Geweke 1992).

    With at least `MANY_CHAINS` chains, the standard error is computed from the spread of the chains' own differences. This assumes nothing
    about the draws within a chain. Both results are NaN for chains of fewer than eight draws.
    """
    half = draws.shape[1] // 2
    if not len(draws) or half < 4:
        return math.nan, math.nan
    first, second = draws[:, :half], draws[:, -half:]
    difference = second.mean(1) - first.mean(1)
    if len(draws) >= MANY_CHAINS:
        return float(difference.mean()), float(difference.std(ddof=1)) / math.sqrt(len(draws))
    return float(difference.mean()), math.hypot(standard_error(first), standard_error(second))


def sensitivity(
    excess: Float[ndarray, "K S"],
    pull: Float[ndarray, "K S"],
    spread: Float[ndarray, "K S"],
    *,
    is_noisy: bool = True,
) -> tuple[float, float]:
    """Return the rate at which the mean excess falls as the logarithm of the localization grows, and the standard error.

    This rate is minus the derivative, and equals Cov(excess, spread) / 2. The spread has no minibatch noise, so its covariance with the
    excess has no bias. But in flat directions the spread varies much, which makes this estimate imprecise if most directions are flat. The
    spread may still grow in all chains. So we subtract from every draw the mean over chains at the same draw, which needs at least
    `MIN_FOR_SPREAD` chains.

    Integration by parts gives the same number as (E[pull] - Cov(excess, pull)) / 2, which is more precise if most directions are flat. But
    the minibatch of a draw adds nearly the same noise to its excess and its pull, and this common noise would add to their covariance.
    Different draws have different minibatches. So with minibatches, we compute this covariance at lags of one and two draws, and
    extrapolate it linearly to lag zero. The extrapolation is wrong if the covariance falls fast from draw to draw, as with thinning or
    large steps.

    We return the more precise of the two estimates. But the extrapolation is wrong if the covariance falls fast (`SLOW`), or if the two
    estimates differ by more than three standard errors. In these cases, we return the estimate from the spread.

    Args:
        excess: nbeta (L(w) - L(w0)) at every draw.
        pull: nbeta (w - w0) . grad L at every draw, on the same minibatch as the excess.
        spread: localization |w - w0|^2 at every draw.
        is_noisy: Whether draws have different minibatches.
    """
    if not excess.size or excess.shape[1] < 4:
        return math.nan, math.nan
    num_chains, falls_fast = len(excess), False
    f, g = excess - excess.mean(), pull - pull.mean()
    by_pull = pull - f * g
    if is_noisy:
        first, second = ((f[:, :-lag] * g[:, lag:] + g[:, :-lag] * f[:, lag:]) / 2 for lag in (1, 2))
        by_pull = pull[:, 2:] - 2 * first[:, 1:] + second
        falls_fast = first.mean() > 3 * standard_error(first) and not SLOW <= second.mean() / first.mean() <= 1
    from_pull = float(by_pull.mean()) / 2, standard_error(by_pull) / 2
    if num_chains < MIN_FOR_SPREAD:
        return from_pull
    by_spread = (excess - excess.mean(0)) * (spread - spread.mean(0)) * num_chains / (num_chains - 1)
    from_spread = float(by_spread.mean()) / 2, standard_error(by_spread) / 2
    differs = is_noisy and abs(from_pull[0] - from_spread[0]) > 3 * math.hypot(from_pull[1], from_spread[1])
    return from_spread if falls_fast or differs else min(from_pull, from_spread, key=lambda estimate: estimate[1])


def drop_at_mean(
    per_chain: Float[Tensor, "K I"],
    without: Float[Tensor, "K I"],
    pooled: Float[Tensor, "1 I"],
    *,
    are_all: bool = False,
    rounding: float = 0.0,
) -> Drop:
    """Estimate the drop of the loss at the mean of K chains: the jackknife estimate, or the chains' average drop if that is larger.

    Args:
        per_chain: The loss at the checkpoint minus the loss at each chain's mean, on each of I batches.
        without: For each chain, the loss at the checkpoint minus the loss at the mean of all other chains.
        pooled: The loss at the checkpoint minus the loss at the mean of all chains.
        are_all: Whether the batches are all the data.
        rounding: Rounding error of a drop, from the limited precision of the losses.
    """
    num = len(per_chain)
    if not per_chain.numel():
        return Drop()
    drops = [_with_error(per_chain.mean(0), per_chain.mean(1), 1 / num, are_all, rounding)]
    if num > 1:
        jackknife = num * pooled[0] - (num - 1) * without.mean(0)
        drops.append(_with_error(jackknife, without.mean(1), (num - 1) ** 2 / num, are_all, rounding))
    return max(drops, key=lambda drop: drop.value)


def significance_threshold(degrees_of_freedom: float) -> float:
    """Return how many standard errors are as significant under Student's t as three are under a normal distribution."""
    return float(stdtrit(degrees_of_freedom, ndtr(3.0)))


def _split(draws: Float[ndarray, "K S"]) -> Float[ndarray, "2*K S//2"]:
    half = draws.shape[1] // 2
    return np.concatenate((draws[:, :half], draws[:, -half:]))


def _normal_scores(draws: Float[ndarray, "K S"]) -> Float[ndarray, "K S"]:
    ranks = stats.rankdata(draws, method="average").reshape(draws.shape)
    return stats.norm.ppf((ranks - 3 / 8) / (draws.size + 1 / 4))


def _plain_rhat(draws: Float[ndarray, "K S"]) -> float:
    num_draws = draws.shape[1]
    within = draws.var(axis=1, ddof=1).mean()
    if within == 0:
        return 1.0 if np.ptp(draws) == 0 else math.inf
    return math.sqrt((num_draws - 1) / num_draws + draws.mean(1).var(ddof=1) / within)


def _autocovariance(draws: Float[ndarray, "K S"]) -> Float[ndarray, "K S"]:
    """Return the autocovariance at lags 0 to S - 1, by the fast Fourier transform. Each sum over draws is divided by S."""
    num_draws = draws.shape[1]
    centred = draws - draws.mean(1, keepdims=True)
    spectrum = np.abs(fft.rfft(centred, fft.next_fast_len(2 * num_draws))) ** 2
    return fft.irfft(spectrum, fft.next_fast_len(2 * num_draws))[:, :num_draws] / num_draws


def _with_error(
    by_batch: Float[Tensor, " I"], by_chain: Float[Tensor, " K"], factor: float, are_all: bool, rounding: float
) -> Drop:
    """Return the mean over batches with its standard error. The square of this error includes `factor` times the variance over chains."""
    num_chains, num_batches = len(by_chain), len(by_batch)
    if num_batches == 1 and not are_all:
        return Drop(float(by_batch.mean()), math.inf, math.inf)  # one batch does not show how batches differ
    chain_variance = factor * float(by_chain.var()) if num_chains > 1 else 0.0
    batch_variance = float(by_batch.var()) / num_batches if num_batches > 1 and not are_all else 0.0
    total = chain_variance + batch_variance
    uncertain = chain_variance**2 / max(1, num_chains - 1) + batch_variance**2 / max(1, num_batches - 1)
    degrees_of_freedom = total**2 / uncertain if uncertain else math.inf
    return Drop(float(by_batch.mean()), (total + rounding**2) ** 0.5, degrees_of_freedom)
