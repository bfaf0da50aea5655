"""Distributions of tasks, noise and inputs, each with mean 0 and variance 1 per coordinate.

Scalar laws (`Law`), for noise and for the coordinates of tasks and inputs:

- `gaussian`: N(0, 1).
- `student_t`: Student's t with `df` degrees of freedom, divided by its standard deviation sqrt(df / (df - 2)). We draw Student's t from two
  uniform numbers u and v as sqrt(df (u^(-2 / df) - 1)) cos(2 pi v), which is exact (Bailey 1994, "Polar generation of random variates with
  the t-distribution").
- `laplace`: density exp(-sqrt(2) |z|) / sqrt(2).

Task laws (`TaskLaw`), for task vectors w with D coordinates. The setting `task.prior` chooses one of them:

- `gaussian`, `student_t`, `laplace`: the coordinates are independent, each with the scalar law of this name.
- `sparse`: with probability p, a coordinate is drawn from N(0, 1 / p); otherwise it is 0.
- `low_rank`: w = sqrt(D / r) A u with u ~ N(0, I_r). The r columns of A are orthonormal and span a uniformly random subspace, which is the
  same for all tasks of a run. The variances of the coordinates differ, but their mean is 1, so E|w|^2 = D. (If every coordinate had
  variance 1, the subspace could not be uniformly random.)
- `mixture`: w = m_j + sqrt(1 - b) z with z ~ N(0, I) and j uniform on J components. The means m_j are drawn at random. They are then
  shifted and scaled so that each coordinate has mean 0 and variance b over the components. The coordinates of w are correlated unless J is
  large.

The coordinates of an input are independent. If `task.inputs` is `ar1`, the inputs of a prompt are correlated: x_1 = z_1 and
x_k = rho x_{k-1} + sqrt(1 - rho^2) z_k with z_k ~ N(0, I). So every x_k is N(0, I), and the correlation of x_k and x_{k+h} is rho^h.

Every draw is a pure function of (stream, step, index), like all draws of `icl.rng`.
"""

import math
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from icl import rng

_CHOICE_BLOCK = 2**31
"""First counter block (`icl.rng`) for the random numbers that choose the nonzero coordinates or the component. `rng.normal` uses lower blocks."""

_MANY_DF = 1e6
"""With at least this many degrees of freedom, `log_peak` computes the density of Student's t from a series."""


class Law(NamedTuple):
    """Distribution of a real number, with mean 0 and variance 1."""

    name: Literal["gaussian", "student_t", "laplace"] = "gaussian"
    df: float | None = None
    """Degrees of freedom of `student_t`."""


class TaskLaw(NamedTuple):
    """Distribution of a new task w, by default N(0, I)."""

    name: Literal["gaussian", "student_t", "laplace", "sparse", "low_rank", "mixture"] = "gaussian"
    df: float | None = None
    density: float | None = None
    """Probability p that a coordinate of a `sparse` task is not zero."""
    rank: int | None = None
    """Dimension r of the subspace of `low_rank` tasks."""
    components: int | None = None
    """Number J of components of the `mixture`."""
    between: float | None = None
    """Variance b of the components' means, for each coordinate."""
    seed: int = 0
    """Seed for the subspace of `low_rank` tasks, or for the component means of the `mixture`."""

    @property
    def coordinates(self) -> Law | None:
        """Law of each coordinate, if the coordinates are independent and have one of the scalar laws; otherwise None."""
        return Law(self.name, self.df) if self.name in ("gaussian", "student_t", "laplace") else None


GAUSSIAN, GAUSSIAN_TASKS = Law(), TaskLaw()


def draw(
    law: Law, key: rng.Stream, steps: Int64[Tensor, " S"], indices: Int64[Tensor, " B"], size: int
) -> Float[Tensor, "*N S B {size}"]:
    """Draw `size` numbers for each step and index, in float32. The first numbers of a draw do not depend on `size`."""
    if law.name == "gaussian":
        return rng.normal(key, steps, indices, size)
    if steps.device.type == "mps":  # MPS has no float64
        return draw(law, _on_cpu(key), steps.cpu(), indices.cpu(), size).to(steps.device)
    u, v = rng.uniform(key, steps, indices, 2 * size).unflatten(-1, (size, 2)).unbind(-1)  # N S B size
    if law.name == "laplace":
        return (-u.log() * math.sqrt(0.5) * torch.where(v < 0.5, -1.0, 1.0)).float()
    assert law.df is not None
    radius = (
        (law.df - 2) * torch.expm1(-2 / law.df * u.log())
    ).sqrt()  # the factor df - 2 includes the division by the standard deviation
    return (radius * torch.cos(2 * math.pi * v)).float()


