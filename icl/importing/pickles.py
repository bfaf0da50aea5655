"""Read files of `torch.save` without unpickling them.

A pickle can run any code. So we accept only tensors, numbers, strings and containers, refuse every other Python object by its name
(`icl.files.torch_files`), and read these files with `weights_only=True`. Older code bases also saved a few harmless objects. This
module has a list of the names of these objects, and replaces each of them by a stand-in that stores or ignores the
data. No module of the older code is imported.
"""

import io
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from icl.config.validation import UserError
from icl.files.reading import ContentError, first_line, read_bytes
from icl.files.torch_files import is_plain, pickled_names, require_plain_tensors, require_uncompressed

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
    try:
        require_uncompressed(data)
    except ContentError as error:
        raise OlderFileError(
            f"{path} is compressed or damaged: {error}. Copy the file again, or save it again with torch.save."
        ) from None
    try:
        names = pickled_names(data)
    except ContentError as error:
        _refuse_damaged(path, error)
    configs = {name for name in names if name.rpartition(".")[2] in CONFIG_CLASSES}
    _require_known(path, names - configs - set(_STAND_INS))
    if len(configs) >= _MAX_NAMES:
        raise OlderFileError(
            f"{path} contains {_MAX_NAMES} or more classes of configs, so the file is not read. Save the file again with "
            "its config as a dict, and import the new file."
        )
    tree = _load(path, data, {**_STAND_INS, **dict.fromkeys(configs, SavedConfig)})
    try:
        require_plain_tensors(tree, len(data))
    except ContentError as error:
        raise OlderFileError(
            f"{path} cannot be imported: {error}. Copy the file again, or save it again with dense tensors."
        ) from None
    return tree


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


def _load(path: Path, data: bytes, stand_ins: Mapping[str, Any]) -> Any:
    """Return the content of a file. Replace the Python objects that `stand_ins` names."""
    try:
        with (
            warnings.catch_warnings(),
            torch.serialization.safe_globals([(value, name) for name, value in stand_ins.items()]),
        ):
            warnings.simplefilter("ignore")  # PyTorch warns about every pickle protocol other than 2
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files make torch raise a dozen kinds of errors
        _refuse_damaged(path, error)


def _require_known(path: Path, names: set[str]) -> None:
    """Refuse a file that contains a Python object other than tensors, numbers, strings and containers."""
    unknown = sorted(name for name in names if not is_plain(name))
    if unknown:
        raise OlderFileError(
            f"{path} contains the Python object `{unknown[0].removeprefix('builtins.')}`. The file is not read, because a "
            "pickled object can run any code or fill the memory. In the environment of the older code, save the file again "
            "with only the weights (as model_state_dict or model), the step, and the config as a dict. Then import the new "
            "file."
        )


def _refuse_damaged(path: Path, error: Exception) -> NoReturn:
    reason = re.split(r"\.\s|\n", first_line(error))[0][:120].rstrip(".")
    raise OlderFileError(
        f"{path} is damaged, or is not a file of `torch.save` that contains only tensors, numbers and strings "
        f"({reason}). Copy the file again. If this does not help, save the weights again with `torch.save`."
    ) from None
