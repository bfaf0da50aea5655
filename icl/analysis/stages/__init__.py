"""Stages of training: boundaries on which several signals agree, each with an error and a verdict, and what happens between them.

Every signal (`icl.analysis.stages.signals`: loss, scores, LLC, whatever there is) is smoothed in u = ln(step + 1)
(`icl.analysis.stages.smoothing`); its turns and plateaus are candidates (`icl.analysis.stages.boundaries` has the rule); those on which signals
agree are boundaries, with a verdict (`icl.analysis.stages.agreement`). A curve without stages shows one that is not `invalid` in at
most one case of twenty, and the published stages of L2H4 are found within their errors (tests/analysis/test_stages.py). That
holds for scatter that is independent from one saved step to the next. Scatter that is not, such as a loss that wanders for several
saved steps, cannot be told from stages by a curve alone: with a correlation of 0.8, and 3 % of the range, two signals each, 12 of 20
straight lines showed a false `ok`. So look at what a boundary separates, and raise `least_change` above what a run wanders.

Types, as Hoogland et al. (2024, table 2): A, the loss falls and the LLC rises; B, both fall; `?` where either changes by less than
two standard errors, is not known, or the loss rises. Changes are of the smoothed curves, with the error of the curves
and of the boundaries. No boundaries, no stages.

Rows of the table, by `quantity`; `at` is a step, and `log_stderr` an error in u, which is relative in the step:
`measured`, `smooth` and `slope` (per unit of u) of each signal; `candidate`, in one signal, with its `strength` in standard errors;
`boundary`, `low` and `high` two standard errors away; `stage`, from `start` to `end`; `change`, of a signal over a stage. Only stages have
an `end`, and the last one's is the run's last step.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from icl.analysis.run import Result, as_table
from icl.analysis.stages.agreement import Agreed, agree, and_words, step_words
from icl.analysis.stages.signals import Signal, SignalSettings, Verdict, mirrors_loss, read_signals
from icl.analysis.stages.smoothing import Fit, fit
from icl.validation import ConfigError

_NUM_SAMPLES = 200
_MOST_SMOOTH = 200
"""Rows of each smoothed curve in the table."""
_NO_LLC = "no type: the LLC is not known"
TableRow = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Settings(SignalSettings):
    """What `icl analyse RUN --what stages` can be told."""

    llc_settings: str | None = field(
        default=None,
        metadata={"help": "which estimates of llc.csv, by its column settings or mode; else the most numerous"},
    )
    worst_llc: Verdict = field(default="suspect", metadata={"help": "the worst verdict of an LLC that is used"})
    tolerance: float = field(default=0.25, metadata={"help": "signals agree within this, in ln(step + 1)"})
    least_change: float = field(
        default=0.01, metadata={"help": "least move of a stage, as a share of the signal's range"}
    )
    shortest: float = field(default=0.25, metadata={"help": "least length of the smoothing kernel in ln(step + 1)"})
    longest: float = field(default=1.0, metadata={"help": "greatest length of it"})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("tolerance", "least_change", "shortest"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"`{name}` must be positive, got {getattr(self, name)}.")
        if not self.shortest <= self.longest < math.inf:
            raise ConfigError(f"`longest` must be at least `shortest` = {self.shortest}, got {self.longest}.")


class Change(NamedTuple):
    """What a signal does over a stage."""

    value: float
    stderr: float

    @property
    def sign(self) -> int:
        """0 where it is within two standard errors of nothing, or not known."""
        return int(np.sign(self.value)) if abs(self.value) > 2 * self.stderr else 0


class Stage(NamedTuple):
    """A stretch between two boundaries, or a boundary and an end of the run."""

    start: float
    """u, as `end`."""
    end: float
    type: str
    changes: Mapping[str, Change]
    """By signal."""
    verdict: Verdict
    reasons: tuple[str, ...]


def analyse(path: Path, settings: Settings) -> Result:
    """The stages of a run, from whatever signals it has.

    Raises:
        RunError: If there are none.
        ConfigError: If there are no LLC estimates of the settings asked for.
    """
    signals, missing = read_signals(
        path, num_prompts=settings.num_prompts, llc_settings=settings.llc_settings, worst_llc=settings.worst_llc
    )
    fits = {one.name: smooth_signal(one, settings) for one in signals}
    boundaries = agree(signals, fits, tolerance=settings.tolerance, least_change=settings.least_change)
    stages = divide(signals, fits, boundaries)
    rows = [row for one in signals for row in _curve_rows(one, fits[one.name])]
    rows += [row for one in boundaries for row in _boundary_rows(one)]
    rows += [row for number, one in enumerate(stages, 1) for row in _stage_rows(number, one)]
    return Result(as_table([], settings, whole_run=rows), _summary(signals, missing, boundaries, stages))


def smooth_signal(signal: Signal, settings: Settings) -> Fit:
    """The signal's curve; the standard errors of an LLC are of each point, those of the others of all together."""
    points = signal.points
    errors = points["stderr"].fillna(0.0).to_numpy(float) if signal.name == "llc" else np.zeros(len(points))
    times, values = np.log1p(points["step"].to_numpy(float)), points["value"].to_numpy(float)
    return fit(times, values, errors, shortest=settings.shortest, longest=settings.longest)


