"""The engine of `icl sweep`. It runs the points that are not done, a few at a time, each in a separate program.

A point is one combination of the sweep's settings. The whole state of a sweep is in the folders of its runs. So the same command
continues a sweep after any interruption. Any number of engines, on any machines that share these folders, can work on one sweep
without running a point twice. Each process of `icl sweep` has one engine, and is called a worker (`icl.sweeps.attempts`).

A point that fails does not stop the other points. The next `icl sweep` command tries the point again, unless the same settings
would fail again. A session is a series of attempts without a long pause (`attempts.session_start`). An engine that starts while other
engines work on the sweep joins their session: it does not repeat points that have failed since the session began. If the engine receives a
signal, it asks its programs to save and exit.

In a job of Slurm, the session begins when the jobs are submitted. The engine also stops before the time limit of the job. The engine does
not wait for points that run in other jobs, because its own job would occupy a machine during the wait.
"""

import contextlib
import math
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import NamedTuple

from icl.progress import print_at_once
from icl.signals import handling
from icl.sweeps import attempts
from icl.sweeps.attempts import Claim, claim, last_attempt, session_start
from icl.sweeps.points import Point
from icl.sweeps.program import Program, start_program
from icl.sweeps.schema import SweepFile
from icl.sweeps.slurm.job import SlurmJob
from icl.sweeps.state import PointState, point_state
from icl.sweeps.storage import StorageWatch

_TICK_SECONDS = 0.1
_PROGRESS_SECONDS = 60.0
"""Interval, in seconds, between two lines about the progress of a running point."""


class SweepResult(NamedTuple):
    """The state of a sweep when `run_sweep` returns."""

    states: dict[int, PointState]
    """The state of each point, keyed by `Point.number`."""
    received: signal.Signals | None = None
    """The signal that stopped the engine, or None if no signal stopped it."""
    has_progressed: bool = False
    """Whether any program of this engine has finished a point or made progress on a point."""
    num_failed: int = 0
    """Number of points that failed in this engine."""

    @property
    def is_done(self) -> bool:
        """Whether every point is done."""
        return all(state.state == "done" for state in self.states.values())

    @property
    def is_over(self) -> bool:
        """Whether every point is done or has failed."""
        return all(state.state in ("done", "failed") for state in self.states.values())


def run_sweep(
    sweep: SweepFile,
    points: Sequence[Point],
    root: Path,
    *,
    num_workers: int = 1,
    pack: int = 1,
    retry: bool = False,
    job: SlurmJob | None = None,
    say: Callable[[str], None] = print_at_once,
) -> SweepResult:
    """Run every point that is not done, until all are done or have failed, or a signal arrives.

    Args:
        sweep: The sweep file. Its `command` starts the program of a point.
        points: The points of the sweep.
        root: Folder of all runs.
        num_workers: Number of programs that run at a time.
        pack: Largest number of points in one program. The program trains these points as one population, if their
            settings allow this.
        retry: Whether to try every failed point again, even a point that would fail again or has failed in this session.
        job: The job of Slurm in which this process runs; None outside of Slurm.
        say: Function that receives a line for each event.
    """
    engine = _Engine(sweep, points, root, num_workers=num_workers, pack=pack, retry=retry, job=job, say=say)
    with handling(dict.fromkeys((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), engine.receive)):
        engine.run()
    states = {point.number: engine.state(point) for point in points}
    return SweepResult(states, engine.received, engine.has_progressed, engine.num_failed)


