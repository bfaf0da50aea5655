"""A run's folder: its files, its status, and the lock that prevents two processes from training the run at once.

`$LOCAL_ROOT/<run name>/` contains `config.yaml`, `status.json`, `metrics.csv`, `run.log`, `last.ckpt`, `previous.ckpt`,
`checkpoints/`, `results/` and `figures/`. Files are replaced atomically.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import yaml

from icl.config import RunConfig, config_differences
from icl.config.validation import ConfigError, UserError, user_path
from icl.files.reading import ContentError, parse_yaml, read_bytes
from icl.files.redaction import redact
from icl.files.system import LockedError, lock_file
from icl.files.writing import StorageError, write_atomically
from icl.runs.environment import environments_of, versions
from icl.runs.status import FAILS_AGAIN, Status, parse_status, status_text
from icl.runs.tasks_file import remember_tasks
from icl.store.base import LocalStore

RANK_VARIABLES = ("LOCAL_RANK", "NODE_RANK", "RANK")
"""Environment variables with which Lightning and torchrun number the processes of a run."""
_OWN_NAMES = frozenset(
    (
        *("run-id", "wandb-id", "metrics.csv", "run.log", "report.html", "last.ckpt", "previous.ckpt", "status.json"),
        *("config.yaml", "point.json", "sweep.log", "attempts", "imported.json", ".delivered", ".lock", ".llc-lock"),
        *("checkpoints", "results", "figures", "tensorboard"),
    )
)
"""Files and folders that `icl` reads or writes in a run's folder. The folder `wandb` is not included, because W&B makes symbolic links in it."""


class RunError(UserError, RuntimeError):
    """Raised if a run cannot start or continue. The message says why, and what to do."""


def fails_again(run: "RunFolder", status: Status) -> bool:
    """Return whether a run has failed and would fail again with the same settings.

    Return False if the versions of packages have changed since the run's last start, because the run may then succeed.
    """
    if status.state != "failed" or FAILS_AGAIN not in (status.reason or ""):
        return False
    try:
        starts = environments_of(read_bytes(run.log_file, limit=None).decode(errors="replace"))
    except (ContentError, OSError):
        return False
    return bool(starts) and versions().items() <= starts[-1][1].items()


def local_root() -> Path:
    """Return the folder of all runs: $LOCAL_ROOT, or `runs` in the working directory.

    Raises:
        ConfigError: If $LOCAL_ROOT begins with `~` and no home folder is known.
    """
    return user_path(os.environ.get("LOCAL_ROOT") or "runs")


def place_of(word: str | Path) -> Path:
    """Return the path of the run that `word` names, either by its path or by its run name.

    An existing path has precedence over a run name. A run name stands for a folder below `local_root()`. If neither exists, `word` itself
    is returned as a path.
    """
    path, named = Path(word), local_root() / name_of(word)
    return named if named.exists() and not path.exists() else path


def require_place(word: str | Path) -> Path:
    """Return the path of the run that `word` names, as `place_of` does. Refuse a path that does not exist.

    Raises:
        RunError: If there is neither a path nor a run of this name. The message names both paths that were tried.
    """
    if not str(word).strip():
        raise RunError(
            "RUN must be the name of a run or the path of its folder, got an empty string; `icl runs` lists all runs."
        )
    path, named = place_of(word), local_root() / name_of(word)
    if not path.exists():
        if str(word).startswith(("hf:/", "s3:/")):  # `Path` has removed the second slash
            raise RunError("RUN must be on this machine; first fetch it with `icl checkpoints NAME pull --store URL`.")
        other = "" if named == path else f", nor a run {named}"
        raise RunError(f"There is nothing at {path}{other}; `icl runs` lists all runs.")
    return path


def name_of(word: str | Path) -> str:
    """Return the name of a run that is given by path or name.

    A path in `local_root()` becomes relative to that folder; any other word is unchanged.
    """
    path, root = Path(word), local_root()
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()


