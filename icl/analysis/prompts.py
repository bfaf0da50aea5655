"""The prompts that an analysis looks at: fixed, the same at every saved step, and as many at once as memory allows."""

import torch

from icl.analysis.run import Members
from icl.tasks.prompts import Distribution, Prompts, prompt_source

_NUMBERS_AT_ONCE = 1e8
"""Activations of one pass; in float32 they take four times as many bytes, and a second derivative holds several of each."""


def fixed_prompts(members: Members, *, stream: str, distribution: Distribution, count: int) -> Prompts:
    """The first prompts (B, K, D) of a stream of the run's `seeds.evaluation`, on the members' device."""
    source = prompt_source(members.config, stream=stream, distribution=distribution)
    device: torch.device = next(iter(members.params.values())).device
    prompts = source.sample(range(1), range(count), device=device)
    return Prompts(*(tensor[0] for tensor in prompts))


def prompts_at_once(members: Members) -> int:
    """How many prompts one member can see together: each token's activations number about six times parameters / C."""
    count = sum(tensor[0].numel() for tensor in members.params.values())
    per_prompt = 6 * 2 * members.config.task.max_examples * count / members.config.model.embed_size
    return max(1, int(_NUMBERS_AT_ONCE / per_prompt))
