"""Prompts x1, y1, ..., xK, yK with y = w . x + noise, and their layout as tokens.

In each prompt w is drawn from a prior (`icl.tasks.priors`), every x from N(0, I_D), and the noise from N(0, sigma^2). This is
the setup of Raventos et al. (2023), section 2. The settings of the section `task` can choose other distributions
(`icl.tasks.laws`).

For one configuration, a prompt is a pure function of (seed, stream, step, index). The stream `train` uses `seeds.data` and
`seeds.noise`; every other stream uses `seeds.evaluation`. The index is the position of the prompt in the batch, so each of several
processes can draw its own slice of the batch.

Tokens have D + 1 coordinates, as in Raventos et al. (2023) and Hoogland et al. (2024): an x-token is (0, x), a y-token is
(y, 0, ..., 0). No prediction depends on the last y-token, so a prompt of K examples has 2K - 1 tokens.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from icl import rng
from icl.compute.devices import require_memory
from icl.config import RunConfig
from icl.config.validation import ConfigError, whole
from icl.tasks import laws
from icl.tasks.laws import Law, TaskLaw
from icl.tasks.pools import PoolSchedule
from icl.tasks.priors import Prior, sample_tasks, task_pool, task_prior, task_sequence

Distribution = Literal["pretrain", "true"]
MAX_STEP = 2**62
MAX_PROMPTS = 2**32
"""Largest number of prompts in one step. The index of a prompt is one 32-bit word of the random counter."""


class Prompts(NamedTuple):
    """Batch of prompts: inputs, targets and the task vectors. There may be more leading axes."""

    xs: Float[Tensor, "*S B K D"]
    ys: Float[Tensor, "*S B K"]
    ws: Float[Tensor, "*S B D"]


class PromptSource(NamedTuple):
    """Everything that determines a stream's prompts: prior, sizes, distributions of noise and inputs, and keys of the random streams."""

    prior: Prior
    task_size: int
    max_examples: int
    noise_variance: float
    xs_key: rng.Stream
    tasks_key: rng.Stream
    noise_key: rng.Stream
    noise: Law = laws.GAUSSIAN
    inputs: Law = laws.GAUSSIAN
    input_correlation: float | None = None
    """Correlation of each input with the input before it; None means independent inputs."""

    @property
    def numbers_per_row(self) -> int:
        """Number of random numbers for the inputs and the noise of a prompt, K (D + 1). The task is not counted."""
        return self.max_examples * (self.task_size + 1)

    def sample(
        self, steps: range, indices: range | Int64[Tensor, " B"], *, device: torch.device | str = "cpu"
    ) -> Prompts:
        """Return the prompts at `indices` for every step. The leading axis is the step."""
        return Prompts(*(part.squeeze(0) for part in sample_together([self], steps, indices, device=device)))


def sample_together(
    sources: Sequence[PromptSource],
    steps: range,
    indices: range | Int64[Tensor, " B"],
    *,
    device: torch.device | str = "cpu",
) -> Prompts:
    """Sample prompts from N sources at once. All sources must have the same sizes, noise and distribution of inputs.

    The result has the leading axes N (sources), S (steps) and B (indices). Each source gives the same prompts as if the
    source were used alone.
    """
    first = sources[0]
    num_examples, task_size = first.max_examples, first.task_size
    # `len` raises OverflowError for a range of 2^63 or more. We want the memory check below to report the error instead.
    batch_size = indices.stop - indices.start if isinstance(indices, range) else len(indices)
    require_prompt_memory(len(sources) * len(steps) * batch_size, num_examples, task_size, device)
    # `torch.arange(start, stop)` would be slow on XLA, which compiles the bounds into its graph and so would compile again for every step.
    step = steps.start + torch.arange(len(steps), device=device)
    index = torch.arange(indices.start, indices.stop, device=device) if isinstance(indices, range) else indices
    xs_key = rng.together([source.xs_key for source in sources], device=device)
    noise_key = rng.together([source.noise_key for source in sources], device=device)
    xs = laws.draw(first.inputs, xs_key, step, index, num_examples * task_size)
    xs = xs.unflatten(-1, (num_examples, task_size))  # N S B K D
    if first.input_correlation is not None:
        xs = laws.correlate(xs, first.input_correlation)
    ws = sample_tasks([source.prior for source in sources], [source.tasks_key for source in sources], step, index)
    noise = laws.draw(first.noise, noise_key, step, index, num_examples)  # N S B K
    # No matrix product: its rounding depends on the batch size, so a prompt's targets would depend on the batch size too.
    clean = (xs * ws.unsqueeze(-2)).sum(-1)  # N S B K
    return Prompts(xs, clean + first.noise_variance**0.5 * noise, ws)


