"""A ratio of times: two sides take turns at the same work, in one process with the same threads and precision.

The ratio is the median over turns, with quartiles: what another process takes away for a while costs some turns and no
more. A cost that falls into few turns would vanish likewise, so a turn is long enough to have its share of every one.
"""

import statistics
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

MIN_TURNS = 5


class Side(NamedTuple):
    """What one side does in a turn."""

    call: Callable[[], object]
    calls: int = 32
    """How often: a whole number of blocks of prompts, where the side makes some for several calls at once."""


class Turn(NamedTuple):
    """Both sides' seconds for the same work."""

    peer: float
    ours: float


class Ratio(NamedTuple):
    """A case's outcome: the median ratio with its quartiles, and both sides' median times for the peer's work."""

    name: str
    ratio: float
    low: float
    high: float
    peer_ms: float
    ours_ms: float
    target: str

    @classmethod
    def over(cls, turns: Iterable[Turn], *, name: str, target: str = "") -> "Ratio":
        """The ratio that these turns, two or more, give."""
        peer, ours = zip(*turns, strict=True)
        low, middle, high = statistics.quantiles([p / o for p, o in zip(peer, ours, strict=True)], n=4)
        peer_ms, ours_ms = (1e3 * statistics.median(side) for side in (peer, ours))
        return cls(name, middle, low, high, peer_ms, ours_ms, target)


def take_turns(peer: Side, ours: Side, device: str, seconds: float, *, work: int = 1) -> list[Turn]:
    """Time both sides in turns for so many seconds, after warming both up.

    Args:
        peer: The side that we are measured against.
        ours: Ours.
        device: Where both run.
        seconds: For how long, but for `MIN_TURNS` turns at least.
        work: How many of the peer's calls one of ours replaces.
    """
    for side in (peer, ours):
        timed(side, device)
    turns: list[Turn] = []
    end = time.perf_counter() + seconds
    while len(turns) < MIN_TURNS or time.perf_counter() < end:
        turns.append(Turn(timed(peer, device), timed(ours, device) / work))
    return turns


def timed(side: Side, device: str) -> float:
    """Seconds per call."""
    start = time.perf_counter()
    for _ in range(side.calls):
        side.call()
    wait_for(device)
    return (time.perf_counter() - start) / side.calls


def wait_for(device: str) -> None:
    """Until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
