"""The search for lr, nbeta, localization and burn-in, of any loss, by a stated rule.

Near a minimum with curvatures h the LLC is about sum of (1/2) h / (h + ratio), ratio = localization / nbeta, whatever nbeta:
the ratio says which directions count, and a change with nbeta at one ratio says that the chains do not sample one basin
(too hot) or that minibatch noise heats them (too cold). And a step is stable up to lr (nbeta h_max + localization) = 4. So the
search is over nbeta, in units of one over the height of a trivial predictor's loss above the checkpoint's; over the
ratio, in units of the largest curvature; and over lr, in units of the stability limit.

Chains must be long enough for the localisation to fill flat directions: their variance is 1 - exp(-lr localization t) of
what it becomes, and no direction is slower. At a stable lr that takes some 1 / ratio moves; shorter chains give too small an
LLC at every nbeta and lr alike, so that no plateau shows it.
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
"""Times one over the height of the trivial predictor's loss above the last checkpoint's."""
RATIOS = (0.01, 0.03, 0.1)
"""Times the largest curvature at the last checkpoint; the smallest decides how long chains must be, see `filling`."""
STEP = 1.5
"""lr (nbeta h_max + localization) of the survey; 4 is unstable."""
AGREEMENT = (3.0, 0.1)
"""Two estimates agree if they differ by at most so many joint standard errors or such a share."""
MIN_ESS = 200.0
"""That the chosen number of draws aims at; the verdict asks for 100."""
OF_LENGTH = ("r hat", "effective sample size", "not significant")
"""Rules that longer chains may satisfy."""
OF_LR = ("too hot",)
"""Rules that a smaller lr may satisfy, for which the search has a stage of its own."""
OF_CHECKPOINT = ("negative", "not at a minimum", "lower loss at mean", "diverged down", "lower loss found")
"""Rules that a checkpoint beside its minimum breaks under most settings."""
_LATER = (*OF_LENGTH, *OF_LR)  # what the survey leaves to later stages
SURVEY, RATES, CONFIRMATION = "nbeta, localization", "lr", "confirmation"
"""The stages of a search."""
_SLOWER = 3
_MAX_DRAWS = 60  # of the survey's chains, and of the batches for the checkpoint's own loss, which all corners share
_MAX_INIT_BATCHES = 256

RULE = f"""\
The rule: at a few checkpoints, nbeta is searched over {", ".join(f"{x:g}" for x in NBETAS)} / (trivial loss - checkpoint's loss) and the ratio
localization / nbeta over {", ".join(f"{x:g}" for x in RATIOS)} of the largest curvature, at lr = {STEP:g} / (nbeta curvature + localization).
1. Healthy at the last checkpoint: nothing escaped, diverged or drifted; nothing is said against the estimate but
   heat, which is left to 4, and the shortness of the search's chains (R-hat, effective sample size). Their burn-in is 2 / (lr localization) moves, in
   which flat directions fill to 86% of the width that the localisation allows.
2. Plateau in nbeta: its estimate agrees with that of the next nbeta, larger or smaller, at the same ratio
   ({AGREEMENT[0]:g} standard errors or {AGREEMENT[1]:.0%}).
3. Of these, the most healthy checkpoints; then the smallest ratio (most directions); then the smallest nbeta (least noise).
4. Plateau in lr, at the last checkpoint: the chains are not too hot, and a third of lr, with chains three times as long,
   agrees; if not, that third is tried likewise.
5. Burn-in: one and a half times as long as the chains' mean loss takes to reach its later level, and no shorter than
   3 / (lr localization). Draws: no fewer than were asked for, and enough for an effective sample size of {MIN_ESS:g}.
Chains of the search share minibatches and noise, draw by draw: differences between settings are those of the settings.
The choice is confirmed by chains of its own length and of the next `seed`, so that it was not chosen by what confirms it;
it is taken if their verdict at the last checkpoint is ok."""


class Corner(NamedTuple):
    """One place of the search."""

    stage: str
    nbeta: float
    ratio: float
    lr: float
    filling: int
    """Moves in which flat directions fill to 86%; the burn-in."""
    slowness: int = 1
    """How many times as long the chains are."""

    @property
    def localization(self) -> float:
        """The pull."""
        return round_to(self.nbeta * self.ratio, digits=6)

    def sampler(self, base: SamplerConfig) -> SamplerConfig:
        """The settings of its chains."""
        return dataclasses.replace(
            base,
            lr=self.lr,
            nbeta=self.nbeta,
            localization=self.localization,
            num_draws=self.slowness * min(base.num_draws, _MAX_DRAWS),
            num_burnin_steps=self.slowness * self.filling,
            num_init_batches=min(base.num_init_batches, _MAX_INIT_BATCHES),
        )


class Tried(NamedTuple):
    """What came out at a corner: an estimate for each checkpoint it was tried at, the last one's last."""

    corner: Corner
    results: list[LLCResult]

    @property
    def last(self) -> LLCResult:
        """At the last checkpoint."""
        return self.results[-1]

    @property
    def num_healthy(self) -> int:
        """At how many checkpoints the chains are healthy, whatever their heat."""
        return sum(is_healthy(result, but=_LATER) for result in self.results)


Estimate = Callable[[Sequence[Corner]], list[list[LLCResult]]]
"""The estimates at some corners whose chains are equally long, each corner's last checkpoint last."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """All that was tried, and the choice."""

    tried: list[Tried]
    chosen: Tried | None
    num_burnin_steps: int
    plateau: frozenset[int]
    """Numbers of corners with a plateau in nbeta."""
    reason: str
    """Why this one, or why none."""


def survey(*, height: float, curvature: float) -> list[Corner]:
    """Where the search begins: every nbeta at every ratio, with a stable lr.

    Args:
        height: Of a trivial predictor's loss above the last checkpoint's.
        curvature: The largest at the last checkpoint.
    """
    corners = []
    for share, nbeta in itertools.product(RATIOS, NBETAS):
        nbeta, ratio = round_to(nbeta / max(height, 1e-3)), round_to(share * curvature)
        lr = round_to(STEP / (nbeta * (curvature + ratio)))
        corners.append(Corner(SURVEY, nbeta, ratio, lr, filling(share)))
    return corners


def filling(share: float) -> int:
    """2 / (lr localization) in tens, where localization / nbeta is that share of the largest curvature."""
    return 10 * math.ceil(2 * (1 + share) / (STEP * share) / 10)


def search(
    estimate: Estimate, *, height: float, curvature: float, say: Callable[[str], None] = lambda line: None
) -> Search:
    """The search itself: the survey, all corners of a ratio in one go, and then the plateau in lr.

    Args:
        estimate: The estimates at some corners; those of the stage `lr` are looked at at the last checkpoint only.
        height: As for `survey`.
        curvature: As for `survey`.
        say: Told of every corner.
    """
    tried: list[Tried] = []

    def attempt(*corners: Corner) -> Tried:
        for corner, results in zip(corners, estimate(corners), strict=True):
            tried.append(Tried(corner, results))
            say(_line(len(tried) - 1, tried[-1]))
        return tried[-1]

    for _, corners in itertools.groupby(survey(height=height, curvature=curvature), lambda corner: corner.ratio):
        attempt(*corners)
    plateau = frozenset(i for i, one in enumerate(tried) if _has_plateau(one, tried))
    healthy = [one for i, one in enumerate(tried) if is_healthy(one.last, but=_LATER) and i in plateau]
    if not healthy:
        some = sum(is_healthy(one.last, but=_LATER) for one in tried)
        reason = f"No choice: {some} of {len(tried)} settings are healthy at the last checkpoint, none of them on a plateau in nbeta."
        beside = sum(not _broken(one.last).isdisjoint(OF_CHECKPOINT) for one in tried)
        if beside > len(tried) / 2:
            reason += f" Under {beside} the checkpoint is not at a minimum, which settings do not mend: let --steps end at one that is."
        return Search(tried=tried, chosen=None, num_burnin_steps=0, plateau=plateau, reason=reason)
    best = min(healthy, key=lambda one: (-one.num_healthy, one.corner.ratio, one.corner.nbeta))
    attempt(best.corner._replace(stage=RATES, lr=round_to(10 * best.corner.lr)))  # what failure looks like
    for _ in range(2):
        slower = attempt(slower_than(best.corner))
        if is_healthy(best.last) and agree(best.last, slower.last):
            reason = f"Chosen: corner {tried.index(best)}; a third of its lr gives {slower.last.llc:.4g} ± {slower.last.stderr:.2g}."
            steps = max(burnin(best.last), 3 * best.corner.slowness * best.corner.filling // 2)
            return Search(tried=tried, chosen=best, num_burnin_steps=steps, plateau=plateau, reason=reason)
        best = slower
    reason = "No choice: the estimate goes on changing as lr falls; try a larger batch, or a larger localization."
    return Search(tried=tried, chosen=None, num_burnin_steps=0, plateau=plateau, reason=reason)


def slower_than(corner: Corner) -> Corner:
    """The same with a third of its lr and chains three times as long."""
    return corner._replace(stage=RATES, lr=round_to(corner.lr / _SLOWER), slowness=_SLOWER * corner.slowness)


def num_draws(result: LLCResult, asked: int) -> int:
    """No fewer draws than were asked for, and enough for an effective sample size of `MIN_ESS`, in fifties."""
    needed = result.settings.num_draws * MIN_ESS / result.ess if result.ess > 0 else 0.0
    return max(asked, 50 * math.ceil(needed / 50))


def is_healthy(result: LLCResult, but: Collection[str] = OF_LENGTH) -> bool:
    """Whether nothing is said against an estimate but by rules of these names, those of the length of its chains."""
    return _broken(result) <= set(but)


def agree(one: LLCResult, other: LLCResult) -> bool:
    """Whether two estimates are the same, within their errors or a share."""
    difference = abs(one.llc - other.llc)
    errors, share = AGREEMENT
    return difference <= max(errors * math.hypot(one.stderr, other.stderr), share * abs(one.llc))


def burnin(result: LLCResult) -> int:
    """Moves after which the chains' mean loss is within two standard errors of its later level, and half as many more."""
    trace = torch.cat([result.burnin_trace, result.loss_trace], dim=1).nanmean(0).numpy()
    width = max(len(trace) // 20, 1)
    windows = trace[: len(trace) // width * width].reshape(-1, width).mean(1)
    later = windows[len(windows) // 2 :]
    settled = np.abs(windows - later.mean()) <= 2 * max(later.std(ddof=1) if len(later) > 1 else 0.0, 1e-12)
    first = int(np.argmax(settled)) if settled.any() else len(windows) // 2
    return max(10, 10 * math.ceil(1.5 * (first + 1) * width / 10))


def round_to(value: float, digits: int = 2) -> float:
    """To significant digits, so that settings can be read."""
    return float(f"{value:.{digits}g}")


def _broken(result: LLCResult) -> set[str]:
    """The names of the rules that speak against an estimate."""
    return set(result.judgement.broken)


def _has_plateau(one: Tried, tried: Sequence[Tried]) -> bool:
    same = sorted((t for t in tried if t.corner.ratio == one.corner.ratio), key=lambda t: t.corner.nbeta)
    place = same.index(one)
    neighbours = [*same[max(place - 1, 0) : place], *same[place + 1 : place + 2]]
    return any(t.last.verdict != "invalid" and agree(one.last, t.last) for t in neighbours)


def _line(number: int, tried: Tried) -> str:
    corner, last = tried.corner, tried.last
    verdicts = ", ".join("healthy" if is_healthy(result) else result.verdict for result in tried.results)
    why = "" if is_healthy(last) else f" ({last.reasons[0].removeprefix('note: ').split(':')[0]})"
    return (
        f"{number:3d}  nbeta {corner.nbeta:<8.3g} localization {corner.localization:<8.3g} lr {corner.lr:<8.2g} "
        f"LLC {last.llc:.4g} ± {last.stderr:.2g}  {verdicts}{why}"
    )
