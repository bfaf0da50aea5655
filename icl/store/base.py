"""Stores that map keys to bytes. All stores have one small interface, `Store`: write, read, list and delete whole values.

A key is a relative path with forward slashes that stays inside its store. `require_key` refuses any other key. The local store
follows no symbolic link that leads out of its root, although the root itself may be a link.

A value is either complete or absent. The local store writes a temporary file in the folder of the final file, flushes it to disk and
then renames it. If the process is killed before the renaming, only the temporary file is left. Listings do not show temporary files.
`icl.store.opening` opens a store by its path or URL. It imports boto3 only for a bucket.
"""

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from icl.files.reading import MAX_SMALL_FILE, ContentError, read_bytes
from icl.files.system import link_or_create
from icl.files.writing import StorageError, is_temporary, temporary_path, write_atomically

_NOT_PLAIN = re.compile(r"[\\\x00-\x1f\x7f\ud800-\udfff]|^[A-Za-z]:")
"""Pattern of text that no key may contain: backslashes, control characters, halves of surrogate pairs, or a drive letter at the start."""


class DamagedError(StorageError):
    """Raised if a stored value differs from the value that was written."""


class MissingKeyError(StorageError):
    """Raised if a key has no value."""


@runtime_checkable
class Store(Protocol):
    """A store that maps keys to bytes. `str(store)` is the store's address."""

    files_per_write: int
    """Largest number of files that `write_many` writes at once. If this is 1, `write_many` is no faster than several calls of `write`."""

    def read(self, key: str, *, limit: int | None = None) -> bytes:
        """Return the value of a key. If a digest was saved with the value, check that the value matches it.

        Raise MissingKeyError if the key has no value, and StorageError if the value has more than `limit` bytes.
        """

    def digest(self, key: str) -> str:
        """Return the SHA-256 of the value that was written, in hex. Raise MissingKeyError if the key has no value."""

    def write(self, key: str, data: bytes) -> None:
        """Set the value of a key, completely or not at all."""

    def write_many(self, files: Mapping[str, bytes], *, delete: Sequence[str] = ()) -> None:
        """Set the values of several keys, and delete others, in as few writes as the store allows."""

    def create(self, key: str, data: bytes) -> bool:
        """Set the value of a key only if the key has no value (atomic). Return whether the value was set."""

    def keys(self, prefix: str = "") -> list[str]:
        """Return every key below the folder `prefix`, sorted."""

    def delete(self, key: str) -> None:
        """Remove a key. A missing key is not an error."""

    def is_resting(self) -> bool:
        """Return whether a run in training should delay its next write, because the store limits the number of writes."""

    def check(self) -> None:
        """Raise StorageError if the store cannot be used."""


class OneByOne:
    """Methods for stores that write files one by one."""

    files_per_write = 1

    def write_many(self: Any, files: Mapping[str, bytes], *, delete: Sequence[str] = ()) -> None:
        """Delete some keys, and then set the values of others in order. If one write fails, the values written before it stay."""
        for key in delete:
            self.delete(key)
        for key, data in files.items():
            self.write(key, data)

    def is_resting(self) -> bool:
        """Return False, because the number of writes is not limited."""
        return False


