"""Arrays with a description in an NPZ file (a zip of numpy's own files), read within bounds and never unpickled.

Headers within such a file can claim a terabyte, and a compressed megabyte can unfold to a gigabyte. So every claim is compared
with the bytes that are there before an array is made. A digest finds what the zip's checksums do not; files of 0.1.0 have none.
Whoever reads a file that fails here computes its content again.
"""

import hashlib
import io
import json
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from icl.reading import ContentError, parse_json
from icl.storage import write_atomically

_MAX_GROWTH = 2**26
"""Bytes that compressed arrays may unfold to beyond four times the file's size; ours have about a million."""
_MAX_ARRAYS = 1000
_ABOUT, _DIGEST = "about", "digest"


def write_arrays(
    path: Path, about: Mapping[str, Any], arrays: Mapping[str, np.ndarray], *, compress: bool = False
) -> None:
    """Write arrays and their description, atomically.

    Raises:
        StorageError: If the file cannot be written.
    """
    text = json.dumps(about)
    content = {_ABOUT: np.array(text), _DIGEST: np.array(_digest(text, arrays)), **arrays}
    buffer = io.BytesIO()
    (np.savez_compressed if compress else np.savez)(buffer, **content)  # type: ignore[arg-type]
    write_atomically(path, buffer.getvalue())


def read_arrays(path: Path, *, needs_digest: bool = True) -> tuple[Any, dict[str, np.ndarray]]:
    """Return the description in a file, and its arrays by name.

    Args:
        path: The file.
        needs_digest: Whether to refuse a file of 0.1.0, whose content only its reader can check.

    Raises:
        ContentError: If it cannot be read, is damaged, or claims more than it holds.
    """
    arrays = _read(path)
    text, digest = (str(arrays.pop(name)) if name in arrays else None for name in (_ABOUT, _DIGEST))
    is_checked = digest == _digest(text, arrays) if text is not None and digest is not None else not needs_digest
    if text is None or not is_checked:
        raise ContentError("its content does not match its digest")
    return parse_json(text), arrays


def _digest(text: str, arrays: Mapping[str, np.ndarray]) -> str:
    hasher = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16)
    for name, array in sorted(arrays.items()):
        hasher.update(f"{name} {array.dtype.str} {array.shape}".encode())
        hasher.update(np.ascontiguousarray(array).tobytes())
    return hasher.hexdigest()


def _read(path: Path) -> dict[str, np.ndarray]:
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
