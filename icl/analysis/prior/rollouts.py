"""Predictive Monte Carlo: prompts that a model generates (rollouts), and estimates of the task behind each prompt.

A rollout begins with n given examples (none by default). Then x_k is drawn from the distribution of the run's inputs,
and y_k from the model's predictive distribution given x_k and all examples before it. The example is appended. We draw
further examples in the same way until the prompt has K examples. Fong, Holmes and Walker 2023 ("Martingale posterior
distributions") show that such rollouts give samples from a posterior. A parameter that is estimated from an infinitely
long rollout is a sample from the posterior that the predictive distributions imply (or from the prior, if n = 0). For
the exact Bayes predictor of a prior, rollouts are distributed like prompts whose task is drawn from the posterior of
this prior given the n examples.

K examples determine the task only up to an error. So we never compare the estimates from rollouts with a prior itself. Instead, we
apply the same estimator to prompts of each candidate prior, and compare the estimates. `bayes_prompts` makes the prompts of a
candidate: it draws the task from the candidate's posterior (`icl.bayes.posterior`), and the noise from the distribution of the run's
noise.

The estimator is ridge regression with lambda = sigma^2: the w that minimises |y - X w|^2 + sigma^2 |w|^2. Unlike least squares, this
estimator exists for K < D. For K close to D its error has finite moments, as the energy distance requires. We use it for every prior
and noise, even where another estimator would be better.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from icl import rng
from icl.bayes import Candidate, posterior_tasks
from icl.config import ModelConfig, RunConfig
from icl.evaluation.predictors import predict_prompts
from icl.model import heads
from icl.model.heads import Predictive
from icl.model.stacked import Params, outputs, size
from icl.tasks import laws
from icl.tasks.prompts import Distribution, Prompts, noise_law, prompt_source, training_pool

PredictNext: TypeAlias = Callable[[Tensor, Tensor], Predictive]
"""Function from xs (B, k, D) and ys (N, B, k) to the distribution of the last target (N, B). It must not use the last target itself."""
_MAX_UNIFORM = 2**31 - 1


class Draws(NamedTuple):
    """All random draws for rollouts: inputs, targets of the given examples, and random numbers for the other targets."""

    xs: Float[Tensor, "B K D"]
    ys: Float[Tensor, "B K"]
    """Targets of ordinary prompts. Rollouts use only the targets of the first n examples."""
    uniforms: Float[Tensor, "B K"]
    normals: Float[Tensor, "B K"]
    noise: Float[Tensor, "B K"]
    """Noise of the candidates' targets, divided by its standard deviation. It equals the field `normals` if the run's noise is Gaussian."""


def make_draws(
    config: RunConfig, name: str, count: int, distribution: Distribution, *, pool_step: int | None = None
) -> Draws:
    """Return the draws of a set of rollouts.

    The random numbers depend only on `seeds.evaluation` and on the name of the set.

    Args:
        config: The run.
        name: Name of the set: `model`, or a candidate.
        count: Number of rollouts.
        distribution: Distribution of the tasks of the given examples.
        pool_step: Step whose pool is used if the pool of tasks changes.
    """
    source = prompt_source(config, stream=f"prior/{name}", distribution=distribution, pool_step=pool_step)
    prompts = source.sample(range(1), range(count))
    keys = [rng.stream(config.seeds.evaluation, f"prior/{name}/{kind}") for kind in ("uniforms", "normals")]
    indices, positions = torch.arange(count), torch.arange(config.task.max_examples)
    uniforms = rng.integers(keys[0], positions, indices, _MAX_UNIFORM).mT.double() / _MAX_UNIFORM  # B K
    step = torch.zeros(1, dtype=torch.int64)
    normals = rng.normal(keys[1], step, indices, len(positions))[0]
    law, noise = noise_law(config), normals
    if law != laws.GAUSSIAN:
        key = rng.stream(config.seeds.evaluation, f"prior/{name}/noise-of-targets")
        noise = laws.draw(law, key, step, indices, len(positions))[0]
    return Draws(prompts.xs[0], prompts.ys[0], uniforms.to(normals), normals, noise)


def model_rollouts(model: ModelConfig, params: Params, draws: Draws, *, num_context: int) -> Float[Tensor, "N B K"]:
    """Return the targets of the rollouts of every checkpoint."""
    device = next(iter(params.values())).device
    draws = Draws(*(tensor.to(device) for tensor in draws))
    last = partial(_last_outputs, model)

    def predict_next(xs: Tensor, ys: Tensor) -> Predictive:
        inputs = xs.expand(len(ys), *xs.shape)  # N B k D
        return heads.predictive(model, predict_prompts(last, params, Prompts(inputs, ys, inputs[..., 0, :])))

    return rollouts(predict_next, draws, num_members=size(params), num_context=num_context)


def rollouts(
    predict_next: PredictNext, draws: Draws, *, num_members: int = 1, num_context: int = 0
) -> Float[Tensor, "N B K"]:
    """Return the targets of prompts that are continued with predictive distributions after `num_context` given examples."""
    known = draws.ys[:, :num_context]
    ys = torch.nn.functional.pad(known, (0, draws.ys.shape[1] - num_context)).repeat(num_members, 1, 1)  # N B K
    for k in range(num_context, ys.shape[-1]):
        distributions = predict_next(draws.xs[:, : k + 1], ys[..., : k + 1])
        ys[..., k] = heads.draw(distributions, draws.uniforms[:, k], draws.normals[:, k]).to(ys)
    return ys


def bayes_prompts(
    config: RunConfig, candidate: Candidate, draws: Draws, *, num_context: int, pool_step: int | None = None
) -> Float[Tensor, "B K"]:
    """Return the targets of prompts that are continued under a candidate prior, in float64.

    The task w is drawn from the candidate's posterior given the first examples. The other targets are w . x_k + noise.
    """
    xs, ys = draws.xs.double(), draws.ys.double()
    known = xs[:, :num_context], ys[:, :num_context]
    pool = training_pool(config, step=pool_step).double() if candidate == "pool" else None
    tasks = posterior_tasks(config, candidate, *known, draws.uniforms[:, 0].double(), pool=pool)
    noise = config.task.noise_variance**0.5 * draws.noise.double()
    continued = (xs * tasks.unsqueeze(1)).sum(-1) + noise  # B K
    return torch.cat((known[1], continued[:, num_context:]), dim=1)


def estimate_tasks(
    xs: Float[Tensor, "B K D"], ys: Float[Tensor, "*N B K"], *, noise_variance: float
) -> Float[Tensor, "*N B D"]:
    """Return the ridge estimate of every prompt's task, in float64.

    This is the least-squares solution of X w = y and sigma w = 0 together.
    """
    inputs, targets = xs.double(), ys.double()
    task_size = inputs.shape[-1]
    penalty = noise_variance**0.5 * torch.eye(task_size, dtype=torch.float64, device=inputs.device)
    matrix = torch.cat((inputs, penalty.expand(len(inputs), -1, -1)), dim=1)  # B K+D D
    # The pseudo-inverse gives the estimates of all members at once.
    inverse = torch.linalg.pinv(matrix)[..., : inputs.shape[1]]  # B D K
    return (inverse @ targets.unsqueeze(-1)).squeeze(-1)


def _last_outputs(model: ModelConfig, params: Params, xs: Tensor, ys: Tensor) -> Float[Tensor, "N B O"]:
    return outputs(model, params, xs, ys)[..., -1, :]
