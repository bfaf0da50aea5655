"""A run's folder: its files, its status, and the lock that keeps two processes from training it at once.

`$LOCAL_ROOT/<run name>/` holds `config.yaml`, `status.json`, `metrics.csv`, `run.log`, `last.ckpt`, `previous.ckpt`,
`checkpoints/`, `results/` and `figures/`. Whatever is replaced is replaced atomically.
"""

import contextlib
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import yaml

from icl.config import RunConfig, flatten, is_free_on_resume
from icl.config.validation import ConfigError, UserError, has_type, is_count, user_path
from icl.files.reading import ContentError, parse_json, parse_yaml, read_bytes
from icl.files.redaction import redact
from icl.files.system import LockedError, lock_file
from icl.files.writing import StorageError, write_atomically
from icl.runs.environment import environments_of, versions
from icl.store.base import LocalStore

State = Literal["waiting", "running", "finished", "stopped_early", "preempted", "failed"]
DONE: tuple[State, ...] = ("finished", "stopped_early")
RANK_VARIABLES = ("LOCAL_RANK", "NODE_RANK", "RANK")
"""Environment variables by which Lightning and torchrun number the processes of a run."""
_OWN_NAMES = frozenset(
    (
        *("run-id", "wandb-id", "metrics.csv", "run.log", "report.html", "last.ckpt", "previous.ckpt", "status.json"),
        *("config.yaml", "point.json", "sweep.log", "attempts", ".delivered", ".lock", ".llc-lock"),
        *("checkpoints", "results", "figures"),
    )
)
"""Names of files and folders that icl reads or writes in a run's folder; W&B's folder `wandb` holds links of its own."""
_LAST_TIME = 253_402_300_799
"""The end of the year 9999, after which Python has no dates."""
FAILS_AGAIN = "the same settings would fail again"
"""Words in the reason of a failure that depends on the settings alone."""


class RunError(UserError, RuntimeError):
    """A run that cannot go on; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class Status:
    """The content of `status.json`."""

    state: State
    step: int = 0
    """Updates done."""
    max_steps: int = 0
    loss: float | None = None
    """Mean training loss of the last row of `metrics.csv`."""
    best_step: int | None = None
    """The evaluated step that early stopping counts as the best; its checkpoint is kept if patience is set."""
    reason: str | None = None
    """The reason why the run stopped, failed or was pre-empted."""
    steps_per_second: float | None = None
    updated: float = 0.0
    """Unix time of this status."""


def fails_again(run: "RunFolder", status: Status) -> bool:
    """Return whether a run failed in a way that the same settings and these versions would only repeat."""
    if status.state != "failed" or FAILS_AGAIN not in (status.reason or ""):
        return False
    try:
        starts = environments_of(run.log_file.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return False
    return bool(starts) and versions().items() <= starts[-1][1].items()


def local_root() -> Path:
    """Path of the folder of all runs: $LOCAL_ROOT, or `runs` in the working directory.

    Raises:
        ConfigError: If $LOCAL_ROOT begins with `~` and no home folder is known.
    """
    return user_path(os.environ.get("LOCAL_ROOT") or "runs")


def place_of(word: str | Path) -> Path:
    """Return the path that a word of the command line names: an existing path, or else the run of that name below `local_root()`."""
    path, named = Path(word), local_root() / name_of(word)
    return named if named.exists() and not path.exists() else path


def require_place(word: str | Path) -> Path:
    """The same, which must be there.

    Raises:
        RunError: Naming both places.
    """
    if not str(word).strip():
        raise RunError("RUN must name a run or a folder, got nothing; `icl runs` lists the runs there are.")
    place, named = place_of(word), local_root() / name_of(word)
    if not place.exists():
        other = "" if named == place else f", nor a run {named}"
        raise RunError(f"There is nothing at {place}{other}; `icl runs` lists the runs there are.")
    return place


def name_of(word: str | Path) -> str:
    """A run's name, from a folder below `local_root()` or as it is."""
    path, root = Path(word), local_root()
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()


