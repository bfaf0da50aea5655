"""Where chains settle: is the loss at the mean of their draws lower than the checkpoint's?

At a minimum it cannot be. A checkpoint beside its minimum makes an LLC too small by nbeta times what its loss lies above the
minimum's, and the chains know the way there, also along soft directions, where a step down the gradient goes nowhere. For
a quadratic loss of curvature h whose minimum lies at w*, the mean of localised chains is w* + r (w0 - w*), with
r = localization / (nbeta h + localization); so the loss there is lower by (1 - r^2) h (w0 - w*)^2 / 2.

The mean of finitely many draws is not there yet, and what it lacks raises the loss. The jackknife over chains takes that
away, to first order and for quadratics exactly, and gives the standard error (Efron and Stein 1981), which we widen by
Student's t: from four chains it is itself known to a third. At a saddle chains go down on both sides and their mean does
not, so each chain's own mean is tried, too, uncorrected.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from scipy.special import ndtr, stdtrit
from torch import Tensor

from icl.population import Params
from icl.sampling.packing import Packing

NUM_BATCHES = 16
"""At most so many batches are used; 2 K + 2 forward passes on each."""


class Settling:
    """Takes the mean positions of members in their order, and keeps of each checkpoint's chains what their means tell."""

    def __init__(
        self,
        losses: Callable[[Params], Float[Tensor, "M I"]],
        packing: Packing,
        checkpoints: Params,
        *,
        num_chains: int,
    ) -> None:
        self.losses, self.packing, self.num_chains = losses, packing, num_chains
        self.start, self.frozen = packing.pack(checkpoints), packing.frozen(checkpoints)
        self.waiting = self.start[:0]
        self.drops: list[Float[Tensor, " 2"]] = []

    def add(self, means: Float[Tensor, "N P"]) -> None:
        """The next N members; a checkpoint's means are let go of as soon as all its chains are there."""
        self.waiting = torch.cat([self.waiting, means])
        while len(self.waiting) >= self.num_chains:
            self.drops.append(self._drop(len(self.drops), self.waiting[: self.num_chains]))
            self.waiting = self.waiting[self.num_chains :]

    def _drop(self, i: int, means: Float[Tensor, "K P"]) -> Float[Tensor, " 2"]:
        """How much lower checkpoint i's loss is where its chains settle, and the standard error."""
        means = means[means.isfinite().all(1)]
        without = (means.sum(0) - means) / max(1, len(means) - 1)  # of all chains but one
        places = torch.cat([self.start[i : i + 1], means, without, means.mean(0, keepdim=True)])
        frozen = {
            name: (tensor if len(tensor) == 1 else tensor[i : i + 1]).expand(len(places), *tensor.shape[1:])
            for name, tensor in self.frozen.items()
        }
        found = self.losses({**frozen, **self.packing.unpack(places, frozen)})
        return settled_drop(found[0] - found[1:])


def settled_drop(drops: Float[Tensor, "places I"]) -> Float[Tensor, " 2"]:
    """The drop of the loss where K chains settle, and its standard error over chains and batches.

    Args:
        drops: On each of I batches, at 2 K + 1 places: at each chain's mean, at the mean of all chains but each, and at that of all. Batches
            with a value that is not finite are left out.

    Returns:
        The larger of the jackknife's drop and the mean over the chains' own; NaN where no chain is left.
    """
    num = len(drops) // 2
    drops = drops[:, drops.isfinite().all(0)]
    if not num or not drops.numel():
        return torch.full((2,), torch.nan, dtype=torch.float64)
    own, without, pooled = drops[:num], drops[num:-1], drops[-1]
    found = [_with_error(own.mean(0), own.mean(1), 1 / num)]
    if num > 1:
        found.append(_with_error(num * pooled - (num - 1) * without.mean(0), without.mean(1), (num - 1) ** 2 / num))
    return max(found, key=lambda one: float(one[0]))


def _with_error(by_batch: Float[Tensor, " I"], by_chain: Float[Tensor, " K"], factor: float) -> Float[Tensor, " 2"]:
    """A mean over batches; its error from them (one alone is the whole data) and from the chains' variance times a factor."""
    variances = []
    if len(by_chain) > 1:
        widening = stdtrit(len(by_chain) - 1, ndtr(3.0)) / 3  # so that three of it are as rare as of a normal's
        variances.append(factor * widening**2 * by_chain.var())
    if len(by_batch) > 1:
        variances.append(by_batch.var() / len(by_batch))
    return torch.stack([by_batch.mean(), torch.tensor(variances, dtype=by_batch.dtype).sum().sqrt()])
