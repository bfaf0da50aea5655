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
    """The tensors of an older model by name. Each is taken once, with the shape that it must have. At the end, none may be left."""

    def __init__(self, tensors: Mapping[Any, Any]) -> None:
        self._left: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            if not isinstance(name, str) or not isinstance(tensor, Tensor):
                raise ContentError("its state dict must contain tensors by name only")
            if (plain := _without_wrappers(name)) in self._left:
                raise ContentError(f"it contains {plain} twice")
            self._left[plain] = tensor

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def shape(self, name: str, num_axes: int) -> tuple[int, ...]:
        """Return the shape of a tensor, which must have `num_axes` axes.

        Raises:
            ContentError: If the tensor is missing or has another number of axes.
        """
        if name not in self._left:
            raise ContentError(f"it contains no {name}")
        shape = tuple(self._left[name].shape)
        if len(shape) != num_axes or 0 in shape:
            raise ContentError(f"{name} has shape {shape}, but must have {num_axes} axes")
        return shape

    def take(self, name: str, *shape: int) -> Tensor:
        """Return a tensor and remove it. It must have this shape.

        Raises:
            ContentError: If the tensor is missing, has another shape, or is not of real numbers.
        """
        if self.shape(name, len(shape)) != shape:
            raise ContentError(f"{name} has shape {tuple(self._left[name].shape)}, but its other tensors imply {shape}")
        tensor = self._left.pop(name)
        if not tensor.is_floating_point():
            raise ContentError(f"{name} has numbers of type {tensor.dtype}, but must have real numbers")
        is_kept = tensor.dtype in (torch.float32, torch.float64)
        return tensor.detach().to(tensor.dtype if is_kept else torch.float32).contiguous()

    def drop(self, name: str, *shape: int) -> None:
        """Remove a tensor that is not a parameter, such as a mask. It may be missing."""
        if name in self._left and self.shape(name, len(shape)) == shape:
            del self._left[name]

    def num_layers(self, pattern: str) -> int:
        """Return the number of blocks: the smallest n from 0 for which there is no tensor `pattern.format(n)`."""
        count = 0
        while count <= _MAX_LAYERS and pattern.format(count) in self._left:
            count += 1
        return count

    def finish(self) -> None:
        """Check that no tensor is left.

        Raises:
            ContentError: If a tensor is left. The message names it.
        """
        if self._left:
            names = sorted(self._left)
            raise ContentError(f"it contains {names[0]}, which its architecture does not have")


def by_head(fused: Float[Tensor, "..."], num_heads: int) -> Float[Tensor, "..."]:
    """Return the weight (3C, C) or bias (3C,) of fused queries, keys and values in the order of `icl`.

    PyTorch's and GPT-2's order is all queries, all keys, all values. Ours is q, k and v of head 1, then those of head 2, and so on.
    """
    parts = fused.unflatten(0, (3, num_heads, -1))  # 3 H c ...
    return parts.transpose(0, 1).flatten(0, 2).contiguous()


def same_type(params: Params) -> Params:
    """Return the parameters in one type: float64 if one of them has it, else float32. A checkpoint has one type."""
    dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in params.values()) else torch.float32
    return {name: tensor.to(dtype) for name, tensor in params.items()}


def _without_wrappers(name: str) -> str:
    for prefix in (*_WRAPPERS, *_WRAPPERS):  # both may be present, in any order
        name = name.removeprefix(prefix)
    return name
