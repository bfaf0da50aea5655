"""Read files in the msgpack format of Flax: nested tables of arrays, numbers and strings. Nothing is unpickled.

The format is described at https://github.com/msgpack/msgpack/blob/master/spec.md. Flax saves an array as extension type 1. The data of
this type are msgpack again: a list of the shape, the name of the number type, and the bytes. Flax saves a NumPy scalar in the same form, as
extension type 3. An array of more than 2^30 bytes is saved as a table of chunks. Every length is compared with the number of bytes
that are left, so a small damaged file cannot make us allocate much memory.
"""

import math
import struct
from typing import Any, NamedTuple

import numpy as np

from icl.files.reading import MAX_DEPTH, ContentError

_ARRAY, _SCALAR = 1, 3
_CHUNKED = "__msgpack_chunked_array__"
_TYPES = (
    "float16",
    "float32",
    "float64",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "bool",
)
_MAX_VALUES = 2**22
_MAX_AXES = 8

# The first byte of a value says what follows. These tables map this byte to the format (of Python's `struct`) in which the number, or the
# length of the value, is written. Exceptions: `_FIXED_EXTENSIONS` gives the length itself, and `_CONSTANTS` gives the value itself.
_NUMBERS = {
    0xCA: ">f",
    0xCB: ">d",
    0xCC: ">B",
    0xCD: ">H",
    0xCE: ">I",
    0xCF: ">Q",
    0xD0: ">b",
    0xD1: ">h",
    0xD2: ">i",
    0xD3: ">q",
}
_BYTES = {0xC4: ">B", 0xC5: ">H", 0xC6: ">I"}
_TEXTS = {0xD9: ">B", 0xDA: ">H", 0xDB: ">I"}
_LISTS = {0xDC: ">H", 0xDD: ">I"}
_TABLES = {0xDE: ">H", 0xDF: ">I"}
_EXTENSIONS = {0xC7: ">B", 0xC8: ">H", 0xC9: ">I"}
_FIXED_EXTENSIONS = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}


class _Extension(NamedTuple):
    code: int
    data: bytes


def parse_msgpack(data: bytes) -> Any:
    """Return the content of a file: dicts with string keys, lists, numbers, strings and NumPy arrays.

    Raises:
        ContentError: If the file is not msgpack of Flax, or was cut short.
    """
    reader = _Reader(data)
    value = reader.value(0)
    if reader.position != len(data):
        raise ContentError("it has bytes after the end of its content, so it is not msgpack of Flax")
    return _joined(value)


class _Reader:
    """The bytes of a file and the position of the next value."""

    def __init__(self, data: bytes, *, is_array: bool = False) -> None:
        self.data, self.position, self.count = memoryview(data), 0, 0
        self.is_array = is_array
        """Whether `data` is the content of an array. Such data contain no further arrays."""

    def take(self, size: int) -> memoryview:
        """Return the next `size` bytes, and move past them."""
        if size > len(self.data) - self.position:
            raise ContentError("it was cut short, or is not msgpack of Flax")
        self.position += size
        return self.data[self.position - size : self.position]

    def number(self, form: str) -> Any:
        """Return the next number. `form` is the format of the number in Python's module `struct`."""
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def value(self, depth: int) -> Any:
        """Return the next value."""
        self.count += 1
        if depth > MAX_DEPTH or self.count > _MAX_VALUES:
            raise ContentError("it is nested too deeply, or contains too many values")
        first = self.take(1)[0]
        if first < 0x80:
            return first
        if first >= 0xE0:
            return first - 0x100
        if first in _CONSTANTS:
            return _CONSTANTS[first]
        if first in _NUMBERS:
            return self.number(_NUMBERS[first])
        if first in _BYTES:
            return bytes(self.take(self.number(_BYTES[first])))
        if first in _TEXTS or 0xA0 <= first < 0xC0:
            return self.text(self.number(_TEXTS[first]) if first in _TEXTS else first - 0xA0)
        if first in _LISTS or 0x90 <= first < 0xA0:
            length = self.number(_LISTS[first]) if first in _LISTS else first - 0x90
            return [self.value(depth + 1) for _ in range(self.bounded(length))]
        if first in _TABLES or first < 0x90:
            return self.table(self.number(_TABLES[first]) if first in _TABLES else first - 0x80, depth)
        if (first in _EXTENSIONS or first in _FIXED_EXTENSIONS) and not self.is_array:
            length = self.number(_EXTENSIONS[first]) if first in _EXTENSIONS else _FIXED_EXTENSIONS[first]
            return _array(_Extension(self.number(">b"), bytes(self.take(length))))
        raise ContentError(f"it contains the byte {first:#x} where msgpack of Flax does not allow it")

    def bounded(self, length: int) -> int:
        """Return the length of a list or table. Refuse a length above the number of bytes left, because each value needs at least one byte."""
        if length > len(self.data) - self.position:
            raise ContentError("it was cut short, or is not msgpack of Flax")
        return int(length)

    def text(self, length: int) -> str:
        """Return the next string."""
        try:
            return bytes(self.take(length)).decode("utf-8")
        except UnicodeDecodeError:
            raise ContentError("it contains text that is not UTF-8") from None

    def table(self, length: int, depth: int) -> dict[str, Any]:
        """Return the next table."""
        table: dict[str, Any] = {}
        for _ in range(self.bounded(length)):
            key = self.value(depth + 1)
            if not isinstance(key, str) or key in table:
                raise ContentError("it contains a table with a key that is not a string or that appears twice")
            table[key] = self.value(depth + 1)
        return table