def task_law(config: RunConfig) -> TaskLaw:
    """Return the law from which a run's tasks are drawn."""
    task = config.task
    has_structure = task.prior in ("low_rank", "mixture")
    return TaskLaw(
        name=task.prior,
        df=task.prior_df,
        density=task.prior_density,
        rank=task.prior_rank,
        components=task.prior_components,
        between=task.prior_between,
        seed=config.seeds.tasks if has_structure else 0,
    )


def noise_law(config: RunConfig) -> Law:
    """Return the distribution of a run's noise, scaled to variance 1."""
    return Law(config.task.noise, config.task.noise_df)


def training_pool(
    config: RunConfig, *, step: int | None = None, num_tasks: int | None = None, device: torch.device | str = "cpu"
) -> Float[Tensor, "M D"]:
    """Return the pool of a run, or its first `num_tasks` tasks.

    Args:
        config: The run.
        step: Step whose pool is returned. The step is needed only if the pool changes during training.
        num_tasks: Number of tasks; None means all M, which must then be finite.
        device: Device of the result.

    Raises:
        ConfigError: If `num_tasks` is None although M is infinite, no step is given although the pool changes, or one of the two
            numbers is out of bounds. Also raised if an imported table of tasks is unknown, has too few tasks or another D, or if
            the pool does not fit in memory.
    """
    return task_pool(
        config.task.num_tasks if num_tasks is None else num_tasks,
        config.task.task_size,
        task_sequence(config),
        law=task_law(config),
        schedule=PoolSchedule(config.task.pool, config.task.pool_steps),
        time=_pool_time(config, step) or 0,
        device=device,
    )


def last_pool_step(step: int) -> int:
    """Return the step whose pool was used by the last update before checkpoint `step`; 0 for the initial model."""
    return max(step - 1, 0)


def prompt_source(
    config: RunConfig, *, stream: str, distribution: Distribution | None = None, pool_step: int | None = None
) -> PromptSource:
    """Return the source of one stream of a run.

    Args:
        config: The run.
        stream: `train`, or another name. All streams except `train` use `seeds.evaluation`.
        distribution: `pretrain` (the run's M tasks) or `true` (new tasks from the prior). The default is `true` for the stream `true`, and
            `pretrain` for all other streams.
        pool_step: Step whose pool is used, if the pool changes during training. The stream `train` ignores `pool_step`,
            and uses the pool at the step of the prompts.

    Raises:
        ConfigError: If the distribution is unknown, `stream` is not a name, or `config` is not a RunConfig. Also raised if
            `pool_step` is missing or invalid, although the stream is not `train` and its prompts use a pool that changes.
    """
    if not isinstance(stream, str) or not stream:
        raise ConfigError(f"`stream` must be a name such as `train` or `true`, got {stream!r}.")
    if not isinstance(config, RunConfig):
        raise ConfigError(f"`config` must be a RunConfig, got {type(config).__name__}.")
    task, seeds = config.task, config.seeds
    distribution = distribution or ("true" if stream == "true" else "pretrain")
    if distribution not in get_args(Distribution):
        raise ConfigError(f"`distribution` must be `pretrain` or `true`, got {distribution!r}.")
    is_training = stream == "train"
    data_seed = seeds.data if is_training else seeds.evaluation
    noise_seed = seeds.noise if is_training else seeds.evaluation
    is_pool = distribution == "pretrain"
    return PromptSource(
        prior=task_prior(
            task.num_tasks if is_pool else math.inf,
            task.task_size,
            task_sequence(config),
            law=task_law(config),
            schedule=PoolSchedule(task.pool, task.pool_steps),
            time=_pool_time(config, pool_step) if is_pool and not is_training else None,
        ),
        task_size=task.task_size,
        max_examples=task.max_examples,
        noise_variance=task.noise_variance,
        xs_key=rng.stream(data_seed, f"{stream}/xs"),
        tasks_key=rng.stream(data_seed, f"{stream}/tasks"),
        noise_key=rng.stream(noise_seed, f"{stream}/noise"),
        noise=noise_law(config),
        inputs=Law("gaussian" if task.inputs == "ar1" else task.inputs, task.input_df),
        input_correlation=task.input_correlation,
    )


