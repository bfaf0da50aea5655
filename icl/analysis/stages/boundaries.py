"""Boundaries between stages in one signal: times at which the signal turns, pauses, or begins to move.

Hoogland et al. (2024) chose boundaries by hand at critical points of the LLC's curve, where its slope in ln t is zero
or has a plateau near zero. They published no rule. (An early version of the paper mentions an 'automated procedure',
which we did not find.) Our rule works for any signal. It uses the curve f from `icl.analysis.stages.smoothing`, and the
mean slopes of f over intervals of log time. Every mean slope has a standard error. There are three kinds of boundaries:

- A *turn*: f moves in one direction over an interval, and in the opposite direction over a later interval. Both mean slopes are at least
  `SIGNIFICANCE` standard errors from zero. The boundary lies at the extremum of f between the two intervals.
- A *plateau*: f moves in the same direction over two intervals. Between these two there is a third interval, the pause.
  In the pause, the absolute slope of f is smaller than in each of the two intervals, by a factor of at least
  `STEEPNESS`. For both intervals, the absolute slope minus `STEEPNESS` times the absolute slope of the pause must be at
  least `SIGNIFICANCE` standard errors above zero. To place the boundary, we fit two cubics to the observations between
  the middles of the two intervals. The cubics have equal value and slope where they join. The time of the boundary is
  the mean time of the joint, weighted by the likelihood of the fit.
- An *onset*, in language runs only: over one interval (the rest) f moves much less than over the next interval (the motion). The motion is
  not longer than the rest, in log time. The absolute slope of the motion minus `ONSET` times the absolute slope of the rest must be at
  least `ONSET_SIGNIFICANCE` standard errors above zero. The boundary is placed as for a plateau, with two differences: we fit the cubics to
  the observations between the start of the rest and the end of the motion, and the slopes of the cubics may differ where they join. The
  scores of heads need this kind: before an induction head forms, its scores hardly move.

In an interval of motion, f must change by at least the share `least_change` of its whole range. Smaller changes can
be artefacts of smoothing a corner. We take the strongest boundary first, and then search on each side of it. Between
two boundaries, a plateau is reported only if there is no onset. At the end, each boundary is tested again, with
intervals between the neighbouring boundaries only. A turn or a plateau is dropped if there is no motion on one of its
sides, and an onset if there is no motion after it. The search treats the scatter as independent between saved steps.
The strength of a boundary is the smaller of two significances: with independent scatter, and with the correlation that
`icl.analysis.scatter` estimates. A curve that moves in one direction without a pause has no turn and no plateau, even
if its slope varies. Examples are a power law, a sigmoid, a line, or a bend from one slope into a steeper one (which may
be an onset).

The standard error of the time of a turn includes the spread of the extremum over sampled curves, and its shift with shorter and longer
kernels. For a plateau or an onset, it comes from the likelihood profile of the time. Both errors take into account that the scatter is
correlated (`icl.analysis.stages.smoothing`), and include the spacing of the checkpoints, because a boundary can lie anywhere between two
checkpoints.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from icl.analysis.stages.search import ONSET, ONSET_SIGNIFICANCE, SIGNIFICANCE, STEEPNESS, Kind, knot_boundaries
from icl.analysis.stages.smoothing import Curve, Points, SmoothedSignal

CORRELATED_SIGNIFICANCE = 4.0
"""Minimum strength of a boundary, in standard errors, if the correlation of the scatter clearly lowers the strength (`_LITTLE_LOST`).
This limit is larger than `SIGNIFICANCE`, because the correlation is only estimated."""
_LITTLE_LOST = 0.8
"""We compute the strength of a boundary with independent scatter and with correlated scatter. If the second strength is more than this share
of the first, it must be at least `SIGNIFICANCE` (for an onset, `ONSET_SIGNIFICANCE`). Otherwise it must also be at least
`CORRELATED_SIGNIFICANCE`."""
_MAX_KNOTS = 64
"""Largest number of grid points at which intervals may begin and end."""
_NUM_TIMES = 200
"""Number of times at which the likelihood profile of a plateau or an onset is computed."""
_LEAST_POINTS = 8
"""Minimum number of observations for a likelihood profile."""
_NUM_SAMPLES = 200
"""Number of curves that are sampled to estimate the error of an extremum."""


class Boundary(NamedTuple):
    """A boundary in one signal."""

    kind: Kind
    time: float
    """u = ln(step + 1)."""
    stderr: float
    strength: float
    """Significance of the boundary in standard errors: with independent or with correlated scatter, whichever is smaller.

    For a turn or a plateau, this is the significance of the weaker of the two motions. For an onset, it is the significance of the
    motion minus `ONSET` times the rest.
    """
    is_robust: bool
    """Whether curves with a shorter and with a longer kernel also show the boundary."""
    is_significant: bool
    """Whether the boundary remains significant if the scatter is correlated between saved steps."""


def find_boundaries(fit: SmoothedSignal, *, least_change: float, onsets: bool = False) -> list[Boundary]:
    """Find the boundaries in a signal, in order of time.

    Args:
        fit: The smoothed signal.
        least_change: Minimum change of the signal between two boundaries, as a share of the curve's range.
        onsets: Whether onsets count as boundaries.
    """
    grid, knots = fit.curve.times, _knots(fit)
    rough = knot_boundaries(fit.curve, knots, least_change, onsets=onsets)
    rng = np.random.default_rng(0)
    samples = [curve.sample(_NUM_SAMPLES, rng) for curve in (fit.curve, fit.stated, *fit.others)] if rough else []
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
    """Return the time of the extremum of sampled curves that turn once, and the standard error of this time.

    `samples` contains four sets of curves. The time is the median over the first set, which assumes independent scatter. The standard
    error has two parts: the spread of the times in the second set, whose errors take correlation into account, and the range of the
    medians of all four sets. The last two sets have a shorter and a longer kernel.
    """
    mean = samples[0].mean(0)
    above_chord = mean - np.interp(times, times[[0, -1]], mean[[0, -1]])
    sign = 1 if above_chord.max() > -above_chord.min() else -1
    extrema = [times[(sign * curves).argmax(1)] for curves in samples]
    medians = [float(np.median(each)) for each in extrema]
    return medians[0], math.hypot(float(extrema[1].std(ddof=1)), max(medians) - min(medians))


def _corner(points: Points, low: float, high: float, *, bends: bool) -> tuple[float, float]:
    """Return the time and the standard error of the joint of two cubics, from the likelihood of the joint at many trial times.

    The cubics have equal value at the joint. They also have equal slope, unless `bends` is set.
    """
    inside = (points.times >= low) & (points.times <= high)
    times, values = points.times[inside], points.values[inside]
    root = np.linalg.cholesky(points.covariance[np.ix_(inside, inside)])
    if len(times) < _LEAST_POINTS:
        return (low + high) / 2, (high - low) / math.sqrt(12)
    trial_times = np.linspace(low, high, _NUM_TIMES + 2)[1:-1]
    misfits = []
    for time in trial_times:
        distance = (times - time) / (high - low)
        before, after = distance.clip(max=0), distance.clip(min=0)
        columns = [np.ones_like(distance), distance, before**2, after**2, before**3, after**3]
        basis = np.stack([*columns, after] if bends else columns, axis=1)
        basis, target = np.linalg.solve(root, basis), np.linalg.solve(root, values)
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

    Half of the knots are evenly spaced in log time. The other half are evenly spaced in the grid index, so they are denser
    where there are more checkpoints.
    """
    times, half = fit.curve.times, min(_MAX_KNOTS, len(fit.points.times)) // 2
    even = np.searchsorted(times, np.linspace(times[0], times[-1], half)).clip(max=len(times) - 1)
    return np.union1d(even, np.linspace(0, len(times) - 1, half).astype(int))
