"""A run's copy in a store: whose it is, what of it is missing, and how it comes and goes.

The copy lies at `<store>/<run name>/` and is laid out as the run's folder is. Three rules keep it whole:

- *Whose.* `run-id` is drawn once, in the folder that the run began in. A copy belongs to the folder with the same id;
  any other run of that name is refused, whatever its settings. A folder without a run that asks for the same settings
  takes the copy over, id included: it is the same run, resumed elsewhere.
- *In which order.* `last.ckpt` and `status.json` vouch for the files beside them and so are copied after them;
  `config.yaml`, which makes a folder a run, comes last of all. A copy that breaks off is taken up by the same command.
- *What is newer.* Nothing is copied over a run that is further on, unless forced.
"""

import io
import os
import secrets
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from tqdm import tqdm

from icl.checkpoints import checkpoint_name, list_steps, parse_checkpoint
from icl.checks import ConfigError, UserError
from icl.config import RunConfig
from icl.runs import RunError, RunFolder, parse_config, parse_status, require_same_config
from icl.storage import LocalStore, MissingKeyError, StorageError, Store, open_store, require_key

FILES = ("run-id", "wandb-id", "metrics.csv", "run.log", "report.html", "last.ckpt", "status.json", "config.yaml")
FOLDERS = ("checkpoints", "results", "figures")
"""With `FILES`, what of a run's folder is copied."""
CHECKPOINT_FOLDERS = ("checkpoints", "checkpoints/moments")
"""Of the weights, and of Adam's moments where they are saved."""
VOUCHERS = ("last.ckpt", "status.json")
"""These say what else there is: copied after it, the status last."""
_LAST = (*VOUCHERS, "config.yaml")
_NUM_WORKERS = 8

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Mirror:
    """A run's folder (`here`) and its copy in a store (`there`)."""

    run: RunFolder
    there: Store
    url: str
    """The store itself, as it was asked for."""

    @property
    def here(self) -> Store:
        """The folder as a store."""
        return LocalStore(self.run.path)

    @property
    def checkpoints(self) -> Store:
        """The copy's checkpoints, for the functions of `icl.checkpoints`."""
        return open_store(f"{self.there}/checkpoints")


def store_url(config: RunConfig) -> str | None:
    """The store that a copy of the run goes to: `checkpoints.store`, or the bucket $AWS_BUCKET_NAME, or none."""
    bucket = os.environ.get("AWS_BUCKET_NAME")
    return config.checkpoints.store or (f"s3://{bucket}" if bucket else None)


def open_mirror(run: RunFolder, url: str, name: str) -> Mirror:
    """A run and its place in a store, `<url>/<name>`.

    Raises:
        ConfigError: If that is the run's own folder.
        StorageError: If the store cannot be used: no credentials, no bucket, no answer.
    """
    there = open_store(f"{url.rstrip('/')}/{name}")
    if isinstance(there, LocalStore) and there.root.resolve() == run.path.resolve():
        raise ConfigError(f"The store {url} is where the run itself lies; choose another folder for its copy.")
    there.check()
    return Mirror(run, there, url)


def take_up(mirror: Mirror, config: RunConfig) -> bool:
    """Before training: claim the run's place in the store, and fetch from there what is further on than the folder.

    Returns:
        Whether something was fetched.

    Raises:
        RunError: If the place belongs to another run.
        ConfigError: If the run in the store was begun with other settings.
        StorageError: If the store or the folder cannot be used.
    """
    _require_no_links_out(mirror.here, mirror.there)
    theirs = read_config(mirror.there)
    is_new = not mirror.run.config_file.exists()
    if theirs is not None:
        require_same_config(theirs, config, str(mirror.there))
    if not (is_new and theirs is not None):
        claim(mirror)
    if theirs is None or not (is_new or saved_step(mirror.there) > saved_step(mirror.here)):
        return False
    pull(mirror)
    claim(mirror)
    return True


