"""Scatter of the points of a curve about a smooth trend: its size, and its correlation between saved steps.

Because of training noise, the scatter of a measured curve is correlated: after a point that lies above the trend, the
next points often lie above it too. An analysis that treats such points as independent finds rises and stages that do
not exist. We model n points at u = ln(step + 1) as

    y_i = f(u_i) + e_i,   f ~ a * Matern(5/2, l),   cov(e_i, e_j) = (known_i + white) [i = j] + wander exp(-|i - j| / tau).

The trend f is a Gaussian process with variance a and length l. Its Matern(5/2) kernel makes it smooth (Rasmussen and Williams 2006, section
4.2.1). The deviation e from the trend has three parts: the known errors of the points, and the two parts of the scatter. One part of the
scatter (`white`) is independent between points. The other part (`wander`) is correlated: it is an autoregression of order one over the
saved steps. The bracket [i = j] is 1 if i = j, else 0. In this formula, known_i, white and wander are variances. We choose the values of
the five parameters (a, l, white, wander, tau) that maximise the posterior density (equation 5.8 of the same book, with its gradient 5.9).
The priors of ln l (mean 0, standard deviation 1) and of ln tau (mean ln 3, standard deviation 2) are normal and weak.

Trend and wander differ only in their smoothness. A trend that bends within a few saved steps therefore counts as wander.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize

_TAU = (0.3, 12.0)
"""Limits of the correlation time tau, in saved steps."""
_TYPICAL_TAU = 3.0
_LEAST = 1e-10
"""Smallest variance, as a share of the values' variance. Smaller variances are rounding errors."""


class Scatter(NamedTuple):
    """Standard deviations of the scatter about the trend, in the units of the values."""

    white: float
    """Standard deviation of the part that is independent between saved steps."""
    wander: float
    """Standard deviation of the part that is correlated between saved steps."""
    tau: float
    """Correlation time of the wander, in saved steps."""

    @property
    def phi(self) -> float:
        """Correlation of the wander between neighbouring saved steps."""
        return math.exp(-1 / self.tau)

    @property
    def total(self) -> float:
        """Standard deviation of one point about the trend."""
        return math.hypot(self.white, self.wander)

    @property
    def neighbours(self) -> float:
        """Correlation of the whole scatter between neighbouring saved steps; 0 without scatter."""
        return self.phi * self.wander**2 / self.total**2 if self.total else 0.0

    def scaled(self, factor: float) -> "Scatter":
        """Return the scatter multiplied by a factor."""
        return self._replace(white=factor * self.white, wander=factor * self.wander)

    def difference_variance(self, lag: int) -> float:
        """Return the variance of the difference between two points that are `lag` saved steps apart.

        The closer the two points are, the more of their correlated parts cancels.
        """
        return 2 * (self.white**2 + self.wander**2 * (1 - self.phi**lag))

    def covariance(self, num_points: int) -> Float[np.ndarray, "S S"]:
        """Return the covariance of the scatter of consecutive saved steps."""
        return self.white**2 * np.eye(num_points) + self.wander**2 * np.exp(-_distances(num_points) / self.tau)


def estimate_scatter(
    times: Float[np.ndarray, " S"],
    values: Float[np.ndarray, " S"],
    stderr: Float[np.ndarray, " S"] | float = 0.0,
    *,
    shortest: float = 1.0,
    longest: float = 10.0,
) -> Scatter:
    """Estimate the scatter of a curve's points about its trend.

    Args:
        times: u = ln(step + 1) of the saved steps, in ascending order.
        values: The curve at the saved steps.
        stderr: Known, independent standard errors of the points. They do not count as scatter.
        shortest: Smallest length l of the trend. The default, 1, corresponds to a factor of e in the step.
        longest: Largest length l. A trend with sharp bends needs a small value; otherwise the bends count as wander.
    """
    unit = float(values.std()) or 1.0
    scaled = (values - values.mean()) / unit
    known = np.broadcast_to((np.asarray(stderr) / unit) ** 2, scaled.shape) + _LEAST
    distance, lag = math.sqrt(5) * np.abs(times[:, None] - times), _distances(len(times))
    identity = np.eye(len(times))

    def density(theta: np.ndarray) -> tuple[float, np.ndarray]:
        """Return minus the logarithm of the posterior density, and its gradient."""
        amplitude, length, white, wander, tau = np.exp(theta)
        s = distance / length
        decay = amplitude * np.exp(-s)
        trend, correlated = decay * (1 + s + s**2 / 3), wander * np.exp(-lag / tau)
        # Derivatives of the covariance with respect to the logarithms of the five parameters.
        slopes = (trend, decay * (1 + s) * s**2 / 3, white * identity, correlated, correlated * lag / tau)
        factor = cho_factor(trend + correlated + np.diag(white + known), lower=True, check_finite=False)
        solved = cho_solve(factor, scaled, check_finite=False)
        contrast = cho_solve(factor, identity, check_finite=False) - np.outer(solved, solved)
        gradient = 0.5 * np.array([np.vdot(contrast, slope) for slope in slopes])
        prior = np.array([0.0, theta[1], 0.0, 0.0, (theta[4] - math.log(_TYPICAL_TAU)) / 4])
        value = (
            0.5 * scaled @ solved
            + np.log(np.diag(factor[0])).sum()
            + 0.5 * (theta[1] ** 2 + (theta[4] - math.log(_TYPICAL_TAU)) ** 2 / 4)
        )
        return float(value), gradient + prior

    variances = (math.log(1e-8), math.log(10.0))
    bounds = [(math.log(1e-2), math.log(1e3)), (math.log(shortest), math.log(longest)), variances, variances]
    bounds.append((math.log(_TAU[0]), math.log(_TAU[1])))
    # The density can have several maxima: independent scatter, wander, or hardly any scatter. We start the search near each of them.
    starts = [
        (1.0, float(np.clip(1.0, shortest, longest)), white, wander, _TYPICAL_TAU)
        for white, wander in ((0.1, 1e-3), (1e-2, 0.1), (1e-4, 1e-4))
    ]
    fits = [
        minimize(density, np.log(start), jac=True, bounds=bounds, method="L-BFGS-B", options={"ftol": 1e-7})
        for start in starts
    ]
    theta = min(fits, key=lambda fit: float(fit.fun)).x
    white, wander, tau = np.exp(theta[2:]).tolist()
    return Scatter(unit * math.sqrt(white), unit * math.sqrt(wander), tau)


def _distances(num_points: int) -> Float[np.ndarray, "S S"]:
    """Return the distances |i - j| between saved steps i and j, in numbers of saved steps."""
    index = np.arange(num_points, dtype=float)
    return np.abs(index[:, None] - index)
