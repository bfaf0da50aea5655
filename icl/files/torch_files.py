"""Read files of `torch.save` without unpickling them.

`torch.load` with `weights_only=True` runs no code of the file, but it calls functions with any arguments that the file contains. So a
small file can fill the memory or take hours, for example by `bytearray(n)`, by a tensor that repeats one number many times, by the
set of this tensor's elements, or by text in the codec punycode. From files of old versions of PyTorch, `torch.load` can also make
tensors whose numbers are never set. This module reads the pickle with our own reader (`icl.files.pickled`). It makes only tensors,
numbers, strings and containers, and compares each size that the file claims with the number of bytes in the file.

A storage contains the numbers of one or several tensors. PyTorch 1.6 and later write a zip file with the pickle in `data.pkl` and the
numbers of each storage in `data/KEY`. Earlier versions write five pickles: a magic number, a version, facts about the machine, the
content, and the keys of the storages. The storages follow the pickles. For each storage, the file has the length and then the numbers.

Errors are `ContentError`, whose message completes a sentence such as "last.ckpt cannot be used: ...".
"""

import io
import math
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from icl.files.pickled import CONTAINERS, Name, Objects, UnknownObjectError, as_tuple, parse_pickle
from icl.files.reading import ContentError

_MAX_PARTS = 10**5
"""Largest number of parts of a zip file."""
_MAX_GROWTH = 2**26
"""The tensors of a file may have at most this number of bytes plus four times the file's size. Several tensors may share numbers."""
_OLD_MAGIC, _OLD_VERSION = 0x1950A86A20F9469CFC6C, 1001
_STORAGES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.ComplexDoubleStorage": torch.complex128,
    "torch.ComplexFloatStorage": torch.complex64,
}
_CONSTANTS = frozenset((*_STORAGES, *map(str, _STORAGES.values())))
_REBUILD = "torch._utils._rebuild_"
_ODD_TENSORS = [f"{_REBUILD}{kind}" for kind in ("qtensor", "sparse_tensor", "meta_tensor_no_storage", "nested_tensor")]
_MAX_AXES = 16


def parse_torch_file(data: bytes, *, is_kept: Callable[[str], bool] = lambda name: False) -> Any:
    """Return the content of a file of `torch.save`, with all tensors on the CPU.

    Args:
        data: The whole file.
        is_kept: Function that takes the name of an object's class. It returns whether to return the object's data, as a
            `PickledObject`. By default, only tensors, numbers, strings and containers are accepted.

    Raises:
        UnknownObjectError: If the file contains an object that is not accepted.
        ContentError: If the file is damaged, or could need much more memory than it has bytes.
    """
    require_uncompressed(data)
    try:
        return _read_zip(data, is_kept) if _is_archive(data) else _read_old(data, is_kept)
    except UnknownObjectError as error:
        if error.name in _ODD_TENSORS:
            raise ContentError("it contains a sparse, nested or quantized tensor") from None
        raise
    except ContentError:
        raise
    except Exception as error:  # zipfile, pickletools and torch raise many kinds of errors for a damaged file
        raise ContentError(f"it is damaged ({type(error).__name__})") from None


def require_uncompressed(data: bytes) -> None:
    """Refuse a zip archive that is damaged, or whose parts are larger than the file. Files that are not archives are accepted.

    Raises:
        ContentError: If the archive is refused.
    """
    if not _is_archive(data):
        return
    if data.count(b"PK\x01\x02") > _MAX_PARTS:  # zipfile makes a Python object for each part
        raise ContentError(f"it has more than {_MAX_PARTS:,} parts")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            parts = archive.infolist()
    except Exception as error:  # zipfile raises many kinds of errors for a damaged file
        raise ContentError(f"it is damaged ({type(error).__name__})") from None
    size = sum(part.file_size for part in parts)
    if size > len(data):
        raise ContentError(f"it claims to contain {size:,} bytes, but has only {len(data):,}")
    if min((part.header_offset for part in parts), default=0) != 0:
        raise ContentError("it has bytes that do not belong to the zip file")


def _is_archive(data: bytes) -> bool:
    return data[:4] == b"PK\x03\x04"


def _read_zip(data: bytes, is_kept: Callable[[str], bool]) -> Any:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = archive.namelist()
        if len(set(names)) < len(names):
            raise ContentError("it contains a part twice")
        root = names[0].partition("/")[0]
        if f"{root}/byteorder" in names and archive.read(f"{root}/byteorder") != b"little":
            raise ContentError("its numbers are not in little-endian order")
        objects = _objects(_ZipStorages(archive, root), len(data), is_kept)
        return parse_pickle(io.BytesIO(archive.read(f"{root}/data.pkl")), objects)


def _read_old(data: bytes, is_kept: Callable[[str], bool]) -> Any:
    stream, storages = io.BytesIO(data), _OldStorages(len(data))
    objects = _objects(storages, len(data), is_kept)
    magic, version, machine, tree, keys = (parse_pickle(stream, objects) for _ in range(5))
    if (magic, version) != (_OLD_MAGIC, _OLD_VERSION):
        raise ContentError("it is damaged (it does not begin as a file of torch.save does)")
    if machine.get("little_endian") is not True:
        raise ContentError("its numbers are not in little-endian order")
    storages.fill(as_tuple(keys), stream)
    return tree