def divide(signals: Sequence[Signal], fits: Mapping[str, Fit], boundaries: Sequence[Agreed]) -> list[Stage]:
    """The stages between the boundaries that are not `invalid`; none if there is none."""
    usable = [one for one in boundaries if one.verdict != "invalid"]
    if not usable:
        return []
    first = min(float(one.points.times[0]) for one in fits.values())
    last = max(float(one.points.times[-1]) for one in fits.values())
    edges = [(first, 0.0), *((one.time, one.stderr) for one in usable), (last, 0.0)]
    verdicts = ["ok", *(one.verdict for one in usable), "ok"]
    stages = []
    for place, (start, end) in enumerate(pairwise(edges)):
        changes = {one.name: _change(fits[one.name], start, end) for one in signals}
        mirrored = any(mirrors_loss(one, start[0], end[0]) for one in signals)
        kind, reasons = _type(changes, mirrored)
        if "suspect" in verdicts[place : place + 2]:
            reasons = (*reasons, "a boundary of it is suspect")
        stages.append(Stage(start[0], end[0], kind, changes, "suspect" if reasons else "ok", reasons))
    return stages


def _change(one: Fit, start: tuple[float, float], end: tuple[float, float]) -> Change:
    """How far the curve moves between two places, each with an error; NaN where it does not reach."""
    times = one.middle.times
    slack = 0.1 * (end[0] - start[0])
    if start[0] < times[0] - slack or end[0] > times[-1] + slack:
        return Change(math.nan, math.nan)
    rng = np.random.default_rng(0)
    curves = one.middle.sample(_NUM_SAMPLES, rng)
    ends = [place + error * rng.standard_normal(_NUM_SAMPLES) for place, error in (start, end)]
    moves = [
        np.interp(last, times, curve) - np.interp(first, times, curve)
        for curve, first, last in zip(curves, *ends, strict=True)
    ]
    value = np.interp(end[0], times, one.middle.values) - np.interp(start[0], times, one.middle.values)
    return Change(float(value), float(np.std(moves, ddof=1)))


def _type(changes: Mapping[str, Change], mirrored: bool) -> tuple[str, tuple[str, ...]]:
    """A, B or ?, and what speaks against it."""
    nothing = Change(math.nan, math.nan)
    loss, llc = changes.get("loss", nothing), changes.get("llc", nothing)
    if math.isnan(loss.value):
        return "?", ("no type: the loss is not known",)
    if math.isnan(llc.value):
        return "?", (_NO_LLC,)
    if loss.sign >= 0:
        return "?", ("no type: the loss does not fall by two standard errors",)
    if llc.sign == 0:
        return "?", ("no type: the LLC changes by less than two standard errors",)
    doubt = ("the LLC mirrors the loss (E[L] hardly moves), so the type says nothing of its own",) if mirrored else ()
    return ("A" if llc.sign > 0 else "B"), doubt


