"""Parts: what an analysis found at one checkpoint, kept so that it is never computed twice.

A part is one file, `results/<analysis>/step-000001465.npz`: rows of the table to come, vectors that the whole run needs
later (for a PCA), and a key: the checkpoint's hash, its predecessor's if that counts, the settings and the version of
the method. A part with another key, or a damaged one, is done again. Nothing in it is ever unpickled. A vector can be
read a stretch at a time, so what all checkpoints have together need not fit in memory.
"""

import json
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from icl.array_files import read_arrays, write_arrays
from icl.reading import ContentError, is_table


class Part(NamedTuple):
    """The numbers of one checkpoint."""

    step: int
    digest: str
    rows: list[dict[str, Any]]
    vectors: dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class StoredVector:
    """Numbers in the middle of a file, read when sliced; no file stays open, as there may be thousands."""

    file: Path
    offset: int
    """Of the first number, in bytes."""
    size: int
    dtype: np.dtype

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(self.size)
        return np.fromfile(self.file, self.dtype, stop - start, offset=self.offset + start * self.dtype.itemsize)


def read_part(folder: Path | None, step: int, key: Mapping[str, Any]) -> Part | None:
    """The part of a step if it was made under the same key; None if there is none that can be used."""
    if folder is None:
        return None
    try:
        about, arrays = read_arrays(_file(folder, step))
        if about["key"] != json.loads(json.dumps(key)) or not is_table(about["rows"]):
            return None
    except (ContentError, LookupError, TypeError):
        return None
    vectors = {name.removeprefix("vector/"): vector for name, vector in arrays.items()}
    return Part(step, about["key"]["checkpoint_hash"], about["rows"], vectors)


def write_part(folder: Path | None, part: Part, key: Mapping[str, Any]) -> None:
    """Keep a part under its key, atomically.

    Raises:
        StorageError: If it cannot be written.
    """
    if folder is None:
        return
    vectors = {f"vector/{name}": vector for name, vector in part.vectors.items()}
    write_arrays(_file(folder, part.step), {"key": dict(key), "rows": part.rows}, vectors)


def stored_vector(folder: Path, step: int, name: str) -> StoredVector:
    """A vector of a part, left where it is: `np.savez` stores it as it is in memory, behind two headers.

    Raises:
        OSError: If the part is gone.
        KeyError: If it has no vector of that name.
    """
    file = _file(folder, step)
    with zipfile.ZipFile(file) as archive, file.open("rb") as raw:
        info = archive.getinfo(f"vector/{name}.npy")
        with archive.open(info) as member:
            np.lib.format.read_magic(member)
            shape, _, dtype = np.lib.format.read_array_header_1_0(member)
            before_numbers = member.tell()
        raw.seek(info.header_offset + 26)
        before_member = 30 + sum(struct.unpack("<HH", raw.read(4)))
    offset = info.header_offset + before_member + before_numbers
    return StoredVector(file=file, offset=offset, size=int(np.prod(shape)), dtype=dtype)


def _file(folder: Path, step: int) -> Path:
    return folder / f"step-{step:09d}.npz"
