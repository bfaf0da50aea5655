"""Trajectories: what a run is at every saved step, the rows of a matrix (checkpoints x features) that stays on disk.

A state is one of these, flattened:

- `outputs`: the predictions for fixed prompts (B K features), as Carroll et al. 2025, section 4.2, and the "y-only" variant of
  Hoogland et al. 2024, section 3.2. The former's prompts, all of one task that every run knows, are `first_task`.
- `tokens`: the whole outputs at all 2K tokens (2 B K (D + 1) features), as Hoogland et al. use them; most are never trained.
- `weights`; `gradients`: of the mean loss on the fixed prompts, in the weights. B prompts give them with noise, whose expected
  square is kept beside them (`Trajectory.noise`); it is the same prompts' at every step, so some of it cancels in differences.
- `first_moment`, `second_moment`: Adam's running means of the training gradient and its square, before bias correction, for
  runs trained with `checkpoints.moments`; they cannot be found out from weights afterwards.

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
from torch import Tensor

from icl import baselines
from icl.analysis.gradients.weights import mean_gradient
from icl.analysis.run import Members, over_checkpoints
from icl.array_files import StoredArray
from icl.checkpoint_header import MOMENTS
from icl.checkpoints import (
    CheckpointError,
    checkpoint_name,
    list_steps,
    load_same_run,
    stored_tensors,
)
from icl.config import ModelConfig, RunConfig
from icl.evaluation import predict_prompts
from icl.measure import Cache, Measurement
from icl.runs import RunFolder, run_of
from icl.stacked import Params, apply, token_outputs
from icl.storage import LocalStore
from icl.tasks.priors import task_pool
from icl.tasks.prompts import Prompts, sample_prompts
from icl.validation import ConfigError

VERSION = 2
STREAM = "essential-dynamics"
BLOCK_BYTES = 2**27
"""Of the stretch of all rows that is in memory at a time, in float64."""

_GRADIENT_PROMPTS = 32
"""Prompts of one backward pass, at most; their gradients' scatter gives the noise of the mean."""

Row: TypeAlias = StoredArray | np.ndarray
State: TypeAlias = Literal["outputs", "tokens", "weights", "gradients", "first_moment", "second_moment"]

MOMENT_OF: dict[State, str] = dict(zip(("first_moment", "second_moment"), MOMENTS, strict=True))
SEES_PROMPTS: tuple[State, ...] = ("outputs", "tokens", "gradients")
HAS_WEIGHTS_SHAPE: tuple[State, ...] = ("weights", "gradients", "first_moment", "second_moment")


@dataclass(frozen=True, kw_only=True)
class StateSettings:
    """What a state is; with others, states are computed anew."""

    state: State = field(
        default="outputs",
        metadata={
            "help": "what develops: predictions for fixed prompts, whole outputs at all tokens, weights, the loss's "
            "gradient on the prompts, or a moment of Adam (needs checkpoints.moments in training)"
        },
    )
    distribution: Literal["true", "pretrain", "first_task"] = field(
        default="true",
        metadata={"help": "tasks of the prompts: new ones, the run's M, or the first that every pool holds"},
    )
    num_prompts: int = field(default=512, metadata={"help": "fixed prompts; results settle from about 16 on"})

    def __post_init__(self) -> None:
        if self.num_prompts < 1:
            raise ConfigError(f"`num_prompts` must be at least 1, got {self.num_prompts}.")
        if self.state == "gradients" and self.num_prompts < 2:
            raise ConfigError(
                f"`num_prompts` must be at least 2 for gradients, whose noise it gives, got {self.num_prompts}."
            )


class Trajectory(NamedTuple):
    """One run's states in the order of their steps."""

    run: str
    config: RunConfig
    steps: list[int]
    digests: list[str]
    rows: Sequence[Row]
    """Of one length each."""
    noise: list[float]
    """The expected squared distance of each state to what it estimates; zeros for what is exact."""


class Products(NamedTuple):
    """Inner products of rows and references, each less the mean of the rows."""

    rows: Float[np.ndarray, "S S"]
    references: Float[np.ndarray, "R S"]
    """Of each reference with each row."""
    squares: Float[np.ndarray, " R"]
    """Of each reference with itself."""


