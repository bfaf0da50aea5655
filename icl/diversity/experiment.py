"""Train the runs of a task-diversity experiment one after the other.

The files in the runs' folders show which runs are done. So the same command continues an experiment after any interruption: it skips
finished runs, resumes unfinished runs, and retries failed runs. Runs whose loss became NaN are retried only with `--retry`, or if the
versions of packages have changed. If a run fails, the failure is recorded and the next run starts. After SIGINT or SIGTERM, the current
run is saved and the experiment ends. If the terminal is lost, the experiment continues and writes its output to `experiment.log`. A lock
prevents two processes from training the same experiment at once.
"""

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from icl.config import RunConfig
from icl.config.validation import UserError
from icl.diversity.metadata import Metadata
from icl.diversity.runs import ExperimentRun, experiment_runs, lock_experiment, require_same_settings
from icl.files.reading import first_line
from icl.files.writing import remove_temporaries
from icl.progress import print_at_once
from icl.runs.folder import fails_again
from icl.runs.status import DONE
from icl.signals import handling
from icl.training.run import train

LOG = "experiment.log"


class ExperimentResult(NamedTuple):
    """The state of an experiment when `run_experiment` returns."""

    entries: list[dict[str, Any]]
    """A record for each run, as in the metadata."""
    received: signal.Signals | None = None
    """The signal that stopped the experiment, if one did."""

    @property
    def is_done(self) -> bool:
        """Whether every run is done."""
        return all(entry["state"] in DONE for entry in self.entries)

    @property
    def done(self) -> list[str]:
        """The values of M, as strings, of the runs that are done."""
        return [entry["num_tasks"] for entry in self.entries if entry["state"] in DONE]


class _Outcome(NamedTuple):
    """The outcome of training one run."""

    state: str
    reason: str | None
    message: str
    """The outcome in words, to print."""
    received: signal.Signals | None = None
    """The signal that stopped the run, if one did."""


def run_experiment(
    config: RunConfig, *, max_power: int, base: Path, retry: bool = False, say: Callable[[str], None] = print_at_once
) -> ExperimentResult:
    """Train every run that is not done, until all are done or have failed, or a signal arrives.

    Args:
        config: Settings of all runs. `task.num_tasks` (M) is replaced.
        max_power: The runs have M = 2, 4, 8, ..., 2^max_power, and infinity.
        base: Folder of the experiment.
        retry: Whether to retry runs whose loss became NaN. By default these runs are skipped, because they would fail
            again with the same settings.
        say: Function that receives a line for each event.

    Raises:
        ConfigError: If the folder contains runs with other settings.
        RunError: If another process is training the experiment.
        StorageError: If the folder cannot be written.
    """
    runs = experiment_runs(config, max_power=max_power, base=base)
    with lock_experiment(base):
        require_same_settings(runs, base)
        remove_temporaries(base)
        metadata = Metadata(base, runs, about={"max_power": max_power, "base_checkpoint_dir": str(base)})
        with _handling_signals(base / LOG) as last_signal, metadata.refreshing():
            try:
                received = _train_runs(runs, metadata, last_signal, say, retry=retry)
            except KeyboardInterrupt:  # between two runs
                received = last_signal()
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
    last_signal: Callable[[], signal.Signals],
    say: Callable[[str], None],
    *,
    retry: bool,
) -> signal.Signals | None:
    """Train one run after the other. Return the signal that stopped the experiment, if one did."""
    for number, run in enumerate(runs, start=1):
        prefix = f"[{number}/{len(runs)}] M = {run.label}"
        started = time.monotonic()
        was_done = metadata.is_done(run.label)
        status = run.folder.read_status()
        if status is not None and not retry and fails_again(run.folder, status):
            say(f"{prefix}: failed: {status.reason} This run is not tried again; use --retry to try it again.")
            metadata.end_run(run.label, state="failed", reason=status.reason)
            continue
        if not was_done:
            say(f"{prefix}: {run.folder.path}")
            metadata.begin_run(run.label)
        outcome = _train_run(run, last_signal)
        if not (was_done and outcome.state in DONE):
            metadata.end_run(run.label, state=outcome.state, reason=outcome.reason)
        duration = "" if was_done else f" after {time.monotonic() - started:.0f} s"
        say(f"{prefix}: {outcome.message}{duration}")
        if outcome.received is not None:
            return outcome.received
    return None


def _train_run(run: ExperimentRun, last_signal: Callable[[], signal.Signals]) -> _Outcome:
    """Train, resume or skip one run. An exception is returned as a failure, so that the next run can start."""
    try:
        result = train(run.config, folder=run.folder.path)
    except KeyboardInterrupt:
        received = last_signal()
        return _Outcome("preempted", received.name, f"interrupted by {received.name}", received)
    except Exception as error:
        if not isinstance(error, UserError):
            traceback.print_exc()  # an error in the program itself; for a UserError, the message is enough
        reason = first_line(error)
        return _Outcome("failed", reason, f"failed: {reason}")
    status = result.status
    loss = "" if status.loss is None else f", loss {status.loss:.4f}"
    if result.received is not None:
        message = f"stopped by {result.received.name} at step {status.step:,}"
        return _Outcome(status.state, status.reason, message, result.received)
    state = ("was " if result.was_done else "") + status.state.replace("_", " ")
    reason = "" if status.reason is None else f" ({status.reason})"
    return _Outcome(status.state, status.reason, f"{state} at step {status.step:,}{loss}{reason}")


@contextlib.contextmanager
def _handling_signals(log: Path) -> Iterator[Callable[[], signal.Signals]]:
    """Let SIGTERM interrupt the program in the same way as Ctrl-C. If the terminal is lost (SIGHUP), redirect the output to `log`.

    While a run trains, `icl.training.run.train` replaces these handlers of SIGINT and SIGTERM with its own.

    Yields:
        A function that returns the last signal that arrived, or SIGINT if none did.
    """
    received: list[signal.Signals] = []

    def interrupt(number: int, frame: object) -> None:
        received.append(signal.Signals(number))
        raise KeyboardInterrupt

    def redirect_output(number: int, frame: object) -> None:
        descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        os.close(descriptor)

    handlers = {signal.SIGINT: interrupt, signal.SIGTERM: interrupt, signal.SIGHUP: redirect_output}
    with handling(handlers):
        yield lambda: received[-1] if received else signal.SIGINT
    sys.stdout.flush()
