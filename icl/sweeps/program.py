"""One point's program while it runs: its process, its log, and what its end means."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from icl.runs import RunFolder
from icl.storage import write_atomically
from icl.sweeps.attempts import Claim, Outcome
from icl.sweeps.command import child_environment, fill_macros, with_own_icl
from icl.sweeps.points import Point
from icl.sweeps.schema import SweepFile

_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux
_TAIL_BYTES = 4096


class Program:
    """A point's process, or the reason why it could not be started."""

    def __init__(self, point: Point, claim: Claim, log: Path, process: subprocess.Popen | str) -> None:
        self.point, self.claim, self.log, self.process = point, claim, log, process
        self.is_lost = False
        """Whether another worker took the point over."""
        self._started = time.monotonic()
        self._begun_at = log.stat().st_size if log.exists() else 0

    @property
    def seconds(self) -> float:
        """Since it was started."""
        return time.monotonic() - self._started

    def is_running(self) -> bool:
        """Whether the process has not ended yet."""
        return not isinstance(self.process, str) and self.process.poll() is None

    def stop(self) -> None:
        """Ask it to save and end."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it at once."""
        self._signal(signal.SIGKILL)

    def record(self, *, stopping: signal.Signals | None) -> None:
        """Write how it ended, and let go of the point.

        Args:
            stopping: The signal by which the engine was told to stop, if it was.

        Raises:
            StorageError: If it cannot be written.
        """
        if isinstance(self.process, str):
            self.claim.finish("failed", reason=self.process)
            return
        status = self.process.returncode
        outcome: Outcome = "done" if status == 0 else "preempted" if stopping else "failed"
        reason = {"done": None, "preempted": f"stopped by {stopping.name if stopping else ''}"}.get(outcome)
        self.claim.finish(outcome, exit_status=status, reason=self._reason() if outcome == "failed" else reason)

    def _reason(self) -> str:
        """Why it failed: what its run's status says, or the last line it wrote."""
        assert isinstance(self.process, subprocess.Popen)
        status = RunFolder(self.log.parent).read_status() if self.point.trains else None
        if status is not None and status.state == "failed" and status.updated >= self.claim.attempt.started:
            return status.reason or "failed"
        code = self.process.returncode
        end = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        line = self._last_line()
        return f"{end}: {line}" if line else end

    def _last_line(self) -> str:
        with self.log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(self._begun_at, size - _TAIL_BYTES))
            lines = file.read().decode(errors="replace").split("\n")
        return next((line.strip()[-300:] for line in reversed(lines) if line.strip()), "")

    def _signal(self, number: signal.Signals) -> None:
        if isinstance(self.process, subprocess.Popen) and self.process.poll() is None:
            os.killpg(self.process.pid, number)


def start_program(sweep: SweepFile, point: Point, root: Path, claim: Claim, *, num_workers: int) -> Program:
    """Start a point's program: its point as JSON, its output in `sweep.log`, both in its run's folder."""
    folder = root / point.name
    point_file, log = folder / "point.json", folder / "sweep.log"
    words = with_own_icl(
        fill_macros(sweep.command, point.settings, program=sweep.program, json_file=point_file.resolve())
    )
    try:
        write_atomically(point_file, (json.dumps(point.settings, indent=1) + "\n").encode())
        with log.open("ab") as output:
            output.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(words)}\n".encode())
            output.flush()
            begun = Program(point, claim, log, "not started")
            begun.process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=child_environment(point_file, root, num_workers=num_workers),
                start_new_session=True,  # a Ctrl-C reaches the engine alone, which passes it on once
                pass_fds=(claim.descriptor,),  # the attempt lives as long as the program does
                preexec_fn=_end_with_engine if sys.platform == "linux" else None,  # noqa: PLW1509 (one thread only)
            )
    except OSError as error:
        return Program(point, claim, log, f"cannot start `{words[0]}`: {error.strerror or error}")
    return begun


def _end_with_engine() -> None:
    """In the new process: ask Linux for a SIGTERM when the engine dies, so that a killed one leaves no orphans."""
    ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGTERM)
