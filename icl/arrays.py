"""Numbers that a person brings become tensors here: tensors, NumPy arrays, pandas tables, nested lists.

Every public function that takes numbers converts and checks them here, so all of them accept and refuse the same things. What
would change a number silently is refused: complex numbers, text, truth values, masked or missing entries.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from icl.validation import ConfigError, UserError


def real_tensor(
    value: Any,
    name: str,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    error: type[UserError] = ConfigError,
) -> Tensor:
    """Return finite real numbers as a tensor of floats; a tensor that already fits is returned as it is.

    Args:
        value: A tensor, an array of any byte order or strides, a pandas object, or nested lists of numbers.
        name: What the sentence of a refusal calls it.
        dtype: The dtype to convert to; left out, floats keep theirs. Python's numbers and NumPy's whole numbers become
            float64, and whole numbers of a tensor torch's default.
        device: The device to move to; left out, a tensor stays where it is.
        error: The kind of exception.

    Raises:
        UserError: Of kind `error`, if the numbers are not real, not finite, or too large for the dtype.
    """
    try:
        tensor = value if isinstance(value, Tensor) else _from_array(_as_array(value))
        if tensor.is_complex():
            raise error(
                f"`{name}` must be real numbers, got complex ones ({tensor.dtype}); pass `.real` if that is meant."
            )
        if tensor.dtype == torch.bool:
            raise TypeError("truth values")
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise error(f"`{name}` must be a plain tensor, got one that is sparse or quantised; pass `.to_dense()`.")
        wanted = dtype or (tensor.dtype if tensor.is_floating_point() else torch.get_default_dtype())
        converted = tensor.to(device=tensor.device if device is None else device, dtype=wanted)
        is_finite = bool(tensor.isfinite().all())
        fits = is_finite and (converted is tensor or bool(converted.isfinite().all()))
    except UserError:
        raise
    except _Masked:
        raise error(f"`{name}` has masked entries; fill or drop them first.") from None
    except (TypeError, ValueError, RuntimeError, OverflowError, NotImplementedError, ArithmeticError):
        raise error(f"`{name}` must be numbers in rows of equal length, got {_described(value)}.") from None
    if not is_finite:
        raise error(f"`{name}` holds NaN or infinity; every number must be finite.")
    if not fits:
        raise error(f"`{name}` holds a number that is too large for {str(wanted).removeprefix('torch.')}.")
    return converted


class _Masked(Exception):
    """An array with masked entries."""


def _as_array(value: Any) -> np.ndarray:
    """Return a NumPy array of numbers; nested lists may hold tensors."""
    if isinstance(value, (str, bytes, dict, set)) or value is None:
        raise TypeError("not numbers")
    if isinstance(value, (list, tuple)):
        value = [_as_list(part) for part in value]
    if np.ma.isMaskedArray(value):
        if np.ma.getmaskarray(value).any():
            raise _Masked
        value = value.data
    array = np.asarray(value)
    if array.dtype.kind == "O":
        if not all(_is_real(number) for number in array.flat):
            raise TypeError("not numbers")
        array = array.astype(np.float64)
    if array.dtype.kind not in "iufc":
        raise TypeError("not numbers")
    return array


def _as_list(part: Any) -> Any:
    """Return what nested lists hold, with tensors as arrays; np.asarray takes a list of tensors apart number by number."""
    if isinstance(part, Tensor):
        return part.detach().cpu().resolve_conj().resolve_neg().numpy()
    if np.ma.isMaskedArray(part) and np.ma.getmaskarray(part).any():
        raise _Masked
    return [_as_list(inner) for inner in part] if isinstance(part, (list, tuple)) else part


def _is_real(number: Any) -> bool:
    """Whether an entry of an array of objects is a real number; missing ones (None, pandas.NA) are not."""
    return isinstance(number, (int, float, np.integer, np.floating)) and not isinstance(number, bool)


def _from_array(array: np.ndarray) -> Tensor:
    """Return a copy as a tensor: torch knows no foreign byte order, negative strides, read-only memory or long doubles."""
    if array.dtype.kind == "c":
        return torch.zeros((), dtype=torch.complex128)  # refused by its dtype
    is_known = array.dtype.kind == "f" and array.dtype.itemsize <= 8
    kind = array.dtype.newbyteorder("=") if is_known else np.dtype(np.float64)
    return torch.from_numpy(np.array(array, dtype=kind, order="C"))


def _described(value: Any) -> str:
    shape = getattr(value, "shape", None)
    kind = getattr(value, "dtype", None)
    about = f" of shape {tuple(shape)}" if shape is not None else ""
    return type(value).__name__ + about + (f" and dtype {kind}" if kind is not None else "")
