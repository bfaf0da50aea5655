"""Smooth curves in log time, and the geometry of their projections on planes: circles of curvature, cusps, vertices.

Smoothing: local cubic regression with Gaussian weights (Fan and Gijbels 1996, chapter 3) in u = ln(step + 1). Around every
u0 the cubic sum_p b_p (u - u0)^p is fitted with weights exp(-(u - u0)^2 / 2 h^2), and r^(p)(u0) is p! b_p: derivatives come
from the fit, are exact for cubics whatever the spacing, and have standard errors, since they are linear in the data. The
kernel's width is h = max(`bandwidth`, half the distance to the sixth nearest checkpoint), so the few early checkpoints are
not interpolated. The original smooths over the checkpoint's index, by a width that grows with it (0.06 per checkpoint,
which is about h = 0.06 here), and its Gaussian derivative kernels are wrong; we differentiate the fit instead. Noise is the
local mean square of the residuals; neighbouring ones count as independent, which flatters the errors of a dense tail.

Geometry of a plane curve r(u), which does not depend on the parametrisation: with v = |r'| and c = x'y'' - y'x'', signed
curvature c / v^3, centre of the osculating circle r + v^2 / c (-y', x'); the centres are the evolute.
- A cusp: r' = 0 and r'' is not, so that the motion turns back (Hoogland et al. 2024 ask for r'' = 0 too, which an ordinary
  cusp (t^2, t^3) does not have). A candidate is a minimum of v where |r''| h, the change of r' within a width, is four
  standard errors above zero, v is less than a tenth of it plus two standard errors, and a width before and after the curve
  lies off to the side of r'', by a tenth of h^2 |r''| / 2 at least (training sets out slowly, but from nowhere).
- A vertex: the circle has four-point contact; curvature' = 0; the evolute has a cusp. A candidate is an extremum of
  curvature that stands out by a tenth, and by three standard errors, from one and a half widths before and after.
"""

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

NEIGHBOURS = 6
MIN_POINTS = 8
"""Checkpoints below which nothing is smoothed."""
_NUMBERS_AT_ONCE = 4_000_000

Kind = Literal["cusp", "vertex"]


class Smooth(NamedTuple):
    """A smoothed curve, at some points of log time."""

    times: Float[np.ndarray, " G"]
    """u = ln(step + 1)."""
    widths: Float[np.ndarray, " G"]
    """Of the kernel."""
    derivatives: Float[np.ndarray, "G 3 C"]
    """r, r' and r'' in u."""
    noise: Float[np.ndarray, "G C"]
    """Standard deviation of the observations about the curve."""
    gains: Float[np.ndarray, "G 3 3"]
    """Covariances of r, r' and r'' for noise of variance one, the same for every component."""


class Circles(NamedTuple):
    """The osculating circles of a plane curve."""

    curvature: Float[np.ndarray, " G"]
    """Signed, positive to the left of the motion."""
    stderr: Float[np.ndarray, " G"]
    """Of the curvature."""
    centre: Float[np.ndarray, "G 2"]


class Candidate(NamedTuple):
    """A place that may be a cusp or a vertex."""

    kind: Kind
    time: float
    point: tuple[float, float]
    """The cusp, or the centre of the vertex's circle."""
    radius: float
    """Of the circle; 0 at a cusp."""


def log_time(steps: Int[np.ndarray, " S"]) -> Float[np.ndarray, " S"]:
    """The time u = ln(step + 1)."""
    return np.log1p(steps.astype(np.float64))