class LocalStore(OneByOne):
    """A store in a folder. The first write makes the folder."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def __str__(self) -> str:
        return str(self.root)

    def read(self, key: str, *, limit: int | None = None) -> bytes:
        """Return the value of a key.

        Raises:
            MissingKeyError: If there is no such file.
            StorageError: If the file cannot be read, has more than `limit` bytes, or can be reached only through a symbolic link that
                leads out of the folder.
        """
        path = self._path(key)
        self._require_inside(path)
        try:
            return read_bytes(path, limit=limit)
        except ContentError as error:
            raise StorageError(f"Cannot read {self.root / key}: {error}.") from None
        except FileNotFoundError:
            raise MissingKeyError(f"There is no file {self.root / key}.") from None
        except OSError as error:
            raise StorageError(f"Cannot read {self.root / key}: {error.strerror}.") from None

    def digest(self, key: str) -> str:
        """Return the SHA-256 of a value, in hex.

        Raises:
            StorageError: If there is no such file, or it cannot be read.
        """
        return sha256(self.read(key))

    def write(self, key: str, data: bytes) -> None:
        """Set the value of a key, atomically.

        Raises:
            StorageError: If the disk is full or the folder cannot be written. The old value is then unchanged.
        """
        write_atomically(self._path(key), data)

    def create(self, key: str, data: bytes) -> bool:
        """Set the value of a key only if the key has no value. Return whether the value was set.

        If several processes try this at the same time, only one succeeds.

        Raises:
            StorageError: If the disk is full or the folder cannot be written.
        """
        path = self._path(key)
        temporary = temporary_path(path)
        write_atomically(temporary, data)
        try:
            link_or_create(temporary, path)
        except FileExistsError:
            return False
        except OSError as error:
            raise StorageError(f"Cannot write {path}: {error.strerror}.") from None
        finally:
            temporary.unlink()
        return True

    def keys(self, prefix: str = "") -> list[str]:
        """Return every key below the folder `prefix`, sorted, without temporary files and without links that lead out of the folder."""
        folder = self.root / prefix
        if not self._is_inside(folder):
            return []
        files = (path for path in folder.rglob("*") if path.is_file())
        kept = (path for path in files if not is_temporary(path) and self._holds(path))
        return sorted(path.relative_to(self.root).as_posix() for path in kept)

    def links_out(self) -> list[str]:
        """Return the keys of all symbolic links that lead out of the folder, sorted."""
        links = (path for path in self.root.rglob("*") if not self._holds(path))
        return sorted(path.relative_to(self.root).as_posix() for path in links)

    def pipes(self) -> list[str]:
        """Return the keys of all pipes and other entries that are neither files, folders nor symbolic links, sorted."""
        others = (path for path in self.root.rglob("*") if not (path.is_file() or path.is_dir() or path.is_symlink()))
        return sorted(path.relative_to(self.root).as_posix() for path in others)

    def delete(self, key: str) -> None:
        """Remove a key. A missing key is not an error.

        Raises:
            StorageError: If the file cannot be removed.
        """
        try:
            self._path(key).unlink(missing_ok=True)
        except StorageError:
            raise
        except OSError as error:
            raise StorageError(f"Cannot remove {self.root / key}: {error.strerror}.") from None

    def check(self) -> None:
        """Make the folder if it is missing, and check that it can be written.

        Raises:
            StorageError: If the folder cannot be made or written to.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"The store {self.root} cannot be made: {error.strerror}.") from None
        if not os.access(self.root, os.W_OK | os.X_OK):
            raise StorageError(
                f"The store {self.root} cannot be written to; change its permissions or choose another store."
            )

    def _path(self, key: str) -> Path:
        """Return the path of a key. The folder of this path must be inside the root.

        Raises:
            StorageError: If the key is not a plain relative name, or one of the key's folders is a link out of the root.
        """
        require_key(key, self)
        path = self.root / key
        self._require_inside(path.parent)
        return path

    def _holds(self, path: Path) -> bool:
        """Return False for a link that leads out of the root, and True for any other path below the root."""
        return not path.is_symlink() or self._is_inside(path)

    def _require_inside(self, path: Path) -> None:
        if not self._is_inside(path):
            raise StorageError(
                f"{path} leads out of {self.root} through a symbolic link, which is not followed. Replace the link with its target."
            )

    def _is_inside(self, path: Path) -> bool:
        """Return whether a path lies inside the root after all links are followed."""
        try:
            target = path.resolve()
        except (OSError, RuntimeError):  # before Python 3.13, a link to itself raises RuntimeError
            return False
        is_loop = os.path.islink(target)  # noqa: PTH114 (`Path` fails at a name that is too long)
        return target.is_relative_to(self.root.resolve()) and not is_loop


def require_key(key: str, store: object) -> None:
    """Refuse a key that is not a plain relative name with forward slashes.

    Args:
        key: The key.
        store: The store that contains the key. It is named in the message.

    Raises:
        StorageError: If the key could lead out of the store, or is not a valid name on all file systems.
    """
    is_plain = not _NOT_PLAIN.search(key) and all(part not in ("", ".", "..") for part in key.split("/"))
    if not is_plain:
        raise StorageError(
            f"{store} has a file named {key!r}. `icl` does not use it, because this name could lead out of the store. "
            "Remove or rename the file in the store."
        )


def read_or_none(store: Store, key: str) -> bytes | None:
    """Return the bytes of a small file that describes a run, or None if there is no such file.

    Raises:
        StorageError: If the file is damaged or too large, or the store cannot be used.
    """
    try:
        return store.read(key, limit=MAX_SMALL_FILE)
    except MissingKeyError:
        return None


def sha256(data: bytes) -> str:
    """Return the SHA-256 of some bytes, in hex. Stores compare values by this digest."""
    return hashlib.sha256(data).hexdigest()
