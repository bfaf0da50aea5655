"""Which lr, nbeta, localization and burn-in to sample a run with: `icl.sampling.search` over a few of its checkpoints.

All corners of one ratio at all checkpoints are one population, on the same minibatches: their chains are equally long.
What the rule asks of the last checkpoint alone is sampled there alone.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
import yaml

from icl.checkpoints import Checkpoint, load_same_run
from icl.config import SamplerConfig
from icl.sampling.batches import batch_function
from icl.sampling.curvature import largest_curvature
from icl.sampling.progress import MoveBar
from icl.sampling.prompt_loss import prompt_target, trivial_loss
from icl.sampling.records import Kind, Record, make_record
from icl.sampling.result import LLCResult
from icl.sampling.run import chosen_files, estimate_grid, num_moves, run_files, sampling_device
from icl.sampling.search import (
    CONFIRMATION,
    NBETAS,
    RATES,
    RULE,
    SURVEY,
    Corner,
    Search,
    Tried,
    is_healthy,
    num_draws,
    search,
    slower_than,
    survey,
)
from icl.sampling.target import Target

PLACES = (0.2, 0.5, 1.0)
"""Of the last step: where in training the search looks, if nothing else is said."""
_NUM_BATCHES = 4  # for the curvature at the last checkpoint and for the height of its basin
_FURTHER_WORK = 1.3  # beside the chains' moves, as a factor: MALA's gradients and the checkpoints' own losses


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
    """Search the settings for a run, by `icl.sampling.search.RULE`.

    Args:
        path: The run's folder.
        sampler: What is not searched: batch size, chains, draws; `steps` other than `all` are the checkpoints.
        say: Told beforehand how long it takes, and then of every corner.

    Raises:
        CheckpointError: If there is no usable checkpoint.
    """
    files, config = run_files(path)
    sampler = config.sampler if sampler is None else sampler
    files = chosen_files(files, _default_steps(files) if sampler.steps == "all" else sampler.steps)
    checkpoints = [load_same_run(file, config) for file in files]
    device = sampling_device()
    plan = _Plan.of(sampler, len(checkpoints))
    target = prompt_target(config, sampler, device=device, num_moves=plan.most)
    anew = dataclasses.replace(target, batches=prompt_target(config, _other_seed(sampler), device=device).batches)
    say(f"{RULE}\n")
    with MoveBar("preparing", plan.total) as bar, torch.no_grad():  # which graphs are compiled for
        sample = batch_function(target.batches, num_chains=1, seed=sampler.seed)
        batches = [sample(0, draw) for draw in range(_NUM_BATCHES)]
        params = {name: tensor.to(device) for name, tensor in checkpoints[-1].params.items()}
        curvature = largest_curvature(target.chain_gradient, params, batches)  # compiles the gradient, if it is to be
        losses = [target.loss(params, batch).mean() for batch in batches]
        height = trivial_loss(config) - float(torch.stack(losses).mean())
        steps = ", ".join(f"{checkpoint.step:,}" for checkpoint in checkpoints)
        say(
            f"Checkpoints {steps}; largest curvature {curvature:.3g}; predicting zero costs {height:.3g} more than the last."
        )
        first = [corner.sampler(sampler) for corner in survey(height=height, curvature=curvature)[: len(NBETAS)]]
        say(_how_long(plan, _seconds_a_move(checkpoints, first, target, device)))
        work = _Work(sampler, checkpoints, target, anew, device, plan, bar)
        found = search(work.at_corners, height=height, curvature=curvature, say=say)
        return _finish(found, sampler, work.in_full)


class _Plan(NamedTuple):
    """The chain-moves of a calibration's stages, as far as they are known beforehand."""

    survey: int
    rates: int
    confirmation: int
    most: int
    """If lr has to fall twice."""

    @classmethod
    def of(cls, sampler: SamplerConfig, num_checkpoints: int) -> "_Plan":
        corners = survey(height=1.0, curvature=1.0)
        slower = slower_than(corners[0])  # of the smallest ratio, whose chains are the longest
        longest, once, twice = (num_moves(c.sampler(sampler)) for c in (corners[0], slower, slower_than(slower)))
        full = dataclasses.replace(sampler, num_burnin_steps=3 * corners[0].filling // 2)
        parts = (
            num_checkpoints * sum(num_moves(corner.sampler(sampler)) for corner in corners),
            longest + once,
            num_checkpoints * num_moves(full),
        )
        return cls(*parts, most=sum(parts) + twice)

    @property
    def total(self) -> int:
        """What is likely."""
        return self.survey + self.rates + self.confirmation


class _Work:
    """The sampling that a search asks for, with its bar."""

    def __init__(
        self,
        sampler: SamplerConfig,
        checkpoints: Sequence[Checkpoint],
        target: Target,
        anew: Target,
        device: torch.device,
        plan: _Plan,
        bar: MoveBar,
    ) -> None:
        self.sampler, self.checkpoints, self.target, self.anew = sampler, checkpoints, target, anew
        self.device, self.plan, self.bar = device, plan, bar

    def at_corners(self, corners: Sequence[Corner]) -> list[list[LLCResult]]:
        """As `search` wants them: the survey at all checkpoints, lr at the last."""
        stage, samplers = corners[0].stage, [corner.sampler(self.sampler) for corner in corners]
        self.bar.name(stage)
        if corners[0].slowness > 1:  # nothing but the choice comes after it, or this once more
            self.bar.leave(num_moves(samplers[0]) + self.plan.confirmation)
        at = self.checkpoints if stage == SURVEY else self.checkpoints[-1:]
        return estimate_grid(at, samplers, self.target, device=self.device, tick=self.bar.advance)

    def in_full(self, sampler: SamplerConfig) -> list[LLCResult]:
        """The chosen settings at all checkpoints, on minibatches and noise that nothing was chosen by."""
        self.bar.name(CONFIRMATION)
        self.bar.leave(len(self.checkpoints) * num_moves(sampler))
        sampler = _other_seed(sampler)
        return estimate_grid(self.checkpoints, [sampler], self.anew, device=self.device, tick=self.bar.advance)[0]


def _other_seed(sampler: SamplerConfig) -> SamplerConfig:
    return dataclasses.replace(sampler, seed=sampler.seed + 1)


def _seconds_a_move(
    checkpoints: Sequence[Checkpoint], samplers: Sequence[SamplerConfig], target: Target, device: torch.device
) -> float:
    """Of one chain in this population: a few moves, after the first ones, in which a gradient may be compiled."""
    few = [dataclasses.replace(one, num_burnin_steps=10, num_draws=2, num_init_batches=2) for one in samplers]
    moves: list[float] = []
    estimate_grid(checkpoints, few, target, device=device, tick=lambda _: moves.append(time.perf_counter()))
    taken = time.perf_counter() - moves[2]  # with MALA's gradient at both draws
    return taken / ((num_moves(few[0]) + (2 - 3) * few[0].num_chains) * len(few) * len(checkpoints))


def _how_long(plan: _Plan, seconds: float) -> str:
    minutes = math.ceil(plan.total * seconds * _FURTHER_WORK / 60)
    return (
        f"About {minutes} minute{'' if minutes == 1 else 's'}: {plan.total:,} moves of chains at {1000 * seconds:.2g} ms, "
        "more if lr must fall twice. Nothing is kept if it is interrupted."
    )


def _finish(found: Search, sampler: SamplerConfig, estimate: Callable[[SamplerConfig], list[LLCResult]]) -> Calibration:
    """Confirm the choice with chains of full length, and write all down."""
    tried, reason, chosen = list(found.tried), found.reason, None
    if found.chosen is not None:
        corner = found.chosen.corner
        chosen = dataclasses.replace(
            corner.sampler(sampler),
            num_draws=num_draws(found.chosen.last, sampler.num_draws),
            num_burnin_steps=found.num_burnin_steps,
            num_init_batches=sampler.num_init_batches,
            steps="all",
        )
        confirmed = Tried(corner._replace(stage=CONFIRMATION), estimate(chosen))
        tried.append(confirmed)
        last = confirmed.last
        reason += (
            f"\nAt full length, with seed {sampler.seed + 1}: LLC {last.llc:.4g} ± {last.stderr:.2g}, {last.verdict}."
        )
        if last.verdict != "ok":
            reason += f" Not taken: {'; '.join(last.reasons)}."
            chosen = None
    picked = len(tried) - 1 if chosen is not None else None
    rows = [_row(i, one, result, found, picked, sampler) for i, one in enumerate(tried) for result in one.results]
    return Calibration(table=pd.DataFrame(rows), traces=_traces(tried, picked, sampler), chosen=chosen, summary=reason)


def _traces(tried: Sequence[Tried], picked: int | None, sampler: SamplerConfig) -> dict[int, Record]:
    """Those of the choice and of three failures, the gravest first."""
    failed = sorted(
        (i for i, one in enumerate(tried) if not is_healthy(one.last)),
        key=lambda i: (tried[i].last.verdict != "invalid", tried[i].corner.stage != RATES),
    )
    shown = [*([] if picked is None else [picked]), *failed[:3]]
    return {i: make_record(tried[i].last, Kind(tried[i].corner.sampler(sampler))) for i in shown}


def _row(
    number: int, tried: Tried, result: LLCResult, found: Search, picked: int | None, sampler: SamplerConfig
) -> dict[str, Any]:
    corner = tried.corner
    pairs = {(one.corner.nbeta, one.corner.ratio) for one in found.tried if one.corner.stage == RATES}
    return {
        "corner": number,
        "stage": corner.stage,
        "chosen": number == picked,
        "healthy": is_healthy(result),
        "plateau_nbeta": number in found.plateau,
        "ratio": corner.ratio,
        "lr_searched": (corner.nbeta, corner.ratio) in pairs,
        **result.row(),
        "batch_size": sampler.batch_size,
        "minibatches": sampler.minibatches,
    }


def _default_steps(files: Sequence[Path]) -> str:
    if len(files) == 1:  # which may have any name
        return "all"
    steps = [int(file.stem.partition("-")[2]) for file in files]
    wanted = {min(steps, key=lambda step: abs(step - place * steps[-1])) for place in PLACES}
    return ",".join(map(str, sorted(wanted)))
