"""Where chains settle: is the loss at the mean of their draws lower than the checkpoint's?

At a minimum it cannot be. A checkpoint beside its minimum makes an LLC too small by nbeta times what its loss lies above the
minimum's, and the chains know the way there, also along soft directions, where a step down the gradient goes nowhere. For
a quadratic loss of curvature h whose minimum lies at w*, the mean of localised chains is w* + r (w0 - w*), with
r = localization / (nbeta h + localization); so the loss there is lower by (1 - r^2) h (w0 - w*)^2 / 2.

The mean of finitely many draws is not there yet, and what it lacks raises the loss. The jackknife over chains takes that
away, to first order and for quadratics exactly, and gives the standard error (Efron and Stein 1981); of few chains it is
itself badly known, so the rules ask Student's t how many of it are enough. At a saddle chains go down on both sides and
their mean does not; so the mean of the drops at each chain's own mean, which no convex loss can make the larger, counts if it
is. The loss is that of the batches given: at the best parameters for all data there are, a finite data set's own minimum
lies elsewhere, a little lower.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from scipy.special import ndtr, stdtrit
from torch import Tensor

from icl.flat import Layout
from icl.stacked import Params

_NUM_BATCHES = 32
"""So many batches are used even if chains are short."""


def num_batches(num_moves: int, num_chains: int) -> int:
    """As many batches as cost up to a quarter of the chains' own gradients; on each, 2 K + 2 forward passes of a third of one."""
    return max(_NUM_BATCHES, 3 * num_moves * num_chains // (8 * (num_chains + 1)))


class Losses(NamedTuple):
    """How the loss is measured at some places."""

    of: Callable[[Params], Float[Tensor, "N I"]]
    """Stacked parameters to their losses on I batches, in float64 on the CPU."""
    are_all: bool
    """Whether these batches are all the data, so that their mean has no error."""


class Settling:
    """Takes the mean positions of members in their order, and keeps of each checkpoint's chains what their means tell."""

    def __init__(
        self, losses: Losses, layout: Layout, start: Float[Tensor, "C P"], frozen: Params, num_chains: int
    ) -> None:
        self.losses, self.layout, self.start, self.frozen, self.num_chains = losses, layout, start, frozen, num_chains
        self.means, self.alive = start[:0], torch.zeros(0, dtype=torch.bool, device=start.device)
        self.drops: list[Float[Tensor, " 3"]] = []

    def add(self, means: Float[Tensor, "N P"], alive: Bool[Tensor, " N"]) -> None:
        """The next N members; a checkpoint's means are let go of as soon as all its chains are there."""
        self.means, self.alive = torch.cat([self.means, means]), torch.cat([self.alive, alive])
        num = self.num_chains
        while len(self.means) >= num:
            self.drops.append(self._drop(len(self.drops), self.means[:num][self.alive[:num]]))
            self.means, self.alive = self.means[num:], self.alive[num:]

    def _drop(self, i: int, means: Float[Tensor, "K P"]) -> Float[Tensor, " 3"]:
        """Of checkpoint i, from its K chains that are alive; see `settled_drop`."""
        num = len(means)
        if not num:
            return torch.full((3,), torch.nan, dtype=torch.float64)
        without = (means.sum(0) - means) / max(1, num - 1)  # of all chains but one
        places = torch.cat([self.start[i : i + 1], means, without, means.mean(0, keepdim=True)])
        frozen = {
            name: (tensor if len(tensor) == 1 else tensor[i : i + 1]).expand(len(places), *tensor.shape[1:])
            for name, tensor in self.frozen.items()
        }
        found = self.losses.of(self.layout.to_params(places, frozen))
        here, own, without, pooled = found[:, found.isfinite().all(0)].split([1, num, num, 1])
        rounding = num * torch.finfo(means.dtype).eps * float(here.abs().mean()) if here.numel() else 0.0
        return settled_drop(here - own, here - without, here - pooled, are_all=self.losses.are_all, rounding=rounding)


def settled_drop(
    own: Float[Tensor, "K I"],
    without: Float[Tensor, "K I"],
    pooled: Float[Tensor, "1 I"],
    *,
    are_all: bool = False,
    rounding: float = 0.0,
) -> Float[Tensor, " 3"]:
    """The drop of the loss where K chains settle, its standard error over chains and batches, and its degrees of freedom.

    Args:
        own: By how much the loss on each of I batches is lower at each chain's mean than at the checkpoint.
        without: At the mean of all chains but each.
        pooled: At the mean of all.
        are_all: Whether the batches are all the data.
        rounding: Error of a drop that is due to the losses' precision.

    Returns:
        The larger of the jackknife's drop and the mean of the chains' own; NaN where there is no batch.
    """
    num = len(own)
    if not own.numel():
        return torch.full((3,), torch.nan, dtype=torch.float64)
    found = [_with_error(own.mean(0), own.mean(1), 1 / num, are_all, rounding)]
    if num > 1:
        jackknife = num * pooled[0] - (num - 1) * without.mean(0)
        found.append(_with_error(jackknife, without.mean(1), (num - 1) ** 2 / num, are_all, rounding))
    return max(found, key=lambda one: float(one[0]))


def threshold(freedom: float) -> float:
    """How many standard errors of so many degrees of freedom are as rare as three of a normal's."""
    return float(stdtrit(freedom, ndtr(3.0)))


def _with_error(
    by_batch: Float[Tensor, " I"], by_chain: Float[Tensor, " K"], factor: float, are_all: bool, rounding: float
) -> Float[Tensor, " 3"]:
    """A mean over batches, its error and the latter's degrees of freedom (Satterthwaite 1946).

    The chains' part is `factor` times their variance.
    """
    num_chains, num_batches = len(by_chain), len(by_batch)
    of_chains = factor * float(by_chain.var()) if num_chains > 1 else 0.0
    of_batches = float(by_batch.var()) / num_batches if num_batches > 1 and not are_all else 0.0
    total = of_chains + of_batches
    uncertain = of_chains**2 / max(1, num_chains - 1) + of_batches**2 / max(1, num_batches - 1)
    freedom = total**2 / uncertain if uncertain else float("inf")
    return torch.tensor([float(by_batch.mean()), (total + rounding**2) ** 0.5, freedom], dtype=torch.float64)
