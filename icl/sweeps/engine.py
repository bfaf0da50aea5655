"""The engine of `icl sweep`: runs what is missing of a sweep, a few points at a time, each in a program of its own.

It keeps no state but the runs' folders. So the same command after any interruption does only what is missing, and any
number of engines, on any machines that share the folder, work on one sweep without doing a point twice. A point that
fails fails alone, and is tried again by the next command. A signal is passed on; the programs save and exit.
"""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from icl.storage import StorageError
from icl.sweeps.attempts import BEAT_SECONDS, STALE_SECONDS, claim
from icl.sweeps.points import Point
from icl.sweeps.program import Program, start_program
from icl.sweeps.schema import SweepFile
from icl.sweeps.state import PointState, point_state

_TICK_SECONDS = 0.1


class SweepResult(NamedTuple):
    """How a call of the engine ended."""

    states: dict[int, PointState]
    """Where each point stood at the end, by its number."""
    received: signal.Signals | None = None
    """What stopped it before the end, if anything did."""

    @property
    def is_done(self) -> bool:
        """Whether every point is done."""
        return all(state.state == "done" for state in self.states.values())


def run_sweep(
    sweep: SweepFile,
    points: Sequence[Point],
    root: Path,
    *,
    num_workers: int = 1,
    stale_after: float = STALE_SECONDS,
    say: Callable[[str], None] = print,
) -> SweepResult:
    """Run every point that is not done, until all are done or have failed, or a signal comes.

    Args:
        sweep: The file, for its command.
        points: Its points.
        root: The folder of all runs.
        num_workers: Programs at a time.
        stale_after: Seconds without a sign of life after which another machine's worker counts as dead.
        say: Takes a line for every event.
    """
    engine = _Engine(sweep, points, root, num_workers, stale_after, say)
    with engine.listening():
        engine.run()
    return SweepResult({point.number: engine.state(point) for point in points}, engine.received)


class _Engine:
    """The loop's own variables."""

    def __init__(
        self,
        sweep: SweepFile,
        points: Sequence[Point],
        root: Path,
        num_workers: int,
        stale_after: float,
        say: Callable[[str], None],
    ) -> None:
        self.sweep, self.root, self.num_workers, self.stale_after = sweep, root, num_workers, stale_after
        self.num_points = len(points)
        self.pending = list(points)
        self.programs: list[Program] = []
        self.received: signal.Signals | None = None
        self._say = say
        self._told: signal.Signals | None = None
        self._beat_at = self._look_at = 0.0
        self._said_waiting = False
        self._attempts = {point.number: self.state(point).attempt for point in points}

    def state(self, point: Point) -> PointState:
        """Where a point stands."""
        return point_state(point, self.root, stale_after=self.stale_after)

    def run(self) -> None:
        """Until nothing is left to do; whatever ends it early, no program is left behind."""
        try:
            while self.programs or (self.pending and self.received is None):
                self._turn()
        finally:
            for program in self.programs:
                program.stop()

    def _turn(self) -> None:
        if self.received is not self._told:
            self._stop()
        self._end_programs()
        self._beat()
        if self.received is None:
            self._start_programs()
        if self.programs or self.pending:
            time.sleep(_TICK_SECONDS)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take signals to stop, except those that the user has told us to ignore (`nohup`)."""
        numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
        before = {number: signal.getsignal(number) for number in numbers}
        for number in numbers:
            if before[number] is not signal.SIG_IGN:
                signal.signal(number, self._receive)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        if self.received is not None:
            for program in self.programs:
                program.kill()
        self.received = self.received or signal.Signals(number)

    def _stop(self) -> None:
        """Pass a signal on, once, as SIGTERM: it is what programs know to save on."""
        self._told = self.received
        if self.received is not None and self.programs:
            self._say(
                f"{self.received.name}: stopping, as soon as what runs ({len(self.programs)}) has saved; send it again to kill."
            )
        for program in self.programs:
            program.stop()

    def _start_programs(self) -> None:
        """Fill the free places with the first points that nobody works on."""
        if len(self.programs) >= self.num_workers or time.monotonic() < self._look_at:
            return
        for point in list(self.pending):
            if len(self.programs) >= self.num_workers or self.received is not None:
                return
            self._consider(point)
        self._look_at = time.monotonic() + min(1.0, self.stale_after / 4)  # what is left is in other hands
        if self.pending and not self.programs and not self._said_waiting:
            self._said_waiting = True
            self._say(f"Waiting for {len(self.pending)} points that other workers hold.")

    def _consider(self, point: Point) -> None:
        """Settle a point that is done or that somebody else has just failed, or start it."""
        state = self.state(point)
        if state.state == "running":
            return
        if self._is_settled(point, state):
            return
        try:
            own = claim(self.root / point.name, point.job, number=state.attempt + 1)
        except OSError as error:
            self._settle(point, f"failed   {point.name}: cannot write its folder ({error.strerror})")
            return
        if own is None:
            return
        self.pending.remove(point)
        self.programs.append(start_program(self.sweep, point, self.root, own, num_workers=self.num_workers))
        resumes = f" ({state.reason})" if state.attempt or state.state == "failed" else ""
        self._tell(f"started  {point.name}{resumes}")

    def _is_settled(self, point: Point, state: PointState) -> bool:
        if state.state == "done":
            self._settle(point, f"done     {point.name}: {state.reason}")
        elif state.state == "failed" and state.attempt > self._attempts[point.number]:
            self._settle(point, f"failed   {point.name}: {state.reason}")
        return point not in self.pending

    def _end_programs(self) -> None:
        for program in [program for program in self.programs if not program.is_running()]:
            self.programs.remove(program)
            self._look_at = 0.0
            with contextlib.suppress(StorageError):  # the next command will find the point unfinished
                program.record(stopping=self.received)
            state = self.state(program.point)
            word = "lost" if program.is_lost else {"waiting": "stopped"}.get(state.state, state.state)
            log = f"; see {program.log}" if state.state == "failed" else ""
            if program.is_lost:
                self.pending.append(program.point)
            self._tell(f"{word:8s} {program.point.name}: {state.reason}, {program.seconds:.0f} s{log}")

    def _beat(self) -> None:
        if time.monotonic() < self._beat_at:
            return
        self._beat_at = time.monotonic() + min(BEAT_SECONDS, self.stale_after / 4)
        for program in self.programs:
            if not program.claim.beat() and not program.is_lost:
                program.is_lost = True
                program.stop()

    def _settle(self, point: Point, line: str) -> None:
        self.pending.remove(point)
        self._tell(line)

    def _tell(self, line: str) -> None:
        """A line for an event, with how many points are over of how many."""
        num_over = self.num_points - len(self.pending) - len(self.programs)
        self._say(f"[{num_over}/{self.num_points}] {line}")