@dataclass
class _Engine:
    """The loop that starts, watches and ends the programs of a sweep. The first fields are the arguments of `run_sweep`."""

    sweep: SweepFile
    points: Sequence[Point]
    root: Path
    _: KW_ONLY
    num_workers: int
    pack: int
    retry: bool
    job: SlurmJob | None
    say: Callable[[str], None]
    received: signal.Signals | None = None
    programs: list[Program] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pending = list(self.points)
        self.has_progressed = False
        self.num_failed = 0
        self._num_over = 0
        self._stopping: str | None = None
        self._leaves = False
        with contextlib.suppress(OSError):  # if the folder cannot be made, this is reported for each point
            self.root.mkdir(parents=True, exist_ok=True)
        own_mark = self.root if self.root.is_dir() else None
        self._storage = StorageWatch(own_mark if self.job is None else self.job.mark, self.say)
        self._next_beat = self._next_search = 0.0
        self._next_progress = time.monotonic() + _PROGRESS_SECONDS
        self._has_said_waiting = False
        self._earlier_attempts = self._count_earlier_attempts()

    def state(self, point: Point) -> PointState:
        """Return the state of a point."""
        return point_state(point, self.root)

    def receive(self, number: int, frame: object) -> None:
        """Record a signal. Outside of Slurm, a second signal kills the programs. Slurm repeats signals, and kills programs itself."""
        if self.received is not None and self.job is None:
            for program in self.programs:
                program.kill()
        self.received = self.received or signal.Signals(number)

    def run(self) -> None:
        """Run points until nothing is left to do. At the end, stop all programs, even after an error."""
        try:
            while self.programs or (self.pending and self._stopping is None and not self._leaves):
                self._check_stop()
                try:
                    if self._storage.is_there():
                        self._tick()
                except OSError as error:
                    self._storage.lose(error)
                if not self._storage.is_there():
                    self._bear_lost_storage()
                if self.programs or self.pending:
                    time.sleep(_TICK_SECONDS)
        finally:
            for program in self.programs:
                program.stop()

    def _tick(self) -> None:
        self._finish_programs()
        self._refresh_claims()
        if self._stopping is None:
            self._start_programs()
        self._report_progress()

    def _check_stop(self) -> None:
        """Stop the programs if a signal has arrived, or if the time limit of the job is near."""
        reason = None if self.received is None else f"stopped by {self.received.name}"
        if reason is None and self.job is not None:
            reason = self.job.stop_reason()
            if self.job.must_kill():
                for program in self.programs:
                    program.kill()
        if reason is not None and self._stopping is None:
            self._stopping = reason
            self._stop()

    def _bear_lost_storage(self) -> None:
        """Record that every program has lost access to the folder of the runs. If the sweep is being stopped, forget the programs that have ended."""
        for program in self.programs:
            program.has_lost_storage = True
        if self._stopping is not None:
            self.programs = [program for program in self.programs if program.is_running()]

    def _count_earlier_attempts(self) -> dict[int, int]:
        """Return, for each point's `number`, the number of attempts that ended before the present session.

        The present session began when the first of the engines that are at work started; in a job of Slurm, when the jobs were
        submitted. If a point has failed in a later attempt than the returned number, the point failed in the present session, so `_claim`
        does not try it again. With `retry`, outside of Slurm, the session begins now, so every failed point is tried again.
        """
        states = {point.number: self.state(point) for point in self.points}
        last = {point.number: last_attempt(self.root / point.name) for point in self.points}
        earlier = {number: attempt for number, attempt in last.items() if attempt is not None}
        live = {number for number, attempt in earlier.items() if states[number].state == attempt.outcome == "running"}
        ended = {number for number, attempt in earlier.items() if attempt.ended is not None}
        start = session_start([earlier[number] for number in live], [earlier[number] for number in ended])
        if self.retry:
            start = math.inf
        if self.job is not None:
            start = min(start, self.job.since)
        recent = {number for number in ended if (earlier[number].ended or 0.0) >= start}
        return {number: state.attempt - (number in live | recent) for number, state in states.items()}

    def _stop(self) -> None:
        """Send SIGTERM to the programs, so that they save and exit."""
        if self.received is not None and self.programs:
            self.say(
                f"{self.received.name}: the sweep stops when the running programs ({len(self.programs)}) have saved. "
                "Send the signal again to kill them."
            )
        for program in self.programs:
            program.stop()

    def _start_programs(self) -> None:
        """Start programs for the first points that no other worker runs, until `num_workers` programs run."""
        if len(self.programs) >= self.num_workers or time.monotonic() < self._next_search:
            return
        for point in list(self.pending):
            if len(self.programs) >= self.num_workers or self.received is not None:
                return
            if point in self.pending:
                work = self._claim_together(point)
                if work:
                    program = start_program(self.sweep, work, root=self.root, num_workers=self.num_workers)
                    self.programs.append(program)
        # Other workers run the points that are left, so search again later.
        self._next_search = time.monotonic() + min(1.0, attempts.STALE_SECONDS / 4)
        self._leaves = self.job is not None and not self.programs
        if self.pending and not self.programs and not self._leaves and not self._has_said_waiting:
            self._has_said_waiting = True
            self.say(f"Waiting for {len(self.pending)} points that other workers run.")

    def _claim_together(self, first: Point) -> list[tuple[Point, Claim]]:
        """Claim a point and the points that can be packed into its program. Return the claimed points with their claims."""
        work: list[tuple[Point, Claim]] = []
        shared = first.config.shared_settings() if self.pack > 1 else {}
        for point in [first, *(point for point in self.pending if point is not first)]:
            if len(work) == self.pack or (point is not first and not work):
                break
            if point is first or point.config.shared_settings() == shared:
                own_claim = self._claim(point)
                work += [(point, own_claim)] if own_claim is not None else []
        return work

    def _claim(self, point: Point) -> Claim | None:
        """Claim a point. Return None if another worker runs the point. If the point is done or has failed, report this and return None."""
        state = self.state(point)
        if state.state == "running":
            return None
        has_failed_now = state.attempt > self._earlier_attempts[point.number] or (state.is_final and not self.retry)
        if state.state == "done" or (state.state == "failed" and has_failed_now):
            if not self._storage.is_there(now=True):  # the state was read from a missing or empty folder
                return None
            self._close(point, f"{state.state:8s} {point.name}: {state.reason}")
            return None
        try:
            own_claim = claim(self.root / point.name, point.job, number=state.attempt + 1)
        except OSError as error:
            if self._storage.is_there(now=True):
                self.pending.remove(point)
                self._num_over += 1
                self.num_failed += 1
                self._report(f"failed   {point.name}: cannot write its folder ({error.strerror})")
            return None
        if own_claim is not None:
            earlier = f" ({state.reason})" if state.attempt or state.state == "failed" else ""
            self.pending.remove(point)
            self._report(f"started  {point.name}{earlier}")
        return own_claim

    def _finish_programs(self) -> None:
        ended = [program for program in self.programs if not program.is_running()]
        if ended and not self._storage.is_there(now=True):  # otherwise, recording would make a new folder
            return
        for program in ended:
            self.programs.remove(program)
            self._next_search = 0.0
            with contextlib.suppress(OSError):  # the next command will find the point unfinished
                program.record(stopping=self._stopping)
            for point in program.points:
                self._report_end(program, point)

    def _report_end(self, program: Program, point: Point) -> None:
        state = self.state(point)
        word = "lost" if program.is_lost else {"waiting": "stopped"}.get(state.state, state.state)
        log = f"; see {program.log}" if state.state == "failed" else ""
        self.has_progressed |= state.state in ("done", "failed") or program.has_progressed(point)
        if program.is_lost or (program.has_lost_storage and state.state == "waiting" and self._stopping is None):
            self.pending.append(point)
        else:
            self._num_over += 1
            self.num_failed += state.state == "failed"
        self._report(f"{word:8s} {point.name}: {state.reason}, {program.seconds:.0f} s{log}")

    def _refresh_claims(self) -> None:
        """Show other workers that this worker is alive. Stop a program if another worker has taken over one of its points."""
        if time.monotonic() < self._next_beat:
            return
        self._next_beat = time.monotonic() + min(attempts.BEAT_SECONDS, attempts.STALE_SECONDS / 4)
        for program in self.programs:
            if not program.beat() and not program.is_lost:
                program.is_lost = True
                program.stop()

    def _report_progress(self) -> None:
        """Print a line for each running point once a minute."""
        if time.monotonic() >= self._next_progress:
            self._next_progress = time.monotonic() + _PROGRESS_SECONDS
            for program in self.programs:
                for point in program.points:
                    self._report(f"running  {point.name}: {self.state(point).reason}")

    def _close(self, point: Point, line: str) -> None:
        """Report a point for which no program is started, for example because it is done. In a job of Slurm, count the point without a report."""
        self.pending.remove(point)
        self._num_over += 1
        if self.job is None:
            self._report(line)

    def _report(self, line: str) -> None:
        """Print a line for an event. The line begins with the number of points that are done or have failed, and the number of all points."""
        self.say(f"[{self._num_over}/{len(self.points)}] {line}")
