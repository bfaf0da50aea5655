"""Task priors p(w): the law of new tasks (M = inf), or the uniform distribution on a pool of M tasks.

The law is the distribution of one new task, usually N(0, I). `icl.tasks.laws` defines all laws. The tasks of a pool are drawn independently
from the law. `icl.tasks.pools` defines the pools that change during training.

A pool consists of the first M tasks of one endless sequence, in which task m is a pure function of (seed, m). So pools are nested: every
larger pool begins with the tasks of the smaller one. Raventos et al. (2023), section 2, define both priors. The nesting follows Carroll et
al. (2025), section 3.1. We store no table of tasks: for a prompt of task 1,000,000 we compute only the vector of this task.

Runs imported from other code have their own tasks, which `icl import` saves as a table. The table's digest then replaces the seed.
`keep_table` registers a table in this process. Equal digests always mean equal tables.
"""

import hashlib
import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from icl import rng
from icl.compute.devices import require_memory
from icl.config import RunConfig
from icl.config.validation import ConfigError, is_table_name, parse_num_tasks, whole
from icl.tasks.laws import GAUSSIAN_TASKS, TaskLaw, draw_tasks
from icl.tasks.pools import FIXED, PoolSchedule, tasks_at

_TABLES: dict[str, Tensor] = {}
"""Imported tables of tasks that this process has read, keyed by digest."""


class Gaussian(NamedTuple):
    """Gaussian prior w ~ N(0, I_D), under which every prompt has a new task."""

    task_size: int


class Continuous(NamedTuple):
    """Prior of new tasks other than N(0, I_D). Every prompt has a new task, drawn from `law`."""

    task_size: int
    law: TaskLaw


class Discrete(NamedTuple):
    """Uniform prior on the first `num_tasks` tasks of the sequence of `seed`, or of an imported table whose digest is `seed`."""

    num_tasks: int
    task_size: int
    seed: int | str
    law: TaskLaw = GAUSSIAN_TASKS
    schedule: PoolSchedule = FIXED
    time: int | None = None
    """Training step whose pool is used, if the pool changes. If None, each prompt uses the pool of its own step."""


Prior: TypeAlias = Gaussian | Continuous | Discrete


def sample_tasks(
    priors: Sequence[Prior],
    keys: Sequence[rng.Stream],
    steps: Int64[Tensor, " S"],
    indices: Int64[Tensor, " B"],
) -> Float[Tensor, "N S B D"]:
    """Draw one task for each prior, step and index.

    Priors whose pools belong to the same sequence are handled in one call. So are priors of new tasks with the same law.
    """
    sequences = [prior._replace(num_tasks=1) if isinstance(prior, Discrete) else prior for prior in priors]
    drawn: dict[int, Tensor] = {}
    for sequence in dict.fromkeys(sequences):
        members = [member for member, other in enumerate(sequences) if other == sequence]
        key = rng.together([keys[member] for member in members], device=steps.device)
        if isinstance(sequence, Discrete):
            pools = [priors[member] for member in members]
            bounds = [pool.num_tasks for pool in pools if isinstance(pool, Discrete)]
            tasks = _tasks(sequence, steps, rng.integers(key, steps, indices, bounds), max(bounds))
        else:
            law = sequence.law if isinstance(sequence, Continuous) else GAUSSIAN_TASKS
            tasks = draw_tasks(law, key, steps, indices, sequence.task_size)
        drawn |= dict(zip(members, tasks, strict=True))
    return torch.stack([drawn[member] for member in range(len(priors))])


def task_prior(
    num_tasks: int | float,
    task_size: int,
    seed: int | str,
    *,
    law: TaskLaw = GAUSSIAN_TASKS,
    schedule: PoolSchedule = FIXED,
    time: int | None = None,
) -> Prior:
    """Return the prior for task diversity M: `Discrete` if M is finite, otherwise `Gaussian` or `Continuous`.

    `time` is the training step whose pool is used.
    """
    num_tasks = parse_num_tasks(num_tasks)
    if num_tasks != math.inf:
        return Discrete(int(num_tasks), task_size, seed, law, schedule, time)
    return Gaussian(task_size) if law == GAUSSIAN_TASKS else Continuous(task_size, law)


def task_sequence(config: RunConfig) -> int | str:
    """Return what identifies the sequence whose first M tasks are the pool: a seed, or the digest of an imported table of tasks."""
    return config.seeds.tasks if config.task.imported_tasks is None else config.task.imported_tasks


