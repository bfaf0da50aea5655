"""Flat parameters: a matrix in which each row contains the updated entries of one member of a population.

Adam and SGLD treat every parameter alike. So we copy the updated entries of each member (the moving entries) into one row. An update is
then a dozen operations on one matrix, whatever the number of layers. Rows of gradients have the same layout. Entries that are not updated
(the fixed entries) are not in the matrix, so no update can change them.
"""

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from icl.config.validation import ConfigError
from icl.model.stacked import Params

_ALIGNMENT = 16
"""The width of a row is a multiple of this number, which is 64 bytes in float32.

Every row then starts at the beginning of a cache line. PyTorch's order of summation can depend on the address of the data. Without this
alignment, a member's rounding errors would depend on the position of its row in the matrix.
"""
Restriction: TypeAlias = Iterable[str] | Mapping[str, Tensor] | None
"""Names or globs of the parameters that may move, or Boolean masks of their elements. None means that all parameters move."""


class Slot(NamedTuple):
    """The columns that belong to one parameter."""

    name: str
    shape: torch.Size
    size: int
    """Number of columns."""
    elements: Tensor | None
    """Indices of the moving elements in the flattened parameter, or None if all move."""
    dtype: torch.dtype | None = None
    """Dtype of the parameter if a member's parameters have different dtypes, otherwise None. If the dtypes differ, rows have the widest
    one."""


@dataclass(frozen=True, eq=False)
class Layout:
    """Order of a member's moving entries in its row.

    A layout is hashable, so a compiled function can be cached for each layout.
    """

    slots: tuple[Slot, ...]
    width: int
    """Number of columns, including the zeros at the end."""

    @property
    def size(self) -> int:
        """Number of moving entries."""
        return sum(slot.size for slot in self.slots)

    @cached_property
    def _key(self) -> tuple[Any, ...]:
        elements = (None if slot.elements is None else slot.elements.numpy().tobytes() for slot in self.slots)
        slots = zip(self.slots, elements, strict=True)
        return self.width, *((slot.name, slot.shape, slot.dtype, moving) for slot, moving in slots)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Layout) and self._key == other._key)

    def __hash__(self) -> int:
        return hash(self._key)

    def to_rows(self, params: Mapping[str, Tensor]) -> Float[Tensor, "N width"]:
        """Copy the moving entries of stacked parameters into rows."""
        parts = []
        for slot in self.slots:
            stacked = params[slot.name].detach()
            flat = stacked.reshape(len(stacked), -1)  # N size, even if the parameter is a single number
            parts.append(flat if slot.elements is None else flat[:, slot.elements.to(flat.device)])
        padding = parts[0].new_zeros(len(parts[0]), self.width - self.size)
        return torch.cat([*parts, padding], dim=1)

    def to_params(self, rows: Float[Tensor, "*N width"], fixed: Mapping[str, Tensor] | None = None) -> Params:
        """Convert rows to parameters. A parameter that moves as a whole is a view of the rows.

        Args:
            rows: The moving entries of several members (N, width), or of one member (width,).
            fixed: The parameters with fixed entries, as the method `fixed` returns them, with the same leading axis as `rows`.
        """
        return self.join(self.split(rows), fixed)

    def split(self, rows: Float[Tensor, "*N width"]) -> tuple[Tensor, ...]:
        """Return the columns of each parameter, followed by the padding, as views of the rows."""
        # Compiled graphs trace this method. They cannot trace `cached_property`, which uses a lock up to Python 3.11.
        return rows.split([*(slot.size for slot in self.slots), self.width - self.size], dim=-1)

    def join(self, parts: Sequence[Tensor], fixed: Mapping[str, Tensor] | None = None) -> Params:
        """Convert the columns of each parameter, as `split` returns them, to parameters. See `to_params` for `fixed`."""
        params = dict(fixed or {})
        for slot, part in zip(self.slots, parts, strict=False):  # the last part is padding
            if slot.dtype is not None:
                part = part.to(slot.dtype)
            if slot.elements is not None:
                whole = params[slot.name].reshape(*part.shape[:-1], -1)
                # Out of place, because torch.func.grad forbids writing to a tensor that the function did not make.
                part = whole.scatter(-1, slot.elements.to(whole.device).expand_as(part), part)
            params[slot.name] = part.unflatten(-1, slot.shape) if slot.shape else part.squeeze(-1)
        return params

    def fixed(self, params: Mapping[str, Tensor]) -> Params:
        """Return the parameters that have at least one fixed entry."""
        whole = {slot.name for slot in self.slots if slot.elements is None}
        return {name: tensor for name, tensor in params.items() if name not in whole}


def make_layout(
    member: Mapping[str, Tensor], masks: Mapping[str, Tensor] | None = None, *, alignment: int = _ALIGNMENT
) -> Layout:
    """Return the layout of one member's parameters, in the order in which they are given.

    Args:
        member: Parameters without a leading axis.
        masks: Boolean tensors that are True where an element moves. A parameter without a mask does not move. If
            `masks` is None, all parameters move.
        alignment: The row width is a multiple of this number.
    """
    slots = []
    is_mixed = len({tensor.dtype for tensor in member.values()}) > 1
    for name, tensor in member.items():
        mask = None if masks is None else masks.get(name, torch.zeros(()))
        if mask is not None and not mask.any():
            continue
        elements = None if mask is None or mask.all() else mask.flatten().nonzero().squeeze(1)
        size = tensor.numel() if elements is None else len(elements)
        elements = None if elements is None else elements.cpu()
        slots.append(Slot(name, tensor.shape, size, elements, tensor.dtype if is_mixed else None))
    size = sum(slot.size for slot in slots)
    return Layout(tuple(slots), size + -size % alignment)


def layout_of(params: Mapping[str, Tensor], *, alignment: int = _ALIGNMENT) -> Layout:
    """Return the layout of stacked parameters that all move."""
    return make_layout({name: tensor[0] for name, tensor in params.items()}, alignment=alignment)


def restricted_layout(params: Mapping[str, Tensor], restrict: Restriction = None) -> Layout:
    """Return the layout of the parameters that `restrict` allows to move. `params` belong to one member (no leading axis).

    Raises:
        ConfigError: If a name or glob matches no parameter, a mask does not fit its parameter, or no parameter is left to move.
    """
    layout = make_layout(params, None if restrict is None else _masks(params, restrict))
    if not layout.slots:
        raise ConfigError(
            "`restrict` leaves no parameter free to move. Give names, globs or masks that select some parameters."
        )
    return layout


def _masks(params: Mapping[str, Tensor], restrict: Any) -> dict[str, Tensor]:
    """Return a mask of the moving elements for each parameter that `restrict` names."""
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
    patterns = list(restrict) if isinstance(restrict, Iterable) and not isinstance(restrict, str) else [restrict]
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise ConfigError(
            "`restrict` must be names or globs of parameters, or a dict from names to masks, got "
            f"{type(restrict).__name__}. Leave it out to sample all parameters."
        )
    matches = {pattern: [name for name in params if fnmatch.fnmatchcase(name, pattern)] for pattern in patterns}
    for pattern, names in matches.items():
        if not names:
            raise ConfigError(f"`restrict` has `{pattern}`, which matches none of the parameters {_listing(params)}.")
    return {name: torch.ones(params[name].shape, dtype=torch.bool) for names in matches.values() for name in names}


def _listing(params: Mapping[str, Tensor]) -> str:
    names = list(params)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
