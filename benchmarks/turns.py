"""Measure a ratio of times. Two programs, called sides, do the same work in turns, in one process.

The ratio is the median over turns, with quartiles. So if another process uses the CPU for a while, this affects only a few turns and
hardly changes the median. For the same reason, work that a program does only in a few turns has no effect on the median. So each turn
must be long enough to include every kind of work.
"""

import statistics
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

MIN_TURNS = 5


class Side(NamedTuple):
    """The work of one side in a turn."""

    call: Callable[[], object]
    calls: int = 32
    """Number of calls in a turn. If the side draws the prompts of several calls at once, `calls` must be a multiple of that number of calls."""


class Turn(NamedTuple):
    """The seconds that each side takes for the same work, in one turn."""

    peer: float
    ours: float


class Ratio(NamedTuple):
    """The result of a case: the median ratio with its quartiles, and the median time of each side for the work of one peer call."""

    name: str
    ratio: float
    low: float
    high: float
    peer_ms: float
    ours_ms: float
    target: str

    @classmethod
    def over(cls, turns: Iterable[Turn], *, name: str, target: str = "") -> "Ratio":
        """Return the median ratio over at least two turns."""
        peer, ours = zip(*turns, strict=True)
        low, middle, high = statistics.quantiles([p / o for p, o in zip(peer, ours, strict=True)], n=4)
        peer_ms, ours_ms = (1e3 * statistics.median(side) for side in (peer, ours))
        return cls(name, middle, low, high, peer_ms, ours_ms, target)


def take_turns(peer: Side, ours: Side, device: str, seconds: float, *, work: int = 1) -> list[Turn]:
    """Time both sides in turns, after a warm-up turn of each.

    Args:
        peer: The side of the other program.
        ours: The side of `icl`.
        device: Device on which both sides run.
        seconds: Total time in seconds. There are at least `MIN_TURNS` turns, even if they take longer.
        work: Number of the peer's calls that do the same work as one of our calls.
    """
    for side in (peer, ours):
        timed(side, device)
    turns: list[Turn] = []
    end = time.perf_counter() + seconds
    while len(turns) < MIN_TURNS or time.perf_counter() < end:
        turns.append(Turn(timed(peer, device), timed(ours, device) / work))
    return turns


def timed(side: Side, device: str) -> float:
    """Run one turn of a side, and return the seconds per call."""
    start = time.perf_counter()
    for _ in range(side.calls):
        side.call()
    wait_for(device)
    return (time.perf_counter() - start) / side.calls


def wait_for(device: str) -> None:
    """Wait until the device has finished its work."""
    if device == "cuda":
        torch.cuda.synchronize()
