"""From a loss to the gradients of many members at once, and from a module to a loss.

A loss is any `loss(params, batch) -> Tensor`: a number, or a vector of components (per position, say) whose mean is the
loss. A `Gradient` takes the rows of the parameters that move, the stacked parameters that do not, and a stacked batch. It
returns the gradients, as rows, and the losses. A faster gradient of a known architecture can replace the default.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from icl.flat import Layout
from icl.sampling.batches import Batch
from icl.sampling.generators import untouched_generators
from icl.stacked import Params, unstack
from icl.validation import ConfigError

Loss: TypeAlias = Callable[[Params, Batch], Tensor]
"""One member's parameters and one batch to a number, or to components whose mean is the loss."""
Gradient: TypeAlias = Callable[[Layout, Tensor, Params, Batch], tuple[Tensor, Tensor]]
"""`gradient(layout, rows, fixed, batch)`: the gradient of each row (N, P), and the losses (N,) or (N, T).

The layout says which parameters lie in the rows; `fixed` and `batch` are stacked on N.
"""
_IS_RANDOM = (
    "The loss draws random numbers, as dropout in training mode does, so `seed` would not fix the estimate; put its modules "
    "into evaluation mode, as `module_loss` does, or take the random numbers from the batch."
)


def module_loss(model: nn.Module, criterion: Callable[[Tensor, Any], Tensor]) -> tuple[Loss, Params]:
    """A loss and its parameters from a module; batches are (inputs, targets), a tuple of inputs standing for several.

    The loss is `criterion(model(*inputs), targets)` in evaluation mode, on a copy: the caller's model is never called.
    Parameters with `requires_grad=False` are not among those to sample; the loss keeps them as they are now.

    Example:
        loss, params = module_loss(model, torch.nn.functional.mse_loss)

    Raises:
        ConfigError: If these are not a module and a function, or the module has nothing to train; in the loss, if a batch
            is no pair.
    """
    if not isinstance(model, nn.Module) or not callable(criterion):
        raise ConfigError(
            f"`module_loss` takes a module and a function of (outputs, targets), got {_described(model)} and "
            f"{_described(criterion)}; for anything else write `loss(params, batch)` yourself."
        )
    params = {name: tensor.detach().clone() for name, tensor in model.named_parameters() if tensor.requires_grad}
    if not params:
        raise ConfigError(
            "The module has no parameter with `requires_grad=True`, so there is none to sample; call "
            "`model.requires_grad_()`, or set it for those that chains shall move."
        )
    private = copy.deepcopy(model).eval().requires_grad_(False)

    def loss(params: Params, batch: Batch) -> Tensor:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            got = type(batch).__name__ + (f" of {len(batch)}" if isinstance(batch, (tuple, list)) else "")
            raise ConfigError(
                f"The loss of a module takes batches (inputs, targets), got {got}; make them pairs, ((x1, x2), targets) for "
                "several inputs and (inputs, None) if there are no targets, or write `loss(params, batch)` yourself."
            )
        inputs, targets = batch
        inputs = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
        return criterion(functional_call(private, params, inputs), targets)

    return loss, params


def vmapped_gradient(loss: Loss) -> Gradient:
    """Compute the gradients of all members at once, by `torch.func.vmap`."""

    @cache
    def of_one(layout: Layout) -> Callable[..., Any]:
        def value(row: Tensor, fixed: Params, batch: Batch) -> tuple[Tensor, Tensor]:
            components = _checked(loss(layout.to_params(row, fixed), batch))
            return components.mean(), components

        return grad_and_value(value, has_aux=True)

    def gradient(layout: Layout, rows: Tensor, fixed: Params, batch: Batch) -> tuple[Tensor, Tensor]:
        with _mappable():
            gradients = torch.vmap(of_one(layout), in_dims=(0, 0, mapped_axes(batch)))
            grads, (_, components) = gradients(rows, fixed, batch)
        return grads, components

    return gradient