def claim(mirror: Mirror) -> None:
    """Make the place in the store this run's own, or find that it is.

    Raises:
        RunError: If it belongs to another run.
        StorageError: If the store or the folder cannot be used.
    """
    own = _read(mirror.here, "run-id") or secrets.token_hex(8).encode()
    owner = _read(mirror.there, "run-id")
    if owner is None and mirror.there.create("run-id", own):
        owner = own
    if (owner or _read(mirror.there, "run-id")) != own:
        raise RunError(
            f"{mirror.there} holds another run of that name, and nothing was copied over it; "
            "give this one another --run_name, or another --checkpoints.store."
        )
    if _read(mirror.here, "run-id") is None:
        mirror.here.write("run-id", own)


def pull(mirror: Mirror, *, force: bool = False) -> list[str]:
    """Fetch what the folder lacks or has otherwise; the names of what was fetched.

    Args:
        mirror: The run.
        force: Fetch every file, and over a run that is further on.

    Raises:
        RunError: If the store has no such run, or the folder is another run or further on.
        CheckpointError: If a checkpoint in the store is damaged; the folder keeps its own.
        StorageError: If the store or the folder cannot be used.
    """
    _require_no_links_out(mirror.here, mirror.there)
    if read_config(mirror.there) is None:
        raise RunError(f"There is no run at {mirror.there}; `icl checkpoints RUN push` puts one there.")
    own = _read(mirror.here, "run-id")
    if mirror.run.config_file.exists() and own != _read(mirror.there, "run-id"):
        raise RunError(f"{mirror.there} holds another run than {mirror.run.path}; move that folder away to fetch it.")
    _require_not_behind(mirror.there, mirror.here, "pull", force)
    return _transfer(mirror.there, mirror.here, "pulling", force)


def push(mirror: Mirror, *, force: bool = False) -> list[str]:
    """Send what the store lacks or has otherwise; the names of what was sent.

    Args:
        mirror: The run.
        force: Send every file, and over a copy that is further on.

    Raises:
        RunError: If the place in the store belongs to another run, or the copy is further on.
        CheckpointError: If a checkpoint in the folder is damaged; the store keeps its own.
        StorageError: If the store or the folder cannot be used.
    """
    _require_no_links_out(mirror.here, mirror.there)
    mirror.run.read_config()
    _require_not_behind(mirror.here, mirror.there, "push", force)
    claim(mirror)
    return _transfer(mirror.here, mirror.there, "pushing", force)


def find_damage(run: RunFolder, mirror: Mirror | None) -> list[str]:
    """A sentence for every checkpoint here that is damaged, and every file in the store that is damaged or missing.

    Raises:
        StorageError: If the store cannot be listed.
    """
    here = LocalStore(run.path)
    folders = zip(CHECKPOINT_FOLDERS, (run.checkpoints, run.moments), strict=True)
    saved = [f"{folder}/{checkpoint_name(step)}" for folder, store in folders for step in list_steps(store)]
    kept = copied_names(mirror.there) if mirror else []
    places: list[tuple[Store, str]] = [(here, name) for name in saved]
    places += [(mirror.there, name) for name in sorted({*saved, *kept})] if mirror else []
    with progress("verifying", len(places)) as bar:
        return [found for found in _in_parallel(_damage, places, bar) if found]


def copied_names(store: Store) -> list[str]:
    """List the names in a run's folder, or in its copy, that belong to a copy; vouchers and `config.yaml` last.

    Raises:
        StorageError: If one of them could lead out of the run's folder, or the store cannot be used.
    """
    found = store.keys()
    names = [name for name in found if _is_copied(name)]
    for name in names:
        require_key(name, store)
    return sorted(names, key=lambda name: (_LAST.index(name) + 1 if name in _LAST else 0, name))


def read_config(store: Store) -> RunConfig | None:
    """The settings of the run that lies in a store, or None if none does.

    Raises:
        ConfigError: If they cannot be read.
        StorageError: If the store cannot be used.
    """
    data = _read(store, "config.yaml")
    return None if data is None else parse_config(data, str(store))


def saved_step(store: Store) -> int:
    """The step that the status in a run's folder, or in its copy, tells of; -1 without one."""
    data = _read(store, "status.json")
    status = parse_status(data) if data else None
    return status.step if status else -1


