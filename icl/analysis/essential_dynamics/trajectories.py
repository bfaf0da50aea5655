"""Trajectories: the states of a run at all saved steps, as a matrix (checkpoints x features) that stays on disk.

A state is one of the following arrays, flattened:

- `outputs`: the predictions for B fixed prompts (B K features), as in Carroll et al. 2025, section 4.2, and in the
  "y-only" variant of Hoogland et al. 2024, section 3.2. In Carroll et al. all prompts have the same task, which is a
  training task of every run. `--distribution first_task` makes such prompts. For a language run, `outputs` are the
  logits of the true next token, at one random position of each of B test rows (B features; Hoogland et al. 2024).
- `tokens`: all outputs at each of the 2K tokens, as in Hoogland et al. If `model.output` is `token`, there are D + 1
  outputs at each token, so 2 B K (D + 1) features. Most of these outputs are never trained.
- `weights`: all weights of the model.
- `gradients`: the gradient of the mean loss on the fixed prompts with respect to the weights. This gradient is an estimate from B
  prompts. We also store the expected square of its error (`Trajectory.noise`). All steps use the same prompts, so part of the error
  cancels in differences.
- `first_moment`, `second_moment`: Adam's running means of the training gradient and its square, before bias correction. They
  are saved only by runs with `checkpoints.moments`, and cannot be computed from the weights later.

We read the matrix in blocks of features, for all checkpoints at once. Inner products are sums over these blocks. Each
block is centred before it is multiplied, so no precision is lost by cancellation. If there are more features than
checkpoints, the whole matrix is never in memory, only a few copies of the inner products. For 10,000 checkpoints of
163,840 features, the matrix would need 6.6 GB in float32, and each copy of the inner products needs 0.8 GB in float64.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from icl import baselines
from icl.analysis.gradients.weights import mean_gradient
from icl.analysis.language import probes, test_rows
from icl.analysis.language.scores import next_token_logits
from icl.analysis.run import Members, over_checkpoints, setting
from icl.config import ModelConfig, RunConfig
from icl.config.validation import ConfigError, require, require_count
from icl.evaluation.predictors import predict_prompts
from icl.files.arrays import StoredArray
from icl.model.stacked import Params, apply, token_outputs
from icl.runs.checkpoints import (
    MOMENTS,
    CheckpointError,
    checkpoint_files,
    checkpoint_name,
    list_steps,
    load_checkpoint_file,
    stored_tensors,
)
from icl.runs.folder import RunFolder, run_of
from icl.runs.measure import Cache, Measurement, load_same_run
from icl.tasks.priors import task_sequence
from icl.tasks.prompts import Distribution, Prompts, noise_law, sample_prompts, training_pool

VERSION = 2
STREAM = "essential-dynamics"
BLOCK_BYTES = 2**27
"""Largest size in bytes of one block, which contains a few features of all rows in float64. One block is in memory at a time."""

_GRADIENT_PROMPTS = 32
"""Largest number of prompts in one backward pass. The error of the mean gradient is estimated from the scatter between passes."""

Row: TypeAlias = StoredArray | np.ndarray
State: TypeAlias = Literal["outputs", "tokens", "weights", "gradients", "first_moment", "second_moment"]

MOMENT_OF: dict[State, str] = dict(zip(("first_moment", "second_moment"), MOMENTS, strict=True))
SEES_PROMPTS: tuple[State, ...] = ("outputs", "tokens", "gradients")
HAS_WEIGHTS_SHAPE: tuple[State, ...] = ("weights", "gradients", "first_moment", "second_moment")


@dataclass(frozen=True, kw_only=True)
class StateSettings:
    """Definition of a state. If these settings change, states are computed again."""

    state: State = setting(
        "outputs",
        "state of the model: predictions for fixed prompts, all outputs at all tokens, weights, gradient of "
        "the loss on the prompts, or a moment of Adam (only for runs trained with checkpoints.moments)",
    )
    distribution: Literal["true", "pretrain", "first_task"] = setting(
        "true",
        "tasks of the prompts: new tasks (true), the run's M training tasks (pretrain), or the first training task (first_task)",
    )
    num_prompts: int = setting(512, "number of fixed prompts; above about 16, more prompts hardly change the results")

    def __post_init__(self) -> None:
        require_count("num_prompts", self.num_prompts, 1)
        is_enough = self.num_prompts > 1 or self.state != "gradients"
        require(is_enough, "`num_prompts` must be at least 2 for gradients, to estimate their error, got 1.")


class Trajectory(NamedTuple):
    """The states of one run, in the order of their steps."""

    run: str
    config: RunConfig
    steps: list[int]
    digests: list[str]
    rows: Sequence[Row]
    """Flattened states, all of the same length."""
    noise: list[float]
    """Expected squared error of each state; 0 for states that are exact."""


class Products(NamedTuple):
    """Inner products of rows and references, after subtracting the mean of the rows."""

    rows: Float[np.ndarray, "S S"]
    references: Float[np.ndarray, "R S"]
    """Inner products of each reference with each row."""
    squares: Float[np.ndarray, " R"]
    """Inner products of each reference with itself."""


def read_trajectory(path: Path, settings: StateSettings, *, run: str) -> Trajectory:
    """Return the states of a run. States that are not cached are computed, many checkpoints at once.

    Raises:
        CheckpointError: If there is no usable checkpoint, the path is a single file, or moments are missing or damaged.
    """
    if path.is_file():
        raise CheckpointError(
            f"{path} is a single checkpoint; give the folder of a run, because a trajectory consists of many checkpoints."
        )
    name, folder = f"trajectory-{settings.state}", run_of(path)
    cache = Cache(folder.results / name)
    if settings.state in MOMENT_OF:
        _require_moments(folder)
    _require_state(load_checkpoint_file(checkpoint_files(path)[0]).config, settings)
    measure = partial(_measure, settings=settings)
    entries, config = over_checkpoints(name, path, settings, measure, version=VERSION, keep_arrays=False)
    steps = [entry.step for entry in entries]
    if settings.state == "weights":
        rows = [stored_tensors(folder.checkpoints.root / checkpoint_name(step), "") for step in steps]
    elif settings.state in MOMENT_OF:
        files = [folder.moments.root / checkpoint_name(step) for step in steps]
        for file in files:
            load_same_run(file, config)  # raises an error if the file is damaged or belongs to another run
        rows = [stored_tensors(file, f"{MOMENT_OF[settings.state]}/") for file in files]
    else:
        rows = [cache.stored_array(step, "state") for step in steps]
    noise = [float(sum(row["squared_noise"] for row in entry.rows)) for entry in entries]
    return Trajectory(run, config, steps, [entry.checkpoint_hash for entry in entries], rows, noise)


def require_comparable(trajectories: Sequence[Trajectory], settings: StateSettings) -> None:
    """Check that the states of the runs can be compared.

    Raises:
        ConfigError: If the runs use different prompts, or if the architectures differ and the states are not
            predictions.
    """
    first = trajectories[0]
    for other in trajectories[1:]:
        is_other_model = settings.state in HAS_WEIGHTS_SHAPE and other.config.model != first.config.model
        if settings.state in SEES_PROMPTS and not _same_prompts(first.config, other.config, settings):
            raise ConfigError(
                f"{other.run} and {first.run} have different prompts. To share one PCA, they need the same "
                "`task.task_size`, `task.max_examples`, `task.noise_variance` and `seeds.evaluation`, "
                "and, for --distribution pretrain or first_task, the same tasks."
            )
        if is_other_model or len(other.rows[0]) != len(first.rows[0]):
            raise ConfigError(
                f"{other.run} and {first.run} have different architectures; use --state outputs to compare them."
            )


def references(configs: Sequence[RunConfig], settings: StateSettings) -> dict[str, Float[np.ndarray, " F"]]:
    """Return the predictions of ridge, and of dMMSE for every finite M, as states of the kind `outputs`.

    The result is empty for language runs. It is also empty for other states, such as weights, because ridge and dMMSE
    do not have these states.
    """
    if settings.state != "outputs" or configs[0].model.is_language:
        return {}
    (xs, ys, _), task = fixed_prompts(configs[0], settings), configs[0].task
    if task.noise_variance > 0:
        predictions = {"ridge": baselines.ridge(xs, ys, noise_variance=task.noise_variance)}
    else:
        predictions = {"ridge": baselines.ols(xs, ys)}  # the limit of ridge for zero noise
    pools = {
        (int(config.task.num_tasks), task_sequence(config)): config for config in configs if not config.task.is_gaussian
    }
    for (num_tasks, seed), config in sorted(pools.items(), key=lambda pool: str(pool[0])):
        tasks, noise = training_pool(config), noise_law(config)
        name = f"dMMSE M={num_tasks}" + ("" if len({seed for _, seed in pools}) == 1 else f" tasks={seed}")
        predictions[name] = baselines.dmmse(xs, ys, tasks=tasks, noise_variance=task.noise_variance, noise=noise)
    return {name: values.flatten().numpy() for name, values in predictions.items()}


def fixed_prompts(config: RunConfig, settings: StateSettings) -> Prompts:
    """Return the prompts of a state, on the CPU.

    Runs with the same sizes, noise, tasks and evaluation seed have the same prompts.
    """
    distribution: Distribution = "pretrain" if settings.distribution == "pretrain" else "true"
    prompts = sample_prompts(config, stream=STREAM, step=0, batch_size=settings.num_prompts, distribution=distribution)
    if settings.distribution != "first_task":
        return prompts
    noise = prompts.ys - (prompts.xs * prompts.ws.unsqueeze(-2)).sum(-1)
    task = training_pool(config, num_tasks=1)
    return prompts._replace(ys=(prompts.xs * task).sum(-1) + noise, ws=task.expand_as(prompts.ws))


def fixed_rows(config: RunConfig, settings: StateSettings) -> tuple[Tensor, Tensor]:
    """Return the test rows that define a language run's state, with BOS, and one position in each row."""
    rows = test_rows(config, settings.num_prompts)
    return rows, probes.positions(config.seeds.evaluation, len(rows), num_predictions=config.language.num_predictions)


