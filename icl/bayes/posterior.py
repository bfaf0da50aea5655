"""Tasks drawn from the posterior of a candidate prior, given the first n examples of a prompt.

- `pool`: task m has the posterior weight exp(sum of the log densities of the residuals). This is exact for every distribution of the noise.
- `gaussian` with Gaussian noise: the posterior is Gaussian.
- Other finite mixtures of Gaussians with Gaussian noise: the posterior is computed exactly (`icl.bayes.gaussians`).
- All other cases: the posterior is approximated by a particle filter (`icl.bayes.particles`). The prompts are divided into `NUM_FILTERS`
  blocks of neighbouring prompts, and each block has its own filter. So a standard error over these blocks (the jackknife of
  `icl.analysis.prior.energy`) includes the error of the filters. This standard error does not include the bias of a filter, which is of the
  order of 1 / 512 for 512 particles. For `sparse` and small noise, the bias is larger (`icl.bayes.particles`).

Without examples, all draws are exact: they come from the prior itself.
"""

from typing import Literal, TypeAlias

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from icl import rng
from icl.bayes.gaussians import exact_components, mixture_posterior, require_noise
from icl.bayes.particles import particle_posterior
from icl.config import RunConfig
from icl.tasks import laws
from icl.tasks.laws import GAUSSIAN, Law, TaskLaw
from icl.tasks.prompts import noise_law, task_law

Candidate: TypeAlias = Literal["pool", "prior", "gaussian"]
"""A candidate prior: uniform on the run's M tasks (`pool`), the run's prior of new tasks if it is not N(0, I) (`prior`), or N(0, I)
(`gaussian`)."""
NUM_FILTERS = 32
"""Number of blocks of prompts. Each block has its own particle filter."""
_PAIRS_AT_ONCE = 2**22
"""Largest number of (prompt, task) pairs that are processed at once. Their residuals need 32 MiB for each of the n examples."""


def candidates(config: RunConfig) -> tuple[Candidate, ...]:
    """Return the candidate priors of a run. The first candidate is the prior of the run's training tasks."""
    pool: tuple[Candidate, ...] = () if config.task.is_gaussian else ("pool",)
    new: tuple[Candidate, ...] = ("gaussian",) if task_law(config) == laws.GAUSSIAN_TASKS else ("prior", "gaussian")
    return (*pool, *new)


def posterior_tasks(
    config: RunConfig,
    candidate: Candidate,
    xs: Float[Tensor, "B n D"],
    ys: Float[Tensor, "B n"],
    uniforms: Float[Tensor, " B"],
    *,
    pool: Float[Tensor, "M D"] | None = None,
) -> Float[Tensor, "B D"]:
    """Draw a task for each prompt from the posterior of a candidate prior given the prompt's n examples, in float64.

    Args:
        config: The run.
        candidate: The candidate prior.
        xs: Inputs of the examples, in float64 on the CPU.
        ys: Targets of the examples.
        uniforms: Uniform numbers in [0, 1), which choose a task of the pool, a component of the prior, or a particle.
        pool: The tasks of the candidate `pool`.

    Raises:
        ConfigError: If the candidate is not `pool`, and the noise variance is too small for the rounding errors of float64.
    """
    noise_variance, noise = config.task.noise_variance, noise_law(config)
    if candidate == "pool":
        assert pool is not None
        return pool[choose_tasks(xs, ys, pool, uniforms, noise_variance=noise_variance, noise=noise)]
    law = laws.GAUSSIAN_TASKS if candidate == "gaussian" else task_law(config)
    require_noise(noise_variance, law)
    # This stream is independent of the stream that draws the noise of targets.
    key = rng.stream(config.seeds.evaluation, f"prior/{candidate}/tasks-given-examples")
    step, indices, size = torch.zeros(1, dtype=torch.int64), torch.arange(len(xs)), config.task.task_size
    if xs.shape[1] == 0 and (law, noise) != (laws.GAUSSIAN_TASKS, GAUSSIAN):
        return laws.draw_tasks(law, key, step, indices, size)[0].double()
    normals = rng.normal(key, step, indices, size)[0].double()
    if (law, noise) == (laws.GAUSSIAN_TASKS, GAUSSIAN):
        return gaussian_posterior(xs, ys, normals, noise_variance=noise_variance)
    components = exact_components(law, size) if noise == GAUSSIAN else None
    if components is not None:
        return mixture_posterior(xs, ys, uniforms, normals, components=components, noise_variance=noise_variance)
    return _filtered_tasks(xs, ys, uniforms, normals, law=law, noise=noise, noise_variance=noise_variance)


def gaussian_posterior(
    xs: Float[Tensor, "B n D"], ys: Float[Tensor, "B n"], normals: Float[Tensor, "B D"], *, noise_variance: float
) -> Float[Tensor, "B D"]:
    """Return a sample of w for each prompt, given n examples and under w ~ N(0, I).

    The sample is the posterior mean + L^-T z, where L L^T is the posterior precision and z is `normals`.
    """
    root = torch.linalg.cholesky(xs.mT @ xs / noise_variance + torch.eye(xs.shape[-1], dtype=xs.dtype))  # B D D
    moment = (xs.mT @ ys.unsqueeze(-1)) / noise_variance  # B D 1
    scaled = torch.linalg.solve_triangular(root, moment, upper=False) + normals.unsqueeze(-1)
    return torch.linalg.solve_triangular(root.mT, scaled, upper=True).squeeze(-1)


def choose_tasks(
    xs: Float[Tensor, "B n D"],
    ys: Float[Tensor, "B n"],
    pool: Float[Tensor, "M D"],
    uniforms: Float[Tensor, " B"],
    *,
    noise_variance: float,
    noise: Law = GAUSSIAN,
) -> Int64[Tensor, " B"]:
    """Return the indices of tasks drawn from the posterior given n examples, under w uniform on the pool."""
    chosen = []
    at_once = max(1, _PAIRS_AT_ONCE // len(pool))
    for some_xs, some_ys, numbers in zip(xs.split(at_once), ys.split(at_once), uniforms.split(at_once), strict=True):
        residuals = some_xs @ pool.T - some_ys.unsqueeze(-1)  # b n M
        squares = laws.squared_error_equivalent(noise, residuals, noise_variance).sum(1)  # b M
        cumulative = torch.softmax(-squares / (2 * noise_variance), dim=-1).cumsum(-1)
        targets = (numbers.unsqueeze(-1) * cumulative[:, -1:]).contiguous()
        chosen.append(torch.searchsorted(cumulative, targets, right=True).squeeze(-1))
    return torch.cat(chosen).clamp(max=len(pool) - 1)


def _filtered_tasks(
    xs: Float[Tensor, "B n D"],
    ys: Float[Tensor, "B n"],
    uniforms: Float[Tensor, " B"],
    normals: Float[Tensor, "B D"],
    *,
    law: TaskLaw,
    noise: Law,
    noise_variance: float,
) -> Float[Tensor, "B D"]:
    blocks = zip(*(part.chunk(NUM_FILTERS) for part in (xs, ys, uniforms, normals)), strict=True)
    tasks = [
        particle_posterior(*block, law=law, noise=noise, noise_variance=noise_variance, seed=seed)
        for seed, block in enumerate(blocks)
    ]
    return torch.cat(tasks)
