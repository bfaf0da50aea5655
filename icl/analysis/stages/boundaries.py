"""Boundaries between stages in one signal: its slope in log time all but vanishes, between two stretches where it does not.

Hoogland et al. (2024) set boundaries by hand at critical points of the LLC's curve, where d lambda / d ln t is zero or has a
plateau near it; there is no published rule (the 'automated procedure' of an early version was not found). Ours, for any
signal, on the curve f of `icl.analysis.stages.smoothing` and the mean slopes of f over intervals of log time, each with its error:

- a *turn*: f moves one way over an interval and the other way over a later one, both by `SIGNIFICANCE` standard errors. It
  lies at the extremum of f between them.
- a *plateau*: f moves one way over an interval, the same way over a later one, and over one between them its slope is less
  than 1 / `STEEPNESS` of either, up or down; both contrasts by `SIGNIFICANCE` standard errors. It lies where two cubics with
  a common value and slope fit the observations best, from the middle of the first interval to that of the last.

No interval of motion counts if f moves less over it than `least_change` of its range, which is what smoothing makes of a
corner. The strongest boundary is taken first and each side searched again; what has no two stretches of motion left between
its neighbours is dropped. A curve that moves once, or faster and slower without pausing, has none: a power law, a sigmoid, a
line, and also a bend from one slope into a steeper one.

A turn's place has the error of the extremum over curves that the data allow, and of the shift under shorter and longer kernels;
a plateau's that of the profile of the likelihood; and both that of a place somewhere between two neighbouring checkpoints.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from icl.analysis.stages.smoothing import Curve, Fit, Points

SIGNIFICANCE = 3.0
"""Ours. Intervals are searched for, so that one curve in ten or twenty without stages reaches it, and none seen reached 4."""
STEEPNESS = 1.25
"""Ours: the slope falls by a fifth."""
_MAX_KNOTS = 64
"""Places where intervals may begin and end."""
_MAX_PAUSE = 16
"""Knots that a pause may span."""
_NUM_PLACES = 200
_LEAST_POINTS = 8
_NUM_SAMPLES = 200

Kind = Literal["turn", "plateau"]


class Boundary(NamedTuple):
    """A boundary in one signal."""

    kind: Kind
    time: float
    """u = ln(step + 1)."""
    stderr: float
    strength: float
    """Standard errors by which the weaker of the two stretches of motion stands out."""
    is_robust: bool
    """Whether shorter and longer kernels show it, too."""


class _Intervals(NamedTuple):
    """All intervals between knots, and what a curve does over them."""

    first: Int[np.ndarray, " K"]
    last: Int[np.ndarray, " K"]
    z: Float[np.ndarray, " K"]
    """Mean slopes over their errors."""
    short: Int[np.ndarray, " P"]
    """Which of them may be a plateau's pause."""
    contrasts: tuple[Float[np.ndarray, "K P"], Float[np.ndarray, "K P"]]
    """By how many errors slope k is above `STEEPNESS` times that of pause p, up and down: the least of both; and below."""
    moves: Bool[np.ndarray, " K"]
    """Whether the curve moves enough to be a stage."""


class _Mark(NamedTuple):
    """A boundary's place among the knots, and the knots between which it lies."""

    kind: Kind
    knot: int
    low: int
    high: int
    strength: float
    stretches: tuple[tuple[int, int], ...]
    """First and last knots of the motions before and after, and of a plateau's pause."""


