"""Rao-Blackwellised particle filter for priors and noise that are scale mixtures of Gaussians.

Each particle is a set of scales, one for each coordinate of the task. A scale is a random factor with mean 1 that multiplies the variance
of a Gaussian. The scales of the coordinates are drawn from the prior at the start. A scale for the noise of each target is drawn when the
filter reads this target. Given the scales, w is Gaussian (`icl.bayes.gaussians`). The particles are resampled if the effective sample size
falls below half the number of particles. Then a new value of each coordinate's scale is proposed from the prior. A Metropolis-Hastings
test, in which w is integrated out, accepts or rejects this value. These moves leave the posterior unchanged (resample-move: Gilks and
Berzuini 2001). The filter runs several times independently. The prediction is the mean of the runs' predictions, and the spread of these
predictions gives the standard error. The loss of the estimated predictor exceeds the loss of the exact predictor by the squared standard
error, averaged over prompts.

The predictive density of y_k is the weighted mean of the likelihoods of the particles. We average this density over the runs, and its
negative logarithm is the NLL. To first order, the NLL is too large by half of its squared standard error, because the logarithm is concave.

For Student's t with df degrees of freedom, the scale is distributed as (df - 2) / chi^2_df. For Laplace, the scale has an exponential
distribution (Andrews and Mallows 1974). The scale of a coordinate of a `sparse` task is 1 / p with probability p, otherwise 0. The filter
uses the scale 1e-6 instead of 0: with the scale 0, a coordinate would stay exactly 0, whatever the data say. Under the prior `mixture`, w
is a mixture of Gaussians given the noise scales. So each particle sums exactly over the components, and has its own weight for each
component.

Limits for `sparse`. The spread over runs measures the error of the filter only for noise variances of about 0.1 or more. For smaller noise,
a run that has settled on wrong nonzero coordinates rarely leaves them, and all runs have this bias. With D = 8, p = 0.25 and Gaussian
noise, the mean squared error at examples 5 to 8 was 0.0047 for the noise variance 0.25, 0.009 for 0.01, and 0.1 for 0.001. The spread
suggested 0.0048, 0.004 and 0.008 instead. So below `MIN_SPARSE_NOISE_VARIANCE` the standard errors are NaN, which means unknown. A scale
below 1e-6, or more proposals for each scale, did not remove this bias.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from scipy.special import gammaincinv
from torch import Tensor

from icl import rng
from icl.bayes.gaussians import BayesPredictions, State, batches, exact_components
from icl.tasks.laws import Law, TaskLaw

NUM_RUNS, NUM_PARTICLES = 8, 128
"""Default number of independent runs of the particle filter, and default number of particles in each run."""
NUM_SAMPLING_PARTICLES = 512
"""Default number of particles from which a task is drawn."""
MIN_SPARSE_NOISE_VARIANCE = 0.1
"""Smallest noise variance for which the standard errors of `sparse` tasks are known."""
_SPIKE = 1e-6
"""Variance that the particle filter uses instead of 0 for the zero coordinates of `sparse` tasks. So the variance of a coordinate is too
large by at most this number."""


def particle_filter(
    xs: Float[Tensor, "B K D"],
    ys: Float[Tensor, "B K"],
    *,
    law: TaskLaw,
    noise: Law,
    noise_variance: float,
    num_runs: int = NUM_RUNS,
    num_particles: int = NUM_PARTICLES,
    seed: int = 0,
) -> BayesPredictions:
    """Estimate the posterior mean of each target, with its standard error over independent runs (NaN if it is unknown).

    All prompts use the same random numbers, so the prediction for a prompt does not depend on the other prompts.
    """
    filters = _Filter(law, noise, noise_variance, _Draws(rng.stream(seed, "bayes"), num_runs, num_particles, xs.device))
    parts, densities = [], []
    for inputs, targets in batches(xs, ys, filters.numbers_per_prompt(xs.shape[-1])):
        particles = filters.start(len(inputs), xs.shape[-1])
        columns, logs = [], []
        for k, (x, y) in enumerate(zip(inputs.unbind(1), targets.unbind(1), strict=True)):
            columns.append(_pooled(particles.state).predict(x))
            particles, log_density = filters.read(particles, x, y, k, is_last=k == inputs.shape[1] - 1)
            logs.append(log_density)
        parts.append(torch.stack(columns, dim=1))  # B K R
        densities.append(torch.stack(logs, dim=1))
    runs = torch.cat(parts)
    predictions, stderrs = runs.mean(-1), runs.std(-1) / math.sqrt(num_runs)
    nll, nll_stderrs = _mean_density(torch.cat(densities))
    if law.name == "sparse" and noise_variance < MIN_SPARSE_NOISE_VARIANCE:
        stderrs, nll_stderrs = torch.full_like(stderrs, math.nan), torch.full_like(nll_stderrs, math.nan)
    return BayesPredictions(*(part.to(ys) for part in (predictions, stderrs, nll, nll_stderrs)))


def particle_posterior(
    xs: Float[Tensor, "B n D"],
    ys: Float[Tensor, "B n"],
    uniforms: Float[Tensor, " B"],
    normals: Float[Tensor, "B D"],
    *,
    law: TaskLaw,
    noise: Law,
    noise_variance: float,
    num_particles: int = NUM_SAMPLING_PARTICLES,
    seed: int = 0,
) -> Float[Tensor, "B D"]:
    """Draw a task for each prompt, in float64, from its posterior given n examples. One run of the filter approximates the posteriors.

    Runs with different seeds are independent, so their spread shows the error of the filter.
    """
    draws = _Draws(rng.stream(seed, "bayes/posterior"), 1, num_particles, xs.device)
    filters = _Filter(law, noise, noise_variance, draws)
    parts, done = [], 0
    for inputs, targets in batches(xs, ys, filters.numbers_per_prompt(xs.shape[-1])):
        particles = filters.start(len(inputs), xs.shape[-1])
        for k, (x, y) in enumerate(zip(inputs.unbind(1), targets.unbind(1), strict=True)):
            particles, _ = filters.read(particles, x, y, k)
        state = _pooled(State(*(part.squeeze(1) for part in particles.state)))
        rows = slice(done, done := done + len(inputs))
        parts.append(state.sample(uniforms[rows].double(), normals[rows].double()))
    return torch.cat(parts)


def _mean_density(log_densities: Float[Tensor, "B K R"]) -> tuple[Float[Tensor, "B K"], Float[Tensor, "B K"]]:
    """Return -log(mean density over runs), and its standard error by the delta method."""
    count = log_densities.shape[-1]
    log_mean = log_densities.logsumexp(-1) - math.log(count)
    ratios = (log_densities - log_mean.unsqueeze(-1)).exp()  # densities divided by their mean
    return -log_mean, ratios.std(-1) / math.sqrt(count)


class _Weighted(NamedTuple):
    """Particles of all runs of the filter, for B prompts: weights, posteriors of w, and scales of the coordinates.

    In `state`, the axis N of the particles is followed by an axis J of the prior's components. The J components of a particle share a
    covariance, so this axis of the covariances has length 1.
    """

    state: State
    scales: Float[Tensor, "B R N D"]


class _Filter(NamedTuple):
    """Particle filter for one prior and one noise distribution, with the random numbers of its runs."""

    law: TaskLaw
    noise: Law
    noise_variance: float
    draws: "_Draws"

    def numbers_per_prompt(self, size: int) -> int:
        """Return the total number of elements of the means or the covariance matrices of one prompt's particles, whichever is larger."""
        return self.draws.num_runs * self.draws.num_particles * size * max(size, self.law.components or 1)

    def start(self, count: int, size: int) -> _Weighted:
        """Draw the particles before the first example. All `count` prompts get the same particles."""
        first = _start(self.draws, self.law, size)
        shape = (count, self.draws.num_runs, self.draws.num_particles)
        state = State(
            torch.zeros(*shape, first.means.shape[-2], dtype=torch.float64, device=self.draws.device),
            first.means.expand(*shape, -1, size),
            first.covariances.expand(*shape, 1, size, size),
        )
        return _Weighted(state, first.scales.expand(*shape, size))

    def read(
        self, particles: _Weighted, x: Float[Tensor, "B D"], y: Float[Tensor, " B"], k: int, *, is_last: bool = False
    ) -> tuple[_Weighted, Float[Tensor, "B R"]]:
        """Return the particles after example k (from 0), and the log density of this example. After the last example, nothing is resampled."""
        variances = self.noise_variance * _scales(self.noise, self.draws.uniform(1 + k, 1, 0)[..., 0])
        state = particles.state.update(x, y, variances.unsqueeze(-1))
        log_density = _pooled(state).log_density(_pooled(particles.state))
        if is_last:
            return _Weighted(state, particles.scales), log_density
        return _Weighted(*_renew(state, particles.scales, self.law, self.draws, 1 + k)), log_density


