"""Findings about a whole run: lowest prior-task scores, switches between ridge and dMMSE, and transience.

This module applies the rules of `icl.analysis.behaviour.turning_points` to the numbers that `icl.analysis.behaviour`
measures. It returns the findings as rows of the table and as printed lines.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from icl import metrics
from icl.analysis.behaviour.turning_points import (
    Transience,
    TurningPoint,
    crossings,
    minimum,
    transience,
    unresolved_signs,
)
from icl.evaluation.sets import EvaluationSet
from icl.runs.measure import Entry

Row = dict[str, Any]
_HEADLINES = ("loss", "bayes_excess", "delta_ridge", "delta_dmmse", "cosine")


def findings(entries: Sequence[Entry], sets: Sequence[EvaluationSet]) -> list[Row]:
    """Return one row for every finding about the whole run.

    Args:
        entries: Results at all saved steps, with arrays that contain the loss and the scores of every single prompt.
        sets: The prompts `pretrain` and `true`, with their baselines.
    """
    steps = torch.tensor([entry.step for entry in entries])
    pretrain, true = sets
    rows = []
    for name in ("zero", "task_mean"):
        if name in pretrain.baselines:
            lowest = minimum(steps, _samples(entries, f"pretrain/prior_{name}"))
            rows.append(_point_row(f"prior_{name}_minimum_step", "pretrain", lowest))
    for prompt_set in sets:
        if "dmmse" in prompt_set.baselines:
            samples = _samples(entries, f"{prompt_set.name}/delta_difference")
            rows += _crossing_rows(steps, samples, prompt_set.name)
    losses = {
        name: metrics.squared_error(true.baselines[name], true.prompts.ys).mean(-1).double()
        for name in ("zero", "ridge")
    }
    outcome = transience(steps, _samples(entries, "true/loss"), **losses)
    return [*rows, *_transience_rows(outcome, is_gaussian="dmmse" not in true.baselines)]


def summary(entries: Sequence[Entry], rows: Sequence[Row]) -> list[str]:
    """Return the printed lines: the findings with their verdicts, then the numbers of the last step."""
    by_quantity: dict[str, list[Row]] = {}
    for row in rows:
        by_quantity.setdefault(row["quantity"], []).append(row)
    lines = [_transience_line(*(by_quantity[name][0] for name in ("critical_step", "rise", "dip")))]
    for row in by_quantity.get("crossing_step", []):
        step = "" if math.isnan(row["value"]) else f" at {_step_text(row)}"
        lines.append(
            f"Change of the closest Bayes predictor on {row['distribution']}: {row['finding']}{step}; {_verdict(row)}."
        )
    for name in ("prior_zero", "prior_task_mean"):
        minima = by_quantity.get(f"{name}_minimum_step", [])
        lines += [f"Lowest {name} at {_step_text(row)}; {_verdict(row)}." for row in minima]
    lines.append(f"At step {entries[-1].step:,}, the last of {len(entries)} saved steps:")
    return [*lines, *_last_lines(entries[-1])]


def _crossing_rows(steps: Int64[Tensor, " S"], samples: Float[Tensor, "S B"], name: str) -> list[Row]:
    points = crossings(steps, samples)
    if points:
        directions = {True: "to dMMSE", False: "to ridge"}
        return [_point_row("crossing_step", name, point, finding=directions[up]) for point, up in points]
    reasons = unresolved_signs(steps, samples)
    point = TurningPoint(math.nan, math.nan, math.nan, math.nan, "suspect" if reasons else "ok", reasons)
    return [_point_row("crossing_step", name, point, finding="unresolved" if reasons else "none")]


def _transience_rows(outcome: Transience, *, is_gaussian: bool) -> list[Row]:
    verdict, reasons = outcome.verdict, outcome.reasons
    if is_gaussian and outcome.finding not in ("none", "unresolved"):
        verdict = "suspect"
        reasons = (
            *reasons,
            "with M = inf, ridge is the optimal predictor, so a rise means that the model became worse",
        )
    judgement = {"finding": outcome.finding, "verdict": verdict, "reasons": "; ".join(reasons)}
    rows = [_point_row("critical_step", "true", outcome.critical, finding=outcome.finding)]
    for name, (value, stderr) in (("rise", outcome.rise), ("dip", outcome.dip)):
        rows.append(_finding_row(name, "true", value.item(), stderr.item()) | judgement)
    return rows


def _point_row(quantity: str, name: str, point: TurningPoint, *, finding: str = "") -> Row:
    bounds = {"lower": point.lower, "upper": point.upper, "finding": finding}
    judgement = {"verdict": point.verdict, "reasons": "; ".join(point.reasons)}
    return _finding_row(quantity, name, point.step, point.stderr) | bounds | judgement


def _finding_row(quantity: str, name: str, value: float, stderr: float) -> Row:
    labels = {"predictor": "model", "distribution": name, "quantity": quantity, "position": "mean"}
    return labels | {"value": value, "stderr": stderr}


def _samples(entries: Sequence[Entry], name: str) -> Float[Tensor, "S B"]:
    return torch.from_numpy(np.stack([entry.arrays[name] for entry in entries])).double()


def _transience_line(critical: Row, rise: Row, dip: Row) -> str:
    line = f"Transient ridge: {rise['finding']}; {_verdict(rise)}."
    if math.isnan(rise["value"]):
        return line
    dip_text = (
        f"{dip['value']:.0%} ± {dip['stderr']:.1%} of the way from the loss of predicting zero to the loss of ridge"
    )
    end = f"at the end it is {rise['value']:.3g} ± {rise['stderr']:.2g} higher"
    end = end if rise["value"] > 0 else "this is the last saved step"
    return f"{line} The loss on new tasks is lowest at {_step_text(critical)}, {dip_text}; {end}."


def _last_lines(entry: Entry) -> Iterator[str]:
    scores = [row["position"] for row in entry.rows if row["quantity"] == "icl_score"]
    widest = max(scores, key=_num_positions, default="")
    for row in entry.rows:
        if row["position"] == ("mean" if row["quantity"] in _HEADLINES else widest):
            label = row["quantity"] + (f" {widest}" if row["quantity"] == "icl_score" else "")
            yield f"  {row['distribution']:9s} {label:15s} {row['value']:>10.4g} ± {row['stderr']:.2g}"


def _num_positions(pair: str) -> int:
    """Return the distance between two positions, which are given as a string such as `1:16`."""
    first, second = map(int, pair.split(":"))
    return second - first


def _step_text(row: Row) -> str:
    error = "" if math.isnan(row["stderr"]) else f" ± {row['stderr']:,.0f}"
    return f"step {row['value']:,.0f}{error} (between {row['lower']:,.0f} and {row['upper']:,.0f})"


def _verdict(row: Row) -> str:
    return f"{row['verdict']}: {row['reasons']}" if row["reasons"] else row["verdict"]
