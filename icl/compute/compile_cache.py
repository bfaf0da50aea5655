"""Private cache of `torch.compile`: a folder that only the user can write to, with a digest of every file.

By default, torch caches libraries and pickles in a folder with a predictable name below the system's temporary folder. Torch executes the
files that it finds there, even if another user wrote them. Instead, we use a folder to which only the user may write. It lies in the
user's cache: `icl/torch-<version>-python-<version>` in $XDG_CACHE_HOME or `~/.cache`. If the user has set $TORCHINDUCTOR_CACHE_DIR, our
folder lies there instead.

`digests.json` contains the SHA-256 of every file. When a process starts, it removes damaged files and files without a digest, unless
another process is using the folder. (A file has no digest if the process that wrote it died.) Removed files are compiled again when they
are needed. If the folder cannot be made or is not private, the process uses a temporary folder.
"""

import atexit
import contextlib
import hashlib
import json
import os
import platform
import shutil
import stat
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch

from icl.files.system import LockedError, lock_file

_DIGESTS = "digests.json"
_LOCK = ".lock"
_IN_USE = threading.RLock()
_CHUNK = 2**20

_folder: Path | None = None
"""Folder that this process uses."""
_held: Any = None
"""Open lock file. It holds a shared lock, which tells other processes that the folder is in use."""


class UnusableError(Exception):
    """Raised if a folder cannot be used as the cache. The message says why."""


def use_private_cache() -> Path:
    """Make torch's compiler use a folder that nobody else can write to, and return this folder. Further calls change nothing."""
    global _folder, _held
    with _IN_USE:
        if _folder is None:
            wanted = cache_folder()
            try:
                _held = take(wanted)
                _folder = wanted
            except (UnusableError, OSError) as error:
                reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
                print(
                    f"icl: results of torch.compile are not kept for the next start, because the cache {wanted} cannot be used: {reason}.",
                    file=sys.stderr,
                )
                _folder = _temporary_folder()
            _make_torch_use(_folder)
            atexit.register(note_compiled)
        return _folder


def start_afresh() -> bool:
    """Switch to an empty temporary folder. Return False, and change nothing, if this process does not use the private cache."""
    global _folder, _held
    from torch._inductor.utils import clear_caches

    with _IN_USE:
        if _folder is None or _held is None:
            return False
        _held.close()
        _held, _folder = None, _temporary_folder()
        _make_torch_use(_folder)
        clear_caches()  # clear the caches in memory, because they refer to files of the previous folder
        return True


def note_compiled() -> None:
    """Add the digests of new files to `digests.json`, so that the next process trusts them."""
    with _IN_USE, contextlib.suppress(OSError):
        if _folder is None or _held is None:
            return
        with open(_folder / ".noting", "a", opener=_open_at_once) as file:
            lock_file(file.fileno(), _folder, wait=True)
            noted = _read_digests(_folder)
            names = _files(_folder)
            added = {name: _digest(_folder / name) for name in names if name not in noted}
            kept = {name: digest for name, digest in noted.items() if name in names}
            if added or len(kept) < len(noted):
                _write_digests(_folder, kept | added)


def cache_folder() -> Path:
    """Return the folder for these versions of torch and Python, in $TORCHINDUCTOR_CACHE_DIR if it is set, else in the user's cache."""
    name = f"torch-{torch.__version__}-python-{platform.python_version()}"
    given = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if given and Path(given).absolute() != _torch_default():
        path = Path(os.path.expanduser(given)).absolute()  # noqa: PTH111 (`Path` fails where there is no home)
        return path if path.name == name else path / name
    base = os.environ.get("XDG_CACHE_HOME") or ""
    if not Path(base).is_absolute():
        base = os.path.expanduser("~/.cache")  # noqa: PTH111
    return Path(base) / "icl" / name


def _open_at_once(path: str, flags: int) -> int:
    """Open a lock file without waiting. If the file is a pipe, raise an error at once instead of waiting for a reader."""
    return os.open(path, flags | os.O_NONBLOCK, 0o600)