class RunFolder:
    """The paths of one run, and what is written there; made by the first write."""

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
        self.checkpoints = LocalStore(self.path / "checkpoints")
        self.moments = LocalStore(self.path / "checkpoints" / "moments")

    def write_config(self, config: RunConfig) -> None:
        """Save the resolved configuration."""
        write_atomically(self.config_file, yaml.safe_dump(config.to_dict(), sort_keys=False).encode())

    def read_config(self) -> RunConfig:
        """The configuration the run was started with.

        Raises:
            ConfigError: If the folder holds none, or it cannot be read.
        """
        try:
            return parse_config(read_bytes(self.config_file), str(self.path))
        except ContentError as error:
            raise ConfigError(f"The config.yaml of {self.path} cannot be used: {error}.") from None
        except OSError:
            raise ConfigError(f"{self.path} is not a run: it has no readable config.yaml.") from None

    def write_status(self, status: Status) -> None:
        """Replace `status.json`, with the present time."""
        write_atomically(self.status_file, _status_text(status), durable=False)

    def overwrite_status(self, status: Status) -> None:
        """Write into `status.json` as it is: a full disk has no room for a second file.

        Raises:
            OSError: If even that cannot be done.
        """
        with self.status_file.open("r+b") as file:
            file.write(_status_text(status))
            file.truncate()

    def read_status(self) -> Status | None:
        """The last status, or None if there is none that can be read."""
        try:
            return parse_status(read_bytes(self.status_file))
        except (OSError, ContentError):
            return None

    def require_own_files(self) -> None:
        """Refuse a folder in which one of our names leads elsewhere; whoever made it decides what would be written there.

        Raises:
            StorageError: Naming a link out of the folder, or a pipe or device in the place of a file.
        """
        store = LocalStore(self.path)
        for kind, names in (
            ("a symbolic link out of the run's folder", store.links_out()),
            ("neither a file nor a folder", store.pipes()),
        ):
            own = next((name for name in names if name.partition("/")[0] in _OWN_NAMES), None)
            if own is not None:
                raise StorageError(
                    f"{self.path / own} is {kind}, so nothing is written to this run; "
                    "put a plain file or folder in its place, or remove it."
                )

    def write_result(self, name: str, text: str) -> Path:
        """Replace a file of `results/`.

        Raises:
            StorageError: If it cannot be written, or would lie outside of the run's folder.
        """
        self.require_own_files()
        write_atomically(self.results / name, text.encode())
        return self.results / name

    def log(self, message: str) -> None:
        """Add a line to `run.log`, with the time.

        Raises:
            StorageError: If it cannot be written.
        """
        try:
            with self.log_file.open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {redact(message)}\n")
        except OSError as error:
            raise StorageError(
                f"Cannot write {self.log_file}: {error.strerror}. What was saved before is intact."
            ) from None

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for this process; the system lets go of it when the process dies.

        Raises:
            RunError: If another process is training the run.
            StorageError: If the folder cannot be written, or a name in it leads elsewhere.
        """
        self.require_own_files()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / ".lock").open("a+")
        except OSError as error:
            raise StorageError(
                f"Cannot write to the run's folder {self.path}: {error.strerror}. Choose another with LOCAL_ROOT."
            ) from None
        with file:
            try:
                lock_file(file.fileno(), self.path)
            except LockedError:
                raise RunError(
                    f"Another process is training {self.path}; wait for it, or give this run another name with --run_name."
                ) from None
            yield


def run_of(path: str | Path) -> RunFolder:
    """Return the run that a folder belongs to: the folder itself, or the parent of its `checkpoints`."""
    path = Path(path)
    return RunFolder(path.parent if path.name == "checkpoints" else path)


def parse_config(data: bytes, place: str) -> RunConfig:
    """The configuration that a run's `config.yaml` holds.

    Raises:
        ConfigError: If it cannot be read; `place` is what the message calls the run.
    """
    try:
        tree = parse_yaml(data)
    except ContentError as error:
        raise ConfigError(f"The config.yaml of {place} cannot be used: {error}.") from None
    if not isinstance(tree, dict) or not tree:
        raise ConfigError(f"{place} is not a run: it has no readable config.yaml.")
    try:
        return RunConfig.from_dict(tree)
    except ConfigError as error:
        raise ConfigError(f"The config.yaml of {place} cannot be used: {error}") from None


def _status_text(status: Status) -> bytes:
    reason = None if status.reason is None else redact(status.reason)
    content = asdict(status) | {"reason": reason, "updated": round(time.time(), 3)}
    return (json.dumps(content, indent=1) + "\n").encode()


def parse_status(data: bytes) -> Status | None:
    """Return the status that a run's `status.json` holds, or None if it cannot be read or a value is none we write."""
    try:
        status = Status(**parse_json(data, limit=100))
    except (ContentError, TypeError):
        return None
    steps = (status.step, status.max_steps, status.best_step or 0)
    is_usable = (
        all(has_type(getattr(status, field.name), field.type) for field in fields(Status))
        and all(is_count(step) for step in steps)
        and 0 <= status.updated <= _LAST_TIME
    )
    return status if is_usable else None


def config_differences(old: RunConfig, new: RunConfig) -> list[str]:
    """Return the settings that make two configurations compute differently, a phrase for each; names and machines do not count."""
    before, after = (flatten(config.to_dict()) for config in (old, new))
    return [
        f"`{key}` was {before[key]!r} and is now {after[key]!r}"
        for key in after
        if key not in ("run_name", "preset") and not is_free_on_resume(key) and before[key] != after[key]
    ]