def _array(extension: _Extension) -> np.ndarray:
    if extension.code not in (_ARRAY, _SCALAR):
        raise ContentError(
            f"it contains a value of the extension type {extension.code}, but `icl` reads only arrays and numbers"
        )
    parts = _Reader(extension.data, is_array=True).value(MAX_DEPTH - 2)
    if not (isinstance(parts, list) and len(parts) == 3 and isinstance(parts[0], list) and isinstance(parts[2], bytes)):
        raise ContentError("it contains an array that does not consist of shape, type and data")
    shape, name, data = parts
    if name == "bfloat16":
        if len(data) % 2:
            raise ContentError("it contains an array that was cut short")
        wide = np.frombuffer(data, dtype="<u2").astype(np.uint32) << 16
        numbers = wide.view(np.float32)
    elif name in _TYPES:
        if len(data) % np.dtype(name).itemsize:
            raise ContentError("it contains an array that was cut short")
        numbers = np.frombuffer(data, dtype=np.dtype(name).newbyteorder("<")).astype(name)
    else:
        raise ContentError(f"it contains an array of type {str(name)[:30]!r}, which icl cannot read")
    return _shaped(numbers, shape)


def _shaped(numbers: np.ndarray, shape: list[Any]) -> np.ndarray:
    """Return the numbers in the shape that the file claims, after checking this shape."""
    is_plain = all(isinstance(size, int) and not isinstance(size, bool) and 0 <= size < 2**40 for size in shape)
    if not is_plain or len(shape) > _MAX_AXES or math.prod(size or 1 for size in shape) >= 2**40:
        raise ContentError(f"it contains an array with the impossible shape {str(shape)[:60]}")
    if math.prod(shape) != numbers.size:
        raise ContentError(
            f"it contains an array of shape {tuple(shape)}, which needs {math.prod(shape):,} numbers but has {numbers.size:,}"
        )
    return numbers.reshape(shape)


def _joined(value: Any) -> Any:
    """Return a value, after joining the chunks of each array that was saved in chunks."""
    if not isinstance(value, dict):
        return [_joined(part) for part in value] if isinstance(value, list) else value
    if _CHUNKED not in value:
        return {key: _joined(part) for key, part in value.items()}
    shape, chunks = value.get("shape"), value.get("chunks")
    if not (isinstance(shape, dict) and isinstance(chunks, dict)):
        raise ContentError("it contains an array in chunks, but not the shape of this array")
    parts = [chunks.get(str(number)) for number in range(len(chunks))]
    sizes = [shape.get(str(axis)) for axis in range(len(shape))]
    if not all(isinstance(part, np.ndarray) for part in parts):
        raise ContentError("it contains an array in chunks, some of which are missing")
    numbers = np.concatenate([part.ravel() for part in parts if part is not None]) if parts else np.zeros(0)
    return _shaped(numbers, sizes)
