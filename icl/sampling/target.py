"""The target of the chains: a loss with its minibatches, and the loss's gradients and values for many members at once.

A loss is any `loss(params, batch) -> Tensor`. It returns a number, or a vector of components (per position, say) whose mean is the loss. A
member is one chain of one checkpoint (`icl.sampling.estimate`). A `Gradient` is a function of many members: of the moving parameters (one
row for each member), the other parameters (stacked) and a stacked batch. It returns the gradients, one row for each member, and the losses.
For a known architecture, a faster gradient can replace the default gradient.

If a loss drew from torch's global generators, `seed` would not determine the estimate. So we refuse such a loss: we restore the generators
and raise an error.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.func import grad_and_value
from torch.utils import _pytree as pytree

from icl.compute.calls import in_parallel
from icl.config.validation import ConfigError
from icl.model.flat import Layout
from icl.model.stacked import Params, unstack
from icl.sampling.batches import Batch, Batches

Loss: TypeAlias = Callable[[Params, Batch], Tensor]
"""Function from one member's parameters and one batch to a number, or to components whose mean is the loss."""
Observable: TypeAlias = Callable[[Params], Tensor]
"""Function from one member's parameters to a tensor, which is recorded at every draw."""
StackedLosses: TypeAlias = Callable[[Params, Batch], Tensor]
"""Function from stacked parameters and a batch to the losses (N,) or (N, T)."""
Gradient: TypeAlias = Callable[[Layout, Tensor, Params, Batch], tuple[Tensor, Tensor]]
"""`gradient(layout, rows, fixed, batch)` returns the gradient of each row (N, P), and the losses (N,) or (N, T).

The layout says which parameters lie in the rows. `fixed` and `batch` are stacked on a leading axis N.
"""
_REPEATABLE = 1e-4
"""Largest relative difference between two values of a loss at the same parameters and batch. Sums on a GPU may differ by about 1e-6."""
_RANDOM_LOSS = (
    "The loss draws random numbers, as dropout in training mode does, so `seed` would not determine the estimate. Put its modules "
    "into evaluation mode, as `module_loss` does, or take the random numbers from the batch."
)


