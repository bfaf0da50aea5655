"""A store in a model repository of the Hugging Face Hub: `hf://USER/REPO`, `hf://USER/REPO@REVISION`, or a folder in it.

The package `huggingface_hub` sends all requests. It also finds the token (`HF_TOKEN`, or the login of `hf auth login`). Our code never
reads the token, so it cannot log or save the token. The server is `HF_ENDPOINT`, or huggingface.co.

Every change is a commit, and the Hub limits commits to 128 per hour. So `write_many` puts up to `FILES_PER_COMMIT` files into one
commit, which arrives completely or not at all. A commit names its parent commit. If another program has made a commit after this parent,
the Hub refuses our commit. We then try again with the newest commit as the parent, unless the other program changed the folder of this
store. In that case, we raise an error.
"""

import functools
import hashlib
import io
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, hf_hub_download
from huggingface_hub.hf_api import RepoFile

from icl.files.writing import StorageError
from icl.store import waiting
from icl.store.base import DamagedError, MissingKeyError, require_key, sha256
from icl.store.hub_errors import is_conflict, server
from icl.store.hub_repository import COMMIT_SECONDS, Listing, Repository

FILES_PER_COMMIT = 50
"""Largest number of files in one commit. The Hub recommends 50 to 100."""
_MAX_CONFLICTS = 20


class HubStore:
    """The files in a repository, or in one folder of the repository.

    Args:
        repository: The repository and its revision.
        prefix: Folder within the repository; empty means the whole repository.
    """

    files_per_write = FILES_PER_COMMIT

    def __init__(self, repository: Repository, prefix: str = "") -> None:
        self.repository, self.prefix = repository, prefix.strip("/")

    def __str__(self) -> str:
        revision = "" if self.repository.revision == "main" else f"@{self.repository.revision.replace('/', '%2F')}"
        return f"hf://{self.repository.name}{revision}/{self.prefix}".rstrip("/")

    def read(self, key: str, *, limit: int | None = None) -> bytes:
        """Return the value of a key. If the Hub stores the SHA-256 of the value, check that the value matches it.

        Raises:
            MissingKeyError: If the key has no value.
            StorageError: If the value is damaged or has more than `limit` bytes, or the Hub cannot be used.
        """
        commit, file = self._find(key)
        if limit is not None and file.size > limit:
            raise StorageError(f"Cannot read {self}/{key}: it has {file.size:,} bytes, and at most {limit:,} are read.")
        data = self.repository.ask("read", lambda: self._download(file.path, commit), key=file.path)
        digest = _sha256(file)
        if len(data) != file.size or (digest is not None and sha256(data) != digest):
            raise DamagedError(f"{self}/{key} is damaged: its bytes do not match their digest on the Hub.")
        return data

    def digest(self, key: str) -> str:
        """Return the SHA-256 of a value. For a large file, the Hub stores this digest. For a small file, we compute it from the value.

        Raises:
            MissingKeyError: If the key has no value.
            StorageError: If the Hub cannot be used.
        """
        return _sha256(self._find(key)[1]) or sha256(self.read(key))

    def write(self, key: str, data: bytes) -> None:
        """Set the value of a key, in a separate commit.

        Raises:
            StorageError: If the Hub refuses the commit or cannot be used.
        """
        self.write_many({key: data})

    def write_many(self, files: Mapping[str, bytes], *, delete: Sequence[str] = ()) -> None:
        """Set the values of several keys and delete others, in commits of up to `FILES_PER_COMMIT` files.

        Raises:
            StorageError: If the Hub refuses a commit, or another program changed this folder at the same time. Earlier commits remain.
        """
        for key in (*files, *delete):
            require_key(key, self)
        operations: list[Any] = [CommitOperationDelete(path_in_repo=self._path(key)) for key in delete]
        operations += [_addition(self._path(key), data) for key, data in files.items()]
        for start in range(0, len(operations), FILES_PER_COMMIT):
            part = operations[start : start + FILES_PER_COMMIT]
            names = [operation.path_in_repo for operation in part]
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            self._commit(part, f"{names[0]}{more}")

    def create(self, key: str, data: bytes) -> bool:
        """Set the value of a key only if the key has no value. Return whether the value was set.

        If several processes try this at the same time, only one succeeds.
        """
        require_key(key, self)
        with self.repository.lock:
            for _ in range(_MAX_CONFLICTS):
                listing = self.repository.listing(is_new=True)
                if self._path(key) in listing.files:
                    return False
                operation = _addition(self._path(key), data)
                if self._try_commit([operation], self._path(key), listing.commit):
                    return True
        raise StorageError(f"Other programs keep committing to {self}; run the same command again later.")

    def keys(self, prefix: str = "") -> list[str]:
        """Return every key below the folder `prefix`, sorted."""
        root = f"{self.prefix}/" if self.prefix else ""
        below = f"{root}{prefix.strip('/')}/" if prefix else root
        files = self.repository.listing().files
        is_ours = (path for path in files if path.startswith(below) and (self.prefix or path != ".gitattributes"))
        return sorted(path.removeprefix(root) for path in is_ours)

    def delete(self, key: str) -> None:
        """Remove a key, in a separate commit. A missing key is not an error."""
        require_key(key, self)
        if self._path(key) in self.repository.listing().files:
            self.write_many({}, delete=[key])

    def check(self) -> None:
        """Check that the Hub answers. If the repository exists, check that it can be read.

        Raises:
            StorageError: If the Hub cannot be used, or if the repository does not exist and there is no token with which to make it.
        """
        if self.repository.listing(is_new=True).commit is None:
            self.repository.ask("find", self.repository.api.whoami)

    def is_resting(self) -> bool:
        """Return whether the last commit was so recent that a run in training should delay the next commit."""
        return time.monotonic() - self.repository.committed_at < COMMIT_SECONDS

    def _path(self, key: str) -> str:
        return f"{self.prefix}/{key}" if self.prefix else key

    def _find(self, key: str) -> tuple[str | None, RepoFile]:
        """Return the newest commit, and the description of a key's file in this commit."""
        require_key(key, self)
        listing = self.repository.listing()
        file = listing.files.get(self._path(key))
        if file is None:
            raise MissingKeyError(f"There is no file {self}/{key}.")
        return listing.commit, file

    def _download(self, path: str, commit: str | None) -> bytes:
        with tempfile.TemporaryDirectory(prefix="icl-hub-") as folder:
            file = hf_hub_download(
                self.repository.name, path, revision=commit, local_dir=folder, endpoint=self.repository.endpoint
            )
            return Path(file).read_bytes()

    def _commit(self, operations: Sequence[Any], message: str) -> None:
        """Make a commit. If other programs commit at the same time, try again after their commits, unless they changed this folder."""
        with self.repository.lock:
            first = listing = self.repository.listing(is_new=True)
            for _ in range(_MAX_CONFLICTS):
                if self._try_commit(operations, message, listing.commit):
                    return
                listing = self.repository.listing(is_new=True)
                changed = self._changed(first, listing)
                if changed and all(_is_done(operation, listing) for operation in operations):
                    return  # our commit had arrived, but its answer was lost, so the client repeated the commit
                if changed:
                    raise StorageError(
                        f"Another program changed {changed[0]} in {self} at the same time, so this commit was not made. If that program works "
                        "on the same run, stop one of the two programs, and run the same command again."
                    )
        raise StorageError(f"Other programs keep committing to {self}; run the same command again later.")

    def _try_commit(self, operations: Sequence[Any], message: str, parent: str | None) -> bool:
        """Make a commit whose parent is `parent`. Return False if `parent` is no longer the newest commit."""
        try:
            self.repository.ask("write", functools.partial(self.repository.commit, operations, message, parent))
        except StorageError:
            raise
        except Exception as error:
            if not is_conflict(error):
                raise
            time.sleep(random.uniform(0, 0.2))  # so that two programs do not commit at the same moment again
            return False
        return True

    def _changed(self, before: Listing, after: Listing) -> list[str]:
        """Return the paths below this folder that differ between two commits."""
        root = f"{self.prefix}/" if self.prefix else ""
        old, new = (
            {path: file.blob_id for path, file in listing.files.items() if path.startswith(root)}
            for listing in (before, after)
        )
        return sorted(path for path in {*old, *new} if old.get(path) != new.get(path))


