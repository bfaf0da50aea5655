"""A noisy signal and its slope in log time: Gaussian-process regression that knows the points' standard errors.

The curve f(u), u = ln(step + 1), has the prior a^2 Matern(5/2, l) about its mean, so that f and f' are smooth and both are
known after the data with a joint covariance (Rasmussen and Williams 2006, sections 2.2 and 4.2.1, equation 9.4). Observation
i has the variance v_i = max(stderr_i^2, scatter_i^2): the larger of its own standard error and of how the points scatter
about the curve around it. (a, l) and the scatter are where the posterior density is largest: the prior of ln l is
normal about 0 with deviation 1, as a factor e in the step is the natural unit of log time, and l is from `shortest` to `longest`.
The scatter then follows the residuals r_i^2, averaged within a Gaussian of one unit of log time.

The original (Hoogland et al. 2024) fits a squared-exponential process without a noise term, which interpolates: its slopes
are those of the noise. Our other smoother, `icl.analysis.essential_dynamics.plane_curves`, has a kernel of fixed width; here the data choose.
"""

import warnings
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.optimize import minimize
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Kernel, Matern, WhiteKernel

MAX_POINTS = 400
"""More observations are averaged in bins of equal log time."""
NUM_GRID = 161
"""Points of the curve beside the observed ones."""
_SCATTER_WIDTH = 1.0
_PRIOR_POINTS = 4.0
"""For how many residuals the scatter of all points counts beside the local ones."""
_LEAST_NOISE = 1e-5
"""As a share of the values' deviation; rounding."""


class Points(NamedTuple):
    """Observations."""

    times: Float[np.ndarray, " s"]
    values: Float[np.ndarray, " s"]
    noise: Float[np.ndarray, " s"]
    """The deviation that each was given: its own error, or the scatter around it."""


class Curve(NamedTuple):
    """What the data say of a curve and of its slope in log time, at points of a grid."""

    times: Float[np.ndarray, " G"]
    """u = ln(step + 1)."""
    values: Float[np.ndarray, " G"]
    covariance: Float[np.ndarray, "G G"]
    """Of the values."""
    length: float
    """The kernel's l."""

    @property
    def stderr(self) -> Float[np.ndarray, " G"]:
        """Of the values."""
        return np.sqrt(np.maximum(np.diag(self.covariance), 0))

    def slopes(self) -> tuple[Float[np.ndarray, " G"], Float[np.ndarray, "G G"]]:
        """df/du and its covariance."""
        derivative = np.asarray(np.gradient(np.eye(len(self.times)), self.times, axis=0))
        return derivative @ self.values, derivative @ self.covariance @ derivative.T

    def sample(self, count: int, rng: np.random.Generator) -> Float[np.ndarray, "J G"]:
        """Curves that the data allow."""
        variances, axes = np.linalg.eigh(self.covariance)
        draws = rng.standard_normal((count, len(variances))) * np.sqrt(np.maximum(variances, 0))
        return self.values + draws @ axes.T


class Fit(NamedTuple):
    """The curve with the kernel's most probable length, and with other lengths."""

    middle: Curve
    others: tuple[Curve, ...]
    """With lengths two thirds and one and a half times as long."""
    points: Points
    """The observations, as they were used."""

    @property
    def curves(self) -> tuple[Curve, ...]:
        """All of them."""
        return (self.middle, *self.others)


class _Kernel(NamedTuple):
    """The process in units of the values' deviation."""

    amplitude: float
    length: float

    def build(self, factor: float = 1.0) -> Kernel:
        return ConstantKernel(self.amplitude, "fixed") * Matern(factor * self.length, "fixed", nu=2.5)


