"""Adam for a population, as PyTorch and Lightning know an optimiser.

Loss, gradient, clipping and update are one function of tensors (`icl.step`), so that a step can be compiled as one graph. So
`step` takes prompts in place of gradients. All else is as in `torch.optim.Adam`: the parameter group holds the rate of the
next update, the state holds the moments and the count of updates.
"""

from typing import Any

import torch
from torch import Tensor

from icl.config import OptimConfig
from icl.step import AdamState, Step, StepInfo
from icl.tasks.prompts import Prompts


class PopulationAdam(torch.optim.Optimizer):
    """The optimiser of N members whose parameters are the rows of one matrix."""

    def __init__(self, rows: Tensor, adam: AdamState, function: Step, settings: OptimConfig) -> None:
        """Wrap a step.

        Args:
            rows: The parameters (N, P), a leaf tensor.
            adam: The same parameters without gradient, Adam's moments and count; changed in place by every step.
            function: One optimiser step.
            settings: Adam's decays and stabiliser, for the parameter group.
        """
        betas = (settings.beta1, settings.beta2)
        super().__init__([rows], {"lr": settings.lr, "betas": betas, "eps": settings.eps})
        self.state[rows] = {"step": adam.count, "exp_avg": adam.exp_avg, "exp_avg_sq": adam.exp_avg_sq}
        self._adam, self._function = adam, function
        self._rates = adam.rows.new_zeros(len(rows))  # N, a tensor: a new number would have the step compiled again

    def step(self, closure: Any = None, *, prompts: Prompts) -> StepInfo:  # type: ignore[override]
        """Move every member by one update on its prompts, at the rate of the parameter group.

        Args:
            closure: Not used. Lightning passes one that does nothing.
            prompts: Each member's prompts (N, B, K, D) and targets (N, B, K).
        """
        self._rates.fill_(self.param_groups[0]["lr"])
        return self._function(self._adam, prompts.xs, prompts.ys, self._rates)

    def state_dict(self) -> dict[str, Any]:
        """Return the parameter group alone. The moments are buffers of the module, which saves them."""
        return super().state_dict() | {"state": {}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing: the module loads the moments, and sets the rate from the step."""
