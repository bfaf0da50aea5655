"""Control variates from the checkpoint's own gradients on a fixed pool of minibatches.

A chain at w sees the gradient g_B(w) on minibatch B. At the checkpoint w0 the same minibatch gives g_B(w0), whose mean over the pool
is gbar. Let c_B = g_B(w0) - gbar. Near the checkpoint the noise of g_B(w) is mostly c_B, so we use

    gradient:  g_B(w) - c_B                                  (Johnson and Zhang 2013, "SVRG"; Baker et al. 2019)
    excess:    L_B(w) - L_B(w0) - c_B . (w - w0)

The mean of c_B over the pool is zero. So if every minibatch of the pool is equally likely, the control variates cause no bias. The
second one is used only if minibatches are drawn with replacement; in passes through a list, c_B averages to zero by itself. Without
a fixed pool, gbar would have an error that distorts the density, so there are no control variates.

The gradients at w0 are computed once, before the chains. We keep them only if they need at most `MEMORY` bytes, and if the pool
has at most half as many minibatches as the chains of a checkpoint make moves.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from icl.config import ChainsConfig
from icl.model.flat import Layout
from icl.model.stacked import Params
from icl.sampling.batches import ChainBatches, stack_batches
from icl.sampling.target import Target

MEMORY = 2**29
"""Largest memory in bytes for all kept gradients together."""


class Variates(NamedTuple):
    """The checkpoints' gradients and losses on every minibatch of the pool."""

    source: ChainBatches
    deviations: Float[Tensor, "C M P"]
    """Gradients g_B(w0) minus their mean over the pool."""
    losses: Float[Tensor, "C M *T"]
    is_uniform: bool
    """Whether minibatches are drawn with replacement, so that the excess has a control variate too."""

    def of_members(self, checkpoints: Sequence[int], chains: Sequence[int], move: int) -> tuple[Tensor, Tensor]:
        """Return c_B (N, P) and L_B(w0) (N, *T) of members at a move, from the numbers of their checkpoints and chains."""
        assert self.source.pool is not None
        numbers = {chain: self.source.pool.number_of(chain, move) for chain in dict.fromkeys(chains)}
        device = self.deviations.device
        which = torch.tensor(checkpoints, device=device) % len(self.deviations)
        batch = torch.tensor([numbers[chain] for chain in chains], device=device)
        return self.deviations[which, batch], self.losses[which, batch]


def make_variates(
    target: Target,
    checkpoints: Params,
    source: ChainBatches,
    settings: ChainsConfig,
    layout: Layout,
    *,
    chunk_size: int,
) -> Variates | None:
    """Compute the control variates on the pool. Return None if there is no suitable pool, or a gradient is not finite.

    Args:
        target: The loss to sample.
        checkpoints: Parameters, stacked on a leading axis C.
        source: Minibatches of the chains.
        settings: The settings of the chains.
        layout: Layout of the moving parameters in a row.
        chunk_size: Largest number of gradients that are computed at once.
    """
    rows, fixed, pool = layout.to_rows(checkpoints), layout.fixed(checkpoints), source.pool
    if pool is None or pool.size < 2:
        return None
    if pool.size > settings.num_chains * settings.num_moves / 2 or pool.size * rows.nbytes > MEMORY:
        return None
    gradient = target.chain_gradient if rows.device.type == "cpu" else target.default_gradient
    deviations, losses = [], []
    for i, row in enumerate(rows):
        own = {name: tensor[:1] if len(tensor) == 1 else tensor[i : i + 1] for name, tensor in fixed.items()}
        parts = []
        for first in range(0, pool.size, chunk_size):
            batches = [pool.get(number) for number in range(first, min(first + chunk_size, pool.size))]
            stacked, num = stack_batches(batches, rows.device), len(batches)
            copies = {name: tensor.expand(num, *tensor.shape[1:]) for name, tensor in own.items()}
            parts.append(gradient(layout, row.expand(num, -1).contiguous(), copies, stacked))
        grads = torch.cat([grads for grads, _ in parts])
        deviations.append(grads - grads.mean(0))
        losses.append(torch.cat([values for _, values in parts]))
    if not all(bool(rows.isfinite().all()) for rows in deviations):
        return None  # one bad minibatch makes gbar non-finite, and so the gradients on all minibatches
    return Variates(source, torch.stack(deviations), torch.stack(losses), pool.is_uniform)
