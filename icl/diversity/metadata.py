"""`experiment_metadata.json`: what an experiment is, and where each of its runs stands.

It is there before the first step and is replaced atomically, at every event and every few seconds of training. It only
tells: what is done is decided by the runs' own folders. So a file that is lost or stale costs nothing.
"""

import contextlib
import json
import math
import os
import platform
import sys
import threading
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from icl.diversity.runs import METADATA, ExperimentRun
from icl.environment import versions
from icl.reading import ContentError, parse_json, read_bytes
from icl.redaction import redact
from icl.runs import DONE, RunFolder
from icl.storage import StorageError, write_atomically
from icl.validation import has_type, is_count

REFRESH_SECONDS = 5.0
"""Between two looks at the run in training."""


class Metadata:
    """The file of one experiment, written by the one process that holds the experiment."""

    def __init__(self, base: Path, runs: Sequence[ExperimentRun], *, about: dict[str, Any]) -> None:
        old = read_metadata(base)
        before = {one["num_tasks"]: one for one in old.get("runs", [])}
        self.path = base / METADATA
        self._folders = {run.label: run.folder for run in runs}
        self._lock = threading.RLock()
        self._training: str | None = None
        self._tree: dict[str, Any] = {
            "state": "running",
            "reason": None,
            "started": old.get("started") or now(),
            "updated": None,
            "ended": None,
            "pid": os.getpid(),
            "host": platform.node(),
            "command": [redact(word) for word in sys.argv],
            **about,
            "settings": _shared_settings(runs[0]),
            "versions": versions(),
            "runs": [_first_entry(run, before.get(run.label, {})) for run in runs],
        }
        self.write()

    def entries(self) -> list[dict[str, Any]]:
        """A record per run: num_tasks, state, step, max_steps, loss, reason, folder, started, ended."""
        with self._lock:
            return [dict(entry) for entry in self._tree["runs"]]

    def begin_run(self, label: str) -> None:
        """Say that a run is being trained; its time of start is that of its first beginning."""
        with self._lock:
            self._training = label
            started = self._entry(label)["started"] or now()
            self._update(label, state="running", reason=None, started=started, ended=None)

    def end_run(self, label: str, *, state: str, reason: str | None) -> None:
        """Say how the run ended."""
        with self._lock:
            self._training = None
            self._update(label, state=state, reason=reason, ended=now())

    def is_done(self, label: str) -> bool:
        """Whether nothing is left to do for a run."""
        return self._entry(label)["state"] in DONE

    def end(self, *, state: str, reason: str | None) -> None:
        """Say how the experiment ended; a run that was just beginning, or ending, is taken up by the next command."""
        with self._lock:
            for entry in self._tree["runs"]:
                if entry["state"] == "running":
                    entry |= {"state": "preempted", "reason": reason}
            self._tree |= {"state": state, "reason": reason, "ended": now()}
            self.write()

    def write(self) -> None:
        """Replace the file."""
        with self._lock:
            self._tree["updated"] = now()
            write_atomically(
                self.path, (json.dumps(self._tree, indent=1, allow_nan=False) + "\n").encode(), durable=False
            )

    @contextlib.contextmanager
    def refreshing(self, seconds: float = REFRESH_SECONDS) -> Iterator[None]:
        """Keep step and loss of the run in training up to date meanwhile."""
        is_over = threading.Event()

        def refresh() -> None:
            while not is_over.wait(seconds):
                with self._lock, contextlib.suppress(StorageError):
                    if self._training is not None and not is_over.is_set():
                        self._update(self._training)

        thread = threading.Thread(target=refresh, name="experiment metadata", daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()

    def _entry(self, label: str) -> dict[str, Any]:
        return next(entry for entry in self._tree["runs"] if entry["num_tasks"] == label)

    def _update(self, label: str, **fields: Any) -> None:
        """Change the record of a run, step and loss included."""
        self._entry(label).update(_progress(self._folders[label]) | fields)
        self.write()


def read_metadata(base: Path) -> dict[str, Any]:
    """Return the metadata of an experiment's folder; empty if there are none, or none that we wrote."""
    try:
        tree = parse_json(read_bytes(base / METADATA))
    except (OSError, ContentError):
        return {}
    return tree if isinstance(tree, dict) and _is_usable(tree) else {}


def _is_usable(tree: dict[str, Any]) -> bool:
    """Return whether the values that are read again are of the kinds that we write."""
    entries = tree.get("runs", [])
    texts = [tree.get(key) for key in ("state", "started", "updated", "host")]
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        return False
    texts += [entry.get(key) for entry in entries for key in ("reason", "started", "ended")]
    named = [entry.get(key) for entry in entries for key in ("num_tasks", "state")]
    return all(has_type(text, str | None) for text in texts) and all(isinstance(name, str) for name in named)


def is_alive(metadata: dict[str, Any]) -> bool:
    """Whether the process that wrote the metadata lives, as far as this machine can tell."""
    pid = metadata.get("pid")
    if metadata.get("host") != platform.node() or not is_count(pid) or not 0 < pid < 2**31:
        return True
    try:
        os.kill(pid, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)  # it may be someone else's
    return True


def now() -> str:
    """The present time, in UTC."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def _first_entry(run: ExperimentRun, before: dict[str, Any]) -> dict[str, Any]:
    """Where a run stands before this process has touched it."""
    status = run.folder.read_status()
    if status is None:
        state, reason = "waiting", None
    elif status.state in (*DONE, "failed"):
        state, reason = status.state, status.reason
    else:
        state, reason = "waiting", f"stopped at step {status.step:,}; it will resume"
    return {
        "num_tasks": run.label,
        "state": state,
        **_progress(run.folder),
        "max_steps": run.config.trainer.max_steps,
        "reason": reason,
        "folder": str(run.folder.path),
        "started": before.get("started"),
        "ended": before.get("ended") if state != "waiting" else None,
    }


def _progress(folder: RunFolder) -> dict[str, Any]:
    status = folder.read_status()
    loss = None if status is None or status.loss is None or not math.isfinite(status.loss) else status.loss
    return {"step": 0 if status is None else status.step, "loss": loss}


def _shared_settings(run: ExperimentRun) -> dict[str, Any]:
    tree = run.config.to_dict()
    del tree["task"]["num_tasks"], tree["run_name"]
    return tree
