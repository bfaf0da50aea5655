"""Search for the lr, nbeta, localization and burn-in for any loss, by a fixed rule (`RULE`).

Near a minimum with curvatures h, the LLC is about the sum of (1/2) h / (h + ratio), with ratio = localization / nbeta. This sum does not
depend on nbeta itself, so the ratio decides which directions contribute. If the LLC changes with nbeta at the same ratio, either the chains
leave the basin (nbeta is too small), or minibatch noise moves them too much (nbeta is too large). Chains are stable if
lr (nbeta h_max + localization) is below 4, where h_max is the largest curvature. So we search over three numbers:

- nbeta, in units of 1 / (loss of a trivial predictor - loss of the checkpoint),
- the ratio, in units of h_max,
- lr, in units of the stability limit.

Chains must be long enough to reach equilibrium in flat directions, where only the localization limits their spread. In a flat direction,
the variance after t moves is a fraction 1 - exp(-lr localization t) of its final value, and no direction is slower. With the ratio in
units of h_max and a stable lr, equilibrium takes about 1 / ratio moves. Shorter chains give an LLC that is too small, at every nbeta and
every lr. So equal estimates at different nbeta or lr do not show that chains are long enough.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from icl.config import SamplerConfig
from icl.sampling.result import LLCResult

NBETAS = (300.0, 1000.0, 3000.0)
"""Values of nbeta that are tried, in units of 1 / (trivial predictor's loss - last checkpoint's loss)."""
RATIOS = (0.01, 0.03, 0.1)
"""Ratios localization / nbeta that are tried, in units of the last checkpoint's largest curvature. Smaller ratios need longer chains."""
STEP = 1.5
"""Value of lr (nbeta h_max + localization) in the survey. Chains become unstable at the value 4."""
AGREEMENT = (3.0, 0.1)
"""Two estimates agree if they differ by at most this many standard errors of their difference, or by at most this fraction of the first
estimate."""
PLATEAU = 0.03
"""Estimates at lr and lr / 3 lie on a plateau if they differ by at most the standard error of their difference plus this fraction of the
estimate at lr / 3."""
MIN_ESS = 300.0
"""Effective sample size that the chosen number of draws should give. The verdict requires only 200 for 4 to 15 chains."""
LENGTH_RULES = ("r hat", "effective sample size", "not significant")
"""Rules of the verdict that longer chains may satisfy."""
LR_RULES = ("step size bias",)
"""Rules of the verdict that a smaller lr may satisfy. A separate stage of the search tests them."""
CHECKPOINT_RULES = ("negative", "not at a minimum", "lower loss at mean", "diverged down", "lower loss found")
"""Rules of the verdict that are broken under most settings if a checkpoint is not at its minimum."""
_LATER_RULES = (*LENGTH_RULES, *LR_RULES)  # the stages after the survey decide about these
SURVEY, RATES, CONFIRMATION = "nbeta, localization", "lr", "confirmation"
"""The stages of a search."""
_SLOWER = 3
"""Factor by which the stage `lr` reduces lr and lengthens the chains."""
_MAX_DRAWS = 60
"""Largest number of draws of each chain in the survey."""
_MAX_INIT_BATCHES = 256
"""Largest number of batches for the checkpoint's own loss. All settings share these batches."""