def task_pool(
    num_tasks: int | float,
    task_size: int,
    seed: int | str,
    *,
    law: TaskLaw = GAUSSIAN_TASKS,
    schedule: PoolSchedule = FIXED,
    time: int = 0,
    device: torch.device | str = "cpu",
) -> Float[Tensor, "M D"]:
    """Return a pool of tasks: the first M tasks of the endless sequence of `seed`, or of an imported table.

    Args:
        num_tasks: Number M of tasks.
        task_size: Dimension D.
        seed: Seed of the sequence, or digest of an imported table.
        law: Law from which each task is drawn, by default N(0, I_D). For an imported table, `law`, `schedule` and `time` have no effect.
        schedule: How the pool changes over the training steps. By default it does not change.
        time: Training step whose pool is returned.
        device: Device of the result.

    Raises:
        ConfigError: If `num_tasks` is not a whole number from 1 to 2^31 - 1, `task_size` is not a positive whole number, or
            `seed` is neither a digest nor a whole number from 0 to 2^63 - 1. Also raised if the pool does not fit in memory, or
            if the table with the digest `seed` is unknown, has too few tasks, or has tasks of another size D.

    Examples:
        >>> bool((task_pool(3, 2, seed=0) == task_pool(4096, 2, seed=0)[:3]).all())
        True
    """
    count = parse_num_tasks(num_tasks)
    if count == math.inf:
        raise ConfigError("The prior with M = inf has no pool of tasks. Give a finite number of tasks.")
    task_size = whole("task_size", task_size, 1)
    seed = seed if is_table_name(seed) else whole("seed", seed, 0, 2**63 - 1)
    require_memory({f"a pool of {count:,} tasks of size {task_size:,}": 4 * int(count) * task_size}, device)
    chunks = torch.arange(int(count), device=device).split(2**16)
    if isinstance(seed, str):
        return torch.cat([_rows_of_table(seed, chunk, task_size) for chunk in chunks])
    times = torch.tensor([time], device=device)
    return torch.cat([tasks_at(seed, times, chunk, task_size, law=law, schedule=schedule)[0] for chunk in chunks])


def table_digest(table: Float[Tensor, "M D"]) -> str:
    """Return the digest that serves as the name of a table of tasks."""
    shape = "x".join(map(str, table.shape))
    return hashlib.blake2b(shape.encode() + table.contiguous().numpy().tobytes(), digest_size=16).hexdigest()


def keep_table(table: Float[Tensor, "M D"]) -> str:
    """Register a table of tasks in this process, and return its digest."""
    digest = table_digest(table)
    _TABLES[digest] = table
    return digest


def is_known(digest: str) -> bool:
    """Return whether this process has read the table with this digest."""
    return digest in _TABLES


def _table(digest: str, task_size: int) -> Float[Tensor, "M D"]:
    table = _TABLES.get(digest)
    if table is None:
        raise ConfigError(
            "The training tasks of this imported run are not known, so no prompts of its `pretrain` tasks and no dMMSE can be "
            "computed. Import the run again with --tasks FILE, or fetch its checkpoints/tasks.safetensors."
        )
    if table.shape[1] != task_size:
        raise ConfigError(
            f"The imported tasks have D = {table.shape[1]}, but the run has D = {task_size}. Use the tasks of this run."
        )
    return table


def _tasks(
    pool: Discrete, steps: Int64[Tensor, " S"], chosen: Int64[Tensor, "N S B"], num_tasks: int
) -> Float[Tensor, "N S B D"]:
    """Return the tasks at the positions `chosen` of the sequence, for each training step. All positions are below `num_tasks`."""
    if isinstance(pool.seed, str):
        return _rows_of_table(pool.seed, chosen.flatten(), pool.task_size).unflatten(0, chosen.shape)
    choose = partial(tasks_at, pool.seed, task_size=pool.task_size, law=pool.law, schedule=pool.schedule)
    times = steps if pool.time is None else torch.full_like(steps, pool.time)
    if pool.schedule == FIXED:
        return choose(times[:1], chosen.flatten())[0].unflatten(0, chosen.shape)
    if num_tasks <= chosen[:, 0].numel():  # drawing the whole pool is cheaper than drawing one task for each prompt
        tables = choose(times, torch.arange(num_tasks, device=steps.device))  # S M D
        return tables[torch.arange(len(steps), device=steps.device)[:, None], chosen]
    rows = [choose(time[None], at_step.flatten())[0] for time, at_step in zip(times, chosen.unbind(1), strict=True)]
    return torch.stack([row.unflatten(0, chosen[:, 0].shape) for row in rows], dim=1)


def _rows_of_table(digest: str, indices: Int64[Tensor, " B"], task_size: int) -> Float[Tensor, "B D"]:
    """Return the tasks at these positions of an imported table."""
    table = _table(digest, task_size)
    if len(indices) and int(indices.max()) >= len(table):
        raise ConfigError(
            f"The imported table has {len(table):,} tasks, but more are needed. Lower the number of tasks to at most {len(table):,}."
        )
    return table.to(indices.device)[indices]
