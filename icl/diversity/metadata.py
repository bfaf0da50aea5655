"""The file `experiment_metadata.json`: the settings of an experiment and the state of each of its runs.

The file is written before the first step. It is replaced atomically whenever a run starts, ends or fails, and every few
seconds while a run trains. The file is only for information: the files in the runs' folders show which runs are done. So
the experiment continues correctly even if this file is missing or out of date.
"""

import contextlib
import json
import math
import os
import platform
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from icl.config.validation import has_type, is_count
from icl.diversity.runs import METADATA, ExperimentRun
from icl.files.reading import ContentError, parse_json, read_bytes
from icl.files.redaction import redact
from icl.files.writing import StorageError, write_atomically
from icl.runs.environment import versions
from icl.runs.folder import RunFolder
from icl.runs.status import DONE

REFRESH_SECONDS = 5.0
"""Seconds between updates of the current run's record."""


class Metadata:
    """The metadata of one experiment, written by the process that holds the experiment's lock."""

    def __init__(self, base: Path, runs: Sequence[ExperimentRun], *, about: dict[str, Any]) -> None:
        old = read_metadata(base)
        old_entries = {entry["num_tasks"]: entry for entry in old.get("runs", [])}
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
            "runs": [_first_entry(run, old_entries.get(run.label, {})) for run in runs],
        }
        self.write()

    def entries(self) -> list[dict[str, Any]]:
        """Return a record for each run, with the keys num_tasks, state, step, max_steps, loss, reason, folder, started, ended."""
        with self._lock:
            return [dict(entry) for entry in self._tree["runs"]]

    def begin_run(self, label: str) -> None:
        """Record that a run starts or resumes. A run that resumes keeps the time of its first start."""
        with self._lock:
            self._training = label
            started = self._entry(label)["started"] or now()
            self._update(label, state="running", reason=None, started=started, ended=None)

    def end_run(self, label: str, *, state: str, reason: str | None) -> None:
        """Record how a run ended."""
        with self._lock:
            self._training = None
            self._update(label, state=state, reason=reason, ended=now())

    def update_states(self, states: Mapping[str, tuple[str, str]]) -> None:
        """Record the states of runs that several processes train.

        `states` maps each M, as a string, to a state (done, running, failed or waiting) and the reason for it.
        """
        with self._lock:
            for label, (state, reason) in states.items():
                entry = self._entry(label)
                entry |= _progress(self._folders[label])
                status = self._folders[label].read_status()
                if state == "done" and status is not None:
                    state, reason = status.state, status.reason or ""
                if state != entry["state"]:
                    entry["started"] = entry["started"] or (now() if state == "running" else None)
                    entry["ended"] = None if state in ("running", "waiting") else now()
                entry |= {"state": state, "reason": reason or None}
            self.write()

    def is_done(self, label: str) -> bool:
        """Return whether a run needs no more training."""
        return self._entry(label)["state"] in DONE

    def end(self, *, state: str, reason: str | None) -> None:
        """Record how the experiment ended. A run that is still marked as `running` was interrupted, so it is marked as `preempted`."""
        with self._lock:
            for entry in self._tree["runs"]:
                if entry["state"] == "running":
                    entry |= {"state": "preempted", "reason": reason}
            self._tree |= {"state": state, "reason": reason, "ended": now()}
            self.write()

    def write(self) -> None:
        """Replace `experiment_metadata.json`. The new file also contains the current time."""
        with self._lock:
            self._tree["updated"] = now()
            text = json.dumps(self._tree, indent=1, allow_nan=False) + "\n"
            write_atomically(self.path, text.encode(), durable=False)

    @contextlib.contextmanager
    def refreshing(self) -> Iterator[None]:
        """Update the step and the loss of the current run every few seconds, until the context ends."""
        is_over = threading.Event()

        def refresh() -> None:
            while not is_over.wait(REFRESH_SECONDS):
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
        """Change some fields of a run's record, update its step and loss, and replace the file."""
        self._entry(label).update(_progress(self._folders[label]) | fields)
        self.write()


def read_metadata(base: Path) -> dict[str, Any]:
    """Return the metadata from an experiment's folder, or an empty dict if the file is missing, damaged or not in our format."""
    try:
        tree = parse_json(read_bytes(base / METADATA))
    except (OSError, ContentError):
        return {}
    return tree if isinstance(tree, dict) and _is_usable(tree) else {}


def _is_usable(tree: dict[str, Any]) -> bool:
    """Return whether the values that we use later have the types that `Metadata` writes."""
    entries = tree.get("runs", [])
    texts = [tree.get(key) for key in ("state", "started", "updated", "host")]
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        return False
    texts += [entry.get(key) for entry in entries for key in ("reason", "started", "ended")]
    words = [entry.get(key) for entry in entries for key in ("num_tasks", "state")]
    return all(has_type(text, str | None) for text in texts) and all(isinstance(word, str) for word in words)


def is_alive(metadata: dict[str, Any]) -> bool:
    """Return whether the process that wrote the metadata is alive. Processes on other machines are assumed to be alive."""
    pid = metadata.get("pid")
    if metadata.get("host") != platform.node() or not is_count(pid) or not 0 < pid < 2**31:
        return True
    try:
        os.kill(pid, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)  # if we lack the permission to signal it, the process exists
    return True


def now() -> str:
    """Return the current time in UTC."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def _first_entry(run: ExperimentRun, old_entry: dict[str, Any]) -> dict[str, Any]:
    """Return a run's record as it is before this process trains the run."""
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
        "started": old_entry.get("started"),
        "ended": old_entry.get("ended") if state != "waiting" else None,
    }


def _progress(folder: RunFolder) -> dict[str, Any]:
    status = folder.read_status()
    loss = None if status is None or status.loss is None or not math.isfinite(status.loss) else status.loss
    return {"step": 0 if status is None else status.step, "loss": loss}


def _shared_settings(run: ExperimentRun) -> dict[str, Any]:
    tree = run.config.to_dict()
    del tree["task"]["num_tasks"], tree["run_name"]
    return tree