RULE = f"""\
The rule: at a few checkpoints we try nbeta = {", ".join(f"{x:g}" for x in NBETAS)} divided by (loss of a trivial predictor - checkpoint's
loss). At each nbeta we try localization / nbeta = {", ".join(f"{x:g}" for x in RATIOS)} times the largest curvature. lr is {STEP:g} / (nbeta curvature + localization).
1. The last checkpoint must be healthy: it must break no rule of the verdict. The bias of the step size is tested only in step 4. R-hat, the
   effective sample size and significance are not required, because the chains of the search are short. Burn-in with SGLD is
   2 / (lr localization) moves, in which the variance in flat directions grows to 86% of its final value. `baoab` with friction c
   needs only (1 - c) / (1 + c) times as many moves.
2. Plateau in nbeta: the estimate must agree with the estimate at the next smaller or larger nbeta and the same localization / nbeta
   (within {AGREEMENT[0]:g} standard errors or {AGREEMENT[1]:.0%}).
3. Among the settings that pass steps 1 and 2, we choose those with the largest number of healthy checkpoints. If several settings have
   the same number, we choose the smallest localization / nbeta (so that as many directions as possible count), then the
   smallest nbeta (least noise).
4. Plateau in lr, at the last checkpoint: the bias of the step size must be small. With a third of lr and chains three times as long,
   the estimate may change by at most the standard error of the difference plus {PLATEAU:.0%}. Otherwise this third of lr becomes the
   new lr and is tested in the same way.
5. Burn-in: 1.5 times the number of moves that the chains' mean loss takes to reach its later level, but at least 1.5 times the
   burn-in that the search used for these settings. Draws: at least as many as configured, and enough for an effective sample size
   of {MIN_ESS:g}.
All chains of the search use the same minibatches and noise, so differences between estimates are due to the settings.
Finally, chains of the chosen length with the next `seed` test the choice. The choice is accepted if the verdict on
these chains at the last checkpoint is ok."""


class SearchPoint(NamedTuple):
    """Settings that the search tries."""

    stage: str
    nbeta: float
    ratio: float
    """localization / nbeta."""
    lr: float
    filling: int
    """Burn-in of the survey: the number of moves after which the variance in flat directions is 86% of its final value."""
    slowness: int = 1
    """Length of the chains, relative to the survey."""

    @property
    def localization(self) -> float:
        """Strength gamma of the pull back to the checkpoint."""
        return round_to(self.nbeta * self.ratio, digits=6)

    def sampler(self, base: SamplerConfig) -> SamplerConfig:
        """Return the settings of the chains."""
        return dataclasses.replace(
            base,
            lr=self.lr,
            nbeta=self.nbeta,
            localization=self.localization,
            num_draws=self.slowness * min(base.num_draws, _MAX_DRAWS),
            num_burnin_steps=self.slowness * self.filling,
            num_init_batches=min(base.num_init_batches, _MAX_INIT_BATCHES),
        )


class Trial(NamedTuple):
    """Settings, with the estimate at each checkpoint under these settings. The last checkpoint comes last."""

    point: SearchPoint
    results: list[LLCResult]

    @property
    def last(self) -> LLCResult:
        """The estimate at the last checkpoint."""
        return self.results[-1]

    @property
    def num_healthy(self) -> int:
        """Number of checkpoints whose estimate breaks no rule, apart from the rules that later stages of the search test."""
        return sum(is_healthy(result, but=_LATER_RULES) for result in self.results)


Estimate = Callable[[Sequence[SearchPoint]], list[list[LLCResult]]]
"""Function that makes estimates under several settings with equally long chains.

It returns one list for each of the settings. The last entry of each list is the result for the last checkpoint.
"""


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """All trials of a search, and the choice."""

    trials: list[Trial]
    reason: str
    """The reason why these settings were chosen, or why none were."""
    plateau: frozenset[int]
    """Indices of the trials that have a plateau in nbeta."""
    chosen: Trial | None = None
    num_burnin_steps: int = 0


def survey(*, height: float, curvature: float, speed: float = 1.0) -> list[SearchPoint]:
    """Return the settings that are tried first: every nbeta at every ratio, with a stable lr.

    Args:
        height: Height of a trivial predictor's loss above the last checkpoint's loss.
        curvature: The largest curvature at the last checkpoint.
        speed: Speed at which the chains spread out in flat directions, relative to SGLD (`ChainsConfig.speed`).
    """
    points = []
    for share, nbeta in itertools.product(RATIOS, NBETAS):
        nbeta, ratio = round_to(nbeta / max(height, 1e-3)), round_to(share * curvature)
        lr = round_to(STEP / (nbeta * (curvature + ratio)))
        filling = 10 * math.ceil(2 * (1 + share) / (STEP * share * speed) / 10)  # rounded up to a multiple of 10
        points.append(SearchPoint(SURVEY, nbeta, ratio, lr, filling))
    return points


