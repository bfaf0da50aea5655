"""LLCs of a run: every saved step, or some, on the run's own training loss, with what is done kept and never redone.

Checkpoints x chains are one population; on a CPU checkpoints take turns, as one's chains fill the caches. Killed
anywhere, the same call goes on from the last kept checkpoint.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from icl.build import build_checkpoint_model, choose_device
from icl.checkpoints import Checkpoint, checkpoint_files, load_checkpoint_file, require_one_run
from icl.config import RunConfig, SamplerConfig
from icl.measure import Measurement, measure_checkpoints
from icl.memory import require_memory
from icl.runs import run_of
from icl.sampling.estimation import estimate
from icl.sampling.llc import inverse_temperature
from icl.sampling.progress import MoveBar, Tick
from icl.sampling.prompt_loss import prompt_target, trivial_loss
from icl.sampling.records import VERSION, Kind, Record, as_record, as_table, make_record, write_tables
from icl.sampling.rescaling import rescaled
from icl.sampling.result import CheckpointId, LLCResult
from icl.sampling.settings import SamplerSettings
from icl.sampling.target import Target
from icl.validation import ConfigError, parse_steps, real

CHECKPOINTS_AT_ONCE = 16
"""On a device other than the CPU."""


class Estimates(NamedTuple):
    """The estimates of one kind at some steps of a run."""

    records: list[Record]
    """By step."""
    config: RunConfig
    trivial_loss: float

    @property
    def table(self) -> pd.DataFrame:
        """A row for each step, as in `llc.csv`."""
        return as_table(self.records)

    @property
    def is_usable(self) -> bool:
        """Whether any estimate is not invalid."""
        return any(record.row["verdict"] != "invalid" for record in self.records)


def estimate_run(
    path: str | Path, sampler: SamplerConfig | None = None, *, mode: str = "", rescale: float = 1.0
) -> Estimates:
    """The LLCs of a run's saved steps, or of one checkpoint; those kept under the same settings are not made again.

    Args:
        path: A run's folder, its folder of checkpoints, or one checkpoint file (of which nothing is kept).
        sampler: The settings; left out, those that the run was configured with.
        mode: A label for the rows.
        rescale: Above or below 1, the weights are rescaled by it with the function unchanged (`icl.sampling.rescaling`).

    Raises:
        CheckpointError: If there is no usable checkpoint, or the checkpoints are of different runs.
        ConfigError: If a setting cannot be used, or the device is a TPU.
        StorageError: If an estimate cannot be written.

    Example:
        estimate_run("runs/quickstart").table[["step", "llc", "stderr", "verdict", "reasons"]]
    """
    rescale = real("rescale", rescale, "positive")
    files, config = run_files(path)
    require_one_run(files)
    sampler = with_nbeta(config.sampler if sampler is None else sampler)
    kind = Kind(sampler, mode, rescale)
    device = sampling_device()
    require_room(config, sampler, device)
    if not Path(path).is_file():
        files = chosen_files(files, sampler.steps)
    target = prompt_target(config, sampler, device=device, num_moves=len(files) * num_moves(sampler))
    run = None if Path(path).is_file() else run_of(path)
    if run is not None:
        run.require_own_files()
    records: list[Record] = []
    with MoveBar("llc", len(files) * num_moves(sampler)) as bar:

        def measure(checkpoints: list[Checkpoint], lead: int) -> list[Measurement]:
            results = estimate_checkpoints(
                checkpoints, sampler, target, device=device, rescale=rescale, tick=bar.advance
            )
            return [make_record(result, kind).measurement for result in results]

        for batch in measure_checkpoints(
            files,
            config,
            measure,
            cache=None if run is None else kind.cache(run),
            settings=kind.key,
            version=VERSION,
            max_members=1 if device.type == "cpu" else CHECKPOINTS_AT_ONCE,
        ):
            records += [as_record(entry) for entry in batch.entries]
            if not batch.is_new:
                bar.expect(-len(batch.entries) * num_moves(sampler))
                continue
            if run is not None:
                write_tables(run)
            row = records[-1].row
            bar.tell(f"step {row['step']:,}: {row['llc']:.3g} ± {row['stderr']:.2g} {row['verdict']}")
    if run is not None:
        write_tables(run)
    return Estimates(records, config, trivial_loss(config))


def estimate_checkpoints(
    checkpoints: Sequence[Checkpoint],
    sampler: SamplerConfig,
    target: Target,
    *,
    device: torch.device,
    rescale: float = 1.0,
    tick: Tick = lambda moves: None,
) -> list[LLCResult]:
    """The LLCs of checkpoints of one run; `tick` is told the chain-moves done since it last was."""
    return estimate_grid(checkpoints, [sampler], target, device=device, rescale=rescale, tick=tick)[0]


def estimate_grid(
    checkpoints: Sequence[Checkpoint],
    samplers: Sequence[SamplerConfig],
    target: Target,
    *,
    device: torch.device,
    rescale: float = 1.0,
    tick: Tick = lambda moves: None,
) -> list[list[LLCResult]]:
    """Estimate under several settings as one population; they may differ in lr, nbeta and localization."""
    build_checkpoint_model(checkpoints[0])  # refuses weights that are not of the architecture
    params = [
        {name: tensor.to(device) for name, tensor in rescaled(one.config.model, one.params, rescale).items()}
        for one in checkpoints
    ]
    told = 0

    def progress(done: int, total: int) -> None:
        nonlocal told
        tick(done - told)
        told = done

    return estimate(
        target,
        params,
        [chain_settings(sampler) for sampler in samplers],
        identities=[CheckpointId(checkpoint.step, checkpoint.digest) for checkpoint in checkpoints],
        num_samples=samplers[0].num_samples,
        num_init_batches=samplers[0].num_init_batches,
        memory=None if samplers[0].memory is None else samplers[0].memory * 2**30,
        progress=progress,
    )


def chain_settings(sampler: SamplerConfig) -> SamplerSettings:
    """What its chains are told."""
    told = {field.name: getattr(sampler, field.name) for field in dataclasses.fields(SamplerSettings)}
    return SamplerSettings(**told | {"nbeta": inverse_temperature(sampler.nbeta, sampler.num_samples)})


def with_nbeta(sampler: SamplerConfig) -> SamplerConfig:
    """The settings with n / ln n in the place of a missing nbeta, so that equal chains have equal settings."""
    return dataclasses.replace(sampler, nbeta=inverse_temperature(sampler.nbeta, sampler.num_samples))


def num_moves(sampler: SamplerConfig) -> int:
    """Of all chains of a checkpoint."""
    return sampler.num_chains * (sampler.num_burnin_steps + (sampler.num_draws - 1) * sampler.thinning + 1)


def require_room(config: RunConfig, sampler: SamplerConfig, device: torch.device) -> None:
    """Refuse more chains, draws or prompts than memory holds.

    Raises:
        ConfigError: Saying how much is needed and how much there is.
    """
    chains, draws, task = sampler.num_chains, sampler.num_draws, config.task
    told = f"the losses of {draws:,} draws (`sampler.num_draws`) of {chains:,} chains (`sampler.num_chains`)"
    require_memory({told: 8 * chains * draws})
    told = f"a batch of {sampler.batch_size:,} prompts (`sampler.batch_size`)"
    require_memory({told: 4 * sampler.batch_size * task.max_examples * (task.task_size + 1)}, device)


def run_files(path: str | Path) -> tuple[list[Path], RunConfig]:
    """The checkpoint files of a path, by step, and the configuration of their run."""
    files = checkpoint_files(path)
    return files, load_checkpoint_file(files[0]).config


def chosen_files(files: Sequence[Path], steps: str) -> list[Path]:
    """The files of the steps that `steps` names: `all`, `last`, a list such as 1,2,3, or ranges such as 0:1000:100.

    A range takes every saved step between its ends, both included, or with a stride only the steps on it.

    Raises:
        ConfigError: If it is none of these, or names a step that is not saved.
    """
    ranges = parse_steps(steps)
    if ranges == "all":
        return list(files)
    if ranges == "last":
        return [files[-1]]
    saved = {int(file.stem.partition("-")[2]): file for file in files}
    chosen: set[int] = set()
    for wanted in ranges:
        own = {step for step in saved if wanted.holds(step)}
        if not own:
            nearest = min(saved, key=lambda step: abs(step - wanted.first))
            raise ConfigError(
                f"The run has no saved step {wanted.word}; the nearest is {nearest}, and `all` takes every one."
            )
        chosen |= own
    return [saved[step] for step in sorted(chosen)]


def sampling_device() -> torch.device:
    """The device that $DEVICE names, or the best there is.

    Raises:
        ConfigError: If it is a TPU.
    """
    kind = choose_device()
    if kind == "tpu":
        raise ConfigError(
            "`icl llc` does not run on a TPU, for which every chain's own noise would be compiled anew; set DEVICE=cpu or DEVICE=cuda."
        )
    return torch.device(kind)


def measured(table: pd.DataFrame, trivial_loss: float) -> str:
    """What a curve of estimates measures: the geometry of a basin, or the checkpoint's loss turned upside down."""
    told = table[np.isfinite(table["mean_loss"].astype(float))]
    if told.empty:
        return "No chain stayed finite, so nothing was measured."
    low, high = told["mean_loss"].min(), told["mean_loss"].max()
    span = f"E[L] is {low:.4g}" if math.isclose(low, high, rel_tol=1e-3) else f"E[L] goes from {low:.4g} to {high:.4g}"
    share = (told["mean_loss"] - told["init_loss"]) / (trivial_loss - told["init_loss"]).clip(lower=1e-12)
    against = f"{span}, and predicting zero costs {trivial_loss:.4g}"
    escaped = int((share > 0.5).sum())
    fallen = int((told["llc"] + 2 * told["stderr"] < 0).sum())
    if fallen:
        against += f"; at {fallen} of {len(told)} checkpoints the chains found lower loss, so those are no minima"
    if not escaped:
        return f"{against}: the loss rose by at most {max(share.max(), 0):.0%} of the way there, so no chain left its checkpoint's basin."
    where = f"at {escaped} of {len(told)} checkpoints" if len(told) > 1 else "here"
    sentence = (
        f"{against}: {where} the chains left the checkpoint's basin, and lambda-hat = nbeta (E[L] - L0) mirrors L0"
    )
    if len(told) > 2 and told["init_loss"].std() > 0:
        sentence += f" (correlation of lambda-hat with -L0: {np.corrcoef(told['llc'], -told['init_loss'])[0, 1]:.4f})"
    return sentence + ", the loss upside down; it is no learning coefficient."
