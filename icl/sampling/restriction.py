"""Which parameters a chain moves: `restrict`, as the user writes it, to a layout of rows.

`restrict` is None (all move), names or globs such as `blocks.0.*`, or a dict from names to Boolean masks of their elements.
"""

import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from icl.flat import Layout, make_layout
from icl.validation import ConfigError

Restriction: TypeAlias = Iterable[str] | Mapping[str, Tensor] | None
"""The parameters, or parts of them, that may move."""


def restricted_layout(params: Mapping[str, Tensor], restrict: Restriction = None) -> Layout:
    """Return the layout of the parameters of one member (no leading axis) that `restrict` lets move.

    Raises:
        ConfigError: If `restrict` names nothing there, a mask does not fit, or no parameter is left to move.
    """
    layout = make_layout(params, _masks(params, restrict))
    if not layout.slots:
        raise ConfigError("`restrict` leaves no parameter free to move; give names, globs or masks that select some.")
    for slot in layout.slots:
        if not params[slot.name].is_floating_point():
            raise ConfigError(
                f"`{slot.name}` holds {params[slot.name].dtype}; only real parameters can be sampled: leave it out by `restrict`."
            )
    return layout


def _masks(params: Mapping[str, Tensor], restrict: Restriction) -> dict[str, Tensor]:
    """The moving elements of each parameter that `restrict` names."""
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