def same_file(source: Store, target: Store, name: str) -> bool:
    """Whether two stores have the same bytes under a name."""
    try:
        return source.digest(name) == target.digest(name)
    except MissingKeyError:
        return False


def is_checkpoint(name: str) -> bool:
    """Whether a name in a run's folder is that of a checkpoint, of weights or of moments."""
    folder, _, file = name.rpartition("/")
    return folder in CHECKPOINT_FOLDERS and file.startswith("step-")


def progress(label: str, total: int) -> tqdm:
    """A bar of files on a terminal; elsewhere a line every ten seconds."""
    if sys.stderr.isatty():
        return tqdm(total=total, desc=label, unit="file", dynamic_ncols=True, mininterval=0.2)
    return tqdm(total=total, desc=label, bar_format="{desc} {n_fmt}/{total_fmt} files", mininterval=10, file=_Lines())


class _Lines(io.StringIO):
    """Takes what a bar writes, and prints plain lines."""

    def write(self, text: str) -> int:
        """A line for every state of the bar; none for the spaces that wipe it out."""
        if text.strip():
            print(text.strip(), file=sys.stderr, flush=True)
        return len(text)


def _is_copied(name: str) -> bool:
    return name in FILES or name.partition("/")[0] in FOLDERS


def _require_no_links_out(*stores: Store) -> None:
    """Refuse to copy from or to a folder that holds a link out of it: what lies behind is not the run's.

    Raises:
        StorageError: Naming the first such link.
    """
    for store in stores:
        links = [name for name in store.links_out() if _is_copied(name)] if isinstance(store, LocalStore) else []
        if links:
            raise StorageError(
                f"{store}/{links[0]} is a symbolic link out of the run's folder, so nothing was copied; "
                "put what it leads to in its place, or remove it."
            )


def _read(store: Store, name: str) -> bytes | None:
    try:
        return store.read(name)
    except MissingKeyError:
        return None


def _require_not_behind(source: Store, target: Store, verb: str, force: bool) -> None:
    ours, theirs = saved_step(source), saved_step(target)
    if theirs > ours and not force:
        other = "pull" if verb == "push" else "push"
        behind = f"at step {ours:,} only" if ours >= 0 else "without a status"
        raise RunError(
            f"{target} is at step {theirs:,} and {source} {behind}; {other} instead, or {verb} with --force."
        )


def _transfer(source: Store, target: Store, label: str, force: bool) -> list[str]:
    """Copy what differs, several files at once; what vouches for others after them."""
    names = copied_names(source)

    def copy(name: str) -> str | None:
        if not force and same_file(source, target, name):
            return None
        data = source.read(name)
        if is_checkpoint(name):
            parse_checkpoint(data, f"{source}/{name}")
        target.write(name, data)
        return name

    with progress(label, len(names)) as bar:
        copied = _in_parallel(copy, [name for name in names if name not in _LAST], bar)
        copied += _in_turn(copy, [name for name in names if name in _LAST], bar)
    return [name for name in copied if name]


def _damage(place: tuple[Store, str]) -> str | None:
    """What is wrong with a file, in a sentence."""
    store, name = place
    try:
        data = store.read(name)
        if not is_checkpoint(name):
            return None
        step = parse_checkpoint(data, f"{store}/{name}").step
    except UserError as error:
        return str(error)
    if name.rpartition("/")[2] != checkpoint_name(step):
        return f"{store}/{name} is damaged: it holds step {step:,}."
    return None


def _in_parallel(act: Callable[[Item], Result], items: Sequence[Item], bar: tqdm) -> list[Result]:
    """`act` on every item, several at once; the first error ends it."""
    with ThreadPoolExecutor(_NUM_WORKERS) as pool:
        try:
            return _in_turn(lambda future: future.result(), [pool.submit(act, item) for item in items], bar)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _in_turn(act: Callable[[Item], Result], items: Sequence[Item], bar: tqdm) -> list[Result]:
    results = []
    for item in items:
        results.append(act(item))
        bar.update()
    return results
