"""Convergence of chains, in float64: R-hat, effective sample size, standard error of a mean, drift.

R-hat is the rank-normalised split R-hat of the draws or of their folded values (absolute deviations from the median), whichever is
larger. The effective sample size (ESS) is that of the mean, over split chains, with Geyer's initial monotone sequence. Source:
Vehtari, Gelman, Simpson, Carpenter, Buerkner 2021, "Rank-normalization, folding, and localization", sections 3 and 4.

The standard error of a mean over chains is the larger of two estimates. The first is sd / sqrt(ESS). It accounts for
autocorrelation, and also for chains that disagree, because the ESS is then smaller. The second is the standard deviation of the
chains' means divided by the square root of their number. It assumes nothing about the draws within a chain.
"""

import math

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy import fft, stats

MANY_CHAINS = 16
"""With at least this many chains, the spread between chains alone is a reliable error."""


def needed_ess(num_chains: int) -> int:
    """Return the effective sample size that the verdict requires.

    It is larger for few chains, because a comparison of few chains says little. It is smaller for many chains, because their spread
    alone is a reliable error.
    """
    return 400 if num_chains < 4 else 200 if num_chains < MANY_CHAINS else 100


def rhat(draws: Float[ndarray, "K S"]) -> float:
    """Return the rank-normalised split R-hat; NaN for a single chain or fewer than four draws."""
    if len(draws) < 2 or draws.shape[1] < 4:
        return math.nan
    folded = np.abs(draws - np.median(draws))
    return max(_plain_rhat(_normal_scores(_split(values))) for values in (draws, folded))


def ess(draws: Float[ndarray, "K S"]) -> float:
    """Return how many independent draws would give a mean of the same variance; NaN for fewer than four draws."""
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
    """Return the standard error of the mean over all draws of all chains; NaN for one chain with fewer than four draws."""
    if not len(draws):
        return math.nan
    within = math.sqrt(draws.var(ddof=1) / ess(draws)) if draws.shape[1] >= 4 else math.nan
    between = draws.mean(1).std(ddof=1) / math.sqrt(len(draws)) if len(draws) > 1 else math.nan
    return float(np.fmax(within, between))


def drift(draws: Float[ndarray, "K S"]) -> tuple[float, float]:
    """Return the mean of the second half of the draws minus that of the first, and its standard error (after Geweke 1992).

    With at least `MANY_CHAINS` chains, the error is computed from the spread of the chains' own differences. This assumes nothing
    about the draws within a chain.
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
    excess: Float[ndarray, "K S"], pull: Float[ndarray, "K S"], *, is_noisy: bool = True
) -> tuple[float, float]:
    """Return how much the mean excess falls if localization grows by a factor e, with the standard error.

    The fall is (E[pull] - Cov(excess, pull)) / 2. The minibatch of a draw adds nearly the same noise to its excess and its pull, which
    would count as covariance. Different draws have different minibatches. So with noise, we compute the covariances at lags of one and
    two draws and extrapolate them linearly to lag zero.

    Args:
        excess: nbeta (L(w) - L(w0)) at every draw.
        pull: nbeta (w - w0) . grad L at every draw, on the same minibatch as the excess.
        is_noisy: Whether draws have different minibatches.
    """
    if not excess.size or excess.shape[1] < 4:
        return math.nan, math.nan
    f, g = excess - excess.mean(), pull - pull.mean()
    if is_noisy:
        first, second = ((f[:, :-lag] * g[:, lag:] + g[:, :-lag] * f[:, lag:]) / 2 for lag in (1, 2))
        terms = pull[:, 2:] - 2 * first[:, 1:] + second
    else:
        terms = pull - f * g
    return float(terms.mean()) / 2, standard_error(terms) / 2


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
    """Return the autocovariance at lags 0 .. S - 1, each sum divided by S, by the fast Fourier transform."""
    num_draws = draws.shape[1]
    centred = draws - draws.mean(1, keepdims=True)
    spectrum = np.abs(fft.rfft(centred, fft.next_fast_len(2 * num_draws))) ** 2
    return fft.irfft(spectrum, fft.next_fast_len(2 * num_draws))[:, :num_draws] / num_draws
