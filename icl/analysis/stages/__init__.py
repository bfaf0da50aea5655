"""Stages of training: boundaries on which several signals agree, and the changes of every signal between them.

The method has three parts:

1. Every available signal (loss, scores, LLC; `icl.analysis.stages.signals`) is smoothed in log time u = ln(step + 1)
   (`icl.analysis.stages.smoothing`).
2. Turns and plateaus of a smoothed signal are candidates for boundaries. So are onsets, in language runs only.
   `icl.analysis.stages.boundaries` defines turns, plateaus and onsets.
3. Candidates on which signals agree are boundaries, each with a verdict (`icl.analysis.stages.agreement`).

For at most about one in twenty signals without stages, the method reports a boundary that is `ok` or `suspect`. A
signal whose steps are too sparse in log time would have more false boundaries, so it is left out
(`icl.analysis.stages.points`). A run has several signals, and each of them may cause a false boundary. Of 200 simulated
runs of three independent signals without stages, about one in ten had a `suspect` boundary, and none had an `ok` one.
The method finds the published stages of L2H4 within their errors (tests/analysis/test_stages.py).

The scatter of a curve may be correlated between saved steps, for example if the loss fluctuates slowly. We estimate
this correlation and include it in the errors (`icl.analysis.scatter`). `data/verdict-rates.csv` gives the share of
false and of true boundaries that are `ok`, for several correlations; `python -m tools.verdict_rates` makes this table.

Types of stages, as in Hoogland et al. (2024, table 2): in a stage of type A the loss falls and the LLC rises; in type B both fall. The
type is `?` if the loss or the LLC is unknown or changes by less than two standard errors, or if the loss rises. Changes are
measured on the smoothed curves. Their standard errors include the uncertainty of the curves and of the boundaries'
positions. Without boundaries there are no stages.

The rows of the table are listed below by `quantity`. The column `at` is the step to which a row belongs. The column `log_stderr` is the
standard error of u, which is about the relative error of the step.

- `measured`, `smooth`, `slope`: the points of each signal, its smoothed curve, and the slope of the curve per unit of
  u.
- `candidate`: a candidate for a boundary in one signal, with its `strength` in standard errors.
- `boundary`: a boundary of the run. `low` and `high` are two standard errors before and after it.
- `stage`: a stage from `start` to `end`. Only stages have an `end`. The last stage ends at the last step of the run.
- `change`: change of a signal over a stage.

Tables of language runs have a column `family` with the value `language`. Their loss is in nats per token.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from icl.analysis.run import Result, as_table, family_of, setting
from icl.analysis.stages.agreement import RunBoundary, agree, step_text
from icl.analysis.stages.points import Signal, mirrors_loss
from icl.analysis.stages.signals import SignalSettings, Verdict, read_signals
from icl.analysis.stages.smoothing import Curve, SmoothedSignal, fit
from icl.config.validation import require, require_number

_NUM_SAMPLES = 200
"""Number of curves that are sampled to estimate the error of a change."""
_MAX_CURVE_ROWS = 200
"""Largest number of rows of each smoothed curve in the table."""
_NO_LLC = "no type: the LLC is unknown"
TableRow = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Settings(SignalSettings):
    """Options of `icl analyse RUN --what stages`."""

    llc_settings: str | None = setting(
        None,
        "which estimates of llc.csv to use: a value of the column `settings` or `mode` (such as published); by default the settings with the most usable estimates",
    )
    worst_llc: Verdict = setting("suspect", "worst verdict with which an LLC estimate is still used")
    tolerance: float = setting(
        0.25, "largest distance, in ln(step + 1), at which boundaries in two signals count as the same boundary"
    )
    least_change: float = setting(0.01, "minimum change of a signal within a stage, as a share of the signal's range")
    shortest: float = setting(0.25, "minimum length of the smoothing kernel, in ln(step + 1)")
    longest: float = setting(1.0, "maximum length of the smoothing kernel, in ln(step + 1)")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("tolerance", "least_change", "shortest", "longest"):
            require_number(name, getattr(self, name), "positive")
        is_range = self.shortest <= self.longest
        require(is_range, f"`longest` must be at least `shortest` = {self.shortest}, got {self.longest}.")


class Change(NamedTuple):
    """Change of a signal over a stage."""

    value: float
    stderr: float

    @property
    def sign(self) -> int:
        """Sign of the change; 0 if it is within two standard errors of zero, or unknown."""
        return int(np.sign(self.value)) if abs(self.value) > 2 * self.stderr else 0


class Stage(NamedTuple):
    """The interval between two boundaries, or between a boundary and an end of the run."""

    start: float
    """Log time u of the start."""
    end: float
    """Log time u of the end."""
    type: str
    changes: Mapping[str, Change]
    """Change of each signal over the stage. The keys are the names of the signals."""
    verdict: Verdict
    reasons: tuple[str, ...]


def analyse(path: Path, settings: Settings) -> Result:
    """Find the stages of a run, from all signals that it has.

    Raises:
        RunError: If the run has no signal.
        ConfigError: If the run has no LLC estimates under `settings.llc_settings`.
    """
    signals, missing = read_signals(
        path,
        num_prompts=settings.num_prompts,
        llc_settings=settings.llc_settings,
        worst_llc=settings.worst_llc,
        longest=settings.longest,
    )
    fits = {signal.name: smooth_signal(signal, settings) for signal in signals}
    boundaries = agree(signals, fits, tolerance=settings.tolerance, least_change=settings.least_change)
    stages = divide(signals, fits, boundaries)
    rows = [row for signal in signals for row in _curve_rows(signal, fits[signal.name].stated)]
    rows += [row for boundary in boundaries for row in _boundary_rows(boundary)]
    rows += [row for number, stage in enumerate(stages, 1) for row in _stage_rows(number, stage)]
    if (
        family_of(path) == "language"
    ):  # the figure needs the family for the unit of the loss; tables of regression runs do not have this column
        rows = [row | {"family": "language"} for row in rows]
    lines = _boundary_lines(boundaries) + _stage_lines(signals, stages)
    lines += [f"Signal {signal.name}: {len(signal.points)} steps from {signal.source}." for signal in signals]
    return Result(as_table([], settings, whole_run=rows), lines + missing)


def smooth_signal(signal: Signal, settings: Settings) -> SmoothedSignal:
    """Smooth a signal. Only the LLC has standard errors that the smoothing uses (`Signal.errors`)."""
    points = signal.points
    times, values = np.log1p(points["step"].to_numpy(float)), points["value"].to_numpy(float)
    return fit(times, values, signal.errors, shortest=settings.shortest, longest=settings.longest)


def divide(
    signals: Sequence[Signal], fits: Mapping[str, SmoothedSignal], boundaries: Sequence[RunBoundary]
) -> list[Stage]:
    """Return the stages between the boundaries that are not `invalid`. Without such boundaries there are no stages."""
    usable = [boundary for boundary in boundaries if boundary.verdict != "invalid"]
    if not usable:
        return []
    first = min(float(smoothed.points.times[0]) for smoothed in fits.values())
    last = max(float(smoothed.points.times[-1]) for smoothed in fits.values())
    edges = [(first, 0.0, "ok"), *((each.time, each.stderr, each.verdict) for each in usable), (last, 0.0, "ok")]
    stages = []
    for (start, start_error, start_verdict), (end, end_error, end_verdict) in pairwise(edges):
        changes = {
            signal.name: _change(fits[signal.name].stated, (start, start_error), (end, end_error)) for signal in signals
        }
        is_mirrored = any(mirrors_loss(signal, start, end) for signal in signals)
        stage_type, reasons = _type(changes, is_mirrored)
        if "suspect" in (start_verdict, end_verdict):
            reasons = (*reasons, "one of its boundaries is suspect")
        stages.append(Stage(start, end, stage_type, changes, "suspect" if reasons else "ok", reasons))
    return stages


def _change(curve: Curve, start: tuple[float, float], end: tuple[float, float]) -> Change:
    """Return the change of a curve between two times; NaN if the curve does not cover both times.

    `start` and `end` each contain a time and its standard error.
    """
    times = curve.times
    slack = 0.1 * (end[0] - start[0])  # a tenth of the interval may lie outside the curve
    if start[0] < times[0] - slack or end[0] > times[-1] + slack:
        return Change(math.nan, math.nan)
    rng = np.random.default_rng(0)
    samples = curve.sample(_NUM_SAMPLES, rng)
    starts, ends = (time + error * rng.standard_normal(_NUM_SAMPLES) for time, error in (start, end))
    moves = [
        np.interp(stop, times, values) - np.interp(begin, times, values)
        for values, begin, stop in zip(samples, starts, ends, strict=True)
    ]
    value = np.interp(end[0], times, curve.values) - np.interp(start[0], times, curve.values)
    return Change(float(value), float(np.std(moves, ddof=1)))


def _type(changes: Mapping[str, Change], is_mirrored: bool) -> tuple[str, tuple[str, ...]]:
    """Return the type of a stage (A, B or ?), and reasons to doubt it."""
    unknown = Change(math.nan, math.nan)
    loss, llc = changes.get("loss", unknown), changes.get("llc", unknown)
    if math.isnan(loss.value):
        return "?", ("no type: the loss is unknown",)
    if math.isnan(llc.value):
        return "?", (_NO_LLC,)
    if loss.sign >= 0:
        return "?", ("no type: the loss does not fall by two standard errors",)
    if llc.sign == 0:
        return "?", ("no type: the LLC changes by less than two standard errors",)
    reason = "the LLC mirrors the loss (E[L] hardly moves), so the type adds nothing to what the loss shows"
    return ("A" if llc.sign > 0 else "B"), ((reason,) if is_mirrored else ())


def _curve_rows(signal: Signal, curve: Curve) -> list[TableRow]:
    rows: list[TableRow] = []
    for point in signal.points.to_dict("records"):
        labels: TableRow = {"quantity": "measured", "signal": signal.name, "at": float(point["step"])}
        numbers = {key: point[key] for key in ("step", "checkpoint_hash", "value", "stderr")}
        rows.append(labels | numbers | {"verdict": point["verdict"] if signal.name == "llc" else "ok"})
    slopes, covariance = curve.slopes()
    errors = np.sqrt(np.maximum(np.diag(covariance), 0))
    chosen = np.unique(np.linspace(0, len(curve.times) - 1, _MAX_CURVE_ROWS).round().astype(int))
    for quantity, values, stderr in (("smooth", curve.values, curve.stderr), ("slope", slopes, errors)):
        for index in chosen.tolist():
            labels = {"quantity": quantity, "signal": signal.name, "at": math.expm1(curve.times[index])}
            rows.append(labels | {"value": float(values[index]), "stderr": float(stderr[index])})
    return rows


def _boundary_rows(boundary: RunBoundary) -> list[TableRow]:
    names = ", ".join(candidate.signal.name for candidate in boundary.candidates)
    labels: TableRow = {"quantity": "boundary", "signal": names, "verdict": boundary.verdict}
    rows = [labels | {"reasons": "; ".join(boundary.reasons)} | _time_columns(boundary.time, boundary.stderr)]
    for signal, candidate, _ in boundary.candidates:
        labels = {
            "quantity": "candidate",
            "signal": signal.name,
            "kind": candidate.kind,
            "strength": candidate.strength,
        }
        rows.append(labels | {"verdict": boundary.verdict} | _time_columns(candidate.time, candidate.stderr))
    return rows


def _time_columns(time: float, stderr: float) -> TableRow:
    bounds = {"low": math.expm1(max(time - 2 * stderr, 0.0)), "high": math.expm1(time + 2 * stderr)}
    step = math.expm1(time)
    return {"at": step, "value": step, "stderr": math.exp(time) * stderr, "log_stderr": stderr, **bounds}


def _stage_rows(number: int, stage: Stage) -> list[TableRow]:
    labels: TableRow = {"stage": number, "type": stage.type, "verdict": stage.verdict}
    labels["reasons"] = "; ".join(stage.reasons)
    rows = [labels | {"quantity": "stage", "start": math.expm1(stage.start), "end": math.expm1(stage.end)}]
    return rows + [
        labels | {"quantity": "change", "signal": name, "value": change.value, "stderr": change.stderr}
        for name, change in stage.changes.items()
    ]


def _boundary_lines(boundaries: Sequence[RunBoundary]) -> list[str]:
    num_usable = sum(boundary.verdict != "invalid" for boundary in boundaries)
    plural = "boundary" if num_usable == 1 else "boundaries"
    lines = [
        f"{num_usable} {plural} between stages." if num_usable else "No boundaries were found, so there are no stages."
    ]
    for boundary in boundaries:
        error = _error_text(math.exp(boundary.time) * boundary.stderr)
        names = " and ".join(candidate.signal.name for candidate in boundary.candidates)
        reasons = f": {'; '.join(boundary.reasons)}" if boundary.reasons else ""
        lines.append(f"  step {step_text(boundary.time)} ± {error}  {boundary.verdict}, in {names}{reasons}")
    return lines


def _error_text(error: float) -> str:
    """Return an error in steps as a string for printing, with at least one significant digit."""
    return f"{error:,.0f}" if error >= 1 else f"{error:.1g}"


def _stage_lines(signals: Sequence[Signal], stages: Sequence[Stage]) -> list[str]:
    llc_steps = next((signal.points["step"] for signal in signals if signal.name == "llc"), None)
    partly = (
        ""
        if llc_steps is None
        else f" for part of the stage (usable steps: {llc_steps.min():,} to {llc_steps.max():,})"
    )
    lines = []
    for number, stage in enumerate(stages, 1):
        known = {name: change for name, change in stage.changes.items() if math.isfinite(change.value)}
        changes = ", ".join(f"{name} {change.value:+.3g} ± {change.stderr:.2g}" for name, change in known.items())
        reasons = [f"{reason}{partly}" if reason == _NO_LLC else reason for reason in stage.reasons]
        doubt = f"   {stage.verdict}: {'; '.join(reasons)}" if reasons else ""
        span = f"{step_text(stage.start)} to {step_text(stage.end)}"
        lines.append(f"Stage {number}, step {span}, type {stage.type}: {changes}{doubt}")
    return lines
