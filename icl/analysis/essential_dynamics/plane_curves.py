"""Smooth curves in log time, and the geometry of their projections on planes: osculating circles, cusps, vertices.

Smoothing is local cubic regression with Gaussian weights (Fan and Gijbels 1996, chapter 3) in u = ln(step + 1). At
every u0 we fit the cubic sum_p b_p (u - u0)^p with weights exp(-(u - u0)^2 / 2 h^2); the p-th derivative of the curve r
at u0 is then p! b_p. These derivatives are exact for cubics, whatever the spacing of the checkpoints. They are linear
in the data, so their standard errors are known. The kernel width is h = max(`bandwidth`, half the distance to the sixth
nearest checkpoint). A narrower kernel would make the curve pass through each of the few early checkpoints. The variance
of the noise is the local mean square of the residuals. We treat neighbouring residuals as independent, which makes
standard errors too small where checkpoints are dense. The code of Hoogland et al. smooths over the index of the
checkpoint, with a width of 0.06 times the index (in log time, about h = 0.06). The Gaussian derivative kernels in that
code are wrong. We differentiate the fit instead.

The geometry of a plane curve r(u) does not depend on the parametrisation. With v = |r'| and c = x'y'' - y'x'', the signed
curvature is c / v^3, and the centre of the osculating circle is r + v^2 / c (-y', x'). The centres form the evolute.

- Cusp: r' = 0 and r'' is not zero, so the curve reverses its direction. (Hoogland et al. 2024 also require r'' = 0. The ordinary cusp (t^2,
  t^3) does not meet their condition.) A candidate is a minimum of v that meets three conditions. (1) The change of r' within one kernel
  width, |r''| h, is more than four standard errors above zero. (2) v is less than two standard errors above a tenth of |r''| h. (3) One
  width before the minimum, and also one width after it, the curve is displaced from the minimum in the direction of r'' by more than a
  tenth of h^2 |r''| / 2. Condition 3 excludes the start of training, where the motion is slow but does not reverse.
- Vertex: the curvature has an extremum, so the osculating circle has four-point contact and the evolute has a cusp. A
  candidate is a prominent extremum of the curvature. The curvature at the extremum must be more than three standard
  errors from zero. On both sides of the extremum, the curvature must first change by at least a tenth of its value
  there and by at least `_VERTEX_ERRORS` standard errors. Only after that may it return to the value at the extremum.
  The two conditions on the sides compare curvatures in the order of the points. They contain no times, so they do not depend
  on how fast the curve is traversed (except through the standard errors).
"""

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

NEIGHBOURS = 6
"""Number n in the definition of the kernel width, which is at least half the distance to the n-th nearest checkpoint."""
MIN_POINTS = 8
"""Minimum number of checkpoints for smoothing."""
_VERTEX_ERRORS = 4.0
"""Minimum prominence of a vertex, in standard errors. The prominence is the largest of many differences, so it often
reaches three standard errors by chance."""
_NUMBERS_AT_ONCE = 4_000_000
"""Largest number of smoothing weights in memory at a time."""

Kind = Literal["cusp", "vertex"]


class Smooth(NamedTuple):
    """A smoothed curve on a grid of log times."""

    times: Float[np.ndarray, " G"]
    """u = ln(step + 1)."""
    widths: Float[np.ndarray, " G"]
    """Width of the kernel at every time."""
    derivatives: Float[np.ndarray, "G 3 C"]
    """r and its derivatives r' and r'' with respect to u."""
    noise: Float[np.ndarray, "G C"]
    """Standard deviation of the observations about the curve."""
    gains: Float[np.ndarray, "G 3 3"]
    """Covariances of r, r' and r'' for noise of variance one. All components have the same covariances."""


class Circles(NamedTuple):
    """The osculating circles of a plane curve."""

    curvature: Float[np.ndarray, " G"]
    """Signed curvature; positive if the curve turns left."""
    stderr: Float[np.ndarray, " G"]
    """Standard error of the curvature."""
    centre: Float[np.ndarray, "G 2"]


class Candidate(NamedTuple):
    """A point of the curve that may be a cusp or a vertex."""

    kind: Kind
    time: float
    point: tuple[float, float]
    """Position of the cusp, or centre of the vertex's circle."""
    radius: float
    """Radius of the circle; 0 at a cusp."""


def log_time(steps: Int[np.ndarray, " S"]) -> Float[np.ndarray, " S"]:
    """Return the log time u = ln(step + 1)."""
    return np.log1p(steps.astype(np.float64))


