"""Training a task-diversity experiment: every run that is not done, one after the other.

What is done is decided by the runs' own folders, under a lock that one process at a time can hold. So the same command,
after whatever ended it, does only what is missing: finished runs are skipped, begun ones resume, failed ones are tried
again. A run that fails is recorded, and the rest goes on. SIGINT and SIGTERM save the run in hand and end the experiment;
if the terminal is lost, the output goes to `experiment.log` and the experiment goes on.
"""

import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from icl.config import RunConfig
from icl.diversity.metadata import REFRESH_SECONDS, Metadata
from icl.diversity.runs import ExperimentRun, experiment_runs, holding, require_same_settings
from icl.runs import DONE, fails_again
from icl.storage import remove_temporaries
from icl.training.run import train
from icl.validation import UserError

LOG = "experiment.log"


class ExperimentResult(NamedTuple):
    """How a call ended."""

    entries: list[dict[str, Any]]
    """A record per run, as in the metadata."""
    received: signal.Signals | None = None
    """What stopped it before the end, if anything did."""

    @property
    def is_done(self) -> bool:
        """Whether every run is done."""
        return all(entry["state"] in DONE for entry in self.entries)

    @property
    def done(self) -> list[str]:
        """The M of the runs that are done."""
        return [entry["num_tasks"] for entry in self.entries if entry["state"] in DONE]


class _Outcome(NamedTuple):
    """How the training of one run ended."""

    state: str
    reason: str | None
    line: str
    """For people."""
    received: signal.Signals | None = None


def run_experiment(
    config: RunConfig,
    *,
    max_power: int,
    base: Path,
    retry: bool = False,
    refresh_seconds: float = REFRESH_SECONDS,
    say: Callable[[str], None] = print,
) -> ExperimentResult:
    """Train every run that is not done, until all are done or have failed, or a signal comes.

    Args:
        config: Everything but M.
        max_power: M = 2^1 .. 2^max_power, and infinity.
        base: The experiment's folder.
        retry: Whether to try runs again that would fail again.
        refresh_seconds: Between two updates of the metadata while a run trains.
        say: Takes a line for every event.

    Raises:
        ConfigError: If the folder holds runs with other settings.
        RunError: If another process holds the experiment.
        StorageError: If the folder cannot be written.
    """
    runs = experiment_runs(config, max_power=max_power, base=base)
    with holding(base):
        require_same_settings(runs, base)
        remove_temporaries(base)
        metadata = Metadata(base, runs, about={"max_power": max_power, "base_checkpoint_dir": str(base)})
        with _listening(base / LOG) as stopped_by, metadata.refreshing(refresh_seconds):
            try:
                received = _train_runs(runs, metadata, stopped_by, say, retry=retry)
            except KeyboardInterrupt:  # between two runs
                received = stopped_by()
        failed = [entry["num_tasks"] for entry in metadata.entries() if entry["state"] == "failed"]
        if received is not None:
            metadata.end(state="preempted", reason=f"stopped by {received.name}; the same command continues")
        else:
            reason = f"failed: M = {', '.join(failed)}" if failed else None
            metadata.end(state="failed" if failed else "finished", reason=reason)
        return ExperimentResult(metadata.entries(), received)


def _train_runs(
    runs: list[ExperimentRun],
    metadata: Metadata,
    stopped_by: Callable[[], signal.Signals],
    say: Callable[[str], None],
    *,
    retry: bool,
) -> signal.Signals | None:
    """One run after the other; returns the signal that ended it early."""
    for number, run in enumerate(runs, start=1):
        place = f"[{number}/{len(runs)}] M = {run.label}"
        started = time.monotonic()
        was_done = metadata.is_done(run.label)
        status = run.folder.read_status()
        if status is not None and not retry and fails_again(run.folder, status):
            say(f"{place}: failed: {status.reason} It is not tried again, except by --retry.")
            metadata.end_run(run.label, state="failed", reason=status.reason)
            continue
        if not was_done:
            say(f"{place}: {run.folder.path}")
            metadata.begin_run(run.label)
        outcome = _train_run(run, stopped_by)
        if not (was_done and outcome.state in DONE):
            metadata.end_run(run.label, state=outcome.state, reason=outcome.reason)
        took = "" if was_done else f" after {time.monotonic() - started:.0f} s"
        say(f"{place}: {outcome.line}{took}")
        if outcome.received is not None:
            return outcome.received
    return None


def _train_run(run: ExperimentRun, stopped_by: Callable[[], signal.Signals]) -> _Outcome:
    """Train, resume or skip one run; its failure is an outcome, not an error."""
    try:
        result = train(run.config, folder=run.folder.path)
    except KeyboardInterrupt:
        received = stopped_by()
        return _Outcome("preempted", received.name, f"interrupted by {received.name}", received)
    except Exception as error:
        if not isinstance(error, UserError):
            traceback.print_exc()
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return _Outcome("failed", reason, f"failed: {reason}")
    status = result.status
    loss = "" if status.loss is None else f", loss {status.loss:.4f}"
    if result.received is not None:
        line = f"stopped by {result.received.name} at step {status.step:,}"
        return _Outcome(status.state, status.reason, line, result.received)
    word = ("was " if result.was_done else "") + status.state.replace("_", " ")
    why = "" if status.reason is None else f" ({status.reason})"
    return _Outcome(status.state, status.reason, f"{word} at step {status.step:,}{loss}{why}")


@contextlib.contextmanager
def _listening(log: Path) -> Iterator[Callable[[], signal.Signals]]:
    """Make SIGTERM interrupt as Ctrl-C does, and a lost terminal (SIGHUP) send what is printed to `log`.

    While a run trains, its own handlers of SIGINT and SIGTERM stand above these. A SIGHUP that the user has told us to
    ignore (`nohup`) stays ignored. Only the main thread may listen.

    Yields:
        What the last interruption was.
    """
    received: list[signal.Signals] = []

    def interrupt(number: int, frame: object) -> None:
        received.append(signal.Signals(number))
        raise KeyboardInterrupt

    def move_output(number: int, frame: object) -> None:
        descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        os.close(descriptor)

    handlers: dict[signal.Signals, Any] = {
        signal.SIGINT: interrupt,
        signal.SIGTERM: interrupt,
        signal.SIGHUP: move_output,
    }
    is_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in handlers}
    chosen = {number: handlers[number] for number in handlers if is_main and before[number] is not signal.SIG_IGN}
    for number, handler in chosen.items():
        signal.signal(number, handler)
    try:
        yield lambda: received[-1] if received else signal.SIGINT
    finally:
        for number in chosen:
            signal.signal(number, before[number])
        sys.stdout.flush()
