"""Training prompts as an endless stream that can start at any step.

The prompts of step s depend only on the seeds and s. So a resumed run draws the same prompts as an uninterrupted run, although no state of
the stream is saved. The prompts of several steps are drawn together as one block, because drawing a block takes little more time than
drawing the prompts of one step. Every block begins at a multiple of the block's length. So a run that resumes in the middle of a block
draws the same block again, and gets bit-identical prompts.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import lightning.pytorch as pl
import torch

from icl.config import RunConfig
from icl.config.schedules import next_stop
from icl.runs.contents import expected_steps
from icl.tasks.prompts import Prompts
from icl.tasks.rows import TokenRows
from icl.tasks.streams import sample_sources, stream_source

_BLOCK_NORMALS = 2**19
"""Largest number of normal variates in a block of prompts on a CPU."""
_CUDA_BLOCK_NORMALS = 2**24
"""Largest number of normal variates in a block of prompts on a GPU, where a kernel takes as long for few numbers as for many."""
_MAX_BLOCK = 64
"""Largest number of steps whose prompts are drawn as one block."""

LONGEST_STRETCH = {"cuda": 32, "cpu": 4}
"""Largest number of steps in one of Lightning's batches, for each type of device. The number is limited because training can be stopped
only after a batch."""


class PromptStream:
    """Endless stream of training batches, one for each step: xs (N, B, K, D) and ys (N, B, K), or tokens (N, B, T).

    N is the number of members. B is the number of prompts (or rows of tokens) that this process takes from each member's batch.

    Args:
        configs: Settings of the members.
        first_step: Function that returns the first step. It is called when iteration begins.
        rank: Index of this process's slice of every batch.
        num_ranks: Number of slices of every batch; each process draws one of them.
        device: Device on which prompts are drawn.
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
        self.sources = [stream_source(config, stream="train") for config in configs]
        self.first_step, self.device = first_step, device
        share = configs[0].trainer.batch_size // num_ranks
        self.indices = range(rank * share, (rank + 1) * share)
        normals = len(configs) * share * self.sources[0].numbers_per_row
        max_normals = _CUDA_BLOCK_NORMALS if torch.device(device).type == "cuda" else _BLOCK_NORMALS
        self.block = max(1, min(_MAX_BLOCK, max_normals // normals))

    def __iter__(self) -> Iterator[Prompts | TokenRows]:
        step = self.first_step()
        while True:
            start = step - step % self.block
            prompts = self._sample(range(start, start + self.block))
            # Unbind all steps at once: XLA would compile each index into a separate graph.
            for parts in list(zip(*(part.unbind() for part in prompts), strict=True))[step - start :]:
                yield type(prompts)(*parts)
            step = start + self.block

    def _sample(self, steps: range) -> Prompts | TokenRows:
        """Draw the prompts or rows of all members for several steps. The first axis is the step, the second the member."""
        drawn = sample_sources(self.sources, steps, self.indices, device=self.device)
        return type(drawn)(*(part.transpose(0, 1) for part in drawn))


class Stretches:
    """Batches for Lightning. Each batch contains the prompts of all steps up to the next step at which a callback has work to do.

    Lightning then runs once per batch (a stretch of steps) instead of once per step. For each batch, Lightning needs about 2 ms on a slow
    core, which is as long as a step on a GPU.

    Args:
        stream: Source of the prompts of each step.
        first_step: Function that returns the first step. It is called when iteration begins.
        stop: Function that takes a step and returns the next step at which a callback has work to do.
        longest: Largest number of steps in a stretch.
    """

    def __init__(
        self, stream: PromptStream, first_step: Callable[[], int], stop: Callable[[int], int], *, longest: int
    ) -> None:
        self.stream, self.first_step, self.stop, self.longest = stream, first_step, stop, longest

    def __iter__(self) -> Iterator[list[Prompts | TokenRows]]:
        step, prompts = self.first_step(), iter(self.stream)
        while True:
            stop = min(self.stop(step), step + self.longest)
            yield list(itertools.islice(prompts, stop - step))
            step = stop


class PromptDataModule(pl.LightningDataModule):
    """Stream the training prompts of a population, on the device that trains."""

    def __init__(self, configs: Sequence[RunConfig]) -> None:
        super().__init__()
        self.configs = configs

    def train_dataloader(self) -> Stretches:
        """Return the stream of batches. The stream has no length and no workers, and does not use the global generator."""
        trainer, config = self.trainer, self.configs[0]
        assert trainer is not None
        device = trainer.strategy.root_device

        def first_step() -> int:
            return trainer.global_step

        stream = PromptStream(
            self.configs, first_step, rank=trainer.global_rank, num_ranks=trainer.world_size, device=device
        )
        saved = expected_steps(config, config.trainer.max_steps)
        intervals = [config.trainer.log_every, config.evaluation.every]
        stop = partial(next_stop, every=intervals, steps=sorted({*saved, trainer.max_steps}))
        return Stretches(stream, first_step, stop, longest=min(stream.block, LONGEST_STRETCH.get(device.type, 1)))
