"""Keep a page up to date during training: write the page again whenever a file of the runs has changed.

The page is a static file that is replaced atomically. The page tells the browser to load the file again at intervals,
so neither a server nor a script is needed.
"""

import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from icl.config.validation import UserError
from icl.files.reading import first_line
from icl.progress import print_at_once
from icl.report.page import Report, write_report
from icl.runs.folder import RunError
from icl.runs.listing import named_runs
from icl.signals import handling

SECONDS = 10.0
"""Shortest interval, in seconds, between two versions of the page. A browser also reloads the page at this interval."""
_SHARE = 2.0
"""Shortest interval between two versions, as a multiple of the time that was needed to write the last version."""
_LONGEST_SECONDS = 60.0
"""Longest interval, in seconds, between two versions while a run has not ended. Even if no file has changed, a new version is useful:
it can say that a run has not updated its status for a long time and may have been killed."""
_QUIET_SECONDS = 120.0
"""Time without a change, in seconds, after which we stop watching a folder in which all runs have ended. A sweep may begin its next
run within this time."""
_ENDED = ("finished", "stopped_early", "failed")


def watch(
    paths: Sequence[Path],
    *,
    out: Path | None = None,
    seconds: float = SECONDS,
    quiet_seconds: float = _QUIET_SECONDS,
    say: Callable[[str], None] = print_at_once,
) -> tuple[Report | None, signal.Signals | None]:
    """Keep the page of some runs up to date until all of them have ended, or a signal arrives.

    When all runs have ended, the page is written once more. This version no longer tells the browser to load the page
    again at intervals.

    Args:
        paths: Folders of runs, or folders that contain runs now or later.
        out: The file, as in `write_report`.
        seconds: Shortest interval between two versions, in seconds.
        quiet_seconds: Time without a change, in seconds, after which to stop watching folders in which all runs have ended.
        say: Function that receives a line for each event.

    Returns:
        Two values: the last version of the page, or None if no version was written; and the signal, or None if no
            signal arrived.

    Raises:
        StorageError: If the first version cannot be written.
    """
    stop = threading.Event()
    received: list[signal.Signals] = []

    def receive(number: int, frame: object) -> None:
        received.append(signal.Signals(number))
        stop.set()

    with handling(dict.fromkeys((signal.SIGINT, signal.SIGTERM), receive)):
        report = _watch(paths, out, seconds, quiet_seconds, stop, say)
    return report, received[0] if received else None


def _watch(
    paths: Sequence[Path],
    out: Path | None,
    seconds: float,
    quiet_seconds: float,
    stop: threading.Event,
    say: Callable[[str], None],
) -> Report | None:
    """Write the page until the runs have ended or `stop` is set."""
    report: Report | None = None
    last_error = ""
    seen: object = None
    is_over = False
    changed_at = written_at = time.monotonic()
    while not stop.is_set():
        took = 0.0
        try:
            state = _fingerprint(paths)
            if state != seen or (not is_over and time.monotonic() - written_at > _LONGEST_SECONDS):
                started = time.monotonic()
                report = write_report(paths, out=out, reload_seconds=max(1, round(seconds)), shows_progress=False)
                written_at = time.monotonic()
                took = written_at - started
                if seen is None:
                    say(f"Report  {report.path}, updated when the runs change; press Ctrl-C to stop.")
                changed_at = written_at if state != seen else changed_at
                seen, last_error = state, ""
            is_over = report is not None and all(_has_ended(facts.folder.read_status()) for facts in report.runs)
            grace = 0.0 if len(paths) == 1 and _is_run(paths[0]) else quiet_seconds
            if is_over and time.monotonic() - changed_at >= grace:
                return write_report(paths, out=out, shows_progress=False)
        except (UserError, OSError) as error:
            if report is None and not isinstance(error, RunError):
                raise
            message = first_line(error)
            if message != last_error:
                say(f"Waiting: {message}")
            last_error = message
        stop.wait(max(seconds, _SHARE * took))
    return report


def _fingerprint(paths: Sequence[Path]) -> list[tuple[str, int, int]]:
    """Return the names, sizes and modification times of all files that the page shows."""
    files = []
    for name, run in named_runs(paths).items():
        shown = [run.config_file, run.status_file, run.metrics_file, run.log_file, run.checkpoints.root]
        shown += [*run.results.glob("*"), *run.figures.glob("*")]
        for file in shown:
            try:
                status = file.stat()
            except OSError:
                continue
            files.append((f"{name}/{file.name}", status.st_size, status.st_mtime_ns))
    return files


def _is_run(path: Path) -> bool:
    return (path / "config.yaml").is_file() or (path / "status.json").is_file()


def _has_ended(status: object) -> bool:
    return getattr(status, "state", None) in _ENDED
