"""The program of one point, or of several points packed together: its process, its log, and the outcome of each point.

A point is one combination of a sweep's settings. A packed program trains several points as one population. A worker is a process of
`icl sweep`, which starts and watches such programs. Before a worker starts a program, it claims the points (`icl.sweeps.attempts`).
"""

import contextlib
import ctypes
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from icl.files.redaction import redact
from icl.files.writing import write_atomically
from icl.runs.folder import RunFolder
from icl.runs.status import WAS_REMOVED, Status
from icl.sweeps.attempts import Claim, Outcome
from icl.sweeps.command import child_environment, fill_macros, with_own_icl
from icl.sweeps.points import Point
from icl.sweeps.schema import SweepFile

_PR_SET_PDEATHSIG = 1  # from Linux's prctl.h
_TAIL_BYTES = 2**16
"""Number of bytes at the end of the log that are searched for the reason of a failure."""


class Program:
    """A program that works on one or several points.

    Args:
        work: The points, each with its claim.
        log: File that receives the output.
        process: The process, or a string with the reason why the process could not be started.
    """

    def __init__(self, work: Sequence[tuple[Point, Claim]], log: Path, process: subprocess.Popen | str) -> None:
        self.work, self.log, self.process = work, log, process
        self.is_lost = False  # whether another worker has taken over a point
        self.has_lost_storage = False  # whether the folder of the runs could not be reached while the program ran
        self._started = time.monotonic()
        self.log_start = 0  # size of the log before the output of the process
        self._first_amounts = {point.number: _amount(point, claim.folder) for point, claim in work}

    @property
    def points(self) -> list[Point]:
        """The points that the program works on."""
        return [point for point, _ in self.work]

    @property
    def seconds(self) -> float:
        """Seconds since the program was started."""
        return time.monotonic() - self._started

    def is_running(self) -> bool:
        """Return whether the process has not ended yet."""
        return not isinstance(self.process, str) and self.process.poll() is None

    def beat(self) -> bool:
        """Refresh all claims. Return False if another worker has taken over a point."""
        return all([claim.beat() for _, claim in self.work])  # noqa: C419 (a list, so that every claim is refreshed)

    def stop(self) -> None:
        """Ask the program to save and exit."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kill the program."""
        self._signal(signal.SIGKILL)

    def has_progressed(self, point: Point) -> bool:
        """Return whether a point has progressed since the program was started."""
        claim = next(claim for other, claim in self.work if other is point)
        return _amount(point, claim.folder) > self._first_amounts[point.number]

    def record(self, *, stopping: str | None) -> None:
        """Record the outcome of each point of this program, and give up the claims.

        Another worker can then claim the point, unless the point is done.

        Args:
            stopping: Reason why the sweep stops all programs, or None if it does not stop them.

        Raises:
            OSError: If the outcome of a point cannot be written. The claims on all points are given up nevertheless.
        """
        with contextlib.ExitStack() as stack:  # the stack calls each function, even if another function raises an error
            for point, claim in reversed(self.work):
                stack.callback(self._record, point, claim, stopping)

    def _record(self, point: Point, claim: Claim, stopping: str | None) -> None:
        if isinstance(self.process, str):
            claim.finish("failed", reason=self.process)
            return
        code = self.process.returncode
        try:
            outcome, reason = self._outcome(point, claim, stopping, code)
        except OSError as error:
            outcome, reason = "failed", f"exit status {code}; its files cannot be read: {error.strerror or error}"
        claim.finish(outcome, exit_status=code, reason=reason)

    def _outcome(self, point: Point, claim: Claim, stopping: str | None, code: int) -> tuple[Outcome, str | None]:
        """Return the outcome of the attempt at a point, and the reason if the point is not done."""
        status = RunFolder(claim.folder).read_status() if point.trains else None
        is_ended = not point.trains or (status is not None and status.is_done)
        if code == 0 and is_ended:
            return "done", None
        if status is not None and status.updated < claim.attempt.started:
            status = None  # an earlier program wrote this status
        # A packed program exits with an error even if only one of its runs fails, so read the status of each run.
        if len(self.work) > 1 and status is not None and status.is_done:
            return "done", None
        if stopping:
            return "preempted", stopping
        reason = self._reason_of_failure(claim, status, code)
        if self._was_out_of_reach(claim, reason):
            self.has_lost_storage = True
            return "preempted", "its folder could not be reached for a while"
        return "failed", reason

    def _reason_of_failure(self, claim: Claim, status: Status | None, code: int) -> str:
        """Return the reason in the run's status if the run has failed. Otherwise return the exit status and the last line of the log."""
        if status is not None and status.state == "failed":
            return status.reason or "failed"
        if code == 0:
            return "exit status 0, but the run has not ended; the program must wait until `icl train` has ended"
        end = f"killed by {_signal_name(-code)}" if code < 0 else f"exit status {code}"
        line = self._last_line(f"icl: {claim.folder.resolve()} failed: ")
        return redact(f"{end}: {line}" if line else end)

    def _was_out_of_reach(self, claim: Claim, reason: str) -> bool:
        """Return whether the run's folder is there now, but could not be reached for a while, and the program failed because of this."""
        return claim.folder.is_dir() and (self.has_lost_storage or WAS_REMOVED in reason)

    def _last_line(self, prefix: str) -> str:
        """Return the last line of the log that begins with a prefix, without this prefix.

        If no line begins with the prefix, return the last nonempty line. If the log was deleted, return "".
        """
        try:
            with self.log.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(self.log_start, size - _TAIL_BYTES))
                lines = file.read().decode(errors="replace").split("\n")
        except FileNotFoundError:
            return ""
        prefixed = [line.removeprefix(prefix) for line in lines if line.startswith(prefix)]
        others = [line.strip()[-300:] for line in lines if line.strip()]
        return next(reversed(prefixed or others), "")

    def _signal(self, number: signal.Signals) -> None:
        if isinstance(self.process, subprocess.Popen) and self.process.poll() is None:
            os.killpg(self.process.pid, number)


