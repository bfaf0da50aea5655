"""Boundaries between stages in one signal: times at which its slope is nearly zero between two intervals of change.

Hoogland et al. (2024) chose boundaries by hand at critical points of the LLC's curve, where d lambda / d ln t is zero
or has a plateau near zero. They published no rule. (An early version mentions an 'automated procedure', which we did
not find.) Our rule works for any signal. It uses the curve f from `icl.analysis.stages.smoothing`, and the mean slopes
of f over intervals of log time. Every mean slope has a standard error. There are three kinds of boundaries:

- A *turn*: f moves in one direction over an interval, and in the opposite direction over a later interval. Both mean slopes are at least
  `SIGNIFICANCE` standard errors from zero. The boundary lies at the extremum of f between the two intervals.
- A *plateau*: f moves in the same direction over two intervals. Over a third interval between these two (the pause), the absolute slope of
  f is smaller, by a factor of at least `STEEPNESS`, than the slope over each of the two intervals. For both intervals, the absolute slope
  minus `STEEPNESS` times the slope of the pause must be at least `SIGNIFICANCE` standard errors above zero. To place the boundary, we fit
  two cubics to the observations between the middles of the two intervals. The cubics have equal value and slope where they join. The
  boundary is the joint with the best fit.
- An *onset*, in language runs only: f hardly moves over an interval (the rest), and moves over the next interval (the motion), which is not
  longer. The absolute slope of the motion minus `ONSET` times the absolute slope of the rest must be at least `ONSET_SIGNIFICANCE`
  standard errors above zero. The boundary is placed as for a plateau, between the start of the rest and the end of the motion, but the
  slopes of the two cubics may differ. If a sudden motion follows a pause, we report the onset and not the plateau. The scores of heads need
  this kind: before an induction head forms, its scores do not move at all.

An interval counts as motion only if f changes over it by at least `least_change` of the range of f, because smoothing a corner
causes smaller changes. We take the strongest boundary first, and then search on each side of it. A boundary is dropped if
there is no motion between it and the next boundary (or the end of the curve) on one of its sides. The search treats the scatter as
independent between saved steps. The strength of a boundary is the smaller of two significances: with independent scatter, and with the
correlation that `icl.analysis.scatter` estimates. A curve that moves in one direction without a pause has no turn and no
plateau, even if its slope varies. Examples are a power law, a sigmoid, a line, or a bend from one slope into a steeper one.

The standard error of the time of a turn includes the spread of the extremum over sampled curves, and its shift with shorter and
longer kernels. The standard error of the time of a plateau or an onset comes from its likelihood profile. Both errors include the spacing of the
checkpoints, because a boundary can lie anywhere between two checkpoints.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from icl.analysis.stages.smoothing import Curve, Points, SmoothedSignal

SIGNIFICANCE = 3.0
"""Minimum strength of a boundary, in standard errors (our choice). Because we search over many intervals, one in ten to one in twenty
curves without stages reaches this value. None of the curves without stages that we tested reached 4."""
CORRELATED_SIGNIFICANCE = 4.0
"""Minimum strength of a boundary, in standard errors, if the correlation of the scatter clearly lowers it (`_LITTLE_LOST`). This limit is
larger than `SIGNIFICANCE`, because the correlation is only estimated."""
_LITTLE_LOST = 0.8
"""The limit is `SIGNIFICANCE` if, after the correlation of the scatter is taken into account, more than this share of the strength remains.
Otherwise the limit is `CORRELATED_SIGNIFICANCE`."""
STEEPNESS = 1.25
"""Factor by which the slopes of both motions must exceed the slope of the pause between them. With our choice, the slope in the pause is
at least a fifth smaller."""
ONSET = 3.0
"""Factor by which the slope after an onset must exceed the slope before it (our choice)."""
ONSET_SIGNIFICANCE = 4.0
"""Minimum strength of an onset, in standard errors. It is larger than `SIGNIFICANCE`, because an onset has only one motion."""
_MAX_KNOTS = 64
"""Largest number of grid points at which intervals may begin and end."""
_MAX_PAUSE = 16
"""Largest number of knots that a pause may span."""
_NUM_TIMES = 200
"""Number of times at which the likelihood profile of a plateau is computed."""
_LEAST_POINTS = 8
"""Minimum number of observations for a likelihood profile."""
_NUM_SAMPLES = 200
"""Number of curves that are sampled to estimate the error of an extremum."""

Kind = Literal["turn", "plateau", "onset"]


class Boundary(NamedTuple):
    """A boundary in one signal."""

    kind: Kind
    time: float
    """u = ln(step + 1)."""
    stderr: float
    strength: float
    """Significance of the weaker of the two motions (of an onset: of its motion), in standard errors.

    This is the smaller of two values: with independent scatter, and with correlated scatter.
    """
    is_robust: bool
    """Whether curves with a shorter and with a longer kernel also show the boundary."""
    is_significant: bool
    """Whether the boundary remains significant if the scatter is correlated between saved steps."""


class _Intervals(NamedTuple):
    """All intervals between knots, and the mean slopes of a curve over them."""

    first: Int[np.ndarray, " K"]
    last: Int[np.ndarray, " K"]
    z: Float[np.ndarray, " K"]
    """Mean slopes divided by their errors."""
    short: Int[np.ndarray, " P"]
    """Indices of intervals that may be the pause of a plateau."""
    slopes: Float[np.ndarray, " K"]
    lengths: Float[np.ndarray, " K"]
    covariance: Callable[[Int[np.ndarray, " k"], Int[np.ndarray, " r"]], Float[np.ndarray, "k r"]]
    """Function from two lists of intervals to the covariances of their mean slopes."""
    contrasts: tuple[Float[np.ndarray, "K P"], Float[np.ndarray, "K P"]]
    """Slope k minus `STEEPNESS` times |slope of pause p|, in standard errors; then the same number with -slope k in place of slope k."""
    moves: Bool[np.ndarray, " K"]
    """Whether the curve moves by at least `least_change` of its range."""


class _KnotBoundary(NamedTuple):
    """A boundary at a knot, and the knots between which its exact time lies."""

    kind: Kind
    knot: int
    low: int
    high: int
    strength: float
    stretches: tuple[tuple[int, int], ...]
    """First and last knot of each stretch: the motion before, the motion after, and for a plateau the pause. For an onset: the motion, the rest."""


def find_boundaries(fit: SmoothedSignal, *, least_change: float, onsets: bool = False) -> list[Boundary]:
    """Find the boundaries in a signal, in order of time.

    Args:
        fit: The smoothed signal.
        least_change: Minimum change of the signal between two boundaries, as a share of the curve's range.
        onsets: Whether onsets count as boundaries.
    """
    grid, knots = fit.curve.times, _knots(fit)
    rough = _knot_boundaries(fit.curve, knots, least_change, onsets=onsets)
    rng = np.random.default_rng(0)
    samples = [curve.sample(_NUM_SAMPLES, rng) for curve in fit.curves] if rough else []
    boundaries = []
    for kind, _, low_knot, high_knot, strength, stretches in rough:
        low, high = int(knots[low_knot]), int(knots[high_knot])
        if kind == "turn":
            time, error = _extremum([curves[:, low : high + 1] for curves in samples], grid[low : high + 1])
        else:
            time, error = _corner(fit.points, float(grid[low]), float(grid[high]), bends=kind == "onset")
        # The exact time between two neighbouring checkpoints is unknown. We treat it as uniform over the spacing.
        spacing = np.diff(fit.points.times)[np.searchsorted(fit.points.times[1:-1], time)]
        error = math.hypot(error, spacing / math.sqrt(12))
        on_grid = [(int(knots[first]), int(knots[last])) for first, last in stretches]
        least = ONSET_SIGNIFICANCE if kind == "onset" else SIGNIFICANCE
        is_robust = all(_strength(curve, kind, on_grid) >= least for curve in fit.others)
        if_correlated = _strength(fit.if_correlated, kind, on_grid)
        needed = least if if_correlated > _LITTLE_LOST * strength else max(least, CORRELATED_SIGNIFICANCE)
        is_significant = if_correlated >= needed
        boundaries.append(Boundary(kind, time, error, min(strength, if_correlated), is_robust, is_significant))
    return boundaries


def _extremum(samples: Sequence[Float[np.ndarray, "J g"]], times: Float[np.ndarray, " g"]) -> tuple[float, float]:
    """Return the time of the extremum of sampled curves that turn once, and the standard error of this time."""
    mean = samples[0].mean(0)
    above_chord = mean - np.interp(times, times[[0, -1]], mean[[0, -1]])
    sign = 1 if above_chord.max() > -above_chord.min() else -1
    extrema = [times[(sign * curves).argmax(1)] for curves in samples]
    medians = [float(np.median(each)) for each in extrema]
    return medians[0], math.hypot(float(np.concatenate(extrema).std(ddof=1)), max(medians) - min(medians))


def _corner(points: Points, low: float, high: float, *, bends: bool) -> tuple[float, float]:
    """Return the time and the standard error of the joint of two cubics, from the likelihood of the joint at many trial times.

    The cubics have equal value at the joint. They also have equal slope, unless `bends` is set.
    """
    inside = (points.times >= low) & (points.times <= high)
    times, values, noise = (array[inside] for array in points)
    if len(times) < _LEAST_POINTS:
        return (low + high) / 2, (high - low) / math.sqrt(12)
    trial_times = np.linspace(low, high, _NUM_TIMES + 2)[1:-1]
    misfits = []
    for time in trial_times:
        distance = (times - time) / (high - low)
        before, after = distance.clip(max=0), distance.clip(min=0)
        columns = [np.ones_like(distance), distance, before**2, after**2, before**3, after**3]
        basis = np.stack([*columns, after] if bends else columns, axis=1)
        basis, target = basis / noise[:, None], values / noise
        misfits.append(float(np.sum((target - basis @ np.linalg.lstsq(basis, target, rcond=None)[0]) ** 2)))
    weights = np.exp(-0.5 * (np.array(misfits) - min(misfits)))
    weights /= weights.sum()
    mean = float(weights @ trial_times)
    return mean, float(np.sqrt(weights @ (trial_times - mean) ** 2))


def _strength(curve: Curve, kind: Kind, stretches: Sequence[tuple[int, int]]) -> float:
    """Return the significance of a boundary in a curve, in standard errors, for given stretches of motion and pause."""
    weights = np.zeros((len(stretches), len(curve.times)))
    for row, (first, last) in zip(weights, stretches, strict=True):
        row[last], row[first] = np.array([1, -1]) / (curve.times[last] - curve.times[first])
    sign = np.sign(weights[0] @ curve.values)
    if kind == "turn":
        contrasts = [sign * weights[0], -sign * weights[1]]
    elif kind == "onset":
        contrasts = [sign * weights[0] + rest for rest in (ONSET * weights[1], -ONSET * weights[1])]
    else:
        pause = STEEPNESS * weights[2]
        contrasts = [sign * motion + slow for motion in weights[:2] for slow in (pause, -pause)]
    # Contrasts are linear in the curve's values, so their variances follow from its covariance.
    return min(float(row @ curve.values / np.sqrt(max(row @ curve.covariance @ row, 1e-300))) for row in contrasts)


def _knots(fit: SmoothedSignal) -> Int[np.ndarray, " k"]:
    """Return the grid indices at which intervals may begin and end (knots). There are at most as many knots as observations.

    Half of the knots are evenly spaced in log time. The other half are evenly spaced in the grid index. The grid is denser near
    checkpoints.
    """
    times, half = fit.curve.times, min(_MAX_KNOTS, len(fit.points.times)) // 2
    even = np.searchsorted(times, np.linspace(times[0], times[-1], half)).clip(max=len(times) - 1)
    return np.union1d(even, np.linspace(0, len(times) - 1, half).astype(int))


def _intervals(curve: Curve, knots: Int[np.ndarray, " k"], least_change: float) -> _Intervals:
    """Compute mean slopes, errors and contrasts for all intervals between knots. Slopes are linear in the values."""
    first, last = np.triu_indices(len(knots), 1)
    times, values = curve.times[knots], curve.values[knots]
    lengths = times[last] - times[first]
    weights = np.zeros((len(first), len(knots)))
    rows = np.arange(len(first))
    weights[rows, last], weights[rows, first] = 1 / lengths, -1 / lengths
    short = np.flatnonzero((last - first <= _MAX_PAUSE) & (first > 0) & (last < len(knots) - 1))
    half = weights @ curve.covariance[np.ix_(knots, knots)]
    slopes, variances = weights @ values, np.maximum((half * weights).sum(1), 1e-300)
    # Slope k minus (or plus) STEEPNESS times the slope of the pause. The variances differ in the sign of the covariance.
    spread = variances[:, None] + STEEPNESS**2 * variances[short]
    shared = 2 * STEEPNESS * half @ weights[short].T
    minus = (slopes[:, None] - STEEPNESS * slopes[short]) / np.sqrt(np.maximum(spread - shared, 1e-300))
    plus = (slopes[:, None] + STEEPNESS * slopes[short]) / np.sqrt(np.maximum(spread + shared, 1e-300))
    contrasts = (np.minimum(minus, plus), np.minimum(-minus, -plus))
    moves = np.abs(slopes) * lengths >= least_change * np.ptp(curve.values)

    def covariance(rows: Int[np.ndarray, " k"], columns: Int[np.ndarray, " r"]) -> Float[np.ndarray, "k r"]:
        return half[rows] @ weights[columns].T

    z = slopes / np.sqrt(variances)
    return _Intervals(first, last, z, short, slopes, lengths, covariance, contrasts, moves)


def _knot_boundaries(
    curve: Curve, knots: Int[np.ndarray, " k"], least_change: float, *, onsets: bool
) -> list[_KnotBoundary]:
    """Find boundaries at knots, then drop each boundary without motion between it and a neighbouring boundary or end."""
    intervals = _intervals(curve, knots, least_change)
    end = int(intervals.last.max())
    boundaries = sorted(_search(intervals, 0, end, onsets), key=lambda boundary: boundary.knot)
    num_before = -1
    while len(boundaries) != num_before:
        num_before = len(boundaries)
        edges = [0, *(boundary.knot for boundary in boundaries), end]
        boundaries = [
            kept
            for boundary, low, high in zip(boundaries, edges, edges[2:], strict=False)
            if (kept := _strongest(intervals, low, high, onsets, boundary.knot)) is not None
        ]
    return boundaries


def _search(intervals: _Intervals, low: int, high: int, onsets: bool) -> Iterator[_KnotBoundary]:
    """Yield the strongest boundary between two knots, then the boundaries on each side of it."""
    boundary = _strongest(intervals, low, high, onsets)
    if boundary is not None:
        yield boundary
        yield from _search(intervals, low, boundary.knot, onsets)
        yield from _search(intervals, boundary.knot, high, onsets)


def _strongest(intervals: _Intervals, low: int, high: int, onsets: bool, at: int | None = None) -> _KnotBoundary | None:
    """Return the strongest significant boundary between two knots, or at knot `at`."""
    found = [_turn(intervals, low, high, at)]
    onset = _onset(intervals, low, high, at) if onsets else None
    # A pause before a sudden motion ends in an onset, whose time is better defined than a time within the pause.
    is_sudden = onset is not None and onset.strength >= ONSET_SIGNIFICANCE
    found.append(onset if is_sudden else _plateau(intervals, low, high, at))
    significant = [boundary for boundary in found if boundary and boundary.strength >= SIGNIFICANCE]
    return max(significant, key=lambda boundary: boundary.strength, default=None)


def _turn(intervals: _Intervals, low: int, high: int, at: int | None) -> _KnotBoundary | None:
    """Return the strongest turn between two knots, or at knot `at`. It need not be significant."""
    best: _KnotBoundary | None = None
    inside = intervals.moves & (intervals.first >= low) & (intervals.last <= high)
    for knot in range(low + 1, high) if at is None else [at]:
        before = np.flatnonzero(inside & (intervals.last <= knot))
        after = np.flatnonzero(inside & (intervals.first >= knot))
        if not len(before) or not len(after):
            continue
        for sign in (1, -1):
            left = int(before[(sign * intervals.z[before]).argmax()])
            right = int(after[(-sign * intervals.z[after]).argmax()])
            strength = float(min(sign * intervals.z[left], -sign * intervals.z[right]))
            if best is None or strength > best.strength:
                best = _knot_boundary("turn", knot, strength, intervals, [left, right])
    return best


def _plateau(intervals: _Intervals, low: int, high: int, at: int | None) -> _KnotBoundary | None:
    """Return the strongest plateau between two knots, or with knot `at` in its pause. It need not be significant."""
    best: _KnotBoundary | None = None
    first, last = intervals.first[intervals.short], intervals.last[intervals.short]
    pauses = np.flatnonzero((first > low) & (last < high) & (True if at is None else (first <= at) & (at <= last)))
    moving = np.flatnonzero(intervals.moves & (intervals.first >= low) & (intervals.last <= high))
    if not len(pauses) or not len(moving):
        return None
    is_before = intervals.last[moving, None] <= first[pauses]
    is_after = intervals.first[moving, None] >= last[pauses]
    for contrast in intervals.contrasts:
        z = contrast[np.ix_(moving, pauses)]
        left, right = np.where(is_before, z, -np.inf), np.where(is_after, z, -np.inf)
        strengths = np.minimum(left.max(0), right.max(0))
        index = int(strengths.argmax())
        if best is None or strengths[index] > best.strength:
            pause = int(intervals.short[pauses[index]])
            knot = int(intervals.first[pause] + intervals.last[pause]) // 2 if at is None else at
            motions = [int(moving[side[:, index].argmax()]) for side in (left, right)]
            best = _knot_boundary("plateau", knot, float(strengths[index]), intervals, [*motions, pause])
    return best


def _onset(intervals: _Intervals, low: int, high: int, at: int | None) -> _KnotBoundary | None:
    """Return the strongest onset between two knots, or at knot `at`. It need not be significant."""
    best: _KnotBoundary | None = None
    inside = (intervals.first >= low) & (intervals.last <= high)
    for knot in range(low + 1, high) if at is None else [at]:
        rests = np.flatnonzero(inside & (intervals.last == knot))
        motions = np.flatnonzero(inside & intervals.moves & (intervals.first == knot))
        if not len(rests) or not len(motions):
            continue
        slow, fast = ONSET * intervals.slopes[rests], intervals.slopes[motions, None]
        own = np.diag(intervals.covariance(motions, motions))[:, None]
        spread = own + ONSET**2 * np.diag(intervals.covariance(rests, rests))
        shared = 2 * ONSET * intervals.covariance(motions, rests)
        minus = (fast - slow) / np.sqrt(np.maximum(spread - shared, 1e-300))
        plus = (fast + slow) / np.sqrt(np.maximum(spread + shared, 1e-300))
        strengths = np.maximum(np.minimum(minus, plus), np.minimum(-minus, -plus))
        strengths[intervals.lengths[rests] < intervals.lengths[motions, None]] = -np.inf
        motion, rest = np.unravel_index(int(strengths.argmax()), strengths.shape)
        strength = float(strengths[motion, rest])
        if best is None or strength > best.strength:
            best = _knot_boundary("onset", knot, strength, intervals, [int(motions[motion]), int(rests[rest])])
    return best


def _knot_boundary(
    kind: Kind, knot: int, strength: float, intervals: _Intervals, chosen: Sequence[int]
) -> _KnotBoundary:
    """Build a boundary. Its exact time lies between the middles of the two motions, or between the ends of rest and motion."""
    stretches = tuple((int(intervals.first[index]), int(intervals.last[index])) for index in chosen)
    if kind == "onset":
        low, high = stretches[1][0], stretches[0][1]
    else:
        low, high = (sum(ends) // 2 for ends in stretches[:2])
    return _KnotBoundary(kind, knot, low, high, strength, stretches)
