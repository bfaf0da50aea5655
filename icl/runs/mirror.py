"""Copy a run to a store, and fetch a run from its copy in a store.

The copy is at `<store>/<run name>/` and has the same layout as the run's folder. Three rules keep the copy consistent:

- *Owner.* A copy belongs to the folder with the same `run-id` (`icl.runs.claims`).
- *Order.* The files that say up to which step the other files are complete are read first and written last (`icl.runs.copied_files`). If
  the copying is interrupted, the same command continues it.
- *Age.* A folder or copy at an earlier step never overwrites one at a later step, unless the user gives `--force`. The step is the step in
  `last.ckpt`, because training resumes from this file. `status.json` may be at a later step, or unreadable after a power cut.
"""

import contextlib
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from icl.config import RunConfig
from icl.config.validation import ConfigError
from icl.files.writing import StorageError
from icl.runs.card import CARD, card_text
from icl.runs.claims import claim
from icl.runs.copied_files import require_no_links_out
from icl.runs.folder import RunError, RunFolder, parse_config, require_same_config
from icl.runs.resume_file import NAMES, ResumeFileError, parse_resume
from icl.runs.status import Status, parse_status
from icl.runs.transfer import same_file, transfer
from icl.store.base import DamagedError, LocalStore, MissingKeyError, Store, read_or_none
from icl.store.opening import open_store


@dataclass(frozen=True)
class Mirror:
    """A run's folder (`here`) and its copy in a store (`there`)."""

    run: RunFolder
    there: Store
    url: str
    """The store's address, as the user wrote it."""

    @property
    def here(self) -> Store:
        """The run's folder, as a store."""
        return self.run.store

    @property
    def checkpoints(self) -> Store:
        """The copy's folder of checkpoints, as a store that can be passed to the functions of `icl.runs.checkpoints`."""
        return open_store(f"{self.there}/checkpoints")


def store_url(config: RunConfig) -> str | None:
    """Return the address of the store for the run's copy, or None if the run has no store.

    The address is the setting `checkpoints.store`, or else the bucket $AWS_BUCKET_NAME.

    Raises:
        ConfigError: If $AWS_BUCKET_NAME is not the name of a bucket.
    """
    bucket = os.environ.get("AWS_BUCKET_NAME")
    if bucket and not re.fullmatch(r"[\w.-]+(/[\w./-]*)?", bucket):
        raise ConfigError(f"`AWS_BUCKET_NAME` must be the name of a bucket, without s3://, got {bucket!r}.")
    return config.checkpoints.store or (f"s3://{bucket}" if bucket else None)


def open_mirror(run: RunFolder, url: str, name: str, *, make: bool = True) -> Mirror:
    """Return a run's folder together with the run's copy at `<url>/<name>`.

    Args:
        run: The run's folder.
        url: The address of the store.
        name: The run's name in the store.
        make: Whether to make the store if it is a folder that does not exist. If False, a missing folder raises a `StorageError`. Commands
            that only read the copy pass False.

    Raises:
        ConfigError: If the copy would be the run's own folder, or inside it.
        StorageError: If the store cannot be used, for example because credentials or the bucket are missing, or the server
            does not answer.
    """
    there = open_store(f"{url.rstrip('/')}/{name}")
    if isinstance(there, LocalStore):
        if there.root.resolve().is_relative_to(run.path.resolve()):
            raise ConfigError(
                f"The copy in the store {url} would be in the run's own folder; choose another folder for the store."
            )
        if not make and not (isinstance(store := open_store(url), LocalStore) and store.root.is_dir()):
            raise StorageError(f"There is no store {url}; `icl checkpoints RUN push --store {url}` makes it.")
    if make or not isinstance(there, LocalStore):
        there.check()
    return Mirror(run, there, url)