def start_program(sweep: SweepFile, work: Sequence[tuple[Point, Claim]], *, root: Path, num_workers: int) -> Program:
    """Start the program of one or several points.

    The folder of the first point gets `point.json`, with the settings of all points, and `sweep.log`, with the output.
    The `sweep.log` of every other point refers to this log.
    """
    point, claim = work[0]
    point_file, log = claim.folder / "point.json", claim.folder / "sweep.log"
    words = with_own_icl(
        fill_macros(sweep.command, point.settings, program=sweep.program, json_file=point_file.resolve())
    )
    content = [point.settings for point, _ in work] if len(work) > 1 else point.settings
    heading = f"--- {time.strftime('%Y-%m-%d %H:%M:%S')}"
    program = Program(work, log, "not started")
    try:
        for _, packed_claim in work:
            RunFolder(packed_claim.folder).require_own_files()
        write_atomically(point_file, (json.dumps(content, indent=1) + "\n").encode())
        for _, other in work[1:]:
            with (other.folder / "sweep.log").open("a") as output:
                output.write(f"{heading} trained together with other points; see {log.resolve()}\n")
        with log.open("ab") as output:
            output.write(f"{heading} {redact(' '.join(words))}\n".encode())
            output.flush()
            program.log_start = output.tell()
            program.process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=child_environment(point_file, root, num_workers=num_workers),
                start_new_session=True,  # Ctrl-C then reaches only `icl sweep`, which signals the program once
                pass_fds=[claim.descriptor for _, claim in work],  # the claim stays locked as long as the program runs
                preexec_fn=_end_with_engine if sys.platform == "linux" else None,  # noqa: PLW1509 (one thread only)
            )
    except (OSError, ValueError) as error:  # ValueError: an argument contains the character \0
        program.process = f"cannot start `{words[0]}`: {getattr(error, 'strerror', None) or error}"
    return program


def _amount(point: Point, folder: Path) -> int:
    """Return the progress of a point: its step, or the number of its files if the program is not `icl train`."""
    if point.trains:
        status = RunFolder(folder).read_status()
        return 0 if status is None else status.step
    own = ("sweep.log", "point.json")
    results = [folder.parents[1] / "results"] if folder.parent.name == "llc" else []  # where `icl llc` writes
    files = itertools.chain.from_iterable(path.rglob("*") for path in (folder, *results))
    return sum(path.name not in own and "attempts" not in path.parts for path in files)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # Python has no name for most real-time signals
        return f"signal {number}"


def _end_with_engine() -> None:
    """Ask Linux to send this new process a SIGTERM when `icl sweep` dies, so that no program continues without it."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