def search(
    estimate: Estimate,
    *,
    height: float,
    curvature: float,
    speed: float = 1.0,
    say: Callable[[str], None] = lambda line: None,
) -> SearchResult:
    """Run the search: first the survey, with all settings of the same ratio at once, then the test of the plateau in lr.

    Args:
        estimate: Function that returns the estimates under some settings. In the stage `lr`, only the last checkpoint's estimate is used.
        height: See `survey`.
        curvature: See `survey`.
        speed: See `survey`.
        say: Function that is called with a line about every trial.
    """
    trials: list[Trial] = []

    def attempt(*points: SearchPoint) -> Trial:
        for point, results in zip(points, estimate(points), strict=True):
            trials.append(Trial(point, results))
            say(_line(len(trials) - 1, trials[-1]))
        return trials[-1]

    for _, points in itertools.groupby(
        survey(height=height, curvature=curvature, speed=speed), lambda point: point.ratio
    ):
        attempt(*points)
    plateau = frozenset(number for number, trial in enumerate(trials) if _has_plateau(trial, trials))
    healthy = {number for number, trial in enumerate(trials) if is_healthy(trial.last, but=_LATER_RULES)}
    candidates = [trials[number] for number in sorted(healthy & plateau)]
    if not candidates:
        return SearchResult(trials=trials, plateau=plateau, reason=_why_none(trials, len(healthy)))
    best = min(candidates, key=lambda trial: (-trial.num_healthy, trial.point.ratio, trial.point.nbeta))
    # Also try an lr that is ten times as large, to show what a failure looks like.
    attempt(best.point._replace(stage=RATES, lr=round_to(10 * best.point.lr)))
    for _ in range(2):
        slower = attempt(slower_than(best.point))
        if is_healthy(best.last) and on_plateau(best.last, slower.last):
            limit, error = extrapolated(best.last, slower.last)
            reason = (
                f"Chosen: setting {trials.index(best)}. With a third of its lr, the LLC is {slower.last.llc:.4g} ± "
                f"{slower.last.stderr:.2g}. Extrapolation to lr = 0 gives {limit:.4g} ± {error:.2g}."
            )
            steps = max(burnin(best.last), 3 * best.point.slowness * best.point.filling // 2)
            return SearchResult(trials=trials, plateau=plateau, reason=reason, chosen=best, num_burnin_steps=steps)
        best = slower
    reason = "No choice: the estimate still changes as lr falls. Try larger batches, or a larger localization."
    return SearchResult(trials=trials, plateau=plateau, reason=reason)


def _why_none(trials: Sequence[Trial], num_healthy: int) -> str:
    """Explain why no settings of the survey can be chosen, and what to do if the checkpoint is the cause."""
    reason = (
        f"No choice: {num_healthy} of {len(trials)} settings are healthy at the last checkpoint, "
        "and none of the healthy settings is on a plateau in nbeta."
    )
    num_beside = sum(_is_beside_minimum(trial.last) for trial in trials)
    if num_beside <= len(trials) / 2:
        return reason
    return (
        f"{reason} Under {num_beside} of the settings, the estimate shows that the checkpoint is not at a minimum, which no settings can "
        "change. Choose --steps so that the last chosen checkpoint is at a minimum."
    )


def _is_beside_minimum(result: LLCResult) -> bool:
    """Return whether an estimate shows that its checkpoint is not at a minimum.

    If most chains fall far below the checkpoint's loss, they are masked, and none of the rules in `CHECKPOINT_RULES` need be broken. So we
    also test whether any chain was masked for this reason.
    """
    return bool(result.num_diverged_down) or not set(result.judgement.broken).isdisjoint(CHECKPOINT_RULES)


def slower_than(point: SearchPoint) -> SearchPoint:
    """Return the same settings with a third of the lr and chains three times as long."""
    return point._replace(stage=RATES, lr=round_to(point.lr / _SLOWER), slowness=_SLOWER * point.slowness)


def num_draws(result: LLCResult, configured: int) -> int:
    """Return the number of draws that gives an effective sample size of about `MIN_ESS`.

    The number is rounded up to a multiple of 50. If `configured` is larger, `configured` is returned.
    """
    needed = result.settings.num_draws * MIN_ESS / result.ess if result.ess > 0 else 0.0
    return max(configured, 50 * math.ceil(needed / 50))


def is_healthy(result: LLCResult, but: Collection[str] = LENGTH_RULES) -> bool:
    """Return whether an estimate breaks no rules of the verdict except those in `but`: by default, the rules about the chains' length."""
    return set(result.judgement.broken) <= set(but)


def agree(first: LLCResult, second: LLCResult) -> bool:
    """Return whether two estimates agree in the sense of `AGREEMENT`."""
    difference = abs(first.llc - second.llc)
    errors, share = AGREEMENT
    return difference <= max(errors * math.hypot(first.stderr, second.stderr), share * abs(first.llc))


def on_plateau(first: LLCResult, slower: LLCResult) -> bool:
    """Return whether the estimates at lr and lr / 3 lie on a plateau in the sense of `PLATEAU`."""
    return abs(first.llc - slower.llc) <= math.hypot(first.stderr, slower.stderr) + PLATEAU * abs(slower.llc)


def extrapolated(first: LLCResult, slower: LLCResult) -> tuple[float, float]:
    """Extrapolate the LLCs at lr and lr / 3 to lr = 0 (Richardson), and return the value and its standard error.

    The bias is assumed to be proportional to lr.
    """
    weight = _SLOWER / (_SLOWER - 1)
    value = weight * slower.llc - (weight - 1) * first.llc
    return value, math.hypot(weight * slower.stderr, (weight - 1) * first.stderr)


def burnin(result: LLCResult) -> int:
    """Return 1.5 times the number of moves until the chains' mean loss is within two standard deviations of its later level."""
    # Draws are `thinning` moves apart, so the trace has one entry for every `thinning` moves.
    trace = (
        torch.cat([result.burnin_trace[:, :: result.settings.thinning], result.loss_trace], dim=1).nanmean(0).numpy()
    )
    width = max(len(trace) // 20, 1)
    windows = trace[: len(trace) // width * width].reshape(-1, width).mean(1)
    later = windows[len(windows) // 2 :]
    is_level = np.abs(windows - later.mean()) <= 2 * max(later.std(ddof=1) if len(later) > 1 else 0.0, 1e-12)
    first = int(np.argmax(is_level)) if is_level.any() else len(windows) // 2
    return max(10, 10 * math.ceil(1.5 * (first + 1) * width * result.settings.thinning / 10))


def round_to(value: float, digits: int = 2) -> float:
    """Round a setting to significant digits, so that it is easy to read."""
    return float(f"{value:.{digits}g}")


def _has_plateau(trial: Trial, trials: Sequence[Trial]) -> bool:
    """Return whether a trial's estimate agrees with the estimate at the next smaller or larger nbeta and the same ratio."""
    same = sorted((other for other in trials if other.point.ratio == trial.point.ratio), key=lambda t: t.point.nbeta)
    index = same.index(trial)
    neighbours = [*same[max(index - 1, 0) : index], *same[index + 1 : index + 2]]
    return any(other.last.verdict != "invalid" and agree(trial.last, other.last) for other in neighbours)


def _line(number: int, trial: Trial) -> str:
    point, last = trial.point, trial.last
    verdicts = ", ".join("healthy" if is_healthy(result) else result.verdict for result in trial.results)
    why = "" if is_healthy(last) else f" ({last.reasons[0].removeprefix('note: ').split(':')[0]})"
    return (
        f"{number:3d}  nbeta {point.nbeta:<8.3g} localization {point.localization:<8.3g} lr {point.lr:<8.2g} "
        f"LLC {last.llc:.4g} ± {last.stderr:.2g}  {verdicts}{why}"
    )
