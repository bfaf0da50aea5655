"""Training prompts as an endless stream that knows which step it is at.

The prompts of step s are a pure function of (seeds, s), so a resumed run asks for step s and has them; nothing of the
stream is saved. Several steps are made at once, because that costs little more than one; blocks begin at multiples
of their length, so that resuming in the middle of one gives bit-identical numbers.
"""

from collections.abc import Iterator, Sequence

import lightning.pytorch as pl
import torch

from icl.config import RunConfig
from icl.tasks.prompts import Prompts, prompt_source

_BLOCK_NORMALS = 2**19
_MAX_BLOCK = 64


class PromptStream:
    """One batch per step for every member, from `trainer.global_step` on: xs (N, B, K, D), ys (N, B, K)."""

    def __init__(self, configs: Sequence[RunConfig], trainer: pl.Trainer) -> None:
        self.sources = [prompt_source(config, stream="train") for config in configs]
        self.trainer = trainer
        share = configs[0].trainer.batch_size // trainer.world_size
        self.indices = range(trainer.global_rank * share, (trainer.global_rank + 1) * share)
        normals = len(configs) * share * configs[0].task.max_examples * (configs[0].task.task_size + 1)
        self.block = max(1, min(_MAX_BLOCK, _BLOCK_NORMALS // normals))

    def __iter__(self) -> Iterator[Prompts]:
        step = self.trainer.global_step
        while True:
            start = step - step % self.block
            prompts = self._sample(range(start, start + self.block))
            for offset in range(step - start, self.block):
                yield Prompts(*(part[offset] for part in prompts))
            step = start + self.block

    def _sample(self, steps: range) -> Prompts:
        """All members' prompts of several steps: xs (S, N, B, K, D)."""
        device = self.trainer.strategy.root_device
        members = [source.sample(steps, self.indices, device=device) for source in self.sources]
        return Prompts(*(torch.stack(parts, dim=1) for parts in zip(*members, strict=True)))


class PromptDataModule(pl.LightningDataModule):
    """Streams the training prompts of a population, on the device that trains."""

    def __init__(self, configs: Sequence[RunConfig]) -> None:
        super().__init__()
        self.configs = configs

    def train_dataloader(self) -> PromptStream:
        """The stream; it has no length and no workers, and draws nothing from the global generator."""
        assert self.trainer is not None
        return PromptStream(self.configs, self.trainer)
