"""The LightningModule: a population under `icl.step`, a few optimiser steps a batch. A run is a population of one.

It holds the parameters and Adam's moments of N members as rows, and keeps what a step learns about itself (loss since
the last row, clipped steps, first non-finite step) as tensors on the device, one entry per member, so that a step never
waits for the host.
"""

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from icl.compiling import compiling_pays
from icl.flat import layout_of
from icl.schedules import rate_factor
from icl.stacked import Params, apply
from icl.step import AdamState, Step, StepInfo, adam_state, make_step
from icl.tasks.prompts import Prompts
from icl.training.members import Member
from icl.training.rounding import describe_changes, rounding_conditions


class PopulationModule(pl.LightningModule):
    """N members of one architecture; they differ in their seeds and their tasks only."""

    rows: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    count: Tensor
    rates: Tensor
    loss_sum: Tensor
    num_clipped: Tensor
    num_summed: Tensor
    first_bad_step: Tensor

    def __init__(self, members: Sequence[Member], params: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.automatic_optimization = False  # the step is its own optimiser
        self.members, self.config = members, members[0].config
        optim = self.config.optim
        self.layout = layout_of(params)
        self.predict = partial(apply, self.config.model)
        self.step: Step | None = None
        self.conditions: dict[str, str] = {}
        self._before: dict[Member, dict[str, str]] = {}
        self._factor = rate_factor(
            optim.schedule, warmup_steps=optim.warmup_steps, schedule_steps=self.config.schedule_steps
        )
        for name, tensor in adam_state(params)._asdict().items():
            self.register_buffer(name, tensor)
        for name in ("loss_sum", "num_clipped", "num_summed"):
            self.register_buffer(name, self.rows.new_zeros(len(members)))
        self.register_buffer("first_bad_step", torch.full((len(members),), -1))
        self.register_buffer("rates", self.rows.new_zeros(len(members)), persistent=False)

    @property
    def params(self) -> Params:
        """The stacked parameters under the model's own names, as views."""
        return self.layout.to_params(self.rows)

    def rate(self, update: int) -> float:
        """Return the learning rate of an update, counted from 1; update s leads from step s - 1 to step s."""
        return self.config.optim.lr * self._factor(update - 1)

    def configure_optimizers(self) -> "StepCounter":
        """What Lightning counts steps by."""
        return StepCounter()

    def on_fit_start(self) -> None:
        """Make the step for the processes that there are; say what rounds otherwise than before, if the run is resumed."""
        is_compiled, settings = self._is_compiled(), self.config.trainer
        self.conditions = rounding_conditions(settings, device=self.device.type, is_compiled=is_compiled)
        if self.trainer.is_global_zero:
            self._tell_changes()
        self.step = make_step(
            self.config.model,
            self.config.optim,
            self.layout,
            compiled=is_compiled,
            packed=any(member.is_packed for member in self.members),
            reduce=self._average if self.trainer.world_size > 1 else None,
        )

    def training_step(self, batch: Sequence[Prompts], batch_idx: int) -> None:
        """A few optimiser steps, one for each batch of prompts."""
        for prompts in batch:
            self.optimizers().step(act=partial(self._advance, prompts))  # type: ignore[union-attr]

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
        conditions = {"conditions": self.conditions}
        checkpoint["members"] = [member.state_dict() | conditions for member in self.members]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up each member's standing."""
        for member, saved in zip(self.members, checkpoint["members"], strict=True):
            member.load_state_dict(saved)
            self._before[member] = saved.get("conditions", {})  # 0.1.0 saved none

    def _is_compiled(self) -> bool:
        """By the settings alone, so that a resumed run does as it did before."""
        settings, task = self.config.trainer, self.config.task
        if settings.compile != "auto":
            return settings.compile == "true"
        return self.device.type in ("cpu", "cuda") and compiling_pays(
            num_params=self.layout.size,
            num_tokens=2 * task.max_examples * settings.batch_size,
            num_steps=settings.max_steps,
        )

    def _tell_changes(self) -> None:
        """Print and log what rounds otherwise than it did before; a sentence that several members share is printed once."""
        told = {member: describe_changes(before, self.conditions) for member, before in self._before.items()}
        for member, sentence in told.items():
            if sentence is not None:
                member.folder.log(sentence)
        for sentence in dict.fromkeys(filter(None, told.values())):
            print(f"icl: {sentence}", file=sys.stderr)

    def _average(self, tensor: Tensor) -> None:
        """Replace a tensor by its mean over the processes."""
        tensor.copy_(self.trainer.strategy.reduce(tensor, reduce_op="mean"))

    def _advance(self, prompts: Prompts) -> None:
        assert self.step is not None
        self.rates.fill_(self.rate(self.global_step + 1))
        state = AdamState(self.rows, self.exp_avg, self.exp_avg_sq, self.count)
        self._record(self.step(state, prompts.xs, prompts.ys, self.rates))

    def _record(self, info: StepInfo) -> None:
        bad = ~torch.isfinite(info.losses) & (self.first_bad_step < 0)
        self.first_bad_step = torch.where(bad, self.global_step + 1, self.first_bad_step)
        self.loss_sum += info.losses
        self.num_summed += 1
        if self.config.optim.grad_clip is not None:
            self.num_clipped += info.norms > self.config.optim.grad_clip


class StepCounter(torch.optim.Optimizer):
    """An optimiser in Lightning's eyes: its `step` does what it is given, and Lightning counts it as `global_step`."""

    def __init__(self) -> None:
        super().__init__([torch.zeros(())], {})

    def step(self, closure: Any = None, *, act: Any = None) -> None:  # type: ignore[override]
        """Do it."""
        if closure is not None:
            closure()
        act()
