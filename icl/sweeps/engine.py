"""The engine of `icl sweep`: runs what is missing of a sweep, a few points at a time, each in a program of its own.

It keeps no state but the runs' folders. So the same command after any interruption does only what is missing, and any
number of engines, on any machines that share the folder, work on one sweep without doing a point twice. A point that
fails fails alone, and is tried again by the next command, unless the same settings would fail again. An engine that
joins others at work belongs to their session, and does not repeat what has failed in it. A signal is passed on; the
programs save and exit.
"""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from icl.storage import StorageError
from icl.sweeps.attempts import BEAT_SECONDS, STALE_SECONDS, Claim, claim, last_attempt, session_start
from icl.sweeps.points import Point
from icl.sweeps.program import Program, start_program
from icl.sweeps.schema import SweepFile
from icl.sweeps.state import PointState, point_state

_TICK_SECONDS = 0.1
_TELL_SECONDS = 60.0
"""Between two lines on how far a running point is."""


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
    pack: int = 1,
    retry: bool = False,
    stale_after: float = STALE_SECONDS,
    say: Callable[[str], None] = print,
) -> SweepResult:
    """Run every point that is not done, until all are done or have failed, or a signal comes.

    Args:
        sweep: The file, for its command.
        points: Its points.
        root: The folder of all runs.
        num_workers: Programs at a time.
        pack: At most so many points per program, trained as one population if their settings let them.
        retry: Whether to try every failed point again, also one that would fail again or has failed in this session.
        stale_after: Seconds without a sign of life after which another machine's worker counts as dead.
        say: Takes a line for every event.
    """
    engine = _Engine(sweep, points, root, num_workers, pack, retry, stale_after, say)
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
        pack: int,
        retry: bool,
        stale_after: float,
        say: Callable[[str], None],
    ) -> None:
        self.sweep, self.root, self.num_workers, self.pack = sweep, root, num_workers, pack
        self.retry, self.stale_after = retry, stale_after
        self.num_points = len(points)
        self.pending = list(points)
        self.programs: list[Program] = []
        self.received: signal.Signals | None = None
        self._say = say
        self._told: signal.Signals | None = None
        self._beat_at = self._look_at = 0.0
        self._tell_at = time.monotonic() + _TELL_SECONDS
        self._said_waiting = False
        self._resumes: dict[int, str] = {}
        self._attempts = self._past_attempts(points)

    def state(self, point: Point) -> PointState:
        """Where a point stands."""
        return point_state(point, self.root, stale_after=self.stale_after)

    def _past_attempts(self, points: Sequence[Point]) -> dict[int, int]:
        """The number of each point's last attempt before the session of this engine; a failure after it is not repeated.

        If other engines are at work, their session is this one's, so what has failed in it counts as failed.
        """
        states = {point.number: self.state(point) for point in points}
        last = {point.number: last_attempt(self.root / point.name) for point in points}
        attempts = {number: attempt for number, attempt in last.items() if attempt is not None}
        live = {number for number, attempt in attempts.items() if states[number].state == attempt.outcome == "running"}
        over = {number for number, attempt in attempts.items() if attempt.ended is not None}
        start = session_start([attempts[number] for number in live], [attempts[number] for number in over])
        recent = {number for number in over if (attempts[number].ended or 0.0) >= start and not self.retry}
        return {number: state.attempt - (number in live | recent) for number, state in states.items()}

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
        self._tell_progress()
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
            if point in self.pending:
                self._start(self._claim_together(point))
        self._look_at = time.monotonic() + min(1.0, self.stale_after / 4)  # what is left is in other hands
        if self.pending and not self.programs and not self._said_waiting:
            self._said_waiting = True
            self._say(f"Waiting for {len(self.pending)} points that other workers hold.")

    def _claim_together(self, first: Point) -> list[tuple[Point, Claim]]:
        """Claim a point, and with it the points that can be packed into its program."""
        claimed: list[tuple[Point, Claim]] = []
        shared = first.config.shared_settings() if self.pack > 1 else {}
        for point in [first, *(point for point in self.pending if point is not first)]:
            if len(claimed) == self.pack or (point is not first and not claimed):
                break
            if point is first or point.config.shared_settings() == shared:
                own = self._claim(point)
                claimed += [(point, own)] if own is not None else []
        return claimed

    def _claim(self, point: Point) -> Claim | None:
        """Settle a point that is done or that somebody else has just failed, or claim it."""
        state = self.state(point)
        if state.state == "running" or self._is_settled(point, state):
            return None
        self._resumes[point.number] = f" ({state.reason})" if state.attempt or state.state == "failed" else ""
        try:
            return claim(self.root / point.name, point.job, number=state.attempt + 1)
        except OSError as error:
            self._settle(point, f"failed   {point.name}: cannot write its folder ({error.strerror})")
            return None

    def _start(self, work: list[tuple[Point, Claim]]) -> None:
        for point, _ in work:
            self.pending.remove(point)
            self._tell(f"started  {point.name}{self._resumes[point.number]}")
        if work:
            self.programs.append(start_program(self.sweep, work, root=self.root, num_workers=self.num_workers))

    def _is_settled(self, point: Point, state: PointState) -> bool:
        if state.state == "done":
            self._settle(point, f"done     {point.name}: {state.reason}")
        elif state.state == "failed" and (
            state.attempt > self._attempts[point.number] or (state.is_final and not self.retry)
        ):
            self._settle(point, f"failed   {point.name}: {state.reason}")
        return point not in self.pending

    def _end_programs(self) -> None:
        for program in [program for program in self.programs if not program.is_running()]:
            self.programs.remove(program)
            self._look_at = 0.0
            with contextlib.suppress(StorageError):  # the next command will find the point unfinished
                program.record(stopping=self.received)
            for point in program.points:
                self._tell_end(program, point)

    def _tell_end(self, program: Program, point: Point) -> None:
        state = self.state(point)
        word = "lost" if program.is_lost else {"waiting": "stopped"}.get(state.state, state.state)
        log = f"; see {program.log}" if state.state == "failed" else ""
        if program.is_lost:
            self.pending.append(point)
        self._tell(f"{word:8s} {point.name}: {state.reason}, {program.seconds:.0f} s{log}")

    def _beat(self) -> None:
        if time.monotonic() < self._beat_at:
            return
        self._beat_at = time.monotonic() + min(BEAT_SECONDS, self.stale_after / 4)
        for program in self.programs:
            if not program.beat() and not program.is_lost:
                program.is_lost = True
                program.stop()

    def _tell_progress(self) -> None:
        """Now and then, a line for each point that runs."""
        if time.monotonic() >= self._tell_at:
            self._tell_at = time.monotonic() + _TELL_SECONDS
            for program in self.programs:
                for point in program.points:
                    self._tell(f"running  {point.name}: {self.state(point).reason}")

    def _settle(self, point: Point, line: str) -> None:
        self.pending.remove(point)
        self._tell(line)

    def _tell(self, line: str) -> None:
        """A line for an event, with how many points are over of how many."""
        num_over = self.num_points - len(self.pending) - sum(len(program.points) for program in self.programs)
        self._say(f"[{num_over}/{self.num_points}] {line}")
