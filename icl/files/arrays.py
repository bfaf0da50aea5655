"""Write and read arrays in NumPy's file formats. Reading is safe even if a file is damaged or malicious.

Reading never unpickles objects. The header of a damaged file can claim an array of a terabyte. So the claimed size is compared
with the file's size before memory is allocated. If a file is damaged, an error is raised, and the caller can compute the content again.
"""

import hashlib
import io
import math
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from icl.files.reading import ContentError, parse_json
from icl.files.writing import write_atomically

_MAX_GROWTH = 2**26
"""An archive may decompress to at most this number of bytes plus four times its own size. Archives that `icl` wrote have about a million
bytes."""
_MAX_ARRAYS = 1000


@dataclass(frozen=True, kw_only=True)
class StoredArray:
    """A one-dimensional array that stays in its file. Slices are read from the file when they are needed.

    The file is closed after each slice, because there may be thousands of arrays, and each `numpy.memmap` would keep a file open.
    """

    file: Path
    offset: int
    """Position of the first number in the file, in bytes."""
    size: int
    dtype: np.dtype

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(self.size)
        return np.fromfile(self.file, self.dtype, stop - start, offset=self.offset + start * self.dtype.itemsize)


def write_array(path: Path, array: np.ndarray) -> None:
    """Write an array as `.npy`, atomically.

    Raises:
        StorageError: If the file cannot be written.
    """
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_atomically(path, buffer.getvalue())


def read_array(path: Path) -> np.ndarray:
    """Return the array of a `.npy` file.

    Raises:
        ContentError: If the file is missing or damaged, or is smaller than its header claims.
    """
    return np.array(_map_array(path))


def locate_array(path: Path) -> StoredArray:
    """Return a reference to the flattened array of a `.npy` file, without reading the numbers.

    Raises:
        ContentError: If the file is missing or damaged.
    """
    array = _map_array(path)
    return StoredArray(file=path, offset=array.offset, size=array.size, dtype=array.dtype)


def array_digest(array: np.ndarray) -> str:
    """Return a hash of an array's type, shape and numbers."""
    hasher = hashlib.blake2b(f"{array.dtype.str} {array.shape}".encode(), digest_size=16)
    hasher.update(np.ascontiguousarray(array).tobytes())
    return hasher.hexdigest()


def read_archive(path: Path) -> tuple[Any, dict[str, np.ndarray]]:
    """Return the description and the arrays in an `.npz` file that `icl` 0.1.0 wrote. The description is JSON, saved as `about`.

    Raises:
        ContentError: If the file is missing or damaged, or if a header claims more numbers than the file contains.
    """
    _require_regular(path)
    try:
        with zipfile.ZipFile(path) as archive:
            _require_bounded(archive, path.stat().st_size)
        with np.load(path, allow_pickle=False) as saved:
            arrays = {name: saved[name] for name in saved.files}
        return parse_json(str(arrays.pop("about"))), arrays
    except Exception as error:  # NumPy, zipfile and zlib raise a dozen kinds of errors for damaged files
        raise ContentError(f"it is damaged ({type(error).__name__})") from None


def _map_array(path: Path) -> np.memmap:
    """Map a `.npy` file into memory. When NumPy does this, it compares the size that the header claims with the size of the file."""
    _require_regular(path)
    try:
        return np.lib.format.open_memmap(path, mode="r")  # unlike np.load, this function refuses a zip file
    except Exception as error:  # NumPy raises a dozen kinds of errors for damaged files
        raise ContentError(f"it is damaged ({type(error).__name__})") from None


def _require_regular(path: Path) -> None:
    """Refuse a path that is missing, a folder, or a pipe, which NumPy would read for ever."""
    if not path.is_file():
        raise ContentError("it is missing, or is not a regular file")


def _require_bounded(archive: zipfile.ZipFile, size: int) -> None:
    """Refuse an archive that decompresses to too many bytes, or has an array whose header claims a wrong size."""
    members = archive.infolist()
    if len(members) > _MAX_ARRAYS or sum(member.file_size for member in members) > _MAX_GROWTH + 4 * size:
        raise ContentError("it has too many arrays, or decompresses to too many bytes")
    for member in members:
        with archive.open(member) as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file)
            if dtype.hasobject or math.prod(shape) * dtype.itemsize != member.file_size - file.tell():
                raise ContentError("the header of an array claims a size that the array does not have")