def smooth(
    times: Float[np.ndarray, " S"],
    values: Float[np.ndarray, "S C"],
    at: Float[np.ndarray, " G"],
    *,
    bandwidth: float,
    factor: float = 1.0,
) -> Smooth:
    """The local cubic fit at the points `at`.

    Args:
        times: Of the observations, rising.
        values: The observations.
        at: Where to evaluate.
        bandwidth: The kernel's least width, in units of log time.
        factor: On every width, to see what depends on it.

    Raises:
        ValueError: If there are fewer than `MIN_POINTS` observations.
    """
    if len(times) < MIN_POINTS:
        raise ValueError(f"Smoothing needs at least {MIN_POINTS} checkpoints, got {len(times)}.")
    residuals, leverage = np.empty_like(values), np.empty(len(times))
    for part, weights in _weights(times, times, factor * kernel_widths(times, times, bandwidth)):
        residuals[part] = values[part] - weights[:, 0] @ values
        own = weights[np.arange(part.stop - part.start), 0, np.arange(part.start, part.stop)]
        leverage[part] = 1 - 2 * own + (weights[:, 0] ** 2).sum(1)  # the residual's variance for noise of variance one
    widths = factor * kernel_widths(times, at, bandwidth)
    derivatives, gains = np.empty((len(at), 3, values.shape[1])), np.empty((len(at), 3, 3))
    noise = np.empty((len(at), values.shape[1]))
    for part, weights in _weights(times, at, widths):
        derivatives[part] = weights[:, :3] @ values
        gains[part] = weights[:, :3] @ weights[:, :3].mT
        near = np.exp(-0.5 * ((times - at[part, None]) / (2 * widths[part, None])) ** 2)
        noise[part] = np.sqrt(near @ residuals**2 / (near @ leverage)[:, None])
    return Smooth(at, widths, derivatives, noise, gains)


def kernel_widths(
    times: Float[np.ndarray, " S"], at: Float[np.ndarray, " G"], bandwidth: float
) -> Float[np.ndarray, " G"]:
    """The kernel's h at every point: `bandwidth`, or more where checkpoints are sparse."""
    place = min(NEIGHBOURS, len(times)) - 1
    distances = [np.partition(np.abs(times - point), place)[place] for point in at]
    return np.maximum(bandwidth, np.array(distances) / 2)


def fine_grid(times: Float[np.ndarray, " S"], *, bandwidth: float) -> Float[np.ndarray, " G"]:
    """Return the observations' times and points between them, ten to a bandwidth."""
    count = max(2, math.ceil((times[-1] - times[0]) / bandwidth * 10) + 1)
    between = np.linspace(times[0], times[-1], count)
    right = np.searchsorted(times, between).clip(1, len(times) - 1)
    distances = np.minimum(np.abs(between - times[right - 1]), np.abs(between - times[right]))
    # Between two points a rounding error apart, the sign of a slope is noise, and every such pair would be a vertex.
    return np.union1d(times, between[distances > 1e-6 * bandwidth])


def arc_length(points: Float[np.ndarray, "G C"]) -> Float[np.ndarray, " G"]:
    """The length of the curve up to every point, along chords."""
    return np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))])


