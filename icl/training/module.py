"""The LightningModule: a population's loss, one step at a time. A run is a population of one.

It holds the stacked parameters of N members, computes each member's mean squared error on prompts of its own, and
keeps what the step learns about itself (loss since the last row, clipped steps, first non-finite step) as tensors on
the device, so that a step never waits for the host.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from jaxtyping import Float
from torch import Tensor, nn

from icl import population
from icl.build import build_architecture
from icl.config import RunConfig
from icl.population import Params
from icl.tasks.prompts import Prompts
from icl.training.optim import clip_by_member, make_optimizer, make_scheduler


class PopulationModule(pl.LightningModule):
    """N members of one architecture under one optimiser; `configs[i]` is the run of member i."""

    loss_sum: Tensor
    num_clipped: Tensor
    first_bad_step: Tensor

    def __init__(self, configs: Sequence[RunConfig], params: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.configs, self.config = configs, configs[0]
        self.predict = partial(population.apply, build_architecture(configs[0]))
        # A parameter's registered name may hold no dot.
        self.stacked = nn.ParameterDict({_mangle(name): nn.Parameter(tensor) for name, tensor in params.items()})
        self.register_buffer("loss_sum", torch.zeros(len(configs)))
        self.register_buffer("num_clipped", torch.zeros(len(configs)))
        self.register_buffer("first_bad_step", torch.full((len(configs),), -1))
        self.num_summed = 0

    @property
    def params(self) -> Params:
        """The stacked parameters under the model's own names."""
        return {_unmangle(name): parameter for name, parameter in self.stacked.items()}

    def losses(self, prompts: Prompts) -> Float[Tensor, " N"]:
        """Each member's mean squared error per target, over its own prompts."""
        predictions = self.predict(self.params, prompts.xs, prompts.ys)
        return (predictions - prompts.ys).square().mean(dim=(1, 2))

    def training_step(self, batch: Prompts, batch_idx: int) -> Tensor:
        """The sum of the members' losses: its gradient is each member's own."""
        losses = self.losses(batch)
        self._record(losses.detach())
        return losses.sum()

    def configure_optimizers(self) -> Any:
        """Adam and the rate's schedule, stepped after every update."""
        optimizer = make_optimizer(self.stacked.values(), self.config, self.device.type)
        scheduler = {"scheduler": make_scheduler(optimizer, self.config), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        """Clip each member by the norm of its own gradient."""
        if self.config.optim.grad_clip is not None:
            norms = clip_by_member(self.stacked.values(), self.config.optim.grad_clip)
            self.num_clipped += norms > self.config.optim.grad_clip

    def take_means(self) -> tuple[list[float], list[float]]:
        """Each member's mean loss and share of clipped steps since the last call; waits for the device."""
        count = max(1, self.num_summed)
        means = (self.loss_sum / count).tolist(), (self.num_clipped / count).tolist()
        self.loss_sum.zero_()
        self.num_clipped.zero_()
        self.num_summed = 0
        return means

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the count behind the running means, and the settings as plain values."""
        checkpoint["num_summed"] = self.num_summed
        checkpoint["configs"] = [config.to_dict() for config in self.configs]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it up again."""
        self.num_summed = checkpoint["num_summed"]

    def _record(self, losses: Tensor) -> None:
        if self.trainer.world_size > 1:
            losses = self.trainer.strategy.reduce(losses.clone(), reduce_op="mean")
        bad = ~torch.isfinite(losses) & (self.first_bad_step < 0)
        self.first_bad_step = torch.where(bad, self.global_step + 1, self.first_bad_step)
        self.loss_sum += losses
        self.num_summed += 1


def _mangle(name: str) -> str:
    return name.replace(".", "/")


def _unmangle(name: str) -> str:
    return name.replace("/", ".")