class RunFolder:
    """The folder of one run: the paths of its files, and functions to read and write them. The first write makes the folder."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.status_file = self.path / "status.json"
        self.metrics_file = self.path / "metrics.csv"
        self.log_file = self.path / "run.log"
        self.resume_file = self.path / "last.ckpt"
        self.previous_file = self.path / "previous.ckpt"
        self.results = self.path / "results"
        self.figures = self.path / "figures"
        self.store = LocalStore(self.path)
        self.checkpoints = LocalStore(self.path / "checkpoints")
        self.moments = LocalStore(self.path / "checkpoints" / "moments")

    def write_config(self, config: RunConfig) -> None:
        """Save the resolved configuration."""
        write_atomically(self.config_file, yaml.safe_dump(config.to_dict(), sort_keys=False).encode())

    def read_config(self) -> RunConfig:
        """Return the configuration with which the run was started.

        Raises:
            ConfigError: If the folder has no configuration, or the configuration cannot be read.
            TasksError: If the table of tasks of an imported run is damaged.
        """
        try:
            config = parse_config(read_bytes(self.config_file), str(self.path))
        except ContentError as error:
            raise ConfigError(f"The config.yaml of {self.path} cannot be used: {error}.") from None
        except OSError:
            raise ConfigError(f"{self.path} is not a run: it has no readable config.yaml.") from None
        remember_tasks(self.checkpoints.root, config)
        return config

    def write_status(self, status: Status) -> None:
        """Replace `status.json`. The new file also contains the current time.

        We do not wait until the bytes are on disk, because the status is written often. So a power cut may leave an old or an empty
        file. `last.ckpt` is always on disk, and training resumes from it even if the status cannot be read.
        """
        write_atomically(self.status_file, status_text(status), durable=False)

    def overwrite_status(self, status: Status) -> None:
        """Overwrite the existing `status.json` in place. Use this method on a full disk, which has no room for a second file.

        Raises:
            OSError: If the file cannot be written.
        """
        with self.status_file.open("r+b") as file:
            file.write(status_text(status))
            file.truncate()

    def read_status(self) -> Status | None:
        """Return the last status, or None if `status.json` is missing or cannot be read."""
        try:
            return parse_status(read_bytes(self.status_file))
        except (OSError, ContentError):
            return None

    def require_own_files(self) -> None:
        """Refuse a run's folder if a file that `icl` uses is a symbolic link out of the folder, a pipe or a device.

        Through such a link, a folder from another person could make `icl` write to any place.

        Raises:
            StorageError: If the folder has such a file. The message names the file.
        """
        foreign = dict.fromkeys(self.store.pipes(), "neither a file nor a folder")
        foreign |= dict.fromkeys(self.store.links_out(), "a symbolic link out of the run's folder")
        for name, kind in foreign.items():
            if name.partition("/")[0] in _OWN_NAMES:
                raise StorageError(
                    f"{self.path / name} is {kind}, so nothing is written to this run; "
                    "replace it with an ordinary file or folder, or remove it."
                )

    def write_result(self, name: str, text: str) -> Path:
        """Write a file in `results/` and return its path. An existing file is replaced.

        Raises:
            StorageError: If the file cannot be written, or would lie outside the run's folder.
        """
        self.require_own_files()
        write_atomically(self.results / name, text.encode())
        return self.results / name

    def log(self, message: str) -> None:
        """Add a line with the current time and a message to `run.log`.

        Raises:
            StorageError: If the line cannot be written.
        """
        try:
            with self.log_file.open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {redact(message)}\n")
        except OSError as error:
            raise StorageError(
                f"Cannot write {self.log_file}: {error.strerror}. Earlier saves are intact. Free space or check the disk, then run the "
                "same command again."
            ) from None

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the run for this process while the context is open. If the process dies, the system releases the lock.

        Raises:
            RunError: If another process is training the run.
            StorageError: If the folder cannot be written, or `require_own_files` refuses it.
        """
        self.require_own_files()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / ".lock").open("a+")
        except OSError as error:
            raise StorageError(
                f"Cannot write to the run's folder {self.path}: {error.strerror}. Choose another folder with LOCAL_ROOT."
            ) from None
        with file:
            try:
                lock_file(file.fileno(), self.path)
            except LockedError:
                raise RunError(
                    f"Another process is training {self.path}; wait until it ends, or give this run another name with --run_name."
                ) from None
            yield


