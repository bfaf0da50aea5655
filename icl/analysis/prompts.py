"""Fixed prompts for analyses. They are the same at every saved step, and are processed in parts that fit in memory."""

from dataclasses import dataclass
from typing import Literal

import torch

from icl.analysis.run import Members, setting
from icl.config.validation import require
from icl.tasks.prompts import Distribution, Prompts, prompt_source

_NUMBERS_AT_ONCE = 1e8
"""Largest number of activations in one pass: 0.4 GB in float32. A second derivative stores several copies of the activations."""


@dataclass(frozen=True, kw_only=True)
class PromptSettings:
    """Settings that several analyses share."""

    distribution: Literal["pretrain", "true"] = setting(
        "pretrain", "tasks of the prompts: the run's M training tasks (pretrain), or new tasks (true)"
    )


def require_multiple(name: str, num_prompts: int, num_batches: int) -> None:
    """Check that a number of prompts can be split into equal batches.

    Raises:
        ConfigError: If `num_prompts` is not a multiple of `num_batches`.
    """
    is_multiple = num_prompts >= num_batches and num_prompts % num_batches == 0
    require(is_multiple, f"`{name}` must be a multiple of {num_batches} (the number of batches), got {num_prompts}.")


def fixed_prompts(members: Members, stream: str, distribution: Distribution, count: int, *, step: int = 0) -> Prompts:
    """Return `count` fixed prompts on the checkpoints' device.

    They depend on the run's `seeds.evaluation`, on the name `stream` and on `step`. A larger `count` only adds prompts.
    """
    source = prompt_source(members.config, stream=stream, distribution=distribution)
    device: torch.device = next(iter(members.params.values())).device
    prompts = source.sample(range(step, step + 1), range(count), device=device)
    return Prompts(*(tensor[0] for tensor in prompts))


def prompts_at_once(members: Members) -> int:
    """Return how many prompts one checkpoint can process in one pass."""
    num_parameters = sum(tensor[0].numel() for tensor in members.params.values())
    # A prompt has 2K tokens. Each token has about 6 P / C activations, for P parameters and width C.
    per_prompt = 6 * 2 * members.config.task.max_examples * num_parameters / members.config.model.embed_size
    return max(1, int(_NUMBERS_AT_ONCE / per_prompt))
