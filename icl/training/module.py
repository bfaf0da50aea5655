"""The LightningModule of a population. Each batch contains the prompts of a few optimiser steps (`icl.compute.step`).

The members of a population are runs that train together. A single run is a population of one. The module stores the parameters of N
members in one matrix, and each of Adam's two moments in another matrix. Row n of a matrix has the P numbers of member n. The module
also records, for every member, the mean loss, the number of clipped steps and the first step that was not finite. These records are
tensors on the device, so that the host need not wait for the device at every step.
"""

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from icl.compute.calls import compiling_pays
from icl.compute.step import AdamState, Step, StepInfo, adam_state, make_step, most_parts
from icl.config import OptimConfig
from icl.config.schedules import rate_factor
from icl.evaluation.predictors import predictor
from icl.model.flat import layout_of
from icl.model.language import rows_at_once
from icl.model.stacked import Params, target_losses
from icl.tasks.prompts import Prompts
from icl.tasks.rows import TokenRows
from icl.training.members import Member
from icl.training.rounding import describe_changes, rounding_conditions


class PopulationModule(pl.LightningModule):
    """Lightning module of N members with one architecture, which differ only in their seeds and tasks."""

    exp_avg: Tensor
    """Adam's first moment (N, P)."""
    exp_avg_sq: Tensor
    """Adam's second moment (N, P)."""
    count: Tensor
    """Number of Adam's updates (N)."""
    loss_sum: Tensor
    """Sum of the losses since the last row of `metrics.csv` with a training loss (N)."""
    num_clipped: Tensor
    """Number of clipped steps since the last row of `metrics.csv` with a training loss (N)."""
    num_summed: Tensor
    """Number of steps since the last row of `metrics.csv` with a training loss (N)."""
    first_bad_step: Tensor
    """First step whose loss, gradient or weights were not finite (N); -1 if there is none."""

    def __init__(self, members: Sequence[Member], params: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.automatic_optimization = False  # our step function computes the gradients
        self.members, self.config = members, members[0].config
        optim = self.config.optim
        self.layout = layout_of(params)
        self.predict = predictor(self.config.model)
        self.nll = partial(target_losses, self.config.model) if self.config.model.has_density else None
        self.conditions: dict[str, str] = {}
        self._saved_conditions: dict[Member, dict[str, str]] = {}
        self._factor = rate_factor(
            optim.schedule, warmup_steps=optim.warmup_steps, schedule_steps=self.config.schedule_steps
        )
        adam = adam_state(params)
        self.rows = torch.nn.Parameter(adam.rows)
        for name in ("exp_avg", "exp_avg_sq", "count"):
            self.register_buffer(name, getattr(adam, name))
        for name in ("loss_sum", "num_clipped", "num_summed"):
            self.register_buffer(name, self.rows.new_zeros(len(members)))
        self.register_buffer("first_bad_step", torch.full((len(members),), -1))

    @property
    def params(self) -> Params:
        """Stacked parameters with the names that the model gives them, as views without gradient."""
        return self.layout.to_params(self.rows.detach())

    def rate(self, update: int) -> float:
        """Return the learning rate of an update. Updates are counted from 1; update s leads from step s - 1 to step s."""
        return self.config.optim.lr * self._factor(update - 1)

    def configure_optimizers(self) -> "PopulationAdam":
        """Return Adam with a step function for this device and this number of processes."""
        for member in self.members:
            if member.num_parts is None:
                member.num_parts = most_parts(self.config.trainer.batch_size, torch.get_num_threads())
        step = make_step(
            self.config.model,
            self.config.optim,
            self.layout,
            compiled=self._is_compiled(),
            packed=any(member.is_packed for member in self.members),
            num_parts=self.members[0].num_parts or 1,
            reduce=self._average if self.trainer.world_size > 1 else None,
        )
        adam = AdamState(self.rows.detach(), self.exp_avg, self.exp_avg_sq, self.count)
        return PopulationAdam(self.rows, adam, step, self.config.optim)

    def on_fit_start(self) -> None:
        """Record the conditions that affect rounding. If the run is resumed, report the conditions that have changed."""
        self.conditions = rounding_conditions(
            self.config.trainer, device=self.device.type, is_compiled=self._is_compiled()
        )
        if self.trainer.is_global_zero:
            self._report_changes()

    def on_train_start(self) -> None:
        """Set the learning rate of the first update."""
        self._set_rate()

    def training_step(self, batch: Sequence[Prompts | TokenRows], batch_idx: int) -> None:
        """Make a few optimiser steps, one for each batch of prompts."""
        optimiser: Any = self.optimizers()
        for prompts in batch:
            self._record(optimiser.step(prompts=prompts))
            self._set_rate()

    def take_means(self, indices: Sequence[int]) -> tuple[list[float], list[float]]:
        """Return the mean loss and the share of clipped steps of some members, over the steps since the last call for these members.

        The call waits for the device.
        """
        chosen = torch.tensor(indices, device=self.loss_sum.device)
        count = self.num_summed[chosen].clamp(min=1)
        means = (self.loss_sum[chosen] / count).tolist(), (self.num_clipped[chosen] / count).tolist()
        for sums in (self.loss_sum, self.num_clipped, self.num_summed):
            sums[chosen] = 0
        return means

    def check_weights(self) -> None:
        """Record the members whose weights are not finite.

        The loss and the gradient of a step are computed before the step's update. So an update that makes a weight infinite does not
        show in this loss and gradient, and the weights must be checked before they are evaluated or saved.
        """
        # A sum is never finite if one of its terms is not. Computing the sum is 100x faster than `isfinite` of all weights, and needs
        # no extra memory.
        self._record_bad(self.rows.detach().sum(dim=1))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the settings and the state of every member to the checkpoint, as plain values."""
        checkpoint["configs"] = [member.config.to_dict() for member in self.members]
        conditions = {"conditions": self.conditions}
        checkpoint["members"] = [member.state_dict() | conditions for member in self.members]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the state of every member."""
        for member, saved in zip(self.members, checkpoint["members"], strict=True):
            member.load_state_dict(saved)
            self._saved_conditions[member] = saved.get("conditions", {})  # files of version 0.1.0 contain no conditions

    def _is_batch_whole(self) -> bool:
        """Return whether a language model computes a member's batch as a whole, not in several parts.

        This depends only on settings.
        """
        member = {name: tensor[:1] for name, tensor in self.params.items()}
        return rows_at_once(self.config.model, member, self.config.num_tokens) >= self.config.trainer.batch_size

    def _is_compiled(self) -> bool:
        """Return whether the step is compiled. This depends only on settings and device, so it is the same for a resumed run."""
        settings = self.config.trainer
        if settings.compile != "auto":
            return settings.compile == "true"
        if self.config.model.is_language and (self.device.type != "cpu" or not self._is_batch_whole()):
            return False  # on a GPU, the gain was not measured; if a batch has many parts, the compiled graph would be very long
        return self.device.type in ("cpu", "cuda") and compiling_pays(
            num_params=self.layout.size,
            num_tokens=self.config.num_tokens * settings.batch_size,
            num_steps=settings.max_steps,
        )

    def _report_changes(self) -> None:
        """Print and log the conditions that have changed since the last save. A message that several members share is printed once."""
        printed = set()
        for member, saved in self._saved_conditions.items():
            sentence = describe_changes(saved, self.conditions)
            if sentence is None:
                continue
            member.folder.log(sentence)
            if sentence not in printed:
                print(f"icl: {sentence}", file=sys.stderr)
                printed.add(sentence)

    def _average(self, tensor: Tensor) -> None:
        """Replace a tensor by its mean over the processes, in place."""
        tensor.copy_(self.trainer.strategy.reduce(tensor, reduce_op="mean"))

    def _set_rate(self) -> None:
        """Set the rate of the next update in the parameter group, as a scheduler would."""
        optimiser: Any = self.optimizers()
        optimiser.param_groups[0]["lr"] = self.rate(self.global_step + 1)

    def _record(self, info: StepInfo) -> None:
        """Add the results of a step to the records, without waiting for the device."""
        self._record_bad(info.losses + info.norms)  # not finite if one of the two is not
        self.loss_sum += info.losses
        self.num_summed += 1
        if self.config.optim.grad_clip is not None:
            self.num_clipped += info.norms > self.config.optim.grad_clip

    def _record_bad(self, values: Tensor) -> None:
        """Record this step as bad for the members whose values (N) are not finite, unless an earlier step was bad."""
        bad = ~torch.isfinite(values) & (self.first_bad_step < 0)
        self.first_bad_step = torch.where(bad, self.global_step, self.first_bad_step)


class PopulationAdam(torch.optim.Optimizer):
    """Adam for N members whose parameters are the rows of one matrix, with the interface of a PyTorch optimiser.

    Loss, gradient, clipping and update are one function of tensors (`icl.compute.step`), so that a step can be compiled as one graph.
    Therefore `step` takes prompts instead of gradients. Everything else is as in `torch.optim.Adam`, or as in `torch.optim.AdamW` if
    there is a weight decay. The parameter group contains the learning rate of the next update. The state contains the moments and the
    number of updates.
    """

    def __init__(self, rows: Tensor, adam: AdamState, function: Step, settings: OptimConfig) -> None:
        """Give a step function the interface of an optimiser.

        Args:
            rows: The parameters (N, P), a leaf tensor.
            adam: The same parameters without gradient, with Adam's moments and count. Every step changes these tensors in place.
            function: Function that makes one optimiser step.
            settings: Adam's betas and eps, for the parameter group.
        """
        betas = (settings.beta1, settings.beta2)
        super().__init__([rows], {"lr": settings.lr, "betas": betas, "eps": settings.eps})
        self.state[rows] = {"step": adam.count, "exp_avg": adam.exp_avg, "exp_avg_sq": adam.exp_avg_sq}
        self._adam, self._function = adam, function
        # The rates are a tensor. If they were a Python number, torch would compile the step again whenever the number changes.
        self._rates = adam.rows.new_zeros(len(rows))  # N

    def step(self, closure: Any = None, *, prompts: Prompts | TokenRows) -> StepInfo:  # type: ignore[override]
        """Update every member once on its prompts, with the learning rate of the parameter group.

        Args:
            closure: Not used. Lightning passes a closure that does nothing.
            prompts: Inputs (N, B, K, D) and targets (N, B, K) of all members, or rows of tokens (N, B, T) for a language model.
        """
        self._rates.fill_(self.param_groups[0]["lr"])
        return self._function(self._adam, prompts.xs, prompts.ys, self._rates)

    def state_dict(self) -> dict[str, Any]:
        """Return only the parameter group. The moments are buffers of the module, which saves them."""
        return super().state_dict() | {"state": {}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing: the module loads the moments, and sets the rate from the step."""