def fit(
    times: Float[np.ndarray, " S"],
    values: Float[np.ndarray, " S"],
    stderr: Float[np.ndarray, " S"],
    *,
    shortest: float,
    longest: float,
) -> Fit:
    """The curve of a signal.

    Args:
        times: u = ln(step + 1), rising.
        values: The signal.
        stderr: Of every value, as far as it is independent of the others'; 0 where only the scatter is to count.
        shortest: The least l.
        longest: The greatest l.

    Raises:
        ValueError: If there are fewer than four points, or a number is not finite.
    """
    if len(times) < 4 or not all(np.isfinite(one).all() for one in (times, values, stderr)):
        raise ValueError(f"Smoothing needs at least four finite points, got {len(times)}.")
    times, values, stderr = in_bins(times, values, stderr)
    centre, unit = values.mean(), max(float(values.std()), 1e-12 * max(1.0, float(np.abs(values).max())))
    scaled = (values - centre) / unit
    known = np.maximum(stderr / unit, _LEAST_NOISE) ** 2
    kernel, scatter = _most_probable(times, scaled, known, shortest, longest)
    variances = np.maximum(known, scatter)
    for _ in range(2):
        variances = np.maximum(known, _local_scatter(times, scaled, variances, kernel.build()))
    grid = np.union1d(times, np.linspace(times[0], times[-1], NUM_GRID))
    curves = []
    for factor in (1.0, 2 / 3, 3 / 2):
        process = GaussianProcessRegressor(kernel.build(factor), alpha=variances, optimizer=None)
        mean, covariance = process.fit(times[:, None], scaled).predict(grid[:, None], return_cov=True)
        curves.append(Curve(grid, centre + unit * mean, unit**2 * covariance, factor * kernel.length))
    return Fit(curves[0], tuple(curves[1:]), Points(times, values, unit * np.sqrt(variances)))


def in_bins(
    times: Float[np.ndarray, " S"], values: Float[np.ndarray, " S"], stderr: Float[np.ndarray, " S"]
) -> tuple[Float[np.ndarray, " s"], Float[np.ndarray, " s"], Float[np.ndarray, " s"]]:
    """The points, or their means in `MAX_POINTS` bins of equal log time if there are more."""
    if len(times) <= MAX_POINTS:
        return times, values, stderr
    edges = np.linspace(times[0], times[-1], MAX_POINTS + 1)[1:-1]
    place = np.unique(np.searchsorted(edges, times, side="right"), return_inverse=True)[1]
    count = np.bincount(place)
    means = [np.bincount(place, weights=one) / count for one in (times, values)]
    return means[0], means[1], np.sqrt(np.bincount(place, weights=stderr**2)) / count


def _most_probable(
    times: Float[np.ndarray, " S"],
    scaled: Float[np.ndarray, " S"],
    known: Float[np.ndarray, " S"],
    shortest: float,
    longest: float,
) -> tuple[_Kernel, float]:
    """The kernel and the variance of the scatter, by their posterior density."""

    def optimizer(objective, start, bounds):  # type: ignore[no-untyped-def]
        def posterior(theta):  # type: ignore[no-untyped-def]
            value, slope = objective(theta)
            return value + 0.5 * theta[1] ** 2, slope + np.array([0.0, theta[1], 0.0])

        length = np.log(0.6).clip(*bounds[1])
        starts = [np.array([start[0], length, scatter]) for scatter in np.log([0.1, 1e-3])]
        options = {"ftol": 1e-6}  # of some hundreds; more digits say nothing
        found = [
            minimize(posterior, one, jac=True, bounds=bounds, method="L-BFGS-B", options=options) for one in starts
        ]
        best = min(found, key=lambda one: float(one.fun))
        return best.x, best.fun

    kernel = ConstantKernel(1.0, (1e-2, 1e3)) * Matern(1.0, (shortest, longest), nu=2.5) + WhiteKernel(
        0.1, (_LEAST_NOISE**2, 2.0)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a parameter at its bound
        process = GaussianProcessRegressor(kernel, alpha=known, optimizer=optimizer).fit(times[:, None], scaled)
    amplitude, length, scatter = np.exp(process.kernel_.theta).tolist()
    return _Kernel(amplitude, length), scatter


def _local_scatter(
    times: Float[np.ndarray, " S"], scaled: Float[np.ndarray, " S"], variances: Float[np.ndarray, " S"], kernel: Kernel
) -> Float[np.ndarray, " S"]:
    """The variances, corrected by what the residuals around each point say."""
    prior = kernel(times[:, None])
    smoother = np.linalg.solve(prior + np.diag(variances), prior).T
    shares = 1 - np.diag(smoother)
    near = np.exp(-0.5 * ((times[:, None] - times) / _SCATTER_WIDTH) ** 2)
    squares = (scaled - smoother @ scaled) ** 2 / variances
    counted = near @ shares
    return variances * (near @ squares + _PRIOR_POINTS) / (counted + _PRIOR_POINTS)
