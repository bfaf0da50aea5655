"""Posteriors of a task under a finite mixture of Gaussians, at every prefix of a prompt, by Kalman filters.

Given the component of the mixture and the variances of the noise, w is Gaussian. If the earlier targets are also given, the next target is
Gaussian too. At each example, the Kalman filter updates the posterior N(m, V) of w, and multiplies the component's weight by the likelihood
of the target. The Bayes predictor is the weighted mean of m . x_k over the components. The predictive density of y_k is the weighted mean
of the likelihoods. Bishop (2006), section 3.3, describes the case of one component.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from icl.config.validation import require
from icl.tasks import laws
from icl.tasks.laws import TaskLaw

MAX_COMPONENTS = 1024
"""Largest number 2^D of components of a `sparse` prior for which predictions are computed exactly."""
MIN_NOISE_VARIANCE = 1e-12
"""Smallest noise variance for which posteriors are computed, for coordinates of w with variance 1. At about 1e-14 and below, rounding
errors make variances negative."""
_NUMBERS_AT_ONCE = 2**18
"""Largest number of elements of the covariance matrices that are in memory at once. A single prompt may need more."""


class Components(NamedTuple):
    """Finite mixture of N Gaussians over w: logarithms of the weights, means and covariances."""

    log_weights: Float[Tensor, " N"]
    means: Float[Tensor, "N D"]
    covariances: Float[Tensor, "N D D"]


class BayesPredictions(NamedTuple):
    """Posterior means of the targets given the examples before them, and negative log-likelihoods (NLL) of the targets, in nats.

    The NLL is under the predictive distribution. The standard errors are due to the computation alone. They are 0 if the computation is
    exact, and NaN if its error is unknown.
    """

    predictions: Float[Tensor, "*S B K"]
    stderrs: Float[Tensor, "*S B K"]
    nll: Float[Tensor, "*S B K"]
    nll_stderrs: Float[Tensor, "*S B K"]


class State(NamedTuple):
    """Weights of N components or particles, and their posteriors of w, for each of B prompts.

    R is the axis of independent runs of a particle filter.
    """

    log_weights: Float[Tensor, "B *R N"]
    means: Float[Tensor, "B *R N D"]
    covariances: Float[Tensor, "B *R N D D"]

    def predict(self, x: Float[Tensor, "B D"]) -> Float[Tensor, "B *R"]:
        """Return the predictions at the inputs x: the weighted mean of m . x over the components or particles."""
        outputs = (self.means * _as_vector(x, self.means)).sum(-1)
        return (self.log_weights.softmax(-1) * outputs).sum(-1)

    def update(self, x: Float[Tensor, "B D"], y: Float[Tensor, " B"], variances: Float[Tensor, "*R N"]) -> "State":
        """Return the state after one more example. `variances` are the noise variances of this example."""
        x = _as_vector(x, self.means)
        spread = (self.covariances * x.unsqueeze(-2)).sum(-1)  # V x: B R N D
        variance = (spread * x).sum(-1).clamp(min=0) + variances  # B R N
        error = y.view(-1, *[1] * (variance.ndim - 1)) - (self.means * x).sum(-1)
        gain = spread / variance.unsqueeze(-1)
        return State(
            self.log_weights - 0.5 * (variance.log() + error.square() / variance),
            self.means + gain * error.unsqueeze(-1),
            torch.addcmul(self.covariances, gain.unsqueeze(-1), spread.unsqueeze(-2), value=-1),
        )

    def log_density(self, before: "State") -> Float[Tensor, "B *R"]:
        """Return log p(y) of the example that turned the state `before` into this state."""
        return self.log_weights.logsumexp(-1) - before.log_weights.logsumexp(-1) - 0.5 * math.log(2 * math.pi)

    def sample(self, uniforms: Float[Tensor, " B"], normals: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        """Return a task drawn from the posterior of each prompt. The uniform numbers choose the components. The state must have no axis R.

        Neighbouring components may share a covariance. The state then has fewer covariances than means.
        """
        cumulative = self.log_weights.softmax(-1).cumsum(-1)  # B N
        chosen = torch.searchsorted(cumulative, (uniforms.unsqueeze(-1) * cumulative[:, -1:]).contiguous(), right=True)
        rows, columns = (
            torch.arange(len(chosen), device=chosen.device),
            chosen[:, 0].clamp(max=cumulative.shape[-1] - 1),
        )
        sharing = self.means.shape[1] // self.covariances.shape[1]
        # A covariance can be singular, so we use its square root U S^(1/2) instead of the Cholesky factor.
        values, vectors = torch.linalg.eigh(self.covariances[rows, columns // sharing])
        return self.means[rows, columns] + (vectors @ (values.clamp(min=0).sqrt() * normals).unsqueeze(-1)).squeeze(-1)


def exact_components(law: TaskLaw, task_size: int) -> Components | None:
    """Return a prior as a finite mixture of Gaussians, in float64.

    Return None if the prior is not such a mixture, or is a `sparse` prior with more than `MAX_COMPONENTS` components.
    """
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
    density = torch.tensor(law.density, dtype=torch.float64)
    log_weights = torch.xlogy(count, density) + torch.xlogy(task_size - count, 1 - density)
    return Components(log_weights, torch.zeros_like(is_present), torch.diag_embed(is_present / law.density))


def gaussian_mixture(
    xs: Float[Tensor, "B K D"], ys: Float[Tensor, "B K"], *, components: Components, noise_variance: float
) -> BayesPredictions:
    """Return the exact predictions under a finite mixture of Gaussians and Gaussian noise."""
    parts, losses = [], []
    for inputs, targets in batches(xs, ys, components.covariances.numel()):
        state = start_state(components, len(inputs), xs.device)
        columns, densities = [], []
        for x, y in zip(inputs.unbind(1), targets.unbind(1), strict=True):
            columns.append(state.predict(x))
            state, before = read_exactly(state, x, y, noise_variance), state
            densities.append(state.log_density(before))
        parts.append(torch.stack(columns, dim=1))
        losses.append(-torch.stack(densities, dim=1))
    predictions, nll = torch.cat(parts).to(ys), torch.cat(losses).to(ys)
    return BayesPredictions(predictions, torch.zeros_like(predictions), nll, torch.zeros_like(nll))


def mixture_posterior(
    xs: Float[Tensor, "B n D"],
    ys: Float[Tensor, "B n"],
    uniforms: Float[Tensor, " B"],
    normals: Float[Tensor, "B D"],
    *,
    components: Components,
    noise_variance: float,
) -> Float[Tensor, "B D"]:
    """Draw a task for each prompt from the exact posterior given the prompt's n examples, in float64."""
    parts, done = [], 0
    for inputs, targets in batches(xs, ys, components.covariances.numel()):
        state = start_state(components, len(inputs), xs.device)
        for x, y in zip(inputs.unbind(1), targets.unbind(1), strict=True):
            state = read_exactly(state, x, y, noise_variance)
        rows = slice(done, done := done + len(inputs))
        parts.append(state.sample(uniforms[rows].double(), normals[rows].double()))
    return torch.cat(parts)


