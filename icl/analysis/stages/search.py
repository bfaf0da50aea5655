"""Search for boundaries in a smoothed curve, over all intervals between knots.

Knots are the grid points at which intervals may begin and end. `icl.analysis.stages.boundaries` defines the kinds of
boundaries, and the words motion, pause and rest.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from icl.analysis.stages.smoothing import Curve

SIGNIFICANCE = 3.0
"""Minimum strength of a boundary, in standard errors (our choice). Because we search over many intervals, 5 to 10 % of
curves without stages reach this value. None of the curves without stages that we tested reached 4."""
STEEPNESS = 1.25
"""Factor by which the slopes of both motions must exceed the slope of the pause between them. With our choice, the
slope in the pause is at least a fifth smaller than the slopes of both motions."""
ONSET = 3.0
"""Factor by which the slope after an onset must exceed the slope before it (our choice)."""
ONSET_SIGNIFICANCE = 4.0
"""Minimum strength of an onset, in standard errors. It is larger than `SIGNIFICANCE`, because an onset has only one motion."""
_MAX_PAUSE = 16
"""Largest difference between the indices of the first and the last knot of a pause."""
Kind = Literal["turn", "plateau", "onset"]


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
    """Function from two lists of intervals to the covariances between their mean slopes."""
    contrasts: tuple[Float[np.ndarray, "K P"], Float[np.ndarray, "K P"]]
    """Entry (k, p) of the first matrix: slope k minus `STEEPNESS` times |slope of pause p|, in standard errors.

    The second matrix has -slope k in place of slope k.
    """
    moves: Bool[np.ndarray, " K"]
    """Whether the curve changes over the interval by at least the share `least_change` of its range."""


class KnotBoundary(NamedTuple):
    """A boundary at a knot, and the knots between which its exact time lies."""

    kind: Kind
    knot: int
    low: int
    high: int
    strength: float
    stretches: tuple[tuple[int, int], ...]
    """First and last knot of each stretch: the motion before, the motion after, and for a plateau the pause.

    For an onset, the stretches are the motion and the rest.
    """


def _intervals(curve: Curve, knots: Int[np.ndarray, " k"], least_change: float) -> _Intervals:
    """Compute mean slopes, errors and contrasts for all intervals between knots. Slopes are linear in the curve's values."""
    first, last = np.triu_indices(len(knots), 1)
    times, values = curve.times[knots], curve.values[knots]
    lengths = times[last] - times[first]
    weights = np.zeros((len(first), len(knots)))
    rows = np.arange(len(first))
    weights[rows, last], weights[rows, first] = 1 / lengths, -1 / lengths
    short = np.flatnonzero((last - first <= _MAX_PAUSE) & (first > 0) & (last < len(knots) - 1))
    half = weights @ curve.covariance[np.ix_(knots, knots)]
    slopes, variances = weights @ values, np.maximum((half * weights).sum(1), 1e-300)
    covariances = half @ weights[short].T
    contrasts = _contrasts(slopes[:, None], slopes[short], variances[:, None], variances[short], covariances, STEEPNESS)
    moves = np.abs(slopes) * lengths >= least_change * np.ptp(curve.values)

    def covariance(rows: Int[np.ndarray, " k"], columns: Int[np.ndarray, " r"]) -> Float[np.ndarray, "k r"]:
        return half[rows] @ weights[columns].T

    z = slopes / np.sqrt(variances)
    return _Intervals(first, last, z, short, slopes, lengths, covariance, contrasts, moves)


def _contrasts(
    fast: Float[np.ndarray, "k #r"],
    slow: Float[np.ndarray, " r"],
    fast_variances: Float[np.ndarray, "k #r"],
    slow_variances: Float[np.ndarray, " r"],
    covariances: Float[np.ndarray, "k r"],
    factor: float,
) -> tuple[Float[np.ndarray, "k r"], Float[np.ndarray, "k r"]]:
    """Return by how many standard errors each fast slope is steeper than `factor` times each slow slope.

    `fast` has the slopes of motions, and `slow` has the slopes of pauses. The first matrix is fast - factor |slow| in standard errors, for
    curves that rise. The second is -fast - factor |slow|, for curves that fall. The sign of a slow slope is uncertain, so we compute both
    signs and take the smaller number of standard errors.
    """
    spread, shared = fast_variances + factor**2 * slow_variances, 2 * factor * covariances
    minus = (fast - factor * slow) / np.sqrt(np.maximum(spread - shared, 1e-300))
    plus = (fast + factor * slow) / np.sqrt(np.maximum(spread + shared, 1e-300))
    return np.minimum(minus, plus), np.minimum(-minus, -plus)


