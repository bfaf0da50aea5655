"""Turning points of curves over saved steps: minima, crossings of zero, and rises after a minimum.

A curve is a mean over prompts at every saved step. All S steps use the same B prompts. To compare two steps, we take
for each prompt the difference between its numbers at the two steps, and average this difference over prompts. The
standard error of this average is far below the standard error of either mean. The functions therefore take an array
(S, B) with the numbers of single prompts. `lower` and `upper` are the saved steps between which a turning point lies.

All standard errors in this module have two parts: an error over prompts, and an error due to fluctuations of training.
The second part is the scatter of the saved steps around a smooth curve, which is correlated between saved steps
(`icl.analysis.scatter`). If there are few steps, a smooth curve that is too flexible follows their scatter. The length
scale of the smooth curve is therefore at least `STEPS_PER_LENGTH` times the mean distance between neighbouring saved
steps in log time. With fewer than `FEWEST_STEPS` saved steps, the scatter is unknown and every result is `suspect`. The
scatter is estimated separately before and after a minimum or a crossing, because many curves are smooth at first and
fluctuate later.

- Minimum: the saved step with the lowest mean. A step is significantly higher if it exceeds the minimum by more than
  `MINIMUM_ERRORS` standard errors. `lower` and `upper` enclose all steps that are not significantly higher. The minimum
  is `suspect` if the first or the last saved step is not significantly higher, because the curve may then have no
  turning point.
- Crossing: a change of sign. We call a saved step clear if its mean is more than `SIGN_ERRORS` standard errors from
  zero. A crossing lies between two clear steps with different signs and no clear step between them. To find its step,
  we interpolate linearly in log(t + 1) between the two clear steps. The standard error of the crossing step is
  propagated to first order. A crossing is `suspect` if there is only one clear step between it and a neighbouring
  crossing or an end of the run.
- Transience (Carroll et al. 2025, figure 1 and appendix B): t_crit is the saved step at which the loss on fixed prompts
  of new tasks is lowest. The run is transient if the loss at the last saved step exceeds this minimum by more than
  `RISE_ERRORS` standard errors. If the difference lies between `DOUBTFUL_RISE_ERRORS` and `RISE_ERRORS` standard
  errors, the finding is `unresolved`. The scatter is estimated from the losses after the minimum. We require a rise of
  many standard errors, because the lowest of hundreds of losses is low partly by chance. `data/verdict-rates.csv` gives
  the share of flat curves that are called transient, for several correlations of the scatter. A rise that has
  disappeared by the end of the run does not count. If t_crit is `suspect`, the rise is `suspect` too. There is one
  exception: a `rise without a dip` (defined below) in a run that was saved from step 0 on, because no earlier minimum
  can have been missed.
- A rise is a transience of ridge only if the model came close to ridge. The dip is
  (zero loss - loss) / (zero loss - ridge loss) at t_crit, where the zero loss is the loss of predicting 0. If the dip
  is at least `TRANSIENT_DIP`, the finding is `transient ridge`. If the dip is smaller but significant, the finding is
  `partial dip`; otherwise the finding is `rise without a dip`. In the paper (D = 8), ridge is transient for M = 16 to
  128, and the dip is partial for M = 6 and M = 8. The paper states no rule; the limits are our choice.

Saved steps with a value that is not finite are left out. Every result of such a curve is `suspect`, because a turning
point at these steps would be missed.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from icl import metrics
from icl.analysis.scatter import Scatter, estimate_scatter
from icl.metrics import Estimate

MINIMUM_ERRORS = 3.0
SIGN_ERRORS = 3.0
RISE_ERRORS = 6.5
DOUBTFUL_RISE_ERRORS = 3.0
TRANSIENT_DIP = 0.5
FEWEST_STEPS = 8
"""Minimum number of saved steps for an estimate of the scatter. The estimate from 4 to 7 steps can be far too small."""
STEPS_PER_LENGTH = 4
"""Minimum length scale of the smooth curve, as a multiple of the mean distance between neighbouring saved steps in log
time."""
_ENOUGH_STEPS = 16
"""Minimum number of saved steps from which we estimate the scatter for a minimum or a rise. A shorter run uses all of
its saved steps."""


class TurningPoint(NamedTuple):
    """A turning point: its step, the error or the bounds of this step, and a verdict."""

    step: float
    stderr: float
    """Standard error of an interpolated step; NaN if the step is a saved step."""
    lower: float
    upper: float
    verdict: str
    reasons: tuple[str, ...] = ()


class Crossing(NamedTuple):
    """A change of sign of a curve."""

    point: TurningPoint
    is_upward: bool


class Transience(NamedTuple):
    """Result of `transience`: whether a loss rises again after its minimum."""

    finding: str
    """`none`, `unresolved`, `transient ridge`, `partial dip` or `rise without a dip`."""
    critical: TurningPoint
    rise: Estimate
    """Rise of the loss from t_crit to the last saved step. Its standard error includes the scatter of the loss."""
    dip: Estimate
    """Position of the loss at t_crit on a scale where the loss of predicting zero is 0 and the loss of ridge is 1."""
    verdict: str
    reasons: tuple[str, ...]


def minimum(steps: Int64[Tensor, " S"], samples: Float[Tensor, "S B"]) -> TurningPoint:
    """Find the step with the lowest mean, and two saved steps that enclose all steps not significantly higher."""
    steps, samples, reasons = _finite(steps, samples)
    if not len(steps):
        return TurningPoint(math.nan, math.nan, math.nan, math.nan, "invalid", tuple(reasons))
    reasons += _too_few(steps)
    best = int(samples.mean(1).argmin())
    last = len(steps) - 1
    excess = _means(samples - samples[best])
    scatters = _scatters(steps, samples, best, _ENOUGH_STEPS)
    between = [scatter.difference_variance(abs(index - best)) for index, scatter in enumerate(scatters)]
    stderr = (excess.stderr.nan_to_num().square() + torch.tensor(between).double()).sqrt()
    equal = (excess.value <= MINIMUM_ERRORS * stderr).nonzero()[:, 0].tolist()
    if best == 0:
        reasons.append("the curve is lowest at the first saved step")
    elif best == last:
        reasons.append("the curve is lowest at the last saved step")
    elif equal[0] == 0 or equal[-1] == last:
        reasons.append("the minimum is not significantly lower than the curve at one end of the run")
    lower, upper = float(steps[max(equal[0] - 1, 0)]), float(steps[min(equal[-1] + 1, last)])
    return TurningPoint(float(steps[best]), math.nan, lower, upper, _verdict(reasons), tuple(reasons))


def crossings(steps: Int64[Tensor, " S"], samples: Float[Tensor, "S B"]) -> list[Crossing]:
    """Find the crossings of zero, in order of steps. On both sides, the mean is significantly different from zero."""
    steps, samples, general = _finite(steps, samples)
    general += _too_few(steps)
    scatters = _sign_scatters(steps, samples)
    sides = _sides(samples, scatters)
    clear = sides.nonzero()[:, 0].tolist()
    logs = steps.double().log1p()
    found = []
    for number, (before, after) in enumerate(pairwise(clear)):
        if sides[before] == sides[after]:
            continue
        # If the means are u before and v after, the line through both is zero at the share u / (u - v) of the distance.
        share = metrics.ratio_of_means(samples[before], samples[before] - samples[after])
        share_error = math.hypot(share.stderr.item(), _share_scatter(samples, scatters, before, after))
        width = (logs[after] - logs[before]).item()
        shifted_step = math.exp(logs[before].item() + width * share.value.item())  # t + 1
        is_single_before = number == 0 or sides[clear[number - 1]] == sides[after]
        is_single_after = number + 2 == len(clear) or sides[clear[number + 2]] == sides[before]
        reasons = list(general)
        if is_single_before or is_single_after:
            reasons.append("before or after the crossing, only one saved step is significantly different from zero")
        stderr, bounds = shifted_step * width * share_error, (float(steps[before]), float(steps[after]))
        point = TurningPoint(shifted_step - 1, stderr, *bounds, _verdict(reasons), tuple(reasons))
        found.append(Crossing(point, bool(sides[after] > 0)))
    return found


def unresolved_signs(steps: Int64[Tensor, " S"], samples: Float[Tensor, "S B"]) -> tuple[str, ...]:
    """Return reasons why a curve may cross zero although no crossing was found.

    The result is empty if there are at least `FEWEST_STEPS` saved steps, all values are finite, all means have the same
    sign, and at least one mean is significantly different from zero.
    """
    steps, samples, reasons = _finite(steps, samples)
    reasons += _too_few(steps)
    sides, signs = _sides(samples, _sign_scatters(steps, samples)), samples.mean(1).sign()
    if not sides.any() or signs.min() * signs.max() < 0:
        unclear = int((sides == 0).sum())
        reasons.append(f"{unclear} of {len(steps)} saved steps are within {SIGN_ERRORS:g} standard errors of zero")
    return tuple(reasons)


def transience(
    steps: Int64[Tensor, " S"], losses: Float[Tensor, "S B"], *, zero: Float[Tensor, " B"], ridge: Float[Tensor, " B"]
) -> Transience:
    """Find whether the loss on new tasks rises again after its minimum, and how close the minimum is to ridge's loss.

    Args:
        steps: The saved steps.
        losses: Losses of each prompt at each saved step, averaged over positions.
        zero: Losses of predicting 0 on the same prompts.
        ridge: Losses of ridge on the same prompts.
    """
    critical = minimum(steps, losses)
    steps, losses, reasons = _finite(steps, losses)
    if len(steps) < 3:
        unknown = Estimate(torch.tensor(math.nan), torch.tensor(math.nan))
        reasons.append("at least three saved steps with finite losses are needed")
        return Transience("unresolved", critical, unknown, unknown, "invalid", tuple(reasons))
    reasons += _too_few(steps)
    best = int((steps == critical.step).nonzero())
    dip = metrics.ratio_of_means(zero - losses[best], zero - ridge)
    over_prompts = _means((losses[-1] - losses[best]).unsqueeze(0))
    begin = max(0, min(best, len(steps) - _ENOUGH_STEPS))
    between = _scatter(steps[begin:], losses[begin:]).difference_variance(len(steps) - 1 - best)
    rise = Estimate(over_prompts.value[0], (over_prompts.stderr[0].square() + between).sqrt())
    finding = "none"
    if rise.value > RISE_ERRORS * rise.stderr:
        finding = _kind(dip)
        if finding != "rise without a dip" or steps[0] > 0:
            reasons += [reason for reason in critical.reasons if reason not in reasons]
    elif rise.value > DOUBTFUL_RISE_ERRORS * rise.stderr:
        finding = "unresolved"
        reasons.append(f"the rise is between {DOUBTFUL_RISE_ERRORS:g} and {RISE_ERRORS:g} standard errors")
    return Transience(finding, critical, rise, dip, _verdict(reasons), tuple(reasons))


def _scatters(steps: Int64[Tensor, " S"], samples: Float[Tensor, "S B"], split: int, num_steps: int) -> list[Scatter]:
    """Return the scatter at each saved step, estimated separately from the steps before `split` and from the others.

    A part with fewer than `num_steps` steps is extended to this number of steps, into the other part.
    """
    end, begin = max(split, num_steps), max(0, min(split, len(steps) - num_steps))
    before, after = _scatter(steps[:end], samples[:end]), _scatter(steps[begin:], samples[begin:])
    return [before] * split + [after] * (len(steps) - split)


def _sign_scatters(steps: Int64[Tensor, " S"], samples: Float[Tensor, "S B"]) -> list[Scatter]:
    """Return the scatter at each saved step, estimated separately before and after the main change of sign.

    If the scatter of the whole curve has a larger correlated part, we use that part, because a slow fluctuation can
    look like a change of sign. Here, `FEWEST_STEPS` saved steps on each side are enough, because an `ok` crossing needs
    two clear steps on both sides.
    """
    if not len(steps):
        return []
    signs = samples.mean(1).sign()
    split = int((2 * signs.cumsum(0) - signs.sum()).abs().argmax()) + 1
    whole = _scatter(steps, samples)
    return [
        part if part.wander > whole.wander else whole._replace(white=part.white)
        for part in _scatters(steps, samples, split, FEWEST_STEPS)
    ]


def _share_scatter(samples: Float[Tensor, "S B"], scatters: Sequence[Scatter], before: int, after: int) -> float:
    """Return the first-order standard error of u / (u - v) that is due to the scatter of the means u and v."""
    (u, v), (first, second) = samples[[before, after]].mean(1).tolist(), (scatters[before], scatters[after])
    covariance = first.wander * second.wander * max(first.phi, second.phi) ** (after - before)
    return math.sqrt((v * first.total) ** 2 + (u * second.total) ** 2 - 2 * u * v * covariance) / (u - v) ** 2


def _scatter(steps: Int64[Tensor, " S"], samples: Float[Tensor, "S B"]) -> Scatter:
    """Return the scatter of a curve about its trend, without the part that is due to the choice of prompts."""
    if len(steps) < 3:
        return Scatter(white=0.0, wander=0.0, tau=1.0)
    times = steps.double().log1p().numpy()
    shortest = max(1.0, STEPS_PER_LENGTH * float(times[-1] - times[0]) / (len(times) - 1))
    # A difference of two neighbours contains the independent errors of both.
    over_prompts = float(_means(samples.diff(dim=0)).stderr.nan_to_num().median()) / math.sqrt(2)
    values = samples.mean(1).numpy()
    return estimate_scatter(times, values, over_prompts, shortest=shortest, longest=max(10.0, shortest))


def _too_few(steps: Int64[Tensor, " S"]) -> list[str]:
    """Return a reason if there are too few saved steps to estimate the scatter."""
    if len(steps) >= FEWEST_STEPS:
        return []
    return [f"{len(steps)} saved steps are too few to know how much the curve fluctuates between steps"]


def _kind(dip: Estimate) -> str:
    if dip.value >= TRANSIENT_DIP:
        return "transient ridge"
    return "partial dip" if dip.value > SIGN_ERRORS * dip.stderr else "rise without a dip"


def _sides(samples: Float[Tensor, "S B"], scatters: Sequence[Scatter]) -> Float[Tensor, " S"]:
    """Return 1 where the mean is significantly above zero, -1 where it is significantly below zero, else 0."""
    mean = _means(samples)
    total = torch.tensor([scatter.total for scatter in scatters], dtype=torch.float64)
    stderr = (mean.stderr.nan_to_num().square() + total.square()).sqrt()
    return mean.value.sign() * (mean.value.abs() > SIGN_ERRORS * stderr)


def _means(samples: Float[Tensor, "S B"]) -> Estimate:
    return metrics.position_mean(samples.mT)


def _finite(steps: Tensor, samples: Tensor) -> tuple[Tensor, Tensor, list[str]]:
    """Return the steps at which all values are finite, the values at these steps, and a reason if steps are left out.

    The returned values are in float64.
    """
    keep: Bool[Tensor, " S"] = samples.isfinite().all(1)
    num_left_out = int((~keep).sum())
    reasons = [f"the values of {num_left_out} saved step(s) are not finite"] if num_left_out else []
    return steps[keep], samples[keep].double(), reasons


def _verdict(reasons: list[str]) -> str:
    return "suspect" if reasons else "ok"
