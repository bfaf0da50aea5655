"""What a run's behaviour shows as a whole: lowest scores, crossings from ridge to dMMSE, transience; as rows and in words.

The rules are those of `icl.analysis.behaviour.turning_points`; this applies them to the numbers of `icl.analysis.behaviour`.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from icl import metrics
from icl.analysis.behaviour.turning_points import Place, Transience, crossings, minimum, transience, unresolved_signs
from icl.evaluation import EvaluationSet
from icl.measure import Entry

Row = dict[str, Any]
_HEADLINES = ("loss", "delta_ridge", "delta_dmmse", "cosine")


def findings(entries: Sequence[Entry], sets: Sequence[EvaluationSet]) -> list[Row]:
    """What the whole run shows, a row each.

    Args:
        entries: Of every saved step, with its prompts' own numbers.
        sets: The prompts, `pretrain` and `true`, and their baselines.
    """
    steps = torch.tensor([entry.step for entry in entries])
    pretrain, true = sets
    rows = []
    for name in ("zero", "task_mean"):
        if name in pretrain.baselines:
            place = minimum(steps, _samples(entries, f"pretrain/prior_{name}"))
            rows.append(_place_row(f"prior_{name}_minimum_step", "pretrain", place))
    for one in sets:
        if "dmmse" in one.baselines:
            rows += _crossing_rows(steps, _samples(entries, f"{one.name}/delta_difference"), one.name)
    losses = {
        name: metrics.squared_error(true.baselines[name], true.prompts.ys).mean(-1).double()
        for name in ("zero", "ridge")
    }
    found = transience(steps, _samples(entries, "true/loss"), **losses)
    return [*rows, *_transience_rows(found, is_gaussian="dmmse" not in true.baselines)]


def summary(entries: Sequence[Entry], found: Sequence[Row]) -> list[str]:
    """The findings in words, verdicts first, then the last step."""
    critical, rise, dip = (_of(found, name)[0] for name in ("critical_step", "rise", "dip"))
    lines = [_transience_line(critical, rise, dip)]
    for row in _of(found, "crossing_step"):
        where = "" if math.isnan(row["value"]) else f" at {_place_words(row)}"
        lines.append(
            f"Nearest Bayes predictor on {row['distribution']}: crossing {row['finding']}{where}; {_verdict(row)}."
        )
    for name in ("prior_zero", "prior_task_mean"):
        places = _of(found, f"{name}_minimum_step")
        lines += [f"Lowest {name} at {_place_words(row)}; {_verdict(row)}." for row in places]
    lines.append(f"Step {entries[-1].step:,}, the last of {len(entries)}:")
    return [*lines, *_last_lines(entries[-1])]


def _crossing_rows(steps: Int64[Tensor, " S"], samples: Float[Tensor, "S B"], name: str) -> list[Row]:
    found = crossings(steps, samples)
    if found:
        sides = {True: "to dMMSE", False: "to ridge"}
        return [_place_row("crossing_step", name, one.place, finding=sides[one.is_upward]) for one in found]
    reasons = unresolved_signs(steps, samples)
    place = Place(math.nan, math.nan, math.nan, math.nan, "suspect" if reasons else "ok", reasons)
    return [_place_row("crossing_step", name, place, finding="unresolved" if reasons else "none")]


def _transience_rows(found: Transience, *, is_gaussian: bool) -> list[Row]:
    verdict, reasons = found.verdict, found.reasons
    if is_gaussian and found.finding not in ("none", "unresolved"):
        verdict = "suspect"
        reasons = (*reasons, "with M = inf ridge is the optimum, so training went wrong and nothing was transient")
    judged = {"finding": found.finding, "verdict": verdict, "reasons": "; ".join(reasons)}
    numbers = {"rise": found.rise, "dip": found.dip}
    return [
        _place_row("critical_step", "true", found.critical, finding=found.finding),
        *(
            _finding_row(name, "true", value.item(), stderr.item()) | judged
            for name, (value, stderr) in numbers.items()
        ),
    ]


def _place_row(quantity: str, name: str, place: Place, *, finding: str = "") -> Row:
    bounds = {"lower": place.lower, "upper": place.upper, "finding": finding}
    judged = {"verdict": place.verdict, "reasons": "; ".join(place.reasons)}
    return _finding_row(quantity, name, place.step, place.stderr) | bounds | judged


def _finding_row(quantity: str, name: str, value: float, stderr: float) -> Row:
    where = {"predictor": "model", "distribution": name, "quantity": quantity, "position": "mean"}
    return where | {"value": value, "stderr": stderr}


def _samples(entries: Sequence[Entry], name: str) -> Float[Tensor, "S B"]:
    return torch.from_numpy(np.stack([entry.arrays[name] for entry in entries])).double()


def _of(found: Sequence[Row], quantity: str) -> list[Row]:
    return [row for row in found if row["quantity"] == quantity]


def _transience_line(critical: Row, rise: Row, dip: Row) -> str:
    line = f"Transient ridge: {rise['finding']}; {_verdict(rise)}."
    if math.isnan(rise["value"]):
        return line
    change = (
        f"at the end it is {rise['value']:.3g} ± {rise['stderr']:.2g} higher"
        if rise["value"] > 0
        else "the last saved step"
    )
    near = f"{dip['value']:.0%} ± {dip['stderr']:.1%} of the way from zero's to ridge's"
    return f"{line} The loss on new tasks is lowest at {_place_words(critical)}, {near}; {change}."


def _last_lines(entry: Entry) -> Iterator[str]:
    widest = max((row["position"] for row in entry.rows if row["quantity"] == "icl_score"), key=_width, default="")
    for row in entry.rows:
        if row["position"] == ("mean" if row["quantity"] in _HEADLINES else widest):
            label = row["quantity"] + (f" {widest}" if row["quantity"] == "icl_score" else "")
            yield f"  {row['distribution']:9s} {label:15s} {row['value']:>10.4g} ± {row['stderr']:.2g}"


def _width(pair: str) -> int:
    first, second = map(int, pair.split(":"))
    return second - first


def _place_words(row: Row) -> str:
    error = "" if math.isnan(row["stderr"]) else f" ± {row['stderr']:,.0f}"
    return f"step {row['value']:,.0f}{error}, between {row['lower']:,.0f} and {row['upper']:,.0f}"


def _verdict(row: Row) -> str:
    return f"{row['verdict']}: {row['reasons']}" if row["reasons"] else row["verdict"]
