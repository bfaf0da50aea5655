"""Search for lr, nbeta, localization and burn-in of any loss, by a stated rule.

Near a minimum with curvatures h the LLC is about the sum of (1/2) h / (h + ratio), with ratio = localization / nbeta, whatever nbeta
is. So the ratio decides which directions count. If the LLC changes with nbeta at the same ratio, either the chains leave the basin
(nbeta too small), or minibatch noise moves them too much (nbeta too large). A step is stable up to
lr (nbeta h_max + localization) = 4. So we search over nbeta, in units of one over the height of a trivial predictor's loss above the
checkpoint's; over the ratio, in units of the largest curvature; and over lr, in units of the stability limit.

Chains must be long enough to fill flat directions as far as the localisation allows. Their variance is 1 - exp(-lr localization t) of
its final value, and no direction is slower. At a stable lr this takes about 1 / ratio moves. Shorter chains give too small an
LLC at every nbeta and lr alike, so a plateau would not show it.
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
"""Values of nbeta times the height of the trivial predictor's loss above the last checkpoint's."""
RATIOS = (0.01, 0.03, 0.1)
"""Ratios localization / nbeta by the largest curvature at the last checkpoint; the smallest needs the longest chains."""
STEP = 1.5
"""lr (nbeta h_max + localization) of the survey; 4 is unstable."""
AGREEMENT = (3.0, 0.1)
"""Two estimates agree if they differ by at most this many joint standard errors, or by at most this share."""
PLATEAU = 0.03
"""Estimates at lr and at a third of it lie on a plateau if they differ by at most one joint standard error and this share."""
MIN_ESS = 300.0
"""Effective sample size for which the number of draws is chosen; the verdict requires 200."""
LENGTH_RULES = ("r hat", "effective sample size", "not significant")
"""Rules of the verdict that longer chains may satisfy."""
LR_RULES = ("step size bias",)
"""Rules of the verdict that a smaller lr may satisfy, for which the search has its own stage."""
CHECKPOINT_RULES = ("negative", "not at a minimum", "lower loss at mean", "diverged down", "lower loss found")
"""Rules of the verdict that a checkpoint beside its minimum breaks under most settings."""
_LATER_RULES = (*LENGTH_RULES, *LR_RULES)  # later stages than the survey decide about these
SURVEY, RATES, CONFIRMATION = "nbeta, localization", "lr", "confirmation"
"""The stages of a search."""
_SLOWER = 3
_MAX_DRAWS = 60
"""Largest number of draws of each chain in the survey."""
_MAX_INIT_BATCHES = 256
"""Largest number of batches for the checkpoint's own loss, which all settings share."""

RULE = f"""\
The rule: at a few checkpoints we search over nbeta = {", ".join(f"{x:g}" for x in NBETAS)} / (trivial loss - checkpoint's loss) and over
the ratio localization / nbeta = {", ".join(f"{x:g}" for x in RATIOS)} of the largest curvature, at lr = {STEP:g} / (nbeta curvature + localization).
1. The last checkpoint must be healthy: no rule of the verdict is broken, except for the bias of the step size (see 4) and the
   shortness of the search's chains (R-hat, effective sample size). Burn-in is 2 / (lr localization) moves of SGLD, in which flat
   directions fill to 86% of the width that the localisation allows; `baoab` with friction c needs (1 - c) / (1 + c) of that.
2. Plateau in nbeta: the estimate must agree with that of the next smaller or larger nbeta at the same ratio (within
   {AGREEMENT[0]:g} standard errors or {AGREEMENT[1]:.0%}).
3. Of these we take the settings with the most healthy checkpoints, then the smallest ratio (most directions), then the
   smallest nbeta (least noise).
4. Plateau in lr, at the last checkpoint: the bias of the step size must be small, and a third of lr, with chains three times as
   long, must give the same estimate up to one joint standard error and {PLATEAU:.0%}. If not, that third is tried in the same way.
5. Burn-in: one and a half times as long as the chains' mean loss takes to reach its later level, and at least one and a half
   times that of the search. Draws: at least as many as configured, and enough for an effective sample size of {MIN_ESS:g}.
All chains of the search use the same minibatches and noise, so differences between estimates are due to the settings.
Chains of the chosen length and of the next `seed` then confirm the choice. It is accepted if their verdict at the last
checkpoint is ok."""


class SearchPoint(NamedTuple):
    """Settings that the search tries."""

    stage: str
    nbeta: float
    ratio: float
    """localization / nbeta."""
    lr: float
    filling: int
    """Number of moves in which flat directions fill to 86%; the burn-in."""
    slowness: int = 1
    """Factor by which the chains are longer than in the survey."""

    @property
    def localization(self) -> float:
        """Pull gamma back to the checkpoint."""
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
    """Settings with their estimates, one for each checkpoint; that of the last checkpoint comes last."""

    point: SearchPoint
    results: list[LLCResult]

    @property
    def last(self) -> LLCResult:
        """The estimate at the last checkpoint."""
        return self.results[-1]

    @property
    def num_healthy(self) -> int:
        """Number of checkpoints that are healthy, apart from the rules of later stages."""
        return sum(is_healthy(result, but=_LATER_RULES) for result in self.results)


Estimate = Callable[[Sequence[SearchPoint]], list[list[LLCResult]]]
"""Function that estimates under several settings with equally long chains; each list ends with the last checkpoint."""


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """All trials and the choice."""

    trials: list[Trial]
    reason: str
    """Why these settings were chosen, or why none were."""
    plateau: frozenset[int]
    """Numbers of the trials with a plateau in nbeta."""
    chosen: Trial | None = None
    num_burnin_steps: int = 0