def run_of(path: str | Path) -> RunFolder:
    """Return the run to which a folder belongs. The folder must be a run's folder, or the folder `checkpoints` in it."""
    path = Path(path)
    return RunFolder(path.parent if path.name == "checkpoints" else path)


def parse_config(data: bytes, where: str) -> RunConfig:
    """Parse the configuration from the bytes of a run's `config.yaml`.

    Raises:
        ConfigError: If the file cannot be used. `where` is the name of the run in the message.
    """
    try:
        tree = parse_yaml(data)
    except ContentError as error:
        raise ConfigError(f"The config.yaml of {where} cannot be used: {error}.") from None
    if not isinstance(tree, dict) or not tree:
        raise ConfigError(f"The config.yaml of {where} cannot be used: it contains no settings.")
    try:
        return RunConfig.from_dict(tree)
    except ConfigError as error:
        raise ConfigError(f"The config.yaml of {where} cannot be used: {error}") from None


def require_same_config(old: RunConfig, new: RunConfig, run: RunFolder | str) -> None:
    """Refuse to resume a run with settings other than those with which it began.

    Args:
        old: The settings with which the run began.
        new: The requested settings.
        run: The run's folder, or the address of its copy.

    Raises:
        ConfigError: If settings differ. The message names every difference.
    """
    changed = config_differences(old, new)
    if changed:
        raise ConfigError(
            f"The run {run.path if isinstance(run, RunFolder) else run} was begun with other settings: {'; '.join(changed)}. "
            "Use the old settings to resume this run, or give the new run another --run_name."
        )


@contextlib.contextmanager
def leaving_nothing(run: RunFolder) -> Iterator[None]:
    """Lock a run's folder as `RunFolder.lock` does. If the run cannot begin, leave no new folder behind.

    If the folder is new, and the body of the `with` statement fails before it writes a file, the folder is deleted.

    Raises:
        RunError, StorageError: If the run cannot be locked, as in `RunFolder.lock`.
    """
    new = [folder for folder in (run.path, *run.path.parents) if not folder.exists()]
    with run.lock():
        try:
            yield
        except BaseException:
            if new and [path.name for path in run.path.iterdir()] == [".lock"]:
                with contextlib.suppress(OSError):  # another run may have written into a parent folder
                    (run.path / ".lock").unlink()
                    for folder in new:
                        folder.rmdir()
            raise


def require_own_place(run: RunFolder) -> None:
    """Refuse to begin a run inside another run's folder, or in a folder that contains other runs.

    Otherwise, listings and copies would mix up the files of the two runs.

    Raises:
        RunError: If the folder is inside another run's folder or contains other runs. The message names such a run.
    """
    if run.config_file.is_file() or run.status_file.is_file():
        return
    path = run.path.absolute()
    outer = next((folder for folder in path.parents if _is_run(folder)), None)
    if outer is not None:
        raise RunError(f"{run.path} would be inside the run {outer}; give this run another name or folder.")
    inner = next((file.parent for pattern in ("*", "*/*") for file in path.glob(f"{pattern}/status.json")), None)
    if inner is not None:
        raise RunError(f"{run.path} contains other runs, such as {inner.name}; give this run another name or folder.")


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() and (folder / "status.json").is_file()


def is_child_rank() -> bool:
    """Return whether this process has a rank other than 0. Rank 0 holds the lock and writes the files."""
    return any(os.environ.get(name, "0") != "0" for name in RANK_VARIABLES)
