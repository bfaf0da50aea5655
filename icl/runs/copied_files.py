"""The files of a run that its copy in a store has, and the order in which they are copied.

`last.ckpt` and `status.json` vouch for the files beside them and so come after them; `config.yaml`, which makes a folder a run,
comes last of all.
"""

from collections.abc import Sequence
from pathlib import PurePosixPath

from icl.files.reading import MAX_SMALL_FILE, MAX_TABLE
from icl.files.writing import StorageError, is_temporary
from icl.runs.checkpoints import parse_checkpoint
from icl.runs.resume_file import parse_resume
from icl.store.base import LocalStore, Store, require_key

CHECKPOINT_FOLDERS = ("checkpoints", "checkpoints/moments")
"""Folders of the weights, and of Adam's moments where they are saved."""
VOUCHERS = ("last.ckpt", "status.json")
"""Files that describe the others. They are copied after those, the status last."""
LAST = (*VOUCHERS, "config.yaml")
"""Files that are copied one after the other, when all others have arrived."""
NEEDED = ("run-id", "metrics.csv", *LAST)
"""Files without which a run cannot be resumed."""
_FILES = (*NEEDED, "wandb-id", "run.log", "report.html")
_SMALL_FILES = ("run-id", "wandb-id", "status.json", "config.yaml")
_FOLDERS = ("checkpoints", "results", "figures")


def copied_names(store: Store) -> list[str]:
    """List the names in a run's folder, or in its copy, that belong to a copy; those in `LAST` come last.

    Raises:
        StorageError: If one of them could lead out of the run's folder, or the store cannot be used.
    """
    names = list(filter(_is_copied, store.keys()))
    for name in names:
        require_key(name, store)
    _require_one_kind(names, store)
    return sorted(names, key=lambda name: (LAST.index(name) + 1 if name in LAST else 0, name))


def is_checkpoint(name: str) -> bool:
    """Return whether a name in a run's folder is that of a checkpoint, of weights or of moments."""
    folder, _, file = name.rpartition("/")
    return folder in CHECKPOINT_FOLDERS and file.startswith("step-")


def size_limit(name: str) -> int | None:
    """Return the maximum number of bytes that are read of a file of a run; None for weights, records and pictures.

    A stranger's folder or bucket may hold a `status.json` that fills the memory.
    """
    if name in _SMALL_FILES:
        return MAX_SMALL_FILE
    return MAX_TABLE if PurePosixPath(name).suffix in (".csv", ".json") else None


def require_whole(name: str, data: bytes, where: str) -> None:
    """Refuse a damaged checkpoint or resume file, which carry digests of their own.

    Raises:
        CheckpointError, ResumeFileError: Saying what is wrong.
    """
    if is_checkpoint(name):
        parse_checkpoint(data, where)
    elif name == "last.ckpt":
        parse_resume(data, where)


def require_no_links_out(*stores: Store) -> None:
    """Refuse to copy from or to a folder that holds a link out of it: what lies behind is not the run's.

    Raises:
        StorageError: Naming the first such link.
    """
    for store in stores:
        links = list(filter(_is_copied, store.links_out())) if isinstance(store, LocalStore) else []
        if links:
            raise StorageError(
                f"{store}/{links[0]} is a symbolic link out of the run's folder, so nothing was copied; "
                "put what it leads to in its place, or remove it."
            )


def _is_copied(name: str) -> bool:
    return (name in _FILES or name.partition("/")[0] in _FOLDERS) and not is_temporary(PurePosixPath(name))


def _require_one_kind(names: Sequence[str], store: Store) -> None:
    """Refuse a name that is a file's and a folder's at once: a bucket may have both, a folder cannot."""
    folders = {parent.as_posix() for name in names for parent in PurePosixPath(name).parents}
    both = next((name for name in names if name in folders), None)
    if both is not None:
        raise StorageError(
            f"{store} has a file by the name {both!r} and files below {both + '/'!r}, which no folder can hold, so nothing "
            "is done with it; remove one of them there."
        )
