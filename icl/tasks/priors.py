"""Task priors p(w): the standard Gaussian (M = inf), or the uniform distribution on a pool of M tasks.

A pool is the first M tasks of one endless sequence, in which task m is a pure function of (seed, m). So pools are nested:
every larger pool begins with the tasks of the smaller one. Raventos et al. (2023), section 2, define both priors; the nesting is that of
Carroll et al. (2025), section 3.1. We store no table of tasks: for a prompt of task 1,000,000 we compute only this one vector.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from icl import rng
from icl.compute.devices import require_memory
from icl.config.validation import ConfigError, parse_num_tasks, whole

_POOL = "tasks"


class Gaussian(NamedTuple):
    """Gaussian prior w ~ N(0, I_D), under which every prompt has a new task."""

    task_size: int


class Discrete(NamedTuple):
    """Uniform prior on the first `num_tasks` tasks of the sequence of `seed`."""

    num_tasks: int
    task_size: int
    seed: int


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


def task_prior(num_tasks: int | float, task_size: int, seed: int) -> Gaussian | Discrete:
    """Return the prior of task diversity M: `Discrete`, or `Gaussian` for M = inf."""
    num_tasks = parse_num_tasks(num_tasks)
    return Gaussian(task_size) if num_tasks == math.inf else Discrete(int(num_tasks), task_size, seed)


def task_pool(
    num_tasks: int | float, task_size: int, seed: int, *, device: torch.device | str = "cpu"
) -> Float[Tensor, "M D"]:
    """Return the first M tasks of the sequence of `seed`, each drawn from N(0, I_D).

    Raises:
        ConfigError: If `num_tasks` or `task_size` is not a positive whole number, `seed` is not a whole number from 0 to
            2^63 - 1, or `num_tasks` is infinite.

    Examples:
        >>> bool((task_pool(3, 2, seed=0) == task_pool(4096, 2, seed=0)[:3]).all())
        True
    """
    count = parse_num_tasks(num_tasks)
    if count == math.inf:
        raise ConfigError("The Gaussian prior (M = inf) has no pool of tasks. Give a finite number of tasks.")
    task_size, seed = whole("task_size", task_size, 1), whole("seed", seed, 0, 2**63 - 1)
    require_memory({f"a pool of {count:,} tasks of size {task_size:,}": 4 * int(count) * task_size}, device)
    chunks = torch.arange(int(count), device=device).split(2**16)
    return torch.cat([_tasks(chunk, task_size, seed) for chunk in chunks])


def _tasks(indices: Int64[Tensor, " B"], task_size: int, seed: int) -> Float[Tensor, "B D"]:
    """Return the tasks at these positions of the sequence."""
    step = torch.zeros(1, dtype=torch.int64, device=indices.device)
    return rng.normal(rng.stream(seed, _POOL), step, indices, task_size)[0]