@dataclass(frozen=True, kw_only=True)
class Target:
    """A loss with its minibatches, and faster ways to compute it if there are any."""

    loss: Loss
    """Function from one member's parameters and a batch to a number, or to components whose mean is the loss."""
    batches: Batches
    """Function from (chain, draw) to a minibatch, or an iterable of minibatches."""
    trivial_loss: float | None = None
    """Loss of a trivial predictor, for example one that predicts zero; None if it is not known."""
    name: str = "loss"
    vectorize: bool = True
    """If False, chains run one after another by plain autograd. This is needed for losses that `vmap` cannot map."""
    maps: bool = True
    """Whether `vmap` computes the gradients and losses of several members. If False, a loop computes one member after another."""
    is_thread_safe: bool = False
    """Whether several threads may call the loss at once. If so, the loop computes several members at once, each on its own CPU core."""
    gradient: Gradient | None = None
    """A faster gradient of the same loss for the chains' moves."""
    shared_losses: StackedLosses | None = None
    """A faster function for the losses of stacked parameters, all on the same batch."""
    own_losses: StackedLosses | None = None
    """A faster function for the losses of stacked parameters, with a separate batch for each member."""
    part: Callable[[Params, Batch], Batch] | None = None
    """Function that returns one part of a batch, if `gradient` goes through a batch in parts to save memory; otherwise None. If it is
    given, measurements at a checkpoint use `gradient` too, because the default gradient needs memory for the whole batch."""
    must_depend: bool = False
    """Whether to check that the loss depends on the parameters that move."""

    @property
    def _is_mapped(self) -> bool:
        return self.vectorize and self.maps

    @cached_property
    def default_gradient(self) -> Gradient:
        """Function that computes the gradient of `loss`, by `vmap` or by a loop."""
        return (
            vmapped_gradient(self.loss)
            if self._is_mapped
            else looped_gradient(self.loss, in_threads=self.is_thread_safe)
        )

    @cached_property
    def chain_gradient(self) -> Gradient:
        """Function that computes the gradient for the chains' moves."""
        return self.gradient or self.default_gradient

    def checkpoint_gradient(self, device: torch.device) -> Gradient:
        """Return the function that computes gradients for measurements at checkpoints.

        These measurements have few members. On a GPU, the chains' gradient may be a compiled graph, which would have to be compiled again
        for this number of members.
        """
        return self.chain_gradient if device.type == "cpu" or self.part is not None else self.default_gradient

    @cached_property
    def losses_on_shared_batch(self) -> StackedLosses:
        """Function that computes the losses of stacked parameters, all on the same batch."""
        return self.shared_losses or stacked_losses(self.loss, own_batches=False, vectorize=self._is_mapped)

    @cached_property
    def losses_on_own_batches(self) -> StackedLosses:
        """Function that computes the losses of stacked parameters, with a separate batch for each member."""
        return self.own_losses or stacked_losses(self.loss, own_batches=True, vectorize=self._is_mapped)

    def require_dependence(self, layout: Layout, checkpoint: Params, batch: Batch) -> None:
        """Refuse a loss that does not depend on the moving parameters, because chains would then sample only the Gaussian prior.

        Args:
            layout: How the moving parameters are arranged in one row of a matrix.
            checkpoint: Parameters of one member, with a leading axis of length 1.
            batch: Any batch.

        Raises:
            ConfigError: If the loss does not depend on the parameters that move, or depends on anything but its arguments.
        """
        row = layout.to_rows(checkpoint)[0].requires_grad_()
        fixed = {name: tensor[0] for name, tensor in layout.fixed(checkpoint).items()}
        with torch.enable_grad(), _refuse_random_loss(row.device):
            value, again = (_require_loss(self.loss(layout.to_params(row, fixed), batch)) for _ in range(2))
        if not torch.allclose(value, again, rtol=_REPEATABLE, atol=_REPEATABLE / 100, equal_nan=True):
            raise ConfigError(
                f"The loss is not a function of (params, batch): two calls with the same arguments gave {float(value.mean()):.6g} and "
                f"{float(again.mean()):.6g}. If the loss needs random numbers, take them from the batch."
            )
        if not value.requires_grad:
            raise ConfigError(
                "The loss does not depend on the parameters that may move, so there is nothing to estimate. Compute the loss from "
                "`params`, not from a module's own weights, and do not detach `params`."
            )

    def map_members(self, function: Callable[[Params], Tensor]) -> Callable[[Params], Tensor]:
        """Turn a function of one member's parameters into a function of stacked parameters."""
        mapped = stacked_losses(lambda params, _: function(params), own_batches=False, vectorize=self._is_mapped)
        return lambda params: mapped(params, None)


def vmapped_gradient(loss: Loss) -> Gradient:
    """Return a function that computes the gradients of all members at once with `torch.func.vmap`."""

    @cache
    def member_gradient(layout: Layout) -> Callable[..., Any]:
        def value(row: Tensor, fixed: Params, batch: Batch) -> tuple[Tensor, Tensor]:
            components = _require_loss(loss(layout.to_params(row, fixed), batch))
            return components.mean(), components

        return grad_and_value(value, has_aux=True)

    def gradient(layout: Layout, rows: Tensor, fixed: Params, batch: Batch) -> tuple[Tensor, Tensor]:
        with _explain_vmap_errors():
            mapped = torch.vmap(member_gradient(layout), in_dims=(0, 0, _batch_axes(batch)))
            grads, (_, components) = mapped(rows, fixed, batch)
        return grads, components

    return gradient