def looped_gradient(loss: Loss) -> Gradient:
    """Compute the gradients member by member, by plain autograd, for losses that `vmap` cannot map."""

    def gradient(layout: Layout, rows: Tensor, fixed: Params, batch: Batch) -> tuple[Tensor, Tensor]:
        grads, components = [], []
        for i, row in enumerate(rows):
            leaf = row.detach().clone().requires_grad_()
            with torch.enable_grad(), _repeatable(leaf.device):
                params = layout.to_params(leaf, {name: tensor[i] for name, tensor in fixed.items()})
                values = _checked(loss(params, _member(batch, i)))
                (grad,) = torch.autograd.grad(values.mean(), [leaf], allow_unused=True)
            grads.append(torch.zeros_like(row) if grad is None else grad)
            components.append(values.detach())
        return torch.stack(grads), torch.stack(components)

    return gradient


def own_losses(loss: Loss, *, vectorize: bool) -> Callable[[Params, Batch], Tensor]:
    """The losses (N,) or (N, T) of stacked parameters, each on a batch of its own."""

    def losses(params: Params, batch: Batch) -> Tensor:
        if vectorize:
            with _mappable():
                return torch.vmap(lambda *one: _checked(loss(*one)), in_dims=(0, mapped_axes(batch)))(params, batch)
        with _repeatable(_device(params)):
            return torch.stack([_checked(loss(member, _member(batch, i))) for i, member in enumerate(unstack(params))])

    return losses


def stacked_loss(loss: Loss, *, vectorize: bool) -> Callable[[Params, Batch], Tensor]:
    """The losses (N,) or (N, T) of stacked parameters, all on one and the same batch."""

    def losses(params: Params, batch: Batch) -> Tensor:
        if vectorize:
            with _mappable():
                return torch.vmap(lambda member: _checked(loss(member, batch)))(params)
        with _repeatable(_device(params)):
            return torch.stack([_checked(loss(member, batch)) for member in unstack(params)])

    return losses


def mapped_axes(batch: Batch) -> Any:
    """`in_dims` of a stacked batch: tensors have the leading axis, other values have none."""
    return pytree.tree_map(lambda leaf: 0 if isinstance(leaf, Tensor) else None, batch)


def allocated_bytes(function: Callable[..., object], *inputs: Any) -> int:
    """Return the memory that a call needs: the sizes of all distinct tensors that it makes."""
    with _Allocations() as allocations:
        function(*inputs)
    return sum(allocations.sizes.values())


class _Allocations(TorchDispatchMode):
    """Notes the storage of every result."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                self.sizes[storage.data_ptr()] = max(self.sizes.get(storage.data_ptr(), 0), storage.nbytes())
        return result


def _device(params: Params) -> torch.device:
    return next(iter(params.values())).device


def _repeatable(device: torch.device) -> AbstractContextManager[None]:
    return untouched_generators(_IS_RANDOM, device)


@contextmanager
def _mappable() -> Iterator[None]:
    """Says in a sentence why `vmap` cannot map a loss; it refuses random numbers by itself.

    Raises:
        ConfigError: If it cannot.
    """
    try:
        yield
    except RuntimeError as error:
        if "random operation" in str(error):
            raise ConfigError(_IS_RANDOM) from error
        if not str(error).startswith(("vmap:", "Batching rule not implemented")):
            raise
        raise ConfigError(
            "`vmap` cannot run this loss for many chains at once, as it calls `.item()`, branches on a tensor's value or uses "
            "an operation that cannot be mapped; set `vectorize=False` to run one chain after another."
        ) from error


def _member(batch: Batch, i: int) -> Batch:
    return pytree.tree_map(lambda leaf: leaf[i] if isinstance(leaf, Tensor) else leaf, batch)


def _checked(components: Tensor) -> Tensor:
    if not isinstance(components, Tensor) or components.ndim > 1 or not components.is_floating_point():
        raise TypeError(
            f"A loss must give a real tensor, a number or a vector of components whose mean it is, got {_described(components)}."
        )
    return components


def _described(value: Any) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
