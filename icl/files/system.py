"""Operations that a file system may refuse: file locks, hard links, and flushing a folder to disk.

Lustre may be mounted without locks, FAT and many network file systems have no hard links, and some file systems cannot flush a folder.
`icl` also runs on such file systems, and warns once about the risks. When the first operation is refused, `icl` tries all three
operations, so that one warning names every operation that is not supported.
"""

import contextlib
import errno
import fcntl
import os
import secrets
import sys
from collections.abc import Callable
from pathlib import Path

_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
"""`errno` codes with which `flock` fails if another process holds the lock. On network file systems, the code is EACCES."""
_CANNOT_SYNC = (
    errno.EINVAL,
    errno.EBADF,
    errno.EACCES,
    errno.EPERM,
    errno.EISDIR,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.ENOSYS,
    errno.ENOTTY,
    errno.EROFS,
)
"""`errno` codes which mean that a file system cannot flush to disk. Any other code, such as EIO or ENOSPC, is a disk failure."""
_WARNED: set[int] = set()
"""Device numbers of the file systems about which we have warned."""


class LockedError(Exception):
    """Raised if another process holds the lock."""


def lock_file(descriptor: int, folder: Path, *, shared: bool = False, wait: bool = False) -> bool:
    """Lock an open file until it is closed. Return False if the file system does not support locks.

    Args:
        descriptor: The file's descriptor.
        folder: The file's folder, for the warning.
        shared: Whether other processes may hold a shared lock at the same time.
        wait: Whether to wait until other processes have released the lock.

    Raises:
        LockedError: If another process holds the lock and `wait` is false.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(descriptor, kind if wait else kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD and not wait:
            raise LockedError from None
        warn_of_limits(folder, error)
        return False
    return True


def sync_file(descriptor: int, folder: Path) -> None:
    """Wait until a file's bytes are on disk. If the file system does not support this, print a warning.

    Raises:
        OSError: If the disk failed or is full.
    """
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise
        warn_of_limits(folder, error)


def sync_folder(folder: Path) -> None:
    """Flush a folder, so that renames in it survive a power cut. If the file system does not support this, print a warning.

    Raises:
        OSError: If the disk failed or is full.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise
        warn_of_limits(folder, error)
        return
    try:
        sync_file(descriptor, folder)
    finally:
        os.close(descriptor)


def link_or_create(temporary: Path, path: Path) -> None:
    """Give a complete temporary file its final name by a hard link, or copy it if the file system has no hard links.

    Raises:
        FileExistsError: If a file with the final name exists already.
        OSError: If the file cannot be written.
    """
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        raise
    except OSError as error:
        _create(path, temporary.read_bytes())
        warn_of_limits(path.parent, error)


def warn_of_limits(folder: Path, refusal: OSError) -> None:
    """Warn once for each file system about the operations that it does not support, and about the risks."""
    device = _device(folder)
    if device in _WARNED:
        return
    _WARNED.add(device)
    missing = _missing(folder)
    reason = refusal.strerror or errno.errorcode.get(refusal.errno or 0, "no reason given")
    names = " and ".join(missing) or "an operation of `icl`"
    risks = "; ".join(missing.values()) or "a power cut may undo the last save"
    print(f"icl: warning: the file system of {folder} does not support {names} ({reason}): {risks}.", file=sys.stderr)


def _create(path: Path, data: bytes) -> None:
    """Create a file under its final name and write its bytes. Other processes may see an incomplete file for a moment."""
    with path.open("xb") as file:
        try:
            file.write(data)
            file.flush()
            sync_file(file.fileno(), path.parent)
        except OSError:
            path.unlink(missing_ok=True)
            raise


def _missing(folder: Path) -> dict[str, str]:
    """Return the operations that a folder's file system does not support, each with its risk."""
    first, second = (folder / f".tmp-{secrets.token_hex(4)}-probe" for _ in range(2))
    missing = {}
    try:
        with first.open("wb") as file:
            if not _works(lambda: fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)):
                missing["file locks"] = (
                    "nothing stops two processes from training the same run at once, so start each run once"
                )
            if not _works(lambda: os.fsync(file.fileno())) or not _works(lambda: _sync(folder)):
                missing["flushing to disk"] = "a power cut may undo the last save"
        if not _works(lambda: second.hardlink_to(first)):
            missing["hard links"] = (
                "if the power fails while a run claims its name in a store, the name may become unusable"
            )
    except OSError:  # nothing can be written to this folder; the next write will report this
        pass
    finally:
        for path in (first, second):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
    return missing


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _works(act: Callable[[], object]) -> bool:
    try:
        act()
    except OSError:
        return False
    return True


def _device(folder: Path) -> int:
    try:
        return folder.stat().st_dev
    except OSError:
        return -1
