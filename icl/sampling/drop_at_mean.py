"""Is the loss at the mean of the chains' draws lower than at the checkpoint?

At a minimum it cannot be. If a checkpoint lies beside its minimum, its LLC is too small by nbeta times the height of its loss
above the minimum. The chains know the way to the minimum, also along soft directions, where a step down the gradient leads
nowhere. For a quadratic loss of curvature h whose minimum lies at w*, the mean of localised chains is w* + r (w0 - w*), with
r = localization / (nbeta h + localization); so the loss there is lower by (1 - r^2) h (w0 - w*)^2 / 2.

The mean of finitely many draws has an error, which raises the loss. The jackknife over chains removes that bias to first order,
and exactly for quadratics. It also gives the standard error (Efron and Stein 1981). With few chains that error is
itself uncertain, so the rules use Student's t. At a saddle, chains go down on both sides and their
mean does not. So we also take the mean of the drops at each chain's own mean, and report the larger of the two; no convex loss
can make the second one larger. The loss is that of the batches given: for the best parameters on all data, the minimum of a finite
set of batches lies elsewhere and is a little lower.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from scipy.special import ndtr, stdtrit
from torch import Tensor

from icl.flat import Layout
from icl.stacked import Params

_MIN_BATCHES = 32
"""Minimum number of batches on which the drop is measured."""


class Drop(NamedTuple):
    """How far the loss at the mean of the draws lies below the checkpoint's; NaN if it was not measured."""

    value: float = math.nan
    stderr: float = math.nan
    degrees_of_freedom: float = math.nan
    """Degrees of freedom of the standard error (Satterthwaite 1946)."""


class BatchLosses(NamedTuple):
    """A way to measure losses on some fixed batches."""

    measure: Callable[[Params], Float[Tensor, "N I"]]
    """Function from stacked parameters to their losses on I batches, in float64 on the CPU."""
    are_all: bool
    """Whether these batches are all the data, so that their mean has no error."""


def num_batches(num_moves: int, num_chains: int) -> int:
    """Return how many batches cost at most a quarter of the chains' gradients.

    On each batch we make 2 K + 2 forward passes, each of which costs a third of a gradient.
    """
    return max(_MIN_BATCHES, 3 * num_moves * num_chains // (8 * (num_chains + 1)))


class DropsAtMean:
    """Takes the mean positions of members in their order, and measures the drop of each checkpoint once its chains are there."""

    def __init__(
        self, losses: BatchLosses, layout: Layout, start: Float[Tensor, "C P"], fixed: Params, num_chains: int
    ) -> None:
        self.losses, self.layout, self.start, self.fixed, self.num_chains = losses, layout, start, fixed, num_chains
        self.means, self.alive = start[:0], torch.zeros(0, dtype=torch.bool)
        self.drops: list[Drop] = []

    def add(self, means: Float[Tensor, "N P"], alive: Bool[Tensor, " N"]) -> None:
        """Add the next N members; the means of a checkpoint are released once all of its chains are there."""
        self.means, self.alive = torch.cat([self.means, means]), torch.cat([self.alive, alive])
        num = self.num_chains
        while len(self.alive) >= num:
            used = self.means[:num][self.alive[:num].to(self.means.device)]
            self.drops.append(self._drop(len(self.drops), used))
            self.means, self.alive = self.means[num:], self.alive[num:]

    def _drop(self, i: int, means: Float[Tensor, "K P"]) -> Drop:
        """The drop of checkpoint i, from its K chains that are alive."""
        num = len(means)
        if not num:
            return Drop()
        leave_one_out = (means.sum(0) - means) / max(1, num - 1)
        points = torch.cat([self.start[i : i + 1], means, leave_one_out, means.mean(0, keepdim=True)])
        fixed = {
            name: (tensor if len(tensor) == 1 else tensor[i : i + 1]).expand(len(points), *tensor.shape[1:])
            for name, tensor in self.fixed.items()
        }
        losses = self.losses.measure(self.layout.to_params(points, fixed))
        start, own, without, pooled = losses[:, losses.isfinite().all(0)].split([1, num, num, 1])
        rounding = num * torch.finfo(means.dtype).eps * float(start.abs().mean()) if start.numel() else 0.0
        return drop_at_mean(
            start - own, start - without, start - pooled, are_all=self.losses.are_all, rounding=rounding
        )


def drop_at_mean(
    own: Float[Tensor, "K I"],
    without: Float[Tensor, "K I"],
    pooled: Float[Tensor, "1 I"],
    *,
    are_all: bool = False,
    rounding: float = 0.0,
) -> Drop:
    """Estimate the drop of the loss at the mean of K chains: the larger of the jackknife's and the mean of the chains' own.

    Args:
        own: Drop of the loss on each of I batches from the checkpoint to each chain's mean.
        without: Drop to the mean of all chains but one.
        pooled: Drop to the mean of all chains.
        are_all: Whether the batches are all the data.
        rounding: Error of a drop that is due to the losses' precision.
    """
    num = len(own)
    if not own.numel():
        return Drop()
    drops = [_with_error(own.mean(0), own.mean(1), 1 / num, are_all, rounding)]
    if num > 1:
        jackknife = num * pooled[0] - (num - 1) * without.mean(0)
        drops.append(_with_error(jackknife, without.mean(1), (num - 1) ** 2 / num, are_all, rounding))
    return max(drops, key=lambda drop: drop.value)


def significance_threshold(degrees_of_freedom: float) -> float:
    """The number of standard errors that is as rare under Student's t as three are under a normal distribution."""
    return float(stdtrit(degrees_of_freedom, ndtr(3.0)))


def _with_error(
    by_batch: Float[Tensor, " I"], by_chain: Float[Tensor, " K"], factor: float, are_all: bool, rounding: float
) -> Drop:
    """The mean over batches with its error; the chains contribute `factor` times their variance."""
    num_chains, num_batches = len(by_chain), len(by_batch)
    chain_variance = factor * float(by_chain.var()) if num_chains > 1 else 0.0
    batch_variance = float(by_batch.var()) / num_batches if num_batches > 1 and not are_all else 0.0
    total = chain_variance + batch_variance
    uncertain = chain_variance**2 / max(1, num_chains - 1) + batch_variance**2 / max(1, num_batches - 1)
    degrees_of_freedom = total**2 / uncertain if uncertain else math.inf
    return Drop(float(by_batch.mean()), (total + rounding**2) ** 0.5, degrees_of_freedom)
