"""Copy the files of a run from its folder to a store, or from a store to its folder: several at once, and in a safe order.

`last.ckpt` and `status.json` say up to which step the other files are complete. So these two files are read first and written last.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from tqdm import tqdm

from icl.progress import progress_bar
from icl.runs.checkpoints import CheckpointError
from icl.runs.copied_files import LAST, NEEDED, VOUCHERS, copied_names, read_vouchers, require_whole, size_limit
from icl.store import waiting
from icl.store.base import DamagedError, MissingKeyError, Store

_NUM_WORKERS = 8
_MAX_BATCH = 2**29
"""A batch of files is written as soon as it has more than this number of bytes, so that it does not fill the memory."""
_MAX_ROUNDS = 3
"""Largest number of rounds of copying. There is more than one round if the run is trained or uploaded during the copying."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def transfer(source: Store, target: Store, label: str, force: bool) -> tuple[list[str], list[str]]:
    """Copy the files that differ, or all files if `force` is true. The files in `LAST` are copied after all others.

    If `last.ckpt` or `status.json` changed in the source during the copying, files that have changed are copied again, in at most
    `_MAX_ROUNDS` rounds. The run can be resumed from the target after each round.

    Returns:
        The names of the copied files, and a sentence for each file in the source that is damaged but not needed to resume.

    Raises:
        StorageError, ResumeFileError: If a file that is needed to resume the run cannot be copied.
    """
    copied: dict[str, None] = {}
    damaged: list[str] = []
    for number in range(_MAX_ROUNDS):
        before = [digest_or_none(source, name) for name in VOUCHERS]
        names, damaged = _transfer_once(source, target, read_vouchers(source), label, force and number == 0)
        copied |= dict.fromkeys(names)
        if before == [digest_or_none(source, name) for name in VOUCHERS]:
            break
    return list(copied), sorted(damaged)  # the last round tries every damaged file again


def _transfer_once(
    source: Store, target: Store, vouchers: Mapping[str, bytes | DamagedError], label: str, force: bool
) -> tuple[list[str], list[str]]:
    """Copy the files that differ, or all files if `force` is true. See `transfer`.

    Args:
        source: The folder or copy from which the files are copied.
        target: The folder or copy to which the files are copied.
        vouchers: The content of `last.ckpt` and `status.json`, which was read before the other files.
        label: Text in front of the progress bar.
        force: Whether to copy all files.
    """
    names = [name for name in copied_names(source) if name not in VOUCHERS or name in vouchers]
    damaged: list[str] = []

    def read_source(name: str) -> bytes:
        data = vouchers[name] if name in VOUCHERS else source.read(name, limit=size_limit(name))
        if isinstance(data, DamagedError):
            raise data
        return data

    def read(name: str) -> bytes | None:
        if not force and same_file(source, target, name):
            return None
        try:
            data = read_source(name)
            require_whole(name, data, f"{source}/{name}")
        except (DamagedError, CheckpointError) as error:
            if name in NEEDED:
                raise
            damaged.append(str(error))
            return None
        except MissingKeyError:  # training deletes former best checkpoints
            if name in NEEDED:
                raise
            return None
        return data

    def copy(name: str) -> str | None:
        data = read(name)
        if data is not None:
            target.write(name, data)
        return None if data is None else name

    with progress_bar(label, len(names), "file") as bar:
        if target.files_per_write > 1:
            return _write_in_batches(names, read, target, bar), damaged
        copied = in_parallel(copy, [name for name in names if name not in LAST], bar)
        copied += _counted(map(copy, (name for name in names if name in LAST)), bar)
    return [name for name in copied if name], damaged


def _write_in_batches(names: Sequence[str], read: Callable[[str], bytes | None], target: Store, bar: tqdm) -> list[str]:
    """Write files in the order of `names`, many at once. Return the names of the files that had to be written."""
    batch: dict[str, bytes] = {}
    written: list[str] = []
    for index, name in enumerate(names):
        data = read(name)
        if data is not None:
            batch[name] = data
        is_full = len(batch) == target.files_per_write or sum(map(len, batch.values())) > _MAX_BATCH
        if batch and (is_full or index == len(names) - 1):
            target.write_many(batch)
            written += batch
            batch = {}
        bar.update()
    return written


def in_parallel(act: Callable[[Item], Result], items: Sequence[Item], bar: tqdm) -> list[Result]:
    """Apply a function to all items, several at once, and return the results in the order of the items. The first error is raised."""
    with ThreadPoolExecutor(_NUM_WORKERS) as pool:
        try:
            return _counted(pool.map(act, items), bar)
        except KeyboardInterrupt:
            with waiting.giving_up():  # otherwise a store that does not answer would delay the exit by a minute
                pool.shutdown()
            raise


def _counted(results: Iterable[Result], bar: tqdm) -> list[Result]:
    """Return results as a list, and advance the progress bar for each result."""
    done = []
    for result in results:
        done.append(result)
        bar.update()
    return done


def same_file(source: Store, target: Store, name: str) -> bool:
    """Return whether both stores have a file with this name and the same bytes."""
    digest = digest_or_none(source, name)
    return digest is not None and digest == digest_or_none(target, name)


def digest_or_none(store: Store, name: str) -> str | None:
    """Return the SHA-256 of a file in hex, or None if there is no such file."""
    try:
        return store.digest(name)
    except MissingKeyError:
        return None