def require_noise(noise_variance: float, law: TaskLaw) -> None:
    """Refuse a noise variance that is too small for the rounding errors of float64.

    Raises:
        ConfigError: If the noise variance is below `MIN_NOISE_VARIANCE` times the variance 1 / p of a nonzero coordinate of a `sparse` task, or
            below `MIN_NOISE_VARIANCE` for other tasks.
    """
    least = MIN_NOISE_VARIANCE / (law.density or 1)
    require(
        noise_variance >= least,
        f"`task.noise_variance` must be at least {least:g} to compute Bayes predictors and posteriors of new tasks, "
        f"got {noise_variance:g}.",
    )


def start_state(components: Components, count: int, device: torch.device) -> State:
    """Return the state of `count` prompts before their first example."""
    log_weights, means, covariances = (part.to(device) for part in components)
    return State(log_weights.expand(count, -1), means.expand(count, -1, -1), covariances.expand(count, -1, -1, -1))


def read_exactly(state: State, x: Float[Tensor, "B D"], y: Float[Tensor, " B"], noise_variance: float) -> State:
    """Return the state after one example with Gaussian noise."""
    return state.update(x, y, torch.full_like(state.log_weights[0], noise_variance))


def batches(xs: Tensor, ys: Tensor, numbers_per_prompt: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Split prompts into batches whose covariance matrices fit into memory, and convert them to float64."""
    size = max(1, _NUMBERS_AT_ONCE // numbers_per_prompt)
    return zip(xs.double().split(size), ys.double().split(size), strict=True)


def _equal_components(means: Float[Tensor, "N D"], covariance: Float[Tensor, "D D"]) -> Components:
    """Return components of equal weight that share a covariance."""
    return Components(torch.zeros(len(means)).double(), means.double(), covariance.expand(len(means), -1, -1))


def _as_vector(x: Float[Tensor, "B D"], means: Float[Tensor, "B *R N D"]) -> Tensor:
    """Return inputs with axes of length 1 for the runs and the particles."""
    return x.view(len(x), *[1] * (means.ndim - 2), -1)