def take_up(mirror: Mirror, config: RunConfig) -> bool:
    """Claim the run's copy in the store before training. Fetch the copy if the folder is new or at an earlier step than the copy.

    Returns:
        Whether any file was fetched.

    Raises:
        RunError: If the copy belongs to another run.
        ConfigError: If the run in the store began with other settings.
        StorageError: If the store or the folder cannot be used.
    """
    require_no_links_out(mirror.here, mirror.there)
    theirs = read_config(mirror.there)
    is_new = _is_new(mirror.run)
    if theirs is not None:
        require_same_config(theirs, config, str(mirror.there))
    # If the folder is new and the copy contains settings, the folder claims the copy only after the transfer below, which also fetches
    # `run-id`.
    if not (is_new and theirs is not None):
        claim(mirror.here, mirror.there, config)
    our_step = _step_to_continue_from(mirror.here)
    try:
        if theirs is None or not is_new:
            is_same = same_file(mirror.here, mirror.there, "last.ckpt")
            if is_same or saved_step(mirror.there, skip_damaged=False) <= our_step:
                return False
        copied, damaged = transfer(mirror.there, mirror.here, "pulling", force=False)
    except (DamagedError, ResumeFileError) as error:
        if our_step < 0:  # there is nothing here from which the run could continue
            raise DamagedError(_describe_unusable(mirror, error)) from None
        print(f"icl: {error} The run continues from the files in {mirror.run.path}.", file=sys.stderr)
        return False
    claim(mirror.here, mirror.there, config)
    if damaged:
        print(f"icl: {describe_damaged(mirror, damaged)} The run continues without them.", file=sys.stderr)
    return bool(copied)


def _describe_unusable(mirror: Mirror, error: Exception) -> str:
    """Return the error message for a copy from which the run cannot be resumed."""
    return (
        f"{_bare(str(error))}, so the run cannot be resumed from this copy. If another folder RUN contains the undamaged run, "
        f"`icl checkpoints RUN push --force` repairs the store. Otherwise, delete last.ckpt, metrics.csv and status.json at "
        f"{mirror.there} to train again from step 0."
    )


def pull(mirror: Mirror, *, force: bool = False) -> list[str]:
    """Fetch the files that are missing in the folder or differ from those in the store. Return their names.

    Args:
        mirror: The run's folder and copy.
        force: Whether to fetch all files, even if the folder is at a later step.

    Raises:
        RunError: If the store does not contain the run, or the folder contains another run or is at a later step.
        DamagedError: If files in the store are damaged. All other files were fetched. The folder keeps its old versions of
            the damaged files.
        StorageError: If the store or the folder cannot be used.
    """
    require_no_links_out(mirror.here, mirror.there)
    if read_config(mirror.there) is None:
        raise RunError(f"There is no run at {mirror.there}; `icl checkpoints RUN push` copies a run to the store.")
    is_same_run = read_or_none(mirror.here, "run-id") == read_or_none(mirror.there, "run-id")
    if not _is_new(mirror.run) and not is_same_run:
        raise RunError(
            f"{mirror.there} contains another run, not the one in {mirror.run.path}; to fetch it, first move {mirror.run.path} away."
        )
    _require_not_behind(mirror.there, mirror.here, "pull", force)
    copied, damaged = transfer(mirror.there, mirror.here, "pulling", force)
    if damaged:
        raise DamagedError(f"{describe_damaged(mirror, damaged)} {len(copied):,} other files were fetched.")
    return copied


def push(mirror: Mirror, *, force: bool = False) -> list[str]:
    """Send the files that are missing in the store or differ from those in the folder. Return their names.

    Args:
        mirror: The run's folder and copy.
        force: Whether to send all files, even if the copy is at a later step.

    Raises:
        RunError: If the copy belongs to another run, or is at a later step.
        DamagedError: If files in the folder are damaged. All other files were sent. The store keeps its old versions of the
            damaged files.
        StorageError: If the store or the folder cannot be used.
    """
    require_no_links_out(mirror.here, mirror.there)
    config = mirror.run.read_config()
    _require_not_behind(mirror.here, mirror.there, "push", force)
    claim(mirror.here, mirror.there, config)
    copied, damaged = transfer(mirror.here, mirror.there, "pushing", force)
    write_card(mirror)
    if damaged:
        raise DamagedError(f"{'; '.join(map(_bare, damaged))}; {len(copied):,} other files were sent.")
    return copied