def find_boundaries(fit: Fit, *, least_change: float) -> list[Boundary]:
    """The boundaries in a signal, in order of time.

    Args:
        fit: The signal.
        least_change: The least move between two boundaries, as a share of the curve's range.
    """
    grid, knots = fit.middle.times, _knots(fit)
    marks = _marks(fit.middle, knots, least_change)
    rng = np.random.default_rng(0)
    samples = [curve.sample(_NUM_SAMPLES, rng) for curve in fit.curves] if marks else []
    found = []
    for mark in marks:
        low, high = (int(knots[edge]) for edge in (mark.low, mark.high))
        if mark.kind == "turn":
            time, error = _extremum([one[:, low : high + 1] for one in samples], grid[low : high + 1])
        else:
            time, error = _corner(fit.points, float(grid[low]), float(grid[high]))
        spacing = np.diff(fit.points.times)[np.searchsorted(fit.points.times[1:-1], time)]
        error = math.hypot(error, spacing / math.sqrt(12))
        stretches = [(int(knots[first]), int(knots[last])) for first, last in mark.stretches]
        is_robust = all(_strength(curve, mark.kind, stretches) >= SIGNIFICANCE for curve in fit.others)
        found.append(Boundary(mark.kind, time, error, mark.strength, is_robust))
    return found


def _extremum(samples: Sequence[Float[np.ndarray, "J g"]], times: Float[np.ndarray, " g"]) -> tuple[float, float]:
    """Where curves that turn once are farthest from the line between their ends, and its error."""
    middle = samples[0].mean(0)
    away = middle - np.interp(times, times[[0, -1]], middle[[0, -1]])
    sign = 1 if away.max() > -away.min() else -1
    places = [times[(sign * one).argmax(1)] for one in samples]
    centres = [float(np.median(one)) for one in places]
    return centres[0], math.hypot(float(np.concatenate(places).std(ddof=1)), max(centres) - min(centres))


def _corner(points: Points, low: float, high: float) -> tuple[float, float]:
    """Where two cubics with a common value and slope fit best, and its error, by the profile of their likelihood."""
    inside = (points.times >= low) & (points.times <= high)
    times, values, noise = (one[inside] for one in points)
    places = np.linspace(low, high, _NUM_PLACES + 2)[1:-1]
    if len(times) < _LEAST_POINTS:
        return (low + high) / 2, (high - low) / math.sqrt(12)
    misfits = []
    for place in places:
        distance = (times - place) / (high - low)
        before, after = distance.clip(max=0), distance.clip(min=0)
        basis = np.stack([np.ones_like(distance), distance, before**2, after**2, before**3, after**3], axis=1)
        misfits.append(_misfit(basis / noise[:, None], values / noise))
    weights = np.exp(-0.5 * (np.array(misfits) - min(misfits)))
    weights /= weights.sum()
    time = float(weights @ places)
    return time, float(np.sqrt(weights @ (places - time) ** 2))


def _misfit(basis: Float[np.ndarray, "S P"], values: Float[np.ndarray, " S"]) -> float:
    """The least squared distance of the values from what the basis spans."""
    return float(np.sum((values - basis @ np.linalg.lstsq(basis, values, rcond=None)[0]) ** 2))


def _strength(curve: Curve, kind: Kind, stretches: Sequence[tuple[int, int]]) -> float:
    """How far the stretches of motion, and the pause where there is one, stand out in a curve."""
    weights = np.zeros((len(stretches), len(curve.times)))
    for row, (first, last) in zip(weights, stretches, strict=True):
        row[last], row[first] = np.array([1, -1]) / (curve.times[last] - curve.times[first])
    sign = np.sign(weights[0] @ curve.values)
    if kind == "turn":
        contrasts = [sign * weights[0], -sign * weights[1]]
    else:
        pause = STEEPNESS * weights[2]
        contrasts = [sign * motion + slow for motion in weights[:2] for slow in (pause, -pause)]
    return min(float(one @ curve.values / np.sqrt(max(one @ curve.covariance @ one, 1e-300))) for one in contrasts)


def _knots(fit: Fit) -> Int[np.ndarray, " k"]:
    """Places on the curves' grid, half of them even in log time and half even among the grid's points; no more than observations."""
    times, half = fit.middle.times, min(_MAX_KNOTS, len(fit.points.times)) // 2
    even = np.searchsorted(times, np.linspace(times[0], times[-1], half)).clip(max=len(times) - 1)
    return np.union1d(even, np.linspace(0, len(times) - 1, half).astype(int))


