"""The LightningModule: a population's loss, one step at a time. A run is a population of one.

It holds the stacked parameters of N members, computes each member's mean squared error on prompts of its own, and
keeps what the step learns about itself (loss since the last row, clipped steps, first non-finite step) as tensors on
the device, one entry per member, so that a step never waits for the host.
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
from icl.population import Params
from icl.tasks.prompts import Prompts
from icl.training.members import Member
from icl.training.optim import clip_by_member, make_optimizer, make_scheduler


class PopulationModule(pl.LightningModule):
    """N members of one architecture under one optimiser; they differ in their seeds and their tasks only."""

    loss_sum: Tensor
    num_clipped: Tensor
    num_summed: Tensor
    first_bad_step: Tensor

    def __init__(self, members: Sequence[Member], params: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.members, self.config = members, members[0].config
        self.predict = partial(population.apply, build_architecture(self.config))
        # A parameter's registered name may hold no dot.
        self.stacked = nn.ParameterDict({_mangle(name): nn.Parameter(tensor) for name, tensor in params.items()})
        for name in ("loss_sum", "num_clipped", "num_summed"):
            self.register_buffer(name, torch.zeros(len(members)))
        self.register_buffer("first_bad_step", torch.full((len(members),), -1))

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

    def take_means(self, indices: Sequence[int]) -> tuple[list[float], list[float]]:
        """Mean loss and share of clipped steps of some members since their last call; waits for the device."""
        chosen = torch.tensor(indices, device=self.loss_sum.device)
        count = self.num_summed[chosen].clamp(min=1)
        means = (self.loss_sum[chosen] / count).tolist(), (self.num_clipped[chosen] / count).tolist()
        for sums in (self.loss_sum, self.num_clipped, self.num_summed):
            sums[chosen] = 0
        return means

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add each member's settings and standing, as plain values."""
        checkpoint["configs"] = [member.config.to_dict() for member in self.members]
        checkpoint["members"] = [member.state_dict() for member in self.members]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up each member's standing."""
        for member, saved in zip(self.members, checkpoint["members"], strict=True):
            member.load_state_dict(saved)

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
