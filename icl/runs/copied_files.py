"""The files of a run that are copied to its store, and the order in which they are copied.

`last.ckpt` and `status.json` say up to which step the other files are complete. So these two files are read before the others and
written after them. The other files in the copy are then at least as new as `last.ckpt`, even if the run is trained or uploaded at the
same time. `config.yaml` marks a folder as a run, so it is copied last.
"""

from collections.abc import Sequence
from pathlib import PurePosixPath

from icl.files.reading import MAX_SMALL_FILE, MAX_TABLE
from icl.files.writing import StorageError, is_temporary
from icl.runs.checkpoints import parse_checkpoint
from icl.runs.resume_file import parse_resume
from icl.store.base import DamagedError, LocalStore, MissingKeyError, Store, require_key

CHECKPOINT_FOLDERS = ("checkpoints", "checkpoints/moments")
"""The folder of the weights, and the folder of Adam's moments, which exists only if the run saves moments."""
VOUCHERS = ("last.ckpt", "status.json")
"""Files that say up to which step the other files are complete. They are copied in this order, after all other files except
`config.yaml`."""
LAST = (*VOUCHERS, "config.yaml")
"""Files that are copied one by one, in this order, after all other files have arrived."""
NEEDED = ("run-id", "metrics.csv", *LAST)
"""Files without which a run cannot be resumed."""
_FILES = (*NEEDED, "wandb-id", "run.log", "report.html", "imported.json")
_SMALL_FILES = ("run-id", "wandb-id", "status.json", "config.yaml")
_FOLDERS = ("checkpoints", "results", "figures")


def copied_names(store: Store) -> list[str]:
    """Return the names of the files to copy from a run's folder, or from its copy in a store. The files in `LAST` come last.

    Raises:
        StorageError: If a file's name could lead out of the run's folder, or the store cannot be used.
    """
    names = list(filter(_is_copied, store.keys()))
    for name in names:
        require_key(name, store)
    _require_one_kind(names, store)
    return sorted(names, key=lambda name: (LAST.index(name) + 1 if name in LAST else 0, name))


def read_vouchers(store: Store) -> dict[str, bytes | DamagedError]:
    """Return the content of the files in `VOUCHERS` that exist. For a damaged file, return the error in place of the content.

    `status.json` is read before `last.ckpt`. Otherwise, if the run ended between the two reads, the status of the ended run would be
    copied together with an earlier `last.ckpt`.

    Raises:
        StorageError: If the store cannot be used.
    """
    contents = {name: _read_voucher(store, name) for name in reversed(VOUCHERS)}
    return {name: content for name, content in contents.items() if content is not None}


def is_checkpoint(name: str) -> bool:
    """Return whether a file in a run's folder has the name of a checkpoint, of either weights or moments."""
    folder, _, file = name.rpartition("/")
    return folder in CHECKPOINT_FOLDERS and file.startswith("step-")


def size_limit(name: str) -> int | None:
    """Return the maximum number of bytes to read from a run's file, or None if its size is not limited.

    Tables, JSON files and small text files have a limit. Without it, a large `status.json` in a folder or bucket from an unknown source
    could fill the memory.
    """
    if name in _SMALL_FILES:
        return MAX_SMALL_FILE
    return MAX_TABLE if PurePosixPath(name).suffix in (".csv", ".json") else None


def require_whole(name: str, data: bytes, where: str) -> None:
    """Refuse a checkpoint or resume file that does not match the digests that it contains.

    Raises:
        CheckpointError, ResumeFileError: If the file is damaged. The message says what is wrong.
    """
    if is_checkpoint(name):
        parse_checkpoint(data, where)
    elif name == "last.ckpt":
        parse_resume(data, where)


def require_no_links_out(*stores: Store) -> None:
    """Refuse to copy a run from or to a folder in which a symbolic link leads out of the folder.

    If a link leads out of the run's folder, its target is not part of the run and must not be copied or replaced.

    Raises:
        StorageError: If a symbolic link leads out of its folder. The message names the first of these links.
    """
    for store in stores:
        links = list(filter(_is_copied, store.links_out())) if isinstance(store, LocalStore) else []
        if links:
            raise StorageError(
                f"{store}/{links[0]} is a symbolic link out of the run's folder, so nothing was copied; "
                "replace the link with its target, or remove the link."
            )


def _read_voucher(store: Store, name: str) -> bytes | DamagedError | None:
    try:
        return store.read(name, limit=size_limit(name))
    except MissingKeyError:
        return None
    except DamagedError as error:
        return error


def _is_copied(name: str) -> bool:
    return (name in _FILES or name.partition("/")[0] in _FOLDERS) and not is_temporary(PurePosixPath(name))


def _require_one_kind(names: Sequence[str], store: Store) -> None:
    """Refuse a name that is both a file and a folder. A bucket can have both, but a file system cannot."""
    folders = {parent.as_posix() for name in names for parent in PurePosixPath(name).parents}
    both = next((name for name in names if name in folders), None)
    if both is not None:
        raise StorageError(
            f"{store} has a file named {both!r} and files below {both + '/'!r}. A folder cannot have both, so `icl` "
            f"does not use this store. Remove either {both!r} or the files below {both + '/'!r} from the store."
        )