def read_trajectory(path: Path, settings: StateSettings, *, run: str) -> Trajectory:
    """The states of a run; those that are not yet kept are computed, many checkpoints at once.

    Raises:
        CheckpointError: If there is no usable checkpoint, only one of a file, or moments were not saved or are damaged.
    """
    if path.is_file():
        raise CheckpointError(f"{path} is one checkpoint; a trajectory needs the folder of a run.")
    name, folder = f"trajectory-{settings.state}", run_of(path)
    cache = Cache(folder.results / name)
    if settings.state in MOMENT_OF:
        _require_moments(folder)
    measure = partial(_measure, settings=settings)
    entries, config = over_checkpoints(name, path, settings, measure, version=VERSION, keep_arrays=False)
    if settings.state == "weights":
        rows = [_stored_numbers(folder.checkpoints, entry.step, "") for entry in entries]
    elif settings.state in MOMENT_OF:
        for entry in entries:
            load_same_run(folder.moments.root / checkpoint_name(entry.step), config)  # whole, and this run's
        rows = [_stored_numbers(folder.moments, entry.step, f"{MOMENT_OF[settings.state]}/") for entry in entries]
    else:
        rows = [cache.stored_array(entry.step, "state") for entry in entries]
    noise = [float(sum(row["squared_noise"] for row in entry.rows)) for entry in entries]
    return Trajectory(
        run, config, [entry.step for entry in entries], [entry.checkpoint_hash for entry in entries], rows, noise
    )


def require_comparable(trajectories: Sequence[Trajectory], settings: StateSettings) -> None:
    """Refuse runs whose states are not of the same things.

    Raises:
        ConfigError: If their prompts or, unless states are predictions, their architectures differ.
    """
    first = trajectories[0]
    for other in trajectories[1:]:
        is_other_model = settings.state in HAS_WEIGHTS_SHAPE and other.config.model != first.config.model
        if settings.state in SEES_PROMPTS and not _same_prompts(first.config, other.config, settings):
            raise ConfigError(
                f"{other.run} and {first.run} have different prompts: for one PCA of both they need the same "
                "`task.task_size`, `task.max_examples`, `task.noise_variance` and `seeds.evaluation`, "
                "and for --distribution pretrain or first_task the same tasks."
            )
        if is_other_model or len(other.rows[0]) != len(first.rows[0]):
            raise ConfigError(f"{other.run} has another architecture than {first.run}; compare --state outputs.")


def references(configs: Sequence[RunConfig], settings: StateSettings) -> dict[str, Float[np.ndarray, " F"]]:
    """The states of the Bayes predictors: ridge, and dMMSE for every finite M; they have outputs only."""
    if settings.state != "outputs":
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
    """The states of every member; weights and moments are read from the checkpoints themselves."""
    if settings.state not in SEES_PROMPTS:
        return [Measurement([]) for _ in members.checkpoints]
    device = next(iter(members.params.values())).device
    prompts = Prompts(*(part.to(device) for part in fixed_prompts(members.config, settings)))
    if settings.state == "gradients":
        gradients, noise = mean_gradient(
            members.config.model, members.params, prompts, _num_batches(settings.num_prompts)
        )
        pairs = zip(gradients.float().numpy(), noise.tolist(), strict=True)
        return [Measurement([{"squared_noise": square}], {"state": state}) for state, square in pairs]
    outputs = apply if settings.state == "outputs" else _flat_token_outputs
    states = predict_prompts(partial(outputs, members.config.model), members.params, prompts)
    return [Measurement([], {"state": state}) for state in states.flatten(1).cpu().numpy()]


def _flat_token_outputs(model: ModelConfig, params: Params, xs: Tensor, ys: Tensor) -> Float[Tensor, "N B F"]:
    return token_outputs(model, params, xs, ys).flatten(2)


def _num_batches(num_prompts: int) -> int:
    """The fewest equal batches, eight at least where there are so many prompts, that are small enough."""
    counts = range(min(8, num_prompts), num_prompts + 1)
    return next(n for n in counts if num_prompts % n == 0 and num_prompts // n <= _GRADIENT_PROMPTS)


def _same_prompts(first: RunConfig, second: RunConfig, settings: StateSettings) -> bool:
    pairs = zip(fixed_prompts(first, settings), fixed_prompts(second, settings), strict=True)
    return first.task.noise_variance == second.task.noise_variance and all(torch.equal(one, two) for one, two in pairs)


def _require_moments(folder: RunFolder) -> None:
    missing = sorted(set(list_steps(folder.checkpoints)) - set(list_steps(folder.moments)))
    if missing:
        raise CheckpointError(
            f"{folder.path} has no Adam moments at step {missing[0]:,}; they are saved when a run is trained with "
            "--checkpoints.moments true, and cannot be found out afterwards."
        )


def _stored_numbers(store: LocalStore, step: int, prefix: str) -> StoredArray:
    """Return all tensors of a checkpoint whose name begins so, one after the other, left in the file."""
    return stored_tensors(store.root / checkpoint_name(step), prefix)