def smooth(
    times: Float[np.ndarray, " S"],
    values: Float[np.ndarray, "S C"],
    at: Float[np.ndarray, " G"],
    *,
    bandwidth: float,
    factor: float = 1.0,
) -> Smooth:
    """Fit local cubics at the times `at`.

    Args:
        times: Log times of the observations, in ascending order.
        values: The observations.
        at: Log times at which to evaluate the curve.
        bandwidth: Minimum width of the kernel, in log time.
        factor: Factor that multiplies every width, to test how results depend on the width.

    Raises:
        ValueError: If there are fewer than `MIN_POINTS` observations.
    """
    if len(times) < MIN_POINTS:
        raise ValueError(f"Smoothing needs at least {MIN_POINTS} checkpoints, got {len(times)}.")
    residuals, residual_variances = np.empty_like(values), np.empty(len(times))
    for part, weights in _weights(times, times, factor * kernel_widths(times, times, bandwidth)):
        residuals[part] = values[part] - weights[:, 0] @ values
        own_weight = weights[np.arange(part.stop - part.start), 0, np.arange(part.start, part.stop)]
        # Variance of the residuals for noise of variance one.
        residual_variances[part] = 1 - 2 * own_weight + (weights[:, 0] ** 2).sum(1)
    widths = factor * kernel_widths(times, at, bandwidth)
    derivatives, gains = np.empty((len(at), 3, values.shape[1])), np.empty((len(at), 3, 3))
    noise = np.empty((len(at), values.shape[1]))
    for part, weights in _weights(times, at, widths):
        derivatives[part] = weights[:, :3] @ values
        gains[part] = weights[:, :3] @ weights[:, :3].mT
        near = np.exp(-0.5 * ((times - at[part, None]) / (2 * widths[part, None])) ** 2)
        noise[part] = np.sqrt(near @ residuals**2 / (near @ residual_variances)[:, None])
    return Smooth(at, widths, derivatives, noise, gains)


def kernel_widths(
    times: Float[np.ndarray, " S"], at: Float[np.ndarray, " G"], bandwidth: float
) -> Float[np.ndarray, " G"]:
    """Return the kernel width h at every time: `bandwidth`, or more where checkpoints are sparse."""
    rank = min(NEIGHBOURS, len(times)) - 1
    distances = [np.partition(np.abs(times - time), rank)[rank] for time in at]
    return np.maximum(bandwidth, np.array(distances) / 2)


def fine_grid(times: Float[np.ndarray, " S"], *, bandwidth: float) -> Float[np.ndarray, " G"]:
    """Return the times of the observations, and evenly spaced times between them, ten per bandwidth."""
    count = max(2, math.ceil((times[-1] - times[0]) / bandwidth * 10) + 1)
    between = np.linspace(times[0], times[-1], count)
    right = np.searchsorted(times, between).clip(1, len(times) - 1)
    distances = np.minimum(np.abs(between - times[right - 1]), np.abs(between - times[right]))
    # If two points are only a rounding error apart, the sign of the slope between them is noise, and the pair would
    # count as a vertex.
    return np.union1d(times, between[distances > 1e-6 * bandwidth])


def arc_length(points: Float[np.ndarray, "G C"]) -> Float[np.ndarray, " G"]:
    """Return the length of the curve up to every point, as a sum of chords."""
    return np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))])