def draw_tasks(
    law: TaskLaw, key: rng.Stream, steps: Int64[Tensor, " S"], indices: Int64[Tensor, " B"], task_size: int
) -> Float[Tensor, "*N S B {task_size}"]:
    """Draw a task for each step and index, in float32."""
    if law.coordinates is not None:
        return draw(law.coordinates, key, steps, indices, task_size)
    if law.name == "low_rank":
        basis = subspace(law, task_size).to(steps.device)  # D r
        latent = rng.normal(key, steps, indices, basis.shape[1])
        # No matrix product: its rounding depends on the batch size, so a task would depend on the batch size too.
        return (latent.unsqueeze(-2) * basis).sum(-1)
    normals = rng.normal(key, steps, indices, task_size)
    if law.name == "sparse":
        assert law.density is not None
        is_present = _is_chosen(key, steps, indices, task_size, law.density)
        return torch.where(is_present, normals / math.sqrt(law.density), 0.0)
    assert law.between is not None
    assert law.components is not None
    component = _choose(key, steps, indices, law.components)  # N S B
    return component_means(law, task_size).to(steps.device)[component] + math.sqrt(1 - law.between) * normals


@lru_cache(maxsize=64)
def subspace(law: TaskLaw, task_size: int) -> Float[Tensor, "D r"]:
    """Return B = sqrt(D / r) A of the law `low_rank`, in float32 on the CPU. The covariance of the tasks is B B^T."""
    assert law.rank is not None
    normals = _structure("tasks/subspace", law.seed, task_size, law.rank).T  # D r
    q, r = torch.linalg.qr(normals)
    # The signs of a QR decomposition depend on the library. We choose the signs for which the diagonal of R is positive.
    return (q * r.diagonal().sign() * math.sqrt(task_size / law.rank)).float()


@lru_cache(maxsize=64)
def component_means(law: TaskLaw, task_size: int) -> Float[Tensor, "J D"]:
    """Return the means of the components of the law `mixture`, in float32 on the CPU."""
    assert law.components is not None
    assert law.between is not None
    normals = _structure("tasks/components", law.seed, task_size, law.components)  # J D
    centred = normals - normals.mean(0)
    return (centred * (law.between**0.5 / centred.square().mean(0).sqrt())).float()


def correlate(normals: Float[Tensor, "*S K D"], correlation: float) -> Float[Tensor, "*S K D"]:
    """Make the correlated inputs x of `task.inputs` = `ar1` from standard normals. The shape stays the same."""
    inputs = [normals[..., 0, :].double()]
    for k in range(1, normals.shape[-2]):
        inputs.append(correlation * inputs[-1] + math.sqrt(1 - correlation**2) * normals[..., k, :].double())
    return torch.stack(inputs, dim=-2).float()


def squared_error_equivalent(law: Law, residuals: Tensor, noise_variance: float) -> Tensor:
    """Return the number c of each residual r that gives p(r) = p(0) exp(-c / (2 sigma^2)), where p is the density of the noise.

    For Gaussian noise, c is the squared residual.
    """
    if law.name == "gaussian":
        return residuals.square()
    if law.name == "laplace":  # density exp(-sqrt(2) |r| / sigma)
        return residuals.abs() * (2 * math.sqrt(2 * noise_variance))
    assert law.df is not None  # density (1 + r^2 / ((df - 2) sigma^2))^(-(df + 1) / 2)
    return (residuals.square() / ((law.df - 2) * noise_variance)).log1p() * ((law.df + 1) * noise_variance)


def log_peak(law: Law, noise_variance: float) -> float:
    """Return the log density of the noise at 0. At a residual r, it is lower by c / (2 sigma^2), with c from `squared_error_equivalent`."""
    if law.name == "gaussian":
        return -(math.log(noise_variance) + math.log(2 * math.pi)) / 2
    if law.name == "laplace":
        return -(math.log(noise_variance) + math.log(2)) / 2
    assert law.df is not None
    if law.df < _MANY_DF:
        gammas = math.lgamma((law.df + 1) / 2) - math.lgamma(law.df / 2)
    else:  # The difference of the two large numbers would lose digits. The error of this series is about 1 / (24 df^3).
        gammas = math.log(law.df / 2) / 2 - 1 / (4 * law.df)
    return gammas - (math.log((law.df - 2) * noise_variance) + math.log(math.pi)) / 2


def _structure(name: str, seed: int, task_size: int, count: int) -> Float[Tensor, "{count} {task_size}"]:
    """Return standard normals that are the same for all tasks of a run, in float64."""
    steps, indices = torch.zeros(1, dtype=torch.int64), torch.arange(count)
    return rng.normal(rng.stream(seed, name), steps, indices, task_size)[0].double()


def _is_chosen(
    key: rng.Stream, steps: Int64[Tensor, " S"], indices: Int64[Tensor, " B"], size: int, probability: float
) -> Bool[Tensor, "*N S B {size}"]:
    if steps.device.type == "mps":
        return _is_chosen(_on_cpu(key), steps.cpu(), indices.cpu(), size, probability).to(steps.device)
    return rng.uniform(key, steps, indices, size, first_block=_CHOICE_BLOCK) < probability


def _choose(
    key: rng.Stream, steps: Int64[Tensor, " S"], indices: Int64[Tensor, " B"], bound: int
) -> Int64[Tensor, "*N S B"]:
    if steps.device.type == "mps":
        return _choose(_on_cpu(key), steps.cpu(), indices.cpu(), bound).to(steps.device)
    return (rng.uniform(key, steps, indices, 1, first_block=_CHOICE_BLOCK)[..., 0] * bound).long()


def _on_cpu(key: rng.Stream) -> rng.Stream:
    return rng.Stream(*(word.cpu() if isinstance(word, Tensor) else word for word in key))
