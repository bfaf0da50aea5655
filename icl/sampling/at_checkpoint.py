"""Measurements around a checkpoint: control variates for minibatch noise, and tests of whether the checkpoint is at a minimum.

**Control variates** (`Variates`). A chain at w uses the gradient g_B(w) on minibatch B. At the checkpoint w0, the same minibatch gives
g_B(w0). Let gbar be the mean of g_B(w0) over the pool of minibatches, and c_B = g_B(w0) - gbar. Near the checkpoint, the noise of g_B(w) is
mostly c_B. So chains of the kernel `baoab` use

    gradient:  g_B(w) - c_B                                  (Johnson and Zhang 2013, "SVRG"; Baker et al. 2019)
    excess:    L_B(w) - L_B(w0) - c_B . (w - w0)

The mean of c_B over the pool is zero. So if every minibatch of the pool is equally likely, the control variates cause no bias. The
control variate of the excess is used only if minibatches are drawn with replacement. If chains go through a list in passes instead, the
average of c_B over each pass is zero anyway. Without a fixed pool, we use no control variates: gbar could only be estimated, and the error
of the estimate would distort the sampled density.

The gradients at w0 are computed once, before the chains start. We use control variates only if these gradients fit into
`MEMORY` bytes, and if the number of minibatches in the pool is at most half the total number of moves of a checkpoint's
chains.

**One step down the gradient** (`GradientStep`). On one half of the batches, we compute the mean gradient g and the curvature along g (by a
finite difference of gradients). The localised Newton step is g times nbeta / (nbeta |curvature| + localization). On the same half of the
batches, we choose the best of four multiples (`STEPS`) of this step. On the other half, we measure how much the chosen step lowers the
loss, with the standard error. The LLC is underestimated by at least nbeta times this decrease of the loss.

**The loss at the mean of the draws** (`DropsAtMean`). If a checkpoint is not at its minimum, its LLC is too small by nbeta times the height
of its loss above the minimum. Chains also find the minimum along directions of small curvature, where a step down the gradient has little
effect. For a quadratic loss of curvature h with its minimum at w*, the mean of localised chains is w* + r (w0 - w*), with r = localization
/ (nbeta h + localization). So the loss at this mean is lower than the checkpoint's loss by (1 - r^2) h (w0 - w*)^2 / 2. We call this
difference the drop. `icl.sampling.convergence` describes its standard error.

- At a saddle, nbeta times the downward curvature may exceed the localization. Then chains move down on both sides, but the common mean of
  all chains stays near the saddle. So we also compute the drop at each chain's own mean, and average these drops. We report either this
  average or the drop at the common mean, whichever is larger. For a convex loss, the average is never larger.
- We measure the loss on a finite set of batches. The minimum of the loss on these batches is slightly lower than the minimum on all data,
  and lies at a slightly different point. So the standard error of the drop includes the spread between batches.

A member is one chain of one checkpoint (`icl.sampling.estimate`).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from icl.config import ChainsConfig
from icl.model.flat import Layout
from icl.model.stacked import Params
from icl.sampling.batches import Batch, ChainBatches, stack_batches
from icl.sampling.convergence import Drop, drop_at_mean
from icl.sampling.target import Gradient, StackedLosses, Target

MEMORY = 2**29
"""Memory limit in bytes for the stored gradients of all minibatches and checkpoints together."""
STEPS = (1 / 16, 1 / 4, 1.0, 4.0)
"""Multiples of the localised Newton step that are tried."""
NUM_STEP_BATCHES = 32
"""Largest number of batches for the step down the gradient: half to find it, half to measure its effect."""
_MIN_DROP_BATCHES = 32
"""Minimum number of batches for the drop at the mean."""
_NUDGE = 1e-3
"""Length of the finite difference, relative to (1 + |w0|) / sqrt(P), where P is the number of moving parameters."""


class Variates(NamedTuple):
    """Control variates and losses of C checkpoints, on each of the M minibatches of the pool."""

    source: ChainBatches
    deviations: Float[Tensor, "C M P"]
    """The control variates c_B: gradients g_B(w0) at the checkpoint, minus their mean over the pool."""
    losses: Float[Tensor, "C M *T"]
    is_uniform: bool
    """Whether minibatches are drawn with replacement. If so, the excess has a control variate too."""

    def of_members(self, checkpoints: Sequence[int], chains: Sequence[int], move: int) -> tuple[Tensor, Tensor]:
        """Return the control variates c_B and the checkpoints' losses L_B(w0), with a row for each of N members.

        Each member is one chain that starts at one checkpoint w0. B is the minibatch that this chain uses in the given move.

        Args:
            checkpoints: Index of the checkpoint of each member.
            chains: Index of the chain of each member.
            move: Index of the move, counted from 0 and including burn-in.
        """
        assert self.source.pool is not None
        numbers = {chain: self.source.pool.number_of(chain, move) for chain in dict.fromkeys(chains)}
        device = self.deviations.device
        which = torch.tensor(checkpoints, device=device) % len(self.deviations)
        batch = torch.tensor([numbers[chain] for chain in chains], device=device)
        return self.deviations[which, batch], self.losses[which, batch]


class AnchorLosses:
    """The checkpoints' losses on the minibatches of a pool. A loss is computed at its first use, and then kept."""

    def __init__(self, source: ChainBatches) -> None:
        self.source = source
        self.kept: dict[tuple[int, int], Tensor] = {}

    def of_members(
        self, checkpoints: Sequence[int], chains: Sequence[int], move: int, compute: Callable[[], Float[Tensor, "N *T"]]
    ) -> Float[Tensor, "N *T"]:
        """Return the checkpoints' losses L_B(w0), with a row for each of N members.

        Each member is one chain that starts at one checkpoint w0. B is the minibatch that this chain uses in the given move.

        Args:
            checkpoints: Index of the checkpoint of each member.
            chains: Index of the chain of each member.
            move: Index of the move, counted from 0 and including burn-in.
            compute: Function that computes the losses of all N members. The function is called only if one of these
                losses is not known yet. Without a pool, no loss is kept, so the function is always called.
        """
        if self.source.pool is None:
            return compute()
        number_of = self.source.pool.number_of
        keys = [(checkpoint, number_of(chain, move)) for checkpoint, chain in zip(checkpoints, chains, strict=True)]
        if all(key in self.kept for key in keys):
            return torch.stack([self.kept[key] for key in keys])
        losses = compute()
        self.kept.update(zip(keys, losses, strict=True))
        return losses


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
        layout: How the moving parameters are arranged in one row of a matrix.
        chunk_size: Largest number of gradients to compute at once.
    """
    rows, fixed, pool = layout.to_rows(checkpoints), layout.fixed(checkpoints), source.pool
    if pool is None or pool.size < 2:
        return None
    if pool.size > settings.num_chains * settings.num_moves / 2 or pool.size * rows.nbytes > MEMORY:
        return None
    gradient = target.checkpoint_gradient(rows.device)
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
        return None  # one bad minibatch makes gbar non-finite, and so the deviations on all minibatches
    return Variates(source, torch.stack(deviations), torch.stack(losses), pool.is_uniform)


class AtCheckpoint(NamedTuple):
    """Measurements at a checkpoint that need no chains."""

    losses: Float[Tensor, "I T"]
    """Losses on I batches, for each of T components."""
    descent: float
    """nbeta times the decrease of the loss by one step down the gradient (`GradientStep`), in nats: a mean over batches."""
    descent_stderr: float
    """Standard error over batches; NaN for a single batch that is not all the data."""
    descent_freedom: float
    """Degrees of freedom of `descent_stderr`."""
    are_all: bool
    """Whether the batches are all the data, so that means over them are exact."""
    rounding: float
    """Distance between neighbouring floating-point numbers near the loss, relative to the loss."""


def at_checkpoints(
    target: Target,
    chunks: Sequence[Params],
    batches: Sequence[Batch],
    settings_grid: Sequence[ChainsConfig],
    layout: Layout,
    *,
    are_all: bool,
) -> list[list[AtCheckpoint]]:
    """Return the measurements that need no chains: for each element of `settings_grid`, a list with one element per checkpoint.

    Args:
        target: The loss to sample.
        chunks: Stacked checkpoints, in chunks that fit into memory.
        batches: Batches on which each checkpoint's own loss is measured.
        settings_grid: Settings of the chains. Only nbeta and localization are used.
        layout: How the moving parameters are arranged in one row of a matrix.
        are_all: Whether the batches are all the data.
    """
    losses = target.losses_on_shared_batch
    gradient = target.checkpoint_gradient(next(iter(chunks[0].values())).device)
    # Because settings are often rounded, ratios that should be equal may differ in the last digits. We drop these digits.
    ratios = [float(f"{settings.localization / settings.inverse_temperature:.6g}") for settings in settings_grid]
    table: list[list[AtCheckpoint]] = [[] for _ in settings_grid]
    rounding = torch.finfo(losses(chunks[0], batches[0]).dtype).eps
    for chunk in chunks:
        init_losses = losses_by_batch(losses, chunk, batches)
        finite = init_losses.isfinite().all(2).all(0).tolist()
        usable = [batch for batch, is_usable in zip(batches, finite, strict=True) if is_usable] or batches
        step = GradientStep(gradient, losses, chunk, usable, layout=layout)
        decreases = {ratio: step.decrease(ratio) for ratio in dict.fromkeys(ratios)}
        for row, ratio, settings in zip(table, ratios, settings_grid, strict=True):
            nats = settings.inverse_temperature * decreases[ratio]  # I C
            means, num = nats.mean(0), len(nats)
            stderrs, freedom = torch.full_like(means, torch.nan), float(num - 1)
            if are_all and len(usable) == 1:
                stderrs, freedom = torch.zeros_like(means), torch.inf
            elif num > 1:
                stderrs = nats.std(0) / num**0.5
            for checkpoint_losses, mean, stderr in zip(init_losses, means.tolist(), stderrs.tolist(), strict=True):
                row.append(AtCheckpoint(checkpoint_losses, mean, stderr, freedom, are_all, rounding))
    return table


def losses_by_batch(losses: StackedLosses, params: Params, batches: Sequence[Batch]) -> Float[Tensor, "N I T"]:
    """Return the losses of N stacked parameter sets on each of I batches, in float64 on the CPU; T = 1 if the loss is a number."""
    values = [losses(params, batch) for batch in batches]
    return torch.stack([v if v.ndim > 1 else v[:, None] for v in values], dim=1).double().cpu()


class GradientStep:
    """A step down the gradient from each of C stacked checkpoints. Only the method `decrease` depends on the settings of the chains.

    Args:
        gradient: Function that computes the gradients of stacked parameters.
        losses: Function that computes the losses of stacked parameters, all on the same batch.
        checkpoints: Parameters, stacked on a leading axis C.
        batches: Every second batch is used to find the step, the others to measure its effect. A single batch is used for both.
        layout: How the moving parameters are arranged in one row of a matrix.
    """

    def __init__(
        self,
        gradient: Gradient,
        losses: StackedLosses,
        checkpoints: Params,
        batches: Sequence[Batch],
        *,
        layout: Layout,
    ) -> None:
        batches = batches[:NUM_STEP_BATCHES]
        self.finding, self.measuring = (batches, batches) if len(batches) == 1 else (batches[::2], batches[1::2])
        self.losses, self.layout, self.fixed = losses, layout, layout.fixed(checkpoints)
        self.start = layout.to_rows(checkpoints)

        def mean_gradient(rows: Tensor) -> Tensor:
            stacked = (stack_batches([batch] * len(rows), rows.device) for batch in self.finding)
            return torch.stack([gradient(layout, rows, self.fixed, batch)[0] for batch in stacked]).mean(0)

        self.gradient = g = mean_gradient(self.start)  # C P
        direction = g / torch.linalg.vector_norm(g, dim=1, keepdim=True).clamp(min=torch.finfo(g.dtype).tiny)
        nudge = _NUDGE * (1 + torch.linalg.vector_norm(self.start, dim=1, keepdim=True)) / layout.size**0.5
        change = mean_gradient(self.start + nudge * direction) - g
        self.curvature = (change * direction).sum(1, keepdim=True) / nudge  # C 1
        self.losses_at_start = self._losses(self.start, self.measuring)

    def decrease(self, ratio: float) -> Float[Tensor, "I C"]:
        """Return how much the best step lowers each checkpoint's loss on each batch, if localization / nbeta is `ratio`."""
        start, g = self.start, self.gradient
        newton = 1 / (self.curvature.abs() + ratio).clamp(min=torch.finfo(g.dtype).tiny)
        losses = [self._losses(start - factor * newton * g, self.finding).mean(0) for factor in STEPS]
        best = torch.stack(losses).nan_to_num(nan=torch.inf).argmin(0).to(g.device)
        factors = torch.tensor(STEPS, dtype=g.dtype, device=g.device)[best]
        return self.losses_at_start - self._losses(start - factors[:, None] * newton * g, self.measuring)

    def _losses(self, rows: Float[Tensor, "C P"], batches: Sequence[Batch]) -> Float[Tensor, "I C"]:
        params = self.layout.to_params(rows, self.fixed)
        values = [self.losses(params, batch) for batch in batches]
        return torch.stack([v.flatten(1).mean(1) if v.ndim > 1 else v for v in values]).cpu().double()


