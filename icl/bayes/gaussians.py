"""Posteriors of a task under a finite mixture of Gaussians, at every prefix of a prompt, by Kalman filters.

Given the component of the mixture and the variances of the noise, w is Gaussian, and so is each target given the targets before it. The Kalman filter
updates the posterior N(m, V) of w at each example, and multiplies the component's weight by the likelihood of the target. The Bayes predictor
is the weighted mean of m . x_k. Bishop (2006), section 3.3, has the case of one component.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from icl.tasks import laws
from icl.tasks.laws import TaskLaw

MAX_COMPONENTS = 1024
"""Largest number of components of an exact predictor."""
_NUMBERS_AT_ONCE = 2**18
"""Largest number of elements of the covariance matrices that are in memory at once."""


class Components(NamedTuple):
    """Finite mixture of N Gaussians over w: logarithms of the weights, means and covariances."""

    log_weights: Float[Tensor, " N"]
    means: Float[Tensor, "N D"]
    covariances: Float[Tensor, "N D D"]


class State(NamedTuple):
    """Weights and posteriors of w of N components or particles, for each of B prompts and for any number of runs R."""

    log_weights: Float[Tensor, "B *R N"]
    means: Float[Tensor, "B *R N D"]
    covariances: Float[Tensor, "B *R N D D"]

    def predict(self, x: Float[Tensor, "B D"]) -> Float[Tensor, "B *R"]:
        """Return the weighted mean of m . x."""
        outputs = (self.means * _as_vector(x, self.means)).sum(-1)
        return (self.log_weights.softmax(-1) * outputs).sum(-1)

    def update(self, x: Float[Tensor, "B D"], y: Float[Tensor, " B"], variances: Float[Tensor, "*R N"]) -> "State":
        """Return the state after one example, whose noise has these variances."""
        x = _as_vector(x, self.means)
        spread = (self.covariances * x.unsqueeze(-2)).sum(-1)  # V x: B R N D
        variance = (spread * x).sum(-1) + variances  # B R N
        error = y.view(-1, *[1] * (variance.ndim - 1)) - (self.means * x).sum(-1)
        gain = spread / variance.unsqueeze(-1)
        return State(
            self.log_weights - 0.5 * (variance.log() + error.square() / variance),
            self.means + gain * error.unsqueeze(-1),
            torch.addcmul(self.covariances, gain.unsqueeze(-1), spread.unsqueeze(-2), value=-1),
        )


def exact_components(law: TaskLaw, task_size: int) -> Components | None:
    """Return a prior as a finite mixture of Gaussians, in float64; None if it is none, or has more than `MAX_COMPONENTS`."""
    unit = torch.eye(task_size, dtype=torch.float64)
    if law.name == "gaussian":
        return _equal_components(torch.zeros(1, task_size), unit)
    if law.name == "low_rank":
        basis = laws.subspace(law, task_size).double()
        return _equal_components(torch.zeros(1, task_size), basis @ basis.T)
    if law.name == "mixture":
        assert law.between is not None
        return _equal_components(laws.component_means(law, task_size), (1 - law.between) * unit)
    if law.name != "sparse" or 2**task_size > MAX_COMPONENTS:
        return None
    assert law.density is not None
    is_present = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * task_size).view(-1, task_size)
    count = is_present.sum(1)
    log_weights = torch.xlogy(count, torch.tensor(law.density).double())
    log_weights = log_weights + torch.xlogy(task_size - count, 1 - torch.tensor(law.density).double())
    return Components(log_weights, torch.zeros_like(is_present), torch.diag_embed(is_present / law.density))


def gaussian_mixture(
    xs: Float[Tensor, "B K D"], ys: Float[Tensor, "B K"], *, components: Components, noise_variance: float
) -> Float[Tensor, "B K"]:
    """Predict by the posterior mean under a finite mixture of Gaussians and Gaussian noise."""
    count, task_size = components.means.shape
    start = Components(*(part.to(xs.device) for part in components))
    parts = []
    for inputs, targets in batches(xs, ys, count * task_size**2):
        state = State(
            start.log_weights.expand(len(inputs), count),
            start.means.expand(len(inputs), -1, -1),
            start.covariances.expand(len(inputs), -1, -1, -1),
        )
        columns = []
        for x, y in zip(inputs.unbind(1), targets.unbind(1), strict=True):
            columns.append(state.predict(x))
            state = state.update(x, y, torch.full((count,), noise_variance, dtype=torch.float64, device=xs.device))
        parts.append(torch.stack(columns, dim=1))
    return torch.cat(parts).to(ys)


def batches(xs: Tensor, ys: Tensor, numbers_per_prompt: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Split prompts into batches whose covariance matrices fit in memory, in float64."""
    size = max(1, _NUMBERS_AT_ONCE // numbers_per_prompt)
    return zip(xs.double().split(size), ys.double().split(size), strict=True)


def _equal_components(means: Float[Tensor, "N D"], covariance: Float[Tensor, "D D"]) -> Components:
    """Return components of equal weight that share a covariance."""
    return Components(torch.zeros(len(means)).double(), means.double(), covariance.expand(len(means), -1, -1))


def _as_vector(x: Float[Tensor, "B D"], means: Float[Tensor, "B *R N D"]) -> Tensor:
    """Return inputs with axes of length 1 for the runs and the particles."""
    return x.view(len(x), *[1] * (means.ndim - 2), -1)
