"""Read files of `torch.save` without unpickling them.

A pickle can run any code. So we read these files with `weights_only=True`. PyTorch's reader then accepts tensors, numbers, text and
containers, and refuses every other Python object by its name. Older code bases also saved a few harmless objects. This module
has a list of their names, and replaces each by a stand-in that holds data and does nothing. Nothing of the older code is imported.
"""

import io
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from icl.config.validation import UserError
from icl.files.reading import ContentError, first_line, read_bytes

CONFIG_CLASSES = ("ICRegConfig",)
"""Names of classes whose objects are read as tables of their fields, whatever their module is called."""
MAX_FILE = 2**34
"""Largest size of a file in bytes."""
_MAX_NAMES = 20
"""Largest number of config classes in one file."""


class OlderFileError(UserError, ValueError):
    """A file of an older code base that cannot be imported. The message says why and what to do."""


class SavedConfig:
    """Stand-in for a config object of an older code base. Its fields are in `__dict__`, as the file has them."""


class _Ignored:
    """Stand-in for an object that is not needed."""

    def __new__(cls, *args: Any) -> "_Ignored":
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        """Ignore the object's data."""


# PyTorch 1 and 2.0 saved the function `OneCycleLR._annealing_linear` in the state of the learning rate's schedule. A pickle has it
# as a call of `getattr`. NumPy's numbers come from seeds and losses. Their data are not needed.
_STAND_INS: dict[str, Any] = dict.fromkeys(
    (
        "builtins.getattr",
        "torch.optim.lr_scheduler.OneCycleLR",
        "numpy.core.multiarray.scalar",
        "numpy._core.multiarray.scalar",
        "numpy.core.multiarray._reconstruct",
        "numpy._core.multiarray._reconstruct",
        "numpy.ndarray",
        "numpy.dtype",
        "_codecs.encode",
    ),
    _Ignored,
)


def read_pickle(path: Path) -> Any:
    """Return the content of a file of `torch.save`, with all tensors on the CPU.

    Raises:
        OlderFileError: If the file cannot be read, is damaged, or contains a Python object that is not in the list of names.
    """
    try:
        data = read_bytes(path, limit=MAX_FILE)
    except ContentError as error:
        raise OlderFileError(f"{path} cannot be imported: {error}.") from None
    except OSError as error:
        raise OlderFileError(f"{path} cannot be read: {error.strerror}.") from None
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
    raise OlderFileError(f"{path} contains more than {_MAX_NAMES} classes of configs, so it is not read.")


def as_table(value: Any) -> dict[str, Any]:
    """Return a config as a table: the fields of a stand-in, or a dict itself. Empty for anything else."""
    table = vars(value) if isinstance(value, SavedConfig) else value
    return {key: table[key] for key in table if isinstance(key, str)} if isinstance(table, Mapping) else {}


def _load(data: bytes, stand_ins: Mapping[str, Any]) -> tuple[Any, Exception | None]:
    """Return the content of a file, or the error of PyTorch's reader."""
    try:
        with (
            warnings.catch_warnings(),
            torch.serialization.safe_globals([(value, name) for name, value in stand_ins.items()]),
        ):
            warnings.simplefilter("ignore")  # about other protocols of pickle, which are refused below
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True), None
    except Exception as error:  # damaged files make torch raise a dozen kinds
        return None, error


def _refused_name(error: Exception) -> str | None:
    """Return the name of the Python object that PyTorch refused, from its message."""
    match = re.search(r"GLOBAL (\S+) was not an allowed global|unsupported GLOBAL (\S+) whose", str(error))
    return (match[1] or match[2]) if match else None


def _refuse(path: Path, error: Exception, name: str | None) -> NoReturn:
    if name is not None:
        raise OlderFileError(
            f"{path} contains the Python object `{name}`. It is not read, because a pickled object can run any code. In the "
            "environment of the older code, save the file again with only model_state_dict or model, step, and a dict of the "
            "config, and import that file."
        ) from None
    reason = re.split(r"\.\s|\n", first_line(error))[0][:120].rstrip(".")
    raise OlderFileError(
        f"{path} is damaged, or is not a file of torch.save with tensors only ({reason}). Copy the file again."
    ) from None


def _require_plain_tensors(tree: Any, path: Path, size: int) -> None:
    """Refuse tensors that are sparse, or larger than the file. A tensor can claim to repeat one number many times."""
    for tensor in _tensors(tree, 0):
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
            raise OlderFileError(f"{path} contains a tensor that is not a plain array; save plain tensors.")
        if tensor.numel() * tensor.element_size() > size:
            raise OlderFileError(f"{path} is damaged: a tensor of shape {tuple(tensor.shape)} is larger than the file.")


def _tensors(value: Any, depth: int) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif depth < 10:
        parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
        for part in parts:
            if isinstance(part, (Tensor, Mapping, list, tuple)):
                yield from _tensors(part, depth + 1)
