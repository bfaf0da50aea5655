"""Smoothing of a noisy signal in log time, with its slope, by Gaussian-process regression.

The curve f(u), u = ln(step + 1), has the prior a^2 Matern(5/2, l) about its mean. So f and f' are smooth, and the data determine both, with
a joint covariance (Rasmussen and Williams 2006, sections 2.2 and 4.2.1, equation 9.4). Observation i has the variance v_i = max(stderr_i^2,
scatter_i^2). Here stderr_i is the standard error of the observation, and scatter_i is the local scatter of the points about the curve.
First we choose the amplitude a, the length l and one common scatter that maximise the posterior density. The prior of ln l is normal with
mean 0 and standard deviation 1, because a factor of e in the step is the natural unit of log time. The length l must lie between `shortest`
and `longest`. Then we estimate the local scatter from the squared residuals, averaged with a Gaussian kernel whose width is one unit of log
time.

The scatter may be correlated between saved steps (`icl.analysis.scatter`). The curve is linear in the observations: f_hat = G y. Let N be
the covariance of the noise, and K the covariance of the curve under the prior. The error of f_hat then has the covariance G (K + N) G' - G
K - K G' + K. The standard errors that we report come from this covariance (`SmoothedSignal.stated`). The curve follows part of the
correlated scatter, so the estimate of the scatter is too small. We therefore multiply this estimate by `_INFLATION` + r, where r is the
correlation of the scatter between neighbouring saved steps. In simulations with the correlations 0, 0.5 and 0.8, 90 to 95 % of the
estimated changes were then within two standard errors of the true changes. Without this factor, 80 to 90 % did.

Hoogland et al. (2024) fit a squared-exponential process without a noise term. Their curve interpolates the points, so its
slopes follow the noise. Our other smoother, `icl.analysis.essential_dynamics.plane_curves`, uses a kernel width that does not
depend on the values; in this module, the width is fitted to the values.
"""

import warnings
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.optimize import minimize
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Kernel, Matern, WhiteKernel

from icl.analysis.scatter import Scatter, estimate_scatter

MAX_SPACING = 0.6
"""Largest median distance between neighbouring points, as a share of `longest` (our choice). If the points are farther
apart, the curve follows their scatter. We simulated signals of white noise with `longest` = 1, at steps from 0 to
500,000 that are evenly spaced in log time. Of these signals, 1 to 3 % had a false boundary for distances of 0.53 to
0.63, but 5 to 8 % for 0.69, and about 30 % for 1 and more."""
MAX_POINTS = 400
"""Largest number of observations for the fit. If there are more, they are averaged in bins of equal width in log time."""
NUM_GRID = 161
"""Number of evenly spaced times at which the curve is computed, in addition to the observed times."""
_SCATTER_WIDTH = 1.0
_PRIOR_POINTS = 4.0
"""Weight of the overall scatter in the estimate of the local scatter, as an equivalent number of residuals."""
_INFLATION = 1.1
_LEAST_NOISE = 1e-5
"""Smallest noise, as a share of the values' standard deviation. Smaller noise is rounding error."""


class Points(NamedTuple):
    """Observations of a signal."""

    times: Float[np.ndarray, " s"]
    values: Float[np.ndarray, " s"]
    noise: Float[np.ndarray, " s"]
    """Standard deviation used for each observation: its standard error or the local scatter, whichever is larger."""
    covariance: Float[np.ndarray, "s s"]
    """Covariance of the noise, including correlated scatter. The standard errors of the curve `stated` are computed
    from this covariance."""


class Curve(NamedTuple):
    """Posterior mean and covariance of a curve on a grid of log times."""

    times: Float[np.ndarray, " G"]
    """u = ln(step + 1)."""
    values: Float[np.ndarray, " G"]
    covariance: Float[np.ndarray, "G G"]
    """Covariance of the values."""

    @property
    def stderr(self) -> Float[np.ndarray, " G"]:
        """Standard errors of the values."""
        return np.sqrt(np.maximum(np.diag(self.covariance), 0))

    def slopes(self) -> tuple[Float[np.ndarray, " G"], Float[np.ndarray, "G G"]]:
        """Return df/du and its covariance."""
        derivative = np.asarray(np.gradient(np.eye(len(self.times)), self.times, axis=0))
        return derivative @ self.values, derivative @ self.covariance @ derivative.T

    def sample(self, count: int, rng: np.random.Generator) -> Float[np.ndarray, "J G"]:
        """Sample curves from the posterior."""
        variances, axes = np.linalg.eigh(self.covariance)
        draws = rng.standard_normal((count, len(variances))) * np.sqrt(np.maximum(variances, 0))
        return self.values + draws @ axes.T


