"""Verdicts on mixtures: how well a mixture explains a model, and whether the fit determines the mixture's parameter."""

import math
from collections.abc import Sequence

SUSPECT_SHARE = 0.1
"""Residual share above which a mixture is `suspect`. The limit is our choice."""
INVALID_SHARE = 1.0
"""Residual share above which a mixture is `invalid`."""
MAX_EXCESS = 2.0
"""Largest number of standard errors by which the best weight may lie outside [0, 1] for the verdict `ok`."""
MAX_LOG_ODDS_STDERR = 1.0
"""Largest standard error of log odds for the verdict `ok`."""


def judge_fixed(share: float, stderr: float, excess: float) -> tuple[str, list[str]]:
    """Return the verdict of a fixed weight, from the residual share, the standard error and `Fit.excess`."""
    level, reasons = _judge_share(share)
    if excess > MAX_EXCESS:
        reasons.append(f"the best weight lies outside [0, 1], by {excess:.3g} standard errors")
    return _worse(level, reasons), reasons


def judge_bayes(share: float, stderr: float, excess: float) -> tuple[str, list[str]]:
    """Return the verdict of prior log odds, from the residual share, the standard error and `Fit.excess`."""
    level, reasons = _judge_share(share)
    if math.isnan(excess):
        reasons.append("all log odds fit equally well")
    elif excess:
        reasons.append(
            f"the log odds are only a bound, because no odds bring the mixture closer to the model than {_part(excess)} is"
        )
    elif not stderr <= MAX_LOG_ODDS_STDERR:
        reasons.append(f"the standard error of the log odds is {stderr:.2g}; raise num_prompts")
    return _worse(level, reasons), reasons


def verdict(reasons: Sequence[str]) -> dict[str, str]:
    """Return the columns `verdict` and `reasons`."""
    return {"verdict": "suspect" if reasons else "ok", "reasons": "; ".join(reasons)}


def _judge_share(share: float) -> tuple[str, list[str]]:
    if math.isnan(share):
        return "invalid", ["dMMSE and ridge make the same predictions, or the model's predictions are not finite"]
    if share > INVALID_SHARE:
        return "invalid", [
            "no mixture explains the model: the squared distance to the closest one is "
            f"{share:.3g} times the squared distance between dMMSE and ridge"
        ]
    if share > SUSPECT_SHARE:
        return "suspect", [
            f"the mixture leaves {share:.0%} of the squared distance between dMMSE and ridge unexplained"
        ]
    return "ok", []


def _worse(level: str, reasons: Sequence[str]) -> str:
    return "suspect" if reasons and level == "ok" else level


def _part(excess: float) -> str:
    return "dMMSE" if excess > 0 else "ridge"