def _pool_time(config: RunConfig, step: int | None) -> int | None:
    """Return the step whose pool is used, or None if the pool does not change."""
    if not config.task.has_moving_pool:
        return None
    if step is None:
        raise ConfigError(
            f"The run's pool of tasks changes during training (`task.pool` is {config.task.pool}), so the run has no "
            "fixed training tasks. Give the step whose pool is to be used, or use new tasks (the distribution `true`)."
        )
    return whole("pool_step", step, 0, MAX_STEP)


def sample_prompts(
    config: RunConfig,
    *,
    stream: str,
    step: int,
    batch_size: int,
    distribution: Distribution | None = None,
    pool_step: int | None = None,
    device: torch.device | str = "cpu",
) -> Prompts:
    """Return the batch of one step of a stream: xs (B, K, D), ys (B, K), ws (B, D).

    A smaller batch consists of the first prompts of a larger batch. If the pool changes, `pool_step` is the step whose pool is used.

    Raises:
        ConfigError: If `step` is not a whole number from 0 to 2^62, `batch_size` is not a whole number from 1 to 2^32, `stream` is
            not a name, or the distribution is unknown. Also raised if the prompts do not fit in memory, or if `pool_step`
            is missing although the stream is not `train` and its prompts use a pool that changes.

    Examples:
        >>> xs, ys, ws = sample_prompts(RunConfig(), stream="train", step=0, batch_size=4)
        >>> tuple(xs.shape), tuple(ys.shape), tuple(ws.shape)
        ((4, 8, 2), (4, 8), (4, 2))
    """
    step, batch_size = whole("step", step, 0, MAX_STEP), whole("batch_size", batch_size, 1, MAX_PROMPTS)
    source = prompt_source(config, stream=stream, distribution=distribution, pool_step=pool_step)
    prompts = source.sample(range(step, step + 1), range(batch_size), device=device)
    return Prompts(*(part[0] for part in prompts))


def require_prompt_memory(
    num_prompts: int,
    max_examples: int,
    task_size: int,
    device: torch.device | str,
    *,
    for_ridge: bool = False,
) -> None:
    """Refuse more prompts than fit in memory.

    Args:
        num_prompts: Number of prompts.
        max_examples: Number of examples in each prompt.
        task_size: Dimension of the inputs.
        device: Device of the prompts.
        for_ridge: Whether ridge will predict the targets. Ridge needs a matrix in float64 for each prompt.

    Raises:
        ConfigError: If the prompts do not fit. The message says how much memory is needed and how much is free.
    """
    numbers = max_examples * (
        task_size + 1 + (2 * (task_size + max_examples) if for_ridge else 0)
    )  # numbers per prompt
    what = f"{num_prompts:,} prompts of {max_examples:,} examples in {task_size:,} dimensions"
    require_memory({what: 4 * num_prompts * numbers}, device)


def to_tokens(xs: Float[Tensor, "*S B K D"], ys: Float[Tensor, "*S B K"]) -> Float[Tensor, "*S B T C"]:
    """Return the T = 2K - 1 tokens x1, y1, ..., xK, of width C = D + 1. The last target is left out."""
    x_tokens = torch.nn.functional.pad(xs, (1, 0))  # B K D+1
    y_tokens = torch.nn.functional.pad(ys.unsqueeze(-1), (0, xs.shape[-1]))  # B K D+1
    return torch.stack((x_tokens, y_tokens), dim=-2).flatten(-3, -2)[..., :-1, :]  # B 2K-1 D+1
