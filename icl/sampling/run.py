"""LLCs of a run at all or some of its saved steps, for the run's own training loss. Finished estimates are stored and reused.

On a GPU, the chains of several checkpoints run as one population. On a CPU the checkpoints run one after the other, because the chains of a
single checkpoint fill the caches. If the program is killed, the same call continues after the last stored checkpoint.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from icl.compute.devices import choose_device, require_memory
from icl.config import RunConfig, SamplerConfig
from icl.config.validation import ConfigError, parse_steps, real
from icl.files.writing import write_atomically
from icl.model.flat import make_layout
from icl.progress import progress_bar, set_remaining
from icl.runs.checkpoints import Checkpoint, checkpoint_files, load_checkpoint_file
from icl.runs.folder import RunFolder, run_of
from icl.runs.measure import Measure, Measurement, measure_checkpoints, require_one_run
from icl.sampling import convergence
from icl.sampling.chains import Advance, Watch
from icl.sampling.components import component_masks
from icl.sampling.estimate import estimate
from icl.sampling.prompt_loss import losses_by_part, prompt_target, trivial_loss
from icl.sampling.records import (
    MAX_TRACE,
    PARTS_NAME,
    VERSION,
    EstimateSettings,
    Record,
    as_record,
    as_table,
    make_record,
    write_tables,
)
from icl.sampling.rescaling import rescaled
from icl.sampling.result import CheckpointId, LLCResult
from icl.sampling.target import Target

CHECKPOINTS_AT_ONCE = 16
"""Number of checkpoints that run together on a device other than the CPU."""


def move_bar(stage: str, num_moves: int) -> tqdm:
    """Return a progress bar over the moves of chains. One move of one chain is one unit. Other work is not counted."""
    return progress_bar(stage, num_moves, "move", unit_scale=True)


class Estimates(NamedTuple):
    """The estimates at some steps of a run, all under the same settings."""

    records: list[Record]
    """The estimates, ordered by step."""
    config: RunConfig
    trivial_loss: float

    @property
    def table(self) -> pd.DataFrame:
        """A row for each step, as in `llc.csv`."""
        return as_table(self.records)

    @property
    def is_usable(self) -> bool:
        """Whether any estimate is `ok` or `suspect`."""
        return any(record.row["verdict"] != "invalid" for record in self.records)


def estimate_run(
    path: str | Path,
    sampler: SamplerConfig | None = None,
    *,
    mode: str = "",
    rescale: float = 1.0,
    component: str = "",
) -> Estimates:
    """Estimate the LLCs of a run's saved steps, or of one checkpoint. Stored estimates with equal settings are reused.

    Args:
        path: A run's folder, its folder `checkpoints`, or a checkpoint file. The estimate of a single file is not stored.
        sampler: Settings of the sampler. By default, the settings in the run's configuration are used.
        mode: A label for the rows.
        rescale: Factor by which the weights are rescaled without changing the function (`icl.sampling.rescaling`).
        component: If given, the chains move only this component of the model (`icl.sampling.components`). The component's
            susceptibilities to the positions of the prompts are then estimated too.

    Raises:
        CheckpointError: If there is no usable checkpoint, or the checkpoints belong to different runs.
        ConfigError: If a setting cannot be used, or the device is a TPU.
        StorageError: If an estimate cannot be written.

    Example:
        ```python
        estimate_run("runs/quickstart").table[["step", "llc", "stderr", "verdict", "reasons"]]
        ```
    """
    rescale = real("rescale", rescale, "positive")
    files, config = run_files(path)
    require_one_run(files)
    sampler = config.sampler if sampler is None else sampler
    settings = EstimateSettings(sampler, mode, rescale, component)
    device = sampling_device()
    require_room(config, sampler, device)
    run = None if Path(path).is_file() else run_of(path)
    if run is not None:
        files = chosen_files(files, sampler.steps)
        run.require_own_files()
    moves_each = sampler.num_chains * sampler.num_moves
    target = prompt_target(config, sampler, device=device, num_moves=len(files) * moves_each)
    records: list[Record] = []
    with move_bar(f"llc {component}".rstrip(), len(files) * moves_each) as bar:
        for batch in measure_checkpoints(
            files,
            config,
            _measurer(settings, target, device, run, bar),
            cache=None if run is None else settings.cache(run),
            settings=settings.key,
            version=VERSION,
            max_members=1 if device.type == "cpu" else CHECKPOINTS_AT_ONCE,
        ):
            records += [as_record(entry) for entry in batch.entries]
            if not batch.is_new:
                set_remaining(bar, (len(files) - len(records)) * moves_each)
                continue
            if run is not None:
                write_tables(run)
            row = records[-1].row
            bar.set_postfix_str(f"step {row['step']:,}: {row['llc']:.3g} ± {row['stderr']:.2g} {row['verdict']}")
    if run is not None:
        write_tables(run)
    return Estimates(records, config, trivial_loss(config))


class _RunningTrace:
    """Writes a table of the draws so far while the chains run, and shows the estimate so far on the progress bar.

    Args:
        file: File of the table. Its columns are step, chain, draw and excess in nats. It has at most `MAX_TRACE` draws of each chain.
        checkpoints: The checkpoints whose chains run.
        bar: The progress bar.
    """

    def __init__(self, file: Path, checkpoints: Sequence[Checkpoint], bar: tqdm) -> None:
        self.file, self.steps, self.bar = file, [checkpoint.step for checkpoint in checkpoints], bar

    def __call__(self, checkpoints: Sequence[int], chains: Sequence[int], nats: Float[Tensor, "N S"]) -> None:
        """Write the draws so far."""
        stride = -(-nats.shape[1] // MAX_TRACE)
        rows = [
            {"step": self.steps[checkpoint], "chain": chain, "draw": draw * stride, "excess": value}
            for checkpoint, chain, trace in zip(checkpoints, chains, nats[:, ::stride].tolist(), strict=True)
            for draw, value in enumerate(trace)
        ]
        write_atomically(self.file, pd.DataFrame(rows).to_csv(index=False).encode(), durable=False)
        of_last = nats[[checkpoint == checkpoints[-1] for checkpoint in checkpoints]].double().numpy()
        error = convergence.standard_error(of_last)
        self.bar.set_postfix_str(f"step {self.steps[checkpoints[-1]]:,} so far: {of_last.mean():.3g} ± {error:.2g}")

    def remove(self) -> None:
        """Remove the table, because the estimate is complete."""
        self.file.unlink(missing_ok=True)


def _measurer(
    settings: EstimateSettings, target: Target, device: torch.device, run: RunFolder | None, bar: tqdm
) -> Measure:
    """Return a function that estimates the LLCs of the checkpoints that have no stored estimate yet."""

    def measure(checkpoints: list[Checkpoint], lead: int) -> list[Measurement]:
        watch = None if run is None else _RunningTrace(settings.cache(run).folder / "running.csv", checkpoints, bar)
        (results,) = estimate_grid(
            checkpoints,
            [settings.sampler],
            target,
            device=device,
            rescale=settings.rescale,
            component=settings.component,
            advance=bar.update,
            watch=watch,
        )
        if watch is not None:
            watch.remove()
        return [make_record(result, settings).measurement for result in results]

    return measure


def estimate_grid(
    checkpoints: Sequence[Checkpoint],
    samplers: Sequence[SamplerConfig],
    target: Target,
    *,
    device: torch.device,
    advance: Advance,
    rescale: float = 1.0,
    component: str = "",
    watch: Watch | None = None,
) -> list[list[LLCResult]]:
    """Estimate the LLC of each checkpoint under each of several settings, which may differ in lr, nbeta and localization.

    Returns:
        One list for each element of `samplers`, with one result for each checkpoint.
    """
    params = [{name: tensor.to(device) for name, tensor in checkpoint.params.items()} for checkpoint in checkpoints]
    if rescale != 1:
        params = [rescaled(checkpoints[0].config.model, member, rescale) for member in params]
    layout, observables, memory = None, {}, samplers[0].memory
    if component:
        layout = make_layout(params[0], component_masks(checkpoints[0].config.model, params[0], component))
        observables = {PARTS_NAME: losses_by_part(checkpoints[0].config, device=device)}
    return estimate(
        target,
        params,
        samplers,
        identities=[CheckpointId(checkpoint.step, checkpoint.digest) for checkpoint in checkpoints],
        layout=layout,
        observables=observables,
        memory=None if memory is None else memory * 2**30,
        advance=advance,
        watch=watch,
    )


def require_room(config: RunConfig, sampler: SamplerConfig, device: torch.device) -> None:
    """Refuse more chains, draws or prompts than fit into memory.

    Raises:
        ConfigError: If they do not fit. The message says how much memory is needed and how much is available.
    """
    chains, draws = sampler.num_chains, sampler.num_draws
    losses = f"the losses of {draws:,} draws (`sampler.num_draws`) of {chains:,} chains (`sampler.num_chains`)"
    require_memory({losses: 8 * chains * draws})
    batch = f"a batch of {sampler.batch_size:,} prompts (`sampler.batch_size`)"
    per_prompt = (
        config.num_tokens if config.model.is_language else config.task.max_examples * (config.task.task_size + 1)
    )
    require_memory({batch: 4 * sampler.batch_size * per_prompt}, device)


def run_files(path: str | Path) -> tuple[list[Path], RunConfig]:
    """Return the checkpoint files at a path, sorted by step, and the configuration of their run."""
    files = checkpoint_files(path)
    return files, load_checkpoint_file(files[0]).config


def chosen_files(files: Sequence[Path], steps: str) -> list[Path]:
    """Return the files of the steps that `steps` selects: `all`, `last`, a list such as 1,2,3, or ranges such as 0:1000:100.

    A range without a spacing includes both ends and every saved step between them. With a spacing of s, it includes only the saved steps
    among first, first + s, first + 2s and so on.

    Raises:
        ConfigError: If `steps` is none of these, or names a step that is not saved.
    """
    ranges = parse_steps(steps)
    if ranges == "all":
        return list(files)
    if ranges == "last":
        return [files[-1]]
    saved = {int(file.stem.partition("-")[2]): file for file in files}
    chosen: set[int] = set()
    for wanted in ranges:
        matches = {step for step in saved if wanted.holds(step)}
        if not matches:
            nearest = min(saved, key=lambda step: abs(step - wanted.first))
            raise ConfigError(
                f"The run has no saved step {wanted.word}; the nearest is {nearest}. Use `all` for every saved step."
            )
        chosen |= matches
    return [saved[step] for step in sorted(chosen)]


def sampling_device() -> torch.device:
    """Return the device that $DEVICE names, or by default the best device available.

    Raises:
        ConfigError: If the device is a TPU.
    """
    kind = choose_device()
    if kind == "tpu":
        raise ConfigError(
            "`icl llc` does not run on a TPU, because the code that draws the noise would have to be compiled separately for every chain. "
            "Set DEVICE=cpu or DEVICE=cuda."
        )
    return torch.device(kind)
