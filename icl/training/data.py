"""Training prompts as an endless stream that knows which step it is at.

The prompts of step s are a pure function of (seeds, s), so a resumed run asks for step s and has them; nothing of the
stream is saved. Several steps are made at once, because that costs little more than one; blocks begin at multiples
of their length, so that resuming in the middle of one gives bit-identical numbers.
"""

from collections.abc import Callable, Iterator, Sequence

import lightning.pytorch as pl
import torch

from icl.config import RunConfig
from icl.tasks.prompts import Prompts, prompt_source, sample_together

_BLOCK_NORMALS = 2**19
_CUDA_BLOCK_NORMALS = 2**24  # its kernels cost as much for few numbers as for many
_MAX_BLOCK = 64


class PromptStream:
    """One batch per step for every member: xs (N, B, K, D), ys (N, B, K), B the rank's share of the batch.

    Args:
        configs: The members.
        first_step: The step to begin at, asked when iteration begins.
        rank: Which slice of every batch is this process's.
        num_ranks: How many slices there are.
        device: Where the prompts are made.
    """

    def __init__(
        self,
        configs: Sequence[RunConfig],
        first_step: Callable[[], int],
        *,
        rank: int = 0,
        num_ranks: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        self.sources = [prompt_source(config, stream="train") for config in configs]
        self.first_step, self.device = first_step, device
        share = configs[0].trainer.batch_size // num_ranks
        self.indices = range(rank * share, (rank + 1) * share)
        normals = len(configs) * share * configs[0].task.max_examples * (configs[0].task.task_size + 1)
        room = _CUDA_BLOCK_NORMALS if torch.device(device).type == "cuda" else _BLOCK_NORMALS
        self.block = max(1, min(_MAX_BLOCK, room // normals))

    def __iter__(self) -> Iterator[Prompts]:
        step = self.first_step()
        while True:
            start = step - step % self.block
            prompts = self._sample(range(start, start + self.block))
            # Taken apart at once: XLA compiles an index into its graph.
            for parts in list(zip(*(part.unbind() for part in prompts), strict=True))[step - start :]:
                yield Prompts(*parts)
            step = start + self.block

    def _sample(self, steps: range) -> Prompts:
        """All members' prompts of several steps: xs (S, N, B, K, D)."""
        return Prompts(
            *(part.transpose(0, 1) for part in sample_together(self.sources, steps, self.indices, device=self.device))
        )


class PromptDataModule(pl.LightningDataModule):
    """Streams the training prompts of a population, on the device that trains."""

    def __init__(self, configs: Sequence[RunConfig]) -> None:
        super().__init__()
        self.configs = configs

    def train_dataloader(self) -> PromptStream:
        """The stream; it has no length and no workers, and draws nothing from the global generator."""
        trainer = self.trainer
        assert trainer is not None
        return PromptStream(
            self.configs,
            lambda: trainer.global_step,
            rank=trainer.global_rank,
            num_ranks=trainer.world_size,
            device=trainer.strategy.root_device,
        )
