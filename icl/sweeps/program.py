"""A program while it runs, of one point or of several packed into one: its process, its log, and what its end means."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from icl.redaction import redact
from icl.runs import DONE, RunFolder, Status
from icl.storage import write_atomically
from icl.sweeps.attempts import Claim, Outcome
from icl.sweeps.command import child_environment, fill_macros, with_own_icl
from icl.sweeps.points import Point
from icl.sweeps.schema import SweepFile

_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux
_TAIL_BYTES = 2**16


class Program:
    """The process of a point, or of several packed into one, or the reason why it could not be started."""

    def __init__(self, work: Sequence[tuple[Point, Claim]], log: Path, process: subprocess.Popen | str) -> None:
        self.work, self.log, self.process = work, log, process
        self.is_lost = False
        """Whether another worker took a point over."""
        self._started = time.monotonic()
        self._begun_at = log.stat().st_size if log.exists() else 0

    @property
    def points(self) -> list[Point]:
        """What it works on."""
        return [point for point, _ in self.work]

    @property
    def seconds(self) -> float:
        """Since it was started."""
        return time.monotonic() - self._started

    def is_running(self) -> bool:
        """Whether the process has not ended yet."""
        return not isinstance(self.process, str) and self.process.poll() is None

    def beat(self) -> bool:
        """Say that its attempts live; whether all of them still count."""
        still_count = [claim.beat() for _, claim in self.work]  # every one is to beat
        return all(still_count)

    def stop(self) -> None:
        """Ask it to save and end."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it at once."""
        self._signal(signal.SIGKILL)

    def record(self, *, stopping: signal.Signals | None) -> None:
        """Write how each point ended, and let go of it.

        Args:
            stopping: The signal by which the engine was told to stop, if it was.

        Raises:
            StorageError: If it cannot be written.
        """
        for point, claim in self.work:
            self._record(point, claim, stopping)

    def _record(self, point: Point, claim: Claim, stopping: signal.Signals | None) -> None:
        if isinstance(self.process, str):
            claim.finish("failed", reason=self.process)
            return
        status = self.process.returncode
        run = self._status(point, claim)
        is_done = status == 0 or (len(self.work) > 1 and run is not None and run.state in DONE)
        outcome: Outcome = "done" if is_done else "preempted" if stopping else "failed"
        reasons = {"preempted": f"stopped by {stopping.name}" if stopping else "", "failed": self._reason(claim, run)}
        claim.finish(outcome, exit_status=status, reason=reasons.get(outcome))

    def _status(self, point: Point, claim: Claim) -> Status | None:
        """What the run says, if it was this program that said it."""
        status = RunFolder(claim.folder).read_status() if point.trains else None
        return status if status is not None and status.updated >= claim.attempt.started else None

    def _reason(self, claim: Claim, status: Status | None) -> str:
        """Why it failed: what its run's status says, or what the program wrote last, of this run if of several."""
        assert isinstance(self.process, subprocess.Popen)
        if status is not None and status.state == "failed":
            return status.reason or "failed"
        code = self.process.returncode
        end = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        line = self._last_line(f"icl: {claim.folder.resolve()} failed: ")
        return redact(f"{end}: {line}" if line else end)

    def _last_line(self, own: str) -> str:
        """The rest of the last line that begins with `own`, or if there is none the last line."""
        with self.log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(self._begun_at, size - _TAIL_BYTES))
            lines = file.read().decode(errors="replace").split("\n")
        named = [line.removeprefix(own) for line in lines if line.startswith(own)]
        told = [line.strip()[-300:] for line in lines if line.strip()]
        return next(reversed(named or told), "")

    def _signal(self, number: signal.Signals) -> None:
        if isinstance(self.process, subprocess.Popen) and self.process.poll() is None:
            os.killpg(self.process.pid, number)


def start_program(sweep: SweepFile, work: Sequence[tuple[Point, Claim]], *, root: Path, num_workers: int) -> Program:
    """Start the program of a point, or of several packed into one: the points as JSON, the output in `sweep.log`.

    Both lie in the first one's folder; the others' logs say so.
    """
    point, claim = work[0]
    point_file, log = claim.folder / "point.json", claim.folder / "sweep.log"
    words = with_own_icl(
        fill_macros(sweep.command, point.settings, program=sweep.program, json_file=point_file.resolve())
    )
    content = [point.settings for point, _ in work] if len(work) > 1 else point.settings
    begun = f"--- {time.strftime('%Y-%m-%d %H:%M:%S')}"
    program = Program(work, log, "not started")
    try:
        for _, one in work:
            RunFolder(one.folder).require_own_files()
        write_atomically(point_file, (json.dumps(content, indent=1) + "\n").encode())
        for _, other in work[1:]:
            with (other.folder / "sweep.log").open("a") as output:
                output.write(f"{begun} trained together with others; see {log.resolve()}\n")
        with log.open("ab") as output:
            output.write(f"{begun} {redact(' '.join(words))}\n".encode())
            output.flush()
            program.process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=child_environment(point_file, root, num_workers=num_workers),
                start_new_session=True,  # a Ctrl-C reaches the engine alone, which passes it on once
                pass_fds=[claim.descriptor for _, claim in work],  # an attempt lives as long as the program does
                preexec_fn=_end_with_engine if sys.platform == "linux" else None,  # noqa: PLW1509 (one thread only)
            )
    except OSError as error:
        program.process = f"cannot start `{words[0]}`: {error.strerror or error}"
    return program


def _end_with_engine() -> None:
    """In the new process: ask Linux for a SIGTERM when the engine dies, so that a killed one leaves no orphans."""
    ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGTERM)