def _pooled(state: State) -> State:
    """Return a state whose axis N contains the components of all particles. The covariances keep one entry for each particle."""
    log_weights, means, covariances = state
    return State(log_weights.flatten(-2), means.flatten(-3, -2), covariances.squeeze(-3))


class _Draws(NamedTuple):
    """Source of the uniform numbers of the particle filter."""

    key: rng.Stream
    num_runs: int
    num_particles: int
    device: torch.device

    def uniform(self, step: int, size: int, use: int) -> Float[Tensor, "R N {size}"]:
        """Return `size` numbers for every particle at one step of the filter. `use` distinguishes numbers for different purposes."""
        steps = torch.tensor([step])
        indices = torch.arange(self.num_runs * self.num_particles)
        numbers = rng.uniform(self.key, steps, indices, size, first_block=use * 2**20)[0]
        return numbers.unflatten(0, (self.num_runs, self.num_particles)).to(self.device)


class _Start(NamedTuple):
    means: Float[Tensor, "R N J D"]
    covariances: Float[Tensor, "R N 1 D D"]
    scales: Float[Tensor, "R N D"]


def _start(draws: _Draws, law: TaskLaw, size: int) -> _Start:
    """Draw the particles before the first example."""
    if law.name in ("student_t", "laplace", "sparse"):
        scales = _task_scales(law, draws.uniform(0, size, 0))  # R N D
        return _Start(torch.zeros_like(scales).unsqueeze(-2), torch.diag_embed(scales).unsqueeze(-3), scales)
    components = exact_components(law, size)
    assert components is not None
    shape = draws.num_runs, draws.num_particles
    means, covariances = (part.to(draws.device) for part in components[1:])
    means = means.expand(*shape, -1, -1)
    # The components have equal weights, and share their covariance.
    return _Start(means, covariances[:1].expand(*shape, -1, -1, -1), torch.ones_like(means[..., 0, :]))


