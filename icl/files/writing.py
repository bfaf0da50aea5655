"""Write files completely or not at all, and check beforehand whether a file or table can be written."""

import contextlib
import errno
import math
import os
import secrets
import stat
import tempfile
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from icl.config.validation import UserError
from icl.files.system import sync_file, sync_folder

if TYPE_CHECKING:
    import pandas as pd


_TEMPORARY = ".tmp-"


class StorageError(UserError, OSError):
    """Raised if a file or a store cannot be read or written. The message names the file or store, and says what to do."""


def write_atomically(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write `data` to `path` so that a reader sees either all old bytes or all new bytes, even after a power cut.

    Args:
        path: The file. Missing folders are made.
        data: All bytes of the file.
        durable: Whether to wait until the bytes are on disk. If False, a power cut may bring the old bytes back.

    Raises:
        StorageError: If the file cannot be written. The message says why, and the old file is unchanged.
    """
    temporary = temporary_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            if durable:
                sync_file(file.fileno(), path.parent)
        temporary.replace(path)
        if durable:
            sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):  # if the name is too long, removing the file fails too
            temporary.unlink(missing_ok=True)
        raise StorageError(
            f"Cannot write {path}: {error.strerror}. Earlier saves are intact; {repair(error)}, "
            "then run the same command again."
        ) from None


def repair(error: OSError) -> str:
    """Return a short phrase that says how to repair a failed write."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "free space or choose another folder with LOCAL_ROOT"
    if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
        return "a file and a folder cannot have the same name, so rename or remove one of them"
    if error.errno == errno.ENAMETOOLONG:
        return "choose shorter names"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "get the right to write in its folder or choose another folder with LOCAL_ROOT"
    return "check the disk or choose another folder with LOCAL_ROOT"


def table_format(path: Path) -> str:
    """Return the format of a table's file, `csv` or `json`, from its suffix.

    Raises:
        StorageError: If the file has another suffix.
    """
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".json"):
        raise StorageError(f"A table's file must have the suffix .csv or .json, got {path}.")
    return suffix[1:]


def require_table_file(path: Path) -> None:
    """Refuse a file to which a table cannot be written. Call this function before the table is computed.

    Raises:
        StorageError: If the file's suffix is neither .csv nor .json, or the file cannot be written.
    """
    table_format(path)
    require_writable(path)


def require_writable(path: Path) -> None:
    """Refuse a file that cannot be written. The file's folder may be missing, because writing makes the folder.

    Raises:
        StorageError: If the path is a folder, or if the file's folder cannot be made or written to.
    """
    try:
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISDIR(path.stat().st_mode):
                raise StorageError(f"{path} is a folder; name a file in it.")
        folder = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
        with tempfile.TemporaryFile(dir=folder):
            pass
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(
            f"{path} cannot be written: {error.strerror}. Name a file in a folder in which you may write."
        ) from None


def plain_rows(table: "pd.DataFrame") -> list[dict[str, Any]]:
    """Return the rows of a table for JSON. Numbers that are not finite become null."""
    rows = table.to_dict("records")
    return [
        {
            str(key): None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in row.items()
        }
        for row in rows
    ]


def temporary_path(path: Path) -> Path:
    """Return a new path in the folder of `path`, for a file that gets its final name once it is complete.

    Stores do not list temporary files (`icl.store.base`).
    """
    return path.with_name(f"{_TEMPORARY}{secrets.token_hex(4)}-{path.name[-50:]}")  # a name has at most 255 bytes


def is_temporary(path: PurePath) -> bool:
    """Return whether a file is the temporary file of an unfinished write."""
    return path.name.startswith(_TEMPORARY)


def remove_temporaries(folder: Path) -> None:
    """Delete the temporary files that interrupted writes left in a folder, but not in its subfolders."""
    for path in folder.glob(f"{_TEMPORARY}*"):
        path.unlink(missing_ok=True)
