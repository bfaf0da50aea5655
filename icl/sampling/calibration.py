"""Calibration of the sampler for a run: a search for lr, nbeta, localization and burn-in at a few checkpoints.

Settings with the same ratio localization / nbeta have equally long chains. So their chains at all checkpoints run as one population, on the
same minibatches. If a stage of the search (`icl.sampling.search`) needs only the last checkpoint, only this checkpoint is sampled.
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
from tqdm import tqdm

from icl.config import SamplerConfig
from icl.progress import set_remaining
from icl.runs.checkpoints import Checkpoint
from icl.runs.folder import run_of
from icl.runs.measure import load_same_run
from icl.sampling.batches import batch_function
from icl.sampling.curvature import largest_curvature
from icl.sampling.prompt_loss import prompt_target, trivial_loss
from icl.sampling.records import EstimateSettings, Record, make_record, trivial_predictor
from icl.sampling.result import LLCResult
from icl.sampling.run import chosen_files, estimate_grid, move_bar, run_files, sampling_device
from icl.sampling.search import (
    CONFIRMATION,
    NBETAS,
    RATES,
    RULE,
    SURVEY,
    SearchPoint,
    SearchResult,
    Trial,
    is_healthy,
    num_draws,
    search,
    slower_than,
    survey,
)
from icl.sampling.stored_results import StoredResults
from icl.sampling.target import Target

PLACES = (0.2, 0.5, 1.0)
"""Default checkpoints of the search, as fractions of the last step."""
_NUM_BATCHES = 4
"""Number of batches from which the curvature and the loss at the last checkpoint are computed."""
_FURTHER_WORK = 1.3
"""Ratio of the total time to the time for the chains' moves. The remaining time is for the gradients of the Metropolis tests and for
the checkpoints' own losses."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The result of a run's calibration: all trials and the chosen settings."""

    table: pd.DataFrame
    """A row for each trial and checkpoint. The column `corner` contains the index of the trial."""
    traces: dict[int, Record]
    """Estimates at the last checkpoint, keyed by the index of the trial. The chosen trial, if any, comes first, then up to three failed
    trials."""
    chosen: SamplerConfig | None
    """The chosen settings; None if no settings were accepted."""
    summary: str

    def as_yaml(self) -> str:
        """Return the chosen settings as YAML, in the form that `icl llc --config` reads."""
        assert self.chosen is not None
        fields = dataclasses.asdict(self.chosen)
        return yaml.safe_dump({"sampler": {name: fields[name] for name in fields if name != "steps"}}, sort_keys=False)


def calibrate(
    path: str | Path, sampler: SamplerConfig | None = None, *, say: Callable[[str], None] = lambda line: None
) -> Calibration:
    """Search for a run's sampler settings with the rule `icl.sampling.search.RULE`.

    Args:
        path: The run's folder.
        sampler: Settings that the search does not choose, such as the batch size and the number of chains. Its `steps` select the
            checkpoints; `all` selects the checkpoints nearest to the fractions `PLACES` of the last step.
        say: Function that receives lines of text: the rule, the expected time, and the result of every trial.

    Raises:
        CheckpointError: If there is no usable checkpoint.
    """
    files, config = run_files(path)
    sampler = config.sampler if sampler is None else sampler
    files = chosen_files(files, _default_steps(files) if sampler.steps == "all" else sampler.steps)
    checkpoints = [load_same_run(file, config) for file in files]
    device = sampling_device()
    plan = _plan(sampler, len(checkpoints))
    target = prompt_target(config, sampler, device=device, num_moves=plan.longest)
    fresh_batches = prompt_target(config, _next_seed(sampler), device=device).batches
    say(f"{RULE}\n")
    # A compiled graph is valid for one grad mode only, so all gradients are computed under no_grad.
    with move_bar("preparing", plan.expected) as bar, torch.no_grad():
        sample = batch_function(target.batches, num_chains=1, seed=sampler.seed)
        batches = [sample(0, draw) for draw in range(_NUM_BATCHES)]
        params = {name: tensor.to(device) for name, tensor in checkpoints[-1].params.items()}
        # This also compiles the gradient, if compiling pays.
        curvature = largest_curvature(target.chain_gradient, params, batches)
        losses = [target.loss(params, batch).mean() for batch in batches]
        height = trivial_loss(config) - float(torch.stack(losses).mean())
        run = run_of(path)
        steps = ", ".join(f"{checkpoint.step:,}" for checkpoint in checkpoints)
        say(
            f"Checkpoints: {steps}. Largest curvature: {curvature:.3g}. The loss of predicting {trivial_predictor(target.name)} "
            f"exceeds the last checkpoint's loss by {height:.3g}."
        )
        first = [
            point.sampler(sampler)
            for point in survey(height=height, curvature=curvature, speed=sampler.speed)[: len(NBETAS)]
        ]
        say(_expected_time(plan, _seconds_per_move(checkpoints, first, target, device)))
        work = _Work(sampler, checkpoints, target, device, plan, bar, StoredResults(run.results / "llc-calibration"))
        result = search(work.try_points, height=height, curvature=curvature, speed=sampler.speed, say=say)
        confirming = dataclasses.replace(target, batches=fresh_batches)
        return _finish(result, sampler, lambda chosen: work.confirm(chosen, confirming))


class _Plan(NamedTuple):
    """Numbers of moves in a calibration, each summed over all chains."""

    expected: int
    longest: int
    """Number of moves if lr must be reduced twice."""
    confirmation: int


def _plan(sampler: SamplerConfig, num_checkpoints: int) -> _Plan:
    """Count the moves that the search is expected to make."""
    points = survey(height=1.0, curvature=1.0, speed=sampler.speed)
    slower = slower_than(points[0])  # the smallest ratio has the longest chains
    rate, once, twice = (_num_moves(point.sampler(sampler)) for point in (points[0], slower, slower_than(slower)))
    full = dataclasses.replace(sampler, num_burnin_steps=3 * points[0].filling // 2)
    confirmation = num_checkpoints * _num_moves(full)
    surveyed = num_checkpoints * sum(_num_moves(point.sampler(sampler)) for point in points)
    expected = surveyed + rate + once + confirmation
    return _Plan(expected, expected + twice, confirmation)


class _Work:
    """Makes the estimates of a search, and shows its progress on a bar."""

    def __init__(
        self,
        sampler: SamplerConfig,
        checkpoints: Sequence[Checkpoint],
        target: Target,
        device: torch.device,
        plan: _Plan,
        bar: tqdm,
        stored: StoredResults,
    ) -> None:
        self.sampler, self.checkpoints, self.target = sampler, checkpoints, target
        self.device, self.plan, self.bar, self.stored = device, plan, bar, stored

    def try_points(self, points: Sequence[SearchPoint]) -> list[list[LLCResult]]:
        """Estimate the LLC with the settings of each point. The survey stage uses all checkpoints; later stages use only the last one."""
        stage, samplers = points[0].stage, [point.sampler(self.sampler) for point in points]
        self.bar.set_description(stage)
        if points[0].slowness > 1:  # after these points, only the confirmation remains, unless lr must be reduced again
            set_remaining(self.bar, _num_moves(samplers[0]) + self.plan.confirmation)
        checkpoints = self.checkpoints if stage == SURVEY else self.checkpoints[-1:]
        return self._estimate(checkpoints, samplers, self.target)

    def confirm(self, chosen: SamplerConfig, target: Target) -> list[LLCResult]:
        """Estimate the LLC of all checkpoints with the chosen settings, on new minibatches and with new noise."""
        self.bar.set_description(CONFIRMATION)
        set_remaining(self.bar, len(self.checkpoints) * _num_moves(chosen))
        return self._estimate(self.checkpoints, [_next_seed(chosen)], target)[0]

    def _estimate(
        self, checkpoints: Sequence[Checkpoint], samplers: Sequence[SamplerConfig], target: Target
    ) -> list[list[LLCResult]]:
        """Estimate the LLC of each checkpoint with each of the settings. Results of an earlier, interrupted calibration are reused."""
        rows = [[self.stored.read(checkpoint, sampler) for checkpoint in checkpoints] for sampler in samplers]
        missing = [number for number, row in enumerate(rows) if None in row]
        num_done = sum(_num_moves(s) * len(checkpoints) for n, s in enumerate(samplers) if n not in missing)
        set_remaining(self.bar, self.bar.total - self.bar.n - num_done)
        if missing:
            wanted = [samplers[number] for number in missing]
            new = estimate_grid(checkpoints, wanted, target, device=self.device, advance=self.bar.update)
            for number, results in zip(missing, new, strict=True):
                rows[number] = list(results)
                for checkpoint, result in zip(checkpoints, results, strict=True):
                    self.stored.write(checkpoint, samplers[number], result)
        return [[result for result in row if result is not None] for row in rows]


def _num_moves(sampler: SamplerConfig) -> int:
    """Return the number of moves of all chains of a checkpoint together."""
    return sampler.num_chains * sampler.num_moves


def _next_seed(sampler: SamplerConfig) -> SamplerConfig:
    return dataclasses.replace(sampler, seed=sampler.seed + 1)


def _seconds_per_move(
    checkpoints: Sequence[Checkpoint], samplers: Sequence[SamplerConfig], target: Target, device: torch.device
) -> float:
    """Measure how many seconds one move of one chain takes if all these checkpoints and settings run together.

    The first moves are not counted, because they may compile a gradient.
    """
    short = [dataclasses.replace(sampler, num_burnin_steps=10, num_draws=2, num_init_batches=2) for sampler in samplers]
    times: list[float] = []
    estimate_grid(checkpoints, short, target, device=device, advance=lambda _: times.append(time.perf_counter()))
    seconds = time.perf_counter() - times[2]  # includes the gradients of the Metropolis tests at both draws
    return seconds / ((_num_moves(short[0]) + (2 - 3) * short[0].num_chains) * len(short) * len(checkpoints))


def _expected_time(plan: _Plan, seconds_per_move: float) -> str:
    minutes = math.ceil(plan.expected * seconds_per_move * _FURTHER_WORK / 60)
    return (
        f"About {minutes} minute{'' if minutes == 1 else 's'}: {plan.expected:,} moves of single chains at "
        f"{1000 * seconds_per_move:.2g} ms each. The search takes longer if lr must be reduced twice. The results of finished settings are "
        "stored, so after an interruption the same command continues."
    )


def _finish(
    result: SearchResult, sampler: SamplerConfig, confirm: Callable[[SamplerConfig], list[LLCResult]]
) -> Calibration:
    """Confirm the choice with chains of full length, and return it with the table of all trials."""
    trials, reason, chosen = list(result.trials), result.reason, None
    if result.chosen is not None:
        point = result.chosen.point
        chosen = dataclasses.replace(
            point.sampler(sampler),
            num_draws=num_draws(result.chosen.last, sampler.num_draws),
            num_burnin_steps=result.num_burnin_steps,
            num_init_batches=sampler.num_init_batches,
            steps="all",
        )
        confirmed = Trial(point._replace(stage=CONFIRMATION), confirm(chosen))
        trials.append(confirmed)
        last = confirmed.last
        reason += f"\nWith chains of full length and seed {sampler.seed + 1}: LLC {last}."
        if last.verdict != "ok":
            reason += f" Not accepted: {'; '.join(last.reasons)}."
            chosen = None
    chosen_number = len(trials) - 1 if chosen is not None else None
    table = pd.DataFrame(_rows(trials, result, chosen_number, sampler))
    return Calibration(table=table, traces=_traces(trials, chosen_number, sampler), chosen=chosen, summary=reason)


def _rows(
    trials: Sequence[Trial], result: SearchResult, chosen_number: int | None, sampler: SamplerConfig
) -> list[dict[str, Any]]:
    """Return a row for each trial and checkpoint."""
    rates = {(trial.point.nbeta, trial.point.ratio) for trial in result.trials if trial.point.stage == RATES}
    return [
        {
            "corner": number,
            "stage": trial.point.stage,
            "chosen": number == chosen_number,
            "healthy": is_healthy(estimate),
            "plateau_nbeta": number in result.plateau,
            "ratio": trial.point.ratio,
            "lr_searched": (trial.point.nbeta, trial.point.ratio) in rates,
            **estimate.row(),
            "batch_size": sampler.batch_size,
            "minibatches": sampler.minibatches,
        }
        for number, trial in enumerate(trials)
        for estimate in trial.results
    ]


def _traces(trials: Sequence[Trial], chosen_number: int | None, sampler: SamplerConfig) -> dict[int, Record]:
    """Return the estimates of the chosen trial and of up to three failed trials. The worst of the failed trials comes first."""
    failed = sorted(
        (number for number, trial in enumerate(trials) if not is_healthy(trial.last)),
        key=lambda number: (trials[number].last.verdict != "invalid", trials[number].point.stage != RATES),
    )
    numbers = [*([] if chosen_number is None else [chosen_number]), *failed[:3]]
    settings = {number: EstimateSettings(trials[number].point.sampler(sampler)) for number in numbers}
    return {number: make_record(trials[number].last, settings[number]) for number in numbers}


def _default_steps(files: Sequence[Path]) -> str:
    if len(files) == 1:  # the name of a single file may contain no step
        return "all"
    steps = [int(file.stem.partition("-")[2]) for file in files]
    nearest = {min(steps, key=lambda step: abs(step - share * steps[-1])) for share in PLACES}
    return ",".join(map(str, sorted(nearest)))