class SmoothedSignal(NamedTuple):
    """The smoothed curve of a signal, and the curves with a shorter and with a longer kernel."""

    curve: Curve
    """Curve with the most probable kernel length."""
    others: tuple[Curve, ...]
    """Curves with kernels of 2/3 and 3/2 times the most probable length."""
    if_correlated: Curve
    """Curve with the most probable length, for scatter with the correlation that `icl.analysis.scatter` estimates."""
    stated: Curve
    """The values of `curve`, with a covariance that takes the correlation of the scatter into account."""
    points: Points
    """The observations; more than `MAX_POINTS` observations are averaged in bins."""


def fit(
    times: Float[np.ndarray, " S"],
    values: Float[np.ndarray, " S"],
    stderr: Float[np.ndarray, " S"],
    *,
    shortest: float,
    longest: float,
) -> SmoothedSignal:
    """Smooth a signal with Gaussian-process regression.

    Args:
        times: u = ln(step + 1), in ascending order.
        values: Values of the signal.
        stderr: Independent part of every value's standard error; 0 if only the scatter counts as noise.
        shortest: Minimum kernel length l.
        longest: Maximum kernel length l.

    Raises:
        ValueError: If there are fewer than four points, or a number is not finite.
    """
    if len(times) < 4 or not all(np.isfinite(array).all() for array in (times, values, stderr)):
        raise ValueError(f"Smoothing needs at least four finite points, got {len(times)}.")
    times, values, stderr = in_bins(times, values, stderr)
    centre, unit = values.mean(), max(float(values.std()), 1e-12 * max(1.0, float(np.abs(values).max())))
    scaled = (values - centre) / unit
    known = np.maximum(stderr / unit, _LEAST_NOISE) ** 2
    amplitude, length, scatter = _most_probable(times, scaled, known, shortest, longest)
    variances = np.maximum(known, scatter)
    for _ in range(2):  # the residuals depend on the assumed scatter, so it is estimated twice
        variances = np.maximum(known, _local_scatter(times, scaled, variances, _kernel(amplitude, length)))
    grid = np.union1d(times, np.linspace(times[0], times[-1], NUM_GRID))
    curves = []
    for factor in (1.0, 2 / 3, 3 / 2):
        process = GaussianProcessRegressor(_kernel(amplitude, factor * length), alpha=variances, optimizer=None)
        mean, covariance = process.fit(times[:, None], scaled).predict(grid[:, None], return_cov=True)
        curves.append(Curve(grid, centre + unit * mean, unit**2 * covariance))
    correlated = estimate_scatter(times, scaled, stderr / unit, shortest=shortest, longest=longest)
    kernel, noise = _kernel(amplitude, length), _correlated_noise(correlated, stderr / unit, variances)
    gain = _gain(kernel, times, noise, grid)
    if_correlated = Curve(grid, centre + unit * gain @ scaled, unit**2 * _error(kernel, times, noise, grid, gain))
    noise = _correlated_noise(correlated.scaled(_INFLATION + correlated.neighbours), stderr / unit, variances)
    covariance = _error(kernel, times, noise, grid, _gain(kernel, times, np.diag(variances), grid))
    stated = curves[0]._replace(covariance=unit**2 * covariance)
    points = Points(times, values, unit * np.sqrt(variances), unit**2 * noise)
    return SmoothedSignal(curves[0], tuple(curves[1:]), if_correlated, stated, points)


def is_too_sparse(times: Float[np.ndarray, " S"], *, longest: float) -> bool:
    """Return whether points without known errors are too far apart to be smoothed (see `MAX_SPACING`).

    The scatter is estimated from points that are close together. So it is enough if half of the points are close
    together, and single gaps do no harm.
    """
    return bool(np.median(np.diff(times)) > MAX_SPACING * longest)


def in_bins(
    times: Float[np.ndarray, " S"], values: Float[np.ndarray, " S"], stderr: Float[np.ndarray, " S"]
) -> tuple[Float[np.ndarray, " s"], Float[np.ndarray, " s"], Float[np.ndarray, " s"]]:
    """Return the points. If there are more than `MAX_POINTS`, return their means in bins of equal width in log time."""
    if len(times) <= MAX_POINTS:
        return times, values, stderr
    edges = np.linspace(times[0], times[-1], MAX_POINTS + 1)[1:-1]
    bins = np.unique(np.searchsorted(edges, times, side="right"), return_inverse=True)[1]
    count = np.bincount(bins)
    mean_times, mean_values = (np.bincount(bins, weights=array) / count for array in (times, values))
    return mean_times, mean_values, np.sqrt(np.bincount(bins, weights=stderr**2)) / count