def _scales(law: Law, uniforms: Tensor) -> Tensor:
    """Convert uniform numbers to scales, for the distribution of one coordinate or of the noise."""
    if law.name == "gaussian":
        return torch.ones_like(uniforms)
    if law.name == "laplace":
        return -uniforms.log()
    assert law.df is not None
    gammas = torch.from_numpy(gammaincinv(law.df / 2, uniforms.cpu().numpy())).to(uniforms)
    return (law.df - 2) / 2 / gammas.clamp(min=1e-300)


def _task_scales(law: TaskLaw, uniforms: Tensor) -> Tensor:
    if law.name != "sparse":
        assert law.coordinates is not None
        return _scales(law.coordinates, uniforms)
    assert law.density is not None
    return torch.where(uniforms < law.density, 1 / law.density, _SPIKE)


def _renew(
    state: State, scales: Float[Tensor, "B R N D"], law: TaskLaw, draws: _Draws, step: int
) -> tuple[State, Float[Tensor, "B R N D"]]:
    """Resample the particles and propose new scales, for prompts and runs whose effective sample size is below half the number of particles.

    The effective sample size is 1 / (sum of squared weights).
    """
    weights = state.log_weights.logsumexp(-1).softmax(-1)  # B R N
    prompts, runs = (weights.square().sum(-1) * weights.shape[-1] > 2).nonzero(as_tuple=True)  # P
    if not len(prompts):
        return state, scales
    offsets = draws.uniform(step, 1, 1)[runs, :1, 0]  # P 1
    chosen = _systematic(weights[prompts, runs], offsets)  # P N
    rows = prompts[:, None], runs[:, None], chosen
    renewed = State(state.log_weights[rows].log_softmax(-1), state.means[rows], state.covariances[rows])  # P N J
    renewed_scales = scales[rows]
    if law.name in ("student_t", "laplace", "sparse"):  # there is one component
        parts = _Particles(renewed.means.squeeze(-2), renewed.covariances.squeeze(-3), renewed_scales)
        proposals = _task_scales(law, draws.uniform(step, scales.shape[-1], 2))[runs]  # P N D
        _rejuvenate(parts, proposals, draws.uniform(step, scales.shape[-1], 3)[runs])
    at = prompts, runs
    changed = State(*(part.index_put(at, new) for part, new in zip(state, renewed, strict=True)))
    return changed, scales.index_put(at, renewed_scales)


def _systematic(weights: Float[Tensor, "P N"], offsets: Float[Tensor, "P 1"]) -> Int64[Tensor, "P N"]:
    """Return the particles chosen by systematic resampling."""
    count = weights.shape[-1]
    points = (torch.arange(count, device=weights.device) + offsets) / count  # P N
    return torch.searchsorted(weights.cumsum(-1), points).clamp(max=count - 1)


class _Particles(NamedTuple):
    """Posteriors and scales of N particles, for P pairs of a prompt and a run of the filter."""

    means: Float[Tensor, "P N D"]
    covariances: Float[Tensor, "P N D D"]
    scales: Float[Tensor, "P N D"]


def _rejuvenate(particles: _Particles, proposals: Float[Tensor, "P N D"], chances: Float[Tensor, "P N D"]) -> None:
    """Propose a new scale for each coordinate in turn, and accept or reject it by a Metropolis-Hastings test. Update in place.

    The acceptance ratio is the likelihood ratio of the examples so far. If a new scale s' replaces the scale s of coordinate d, the prior
    of w is multiplied by N(w_d; 0, s') / N(w_d; 0, s). With c = 1 / s' - 1 / s, the likelihood ratio is the mean of this factor over the
    posterior N(m_d, V_dd): sqrt(s / s') (1 + c V_dd)^(-1/2) exp(-c m_d^2 / (2 (1 + c V_dd))).
    """
    means, covariances, scales = particles
    for d in range(scales.shape[-1]):
        old, new = scales[..., d], proposals[..., d]
        change = 1 / new - 1 / old
        factor = 1 + change * covariances[..., d, d]
        mean = means[..., d, None].clone()
        ratio = 0.5 * ((old / new).log() - factor.log() - change * mean[..., 0].square() / factor)
        is_accepted = chances[..., d].log() < ratio
        row = covariances[..., d, :].clone()
        gain = row * torch.where(is_accepted, change / factor, 0.0).unsqueeze(-1)
        means.addcmul_(gain, mean, value=-1)
        covariances.addcmul_(gain.unsqueeze(-1), row.unsqueeze(-2), value=-1)
        scales[..., d] = torch.where(is_accepted, new, old)