def _intervals(curve: Curve, knots: Int[np.ndarray, " k"], least_change: float) -> _Intervals:
    first, last = np.triu_indices(len(knots), 1)
    times, values = curve.times[knots], curve.values[knots]
    lengths = times[last] - times[first]
    weights = np.zeros((len(first), len(knots)))
    rows = np.arange(len(first))
    weights[rows, last], weights[rows, first] = 1 / lengths, -1 / lengths
    short = np.flatnonzero((last - first <= _MAX_PAUSE) & (first > 0) & (last < len(knots) - 1))
    half = weights @ curve.covariance[np.ix_(knots, knots)]
    slopes, variances = weights @ values, np.maximum((half * weights).sum(1), 1e-300)
    spread = variances[:, None] + STEEPNESS**2 * variances[short]
    shared = 2 * STEEPNESS * half @ weights[short].T
    above = (slopes[:, None] - STEEPNESS * slopes[short]) / np.sqrt(np.maximum(spread - shared, 1e-300))
    below = (slopes[:, None] + STEEPNESS * slopes[short]) / np.sqrt(np.maximum(spread + shared, 1e-300))
    return _Intervals(
        first,
        last,
        slopes / np.sqrt(variances),
        short,
        (np.minimum(above, below), np.minimum(-above, -below)),
        np.abs(slopes) * lengths >= least_change * np.ptp(curve.values),
    )


def _marks(curve: Curve, knots: Int[np.ndarray, " k"], least_change: float) -> list[_Mark]:
    """The boundaries among the knots: all that are found, then without those that their neighbours leave no room."""
    intervals = _intervals(curve, knots, least_change)
    end = int(intervals.last.max())
    found = sorted(_search(intervals, 0, end), key=lambda one: one.knot)
    while found:
        edges = [0, *(one.knot for one in found), end]
        found = [
            mark
            for one, low, high in zip(found, edges, edges[2:], strict=False)
            if (mark := _best(intervals, low, high, one.knot)) is not None
        ]
        if len(found) == len(edges) - 2:
            break
    return found


def _search(intervals: _Intervals, low: int, high: int) -> Iterator[_Mark]:
    """The strongest boundary between two knots, then those on either side of it."""
    mark = _best(intervals, low, high)
    if mark is not None:
        yield mark
        yield from _search(intervals, low, mark.knot)
        yield from _search(intervals, mark.knot, high)


def _best(intervals: _Intervals, low: int, high: int, at: int | None = None) -> _Mark | None:
    """The strongest significant boundary between two knots, or at one."""
    marks = [mark for mark in (_turn(intervals, low, high, at), _plateau(intervals, low, high, at)) if mark]
    marks = [mark for mark in marks if mark.strength >= SIGNIFICANCE]
    return max(marks, key=lambda one: one.strength, default=None)


def _turn(intervals: _Intervals, low: int, high: int, at: int | None) -> _Mark | None:
    best: _Mark | None = None
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
                best = _mark("turn", knot, strength, intervals, [left, right])
    return best


def _plateau(intervals: _Intervals, low: int, high: int, at: int | None) -> _Mark | None:
    best: _Mark | None = None
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
        place = int(strengths.argmax())
        if best is None or strengths[place] > best.strength:
            pause = int(intervals.short[pauses[place]])
            knot = int(intervals.first[pause] + intervals.last[pause]) // 2 if at is None else at
            motions = [int(moving[side[:, place].argmax()]) for side in (left, right)]
            best = _mark("plateau", knot, float(strengths[place]), intervals, [*motions, pause])
    return best


def _mark(kind: Kind, knot: int, strength: float, intervals: _Intervals, chosen: Sequence[int]) -> _Mark:
    """A boundary that lies between the middles of its two motions."""
    stretches = tuple((int(intervals.first[place]), int(intervals.last[place])) for place in chosen)
    low, high = (sum(ends) // 2 for ends in stretches[:2])
    return _Mark(kind, knot, low, high, strength, stretches)