def knot_boundaries(
    curve: Curve, knots: Int[np.ndarray, " k"], least_change: float, *, onsets: bool
) -> list[KnotBoundary]:
    """Find boundaries at knots, then drop each boundary that is not significant between its neighbours."""
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


def _search(intervals: _Intervals, low: int, high: int, onsets: bool) -> Iterator[KnotBoundary]:
    """Yield the strongest boundary between knots `low` and `high`, then the boundaries on each side of it."""
    boundary = _strongest(intervals, low, high, onsets)
    if boundary is not None:
        yield boundary
        yield from _search(intervals, low, boundary.knot, onsets)
        yield from _search(intervals, boundary.knot, high, onsets)


def _strongest(intervals: _Intervals, low: int, high: int, onsets: bool, at: int | None = None) -> KnotBoundary | None:
    """Return the strongest significant boundary between knots `low` and `high`, or None.

    If `at` is given, only this knot is considered.
    """
    candidates = [_turn(intervals, low, high, at)]
    onset = _onset(intervals, low, high, at) if onsets else None
    # A pause before a sudden motion ends in an onset, whose time is better defined than a time within the pause.
    is_sudden = onset is not None and onset.strength >= ONSET_SIGNIFICANCE
    candidates.append(onset if is_sudden else _plateau(intervals, low, high, at))
    significant = [boundary for boundary in candidates if boundary and boundary.strength >= SIGNIFICANCE]
    return max(significant, key=lambda boundary: boundary.strength, default=None)


def _turn(intervals: _Intervals, low: int, high: int, at: int | None) -> KnotBoundary | None:
    """Return the strongest turn between knots `low` and `high`, or None. The turn need not be significant.

    If `at` is given, only this knot is considered.
    """
    best: KnotBoundary | None = None
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


def _plateau(intervals: _Intervals, low: int, high: int, at: int | None) -> KnotBoundary | None:
    """Return the strongest plateau between knots `low` and `high`, or None. The plateau need not be significant.

    If `at` is given, only pauses that contain this knot are considered.
    """
    best: KnotBoundary | None = None
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


def _onset(intervals: _Intervals, low: int, high: int, at: int | None) -> KnotBoundary | None:
    """Return the strongest onset between knots `low` and `high`, or None. The onset need not be significant.

    If `at` is given, only this knot is considered.
    """
    best: KnotBoundary | None = None
    inside = (intervals.first >= low) & (intervals.last <= high)
    for knot in range(low + 1, high) if at is None else [at]:
        rests = np.flatnonzero(inside & (intervals.last == knot))
        motions = np.flatnonzero(inside & intervals.moves & (intervals.first == knot))
        if not len(rests) or not len(motions):
            continue
        fast, slow = intervals.slopes[motions, None], intervals.slopes[rests]
        fast_variances = np.diag(intervals.covariance(motions, motions))[:, None]
        slow_variances = np.diag(intervals.covariance(rests, rests))
        shared = intervals.covariance(motions, rests)
        strengths = np.maximum(*_contrasts(fast, slow, fast_variances, slow_variances, shared, ONSET))
        strengths[intervals.lengths[rests] < intervals.lengths[motions, None]] = -np.inf
        motion, rest = np.unravel_index(int(strengths.argmax()), strengths.shape)
        strength = float(strengths[motion, rest])
        if best is None or strength > best.strength:
            best = _knot_boundary("onset", knot, strength, intervals, [int(motions[motion]), int(rests[rest])])
    return best


def _knot_boundary(
    kind: Kind, knot: int, strength: float, intervals: _Intervals, chosen: Sequence[int]
) -> KnotBoundary:
    """Build a boundary, with the knots between which its exact time lies.

    These are the middles of the two motions. For an onset, they are the start of the rest and the end of the motion.
    """
    stretches = tuple((int(intervals.first[index]), int(intervals.last[index])) for index in chosen)
    if kind == "onset":
        low, high = stretches[1][0], stretches[0][1]
    else:
        low, high = (sum(ends) // 2 for ends in stretches[:2])
    return KnotBoundary(kind, knot, low, high, strength, stretches)
