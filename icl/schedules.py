"""Grids of steps to save at, and the learning rate as a function of the step.

Step s means after s updates. Grids are sorted, distinct, and begin with step 0 (the initial model) and end with the
last step. Grid points are rounded down, as in the code of Hoogland et al. and in Carroll et al., appendix A; so the grids
are theirs: 190 steps of 500,000 for the former (100 log-spaced, 100 linear), 2,203 of 150,000 for the latter. Hoogland et
al. count from zero and save after the update: their step t is our t + 1, and their log grid ends at 499,999.
"""

import bisect
from collections.abc import Callable, Iterable, Sequence

import numpy as np


def linear_steps(max_steps: int, num: int) -> set[int]:
    """`num` steps evenly spaced from 0 to `max_steps`, rounded down; fewer when they coincide."""
    return {_floor(step) for step in np.linspace(0, max_steps, num)} if num > 0 else set()


def log_steps(max_steps: int, num: int) -> set[int]:
    """`num` steps evenly spaced in log step from 1 to `max_steps`, rounded down; fewer when they coincide."""
    return {_floor(step) for step in np.geomspace(1, max_steps, num)} if num > 0 else set()


def checkpoint_steps(max_steps: int, *, every: int | None = None, num_log: int = 0, num_linear: int = 0) -> list[int]:
    """The union of the three grids with step 0 and the last step, in order.

    Example:
        >>> checkpoint_steps(100, every=50, num_log=3)
        [0, 1, 10, 50, 100]
    """
    steps = {0, max_steps} | linear_steps(max_steps, num_linear) | log_steps(max_steps, num_log)
    if every is not None:
        steps |= set(range(0, max_steps + 1, every))
    return sorted(steps)


def next_stop(step: int, *, every: Iterable[int | None], steps: Sequence[int]) -> int:
    """The first step after `step` that is on one of the grids: multiples of each of `every`, and the sorted `steps`.

    Example:
        >>> next_stop(7, every=[5, None], steps=[0, 8, 100])
        8
    """
    later = bisect.bisect_right(steps, step)
    multiples = [(step // interval + 1) * interval for interval in every if interval is not None]
    return min([*multiples, *steps[later : later + 1]])


def rate_factor(schedule: str, *, warmup_steps: int | None, schedule_steps: int) -> Callable[[int], float]:
    """Return the learning rate of update s + 1 as a share of the peak, for s = 0, 1, ...

    `triangle` rises to 1 at update `warmup_steps` (half of the schedule unless given) and falls to 0 at update
    `schedule_steps`, so the last update changes nothing. The OneCycleLR of Hoogland et al. (their config.py) ends at
    4 / (schedule_steps - 2)^2 of the peak instead: at 4.8e-14 for their 500,000 steps. A triangle of one step is zero
    throughout.
    """
    if schedule == "constant":
        return lambda step: 1.0
    if schedule == "warmup":
        rise = warmup_steps or 1
        return lambda step: min(1.0, (step + 1) / rise)
    rise = warmup_steps or max(1, schedule_steps // 2)
    fall = max(1, schedule_steps - rise)
    return lambda step: max(0.0, min((step + 1) / rise, (schedule_steps - 1 - step) / fall))


def _floor(step: float) -> int:
    """The whole step below, forgiving what the logarithm rounded."""
    return int(step * (1 + 1e-12))
