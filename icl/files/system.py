"""Operations that a file system may refuse: file locks, hard links, and flushing a folder to disk.

Lustre may be mounted without locks, FAT and many network file systems know no hard links, and some cannot flush a folder.
`icl` runs on such a file system, and says once what is not protected there. The first refusal tries all three, so that one
sentence tells everything.
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
"""Errors of `flock` if another process holds the lock; the last one where the lock goes over a network."""
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
"""Errors where flushing is not possible. Any other error, such as EIO or ENOSPC, is a failure of the disk."""
_WARNED: set[int] = set()
"""Devices that the warning was given for."""


class LockedError(Exception):
    """Another process holds the lock."""


def lock_file(descriptor: int, folder: Path, *, shared: bool = False, wait: bool = False) -> bool:
    """Lock an open file until it is closed; False if its file system has no locks.

    Args:
        descriptor: The file.
        folder: Where it lies, for the warning.
        shared: Whether others may hold the lock too, if they ask for it in the same way.
        wait: Whether to wait for another process that holds it.

    Raises:
        LockedError: If another process holds it.
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
    """Wait until the disk has a file's bytes, where the file system can tell.

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
    """Make renames in a folder survive a power cut, where the file system can.

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
    """Give a finished file its name, which no other file may have; a copy is made where there are no hard links.

    Raises:
        FileExistsError: If the name is taken.
        OSError: If it cannot be written.
    """
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        raise
    except OSError as error:
        _create(path, temporary.read_bytes())
        warn_of_limits(path.parent, error)


def warn_of_limits(folder: Path, refusal: OSError) -> None:
    """Say, once for each file system, what it refuses and what is not protected therefore."""
    device = _device(folder)
    if device in _WARNED:
        return
    _WARNED.add(device)
    missing = _missing(folder)
    reason = refusal.strerror or errno.errorcode.get(refusal.errno or 0, "no reason given")
    names = " and ".join(missing) or "an operation"
    risks = "; ".join(missing.values()) or "a power cut may undo the last save"
    print(f"icl: warning: the file system of {folder} has no {names} ({reason}): {risks}.", file=sys.stderr)


def _create(path: Path, data: bytes) -> None:
    """Write a file that is not there yet; its bytes come a moment after its name."""
    with path.open("xb") as file:
        try:
            file.write(data)
            file.flush()
            sync_file(file.fileno(), path.parent)
        except OSError:
            path.unlink(missing_ok=True)
            raise


def _missing(folder: Path) -> dict[str, str]:
    """Return the operations that a folder does not support, each with what is not protected without it."""
    first, second = (folder / f".tmp-{secrets.token_hex(4)}-probe" for _ in range(2))
    found = {}
    try:
        with first.open("wb") as file:
            if not _works(lambda: fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)):
                found["file locks"] = (
                    "nothing stops two processes from training one run at once, so start each run once"
                )
            if not _works(lambda: os.fsync(file.fileno())) or not _works(lambda: _sync(folder)):
                found["flushing to disk"] = "a power cut may undo the last save"
        if not _works(lambda: second.hardlink_to(first)):
            found["hard links"] = "a power cut while a run takes its place in a store may leave that place unusable"
    except OSError:  # nothing can be written here; whoever needs to will say so
        pass
    finally:
        for path in (first, second):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
    return found


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