def write_card(mirror: Mirror) -> None:
    """Write the model card of a store on the Hugging Face Hub, with this run's section. Do nothing for other stores.

    Raises:
        StorageError: If the store cannot be used.
    """
    if not mirror.url.lower().startswith("hf://"):
        return
    store = open_store(mirror.url)
    old = read_or_none(store, CARD)
    name = str(mirror.there).removeprefix(str(store)).strip("/")
    try:
        text = (old or b"").decode("utf-8")
    except UnicodeDecodeError:
        raise StorageError(
            f"{store}/{CARD} is not text in UTF-8, so the model card was not changed. All other files have arrived. To update the "
            "card, save this file as UTF-8 and push the run again."
        ) from None
    new = card_text(text, mirror.run, name, str(store))
    if new.encode() != old:
        store.write(CARD, new.encode())


def read_config(store: Store) -> RunConfig | None:
    """Return the settings of the run in a store, or None if there is no run.

    Raises:
        ConfigError: If the settings cannot be read.
        StorageError: If the store cannot be used.
    """
    data = read_or_none(store, "config.yaml")
    return None if data is None else parse_config(data, str(store))


def saved_step(store: Store, *, skip_damaged: bool = True) -> int:
    """Return the step from which a run's folder or copy can be resumed, or -1 if it contains no step.

    This is the step of the first undamaged resume file. If there is no such file, return the step in the status.

    Args:
        store: The run's folder or copy.
        skip_damaged: Whether to ignore damaged resume files. Otherwise, a damaged resume file raises its error.

    Raises:
        DamagedError, ResumeFileError: If a resume file is damaged and `skip_damaged` is false.
        StorageError: If the store cannot be used.
    """
    step = _step_in_resume_file(store, skip_damaged=skip_damaged)
    if step is not None:
        return step
    status = _read_status(store)
    return status.step if status else -1


def _step_to_continue_from(here: Store) -> int:
    """Return the step from which training would continue in a run's folder, or -1 if it would begin again.

    If there is no undamaged resume file, an unfinished run begins again, whatever step its status contains. For a run that has ended, the
    step in its status is returned.
    """
    step = _step_in_resume_file(here, skip_damaged=True)
    if step is not None:
        return step
    status = _read_status(here)
    return status.step if status is not None and status.is_done else -1


def _step_in_resume_file(store: Store, *, skip_damaged: bool) -> int | None:
    for name in NAMES:
        with contextlib.suppress(MissingKeyError, *((DamagedError, ResumeFileError) if skip_damaged else ())):
            return parse_resume(store.read(name), f"{store}/{name}").step
    return None


def _read_status(store: Store) -> Status | None:
    data = read_or_none(store, "status.json")
    return parse_status(data) if data else None


def _is_new(run: RunFolder) -> bool:
    """Return whether a run's folder contains nothing of the run's training yet, so that a copy may be fetched into it."""
    return not any((run.path / name).exists() for name in ("run-id", "config.yaml", "status.json", *NAMES))


def _require_not_behind(source: Store, target: Store, verb: str, force: bool) -> None:
    if force or same_file(source, target, "last.ckpt"):
        return
    ours, theirs = saved_step(source), saved_step(target)
    if theirs > ours:
        other = "pull" if verb == "push" else "push"
        behind = f"is only at step {ours:,}" if ours >= 0 else "has neither a resume file nor a status"
        raise RunError(
            f"{target} is at step {theirs:,} and {source} {behind}; {other} instead, or {verb} with --force."
        )


def describe_damaged(mirror: Mirror, damaged: Sequence[str]) -> str:
    """Return the message that lists damaged files in the store and says how to repair them."""
    return (
        f"Not fetched from {mirror.there}: {'; '.join(map(_bare, damaged))}. `icl checkpoints {mirror.run.path} push --force` "
        "repairs the store, if the files in that folder are undamaged."
    )


def _bare(sentence: str) -> str:
    return sentence.rstrip(".")
