"""Agreement between signals: combine the candidates of several signals into boundaries, with their times and verdicts.

Candidates of several signals form one boundary if they are close to the strongest candidate in u = ln(step + 1). Two candidates are close
if their distance is at most `tolerance`. A distance of up to twice `tolerance` also counts as close if it is at most two standard errors.
The time of the boundary is the mean of the candidates' times, weighted by inverse variance. Each group of dependent signals (defined below)
contributes one candidate to this mean. If the times scatter more than their errors allow, the error of the mean is multiplied by the Birge
ratio (Birge 1932), the square root of chi-squared per degree of freedom.

We say that a signal shows a boundary if the boundary is still significant after the correlation of the signal's scatter is taken
into account. Loss and ICL score are one group of dependent signals. An LLC that mirrors the loss near the boundary
(`points.mirrors_loss`) belongs to this group too. Verdicts:

- `ok`: signals of at least two groups show the boundary, and at least one signal shows it with all three smoothing kernels.
- `suspect`: at most one group shows the boundary, but its strength is at least `STRONG` standard errors; or no signal
  shows it with all three smoothing kernels.
- `invalid`: at most one group shows the boundary, and its strength is below `STRONG` standard errors. A boundary is
  also `invalid` if an end of the curves, or a stronger boundary, lies within two standard errors of it.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from icl.analysis.stages.boundaries import Boundary, find_boundaries
from icl.analysis.stages.points import Signal, mirrors_loss
from icl.analysis.stages.signals import Verdict
from icl.analysis.stages.smoothing import SmoothedSignal

STRONG = 5.0
"""Minimum strength of a boundary, in standard errors, if only one group of signals shows it (our choice). With two
groups, `boundaries.SIGNIFICANCE` is enough (for an onset, `boundaries.ONSET_SIGNIFICANCE`)."""
AROUND = 1.0
"""Distance in log time, before and after a boundary, within which we test whether an LLC mirrors the loss."""


class Candidate(NamedTuple):
    """A boundary in one signal, which may be part of a boundary of the run."""

    signal: Signal
    boundary: Boundary
    group: str
    """Group of the signal, or `loss` for an LLC that mirrors the loss near the boundary."""


class RunBoundary(NamedTuple):
    """A boundary of the run, from all signals that show it."""

    time: float
    stderr: float
    candidates: tuple[Candidate, ...]
    verdict: Verdict
    reasons: tuple[str, ...]

    @property
    def strength(self) -> float:
        """Largest strength of the boundary in any signal, in standard errors."""
        return max(candidate.boundary.strength for candidate in self.candidates)


def agree(
    signals: Sequence[Signal], fits: Mapping[str, SmoothedSignal], *, tolerance: float, least_change: float
) -> list[RunBoundary]:
    """Find the boundaries of a run from the boundaries in its signals, in order of time.

    Args:
        signals: All signals of the run.
        fits: Smoothed signals. The keys are the names of the signals.
        tolerance: A candidate belongs to the same boundary as the strongest candidate if their distance in ln(step + 1) is at
            most `tolerance`. A distance of up to twice `tolerance` is allowed if it is at most two standard errors.
        least_change: Minimum change of a signal within a stage, as a share of the signal's range.
    """
    remaining = [
        Candidate(signal, boundary, _group(signal, boundary.time))
        for signal in signals
        for boundary in find_boundaries(fits[signal.name], least_change=least_change, onsets=signal.has_onsets)
    ]
    groups: list[list[Candidate]] = []
    while remaining:
        strongest = max(remaining, key=lambda candidate: candidate.boundary.strength)
        group = [strongest]
        for signal in signals:
            close = [each for each in remaining if each.signal is signal and _is_close(strongest, each, tolerance)]
            if close and signal is not strongest.signal:
                group.append(min(close, key=lambda each: abs(each.boundary.time - strongest.boundary.time)))
        groups.append(group)
        remaining = [each for each in remaining if not any(each is taken for taken in group)]
    ends = [float(smoothed.points.times[index]) for smoothed in fits.values() for index in (0, -1)]
    span = (min(ends, default=0.0), max(ends, default=0.0))
    boundaries = [_judge(group, signals, span) for group in groups]
    return _reject_overlapping(sorted(boundaries, key=lambda boundary: boundary.time))


def _group(signal: Signal, time: float) -> str:
    return "loss" if mirrors_loss(signal, time - AROUND, time + AROUND) else signal.group


def _is_close(first: Candidate, second: Candidate, tolerance: float) -> bool:
    distance = abs(first.boundary.time - second.boundary.time)
    error = math.hypot(first.boundary.stderr, second.boundary.stderr)
    return distance <= max(tolerance, min(2 * error, 2 * tolerance))


def _judge(candidates: Sequence[Candidate], signals: Sequence[Signal], span: tuple[float, float]) -> RunBoundary:
    """Combine candidates into one boundary, with its time and verdict."""
    time, stderr = _mean_time(candidates, sorted({candidate.group for candidate in candidates}))
    groups = {candidate.group for candidate in candidates if candidate.boundary.is_significant}
    is_robust = any(candidate.boundary.is_robust for candidate in candidates)
    reasons = []
    if any(candidate.signal.name == "llc" and candidate.group == "loss" for candidate in candidates):
        reasons.append(
            "the LLC mirrors the loss near this boundary (E[L] hardly moves), so it is not an independent signal"
        )
    if len({candidate.group for candidate in candidates}) == 1:
        reasons.append(_only_these(candidates, signals))
    unclear = [candidate.signal.name for candidate in candidates if not candidate.boundary.is_significant]
    if unclear:
        reasons.append(
            f"the scatter of {' and '.join(unclear)} is correlated between saved steps and may cause the boundary"
        )
    if not is_robust:
        reasons.append("it disappears with shorter or longer smoothing")
    strength = max(candidate.boundary.strength for candidate in candidates)
    fatal = []
    if len(groups) < 2 and strength < STRONG:
        fatal.append(f"its strength is {strength:.1f} standard errors; a single signal needs {STRONG:g}")
    if time - 2 * stderr < span[0] or time + 2 * stderr > span[1]:
        fatal.append("its step is unknown: an end of the run lies within two standard errors")
    verdict: Verdict = "invalid" if fatal else "ok" if is_robust and len(groups) > 1 else "suspect"
    return RunBoundary(time, stderr, tuple(candidates), verdict, (*fatal, *reasons))


def _mean_time(candidates: Sequence[Candidate], groups: Sequence[str]) -> tuple[float, float]:
    """Return the weighted mean time and its error, from the candidate with the smallest error in each group."""
    most_certain = [
        min((each.boundary for each in candidates if each.group == group), key=lambda boundary: boundary.stderr)
        for group in groups
    ]
    weights = np.array([boundary.stderr**-2 for boundary in most_certain])
    times = np.array([boundary.time for boundary in most_certain])
    mean = float(weights @ times / weights.sum())
    birge_ratio = float(weights @ (times - mean) ** 2) / max(len(times) - 1, 1)  # squared
    return mean, math.sqrt(max(1.0, birge_ratio) / weights.sum())


def _only_these(candidates: Sequence[Candidate], signals: Sequence[Signal]) -> str:
    names = [candidate.signal.name for candidate in candidates]
    others = [signal.name for signal in signals if signal.name not in names]
    verb = "shows" if len(names) == 1 else "show"
    return f"only {' and '.join(names)} {verb} it, not {', '.join(others)}" if others else "there is no other signal"


def _reject_overlapping(boundaries: Sequence[RunBoundary]) -> list[RunBoundary]:
    """Mark the weaker of two boundaries as `invalid` if they lie within two standard errors of each other.

    A `suspect` boundary counts as weaker than an `ok` one, whatever its strength.
    """
    checked: list[RunBoundary] = []
    for boundary in boundaries:
        checked.append(boundary)
        usable = [index for index, each in enumerate(checked) if each.verdict != "invalid"]
        if boundary.verdict == "invalid" or len(usable) < 2:
            continue
        previous = checked[usable[-2]]
        if boundary.time - previous.time < 2 * math.hypot(boundary.stderr, previous.stderr):
            # If both are equally strong, the earlier boundary counts as weaker, because `min` returns the first minimum.
            index = min(usable[-2:], key=lambda index: (checked[index].verdict == "ok", checked[index].strength))
            weaker, other = checked[index], boundary if index == usable[-2] else previous
            reason = f"it is not significantly separate from the boundary at step {step_text(other.time)}"
            checked[index] = weaker._replace(verdict="invalid", reasons=(reason, *weaker.reasons))
    return checked


def step_text(time: float) -> str:
    """Return the step that belongs to a log time, as a string for printing."""
    return f"{math.expm1(time):,.0f}"
