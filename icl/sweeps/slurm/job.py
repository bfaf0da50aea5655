"""Decide, inside a job of a Slurm array, when the job must stop and how its work continues.

A job runs points of a sweep, which are combinations of settings. Before its time limit, the job saves these points and returns to the
queue with `scontrol requeue`. If the site does not allow this, the job submits a successor, which begins when the job has ended. A job
that reaches its time limit twice in succession without any progress is not queued again, because its time limit is too short for its
points. All other cases are left to Slurm: `scancel` ends the job permanently, and Slurm itself puts a job back in the queue if its node
dies or a more urgent job takes its place.
"""

import os
import platform
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from icl.config.validation import ConfigError
from icl.files.writing import StorageError
from icl.progress import print_at_once
from icl.sweeps.slurm.commands import SlurmError, is_preempted, requeue, seconds_left, submit
from icl.sweeps.slurm.records import SUBMISSION, JobRecord, read_record, read_submission, write_record
from icl.sweeps.slurm.submission import SCRIPT, WARNING_SECONDS

if TYPE_CHECKING:
    from icl.sweeps.engine import SweepResult

MAX_IDLE = 2
"""Number of consecutive starts without progress after which a job is not queued again."""
_SLACK_SECONDS = 120.0
"""Slurm may send its warning of the time limit up to this many seconds earlier than we asked for. A signal that arrives even earlier
announces a preemption."""
_PAUSE_SECONDS = 5.0


class SlurmJob:
    """The job of Slurm in which this process runs.

    Args:
        folder: Folder of the submission.
        say: Function that receives a line for each event.

    Raises:
        ConfigError: If this process is not a job of the submission.
    """

    def __init__(self, folder: Path, say: Callable[[str], None] = print_at_once) -> None:
        array, task = os.environ.get("SLURM_ARRAY_JOB_ID", ""), os.environ.get("SLURM_ARRAY_TASK_ID", "")
        submission = read_submission(folder)
        if not array or not task.isdecimal() or submission is None:
            raise ConfigError(
                "`--in-job` works only in the script that `--slurm` submits. Leave out `--in-job`, or use `--slurm` to "
                "submit jobs."
            )
        self.folder, self.say = folder, say
        self.id = f"{array}_{task}"
        self.since = submission.submitted
        """Unix time of the submission. This job does not retry points that have failed since this time."""
        self.mark = folder / SUBMISSION
        """A file that exists as long as the file system of the runs can be reached."""
        self._is_warned = False
        self._reason: str | None = None
        left = seconds_left(self.id)
        self._margin = WARNING_SECONDS if left is None else min(WARNING_SECONDS, max(10.0, left / 6))
        self._stop_at = None if left is None else time.monotonic() + left - self._margin
        old = read_record(folder, int(task)) or JobRecord(task=int(task), job=self.id, state="running")
        self._record = replace(
            old, job=self.id, state="running", reason="", host=platform.node(), num_starts=old.num_starts + 1
        )
        self._write(self._record)
        if hasattr(signal, "SIGUSR1"):  # the job's script made the process ignore this signal until now
            signal.signal(signal.SIGUSR1, self._warn)

    def stop_reason(self) -> str | None:
        """Return the reason why the job must save its points and stop now, or None if it can continue."""
        if self._reason is None and (self._is_warned or (self._stop_at or time.monotonic() + 1) <= time.monotonic()):
            left = seconds_left(self.id)  # ask again, because the time limit may have changed
            # A signal that arrives when much time is left announces a preemption, so the job stops at once.
            is_early = (
                left is not None and left > self._margin + 1 and (not self._is_warned or left < _warned_at_most())
            )
            if is_early and left is not None:
                self._stop_at, self._is_warned = time.monotonic() + left - self._margin, False
            else:
                self._stop_at = time.monotonic()
                has_time = left is None or left > self._margin + 1
                why = "because Slurm preempts" if has_time else "before the time limit of"
                self._reason = f"stopped {why} job {self.id}"
        return self._reason

    def must_kill(self) -> bool:
        """Return whether programs that are still saving must be killed, because Slurm is about to kill this job."""
        return self._reason is not None and time.monotonic() > (self._stop_at or 0.0) + 0.6 * self._margin

    def end(self, result: "SweepResult") -> int:
        """Record how the job ends. If the job still has work, put it back in the queue. Return the exit status."""
        is_stopped_by_slurm = result.received is not None and is_preempted(self.id)
        if result.received is not None and not is_stopped_by_slurm:
            self._finish("ended", f"stopped by {result.received.name}: cancelled, queued again or preempted")
            return 128 + result.received
        if not result.is_over and (is_stopped_by_slurm or self._reason is not None):
            if is_stopped_by_slurm:
                return self._go_on("its preemption", is_idle=False)
            return self._go_on("its time limit", is_idle=not result.has_progressed)
        words = [state.state for state in result.states.values()]
        if result.num_failed:
            self._finish("failed", f"{result.num_failed} of its points failed")
            return 1
        elsewhere = words.count("running")
        left = f"the remaining points ({elsewhere}) run in other jobs" if elsewhere else "no point is left to run"
        self._finish("ended", left)
        return 0

    def _go_on(self, event: str, *, is_idle: bool) -> int:
        """Put the job back in the queue after an event, or submit a successor. Do neither if the job has repeatedly made no progress."""
        self._record = replace(self._record, num_idle=self._record.num_idle + 1 if is_idle else 0)
        if self._record.num_idle >= MAX_IDLE:
            self._finish(
                "failed",
                f"reached its time limit {MAX_IDLE} times in succession without progress, so it is not queued again; give the jobs "
                'more time (`--sbatch "--time=..."`) and run the same command again',
            )
            return 1
        self._finish("waiting", f"goes on after {event}")
        refusal = self._requeue()
        if refusal is None:
            return 0
        try:
            words = (f"--array={self._record.task}", f"--dependency=afterany:{self.id}")
            successor = submit(self.folder / SCRIPT, *words)
        except SlurmError as error:
            self._finish("failed", f"could not be queued again: {refusal} {error}; run the same command again")
            return 1
        self._record = replace(self._record, job=f"{successor}_{self._record.task}")
        self._finish("waiting", f"successor of job {self.id}, which this site does not queue again")
        return 0

    def _requeue(self) -> SlurmError | None:
        """Put the job back in the queue. Return the error if Slurm refuses."""
        for is_last in (False, False, True):
            try:
                requeue(self.id)
                return None
            except SlurmError as error:
                if "pending" in str(error):  # many sites put a preempted job back in the queue themselves
                    return None
                if is_last or "disabled" in str(error):
                    return error
            time.sleep(_PAUSE_SECONDS)  # the controller may be restarting
        return None

    def _finish(self, state: str, reason: str) -> None:
        self._record = replace(self._record, state=state, reason=reason)  # type: ignore[arg-type]
        self.say(f"Job {self.id} {state}: {reason}.")
        self._write(self._record)

    def _write(self, record: JobRecord) -> None:
        try:
            write_record(self.folder, replace(record, updated=round(time.time(), 3)))
        except StorageError as error:  # the record is for information only
            print(f"icl: {error}", file=sys.stderr)

    def _warn(self, number: int, frame: object) -> None:
        self._is_warned = True


def _warned_at_most() -> float:
    """Return the largest number of seconds before the time limit at which Slurm sends its warning."""
    return WARNING_SECONDS + _SLACK_SECONDS