def _curve_rows(signal: Signal, one: Fit) -> list[TableRow]:
    rows: list[TableRow] = []
    for point in signal.points.to_dict("records"):
        about: TableRow = {"quantity": "measured", "signal": signal.name, "at": float(point["step"])}
        own = {key: point[key] for key in ("step", "checkpoint_hash", "value", "stderr")}
        rows.append(about | own | {"verdict": point["verdict"] if signal.name == "llc" else "ok"})
    curve = one.middle
    slopes, covariance = curve.slopes()
    errors = np.sqrt(np.maximum(np.diag(covariance), 0))
    chosen = np.unique(np.linspace(0, len(curve.times) - 1, _MOST_SMOOTH).round().astype(int))
    for quantity, values, stderr in (("smooth", curve.values, curve.stderr), ("slope", slopes, errors)):
        for place in chosen.tolist():
            where: TableRow = {"quantity": quantity, "signal": signal.name, "at": math.expm1(curve.times[place])}
            rows.append(where | {"value": float(values[place]), "stderr": float(stderr[place])})
    return rows


def _boundary_rows(one: Agreed) -> list[TableRow]:
    names = ", ".join(candidate.signal.name for candidate in one.candidates)
    about: TableRow = {
        "quantity": "boundary",
        "signal": names,
        "verdict": one.verdict,
        "reasons": "; ".join(one.reasons),
    }
    rows = [about | _place(one.time, one.stderr)]
    for candidate in one.candidates:
        found = candidate.boundary
        about = {
            "quantity": "candidate",
            "signal": candidate.signal.name,
            "kind": found.kind,
            "strength": found.strength,
        }
        rows.append(about | {"verdict": one.verdict} | _place(found.time, found.stderr))
    return rows


def _place(time: float, stderr: float) -> TableRow:
    edges = {"low": math.expm1(max(time - 2 * stderr, 0.0)), "high": math.expm1(time + 2 * stderr)}
    step = math.expm1(time)
    return {"at": step, "value": step, "stderr": math.exp(time) * stderr, "log_stderr": stderr, **edges}


def _stage_rows(number: int, one: Stage) -> list[TableRow]:
    about: TableRow = {"stage": number, "type": one.type, "verdict": one.verdict, "reasons": "; ".join(one.reasons)}
    ends = {"start": math.expm1(one.start), "end": math.expm1(one.end)}
    rows = [about | {"quantity": "stage"} | ends]
    return rows + [
        about | {"quantity": "change", "signal": name, "value": change.value, "stderr": change.stderr}
        for name, change in one.changes.items()
    ]


def _summary(
    signals: Sequence[Signal], missing: Sequence[str], boundaries: Sequence[Agreed], stages: Sequence[Stage]
) -> list[str]:
    usable = [one for one in boundaries if one.verdict != "invalid"]
    plural = "boundary" if len(usable) == 1 else "boundaries"
    lines = [f"{len(usable)} {plural} between stages." if usable else "No boundaries, so no stages, were found."]
    for one in boundaries:
        why = f": {'; '.join(one.reasons)}" if one.reasons else ""
        names = and_words([candidate.signal.name for candidate in one.candidates])
        lines.append(
            f"  step {step_words(one.time)} ± {_error_words(math.exp(one.time) * one.stderr)}  {one.verdict}, in {names}{why}"
        )
    spans = [f"{one.points['step'].min():,} to {one.points['step'].max():,}" for one in signals if one.name == "llc"]
    usable_llc = f" over all of it (usable estimates lie at steps {spans[0]})" if spans else ""
    for number, stage in enumerate(stages, 1):
        known = {name: one for name, one in stage.changes.items() if math.isfinite(one.value)}
        told = ", ".join(f"{name} {one.value:+.3g} ± {one.stderr:.2g}" for name, one in known.items())
        reasons = [f"{reason}{usable_llc}" if reason == _NO_LLC else reason for reason in stage.reasons]
        doubt = f"   {stage.verdict}: {'; '.join(reasons)}" if reasons else ""
        lines.append(
            f"Stage {number}, {step_words(stage.start)} to {step_words(stage.end)}, type {stage.type}: {told}{doubt}"
        )
    lines += [f"Signal {one.name}: {len(one.points)} steps of {one.source}." for one in signals]
    return lines + list(missing)


def _error_words(error: float) -> str:
    """An error in steps, of at least one digit."""
    return f"{error:,.0f}" if error >= 1 else f"{error:.1g}"