def looped_gradient(loss: Loss, *, in_threads: bool = False) -> Gradient:
    """Return a function that computes each member's gradient separately with plain autograd, for losses that `vmap` cannot map.

    Args:
        loss: The loss.
        in_threads: Whether CPU cores compute several members at once. The loss must then be safe to call from several threads.
    """

    def of_member(layout: Layout, row: Tensor, fixed: Params, batch: Batch, grad: Tensor) -> Tensor:
        """Write the gradient of one member into `grad`, and return its losses."""
        # Each parameter is a leaf, so its gradient is copied only once, into its columns of the row.
        leaves = [part.detach().requires_grad_() for part in layout.split(row)]
        with torch.enable_grad():
            values = _require_loss(loss(layout.join(leaves, fixed), batch))
            parts = torch.autograd.grad(values.mean(), leaves, allow_unused=True)
        pairs = zip(leaves, parts, strict=True)
        torch.cat([torch.zeros_like(leaf) if part is None else part for leaf, part in pairs], out=grad)
        return values.detach()

    members_at_once = in_parallel(of_member)

    def gradient(layout: Layout, rows: Tensor, fixed: Params, batch: Batch) -> tuple[Tensor, Tensor]:
        grads = torch.empty_like(rows)
        members = [
            (layout, row, {name: tensor[i] for name, tensor in fixed.items()}, _batch_of(i, batch), grads[i])
            for i, row in enumerate(rows)
        ]
        with _refuse_random_loss(rows.device):
            if in_threads and rows.device.type == "cpu":
                losses = members_at_once(members)
            else:
                losses = [of_member(*member) for member in members]
        return grads, torch.stack(losses)

    return gradient


def stacked_losses(loss: Loss, *, own_batches: bool, vectorize: bool) -> StackedLosses:
    """Return a function that computes the losses of stacked members, either each on its own batch or all on the same batch."""

    def losses(params: Params, batch: Batch) -> Tensor:
        if vectorize:
            axes = _batch_axes(batch) if own_batches else None
            with _explain_vmap_errors():
                mapped = torch.vmap(lambda member, its: _require_loss(loss(member, its)), in_dims=(0, axes))
                return mapped(params, batch)
        with _refuse_random_loss(next(iter(params.values())).device):
            values = [
                loss(member, _batch_of(i, batch) if own_batches else batch) for i, member in enumerate(unstack(params))
            ]
        return torch.stack([_require_loss(value) for value in values])

    return losses


def _batch_axes(batch: Batch) -> Any:
    """Return the argument `in_dims` of `vmap` for a stacked batch: 0 for tensors, None for other values."""
    return pytree.tree_map(lambda leaf: 0 if isinstance(leaf, Tensor) else None, batch)


def _batch_of(i: int, batch: Batch) -> Batch:
    """Return the batch of member i from a stacked batch."""
    return pytree.tree_map(lambda leaf: leaf[i] if isinstance(leaf, Tensor) else leaf, batch)


@contextmanager
def _refuse_random_loss(device: torch.device) -> Iterator[None]:
    """If the `with` block draws from a global generator of the CPU or of a CUDA device, restore this generator and raise an error."""
    before = _generator_states(device)
    try:
        yield
    finally:
        is_random = not all(map(torch.equal, before, _generator_states(device)))
        if is_random:
            torch.set_rng_state(before[0])
            if device.type == "cuda":
                torch.cuda.set_rng_state(before[1], device)
    if is_random:
        raise ConfigError(_RANDOM_LOSS)


def _generator_states(device: torch.device) -> list[Tensor]:
    on_device = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *on_device]


@contextmanager
def _explain_vmap_errors() -> Iterator[None]:
    """Replace errors of `vmap` with errors that say what to do. `vmap` itself refuses a loss that draws random numbers."""
    try:
        yield
    except RuntimeError as error:
        if "random operation" in str(error):
            raise ConfigError(_RANDOM_LOSS) from error
        if not str(error).startswith(("vmap:", "Batching rule not implemented")):
            raise
        raise ConfigError(
            "`vmap` cannot run this loss for many chains at once: the loss calls `.item()`, branches on a tensor's value or uses "
            "an operation that `vmap` does not support. Set `vectorize=False` to run one chain after another."
        ) from error


def _require_loss(components: Tensor) -> Tensor:
    if not isinstance(components, Tensor) or components.ndim > 1 or not components.is_floating_point():
        raise TypeError(
            "A loss must return a real tensor: a number, or a vector of components whose mean is the loss. "
            f"Got {describe(components)}."
        )
    return components


def describe(value: Any) -> str:
    """Describe a value in an error message: the dtype and shape of a tensor, or the type of any other value."""
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
