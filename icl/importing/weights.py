"""Named tensors of an older model, and their conversion to the names and layouts of `icl`."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from icl.files.reading import ContentError
from icl.model.stacked import Params

_WRAPPERS = ("_orig_mod.", "module.")
"""Prefixes that torch.compile and DataParallel add to the names of parameters."""
_MAX_LAYERS = 1000


class Weights:
    """Tensors of an older model, keyed by name. A conversion takes out each tensor once and checks its shape. At the end, none may be left."""

    def __init__(self, tensors: Mapping[Any, Any]) -> None:
        self._left: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            if not isinstance(name, str) or not isinstance(tensor, Tensor):
                raise ContentError(
                    f"its state dict must contain only tensors, keyed by name, got {type(tensor).__name__} for {str(name)[:60]!r}"
                )
            if (plain := _without_wrappers(name)) in self._left:
                raise ContentError(f"it contains the tensor {plain} twice")
            self._left[plain] = tensor

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def shape(self, name: str, num_axes: int) -> tuple[int, ...]:
        """Return the shape of a tensor, which must have `num_axes` axes.

        Raises:
            ContentError: If the tensor is missing, has another number of axes, or has an axis of size 0.
        """
        if name not in self._left:
            raise ContentError(f"it contains no tensor {name}")
        shape = tuple(self._left[name].shape)
        if len(shape) != num_axes or 0 in shape:
            raise ContentError(
                f"its tensor {name} has shape {shape}, but must have {num_axes} axes and no axis of size 0"
            )
        return shape

    def take(self, name: str, *shape: int) -> Tensor:
        """Return a tensor and remove it from this object. The tensor must have this shape.

        Raises:
            ContentError: If the tensor is missing, has another shape, or does not consist of floating-point numbers.
        """
        if self.shape(name, len(shape)) != shape:
            raise ContentError(
                f"its tensor {name} has shape {tuple(self._left[name].shape)}, but its other tensors imply the shape {shape}"
            )
        tensor = self._left.pop(name)
        if not tensor.is_floating_point():
            raise ContentError(f"its tensor {name} has the type {tensor.dtype}, but must have a floating-point type")
        is_kept = tensor.dtype in (torch.float32, torch.float64)
        return tensor.detach().to(tensor.dtype if is_kept else torch.float32).contiguous()

    def drop(self, name: str, *shape: int) -> None:
        """Remove a tensor of this shape that is not a parameter, such as a mask. The tensor may be missing."""
        if name in self._left and self.shape(name, len(shape)) == shape:
            del self._left[name]

    def num_layers(self, pattern: str) -> int:
        """Return the number of blocks: the smallest n >= 0 for which there is no tensor `pattern.format(n)`."""
        count = 0
        while count <= _MAX_LAYERS and pattern.format(count) in self._left:
            count += 1
        return count

    def finish(self) -> None:
        """Check that every tensor has been taken.

        Raises:
            ContentError: If a tensor has not been taken. The message names this tensor.
        """
        if self._left:
            names = sorted(self._left)
            raise ContentError(f"it contains the tensor {names[0]}, which the architecture of this model does not have")


def by_head(fused: Float[Tensor, "..."], num_heads: int) -> Float[Tensor, "..."]:
    """Reorder the fused weight (3C, C) or bias (3C,) of queries, keys and values as `icl` orders them.

    In PyTorch and GPT-2, all queries come first, then all keys, then all values. In `icl`, q, k and v of head 1 come first, then q, k and
    v of head 2, and so on.
    """
    parts = fused.unflatten(0, (3, num_heads, -1))  # 3 H c ...
    return parts.transpose(0, 1).flatten(0, 2).contiguous()


def same_type(params: Params) -> Params:
    """Return copies of the parameters in one type, as a checkpoint requires: float64 if any parameter has this type, else float32.

    In the older file, tied parameters may share the same memory. The copies share no memory.
    """
    dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in params.values()) else torch.float32
    return {name: tensor.to(dtype, copy=True) for name, tensor in params.items()}


def _without_wrappers(name: str) -> str:
    for prefix in (*_WRAPPERS, *_WRAPPERS):  # both prefixes may be present, in any order
        name = name.removeprefix(prefix)
    return name