def osculating_circles(curve: Smooth, plane: tuple[int, int]) -> Circles:
    """The circles of the projection on two components; centres are infinite where the curve is straight."""
    position, first, second = np.moveaxis(curve.derivatives[:, :, list(plane)], 1, 0)
    speed, cross = np.linalg.norm(first, axis=1), first[:, 0] * second[:, 1] - first[:, 1] * second[:, 0]
    normal = np.stack([-first[:, 1], first[:, 0]], axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        curvature = cross / speed**3
        centre = position + (speed**2 / cross)[:, None] * normal
        in_first = np.stack([second[:, 1], -second[:, 0]], 1) / speed[:, None] ** 3
        in_first -= 3 * (cross / speed**5)[:, None] * first
        in_second = normal / speed[:, None] ** 3
    parts = (
        in_first**2 * curve.gains[:, 1, 1, None]
        + 2 * in_first * in_second * curve.gains[:, 1, 2, None]
        + in_second**2 * curve.gains[:, 2, 2, None]
    )
    variance = (parts * curve.noise[:, list(plane)] ** 2).sum(1)
    return Circles(curvature, np.sqrt(np.maximum(variance, 0)), centre)


def candidates(curve: Smooth, plane: tuple[int, int]) -> list[Candidate]:
    """Cusps and vertices of a projection, in order of time; none within a width of the ends, or at a cusp twice."""
    circles = osculating_circles(curve, plane)
    cusps = list(_cusps(curve, plane))
    vertices = [
        vertex
        for vertex, width in _vertices(curve, circles)
        if all(abs(vertex.time - cusp.time) > width for cusp in cusps)
    ]
    return sorted([*cusps, *vertices], key=lambda one: one.time)


def _cusps(curve: Smooth, plane: tuple[int, int]) -> Iterator[Candidate]:
    position, first, second = np.moveaxis(curve.derivatives[:, :, list(plane)], 1, 0)
    speed, change = np.linalg.norm(first, axis=1), np.linalg.norm(second, axis=1) * curve.widths
    noise = curve.noise[:, list(plane)].max(1)  # in the noisier direction
    speed_error, change_error = (
        noise * np.sqrt(curve.gains[:, 1, 1]),
        noise * np.sqrt(curve.gains[:, 2, 2]) * curve.widths,
    )
    for place in (np.flatnonzero((speed[1:-1] < speed[:-2]) & (speed[1:-1] <= speed[2:])) + 1).tolist():
        is_turning = change[place] > 4 * change_error[place]
        is_still = speed[place] < 0.1 * change[place] + 2 * speed_error[place]
        if not (is_turning and is_still and _is_inside(curve, place)):
            continue
        turn = second[place] / np.linalg.norm(second[place])
        away = [(position[side] - position[place]) @ turn for side in _sides(curve, place, 1.0)]
        if min(away) > 0.05 * change[place] * curve.widths[place]:  # a tenth of what r'' promises
            yield Candidate("cusp", float(curve.times[place]), tuple(position[place].tolist()), 0.0)


def _vertices(curve: Smooth, circles: Circles) -> Iterator[tuple[Candidate, float]]:
    bend, stderr = np.abs(circles.curvature), circles.stderr
    slopes = np.diff(circles.curvature)
    for place in (np.flatnonzero(slopes[:-1] * slopes[1:] <= 0) + 1).tolist():
        if not _is_inside(curve, place) or not bend[place] > 3 * stderr[place]:
            continue
        sides = _sides(curve, place, 1.5)
        rises = [circles.curvature[place] - circles.curvature[side] for side in sides]
        if rises[0] * rises[1] <= 0:
            continue
        scales = [max(0.1 * bend[place], 3 * math.hypot(stderr[place], stderr[side])) for side in sides]
        if all(abs(rise) > scale for rise, scale in zip(rises, scales, strict=True)):
            point = tuple(circles.centre[place].tolist())
            yield Candidate("vertex", float(curve.times[place]), point, float(1 / bend[place])), curve.widths[place]


def _is_inside(curve: Smooth, place: int) -> bool:
    """Whether a width fits in before the ends."""
    time, width = curve.times[place], curve.widths[place]
    return bool(curve.times[0] + width <= time <= curve.times[-1] - width)


def _sides(curve: Smooth, place: int, num_widths: float) -> list[int]:
    """The points some widths before and after."""
    around = curve.times[place] + num_widths * curve.widths[place] * np.array([-1, 1])
    return [int(np.abs(curve.times - time).argmin()) for time in around]


def _weights(
    times: Float[np.ndarray, " S"], at: Float[np.ndarray, " G"], widths: Float[np.ndarray, " G"]
) -> Iterator[tuple[slice, Float[np.ndarray, "g 4 S"]]]:
    """What each observation counts in r, r', r'' and r''' at some of the points, a stretch of points at a time."""
    many = max(1, _NUMBERS_AT_ONCE // (4 * len(times)))
    powers, factorials = np.arange(4), np.array([1.0, 1.0, 2.0, 6.0])
    for start in range(0, len(at), many):
        part = slice(start, min(start + many, len(at)))
        distance = (times - at[part, None]) / widths[part, None]  # g S
        basis = np.stack([np.ones_like(distance), distance, distance**2, distance**3], axis=1)  # g 4 S
        weighed = basis * np.exp(-0.5 * distance**2)[:, None]
        scale = factorials / widths[part, None] ** powers  # g 4
        yield part, scale[:, :, None] * (np.linalg.inv(weighed @ basis.mT) @ weighed)