def require_same_config(old: RunConfig, new: RunConfig, run: RunFolder | str) -> None:
    """Refuse to resume a run under other settings than it began with.

    Args:
        old: What it began with.
        new: What is asked for.
        run: Its folder, or its place in a store.

    Raises:
        ConfigError: Naming every difference.
    """
    changed = config_differences(old, new)
    if changed:
        raise ConfigError(
            f"The run {run.path if isinstance(run, RunFolder) else run} was begun with other settings: {'; '.join(changed)}. "
            "Use the old ones to resume it, or give the new run its own --run_name."
        )


@contextlib.contextmanager
def leaving_nothing(run: RunFolder) -> Iterator[None]:
    """Hold a run's folder as `RunFolder.lock` does; if the body fails before it has written a file there, the folder goes.

    Raises:
        RunError, StorageError: As `RunFolder.lock`.
    """
    new = [folder for folder in (run.path, *run.path.parents) if not folder.exists()]
    with run.lock():
        try:
            yield
        except BaseException:
            if new and [path.name for path in run.path.iterdir()] == [".lock"]:
                with contextlib.suppress(OSError):  # a parent may have become another run's
                    (run.path / ".lock").unlink()
                    for folder in new:
                        folder.rmdir()
            raise


def require_own_place(run: RunFolder) -> None:
    """Refuse to begin a run inside another run's folder, or around other runs; listings and copies would mix them.

    Raises:
        RunError: Naming the other run.
    """
    if run.config_file.is_file() or run.status_file.is_file():
        return
    path = run.path.absolute()
    outer = next((folder for folder in path.parents if _is_run(folder)), None)
    if outer is not None:
        raise RunError(f"{run.path} would lie inside the run {outer}; give this run another name or folder.")
    inner = next((file.parent for pattern in ("*", "*/*") for file in path.glob(f"{pattern}/status.json")), None)
    if inner is not None:
        raise RunError(
            f"{run.path} is a folder of other runs, such as {inner.name}; give this run another name or folder."
        )


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() and (folder / "status.json").is_file()


def is_child_rank() -> bool:
    """Return whether this process is not rank 0. Rank 0 holds the lock and writes the files."""
    return any(os.environ.get(name, "0") != "0" for name in RANK_VARIABLES)


def run_folders(root: Path) -> list[RunFolder]:
    """Return every run below a folder, M = 8 before M = 16.

    Raises:
        RunError: If it is no folder.
    """
    if os.path.lexists(root) and not root.is_dir():
        raise RunError(f"{root} is not a folder; name a folder of runs.")
    names = sorted((file.parent.relative_to(root).as_posix() for file in root.glob("**/status.json")), key=_by_number)
    return [RunFolder(root / name) for name in names]


def named_runs(paths: Sequence[Path]) -> dict[str, RunFolder]:
    """The runs that paths name, by a name for each: a run's folder, or a folder with runs below it.

    Raises:
        RunError: If a path is neither.
    """
    found: dict[Path, tuple[str, RunFolder]] = {}
    for path in paths:
        folder = RunFolder(path)
        if folder.config_file.is_file() or folder.status_file.is_file():
            found.setdefault(path.resolve(), (path.resolve().name, folder))
            continue
        below = run_folders(path)
        if not below:
            raise RunError(
                f"{path} is not a run, and there are no runs below it: expected a folder with config.yaml; `icl runs` lists those here."
            )
        for one in below:
            found.setdefault(one.path.resolve(), (one.path.relative_to(path).as_posix(), one))
    names = [name for name, _ in found.values()]
    return {name if names.count(name) == 1 else str(run.path): run for name, run in found.values()}


def describe_runs(root: Path) -> list[str]:
    """Return a line for every run below a folder: name, state, step, loss, age of the last status.

    A run whose `status.json` cannot be read has a line that says so.
    """
    return [_line(run.path.relative_to(root).as_posix(), run.read_status()) for run in run_folders(root)]


def _line(name: str, status: Status | None) -> str:
    name = "".join(
        c if c.isprintable() else "?" for c in name
    )  # a folder that came along may be named to move the cursor
    if status is None:
        return f"{name:40s} {'unreadable':13s} its status.json is damaged; the same `icl train` command writes it anew"
    loss = "-" if status.loss is None else f"{status.loss:.4f}" if abs(status.loss) < 1e6 else f"{status.loss:.3g}"
    progress = f"{status.step:,}/{status.max_steps:,}"
    age = _age(time.time() - status.updated)
    return f"{name:40s} {status.state:13s} step {progress:>17s}  loss {loss:>8s}  {age} ago"


def _by_number(name: str) -> list[tuple[str, int]]:
    """A key that puts M=8 before M=16."""
    return [(text, int(number or -1)) for text, number in re.findall(r"(\D*)(\d*)", name)]


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"