def num_drop_batches(num_moves: int, num_chains: int) -> int:
    """Return the number of batches on which the drop at the mean is measured.

    The number is chosen so that the measurement takes at most a quarter of the time for the chains' gradients. For K chains, we make
    2 K + 2 forward passes on each batch, and a forward pass takes a third of the time of a gradient. But we use at least
    `_MIN_DROP_BATCHES` batches, even if they take longer.
    """
    return max(_MIN_DROP_BATCHES, 3 * num_moves * num_chains // (8 * (num_chains + 1)))


class DropsAtMean:
    """Collects the mean positions of the members, in their order, and measures a checkpoint's drop once all its chains are complete.

    Args:
        losses: Function from stacked parameters to their losses on I batches, in float64.
        are_all: Whether the I batches are all the data.
        layout: How the moving parameters are arranged in one row of a matrix.
        start: The moving parameters of each checkpoint, as rows.
        fixed: The parameters that have fixed entries, stacked.
        num_chains: Number of chains of each checkpoint.
    """

    def __init__(
        self,
        losses: Callable[[Params], Float[Tensor, "N I"]],
        are_all: bool,
        layout: Layout,
        start: Float[Tensor, "C P"],
        fixed: Params,
        num_chains: int,
    ) -> None:
        self.losses, self.are_all, self.layout = losses, are_all, layout
        self.start, self.fixed, self.num_chains = start, fixed, num_chains
        self.means, self.alive = start[:0], torch.zeros(0, dtype=torch.bool)
        self.drops: list[Drop] = []

    def add(self, means: Float[Tensor, "N P"], alive: Bool[Tensor, " N"]) -> None:
        """Add the mean positions of the next N members. Then measure the drop of each checkpoint whose chains are all added.

        `alive` marks the members that are not masked. Positions that are no longer needed are freed.
        """
        self.means, self.alive = torch.cat([self.means, means]), torch.cat([self.alive, alive])
        num = self.num_chains
        while len(self.alive) >= num:
            used = self.means[:num][self.alive[:num].to(self.means.device)]
            self.drops.append(self._drop(len(self.drops), used))
            self.means, self.alive = self.means[num:], self.alive[num:]

    def _drop(self, i: int, means: Float[Tensor, "K P"]) -> Drop:
        """Return the drop of checkpoint i, from the means of its K chains that are not masked."""
        num = len(means)
        if not num:
            return Drop()
        # A single chain cannot be left out. We then use this chain's own mean, so that no loss is computed at a point that is NaN.
        leave_one_out = (means.sum(0) - means) / (num - 1) if num > 1 else means
        points = torch.cat([self.start[i : i + 1], means, leave_one_out, means.mean(0, keepdim=True)])
        fixed = {
            name: (tensor if len(tensor) == 1 else tensor[i : i + 1]).expand(len(points), *tensor.shape[1:])
            for name, tensor in self.fixed.items()
        }
        losses = self.losses(self.layout.to_params(points, fixed))
        start, per_chain, without, pooled = losses[:, losses.isfinite().all(0)].split([1, num, num, 1])
        rounding = num * torch.finfo(means.dtype).eps * float(start.abs().mean()) if start.numel() else 0.0
        return drop_at_mean(start - per_chain, start - without, start - pooled, are_all=self.are_all, rounding=rounding)