def _kernel(amplitude: float, length: float) -> Kernel:
    """Build a kernel for values in units of their standard deviation."""
    return ConstantKernel(amplitude, "fixed") * Matern(length, "fixed", nu=2.5)


def _most_probable(
    times: Float[np.ndarray, " S"],
    scaled: Float[np.ndarray, " S"],
    known: Float[np.ndarray, " S"],
    shortest: float,
    longest: float,
) -> tuple[float, float, float]:
    """Return the kernel's variance a^2 and length l and the variance of the scatter that maximise the posterior."""

    def optimizer(objective, start, bounds):  # type: ignore[no-untyped-def]
        def posterior(theta):  # type: ignore[no-untyped-def]
            value, slope = objective(theta)
            return value + 0.5 * theta[1] ** 2, slope + np.array([0.0, theta[1], 0.0])

        length = np.log(0.6).clip(*bounds[1])
        # The density can have two maxima: much scatter and a smooth curve, or little scatter and a curve that follows the
        # points. We start the search once near each of them.
        starts = [np.array([start[0], length, scatter]) for scatter in np.log([0.1, 1e-3])]
        options = {"ftol": 1e-6}  # the objective is in the hundreds, so more digits are not significant
        minima = [
            minimize(posterior, point, jac=True, bounds=bounds, method="L-BFGS-B", options=options) for point in starts
        ]
        best = min(minima, key=lambda minimum: float(minimum.fun))
        return best.x, best.fun

    kernel = ConstantKernel(1.0, (1e-2, 1e3)) * Matern(1.0, (shortest, longest), nu=2.5) + WhiteKernel(
        0.1, (_LEAST_NOISE**2, 2.0)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the warning is raised if a parameter is at its bound
        process = GaussianProcessRegressor(kernel, alpha=known, optimizer=optimizer).fit(times[:, None], scaled)
    amplitude, length, scatter = np.exp(process.kernel_.theta).tolist()
    return amplitude, length, scatter


def _correlated_noise(
    scatter: Scatter, stderr: Float[np.ndarray, " S"], variances: Float[np.ndarray, " S"]
) -> Float[np.ndarray, "S S"]:
    """Return the covariance of the observations' noise, with the estimated correlation of the scatter.

    We assume that the size of the wander (the correlated part of the scatter) varies in proportion to the local
    scatter.
    """
    unevenness = np.sqrt(variances / variances.mean())
    independent = np.maximum(stderr**2 + (scatter.white * unevenness) ** 2, _LEAST_NOISE**2)
    wander = scatter._replace(white=0.0).covariance(len(stderr)) * np.outer(unevenness, unevenness)
    return np.diag(independent) + wander


def _gain(
    kernel: Kernel, times: Float[np.ndarray, " S"], noise: Float[np.ndarray, "S S"], grid: Float[np.ndarray, " G"]
) -> Float[np.ndarray, "G S"]:
    """Return the matrix that maps the observations to the curve, for noise of any covariance.

    Rasmussen and Williams 2006, equation 2.23.
    """
    gain: np.ndarray = np.linalg.solve(kernel(times[:, None]) + noise, kernel(times[:, None], grid[:, None])).T
    return gain


def _error(
    kernel: Kernel,
    times: Float[np.ndarray, " S"],
    noise: Float[np.ndarray, "S S"],
    grid: Float[np.ndarray, " G"],
    gain: Float[np.ndarray, "G S"],
) -> Float[np.ndarray, "G G"]:
    """Return the covariance of the error of the curve `gain` @ y, for any matrix `gain` (see the top of this module).

    If `_gain` computed the matrix from the same noise, the result is the posterior covariance (Rasmussen and Williams 2006, equation 2.24).
    """
    crossed = gain @ kernel(times[:, None], grid[:, None])
    error: np.ndarray = gain @ (kernel(times[:, None]) + noise) @ gain.T - crossed - crossed.T + kernel(grid[:, None])
    return error


def _local_scatter(
    times: Float[np.ndarray, " S"], scaled: Float[np.ndarray, " S"], variances: Float[np.ndarray, " S"], kernel: Kernel
) -> Float[np.ndarray, " S"]:
    """Return the variances of the observations, corrected by the residuals near each observation."""
    prior = kernel(times[:, None])
    smoother = np.linalg.solve(prior + np.diag(variances), prior).T
    # Expected ratio of a squared residual to the variance of its observation. It is below 1, because the fit partly follows each point.
    expected = 1 - np.diag(smoother)
    weights = np.exp(-0.5 * ((times[:, None] - times) / _SCATTER_WIDTH) ** 2)
    squares = (scaled - smoother @ scaled) ** 2 / variances
    return variances * (weights @ squares + _PRIOR_POINTS) / (weights @ expected + _PRIOR_POINTS)
