"""Parts: what an analysis found at one checkpoint, kept so that it is never computed twice.

A part is one file, `results/<analysis>/step-000001465.npz`: rows of the table to come, vectors that the whole run needs
later (for a PCA), and a key: the checkpoint's hash, its predecessor's if that counts, the settings and the version of
the method. A part with another key, or a damaged one, is done again. Nothing in it is ever unpickled.
"""

import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from icl.storage import write_atomically


class Part(NamedTuple):
    """The numbers of one checkpoint."""

    step: int
    digest: str
    rows: list[dict[str, Any]]
    vectors: dict[str, np.ndarray]


def read_part(folder: Path | None, step: int, key: Mapping[str, Any]) -> Part | None:
    """The part of a step if it was made under the same key; None if there is none that can be used."""
    if folder is None:
        return None
    try:
        with np.load(_file(folder, step), allow_pickle=False) as saved:
            about = json.loads(str(saved["about"]))
            vectors = {name.removeprefix("vector/"): saved[name] for name in saved.files if name != "about"}
        is_same = about["key"] == json.loads(json.dumps(key))
        return Part(step, about["key"]["checkpoint_hash"], about["rows"], vectors) if is_same else None
    except (OSError, ValueError, LookupError, TypeError, EOFError, zipfile.BadZipFile):
        return None


def write_part(folder: Path | None, part: Part, key: Mapping[str, Any]) -> None:
    """Keep a part under its key, atomically.

    Raises:
        StorageError: If it cannot be written.
    """
    if folder is None:
        return
    buffer = io.BytesIO()
    about = np.array(json.dumps({"key": dict(key), "rows": part.rows}))
    arrays: dict[str, Any] = {f"vector/{name}": vector for name, vector in part.vectors.items()}
    np.savez(buffer, about=about, **arrays)
    write_atomically(_file(folder, part.step), buffer.getvalue())


def _file(folder: Path, step: int) -> Path:
    return folder / f"step-{step:09d}.npz"
