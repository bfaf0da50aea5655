"""Findings and verdicts of energy distances: whether a distance is zero, and which candidate prior is nearer."""

import math
from typing import NamedTuple

from icl.metrics import Estimate

MAX_Z = 2.0
"""A number within this many standard errors of zero counts as zero."""
MIN_SEPARATION_Z = 4.0
"""The samples distinguish two candidates if the distance between the candidates is more than this many standard errors
above zero."""
SUSPECT_SHARE = 0.1
"""A candidate explains the model if its distance to the model is zero within the error, or is at most this share of the distance
between the candidates. The limit is our choice."""
INVALID_SHARE = 1.0
"""The verdict is `invalid` if the smaller of the model's distances to the candidates is significantly above zero and exceeds this
share of the distance between the candidates."""


class Judgement(NamedTuple):
    """Finding that a number supports, and its verdict. The fields are columns of the table."""

    finding: str
    verdict: str
    reasons: str = ""


def judge_distance(distance: Estimate) -> Judgement:
    """Judge whether an energy distance is zero within its error."""
    if not _is_finite(distance):
        return Judgement("", "invalid", "the rollouts are not finite")
    is_zero = distance.value <= MAX_Z * distance.stderr
    return Judgement("zero within the error" if is_zero else "not zero", "ok")


def judge_separation(separation: Estimate) -> Judgement:
    """Judge whether the samples distinguish the two candidates."""
    if separation.value > MIN_SEPARATION_Z * separation.stderr:
        return Judgement("", "ok")
    return Judgement("", "invalid", "the samples do not distinguish the two priors; raise num_samples")


def judge_preference(
    preference: Estimate, nearest: Estimate, separation: Estimate, *, names: tuple[str, str]
) -> Judgement:
    """Judge which of two candidates is nearer to the model, and whether the nearer candidate explains the model.

    Args:
        preference: The model's distance to the second candidate minus its distance to the first.
        nearest: The smaller of these two distances.
        separation: The distance between the candidates.
        names: Names of both candidates.
    """
    if not _is_finite(preference):
        return Judgement("", "invalid", "the rollouts are not finite")
    between = judge_separation(separation)
    if between.verdict != "ok":
        return Judgement("unclear", "invalid", between.reasons)
    is_clear = abs(preference.value) > MAX_Z * preference.stderr
    finding = (names[0] if preference.value > 0 else names[1]) if is_clear else "unclear"
    share = float(nearest.value / separation.value)
    is_zero = nearest.value <= MAX_Z * nearest.stderr
    if share > INVALID_SHARE and not is_zero:
        reason = f"neither prior explains the model: the smaller distance is {share:.3g} times the distance between the priors"
        return Judgement(finding, "invalid", reason)
    reasons = []
    if share > SUSPECT_SHARE and not is_zero:
        reasons.append(
            f"neither prior explains the model: the smaller distance is {share:.0%} of the distance between the priors"
        )
    if not is_clear:
        reasons.append(
            "neither prior is significantly nearer; raise num_samples, unless the model really lies between them"
        )
    return Judgement(finding, "suspect" if reasons else "ok", "; ".join(reasons))


def _is_finite(estimate: Estimate) -> bool:
    return all(math.isfinite(float(number)) for number in estimate)