def take(folder: Path) -> Any:
    """Make the folder if it does not exist, check that it is private and undamaged, and lock it to mark it as in use.

    Returns:
        An open file, which holds a shared lock until it is closed.

    Raises:
        UnusableError: If others can write to the folder, it cannot be locked, or it is damaged while another process uses it.
        OSError: If the folder cannot be made or read.
    """
    if not folder.is_absolute():
        raise UnusableError("there is no home folder, and XDG_CACHE_HOME is not set")
    # Make the folders one by one, because `parents=True` would apply the mode only to the last one.
    for path in reversed([path for path in (folder, *folder.parents) if not path.exists()]):
        path.mkdir(mode=0o700, exist_ok=True)
    require_private(folder)
    file = open(folder / _LOCK, "a", opener=_open_at_once)  # noqa: SIM115 (`Path.open` takes no opener)
    try:
        try:
            if not lock_file(file.fileno(), folder):
                raise UnusableError("its file system has no locks")
            _remove_damaged(folder)
            lock_file(file.fileno(), folder, shared=True, wait=True)
        except LockedError:
            lock_file(file.fileno(), folder, shared=True, wait=True)
            if damaged(folder):
                raise UnusableError("files in it are damaged, and another process is using it") from None
    except BaseException:
        file.close()
        raise
    return file


def require_private(folder: Path) -> None:
    """Refuse a folder that another user owns, may write to, or could replace.

    Raises:
        UnusableError: If the folder is not private. The message names the folder and the reason.
    """
    user, resolved = os.getuid(), folder.resolve()
    for path in (resolved, *resolved.parents):
        status = path.stat()
        mode = status.st_mode
        if status.st_uid != user and (path == resolved or status.st_uid != 0):
            raise UnusableError(
                f"{path} belongs to another user; remove it, or set XDG_CACHE_HOME to a folder of your own"
            )
        # Others may write to a sticky folder above ours, but cannot replace our folder in it.
        is_sticky = bool(mode & stat.S_ISVTX) and path != resolved
        is_group_open = bool(mode & stat.S_IWGRP) and (path == resolved or status.st_gid not in (0, os.getgid()))
        if not is_sticky and (mode & stat.S_IWOTH or is_group_open):
            raise UnusableError(
                f"other users may write in {path}; remove it, or empty it and remove their permission to write"
            )


def damaged(folder: Path) -> list[str]:
    """List the files that differ from their digests.

    Files without a digest are not listed, because another process may still be writing them.
    """
    noted = _read_digests(folder)
    return [name for name in _files(folder) if name in noted and _digest(folder / name) != noted[name]]


def _remove_damaged(folder: Path) -> None:
    """Remove every file that has no digest or differs from its digest.

    Call this only while no other process uses the folder.
    """
    noted = _read_digests(folder)
    for name in _files(folder):
        if noted.get(name) != _digest(folder / name):
            (folder / name).unlink()


def _files(folder: Path) -> list[str]:
    """List the files that torch has written to the folder, except torch's lock files."""
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return [name for name in names if not (name.startswith(".") or name == _DIGESTS or name.endswith(".lock"))]


def _digest(path: Path) -> str:
    hasher = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while data := file.read(_CHUNK):
                hasher.update(data)
    except FileNotFoundError:
        return "gone"
    return hasher.hexdigest()


def _read_digests(folder: Path) -> dict[str, str]:
    """Read the digests. If `digests.json` is damaged, return no digests, so that everything is compiled again."""
    try:
        noted = json.loads((folder / _DIGESTS).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return {str(name): str(digest) for name, digest in noted.items()} if isinstance(noted, dict) else {}


def _write_digests(folder: Path, digests: dict[str, str]) -> None:
    temporary = folder / f".{_DIGESTS}-{os.getpid()}"
    temporary.write_text(json.dumps(digests, indent=0), encoding="utf-8")
    temporary.replace(folder / _DIGESTS)


def _temporary_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="icl-torch-"))  # `mkdtemp` makes it with mode 0700
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _make_torch_use(folder: Path) -> None:
    """Make torch and Triton use the folder for everything, even if they have been imported before."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
    from torch._inductor import codecache
    from torch._inductor.runtime import runtime_utils

    # Some paths, such as those of precompiled headers, are fixed when torch is imported, or do not depend on the environment.
    headers = folder / "precompiled_headers"
    vars(codecache).update(_HEADER_DIR=str(headers), _HEADER_LOCK_DIR=str(headers / "locks"))
    for module in (codecache, runtime_utils, sys.modules.get("torch._inductor.runtime.cache_dir_utils")):
        if module is not None:
            vars(module).update(default_cache_dir=lambda: str(folder))


def _torch_default() -> Path:
    """Return the folder that torch would choose by default. When torch is imported, it sets TORCHINDUCTOR_CACHE_DIR to this folder."""
    from torch._inductor.runtime.runtime_utils import default_cache_dir

    return Path(default_cache_dir()).absolute()
