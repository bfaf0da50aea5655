"""Arrays in an NPZ file (a zip of numpy's own files), read within bounds and never unpickled.

Headers within such a file can claim a terabyte, and a compressed megabyte can unfold to a gigabyte. So every claim is compared
with the bytes that are there before an array is made. Whoever reads a file of ours that fails here computes its content again.
"""

import math
import zipfile
from pathlib import Path

import numpy as np

from icl.reading import ContentError

_MAX_GROWTH = 2**26
"""Bytes that compressed arrays may unfold to beyond four times the file's size; ours have about a million."""
_MAX_ARRAYS = 1000


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of an NPZ file by name.

    Raises:
        ContentError: If it cannot be read, is damaged, or claims more than it holds.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            _require_bounded(archive, path.stat().st_size)
        with np.load(path, allow_pickle=False) as saved:
            return {name: saved[name] for name in saved.files}
    except Exception as error:  # numpy, zipfile and zlib raise a dozen kinds for a damaged file
        raise ContentError(f"it is damaged ({type(error).__name__})") from None


def _require_bounded(archive: zipfile.ZipFile, size: int) -> None:
    """Refuse an archive whose arrays are larger than what it holds."""
    members = archive.infolist()
    if len(members) > _MAX_ARRAYS or sum(member.file_size for member in members) > _MAX_GROWTH + 4 * size:
        raise ContentError("it unfolds to too much")
    for member in members:
        with archive.open(member) as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file)
            if dtype.hasobject or math.prod(shape) * dtype.itemsize != member.file_size - file.tell():
                raise ContentError("an array is of another size than its header says")
