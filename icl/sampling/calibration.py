"""Which lr, nbeta, localization and burn-in to sample with: a search over a few checkpoints by a stated rule.

Near a minimum with curvatures h the LLC is about sum of (1/2) h / (h + ratio), ratio = localization / nbeta, whatever nbeta:
the ratio says which directions count, and a change with nbeta at one ratio says that the chains do not sample one basin
(too hot) or that minibatch noise heats them (too cold). And a step is stable up to lr (nbeta h_max + localization) = 4. So the
search is over nbeta, in units of one over the height of a trivial predictor's loss above the checkpoint's; over the
ratio, in units of the largest curvature; and over lr, in units of the stability limit.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import yaml

from icl.checkpoints import Checkpoint, load_same_run
from icl.config import SamplerConfig
from icl.population import Params
from icl.sampling.batches import Batch, stack_batches
from icl.sampling.diagnostics import RULES
from icl.sampling.gradients import Gradient
from icl.sampling.prompt_loss import prompt_loss
from icl.sampling.records import Kind, Record, make_record
from icl.sampling.result import LLCResult
from icl.sampling.run import chosen_files, estimate_checkpoints, num_moves, run_files, sampling_device

NBETAS = (300.0, 1000.0, 3000.0)
"""Times one over the height of the trivial predictor's loss above the last checkpoint's."""
RATIOS = (0.003, 0.01, 0.03)
"""Times the largest curvature at the last checkpoint."""
STEP = 1.5
"""lr (nbeta h_max + localization) of the survey; 4 is unstable."""
PLACES = (0.2, 0.5, 1.0)
"""Of the last step: where in training the search looks, if nothing else is said."""
AGREEMENT = (3.0, 0.1)
"""Two estimates agree if they differ by at most so many joint standard errors or such a share."""
MIN_ESS = 200.0
"""That the chosen number of draws aims at; the verdict asks for 100."""
OF_LENGTH = ("R-hat", "effective sample size")
"""Rules that longer chains may satisfy."""
_POWER_ITERATIONS = 10
_MAX_DRAWS = 60  # of the survey's chains, and of the batches for the checkpoint's own loss, which all corners share
_MAX_INIT_BATCHES = 256

RULE = f"""\
The rule: at a few checkpoints, nbeta is searched over {", ".join(f"{x:g}" for x in NBETAS)} / (trivial loss - checkpoint's loss) and the ratio
localization / nbeta over {", ".join(f"{x:g}" for x in RATIOS)} of the largest curvature, at lr = {STEP:g} / (nbeta curvature + localization).
1. Healthy at the last checkpoint: nothing escaped, diverged, drifted or heated; nothing is said against the estimate but
   the shortness of the search's chains (R-hat, effective sample size).
2. Plateau in nbeta: its estimate agrees with that of the next nbeta, larger or smaller, at the same ratio
   ({AGREEMENT[0]:g} standard errors or {AGREEMENT[1]:.0%}).
3. Of these, the most healthy checkpoints; then the smallest ratio (most directions); then the smallest nbeta (least noise).
4. Plateau in lr: a third of it, with chains three times as long, agrees; if not, that third is tried likewise.
5. Burn-in: one and a half times as long as the chains' mean loss takes to reach its later level. Draws: no fewer than were
   asked for, and enough for an effective sample size of {MIN_ESS:g}.
The choice is confirmed by chains of that length, and taken if their verdict at the last checkpoint is ok."""


class Corner(NamedTuple):
    """One place of the search."""

    stage: str
    nbeta: float
    ratio: float
    lr: float
    slowness: int = 1
    """How many times as long the chains are."""

    @property
    def localization(self) -> float:
        """The pull."""
        return round_to(self.nbeta * self.ratio)

    def sampler(self, base: SamplerConfig) -> SamplerConfig:
        """The settings of its chains."""
        return dataclasses.replace(
            base,
            lr=self.lr,
            nbeta=self.nbeta,
            localization=self.localization,
            num_draws=self.slowness * min(base.num_draws, _MAX_DRAWS),
            num_burnin_steps=self.slowness * min(base.num_draws, _MAX_DRAWS),
            num_init_batches=min(base.num_init_batches, _MAX_INIT_BATCHES),
        )


class Tried(NamedTuple):
    """What came out at a corner: an estimate for each checkpoint, the last one's last."""

    corner: Corner
    results: list[LLCResult]

    @property
    def last(self) -> LLCResult:
        """At the last checkpoint."""
        return self.results[-1]

    @property
    def num_healthy(self) -> int:
        """At how many checkpoints the chains are healthy."""
        return sum(is_healthy(result) for result in self.results)


Estimate = Callable[[Corner], list[LLCResult]]


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


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The search of a run, as it is written."""

    table: pd.DataFrame
    """A row for each corner and checkpoint."""
    traces: dict[int, Record]
    """At the last checkpoint by corner: the chosen one first, then failed ones."""
    chosen: SamplerConfig | None
    summary: str

    def as_yaml(self) -> str:
        """The chosen settings, as `icl llc --config` takes them."""
        assert self.chosen is not None
        fields = dataclasses.asdict(self.chosen)
        return yaml.safe_dump({"sampler": {name: fields[name] for name in fields if name != "steps"}}, sort_keys=False)


def calibrate(
    path: str | Path, sampler: SamplerConfig | None = None, *, say: Callable[[str], None] = lambda line: None
) -> Calibration:
    """Search the settings for a run, by `RULE`.

    Args:
        path: The run's folder.
        sampler: What is not searched: batch size, chains, draws; `steps` other than `all` are the checkpoints.
        say: Told of every corner.

    Raises:
        CheckpointError: If there is no usable checkpoint.
    """
    files, config = run_files(path)
    sampler = config.sampler if sampler is None else sampler
    files = chosen_files(files, _default_steps(files) if sampler.steps == "all" else sampler.steps)
    checkpoints = [load_same_run(file, config) for file in files]
    device = sampling_device()
    survey = len(NBETAS) * len(RATIOS) * len(files)
    one = num_moves(Corner("nbeta, localization", 1.0, 1.0, 1.0).sampler(sampler))
    loss = prompt_loss(config, sampler, device=device, num_moves=survey * one)
    batches = [loss.batches(0, draw) for draw in range(4)]
    params = {name: tensor.to(device) for name, tensor in checkpoints[-1].params.items()}
    curvature = largest_curvature(loss.gradient, params, batches)
    with torch.no_grad():
        height = loss.trivial_loss - float(torch.stack([loss.loss(params, batch).mean() for batch in batches]).mean())
    steps = ", ".join(f"{checkpoint.step:,}" for checkpoint in checkpoints)
    say(
        f"Checkpoints {steps}; largest curvature {curvature:.3g}; predicting zero costs {height:.3g} more than the last."
    )

    def estimate(corner: Corner) -> list[LLCResult]:
        return estimate_checkpoints(checkpoints, corner.sampler(sampler), loss, device=device)

    found = search(estimate, height=height, curvature=curvature, say=say)
    return _finish(found, sampler, checkpoints, lambda own: estimate_checkpoints(checkpoints, own, loss, device=device))


def search(
    estimate: Estimate, *, height: float, curvature: float, say: Callable[[str], None] = lambda line: None
) -> Search:
    """The search itself, for any loss.

    Args:
        estimate: The estimates at a corner, the last checkpoint's last.
        height: Of a trivial predictor's loss above the last checkpoint's.
        curvature: The largest at the last checkpoint.
        say: Told of every corner.
    """
    tried: list[Tried] = []

    def attempt(corner: Corner) -> Tried:
        tried.append(Tried(corner, estimate(corner)))
        say(_line(len(tried) - 1, tried[-1]))
        return tried[-1]

    height = max(height, 1e-3)
    for nbeta, ratio in itertools.product(NBETAS, RATIOS):
        nbeta, ratio = round_to(nbeta / height), round_to(ratio * curvature)
        attempt(Corner("nbeta, localization", nbeta, ratio, round_to(STEP / (nbeta * (curvature + ratio)))))
    plateau = frozenset(i for i, one in enumerate(tried) if _has_plateau(one, tried))
    healthy = [one for i, one in enumerate(tried) if is_healthy(one.last) and i in plateau]
    if not healthy:
        some = sum(is_healthy(one.last) for one in tried)
        reason = f"No choice: {some} of {len(tried)} settings are healthy at the last checkpoint, none of them on a plateau in nbeta."
        return Search(tried=tried, chosen=None, num_burnin_steps=0, plateau=plateau, reason=reason)
    best = min(healthy, key=lambda one: (-one.num_healthy, one.corner.ratio, one.corner.nbeta))
    attempt(best.corner._replace(stage="lr", lr=round_to(10 * best.corner.lr)))  # what failure looks like
    for _ in range(2):
        corner = best.corner
        slower = attempt(corner._replace(stage="lr", lr=round_to(corner.lr / 3), slowness=3 * corner.slowness))
        if is_healthy(best.last) and agree(best.last, slower.last):
            reason = f"Chosen: corner {tried.index(best)}; a third of its lr gives {slower.last.llc:.4g} ± {slower.last.stderr:.2g}."
            return Search(tried=tried, chosen=best, num_burnin_steps=burnin(best.last), plateau=plateau, reason=reason)
        best = slower
    reason = "No choice: the estimate goes on changing as lr falls; try a larger batch, or a larger localization."
    return Search(tried=tried, chosen=None, num_burnin_steps=0, plateau=plateau, reason=reason)


def is_healthy(result: LLCResult) -> bool:
    """Whether nothing is said against an estimate but the length of its chains."""
    broken = {rule.name for rule in RULES if rule.level != "note" and rule.is_broken(result.evidence, rule.threshold)}
    return broken <= set(OF_LENGTH)


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


def largest_curvature(gradient: Gradient, params: Params, batches: Sequence[Batch]) -> float:
    """The largest Hessian eigenvalue of the mean loss over some batches, by power iteration on differences of gradients."""
    members = {name: tensor.unsqueeze(0).float() for name, tensor in params.items()}
    device = next(iter(params.values())).device

    def mean_gradient(at: Params) -> Params:
        found = [gradient(at, {}, stack_batches([batch], device))[0] for batch in batches]
        return {name: torch.stack([one[name] for one in found]).mean(0) for name in at}

    here = mean_gradient(members)
    generator = torch.Generator().manual_seed(0)
    direction = {name: torch.randn(tensor.shape, generator=generator).to(device) for name, tensor in members.items()}
    curvature = 0.0
    for _ in range(_POWER_ITERATIONS):
        norm = math.sqrt(sum(float(tensor.square().sum()) for tensor in direction.values()))
        if norm == 0:
            break
        direction = {name: tensor / norm for name, tensor in direction.items()}
        there = mean_gradient({name: members[name] + 1e-2 * direction[name] for name in members})
        product = {name: (there[name] - here[name]) / 1e-2 for name in members}
        curvature = sum(float((product[name] * direction[name]).sum()) for name in members)
        direction = product
    return max(abs(curvature), 1e-6)


def round_to(value: float, digits: int = 2) -> float:
    """To significant digits, so that settings can be read."""
    return float(f"{value:.{digits}g}")


def _finish(
    found: Search,
    sampler: SamplerConfig,
    checkpoints: Sequence[Checkpoint],
    estimate: Callable[[SamplerConfig], list[LLCResult]],
) -> Calibration:
    """Confirm the choice with chains of full length, and write all down."""
    tried, reason, chosen = list(found.tried), found.reason, None
    if found.chosen is not None:
        corner = found.chosen.corner
        short = found.chosen.last
        needed = short.settings.num_draws * MIN_ESS / short.ess if short.ess > 0 else 0.0
        draws = max(sampler.num_draws, 50 * math.ceil(needed / 50))
        chosen = dataclasses.replace(
            corner.sampler(sampler),
            num_draws=draws,
            num_burnin_steps=found.num_burnin_steps,
            num_init_batches=sampler.num_init_batches,
            steps="all",
        )
        confirmed = Tried(corner._replace(stage="confirmation"), estimate(chosen))
        tried.append(confirmed)
        last = confirmed.last
        reason += f"\nAt full length: LLC {last.llc:.4g} ± {last.stderr:.2g}, {last.verdict}."
        if last.verdict != "ok":
            reason += f" Not taken: {'; '.join(last.reasons)}."
            chosen = None
    picked = len(tried) - 1 if found.chosen is not None else None
    rows = [
        _row(i, one, result, checkpoint.step, found, picked if chosen else None, sampler)
        for i, one in enumerate(tried)
        for result, checkpoint in zip(one.results, checkpoints, strict=True)
    ]
    failed = sorted(
        (i for i, one in enumerate(tried) if not is_healthy(one.last)),
        key=lambda i: (tried[i].last.verdict != "invalid", tried[i].corner.stage != "lr"),
    )
    shown = [*([picked] if chosen and picked is not None else []), *failed[:3]]
    traces = {i: make_record(tried[i].last, Kind(tried[i].corner.sampler(sampler))) for i in shown}
    return Calibration(table=pd.DataFrame(rows), traces=traces, chosen=chosen, summary=reason)


def _row(
    number: int, tried: Tried, result: LLCResult, step: int, found: Search, picked: int | None, sampler: SamplerConfig
) -> dict[str, Any]:
    corner = tried.corner
    pairs = {(one.corner.nbeta, one.corner.ratio) for one in found.tried if one.corner.stage == "lr"}
    return {
        "corner": number,
        "stage": corner.stage,
        "chosen": number == picked,
        "healthy": is_healthy(result),
        "plateau_nbeta": number in found.plateau,
        "ratio": corner.ratio,
        "lr_searched": (corner.nbeta, corner.ratio) in pairs,
        **result.row(),
        "step": step,
        "batch_size": sampler.batch_size,
        "minibatches": sampler.minibatches,
    }


def _has_plateau(one: Tried, tried: Sequence[Tried]) -> bool:
    same = sorted((t for t in tried if t.corner.ratio == one.corner.ratio), key=lambda t: t.corner.nbeta)
    place = same.index(one)
    neighbours = [*same[max(place - 1, 0) : place], *same[place + 1 : place + 2]]
    return any(t.last.verdict != "invalid" and agree(one.last, t.last) for t in neighbours)


def _default_steps(files: Sequence[Path]) -> str:
    steps = [int(file.stem.partition("-")[2]) for file in files] if len(files) > 1 else [0]
    wanted = {min(steps, key=lambda step: abs(step - place * steps[-1])) for place in PLACES}
    return ",".join(map(str, sorted(wanted)))


def _line(number: int, tried: Tried) -> str:
    corner, last = tried.corner, tried.last
    verdicts = ", ".join("healthy" if is_healthy(result) else result.verdict for result in tried.results)
    why = "" if is_healthy(last) else f" ({last.reasons[0].split(':')[0]})"
    return (
        f"{number:3d}  nbeta {corner.nbeta:<8.3g} localization {corner.localization:<8.3g} lr {corner.lr:<8.2g} "
        f"LLC {last.llc:.4g} ± {last.stderr:.2g}  {verdicts}{why}"
    )
