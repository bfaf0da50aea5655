"""Read files of `torch.save` that older code bases wrote, without unpickling them.

A pickle can run any code, so no function that the file names is called (`icl.files.torch_files`). Older code bases also saved a few harmless
objects. This module has a list of the names of these objects, and reads only their data. A file with any other object is refused, and the
message gives the object's name. No module of the older code is imported.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from icl.config.validation import UserError
from icl.files.pickled import PickledObject, UnknownObjectError
from icl.files.reading import ContentError, read_bytes
from icl.files.torch_files import parse_torch_file

CONFIG_CLASSES = ("ICRegConfig",)
"""Names of config classes. An object of such a class is read as a dict of its fields, whatever its module is called."""
MAX_FILE = 2**34
"""Largest size of a file in bytes."""
# PyTorch 1 and 2.0 saved the function `OneCycleLR._annealing_linear` with the learning-rate schedule. The pickle contains this function as a
# call of `getattr`. The NumPy arrays in these files are recorded losses, which we do not need. NumPy numbers may be settings, so we read
# them.
_NUMBERS = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
_KEPT = frozenset(
    (
        *("builtins.getattr", "torch.optim.lr_scheduler.OneCycleLR", "numpy.ndarray", "numpy.dtype", *_NUMBERS),
        *("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"),
    )
)
"""Names of the harmless objects. Only the data of these objects are read."""
_NUMBER_CODES = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")


class OlderFileError(UserError, ValueError):
    """Raised if a file of an older code base cannot be imported. The message says why, and what to do."""


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
        return parse_torch_file(data, is_kept=lambda name: name in _KEPT or _is_config(name))
    except UnknownObjectError as error:
        raise OlderFileError(
            f"{path} contains the Python object `{error.name.removeprefix('builtins.')}`. The file is not read, because a "
            "pickled object can run any code or fill the memory. In the environment of the older code, save the file again "
            "with only the weights (as model_state_dict or model), the step, and the config as a dict. Then import the new "
            "file."
        ) from None
    except ContentError as error:
        damage = re.fullmatch(r"it is damaged( \(.*\))?", str(error))
        raise OlderFileError(
            f"{path} is damaged, or is not a file of `torch.save` that contains only tensors, numbers and strings{damage[1] or ''}. Copy "
            "the file again. If this does not help, save the weights again with `torch.save`."
            if damage
            else f"{path} is compressed or damaged: {error}. Copy the file again, or save it again with torch.save."
        ) from None


def as_table(value: Any) -> dict[str, Any]:
    """Return the entries of a config as a dict with strings as keys. Return an empty dict if `value` is not a config.

    A config is either a dict, or the data of an older config object.
    """
    table = value.state if isinstance(value, PickledObject) and _is_config(value.name) else value
    return {key: table[key] for key in table if isinstance(key, str)} if isinstance(table, Mapping) else {}


def as_settings(value: Any) -> dict[str, bool | int | float | str]:
    """Return the numbers and strings of a config, keyed by name. A tensor with one element counts as a number. Other values are left out."""
    table = {key: _number(entry) for key, entry in as_table(value).items()}
    return {key: entry for key, entry in table.items() if isinstance(entry, (bool, int, float, str))}


def _is_config(name: str) -> bool:
    return name.rpartition(".")[2] in CONFIG_CLASSES


def _number(entry: Any) -> Any:
    """Return a tensor with one element, or a pickled NumPy number, as a Python number. Return other values as they are."""
    if isinstance(entry, Tensor):
        return entry.item() if entry.numel() == 1 else entry
    if not (isinstance(entry, PickledObject) and entry.name in _NUMBERS and len(entry.arguments) == 2):
        return entry
    kind, data = entry.arguments  # the number's type and its bytes
    code = kind.arguments[0] if isinstance(kind, PickledObject) and kind.arguments else None
    is_little = (
        isinstance(kind, PickledObject) and isinstance(kind.state, tuple) and kind.state[1:2] in (("<",), ("|",))
    )
    if code not in _NUMBER_CODES or not is_little or not isinstance(data, bytes):
        return entry
    dtype = np.dtype(f"<{code}")
    return np.frombuffer(data, dtype)[0].item() if len(data) == dtype.itemsize else entry