def feature_blocks(rows: Sequence[Row], *, block_bytes: int = BLOCK_BYTES) -> Iterator[Float[np.ndarray, "S f"]]:
    """Yield blocks of consecutive features of all rows in float64, with at most `block_bytes` per block."""
    width = max(1, block_bytes // (8 * len(rows)))
    for start in range(0, len(rows[0]), width):
        yield np.stack([row[start : start + width] for row in rows]).astype(np.float64)


def centred_products(
    rows: Sequence[Row], points: Float[np.ndarray, "R F"], *, block_bytes: int = BLOCK_BYTES
) -> Products:
    """Compute all inner products after subtracting the mean of the rows, one block of features at a time.

    Args:
        rows: The states. Their mean is subtracted.
        points: The references, which do not enter the mean.
        block_bytes: Size of a block; see `feature_blocks`.
    """
    products = Products(np.zeros((len(rows),) * 2), np.zeros((len(points), len(rows))), np.zeros(len(points)))
    start = 0
    for block in feature_blocks(rows, block_bytes=block_bytes):
        mean = block.mean(0)
        reference_block = points[:, start : start + len(mean)] - mean
        block -= mean
        products.rows[:] += block @ block.T
        products.references[:] += reference_block @ block.T
        products.squares[:] += (reference_block**2).sum(1)
        start += len(mean)
    return products


def _measure(members: Members, *, settings: StateSettings) -> list[Measurement]:
    """Measure the state of every checkpoint. States `weights` and moments are not measured, but read from the checkpoints."""
    if settings.state not in SEES_PROMPTS:
        return [Measurement([]) for _ in members.checkpoints]
    device = next(iter(members.params.values())).device
    if members.config.model.is_language:
        rows, at = fixed_rows(members.config, settings)
        states = next_token_logits(members.config.model, members.params, rows.to(device), at)
        return [Measurement([], {"state": state}) for state in states.cpu().numpy()]
    prompts = Prompts(*(tensor.to(device) for tensor in fixed_prompts(members.config, settings)))
    model, params = members.config.model, members.params
    if settings.state == "gradients":
        gradients, noise = mean_gradient(model, params, prompts, _num_batches(settings.num_prompts))
        pairs = zip(gradients.float().numpy(), noise.tolist(), strict=True)
        return [Measurement([{"squared_noise": square}], {"state": state}) for state, square in pairs]
    outputs = apply if settings.state == "outputs" else _flat_token_outputs
    states = predict_prompts(partial(outputs, model), params, prompts)
    return [Measurement([], {"state": state}) for state in states.flatten(1).cpu().numpy()]


def _flat_token_outputs(model: ModelConfig, params: Params, xs: Tensor, ys: Tensor) -> Float[Tensor, "N B F"]:
    return token_outputs(model, params, xs, ys).flatten(2)


def _num_batches(num_prompts: int) -> int:
    """Return the smallest number of equal batches with at most `_GRADIENT_PROMPTS` prompts each; at least eight batches if possible."""
    counts = range(min(8, num_prompts), num_prompts + 1)
    return next(n for n in counts if num_prompts % n == 0 and num_prompts // n <= _GRADIENT_PROMPTS)


def _same_prompts(first: RunConfig, second: RunConfig, settings: StateSettings) -> bool:
    if first.model.is_language or second.model.is_language:
        return (
            first.language == second.language
            and first.model.family == second.model.family
            and first.seeds.evaluation == second.seeds.evaluation
        )
    pairs = zip(fixed_prompts(first, settings), fixed_prompts(second, settings), strict=True)
    return first.task.noise_variance == second.task.noise_variance and all(torch.equal(a, b) for a, b in pairs)


def _require_state(config: RunConfig, settings: StateSettings) -> None:
    is_refused = settings.state in ("tokens", "gradients") or settings.distribution != "true"
    if config.model.is_language and is_refused:
        raise ConfigError(
            f"`--state {settings.state} --distribution {settings.distribution}` is for regression runs only. For a language run, use "
            "`--distribution true`, and set `--state` to `outputs`, `weights`, `first_moment` or `second_moment`."
        )


def _require_moments(folder: RunFolder) -> None:
    missing = sorted(set(list_steps(folder.checkpoints)) - set(list_steps(folder.moments)))
    if missing:
        raise CheckpointError(
            f"{folder.path} has no Adam moments at step {missing[0]:,}. They cannot be computed later: train a run with "
            "--checkpoints.moments true, or use another --state."
        )
