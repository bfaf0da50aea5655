"""Task priors p(w): the standard Gaussian (M = inf), or the uniform distribution on a pool of M tasks.

A pool is the first M tasks of one endless sequence, in which task m is a pure function of (seed, m). So pools are nested:
every larger pool begins with the tasks of the smaller one. Raventos et al. (2023), section 2, define both priors; the nesting is that of
Carroll et al. (2025), section 3.1. We store no table of tasks: for a prompt of task 1,000,000 we compute only this one vector.

Runs of older code bases have other tasks, which `icl import` saves as a table. A sequence is then named by the digest of its table
instead of a seed. `keep_table` makes a table known to this process; a digest always means the same table.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from icl import rng
from icl.compute.devices import require_memory
from icl.config.validation import ConfigError, is_table_name, parse_num_tasks, whole

_POOL = "tasks"
_TABLES: dict[str, Tensor] = {}
"""Imported tables of tasks that this process has read, by digest."""


class Gaussian(NamedTuple):
    """Gaussian prior w ~ N(0, I_D), under which every prompt has a new task."""

    task_size: int


class Discrete(NamedTuple):
    """Uniform prior on the first `num_tasks` tasks of the sequence of `seed`, or of an imported table whose digest is `seed`."""

    num_tasks: int
    task_size: int
    seed: int | str


def sample_tasks(
    priors: Sequence[Gaussian | Discrete],
    keys: Sequence[rng.Stream],
    steps: Int64[Tensor, " S"],
    indices: Int64[Tensor, " B"],
) -> Float[Tensor, "N S B D"]:
    """Draw one task for each prior, step and index.

    Tasks of priors that share a sequence are drawn together, and so are the tasks of all Gaussian priors.
    """
    seeds = [prior.seed if isinstance(prior, Discrete) else None for prior in priors]
    drawn: dict[int, Tensor] = {}
    for seed in dict.fromkeys(seeds):
        members = [member for member, members_seed in enumerate(seeds) if members_seed == seed]
        key = rng.together([keys[member] for member in members], device=steps.device)
        if seed is None:
            tasks = rng.normal(key, steps, indices, priors[0].task_size)
        else:
            pools = [priors[member] for member in members]
            chosen = rng.integers(key, steps, indices, [pool.num_tasks for pool in pools if isinstance(pool, Discrete)])
            tasks = _tasks(chosen.flatten(), priors[0].task_size, seed).unflatten(0, chosen.shape)
        drawn |= dict(zip(members, tasks, strict=True))
    return torch.stack([drawn[member] for member in range(len(priors))])


def task_prior(num_tasks: int | float, task_size: int, seed: int | str) -> Gaussian | Discrete:
    """Return the prior for task diversity M: `Discrete`, or `Gaussian` if M = inf."""
    num_tasks = parse_num_tasks(num_tasks)
    return Gaussian(task_size) if num_tasks == math.inf else Discrete(int(num_tasks), task_size, seed)


def task_pool(
    num_tasks: int | float, task_size: int, seed: int | str, *, device: torch.device | str = "cpu"
) -> Float[Tensor, "M D"]:
    """Return the first M tasks of the sequence of `seed`, each drawn from N(0, I_D), or of an imported table.

    Raises:
        ConfigError: If `num_tasks` or `task_size` is not a positive whole number, `seed` is not a whole number from 0 to
            2^63 - 1, or `num_tasks` is infinite. Also if `seed` is the digest of a table that is not known, or too small.

    Examples:
        >>> bool((task_pool(3, 2, seed=0) == task_pool(4096, 2, seed=0)[:3]).all())
        True
    """
    count = parse_num_tasks(num_tasks)
    if count == math.inf:
        raise ConfigError("The Gaussian prior (M = inf) has no pool of tasks. Give a finite number of tasks.")
    task_size = whole("task_size", task_size, 1)
    seed = seed if is_table_name(seed) else whole("seed", seed, 0, 2**63 - 1)
    require_memory({f"a pool of {count:,} tasks of size {task_size:,}": 4 * int(count) * task_size}, device)
    chunks = torch.arange(int(count), device=device).split(2**16)
    return torch.cat([_tasks(chunk, task_size, seed) for chunk in chunks])


def table_digest(table: Float[Tensor, "M D"]) -> str:
    """Return the digest by which a table of tasks is named."""
    shape = "x".join(map(str, table.shape))
    return hashlib.blake2b(shape.encode() + table.contiguous().numpy().tobytes(), digest_size=16).hexdigest()


def keep_table(table: Float[Tensor, "M D"]) -> str:
    """Make a table of tasks known to this process, and return its digest."""
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
        raise ConfigError(f"The imported tasks have D = {table.shape[1]}, but the run has D = {task_size}.")
    return table


def _tasks(indices: Int64[Tensor, " B"], task_size: int, seed: int | str) -> Float[Tensor, "B D"]:
    """Return the tasks at these positions of the sequence."""
    if isinstance(seed, str):
        table = _table(seed, task_size)
        if len(indices) and int(indices.max()) >= len(table):
            raise ConfigError(
                f"The imported table has {len(table):,} tasks, but more are needed. Use at most this number of tasks."
            )
        return table.to(indices.device)[indices]
    step = torch.zeros(1, dtype=torch.int64, device=indices.device)
    return rng.normal(rng.stream(seed, _POOL), step, indices, task_size)[0]
