"""Which candidates of several signals are one boundary, where it lies, and how far it is to be trusted.

Candidates of several signals are one boundary if they lie within `tolerance` of the strongest in u = ln(step + 1), or within two
standard errors of the difference and twice `tolerance`. Its place is their mean by inverse variance, one candidate for each
group of signals, with an error widened by the Birge ratio (Birge 1932) where they scatter more than their errors say. Verdicts:

- `ok`: signals of two independent groups show it, and at least one also with a shorter and a longer kernel;
- `suspect`: one group shows it, by `STRONG` standard errors, or no signal under all kernels. Loss and ICL score are one
  group, and so are loss and an LLC that mirrors it around the boundary (`stage_signals.mirrors_loss`);
- `invalid`: one group shows it by fewer, or two standard errors reach an end of the curves, or a stronger boundary.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from icl.analysis.stages.boundaries import Boundary, find_boundaries
from icl.analysis.stages.signals import Signal, Verdict, mirrors_loss
from icl.analysis.stages.smoothing import Fit

STRONG = 5.0
"""Standard errors that one signal alone must have (ours; `boundaries.SIGNIFICANCE` suffices where two agree)."""
AROUND = 1.0
"""Units of log time around a boundary over which an LLC may mirror the loss."""


class Candidate(NamedTuple):
    """A boundary in one signal."""

    signal: Signal
    boundary: Boundary
    group: str
    """Of the signal; the loss's where an LLC mirrors it."""


class Agreed(NamedTuple):
    """A boundary of the run."""

    time: float
    stderr: float
    candidates: tuple[Candidate, ...]
    verdict: Verdict
    reasons: tuple[str, ...]

    @property
    def strength(self) -> float:
        """Of the signal that shows it best, in standard errors."""
        return max(one.boundary.strength for one in self.candidates)


def agree(signals: Sequence[Signal], fits: Mapping[str, Fit], *, tolerance: float, least_change: float) -> list[Agreed]:
    """The boundaries that the signals show, in order of time.

    Args:
        signals: All that there are.
        fits: Their curves, by name.
        tolerance: Signals agree within this, in ln(step + 1).
        least_change: As `boundaries.find_boundaries` takes it.
    """
    waiting = [
        Candidate(one, boundary, _group(one, boundary.time))
        for one in signals
        for boundary in find_boundaries(fits[one.name], least_change=least_change)
    ]
    groups: list[list[Candidate]] = []
    while waiting:
        first = max(waiting, key=lambda one: one.boundary.strength)
        together = [first]
        for signal in signals:
            near = [one for one in waiting if one.signal is signal and _agree(first, one, tolerance)]
            if near and signal is not first.signal:
                together.append(min(near, key=lambda one: abs(one.boundary.time - first.boundary.time)))
        groups.append(together)
        waiting = [one for one in waiting if not any(one is taken for taken in together)]
    ends = [float(one.points.times[place]) for one in fits.values() for place in (0, -1)]
    span = (min(ends, default=0.0), max(ends, default=0.0))
    return _told_apart(sorted((_judge(one, signals, span) for one in groups), key=lambda one: one.time))


def _group(signal: Signal, time: float) -> str:
    return "loss" if mirrors_loss(signal, time - AROUND, time + AROUND) else signal.group


def _agree(first: Candidate, second: Candidate, tolerance: float) -> bool:
    apart = abs(first.boundary.time - second.boundary.time)
    error = math.hypot(first.boundary.stderr, second.boundary.stderr)
    return apart <= max(tolerance, min(2 * error, 2 * tolerance))


def _judge(together: Sequence[Candidate], signals: Sequence[Signal], span: tuple[float, float]) -> Agreed:
    """The place and the verdict of candidates that are one boundary."""
    groups = sorted({one.group for one in together})
    most_certain = [
        min((one.boundary for one in together if one.group == group), key=lambda one: one.stderr) for group in groups
    ]
    weights = np.array([one.stderr**-2 for one in most_certain])
    places = np.array([one.time for one in most_certain])
    time = float(weights @ places / weights.sum())
    scatter = float(weights @ (places - time) ** 2) / max(len(places) - 1, 1)
    stderr = math.sqrt(max(1.0, scatter) / weights.sum())
    names = [one.signal.name for one in together]
    reasons = []
    if any(one.signal.name == "llc" and one.group == "loss" for one in together):
        reasons.append("the LLC mirrors the loss here (E[L] hardly moves), so it is no signal of its own")
    if len(groups) == 1:
        others = [one.name for one in signals if one.name not in names]
        reasons.append(
            f"only {and_words(names)} {_verb(names)} it, not {', '.join(others)}"
            if others
            else "there is no other signal"
        )
    if not any(one.boundary.is_robust for one in together):
        reasons.append("shorter or longer smoothing does not show it")
    strength = max(one.boundary.strength for one in together)
    against = []
    if len(groups) == 1 and strength < STRONG:
        against.append(
            f"it stands out by {strength:.1f} standard errors, and {STRONG:g} are needed in one signal alone"
        )
    if time - 2 * stderr < span[0] or time + 2 * stderr > span[1]:
        against.append("its place is not known: two standard errors reach an end of the run")
    if against:
        return Agreed(time, stderr, tuple(together), "invalid", (*against, *reasons))
    is_ok = len(groups) > 1 and any(one.boundary.is_robust for one in together)
    return Agreed(time, stderr, tuple(together), "ok" if is_ok else "suspect", tuple(reasons))


def _told_apart(boundaries: Sequence[Agreed]) -> list[Agreed]:
    """With the weaker of two neighbours `invalid` that lie within two standard errors of each other."""
    told: list[Agreed] = []
    for one in boundaries:
        before = next((other for other in reversed(told) if other.verdict != "invalid"), None)
        told.append(one)
        if before is None or one.verdict == "invalid":
            continue
        if one.time - before.time < 2 * math.hypot(one.stderr, before.stderr):
            weaker = min(before, one, key=lambda it: (it.verdict == "ok", it.strength))
            other = one if weaker is before else before
            reason = f"it cannot be told from the boundary at step {step_words(other.time)}"
            place = next(place for place, it in enumerate(told) if it is weaker)
            told[place] = weaker._replace(verdict="invalid", reasons=(reason, *weaker.reasons))
    return told


def step_words(time: float) -> str:
    """A log time as a step, for people."""
    return f"{math.expm1(time):,.0f}"


def and_words(names: Sequence[str]) -> str:
    """Names in a sentence."""
    return " and ".join(names)


def _verb(names: Sequence[str]) -> str:
    return "shows" if len(names) == 1 else "show"
