"""Training prompts as an endless stream that knows which step it is at.

The prompts of step s are a pure function of (seeds, s), so a resumed run asks for step s and has them; nothing of the
stream is saved. Several steps are made at once, because that costs little more than one; blocks begin at multiples
of their length, so that resuming in the middle of one gives bit-identical numbers.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import lightning.pytorch as pl
import torch

from icl.config import RunConfig
from icl.schedules import checkpoint_steps, next_stop
from icl.tasks.prompts import Prompts, prompt_source, sample_together

_BLOCK_NORMALS = 2**19
_CUDA_BLOCK_NORMALS = 2**24  # its kernels cost as much for few numbers as for many
_MAX_BLOCK = 64

LONGEST_STRETCH = {"cuda": 32, "cpu": 4}
"""Steps that a device kind is given at once, if a block of prompts has as many: so a large model is stopped soon."""


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


class Stretches:
    """The prompts of several steps at once, up to the next step at which something is due.

    The framework is asked once per stretch, so its own overhead (about 2 ms on a slow core, as long as a step on a GPU)
    nearly vanishes.

    Args:
        stream: The prompts, step by step.
        first_step: The step to begin at, asked when iteration begins.
        stop: The first step after a given one at which the callbacks must see the model.
        longest: Steps at most.
    """

    def __init__(
        self, stream: PromptStream, first_step: Callable[[], int], stop: Callable[[int], int], *, longest: int
    ) -> None:
        self.stream, self.first_step, self.stop, self.longest = stream, first_step, stop, longest

    def __iter__(self) -> Iterator[list[Prompts]]:
        step, prompts = self.first_step(), iter(self.stream)
        while True:
            stop = min(self.stop(step), step + self.longest)
            yield list(itertools.islice(prompts, stop - step))
            step = stop


class PromptDataModule(pl.LightningDataModule):
    """Streams the training prompts of a population, on the device that trains."""

    def __init__(self, configs: Sequence[RunConfig]) -> None:
        super().__init__()
        self.configs = configs

    def train_dataloader(self) -> Stretches:
        """The stream; it has no length and no workers, and draws nothing from the global generator."""
        trainer, config = self.trainer, self.configs[0]
        assert trainer is not None
        device = trainer.strategy.root_device

        def first_step() -> int:
            return trainer.global_step

        stream = PromptStream(
            self.configs, first_step, rank=trainer.global_rank, num_ranks=trainer.world_size, device=device
        )
        grid, limit = config.checkpoints, config.trainer.max_steps
        saved = checkpoint_steps(limit, every=grid.every, num_log=grid.num_log, num_linear=grid.num_linear)
        stop = partial(
            next_stop,
            every=[config.trainer.log_every, config.evaluation.every],
            steps=sorted({*saved, trainer.max_steps}),
        )
        return Stretches(stream, first_step, stop, longest=min(stream.block, LONGEST_STRETCH.get(device.type, 1)))
