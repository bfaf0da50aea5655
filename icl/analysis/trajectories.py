"""Trajectories: what a run is at every saved step, the rows of a matrix (checkpoints x features) that stays on disk.

A state is the run's predictions for fixed prompts, flattened (B K features), or its weights. Hoogland et al. 2024, section
3.2, also use the outputs at y-tokens and the coordinates that are never trained; we take the predictions, as their "y-only"
variant and Carroll et al. 2025, section 4.2, do. The latter's prompts, all of one task that every run knows, are
`first_task`. Gradients have a PCA of their own (`icl.analysis.gradients`); Adam's moments are kept for the last step only.

Rows are read a stretch of features at a time: inner products add up over stretches, and each is centred before it is
multiplied, so nothing cancels, and 10,000 checkpoints of 163,840 features (6.6 GB) never are in memory together; their
products (0.8 GB) are, in a few copies.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from jaxtyping import Float

from icl import baselines, population
from icl.analysis.parts import Part, StoredVector, stored_vector
from icl.analysis.run import Measurement, Members, over_checkpoints, run_folder
from icl.checkpoints import CheckpointError, checkpoint_files
from icl.checks import ConfigError
from icl.config import RunConfig
from icl.evaluation import predict_prompts
from icl.tasks.priors import task_pool
from icl.tasks.prompts import Prompts, sample_prompts

VERSION = 2
STREAM = "essential-dynamics"
BLOCK_BYTES = 2**27
"""Of the stretch of all rows that is in memory at a time, in float64."""

Row: TypeAlias = StoredVector | np.ndarray


@dataclass(frozen=True, kw_only=True)
class StateSettings:
    """What a state is; with others, outputs are computed anew."""

    state: Literal["outputs", "weights"] = field(
        default="outputs", metadata={"help": "what develops: predictions for fixed prompts, or the weights"}
    )
    distribution: Literal["true", "pretrain", "first_task"] = field(
        default="true",
        metadata={"help": "tasks of the prompts: new ones, the run's M, or the first that every pool holds"},
    )
    num_prompts: int = field(default=512, metadata={"help": "fixed prompts; results settle from about 16 on"})

    def __post_init__(self) -> None:
        if self.num_prompts < 1:
            raise ConfigError(f"`num_prompts` must be at least 1, got {self.num_prompts}.")


class Trajectory(NamedTuple):
    """One run's states in the order of their steps."""

    run: str
    config: RunConfig
    steps: list[int]
    digests: list[str]
    rows: Sequence[Row]
    """Of one length each."""


class Products(NamedTuple):
    """Inner products of rows and references, each less the mean of the rows."""

    rows: Float[np.ndarray, "S S"]
    references: Float[np.ndarray, "R S"]
    """Of each reference with each row."""
    squares: Float[np.ndarray, " R"]
    """Of each reference with itself."""


def read_trajectory(path: Path, settings: StateSettings, *, run: str) -> Trajectory:
    """The states of a run; outputs that are not yet kept are computed, many checkpoints at once.

    Raises:
        CheckpointError: If there is no usable checkpoint, or only one of a file.
    """
    if path.is_file():
        raise CheckpointError(f"{path} is one checkpoint; a trajectory needs the folder of a run.")
    name = f"trajectory-{settings.state}"
    measure = partial(_measure, settings=settings)
    parts, config = over_checkpoints(name, path, settings, measure, version=VERSION, keep_vectors=False)
    if settings.state == "weights":
        rows = [_stored_weights(file) for file in checkpoint_files(path)]
    else:
        rows = [stored_vector(run_folder(path).results / name, part.step, "state") for part in parts]
    return _trajectory(run, config, parts, rows)


def require_comparable(trajectories: Sequence[Trajectory], settings: StateSettings) -> None:
    """Refuse runs whose states are not of the same things.

    Raises:
        ConfigError: If their prompts or, for weights, their architectures differ.
    """
    first = trajectories[0]
    for other in trajectories[1:]:
        if settings.state == "weights":
            is_same = other.config.model == first.config.model and len(other.rows[0]) == len(first.rows[0])
            if not is_same:
                raise ConfigError(f"{other.run} has another architecture than {first.run}; compare --state outputs.")
        elif not _same_prompts(first.config, other.config, settings):
            raise ConfigError(
                f"{other.run} and {first.run} have different prompts: for one PCA of both they need the same "
                "`task.task_size`, `task.max_examples`, `task.noise_variance` and `seeds.evaluation`, "
                "and for --distribution pretrain or first_task the same tasks."
            )