class _ZipStorages:
    """The storages in a zip file. Each storage is read once, so tensors that shared their numbers still share them."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        self.archive, self.root = archive, root
        self.known: dict[str, Tensor] = {}

    def get(self, dtype: torch.dtype, key: str, length: int) -> Tensor:
        """Return the numbers of a storage."""
        if key not in self.known:
            part = self.archive.getinfo(f"{self.root}/data/{key}")
            self.known[key] = torch.empty(part.file_size, dtype=torch.uint8)
            _fill(self.known[key], self.archive.read(part))  # zipfile compares the checksum
        return _typed(self.known[key], dtype, length)


class _OldStorages:
    """The storages of a file that PyTorch wrote before version 1.6. Their numbers follow the pickles, so they are read last."""

    def __init__(self, limit: int) -> None:
        self.left = limit
        """Number of bytes of the file that no storage claims yet."""
        self.known: dict[str, Tensor] = {}
        self.sizes: dict[str, int] = {}
        """Size in bytes of one number in each storage, keyed by the storage's key."""

    def get(self, dtype: torch.dtype, key: str, length: int, view: Any = None) -> Tensor:
        """Return the numbers of a storage, which `fill` reads. `view` is the key, offset and length of a part of the storage."""
        if key not in self.known:
            self.left -= length * dtype.itemsize
            if self.left < 0:
                raise ContentError("a storage is larger than the file")
            self.known[key] = torch.empty(length * dtype.itemsize, dtype=torch.uint8)
            self.sizes[key] = dtype.itemsize
        numbers = _typed(self.known[key], dtype, length)
        if view is None:
            return numbers
        _, offset, size = as_tuple(view)
        if not (_is_size(offset) and _is_size(size) and offset + size <= length):
            raise ContentError("a part of a storage is outside the storage")
        return numbers[offset : offset + size]

    def fill(self, keys: tuple[Any, ...], stream: io.BytesIO) -> None:
        """Read the numbers of all storages. `keys` gives the order of the storages in the file."""
        if not all(isinstance(key, str) for key in keys) or sorted(keys) != sorted(self.known):
            raise ContentError("it does not contain the numbers of all tensors")
        for key in keys:
            (length,) = struct.unpack("<q", stream.read(8))
            if length * self.sizes[key] != len(self.known[key]):
                raise ContentError("a storage has two lengths")
            _fill(self.known[key], stream.read(len(self.known[key])))


def _fill(numbers: Tensor, data: bytes) -> None:
    """Copy bytes to a tensor.

    `torch.frombuffer` would need no copy. But the bytes may then be unaligned in memory, and the results of some kernels depend on
    the alignment.
    """
    if len(data) != len(numbers):
        raise ContentError("it was cut short")
    numbers.numpy()[:] = np.frombuffer(data, np.uint8)


def _typed(numbers: Tensor, dtype: torch.dtype, length: int) -> Tensor:
    """Return the bytes of a storage as `length` numbers."""
    if len(numbers) != length * dtype.itemsize:
        raise ContentError(f"it has {len(numbers):,} bytes where it claims to have {length * dtype.itemsize:,}")
    return numbers.view(dtype)


@dataclass(eq=False, repr=False)
class _Storage:
    numbers: Tensor


def _objects(storages: _ZipStorages | _OldStorages, size: int, is_kept: Callable[[str], bool]) -> Objects:
    """Return the objects that a file of `size` bytes may contain."""
    left = _MAX_GROWTH + 4 * size

    def load(kind: str, name: Name, key: str, _: str, length: int, *view: Any) -> _Storage:
        if not (kind == "storage" and isinstance(key, str) and _is_size(length)):
            raise ContentError("it is damaged (it contains a storage without a size)")
        return _Storage(storages.get(_STORAGES[name.text], key, length, *view))

    def rebuild(storage: _Storage, offset: int, shape: Any, stride: Any, *rest: Any) -> Tensor:
        nonlocal left
        tensor = _tensor(storage.numbers, offset, as_tuple(shape), as_tuple(stride), size)
        left -= tensor.numel() * tensor.element_size()
        if left < 0:
            raise ContentError("its tensors together are much larger than the file")
        if rest[2:] and rest[2]:  # the first two values of `rest` are about gradients
            raise ContentError("it contains a view of a complex tensor")
        return tensor

    functions: dict[str, Callable[..., Any]] = {
        **CONTAINERS,
        "torch.Size": as_tuple,
        "torch.device": lambda *parts: parts,
        **dict.fromkeys((f"{_REBUILD}tensor", f"{_REBUILD}tensor_v2"), rebuild),
        **dict.fromkeys((f"{_REBUILD}parameter", f"{_REBUILD}parameter_with_state"), _without_gradient),
    }
    return Objects(functions=functions, constants=_CONSTANTS, is_kept=is_kept, load=load)


def _without_gradient(tensor: Tensor, *_: Any) -> Tensor:
    """Return the tensor of a parameter."""
    return tensor


def _tensor(numbers: Tensor, offset: Any, shape: tuple[Any, ...], stride: tuple[Any, ...], size: int) -> Tensor:
    """Return a tensor: some numbers of a storage in a shape. The tensor may have at most `size` bytes."""
    if not all(map(_is_size, (offset, *shape, *stride))) or len(shape) != len(stride) or len(shape) > _MAX_AXES:
        raise ContentError("it contains a tensor of an impossible shape")
    count = math.prod(shape)
    if count * numbers.element_size() > size:
        raise ContentError(f"a tensor of shape {shape} is larger than the file")
    if not count:
        return numbers.new_empty(shape)
    if offset + sum((axis - 1) * step for axis, step in zip(shape, stride, strict=True)) >= len(numbers):
        raise ContentError(f"a tensor of shape {shape} is larger than its storage")
    return numbers.as_strided(shape, stride, offset + int(numbers.storage_offset()))


def _is_size(number: Any) -> bool:
    return type(number) is int and 0 <= number < 2**60
