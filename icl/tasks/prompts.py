"""Prompts (x1, y1, ..., xK, yK) with y = w . x + noise, and their layout as tokens.

A batch is a pure function of (seed, stream, step, index): stream `train` draws from `seeds.data` and `seeds.noise`,
every other stream from `seeds.evaluation`. Rows are indices, so a rank's share of a batch is a slice of the whole.

Tokens follow Raventos et al. 2023 and Hoogland et al. 2024: an x-token is (0, x), a y-token is (y, 0, ..., 0), both
of width D + 1. The last y-token would serve no prediction, so a prompt of K examples has 2K - 1 tokens.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from icl import rng
from icl.config import RunConfig
from icl.memory import require_memory
from icl.tasks.priors import Discrete, Gaussian, sample_tasks, task_prior
from icl.validation import ConfigError, whole

Distribution = Literal["pretrain", "true"]
MAX_STEP = 2**62
MAX_PROMPTS = 2**32
"""Prompts of one step: an index is one word of the random counter."""


class Prompts(NamedTuple):
    """A batch of prompts: inputs, targets and the task vectors behind them; leading axes may be added."""

    xs: Float[Tensor, "*S B K D"]
    ys: Float[Tensor, "*S B K"]
    ws: Float[Tensor, "*S B D"]


class PromptSource(NamedTuple):
    """Where a stream's prompts come from: a prior, sizes, and the keys of inputs, tasks and noise."""

    prior: Gaussian | Discrete
    task_size: int
    max_examples: int
    noise_variance: float
    xs_key: rng.Stream
    tasks_key: rng.Stream
    noise_key: rng.Stream

    def sample(
        self, steps: range, indices: range | Int64[Tensor, " B"], *, device: torch.device | str = "cpu"
    ) -> Prompts:
        """The prompts `indices` of every step in `steps`, stacked on a leading axis."""
        return Prompts(*(part.squeeze(0) for part in sample_together([self], steps, indices, device=device)))


def sample_together(
    sources: Sequence[PromptSource],
    steps: range,
    indices: range | Int64[Tensor, " B"],
    *,
    device: torch.device | str = "cpu",
) -> Prompts:
    """The prompts of several sources of one size, each as it would make them alone: xs (N, S, B, K, D)."""
    one = sources[0]
    count = indices.stop - indices.start if isinstance(indices, range) else len(indices)
    require_prompt_memory(len(sources) * len(steps) * count, one.max_examples, one.task_size, device)
    step = steps.start + torch.arange(len(steps), device=device)  # XLA compiles a range's bounds into its graph
    index = torch.arange(indices.start, indices.stop, device=device) if isinstance(indices, range) else indices
    xs_key = rng.together([source.xs_key for source in sources], device=device)
    noise_key = rng.together([source.noise_key for source in sources], device=device)
    size = (one.max_examples, one.task_size)
    xs = rng.normal(xs_key, step, index, size[0] * size[1]).unflatten(-1, size)  # N S B K D
    ws = sample_tasks([source.prior for source in sources], [source.tasks_key for source in sources], step, index)
    noise = rng.normal(noise_key, step, index, one.max_examples)  # N S B K
    clean = (xs * ws.unsqueeze(-2)).sum(-1)  # N S B K; a matrix product would round by the shape of the batch
    return Prompts(xs, clean + one.noise_variance**0.5 * noise, ws)


def prompt_source(config: RunConfig, *, stream: str, distribution: Distribution | None = None) -> PromptSource:
    """The source of one stream of a run.

    Args:
        config: The run.
        stream: `train`, or any other name for fixed prompts.
        distribution: `pretrain` (the run's M tasks) or `true` (the Gaussian prior); left out, `true` for a stream
            of that name and `pretrain` for all others.

    Raises:
        ConfigError: If there is no such distribution, or the stream has no name.
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
        prior=task_prior(task.num_tasks, task.task_size, seeds.tasks) if is_pool else Gaussian(task.task_size),
        task_size=task.task_size,
        max_examples=task.max_examples,
        noise_variance=task.noise_variance,
        xs_key=rng.stream(data_seed, f"{stream}/xs"),
        tasks_key=rng.stream(data_seed, f"{stream}/tasks"),
        noise_key=rng.stream(noise_seed, f"{stream}/noise"),
    )


def sample_prompts(
    config: RunConfig,
    *,
    stream: str,
    step: int,
    batch_size: int,
    distribution: Distribution | None = None,
    device: torch.device | str = "cpu",
) -> Prompts:
    """Return the batch of one step of a stream: xs (B, K, D), ys (B, K), ws (B, D).

    A smaller batch is the beginning of a larger one.

    Raises:
        ConfigError: If `step` is not a whole number from 0, `batch_size` not one from 1, or there is no such distribution.

    Example:
        >>> xs, ys, ws = sample_prompts(RunConfig(), stream="train", step=0, batch_size=4)
        >>> tuple(xs.shape), tuple(ys.shape), tuple(ws.shape)
        ((4, 8, 2), (4, 8), (4, 2))
    """
    step, batch_size = whole("step", step, 0, MAX_STEP), whole("batch_size", batch_size, 1, MAX_PROMPTS)
    source = prompt_source(config, stream=stream, distribution=distribution)
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
    """Refuse more prompts than memory holds.

    Args:
        num_prompts: How many.
        max_examples: Examples of each.
        task_size: Their dimension.
        device: Where they are to be.
        for_ridge: Whether ridge will predict them; it factors a matrix for each prompt in float64.

    Raises:
        ConfigError: Saying how much is needed and how much there is.
    """
    numbers = max_examples * (task_size + 1 + (2 * (task_size + max_examples) if for_ridge else 0))
    told = f"{num_prompts:,} prompts of {max_examples:,} examples in {task_size:,} dimensions"
    require_memory({told: 4 * num_prompts * numbers}, device)


def to_tokens(xs: Float[Tensor, "*S B K D"], ys: Float[Tensor, "*S B K"]) -> Float[Tensor, "*S B T C"]:
    """The T = 2K - 1 tokens of width C = D + 1: x1, y1, ..., xK. The last target is left out."""
    x_tokens = torch.nn.functional.pad(xs, (1, 0))  # B K D+1
    y_tokens = torch.nn.functional.pad(ys.unsqueeze(-1), (0, xs.shape[-1]))  # B K D+1
    return torch.stack((x_tokens, y_tokens), dim=-2).flatten(-3, -2)[..., :-1, :]  # B 2K-1 D+1


def from_tokens(tokens: Float[Tensor, "*S B T C"]) -> tuple[Float[Tensor, "*S B K D"], Float[Tensor, "*S B N"]]:
    """The inputs (K of them) and the N = K - 1 targets that `to_tokens` laid out."""
    return tokens[..., ::2, 1:], tokens[..., 1::2, 0]