def references(configs: Sequence[RunConfig], settings: StateSettings) -> dict[str, Float[np.ndarray, " F"]]:
    """The states of the Bayes predictors: ridge, and dMMSE for every finite M; none for weights."""
    if settings.state == "weights":
        return {}
    prompts, task = fixed_prompts(configs[0], settings), configs[0].task
    if task.noise_variance > 0:
        found = {"ridge": baselines.ridge(prompts.xs, prompts.ys, noise_variance=task.noise_variance)}
    else:
        found = {"ridge": baselines.ols(prompts.xs, prompts.ys)}  # its limit
    pools = {(int(own.task.num_tasks), own.seeds.tasks) for own in configs if not own.task.is_gaussian}
    for num_tasks, seed in sorted(pools):
        tasks = task_pool(num_tasks, task.task_size, seed)
        name = f"dMMSE M={num_tasks}" + ("" if len({seed for _, seed in pools}) == 1 else f" tasks={seed}")
        found[name] = baselines.dmmse(prompts.xs, prompts.ys, tasks=tasks, noise_variance=task.noise_variance)
    return {name: predictions.flatten().numpy() for name, predictions in found.items()}


def fixed_prompts(config: RunConfig, settings: StateSettings) -> Prompts:
    """The prompts of the outputs, on the CPU; the same for all runs that share sizes, noise and evaluation seed."""
    is_pool = settings.distribution == "pretrain"
    prompts = sample_prompts(
        config, stream=STREAM, step=0, batch_size=settings.num_prompts, distribution="pretrain" if is_pool else "true"
    )
    if settings.distribution != "first_task":
        return prompts
    noise = prompts.ys - (prompts.xs * prompts.ws.unsqueeze(-2)).sum(-1)
    task = task_pool(1, config.task.task_size, config.seeds.tasks)
    return prompts._replace(ys=(prompts.xs * task).sum(-1) + noise, ws=task.expand_as(prompts.ws))


def feature_blocks(rows: Sequence[Row], *, block_bytes: int = BLOCK_BYTES) -> Iterator[Float[np.ndarray, "S f"]]:
    """The matrix from left to right, as many features at a time as `block_bytes` hold, in float64."""
    width = max(1, block_bytes // (8 * len(rows)))
    for start in range(0, len(rows[0]), width):
        yield np.stack([row[start : start + width] for row in rows]).astype(np.float64)


def centred_products(
    rows: Sequence[Row], points: Float[np.ndarray, "R F"], *, block_bytes: int = BLOCK_BYTES
) -> Products:
    """Every inner product about the mean of the rows, added up over stretches of features.

    Args:
        rows: The states, which make the mean.
        points: References, which do not.
        block_bytes: See `feature_blocks`.
    """
    found = Products(np.zeros((len(rows),) * 2), np.zeros((len(points), len(rows))), np.zeros(len(points)))
    start = 0
    for block in feature_blocks(rows, block_bytes=block_bytes):
        mean = block.mean(0)
        others = points[:, start : start + len(mean)] - mean
        block -= mean
        found.rows[:] += block @ block.T
        found.references[:] += others @ block.T
        found.squares[:] += (others**2).sum(1)
        start += len(mean)
    return found


def _measure(members: Members, *, settings: StateSettings) -> list[Measurement]:
    """The outputs of every member; weights are read from the checkpoints themselves."""
    if settings.state == "weights":
        return [Measurement([]) for _ in members.checkpoints]
    device = next(iter(members.params.values())).device
    prompts = Prompts(*(part.to(device) for part in fixed_prompts(members.config, settings)))
    predictions = predict_prompts(partial(population.apply, members.model), members.params, prompts)
    return [Measurement([], {"state": state}) for state in predictions.flatten(1).cpu().numpy()]


def _trajectory(run: str, config: RunConfig, parts: Sequence[Part], rows: Sequence[Row]) -> Trajectory:
    return Trajectory(run, config, [part.step for part in parts], [part.digest for part in parts], rows)


def _same_prompts(first: RunConfig, second: RunConfig, settings: StateSettings) -> bool:
    pairs = zip(fixed_prompts(first, settings), fixed_prompts(second, settings), strict=True)
    return first.task.noise_variance == second.task.noise_variance and all(torch.equal(one, two) for one, two in pairs)


def _stored_weights(file: Path) -> StoredVector:
    """All weights of a checkpoint in the order of its file: behind the header of safetensors lie bare numbers."""
    before = 8 + int.from_bytes(file.open("rb").read(8), "little")
    dtype = np.dtype("<f4")  # checkpoints are saved in float32
    return StoredVector(file=file, offset=before, size=(file.stat().st_size - before) // dtype.itemsize, dtype=dtype)