def osculating_circles(curve: Smooth, plane: tuple[int, int]) -> Circles:
    """Return the osculating circles of the projection on two components. Centres are infinite where the curve is straight."""
    position, first, second = np.moveaxis(curve.derivatives[:, :, list(plane)], 1, 0)
    speed, cross = np.linalg.norm(first, axis=1), first[:, 0] * second[:, 1] - first[:, 1] * second[:, 0]
    normal = np.stack([-first[:, 1], first[:, 0]], axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        curvature = cross / speed**3
        centre = position + (speed**2 / cross)[:, None] * normal
        # Derivatives of the curvature with respect to r' and r'', to propagate their errors to first order.
        by_first = np.stack([second[:, 1], -second[:, 0]], 1) / speed[:, None] ** 3
        by_first -= 3 * (cross / speed**5)[:, None] * first
        by_second = normal / speed[:, None] ** 3
    terms = (
        by_first**2 * curve.gains[:, 1, 1, None]
        + 2 * by_first * by_second * curve.gains[:, 1, 2, None]
        + by_second**2 * curve.gains[:, 2, 2, None]
    )
    variance = (terms * curve.noise[:, list(plane)] ** 2).sum(1)
    return Circles(curvature, np.sqrt(np.maximum(variance, 0)), centre)


def candidates(curve: Smooth, plane: tuple[int, int]) -> list[Candidate]:
    """Find cusps and vertices of the projection on a plane, in order of time.

    Points within one kernel width of either end of the curve are left out, and so are vertices within one width of a cusp.
    """
    circles = osculating_circles(curve, plane)
    cusps = list(_cusps(curve, plane))
    vertices = [
        vertex
        for vertex, width in _vertices(curve, circles)
        if all(abs(vertex.time - cusp.time) > width for cusp in cusps)
    ]
    return sorted([*cusps, *vertices], key=lambda candidate: candidate.time)


def _cusps(curve: Smooth, plane: tuple[int, int]) -> Iterator[Candidate]:
    position, first, second = np.moveaxis(curve.derivatives[:, :, list(plane)], 1, 0)
    speed, change = np.linalg.norm(first, axis=1), np.linalg.norm(second, axis=1) * curve.widths
    noise = curve.noise[:, list(plane)].max(1)  # the noise of the noisier component
    speed_error = noise * np.sqrt(curve.gains[:, 1, 1])
    change_error = noise * np.sqrt(curve.gains[:, 2, 2]) * curve.widths
    for index in (np.flatnonzero((speed[1:-1] < speed[:-2]) & (speed[1:-1] <= speed[2:])) + 1).tolist():
        is_turning = change[index] > 4 * change_error[index]
        is_slow = speed[index] < 0.1 * change[index] + 2 * speed_error[index]
        if not (is_turning and is_slow and _is_inside(curve, index)):
            continue
        direction = second[index] / np.linalg.norm(second[index])
        distances = [(position[side] - position[index]) @ direction for side in _sides(curve, index, 1.0)]
        if min(distances) > 0.05 * change[index] * curve.widths[index]:  # a tenth of h^2 |r''| / 2
            yield Candidate("cusp", float(curve.times[index]), tuple(position[index].tolist()), 0.0)


def _vertices(curve: Smooth, circles: Circles) -> Iterator[tuple[Candidate, float]]:
    """Yield every vertex, and the kernel width at its time."""
    curvature, stderr = circles.curvature, circles.stderr
    slopes = np.diff(curvature)
    for index in (np.flatnonzero(slopes[:-1] * slopes[1:] <= 0) + 1).tolist():
        size = abs(curvature[index])
        if not _is_inside(curve, index) or not size > 3 * stderr[index]:
            continue
        sign = 1.0 if slopes[index - 1] > 0 else -1.0  # 1 at a maximum
        if all(_is_prominent(sign * curvature[side], stderr[side], 0.1 * size) for side in _both_sides(index)):
            centre = tuple(circles.centre[index].tolist())
            yield Candidate("vertex", float(curve.times[index]), centre, float(1 / size)), curve.widths[index]


def _both_sides(index: int) -> tuple[slice, slice]:
    """Return two slices of the grid from a point: forwards to the end, and backwards to the start."""
    return slice(index, None), slice(index, None, -1)


def _is_prominent(values: Float[np.ndarray, " g"], stderr: Float[np.ndarray, " g"], least: float) -> bool:
    """Return whether the values fall significantly below the first value before they rise above it.

    The result depends on the order of the values and on their standard errors, but not on the times of the points.
    """
    higher = np.flatnonzero(values > values[0])
    end = int(higher[0]) if len(higher) else len(values)
    drops = values[0] - values[:end]
    return bool((drops > np.maximum(least, _VERTEX_ERRORS * np.hypot(stderr[0], stderr[:end]))).any())


def _is_inside(curve: Smooth, index: int) -> bool:
    """Return whether a point is at least one kernel width away from both ends of the curve."""
    time, width = curve.times[index], curve.widths[index]
    return bool(curve.times[0] + width <= time <= curve.times[-1] - width)


def _sides(curve: Smooth, index: int, num_widths: float) -> list[int]:
    """Return the indices of the grid points that lie `num_widths` kernel widths before and after a point."""
    times = curve.times[index] + num_widths * curve.widths[index] * np.array([-1, 1])
    return [int(np.abs(curve.times - time).argmin()) for time in times]


def _weights(
    times: Float[np.ndarray, " S"], at: Float[np.ndarray, " G"], widths: Float[np.ndarray, " G"]
) -> Iterator[tuple[slice, Float[np.ndarray, "g 4 S"]]]:
    """Yield the weights with which the S observations enter the estimates of r, r', r'' and r''' at the times `at`.

    Every estimate is a weighted sum of the observations. The times are processed in blocks of g times, so that the
    weights fit in memory. For each block, yield the slice of `at` and the weights (g, 4, S).
    """
    num_together = max(1, _NUMBERS_AT_ONCE // (4 * len(times)))
    powers, factorials = np.arange(4), np.array([1.0, 1.0, 2.0, 6.0])
    for start in range(0, len(at), num_together):
        part = slice(start, min(start + num_together, len(at)))
        distance = (times - at[part, None]) / widths[part, None]  # g S
        basis = np.stack([np.ones_like(distance), distance, distance**2, distance**3], axis=1)  # g 4 S
        weighted = basis * np.exp(-0.5 * distance**2)[:, None]
        scale = factorials / widths[part, None] ** powers  # g 4
        yield part, scale[:, :, None] * (np.linalg.inv(weighted @ basis.mT) @ weighted)
