"""Adam for a population, with the interface of a PyTorch optimiser.

Loss, gradient, clipping and update are one function of tensors (`icl.compute.step`), so that a step can be compiled as one graph.
Therefore `step` takes prompts instead of gradients. Everything else is as in `torch.optim.Adam`: the parameter group has the rate
of the next update, and the state has the moments and the number of updates.
"""

from typing import Any

import torch
from torch import Tensor

from icl.compute.step import AdamState, Step, StepInfo
from icl.config import OptimConfig
from icl.tasks.prompts import Prompts


class PopulationAdam(torch.optim.Optimizer):
    """The optimiser of N members whose parameters are the rows of one matrix."""

    def __init__(self, rows: Tensor, adam: AdamState, function: Step, settings: OptimConfig) -> None:
        """Wrap a function that makes one step.

        Args:
            rows: The parameters (N, P), a leaf tensor.
            adam: The same parameters without gradient, with Adam's moments and count. Every step changes it in place.
            function: Function that makes one optimiser step.
            settings: Adam's betas and eps, for the parameter group.
        """
        betas = (settings.beta1, settings.beta2)
        super().__init__([rows], {"lr": settings.lr, "betas": betas, "eps": settings.eps})
        self.state[rows] = {"step": adam.count, "exp_avg": adam.exp_avg, "exp_avg_sq": adam.exp_avg_sq}
        self._adam, self._function = adam, function
        self._rates = adam.rows.new_zeros(len(rows))  # N; a tensor, because a new number would recompile the step

    def step(self, closure: Any = None, *, prompts: Prompts) -> StepInfo:  # type: ignore[override]
        """Update every member once on its prompts, with the learning rate of the parameter group.

        Args:
            closure: Not used. Lightning passes a closure that does nothing.
            prompts: Inputs (N, B, K, D) and targets (N, B, K) of every member.
        """
        self._rates.fill_(self.param_groups[0]["lr"])
        return self._function(self._adam, prompts.xs, prompts.ys, self._rates)

    def state_dict(self) -> dict[str, Any]:
        """Return only the parameter group. The moments are buffers of the module, which saves them."""
        return super().state_dict() | {"state": {}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing: the module loads the moments, and sets the rate from the step."""
