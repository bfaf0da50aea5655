"""Which entries of the parameters a chain moves, and how they become one row of a matrix.

A population's free entries are packed into one tensor (N, P), so that a move is a handful of kernels whatever the number
of layers, P is the number d of sampled dimensions, and what is frozen cannot move: it is never in the matrix. `restrict`
is None (all), names or globs such as `blocks.0.*`, or a dict from names to Boolean masks of their elements.
"""

import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from icl.checks import ConfigError
from icl.population import Params

Restriction: TypeAlias = Iterable[str] | Mapping[str, Tensor] | None
"""What may move."""


class Part(NamedTuple):
    """One parameter's place in the matrix."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    elements: Tensor | None
    """The free elements, counted in the flattened parameter; None if all are."""


class Packing(NamedTuple):
    """The free entries of an architecture, in the order of its parameters."""

    parts: tuple[Part, ...]

    @property
    def size(self) -> int:
        """The number d of free entries."""
        return self.parts[-1].stop

    def pack(self, tensors: Mapping[str, Tensor]) -> Float[Tensor, "N P"]:
        """The free entries of stacked tensors, a row for each member."""
        rows = []
        for part in self.parts:
            flat = _flat(tensors[part.name])
            rows.append(flat if part.elements is None else flat[:, part.elements.to(flat.device)])
        return torch.cat(rows, dim=1)

    def unpack(self, packed: Float[Tensor, "N P"], frozen: Mapping[str, Tensor]) -> Params:
        """Stacked parameters that can move: views where all of a parameter is free, else copies over `frozen`."""
        params = {}
        for part in self.parts:
            columns = packed[:, part.start : part.stop]
            if part.elements is not None:
                whole = _flat(frozen[part.name]).clone()
                whole[:, part.elements.to(whole.device)] = columns
                columns = whole
            params[part.name] = columns.unflatten(1, part.shape) if part.shape else columns.squeeze(1)
        return params

    def frozen(self, params: Mapping[str, Tensor]) -> Params:
        """The parameters that `pack` does not hold whole."""
        whole = {part.name for part in self.parts if part.elements is None}
        return {name: tensor for name, tensor in params.items() if name not in whole}


def make_packing(params: Mapping[str, Tensor], restrict: Restriction = None) -> Packing:
    """The packing of one member's parameters (no leading axis).

    Raises:
        ConfigError: If `restrict` names nothing there, a mask does not fit, or nothing is left to move.
    """
    masks = _masks(params, restrict)
    parts, start = [], 0
    for name, tensor in params.items():
        mask = masks.get(name)
        if mask is None or not mask.any():
            continue
        index = None if mask.all() else mask.flatten().nonzero().squeeze(1)
        size = tensor.numel() if index is None else len(index)
        parts.append(Part(name, tuple(tensor.shape), start, start + size, index))
        start += size
    if not parts:
        raise ConfigError("`restrict` leaves no parameter free to move; give names, globs or masks that select some.")
    for part in parts:
        if not params[part.name].is_floating_point():
            raise ConfigError(
                f"`{part.name}` holds {params[part.name].dtype}; only real parameters can be sampled: leave it out by `restrict`."
            )
    return Packing(tuple(parts))


def _flat(stacked: Float[Tensor, "N *shape"]) -> Float[Tensor, "N size"]:
    """A row for each member, of one element where the members are numbers."""
    return stacked.reshape(len(stacked), -1)


def _masks(params: Mapping[str, Tensor], restrict: Restriction) -> dict[str, Tensor]:
    if isinstance(restrict, Mapping):
        for name, mask in restrict.items():
            if name not in params:
                raise ConfigError(f"`restrict` has a mask for `{name}`, but the parameters are {_listing(params)}.")
            if not isinstance(mask, Tensor) or mask.shape != params[name].shape or mask.dtype != torch.bool:
                got = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
                raise ConfigError(
                    f"The mask of `{name}` must be a Boolean tensor of shape {tuple(params[name].shape)}, got {got}."
                )
        return {name: mask.detach().cpu() for name, mask in restrict.items()}
    patterns = ["*"] if restrict is None else _patterns(restrict)
    for pattern in patterns:
        if not fnmatch.filter(params, pattern):
            raise ConfigError(f"`restrict` has `{pattern}`, which fits none of the parameters {_listing(params)}.")
    chosen = [name for name in params if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    return {name: torch.ones(params[name].shape, dtype=torch.bool) for name in chosen}


def _patterns(restrict: Any) -> list[str]:
    patterns = [restrict] if isinstance(restrict, str) else list(restrict) if isinstance(restrict, Iterable) else None
    if patterns is None or not all(isinstance(pattern, str) for pattern in patterns):
        raise ConfigError(
            f"`restrict` must be names or globs of parameters, or a dict from names to masks, got {type(restrict).__name__}; "
            "leave it out to sample all of them."
        )
    return patterns


def _listing(params: Mapping[str, Tensor]) -> str:
    names = list(params)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
