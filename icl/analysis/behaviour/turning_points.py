"""Where curves over saved steps turn: their minimum, where they cross zero, and whether they rise again.

A curve is a mean over prompts at every saved step; all steps see the same B prompts, so that what is compared is the difference
prompt by prompt, whose standard error is far below that of either mean. Input are therefore the prompts' own numbers (S, B).
Places lie between saved steps: `lower` and `upper` are the saved steps that enclose all that is not told apart.

- Minimum: the saved step of the least mean. Not told apart from it is a step that is higher by less than `MINIMUM_ERRORS`
  standard errors. `suspect` at the first or last saved step, where there may be none.
- Crossing: two neighbouring saved steps on opposite sides of zero by `SIGN_ERRORS` standard errors; in between the curve
  is a line in log(t + 1), and the step's standard error is to first order. `suspect` if a side has a single saved step.
- Transience (Carroll et al. 2025, figure 1 and appendix B): t_crit is the minimum of the loss on fixed prompts of new tasks;
  the run is transient if the loss at the last saved step is higher by `RISE_ERRORS` errors (from `DOUBTFUL_RISE_ERRORS` on,
  `unresolved`). An error is that of the prompts and, as training itself shakes, the curve's roughness at both ends: the scaled
  median distance of a saved step from the line between its neighbours, from t_crit on. So many errors are asked for because the
  lowest of hundreds of steps is low by chance; of curves that fall, or are flat, and shake, fewer than one in 200 is called
  transient. What passes within the run and is gone at its end is no rise.
- A rise is of ridge only if the model was near it: the dip is (zero's loss - loss) / (zero's loss - ridge's loss) at t_crit. From
  `TRANSIENT_DIP` on it is `transient ridge`; less, but more than nothing, `partial dip`; else `rise without a dip`. The
  paper shows these kinds (M = 16 to 128, and 6 and 8, at D = 8) and states no rule; the limits are ours.

A step with a number that is not finite is left out.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from icl import metrics
from icl.metrics import Estimate

MINIMUM_ERRORS = 2.0
SIGN_ERRORS = 3.0
RISE_ERRORS = 5.0
DOUBTFUL_RISE_ERRORS = 3.0
TRANSIENT_DIP = 0.5
_ENOUGH_STEPS = 12
_NORMAL_MAD = 1.4826


class Place(NamedTuple):
    """A step, how well it is known, and what speaks against it."""

    step: float
    stderr: float
    """Of what is interpolated; NaN where a saved step is chosen."""
    lower: float
    upper: float
    verdict: str
    reasons: tuple[str, ...] = ()


class Crossing(NamedTuple):
    """Where a curve changes its sign."""

    place: Place
    is_upward: bool


class Transience(NamedTuple):
    """Whether a loss rises again after its minimum."""

    finding: str
    """`none`, `unresolved`, `transient ridge`, `partial dip` or `rise without a dip`."""
    critical: Place
    rise: Estimate
    """From t_crit to the last saved step; the error includes the roughness."""
    dip: Estimate
    """How far from zero's loss to ridge's the loss came."""
    verdict: str
    reasons: tuple[str, ...]


def minimum(steps: Int64[Tensor, " S"], samples: Float[Tensor, "S B"]) -> Place:
    """The step of the least mean, enclosed by the saved steps that are clearly higher."""
    steps, samples, reasons = _finite(steps, samples)
    if not len(steps):
        return _nowhere(reasons)
    best = int(samples.mean(1).argmin())
    excess = _means(samples - samples[best])
    alike = (excess.value <= MINIMUM_ERRORS * excess.stderr.nan_to_num()).nonzero()[:, 0].tolist()
    last = len(steps) - 1
    if best == 0:
        reasons.append("it is lowest at the first saved step")
    elif best == last:
        reasons.append("it is lowest at the last saved step")
    elif alike[0] == 0 or alike[-1] == last:
        reasons.append("the minimum is not told apart from an end of the run")
    lower, upper = float(steps[max(alike[0] - 1, 0)]), float(steps[min(alike[-1] + 1, last)])
    return Place(float(steps[best]), math.nan, lower, upper, "suspect" if reasons else "ok", tuple(reasons))


def crossings(steps: Int64[Tensor, " S"], samples: Float[Tensor, "S B"]) -> list[Crossing]:
    """Every change from clearly below zero to clearly above, or back, in order."""
    steps, samples, _ = _finite(steps, samples)
    side = _sides(samples)
    clear = side.nonzero()[:, 0].tolist()
    logs = steps.double().log1p()
    found = []
    for here, there in pairwise(clear):
        if side[here] == side[there]:
            continue
        share = _root(samples[here], samples[there])
        width = (logs[there] - logs[here]).item()
        at = math.exp(logs[here].item() + width * share.value.item())
        reasons = []
        if min(_run_length(side, here, -1), _run_length(side, there, 1)) < 2:
            reasons.append("only one saved step is clearly on one side")
        place = Place(
            at - 1,
            at * width * share.stderr.item(),
            float(steps[here]),
            float(steps[there]),
            "suspect" if reasons else "ok",
            tuple(reasons),
        )
        found.append(Crossing(place, bool(side[there] > 0)))
    return found


def unresolved_signs(steps: Int64[Tensor, " S"], samples: Float[Tensor, "S B"]) -> tuple[str, ...]:
    """Why a curve without crossings may have one after all; nothing where all means lie on one side."""
    steps, samples, reasons = _finite(steps, samples)
    signs = samples.mean(1).sign()
    if len(steps) and signs.min() * signs.max() < 0:
        unclear = int((_sides(samples) == 0).sum())
        reasons.append(f"{unclear} of {len(steps)} saved steps are on neither side by {SIGN_ERRORS:g} standard errors")
    return tuple(reasons)


def transience(
    steps: Int64[Tensor, " S"], losses: Float[Tensor, "S B"], *, zero: Float[Tensor, " B"], ridge: Float[Tensor, " B"]
) -> Transience:
    """Whether the loss on new tasks rises again after its minimum, and how near ridge it was there.

    Args:
        steps: The saved steps.
        losses: Of each prompt at each of them, the mean over positions.
        zero: The losses of predicting 0 on the same prompts.
        ridge: Those of ridge.
    """
    critical = minimum(steps, losses)
    steps, losses, reasons = _finite(steps, losses)
    nothing = Estimate(torch.tensor(math.nan), torch.tensor(math.nan))
    if len(steps) < 3:
        return Transience(
            "unresolved",
            critical,
            nothing,
            nothing,
            "invalid",
            (*reasons, "it needs three saved steps with finite losses"),
        )
    best = int((steps == critical.step).nonzero())
    dip = metrics.ratio_of_means(zero - losses[best], zero - ridge)
    prompts = _means((losses[-1] - losses[best]).unsqueeze(0))
    shaking = roughness(steps, losses.mean(1), start=best)
    rise = Estimate(prompts.value[0], (prompts.stderr[0].square() + 2 * shaking**2).sqrt())
    if rise.value > RISE_ERRORS * rise.stderr:
        return Transience(_kind(dip), critical, rise, dip, "suspect" if reasons else "ok", tuple(reasons))
    if rise.value > DOUBTFUL_RISE_ERRORS * rise.stderr:
        reasons.append(f"the rise is between {DOUBTFUL_RISE_ERRORS:g} and {RISE_ERRORS:g} errors")
        return Transience("unresolved", critical, rise, dip, "suspect", tuple(reasons))
    return Transience("none", critical, rise, dip, "suspect" if reasons else "ok", tuple(reasons))


def roughness(steps: Int64[Tensor, " S"], values: Float[Tensor, " S"], *, start: int = 0) -> float:
    """The deviation with which saved steps scatter about a smooth curve, from `start` on if a dozen are there, else all along.

    Each inner step's distance from the line in log(t + 1) through its neighbours, scaled to the variance of one value;
    the median, so that a bend or two do not count. A curve that bends everywhere looks rougher than it is.
    """
    begin = start if len(values) - start >= _ENOUGH_STEPS else 0
    logs, values = steps[begin:].double().log1p(), values[begin:].double()
    weight = (logs[1:-1] - logs[:-2]) / (logs[2:] - logs[:-2])
    distance = values[1:-1] - (1 - weight) * values[:-2] - weight * values[2:]
    scaled = distance.abs() / (1 + weight.square() + (1 - weight).square()).sqrt()
    return _NORMAL_MAD * scaled.median().item()


def _kind(dip: Estimate) -> str:
    if dip.value >= TRANSIENT_DIP:
        return "transient ridge"
    return "partial dip" if dip.value > SIGN_ERRORS * dip.stderr else "rise without a dip"


def _root(before: Float[Tensor, " B"], after: Float[Tensor, " B"]) -> Estimate:
    """Where between 0 and 1 the line through two means is zero: u / (u - v)."""
    return metrics.ratio_of_means(before, before - after)


def _sides(samples: Float[Tensor, "S B"]) -> Float[Tensor, " S"]:
    """1 or -1 where the mean is clearly above or below zero, else 0."""
    mean = _means(samples)
    return mean.value.sign() * (mean.value.abs() > SIGN_ERRORS * mean.stderr.nan_to_num())


def _run_length(side: Float[Tensor, " S"], place: int, direction: int) -> int:
    """How many clear steps, from one on in a direction, are on its side before one is on the other."""
    clear: list[float] = (
        [one for one in side[place::direction].tolist() if one]
        if direction > 0
        else [one for one in side[: place + 1].flip(0).tolist() if one]
    )
    return next((number for number, one in enumerate(clear) if one != clear[0]), len(clear))


def _means(samples: Float[Tensor, "S B"]) -> Estimate:
    return metrics.position_mean(samples.mT)


def _finite(steps: Tensor, samples: Tensor) -> tuple[Tensor, Tensor, list[str]]:
    """The steps whose numbers are all finite, in float64, and a reason if there are others."""
    keep: Bool[Tensor, " S"] = samples.isfinite().all(1)
    left_out = int((~keep).sum())
    return steps[keep], samples[keep].double(), [f"{left_out} saved steps are not finite"] if left_out else []


def _nowhere(reasons: list[str]) -> Place:
    return Place(math.nan, math.nan, math.nan, math.nan, "invalid", tuple(reasons))
