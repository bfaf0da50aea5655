"""From a loss to gradients of many members at once, and from a module to a loss.

A loss is any `loss(params, batch) -> Tensor`: a number, or a vector of components (per position, say) whose mean is the
loss. A `Gradient` takes stacked parameters that move, stacked ones that do not, and a stacked batch, and gives the
gradients of what moves and the losses; a faster one for a known architecture can stand in for the default.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from icl.checks import ConfigError
from icl.population import Params, size, unstack
from icl.sampling.batches import Batch
from icl.sampling.generators import untouched_generators

Loss: TypeAlias = Callable[[Params, Batch], Tensor]
"""One member's parameters and one batch to a number, or to components whose mean is the loss."""
Gradient: TypeAlias = Callable[[Params, Params, Batch], tuple[Params, Tensor]]
"""(moving, frozen, batch), all stacked on N, to the gradients of the moving and the losses (N,) or (N, T)."""
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
    """The gradient of all members at once, by `torch.func.vmap`."""

    def value(moving: Params, frozen: Params, batch: Batch) -> tuple[Tensor, Tensor]:
        components = _checked(loss({**frozen, **moving}, batch))
        return components.mean(), components

    one = grad_and_value(value, has_aux=True)

    def gradient(moving: Params, frozen: Params, batch: Batch) -> tuple[Params, Tensor]:
        with _mappable():
            grads, (_, components) = torch.vmap(one, in_dims=(0, 0, mapped_axes(batch)))(moving, frozen, batch)
        return grads, components

    return gradient


def looped_gradient(loss: Loss) -> Gradient:
    """The gradient member by member, by plain autograd: for losses that `vmap` cannot map."""

    def gradient(moving: Params, frozen: Params, batch: Batch) -> tuple[Params, Tensor]:
        grads, components = [], []
        for i in range(size(moving)):
            leaves = {name: tensor[i].detach().clone().requires_grad_() for name, tensor in moving.items()}
            with torch.enable_grad(), _repeatable(leaves):
                one = _checked(loss({**{n: t[i] for n, t in frozen.items()}, **leaves}, _member(batch, i)))
                found = torch.autograd.grad(one.mean(), list(leaves.values()), allow_unused=True)
            grads.append([torch.zeros_like(p) if g is None else g for p, g in zip(leaves.values(), found, strict=True)])
            components.append(one.detach())
        columns = zip(*grads, strict=True)
        return {name: torch.stack(column) for name, column in zip(moving, columns, strict=True)}, torch.stack(
            components
        )

    return gradient


def own_losses(loss: Loss, *, vectorize: bool) -> Callable[[Params, Batch], Tensor]:
    """The losses (N,) or (N, T) of stacked parameters, each on a batch of its own."""

    def losses(params: Params, batch: Batch) -> Tensor:
        if vectorize:
            with _mappable():
                return torch.vmap(lambda *one: _checked(loss(*one)), in_dims=(0, mapped_axes(batch)))(params, batch)
        with _repeatable(params):
            return torch.stack([_checked(loss(member, _member(batch, i))) for i, member in enumerate(unstack(params))])

    return losses


def stacked_loss(loss: Loss, *, vectorize: bool) -> Callable[[Params, Batch], Tensor]:
    """The losses (N,) or (N, T) of stacked parameters, all on one and the same batch."""

    def losses(params: Params, batch: Batch) -> Tensor:
        if vectorize:
            with _mappable():
                return torch.vmap(lambda member: _checked(loss(member, batch)))(params)
        with _repeatable(params):
            return torch.stack([_checked(loss(member, batch)) for member in unstack(params)])

    return losses


def mapped_axes(batch: Batch) -> Any:
    """`in_dims` of a stacked batch: tensors have the leading axis, other values have none."""
    return pytree.tree_map(lambda leaf: 0 if isinstance(leaf, Tensor) else None, batch)


def member_bytes(gradient: Gradient, moving: Params, frozen: Params, batch: Batch) -> int:
    """Memory that one member's gradient needs: the distinct addresses of all tensors that it makes."""
    with _Allocations() as allocations:
        gradient(moving, frozen, batch)
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


def _repeatable(params: Params) -> AbstractContextManager[None]:
    return untouched_generators(_IS_RANDOM, next(iter(params.values())).device)


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
