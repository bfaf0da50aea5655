"""Read files of `torch.save` without unpickling them.

A pickle can run any code. So we read these files with `weights_only=True`. PyTorch's reader then accepts tensors, numbers, strings and
containers, and refuses every other Python object by its name. Older code bases also saved a few harmless objects. This
module has a list of the names of these objects, and replaces each of them by a stand-in that stores or ignores the
data. No module of the older code is imported.
"""

import io
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from icl.config.validation import UserError
from icl.files.reading import ContentError, first_line, read_bytes

CONFIG_CLASSES = ("ICRegConfig",)
"""Names of config classes. An object of such a class is read as a dict of its fields, whatever its module is called."""
MAX_FILE = 2**34
"""Largest size of a file in bytes."""
_MAX_NAMES = 20
"""A file with this number of config classes, or more, is refused."""


class OlderFileError(UserError, ValueError):
    """Raised if a file of an older code base cannot be imported. The message says why, and what to do."""


class SavedConfig:
    """Stand-in for a config object of an older code base. The fields in the file are stored in `__dict__`."""


class _Ignored:
    """Stand-in for an object that is not needed."""

    def __new__(cls, *args: Any) -> "_Ignored":
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        """Ignore the object's data."""


class _NumberType(_Ignored):
    """Stand-in for a NumPy type. `code` is the short name of the type, such as f8."""

    code = ""

    def __init__(self, *args: Any) -> None:
        self.code = args[0] if args and args[0] in _NUMBER_CODES else ""

    def __setstate__(self, state: Any) -> None:
        """Set `code` to an empty string if the type is not little-endian, so that its numbers are not read."""
        if not (isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", "|")):
            self.code = ""


def _number(*args: Any) -> Any:
    """Return a pickled NumPy number, which consists of a type and bytes, as a Python number."""
    if len(args) == 2 and isinstance(args[0], _NumberType) and args[0].code and isinstance(args[1], bytes):
        kind = np.dtype(f"<{args[0].code}")
        if len(args[1]) == kind.itemsize:
            return np.frombuffer(args[1], kind)[0].item()
    return _Ignored()


def _bytes(*args: Any) -> Any:
    """Return the bytes that a pickle stores as a Latin-1 string."""
    is_latin = (
        len(args) == 2 and isinstance(args[0], str) and args[1] == "latin1" and all(c < "\u0100" for c in args[0])
    )
    return args[0].encode("latin1") if is_latin else _Ignored()


_NUMBER_CODES = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
# PyTorch 1 and 2.0 saved the function `OneCycleLR._annealing_linear` with the learning-rate schedule. The pickle contains this function as a
# call of `getattr`. NumPy arrays in these files are recorded losses, which are not needed. NumPy numbers are read, because they may be
# settings.
_STAND_INS: dict[str, Any] = {
    "builtins.getattr": _Ignored,
    "torch.optim.lr_scheduler.OneCycleLR": _Ignored,
    "numpy.core.multiarray._reconstruct": _Ignored,
    "numpy._core.multiarray._reconstruct": _Ignored,
    "numpy.ndarray": _Ignored,
    "numpy.core.multiarray.scalar": _number,
    "numpy._core.multiarray.scalar": _number,
    "numpy.dtype": _NumberType,
    "_codecs.encode": _bytes,
}


def read_pickle(path: Path) -> Any:
    """Return the content of a file of `torch.save`, with all tensors on the CPU.

    Raises:
        OlderFileError: If the file cannot be read, is damaged, or contains a Python object that is not in the list of names.
    """
    try:
        data = read_bytes(path, limit=MAX_FILE)
    except ContentError as error:
        raise OlderFileError(
            f"{path} cannot be imported: {error}. Give a regular file that contains only the weights, the step and the config."
        ) from None
    except OSError as error:
        raise OlderFileError(f"{path} cannot be read: {error.strerror}. Check its permissions.") from None
    _require_uncompressed(path, data)
    stand_ins = dict(_STAND_INS)
    for _ in range(_MAX_NAMES):
        tree, failure = _load(data, stand_ins)
        if failure is None:
            _require_plain_tensors(tree, path, len(data))
            return tree
        name = _refused_name(failure)
        if name is None or name in stand_ins or name.rpartition(".")[2] not in CONFIG_CLASSES:
            _refuse(path, failure, name)
        stand_ins[name] = SavedConfig
    raise OlderFileError(
        f"{path} contains {_MAX_NAMES} or more classes of configs, so the file is not read. Save the file again with "
        "its config as a dict, and import the new file."
    )


def as_table(value: Any) -> dict[str, Any]:
    """Return the entries of a config as a dict with strings as keys. Return an empty dict if `value` is not a config.

    A config is either a dict, or a `SavedConfig`, which contains the fields of an older config object.
    """
    table = vars(value) if isinstance(value, SavedConfig) else value
    return {key: table[key] for key in table if isinstance(key, str)} if isinstance(table, Mapping) else {}


def as_settings(value: Any) -> dict[str, bool | int | float | str]:
    """Return the numbers and strings of a config, keyed by name. A tensor with one element counts as a number. Other values are left out."""
    table = {
        key: entry.item() if isinstance(entry, Tensor) and entry.numel() == 1 else entry
        for key, entry in as_table(value).items()
    }
    return {key: entry for key, entry in table.items() if isinstance(entry, (bool, int, float, str))}


def _require_uncompressed(path: Path, data: bytes) -> None:
    """Refuse a zip file whose parts are larger than the file. A small zip file can expand to many gigabytes of zeros."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            size = sum(part.file_size for part in archive.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError):  # the older format, or a damaged file
        return
    if size > len(data):
        raise OlderFileError(
            f"{path} is compressed or damaged: it claims to contain {size:,} bytes, but has only {len(data):,}. Save it again with torch.save."
        )


def _load(data: bytes, stand_ins: Mapping[str, Any]) -> tuple[Any, Exception | None]:
    """Return the content of a file and None. If PyTorch cannot read the file, return None and the exception."""
    try:
        with (
            warnings.catch_warnings(),
            torch.serialization.safe_globals([(value, name) for name, value in stand_ins.items()]),
        ):
            warnings.simplefilter("ignore")  # PyTorch warns about every pickle protocol other than 2
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True), None
    except Exception as error:  # damaged files make torch raise a dozen kinds of errors
        return None, error


def _refused_name(error: Exception) -> str | None:
    """Return the name of the Python object that PyTorch refused, or None if PyTorch's error message names none."""
    match = re.search(r"GLOBAL (\S+) was not an allowed global|unsupported GLOBAL (\S+) whose", str(error))
    return (match[1] or match[2]) if match else None


def _refuse(path: Path, error: Exception, name: str | None) -> NoReturn:
    if name is not None:
        raise OlderFileError(
            f"{path} contains the Python object `{name}`. The file is not read, because a pickled object can run any "
            "code. In the environment of the older code, save the file again with only the weights (as "
            "model_state_dict or model), the step, and the config as a dict. Then import the new file."
        ) from None
    reason = re.split(r"\.\s|\n", first_line(error))[0][:120].rstrip(".")
    raise OlderFileError(
        f"{path} is damaged, or is not a file of `torch.save` that contains only tensors, numbers and strings "
        f"({reason}). Copy the file again. If this does not help, save the weights again with `torch.save`."
    ) from None


def _require_plain_tensors(tree: Any, path: Path, size: int) -> None:
    """Refuse tensors that are not dense, or that are larger than the file.

    A tensor in a file can claim to repeat one number many times, and so need much more memory than the file.
    """
    for tensor in _tensors(tree):
        if tensor.is_nested or tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
            raise OlderFileError(
                f"{path} contains a sparse, nested or quantized tensor; save the file again with dense tensors."
            )
        if tensor.numel() * tensor.element_size() > size:
            raise OlderFileError(
                f"{path} is damaged: a tensor of shape {tuple(tensor.shape)} is larger than the file. Copy the file again."
            )


def _tensors(tree: Any) -> Iterator[Tensor]:
    """Yield the tensors of a tree. A container that appears many times is visited once, so that a small file cannot take long."""
    stack, seen = [tree], set()
    while stack:
        value = stack.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (SavedConfig, Mapping, list, tuple, set)) and id(value) not in seen:
            seen.add(id(value))
            parts = vars(value) if isinstance(value, SavedConfig) else value
            stack.extend(parts.values() if isinstance(parts, Mapping) else parts)