def survey(*, height: float, curvature: float, speed: float = 1.0) -> list[SearchPoint]:
    """Return the settings that are tried first: every nbeta at every ratio, with a stable lr.

    Args:
        height: Height of a trivial predictor's loss above the last checkpoint's.
        curvature: The largest curvature at the last checkpoint.
        speed: Factor by which the chains fill flat directions faster than SGLD does (`ChainsConfig.speed`).
    """
    points = []
    for share, nbeta in itertools.product(RATIOS, NBETAS):
        nbeta, ratio = round_to(nbeta / max(height, 1e-3)), round_to(share * curvature)
        lr = round_to(STEP / (nbeta * (curvature + ratio)))
        filling = 10 * math.ceil(2 * (1 + share) / (STEP * share * speed) / 10)  # in tens
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
    """Search: the survey, all settings of a ratio in one go, and then the plateau in lr.

    Args:
        estimate: Returns the estimates under some settings; for the stage `lr` only that of the last checkpoint is used.
        height: As for `survey`.
        curvature: As for `survey`.
        speed: As for `survey`.
        say: Called with a line about every trial.
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
    attempt(best.point._replace(stage=RATES, lr=round_to(10 * best.point.lr)))  # shows what failure looks like
    for _ in range(2):
        slower = attempt(slower_than(best.point))
        if is_healthy(best.last) and on_plateau(best.last, slower.last):
            limit, error = extrapolated(best.last, slower.last)
            reason = (
                f"Chosen: setting {trials.index(best)}; a third of its lr gives {slower.last.llc:.4g} ± {slower.last.stderr:.2g}, "
                f"extrapolated to lr = 0 {limit:.4g} ± {error:.2g}."
            )
            steps = max(burnin(best.last), 3 * best.point.slowness * best.point.filling // 2)
            return SearchResult(trials=trials, plateau=plateau, reason=reason, chosen=best, num_burnin_steps=steps)
        best = slower
    reason = "No choice: the estimate still changes as lr falls. Try larger batches, or a larger localization."
    return SearchResult(trials=trials, plateau=plateau, reason=reason)


def _why_none(trials: Sequence[Trial], num_healthy: int) -> str:
    """Return why the survey has no candidate, and what to do if the checkpoint is the cause."""
    reason = (
        f"No choice: {num_healthy} of {len(trials)} settings are healthy at the last checkpoint, "
        "and none of these is on a plateau in nbeta."
    )
    num_beside = sum(not set(trial.last.judgement.broken).isdisjoint(CHECKPOINT_RULES) for trial in trials)
    if num_beside <= len(trials) / 2:
        return reason
    return (
        f"{reason} Under {num_beside} the checkpoint is not at a minimum, which no settings can change: "
        "choose --steps that end at a checkpoint at a minimum."
    )


def slower_than(point: SearchPoint) -> SearchPoint:
    """Return the same settings with a third of the lr and chains three times as long."""
    return point._replace(stage=RATES, lr=round_to(point.lr / _SLOWER), slowness=_SLOWER * point.slowness)


def num_draws(result: LLCResult, configured: int) -> int:
    """Return a multiple of 50 draws with an effective sample size of `MIN_ESS`, or the configured number if that is larger."""
    needed = result.settings.num_draws * MIN_ESS / result.ess if result.ess > 0 else 0.0
    return max(configured, 50 * math.ceil(needed / 50))


def is_healthy(result: LLCResult, but: Collection[str] = LENGTH_RULES) -> bool:
    """Return whether an estimate breaks no rule of the verdict but those named, by default those of the chains' length."""
    return set(result.judgement.broken) <= set(but)


def agree(first: LLCResult, second: LLCResult) -> bool:
    """Return whether two estimates differ by no more than their errors, or by no more than a small share."""
    difference = abs(first.llc - second.llc)
    errors, share = AGREEMENT
    return difference <= max(errors * math.hypot(first.stderr, second.stderr), share * abs(first.llc))


def on_plateau(first: LLCResult, slower: LLCResult) -> bool:
    """Return whether the estimates at lr and at a third of it differ by at most one joint error and `PLATEAU`."""
    return abs(first.llc - slower.llc) <= math.hypot(first.stderr, slower.stderr) + PLATEAU * abs(slower.llc)


def extrapolated(first: LLCResult, slower: LLCResult) -> tuple[float, float]:
    """Return the LLC at lr = 0 and its error from those at lr and at a third of it, for a bias proportional to lr (Richardson)."""
    weight = _SLOWER / (_SLOWER - 1)
    value = weight * slower.llc - (weight - 1) * first.llc
    return value, math.hypot(weight * slower.stderr, (weight - 1) * first.stderr)


def burnin(result: LLCResult) -> int:
    """Return 1.5 times the moves after which the chains' mean loss is within two standard errors of its later level."""
    trace = torch.cat([result.burnin_trace, result.loss_trace], dim=1).nanmean(0).numpy()
    width = max(len(trace) // 20, 1)
    windows = trace[: len(trace) // width * width].reshape(-1, width).mean(1)
    later = windows[len(windows) // 2 :]
    is_level = np.abs(windows - later.mean()) <= 2 * max(later.std(ddof=1) if len(later) > 1 else 0.0, 1e-12)
    first = int(np.argmax(is_level)) if is_level.any() else len(windows) // 2
    return max(10, 10 * math.ceil(1.5 * (first + 1) * width / 10))


def round_to(value: float, digits: int = 2) -> float:
    """Round to significant digits, so that people can read the settings."""
    return float(f"{value:.{digits}g}")


def _has_plateau(trial: Trial, trials: Sequence[Trial]) -> bool:
    """Return whether the estimate agrees with that of the next smaller or larger nbeta at the same ratio."""
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
