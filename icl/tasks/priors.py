"""The task prior p(w): the standard Gaussian (M = inf), or the uniform law on M tasks of one endless sequence.

Task m is a pure function of (seed, m), so pools are nested: the pool of M tasks is the first M of every larger
pool (Raventos et al. 2023, section 2; nested as in Carroll et al. 2025, section 3.1). No table is kept: a prompt that
draws task 1,000,000 computes that one vector. M = 1 is the singleton prior.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from icl import rng
from icl.memory import require_memory
from icl.validation import ConfigError, parse_num_tasks, whole

_POOL = "tasks"


class Gaussian(NamedTuple):
    """w ~ N(0, I_D): every prompt has a task of its own."""

    task_size: int


class Discrete(NamedTuple):
    """w uniform on the first `num_tasks` tasks of the sequence that `seed` names."""

    num_tasks: int
    task_size: int
    seed: int


def sample_tasks(
    priors: Sequence[Gaussian | Discrete],
    keys: Sequence[rng.Stream],
    steps: Int64[Tensor, " S"],
    indices: Int64[Tensor, " B"],
) -> Float[Tensor, "N S B D"]:
    """One task for each prior, step and index: all Gaussian ones at once, and all pools of one sequence."""
    kinds = [prior.seed if isinstance(prior, Discrete) else None for prior in priors]
    drawn: dict[int, Tensor] = {}
    for kind in dict.fromkeys(kinds):
        places = [place for place, own in enumerate(kinds) if own == kind]
        key = rng.together([keys[place] for place in places], device=steps.device)
        if kind is None:
            tasks = rng.normal(key, steps, indices, priors[0].task_size)
        else:
            pools = [priors[place] for place in places]
            chosen = rng.integers(key, steps, indices, [pool.num_tasks for pool in pools if isinstance(pool, Discrete)])
            tasks = _tasks(chosen.flatten(), priors[0].task_size, kind).unflatten(0, chosen.shape)
        drawn |= dict(zip(places, tasks, strict=True))
    return torch.stack([drawn[place] for place in range(len(priors))])


def task_prior(num_tasks: int | float, task_size: int, seed: int) -> Gaussian | Discrete:
    """The prior for task diversity M: `Discrete`, or `Gaussian` for M = inf."""
    num_tasks = parse_num_tasks(num_tasks)
    return Gaussian(task_size) if num_tasks == math.inf else Discrete(int(num_tasks), task_size, seed)


def task_pool(
    num_tasks: int | float, task_size: int, seed: int, *, device: torch.device | str = "cpu"
) -> Float[Tensor, "M D"]:
    """Return the first M tasks of the endless sequence under `seed`, each N(0, I_D).

    Raises:
        ConfigError: If `num_tasks` or `task_size` is not a positive whole number, or `seed` not a whole number from 0 to
            2^63 - 1; or if `num_tasks` is infinite, for the Gaussian prior has no pool.

    Example:
        >>> bool((task_pool(3, 2, seed=0) == task_pool(4096, 2, seed=0)[:3]).all())
        True
    """
    count = parse_num_tasks(num_tasks)
    if count == math.inf:
        raise ConfigError("The Gaussian prior (M = inf) has no pool of tasks; give a finite number of tasks.")
    task_size, seed = whole("task_size", task_size, 1), whole("seed", seed, 0, 2**63 - 1)
    require_memory({f"a pool of {count:,} tasks of size {task_size:,}": 4 * int(count) * task_size}, device)
    chunks = torch.arange(int(count), device=device).split(2**16)
    return torch.cat([_tasks(chunk, task_size, seed) for chunk in chunks])


def _tasks(indices: Int64[Tensor, " B"], task_size: int, seed: int) -> Float[Tensor, "B D"]:
    """The tasks at these places of the sequence."""
    step = torch.zeros(1, dtype=torch.int64, device=indices.device)
    return rng.normal(rng.stream(seed, _POOL), step, indices, task_size)[0]
