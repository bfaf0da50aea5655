"""The folder that `torch.compile` keeps its results in: the user's own, with a digest of every file, or a temporary one.

By default torch keeps libraries, and pickles, in a folder of a predictable name below the system's temporary folder, and runs what
it finds there, whoever put it there. Ours is `icl/torch-<version>` in the user's cache ($XDG_CACHE_HOME, `~/.cache`), or in a
$TORCHINDUCTOR_CACHE_DIR that the user has set. Only the user may write in it. `digests.json` holds the SHA-256 of every file. The
first process that uses the folder removes what is damaged, or was never noted because its writer died, so it is compiled again.
Where there can be no such folder, a temporary one serves this process alone.
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

from icl.file_system import LockedError, lock_file

_DIGESTS = "digests.json"
_LOCK = ".lock"
_IN_USE = threading.RLock()
_CHUNK = 2**20

_folder: Path | None = None
"""The folder that this process uses."""
_held: Any = None
"""The open file by whose shared lock other processes see that the folder is in use."""


class UnusableError(Exception):
    """A folder that cannot serve as the cache; the message says why."""


def use_private_cache() -> Path:
    """Lead torch's compiler to a folder that nobody else can write in, once per process; returns the folder."""
    global _folder, _held
    with _IN_USE:
        if _folder is None:
            wanted = cache_folder()
            try:
                _held = take(wanted)
                _folder = wanted
            except (UnusableError, OSError) as error:
                reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
                _say(f"what torch.compile makes is not kept for the next start: {wanted}: {reason}.")
                _folder = _temporary_folder()
            _lead_torch_to(_folder)
            atexit.register(note_compiled)
        return _folder


def start_afresh() -> bool:
    """Go on in an empty temporary folder; False, and nothing happens, if this process has one already."""
    global _folder, _held
    from torch._inductor.utils import clear_caches

    with _IN_USE:
        if _folder is None or _held is None:
            return False
        _held.close()
        _held, _folder = None, _temporary_folder()
        _lead_torch_to(_folder)
        clear_caches()  # of this process, which name files of the folder before
        return True


def note_compiled() -> None:
    """Write down the digests of the files that are new, so that the next start takes them for whole."""
    with _IN_USE, contextlib.suppress(OSError):
        if _folder is None or _held is None:
            return
        with (_folder / ".noting").open("a") as file:
            lock_file(file.fileno(), _folder, wait=True)
            noted = _read_digests(_folder)
            found = _files(_folder)
            added = {name: _digest(_folder / name) for name in found if name not in noted}
            kept = {name: digest for name, digest in noted.items() if name in found}
            if added or len(kept) < len(noted):
                _write_digests(_folder, kept | added)


def cache_folder() -> Path:
    """Path of the folder of this version of torch, in the cache that the environment names, or else in the user's."""
    name = f"torch-{torch.__version__}-python-{platform.python_version()}"
    given = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if given and Path(given).absolute() != _torch_default():
        path = Path(os.path.expanduser(given)).absolute()  # noqa: PTH111 (`Path` fails where there is no home)
        return path if path.name == name else path / name
    base = os.environ.get("XDG_CACHE_HOME") or ""
    if not Path(base).is_absolute():
        base = os.path.expanduser("~/.cache")  # noqa: PTH111
    return Path(base) / "icl" / name


def take(folder: Path) -> Any:
    """Make the folder if need be, see that it is the user's own and undamaged, and say that it is in use.

    Returns:
        An open file, which holds a shared lock until it is closed.

    Raises:
        UnusableError: If it is not the user's own, cannot be locked, or is damaged while another process uses it.
        OSError: If it cannot be made or read.
    """
    if not folder.is_absolute():
        raise UnusableError("there is no home folder, and XDG_CACHE_HOME is not set")
    _make(folder)
    require_private(folder)
    file = (folder / _LOCK).open("a")
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
    """Refuse a folder that somebody else owns, may write in, or could replace.

    Raises:
        UnusableError: Naming the folder and what is wrong with it.
    """
    own = os.getuid()
    place = folder.resolve()
    for path in (place, *place.parents):
        about = path.stat()
        mode = about.st_mode
        if about.st_uid != own and (path == place or about.st_uid != 0):
            raise UnusableError(
                f"{path} belongs to another user; remove it, or set XDG_CACHE_HOME to a folder of your own"
            )
        is_sticky = bool(mode & stat.S_ISVTX) and path != place  # others cannot replace what is in it
        is_group_open = bool(mode & stat.S_IWGRP) and (path == place or about.st_gid not in (0, os.getgid()))
        if not is_sticky and (mode & stat.S_IWOTH or is_group_open):
            raise UnusableError(
                f"other users may write in {path}; remove it, or take that right from them and empty it"
            )


def damaged(folder: Path) -> list[str]:
    """List the files that are not as they were noted; what is not noted yet may still be in the making."""
    noted = _read_digests(folder)
    return [name for name in _files(folder) if name in noted and _digest(folder / name) != noted[name]]


def _remove_damaged(folder: Path) -> None:
    """Remove every file that is not as it was noted, or was not noted: nobody is making one now."""
    noted = _read_digests(folder)
    for name in _files(folder):
        if noted.get(name) != _digest(folder / name):
            (folder / name).unlink()


def _files(folder: Path) -> list[str]:
    """List what torch has put into the folder, but for its locks."""
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
    """Read the digests; none if they are damaged themselves, so that everything is compiled again."""
    try:
        noted = json.loads((folder / _DIGESTS).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return {str(name): str(digest) for name, digest in noted.items()} if isinstance(noted, dict) else {}


def _write_digests(folder: Path, digests: dict[str, str]) -> None:
    temporary = folder / f".{_DIGESTS}-{os.getpid()}"
    temporary.write_text(json.dumps(digests, indent=0), encoding="utf-8")
    temporary.replace(folder / _DIGESTS)


def _make(folder: Path) -> None:
    """Make a folder, and those above it, for the user alone."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(mode=0o700, exist_ok=True)


def _temporary_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="icl-torch-"))  # for the user alone
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _lead_torch_to(folder: Path) -> None:
    """Let torch and Triton use the folder for everything, whether they have been imported already or not."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
    from torch._inductor import codecache
    from torch._inductor.runtime import runtime_utils

    # Some paths are fixed when torch is imported, or are not asked of the environment: those of precompiled headers.
    headers = folder / "precompiled_headers"
    vars(codecache).update(_HEADER_DIR=str(headers), _HEADER_LOCK_DIR=str(headers / "locks"))
    for module in (codecache, runtime_utils, sys.modules.get("torch._inductor.runtime.cache_dir_utils")):
        if module is not None:
            vars(module).update(default_cache_dir=lambda: str(folder))


def _torch_default() -> Path:
    """Path of the folder that torch would choose; it sets its variable to it when it is imported."""
    from torch._inductor.runtime.runtime_utils import default_cache_dir

    return Path(default_cache_dir()).absolute()


def _say(sentence: str) -> None:
    print(f"icl: {sentence}", file=sys.stderr)