_REPOSITORIES: dict[tuple[str, str, str], Repository] = {}
"""Repositories in use, keyed by name, revision and server. Stores of this process that have the same key share one object."""


def open_hub(path: str) -> HubStore:
    """Return the store at an address. `path` is the part of the address after `hf://`."""
    user, _, rest = path.partition("/")
    repository, _, prefix = rest.partition("/")
    repository, _, revision = repository.partition("@")
    key = (f"{user}/{repository}", unquote(revision) or "main", server())
    return HubStore(_REPOSITORIES.setdefault(key, Repository(*key)), prefix)


class _Buffer(io.BytesIO):
    """Bytes of a file to upload. When the client reads some of them, these bytes count as progress of the upload."""

    def read(self, size: int | None = -1, /) -> bytes:
        """Return the next bytes."""
        data = super().read(size)
        waiting.moved(len(data))
        return data


def _addition(path: str, data: bytes) -> CommitOperationAdd:
    """Return the operation that adds a file to a commit.

    We give the file as a buffer, because the client uploads buffers by HTTP and not by Xet, the Hub's other protocol. Xet needs a second
    server besides `HF_ENDPOINT`, ignores our time limits, and is faster only for files of gigabytes.
    """
    return CommitOperationAdd(path, _Buffer(data))


def _is_done(operation: Any, listing: Listing) -> bool:
    """Return whether a listing already shows the result of an operation."""
    file = listing.files.get(operation.path_in_repo)
    if isinstance(operation, CommitOperationDelete) or file is None:
        return isinstance(operation, CommitOperationDelete) and file is None
    with operation.as_file() as content:
        data = content.read()
    blob = hashlib.sha1(
        f"blob {len(data)}\0".encode() + data, usedforsecurity=False
    ).hexdigest()  # Git's name of these bytes
    return sha256(data) == _sha256(file) or blob == file.blob_id


def _sha256(file: RepoFile) -> str | None:
    """Return the digest that the Hub stores for a large file, or None for a small file."""
    return file.lfs.sha256 if file.lfs is not None else None
