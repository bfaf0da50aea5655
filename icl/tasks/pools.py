"""Pools of tasks that change during training. The tasks at a step are computed directly, without the pools of earlier steps.

Task m of a pool is a pure function of (seed, m, step). So pools are nested at every step, and a resumed run has the same pool.

- `fixed`: the tasks do not change.
- `resampled`: all tasks are new every n steps. During steps 0 to n - 1 the pool is the same as with `fixed`.
- `walk`: every coordinate of every task is an independent stationary Gaussian process over the steps, with mean 0 and
  Cov(w(s), w(t)) = exp(-|s - t| / n). This is the Ornstein-Uhlenbeck process at whole steps, which is the AR(1) process
  w(t + 1) = rho w(t) + sqrt(1 - rho^2) z with rho = exp(-1 / n). At every step the tasks are N(0, I). At step 0 the pool is the same as
  with `fixed`.

To compute the walk at a step, we halve an interval of steps until its length is 1. Its left end is then the requested step.
The first interval lies between two neighbouring multiples of 2^L. The number of halvings L is the smallest whole number for
which 2^L is at least 40 n, where n is the correlation time in steps. The values at multiples of 2^L are drawn independently.
In the exact process, their correlation is at most e^-40, which is smaller than the rounding errors. The value at the middle
of an interval is drawn given the values at both ends. Let h be the length of each half, and r = exp(-h / n). Because the process is Markov,
the value at the middle is normal with mean r (left + right) / (1 + r^2) and variance (1 - r^2) / (1 + r^2). Every step t is a multiple
of 2^L or the middle of exactly one interval, so t itself can be the counter of the random numbers for step t. For the pool at any step, we
draw L + 2 normals per coordinate.
"""

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from icl import rng
from icl.tasks.laws import GAUSSIAN_TASKS, TaskLaw, draw_tasks

POOL_STREAM = "tasks"
"""Name of the random stream for the sequence of tasks."""
_MIN_DECAY = 40
"""Minimum distance, in correlation times, between two steps whose values are drawn independently."""


class PoolSchedule(NamedTuple):
    """Rule by which a pool changes over the training steps."""

    name: Literal["fixed", "resampled", "walk"] = "fixed"
    steps: int | None = None
    """Number n of training steps. `resampled`: steps from one pool to the next. `walk`: the correlation time."""


FIXED = PoolSchedule()


def tasks_at(
    seed: int,
    times: Int64[Tensor, " S"],
    indices: Int64[Tensor, " B"],
    task_size: int,
    *,
    law: TaskLaw = GAUSSIAN_TASKS,
    schedule: PoolSchedule = FIXED,
) -> Float[Tensor, "S B D"]:
    """Return the tasks at the positions `indices` of the sequence, for each of the training steps `times`.

    `law` is the distribution of the tasks. The schedule `walk` ignores `law`: its tasks are N(0, I).
    """
    key = rng.stream(seed, POOL_STREAM)
    if schedule.name == "walk":
        assert schedule.steps is not None
        return _walk(key, times, indices, task_size, correlation_time=schedule.steps)
    if schedule.name == "resampled":
        assert schedule.steps is not None
        epochs = torch.div(times, schedule.steps, rounding_mode="floor")
        return draw_tasks(law, key, epochs, indices, task_size)
    start = torch.zeros(1, dtype=torch.int64, device=times.device)
    return draw_tasks(law, key, start, indices, task_size).expand(len(times), -1, -1)


def tree_depth(correlation_time: int) -> int:
    """Return the number L of halvings: the smallest L for which 2^L is at least 40 correlation times."""
    return (_MIN_DECAY * correlation_time - 1).bit_length()


def _walk(
    key: rng.Stream,
    times: Int64[Tensor, " S"],
    indices: Int64[Tensor, " B"],
    task_size: int,
    *,
    correlation_time: int,
) -> Float[Tensor, "S B {task_size}"]:
    depth = tree_depth(correlation_time)
    begin = times - times % 2**depth  # S
    halves = [2**level for level in reversed(range(depth))]
    middles = [times - times % (2 * half) + half for half in halves]
    nodes = torch.stack([begin, begin + 2**depth, *middles])  # L+2 S
    normals = rng.normal(key, nodes.flatten(), indices, task_size).unflatten(0, nodes.shape)  # L+2 S B D
    left, right = normals[0], normals[1]
    if normals.device.type != "mps":  # MPS has no float64
        left, right = left.double(), right.double()
    for half, middle, noise in zip(halves, middles, normals[2:], strict=True):
        decay = math.exp(-half / correlation_time)
        spread = math.sqrt(-math.expm1(-2 * half / correlation_time) / (1 + decay**2))
        value = decay / (1 + decay**2) * (left + right) + spread * noise  # S B D
        is_after = (times >= middle)[:, None, None]
        left, right = torch.where(is_after, value, left), torch.where(is_after, right, value)
    return left.float()
