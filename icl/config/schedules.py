"""Steps at which checkpoints are saved, and the learning rate as a function of the step.

Step s is the state after s updates, so step 0 is the initial model. A list of checkpoint steps is sorted and has no duplicates. It begins
with step 0 and ends with the last step. The points of linear and log-spaced grids are rounded down, as in the code of Hoogland et al. (2024) and
in Carroll et al. (2025), appendix A. Rounding down gives the grids of these papers: 190 steps out of 500,000 (from 100 log-spaced and 100
linear points), and 2,203 steps out of 150,000. Hoogland et al. count steps from zero and save after the update, so their step t is our step
t + 1. A rounding error in their code moves the end of their log grid from 500,000 to 499,999.
"""

import bisect
from collections.abc import Callable, Iterable, Sequence

import numpy as np


def linear_steps(max_steps: int, num: int) -> set[int]:
    """Return `num` evenly spaced steps from 0 to `max_steps`, rounded down. Equal steps are returned once."""
    return {_floor(step) for step in np.linspace(0, max_steps, num)} if num > 0 else set()


def log_steps(max_steps: int, num: int) -> set[int]:
    """Return `num` log-spaced steps from 1 to `max_steps`, rounded down. Equal steps are returned once."""
    return {_floor(step) for step in np.geomspace(1, max_steps, num)} if num > 0 else set()


def checkpoint_steps(max_steps: int, *, every: int | None = None, num_log: int = 0, num_linear: int = 0) -> list[int]:
    """Return step 0, the last step, and all steps of the three grids (`every`, log-spaced, linear), in order.

    Examples:
        >>> checkpoint_steps(100, every=50, num_log=3)
        [0, 1, 10, 50, 100]
    """
    steps = {0, max_steps} | linear_steps(max_steps, num_linear) | log_steps(max_steps, num_log)
    if every is not None:
        steps |= set(range(0, max_steps + 1, every))
    return sorted(steps)


def next_stop(step: int, *, every: Iterable[int | None], steps: Sequence[int]) -> int:
    """Return the first step after `step` that is a multiple of a number in `every`, or is in the sorted list `steps`.

    Examples:
        >>> next_stop(7, every=[5, None], steps=[0, 8, 100])
        8
    """
    later = bisect.bisect_right(steps, step)
    multiples = [(step // interval + 1) * interval for interval in every if interval is not None]
    return min([*multiples, *steps[later : later + 1]])


def rate_factor(schedule: str, *, warmup_steps: int | None, schedule_steps: int) -> Callable[[int], float]:
    """Return a function that maps s = 0, 1, ... to the learning rate of update s + 1, divided by the peak rate.

    `constant` is always 1. `warmup` rises to 1 at update `warmup_steps` and stays there. `triangle` rises to 1 at update
    `warmup_steps` (by default half of the schedule) and falls to 0 at update `schedule_steps`, so the last update changes
    nothing. A triangle with only one step is always 0. The OneCycleLR of Hoogland et al. (their config.py) ends at
    4 / (schedule_steps - 2)^2 of the peak instead of 0. With their 500,000 steps and peak of 3e-3, this is a rate of 4.8e-14.
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
    # The factor undoes rounding: a grid point that should be a whole number may be computed slightly below it.
    return int(step * (1 + 1e-12))
