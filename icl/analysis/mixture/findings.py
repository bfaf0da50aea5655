"""Findings about single runs and about ladders: transitions between dMMSE and ridge, their growth with M, and the theory curve.

A ladder is a set of runs whose task settings differ only in M.

We compute a score for every prompt (`icl.analysis.mixture.fits`). A transition is a step at which the mean score
crosses zero (`icl.analysis.behaviour.turning_points`). For `fixed`, the mean score is positive if and only if the best
weight exceeds 1/2, which means that dMMSE is closer to the model than ridge is. For `bayes`, the mean score is positive
if prior odds slightly above 1 bring the mixture closer to the model than odds of 1. A transition is `suspect` if no
mixture explains the model at one of the two saved steps around it. It is also `suspect` if the best log odds do not
change sign between these two steps.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from icl.analysis.behaviour.turning_points import crossings, unresolved_signs
from icl.analysis.mixture.judging import verdict
from icl.analysis.mixture.theory import PARAMETERS, Curve, CurvePoints, fit_curve, table_bits
from icl.analysis.seeds import MIN_FOR_INTERVAL, over_seeds
from icl.config import SeedsConfig, TaskConfig
from icl.runs.measure import Entry

Row = dict[str, Any]
MIXTURES = {"fixed": "weight", "bayes": "log_odds"}
"""The two mixtures. The values are the names of their parameters in the column `quantity`."""
_SETS = ("pretrain", "true")
_MIN_TRANSITIONS = 3
_ENOUGH_TRANSITIONS = 5


class RunFits(NamedTuple):
    """The measurements of one run."""

    name: str
    task: TaskConfig
    entries: Sequence[Entry]
    references: Sequence[Row]
    """Rows that do not depend on the model, such as `loss_advantage` and `separation`."""
    seeds: SeedsConfig = SeedsConfig()

    def number(self, quantity: str, distribution: str) -> float:
        """Return the value of one quantity on one distribution, from `references`."""
        return next(
            float(row["value"])
            for row in self.references
            if (row["quantity"], row["distribution"]) == (quantity, distribution)
        )


def step_row(entry: Entry, quantity: str, distribution: str, mixture: str) -> Row:
    """Return the row of one quantity at a saved step, for the single mixture that is fitted to all positions."""
    wanted = (quantity, distribution, mixture, "mean")
    return next(
        row for row in entry.rows if (row["quantity"], row["distribution"], row["mixture"], row["position"]) == wanted
    )


def transition_rows(run: RunFits) -> Iterator[Row]:
    """Yield a row for every transition of a run, and a row without a step for each mixture without a transition."""
    steps = torch.tensor([entry.step for entry in run.entries])
    for distribution in _SETS:
        for mixture, parameter in MIXTURES.items():
            samples = torch.from_numpy(np.stack([entry.arrays[f"{distribution}/{mixture}"] for entry in run.entries]))
            labels = {
                "quantity": "transition_step",
                "mixture": mixture,
                "distribution": distribution,
                "position": "mean",
            }
            bad = {
                float(entry.step)
                for entry in run.entries
                if step_row(entry, parameter, distribution, mixture)["verdict"] == "invalid"
            }
            signs = {float(entry.step): _side(entry, distribution, mixture) for entry in run.entries}
            found = crossings(steps, samples)
            for point, is_upward in found:
                reasons = list(point.reasons)
                if bad & {point.lower, point.upper}:
                    reasons.append("no mixture explains the model at a neighbouring saved step")
                if signs[point.upper] != is_upward or signs[point.lower] == is_upward:
                    reasons.append(
                        f"between these saved steps, the best {parameter.replace('_', ' ')} did not move to the side that the finding names"
                    )
                bounds = {"lower": point.lower, "upper": point.upper}
                finding = {"finding": "to dMMSE" if is_upward else "to ridge"}
                yield labels | {"value": point.step, "stderr": point.stderr} | bounds | finding | verdict(reasons)
            if not found:
                unclear = list(unresolved_signs(steps, samples))
                side = "dMMSE" if samples[-1].mean() > 0 else "ridge"
                finding = {"finding": "unresolved" if unclear else f"none (always {side})"}
                if float(run.entries[-1].step) in bad:
                    unclear.append("no mixture explains the model at the last saved step")
                yield labels | {"value": math.nan, "stderr": math.nan} | finding | verdict(unclear)


def _side(entry: Entry, distribution: str, mixture: str) -> bool:
    """Return whether the best parameter of a mixture favours dMMSE."""
    middle = 0.5 if mixture == "fixed" else 0.0
    return bool(step_row(entry, MIXTURES[mixture], distribution, mixture)["value"] > middle)


def ladder_rows(runs: Sequence[RunFits]) -> list[Row]:
    """Return the rows about all runs together: the growth of the transition step with M, and the theory curve."""
    rows: list[Row] = []
    for distribution in _SETS:
        if len(runs) > 1:
            rows += [row for mixture in MIXTURES for row in _growth_rows(runs, distribution, mixture)]
        rows += _curve_rows(runs, distribution)
    return rows


def last_transition(run: RunFits, distribution: str, mixture: str) -> Row | None:
    """Return the last transition to dMMSE of a run, or None if the run has no such transition."""
    rows = [
        row
        for row in transition_rows(run)
        if (row["distribution"], row["mixture"], row["finding"]) == (distribution, mixture, "to dMMSE")
    ]
    return max(rows, key=lambda row: row["value"], default=None)


def _growth_rows(runs: Sequence[RunFits], distribution: str, mixture: str) -> Iterator[Row]:
    """Yield the growth exponent of the transition step with M.

    If at least two seeds have an exponent, yield a row for each seed, then the mean over seeds.
    Otherwise yield one row for all runs.
    """
    ladders: dict[SeedsConfig, list[RunFits]] = {}
    for run in runs:
        ladders.setdefault(run.seeds, []).append(run)
    rows = [_growth_row(own, distribution, mixture) for own in ladders.values()]
    known = [row for row in rows if math.isfinite(row["value"])]
    if len(known) < 2:
        yield _growth_row(runs, distribution, mixture)
        return
    for number, row in enumerate(rows):
        yield row | {"run": f"seed {number + 1} of {len(rows)}"}
    exponents = over_seeds(row["value"] for row in known)
    reasons = []
    if len(known) < MIN_FOR_INTERVAL:
        reasons.append(f"{len(known)} seeds give no interval; at least {MIN_FOR_INTERVAL} are needed")
    if len(known) < len(rows):
        reasons.append(f"only {len(known)} of {len(rows)} seeds have an exponent")
    if num_suspect := sum(row["verdict"] != "ok" for row in known):
        reasons.append(f"{num_suspect} of the seeds' exponents are suspect")
    spread = {"num_seeds": len(known), "lower": exponents.low, "upper": exponents.high}
    yield rows[0] | {"value": exponents.mean, "stderr": exponents.stderr} | spread | verdict(reasons)


def _growth_row(runs: Sequence[RunFits], distribution: str, mixture: str) -> Row:
    """Return the slope of ln(t + 1) against ln(M) over the given runs, with its least-squares standard error."""
    row = {
        "run": "all",
        "quantity": "growth_exponent",
        "mixture": mixture,
        "distribution": distribution,
        "position": "mean",
    }
    found = [(run.task.num_tasks, last_transition(run, distribution, mixture)) for run in runs]
    points = [(math.log(m), math.log1p(each["value"])) for m, each in found if each is not None]
    count = len({x for x, _ in points})
    if count < _MIN_TRANSITIONS:
        reason = f"only {count} value(s) of M have a transition to dMMSE; the exponent needs {_MIN_TRANSITIONS}"
        return row | {"value": math.nan, "stderr": math.nan, "verdict": "invalid", "reasons": reason}
    x, y = np.array(points).T
    centred = x - x.mean()
    slope = float(centred @ y / (centred @ centred))
    errors = y - y.mean() - slope * centred
    stderr = float(np.sqrt(errors @ errors / (len(x) - 2) / (centred @ centred)))
    reasons = [] if count >= _ENOUGH_TRANSITIONS else [f"there are only {count} values of M with a transition"]
    num_suspect = sum(each is not None and each["verdict"] != "ok" for _, each in found)
    if num_suspect:
        reasons.append(f"{num_suspect} of {len(points)} transitions are suspect")
    return row | {"value": slope, "stderr": stderr} | verdict(reasons)


def curve_points(runs: Sequence[RunFits], distribution: str) -> tuple[CurvePoints, list[bool]]:
    """Return the fixed weights at all saved steps of all runs, and for each weight whether the theory curve is fitted to it."""
    columns, is_inside = [], []
    for number, run in enumerate(runs):
        advantage = run.number("loss_advantage", "pretrain")
        bits = table_bits(run.task.num_tasks, run.task.task_size)
        separation = run.number("separation", distribution)
        for entry in run.entries:
            row = step_row(entry, "weight", distribution, "fixed")
            columns.append((entry.step, advantage, bits, row["value"], separation, number))
            is_inside.append(row["verdict"] != "invalid" and math.isfinite(row["value"]))
    return CurvePoints(*np.array(columns, dtype=float).T), is_inside


def _curve_rows(runs: Sequence[RunFits], distribution: str) -> Iterator[Row]:
    points, is_inside = curve_points(runs, distribution)
    curve = fit_curve(CurvePoints(*(column[np.array(is_inside)] for column in points)))
    labels = {"mixture": "fixed", "distribution": distribution, "position": "mean"}
    judgement = {"verdict": curve.verdict, "reasons": "; ".join(curve.reasons)}
    for name, value, stderr in zip(PARAMETERS, curve.values, curve.stderr, strict=True):
        yield {"run": "all", "quantity": f"curve_{name}"} | labels | {"value": value, "stderr": stderr} | judgement
    yield {"run": "all", "quantity": "curve_r2"} | labels | {"value": curve.r2} | judgement
    if math.isfinite(curve.values[0]):
        yield from _curve_step_rows(runs, curve, points, is_inside, labels | judgement)


def _curve_step_rows(
    runs: Sequence[RunFits], curve: Curve, points: CurvePoints, is_inside: Sequence[bool], labels: Row
) -> Iterator[Row]:
    fitted = iter(zip(curve.weight(points).tolist(), points.weights.tolist(), is_inside, strict=True))
    for number, run in enumerate(runs):
        own = labels | {"run": run.name, "num_tasks": run.task.num_tasks}
        first = int(np.argmax(points.runs == number))
        crossing = curve.transition(float(points.advantage[first]), float(points.bits[first]))
        yield own | {"quantity": "curve_step", "value": crossing}
        for entry in run.entries:
            value, weight, is_fitted = next(fitted)
            place = own | {"step": entry.step, "checkpoint_hash": entry.checkpoint_hash}
            yield place | {"quantity": "curve_weight", "value": value}
            if is_fitted:
                yield place | {"quantity": "curve_residual", "value": weight - value}


def summary(runs: Sequence[RunFits], rows: Sequence[Row]) -> list[str]:
    """Return the printed lines: growth and theory curve, transitions, and the numbers of the last step of each run."""
    lines = [_ladder_line(row) for row in rows if row["quantity"] in ("growth_exponent", "curve_r2")]
    for row in rows:
        if row["quantity"] == "transition_step":
            step = "" if math.isnan(row["value"]) else f" at step {row['value']:,.0f} ± {row['stderr']:,.0f}"
            lines.append(f"{row['run']}: transition of {_label(row)}: {row['finding']}{step}; {_verdict(row)}.")
    for run in runs:
        last = run.entries[-1]
        lines.append(
            f"{run.name} (M = {run.task.num_tasks}) at step {last.step:,}, the last of {len(run.entries)} saved steps:"
        )
        for distribution in _SETS:
            for mixture, parameter in MIXTURES.items():
                row, share = (step_row(last, name, distribution, mixture) for name in (parameter, "residual_share"))
                lines.append(
                    f"  {distribution:9s} {parameter:9s} {row['value']:>8.3f} ± {row['stderr']:<8.2g} residual share "
                    f"{share['value']:.3f}   {_verdict(row)}"
                )
    return lines


def _ladder_line(row: Row) -> str:
    if row["quantity"] == "growth_exponent":
        who = "" if row["run"] == "all" else f" in {row['run']}"
        seeds = f" over {row['num_seeds']} seeds" if "num_seeds" in row else ""
        return (
            f"Growth of the transition step of {_label(row)} with M{who}: t + 1 ~ M^({row['value']:.2f} ± {row['stderr']:.2f})"
            f"{seeds}; {_verdict(row)}."
        )
    return f"Theory curve of the weight on {row['distribution']}: R² {row['value']:.3f}; {_verdict(row)}."


def _label(row: Row) -> str:
    return f"the {MIXTURES[row['mixture']].replace('_', ' ')} on {row['distribution']}"


def _verdict(row: Row) -> str:
    return f"{row['verdict']}: {row['reasons']}" if row["reasons"] else row["verdict"]
