"""Conversion of a user's numbers (tensors, NumPy arrays, pandas tables, nested lists) to tensors.

All public functions that take numbers convert them with this module, so they all accept and refuse the same input. We refuse everything
that a conversion would silently change: complex numbers, strings, Boolean values, and masked or missing entries.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from icl.config.validation import ConfigError, UserError


def real_tensor(
    value: Any,
    name: str,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    error: type[UserError] = ConfigError,
) -> Tensor:
    """Convert finite real numbers to a tensor of floats. A tensor that needs no conversion is returned unchanged.

    Args:
        value: A tensor, an array of any byte order or strides, a pandas object, or nested lists of numbers.
        name: Name of the value in error messages.
        dtype: The dtype to convert to. By default, floating-point tensors and arrays keep their dtype, tensors of integers get
            torch's default dtype, and Python numbers and NumPy integers become float64.
        device: The device to move to. By default a tensor stays on its device.
        error: Class of the exception.

    Raises:
        UserError: If the numbers are not real, not finite, or too large for the dtype. The exception has the class `error`.
    """
    try:
        tensor = value if isinstance(value, Tensor) else _from_array(_as_array(value))
        if tensor.is_complex():
            raise error(
                f"`{name}` must be real numbers, got complex ones ({tensor.dtype}). Pass `.real` to drop the imaginary part."
            )
        if tensor.dtype == torch.bool:
            raise TypeError("truth values")
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise error(f"`{name}` must be a dense tensor, got a sparse or quantised one. Pass `.to_dense()`.")
        wanted = dtype or (tensor.dtype if tensor.is_floating_point() else torch.get_default_dtype())
        converted = tensor.to(device=tensor.device if device is None else device, dtype=wanted)
        is_finite = bool(tensor.isfinite().all())
        fits = is_finite and (converted is tensor or bool(converted.isfinite().all()))
    except UserError:
        raise
    except _Masked:
        raise error(f"`{name}` has masked entries. Fill or drop them first.") from None
    except (TypeError, ValueError, RuntimeError, OverflowError, NotImplementedError, ArithmeticError):
        raise error(f"`{name}` must be numbers in rows of equal length, got {_described(value)}.") from None
    if not is_finite:
        raise error(f"`{name}` must be finite, but it has NaN or infinity.")
    if not fits:
        raise error(f"`{name}` has a number that is too large for {str(wanted).removeprefix('torch.')}.")
    return converted


class _Masked(Exception):
    """Error for an array with masked entries."""


def _as_array(value: Any) -> np.ndarray:
    """Convert a value other than a tensor to a NumPy array of numbers. Nested lists may contain tensors."""
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
    """Replace the tensors in nested lists with arrays, because np.asarray is slow for lists of tensors."""
    if isinstance(part, Tensor):
        return part.detach().cpu().resolve_conj().resolve_neg().numpy()
    if np.ma.isMaskedArray(part) and np.ma.getmaskarray(part).any():
        raise _Masked
    return [_as_list(inner) for inner in part] if isinstance(part, (list, tuple)) else part


def _is_real(number: Any) -> bool:
    """Return whether an entry of an array of objects is a real number. Missing entries (None, pandas.NA) are not real numbers."""
    return isinstance(number, (int, float, np.integer, np.floating)) and not isinstance(number, bool)


def _from_array(array: np.ndarray) -> Tensor:
    """Copy an array to a tensor, in a form that torch accepts.

    Torch does not accept foreign byte order, negative strides, read-only memory or long doubles.
    """
    if array.dtype.kind == "c":
        return torch.zeros(
            (), dtype=torch.complex128
        )  # the values do not matter, because `real_tensor` refuses the dtype
    has_torch_dtype = array.dtype.kind == "f" and array.dtype.itemsize <= 8
    dtype = array.dtype.newbyteorder("=") if has_torch_dtype else np.dtype(np.float64)
    return torch.from_numpy(np.array(array, dtype=dtype, order="C"))


def _described(value: Any) -> str:
    """Describe a value by its type, and its shape and dtype if it has them."""
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    of_shape = f" of shape {tuple(shape)}" if shape is not None else ""
    return type(value).__name__ + of_shape + (f" and dtype {dtype}" if dtype is not None else "")
