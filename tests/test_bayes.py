"""Bayes predictors of other worlds, compared with quadrature, plain loops, the baselines and limits."""

import dataclasses
import functools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import logsumexp

from icl import baselines, evidence
from icl.analysis.prior.energy import NUM_BLOCKS
from icl.bayes import bayes, candidates, posterior_tasks
from icl.bayes.gaussians import MIN_NOISE_VARIANCE, Components, exact_components, gaussian_mixture
from icl.bayes.particles import particle_filter
from icl.bayes.posterior import NUM_FILTERS
from icl.config import RunConfig, TaskConfig
from icl.config.validation import ConfigError
from icl.tasks import laws
from icl.tasks.laws import Law, TaskLaw
from icl.tasks.prompts import noise_law, sample_prompts, task_law, training_pool

VARIANCE = 0.25
PRIORS = {
    "gaussian": {},
    "student_t": {"prior": "student_t", "prior_df": 3.0},
    "laplace": {"prior": "laplace"},
    "sparse": {"prior": "sparse", "prior_density": 0.3},
    "low_rank": {"prior": "low_rank", "prior_rank": 2},
    "mixture": {"prior": "mixture", "prior_components": 3, "prior_between": 0.8},
}
NOISES = {
    "gaussian": {},
    "student_t": {"noise": "student_t", "noise_df": 3.0},
    "laplace": {"noise": "laplace"},
}
SCALAR = {
    "gaussian": stats.norm,
    "student_t": functools.partial(stats.t, 3.0),
    "laplace": stats.laplace,
}
STANDARD_DEVIATION = {"gaussian": 1.0, "student_t": math.sqrt(3), "laplace": math.sqrt(2)}


def world(prior="gaussian", noise="gaussian", *, task_size=3, max_examples=6, num_tasks=math.inf, **others):
    settings = PRIORS[prior] | NOISES[noise] | others
    return RunConfig(
        task=TaskConfig(
            num_tasks=num_tasks, task_size=task_size, max_examples=max_examples, noise_variance=VARIANCE, **settings
        )
    )


def prompts_of(config, batch_size=8, stream="true"):
    xs, ys, _ = sample_prompts(config, stream=stream, step=0, batch_size=batch_size)
    return xs.double(), ys.double()


def log_density(name, values, scale=1.0):
    """Return the log density of a scalar law with standard deviation `scale`, from scipy."""
    return SCALAR[name](scale=scale / STANDARD_DEVIATION[name]).logpdf(values)


def quadrature(xs, ys, points, log_prior, log_weights, noise):
    """Return the posterior means of all targets by a weighted sum over fixed values of w, in float64 loops over prompts."""
    predictions = np.zeros(ys.shape)
    for prompt, (x, y) in enumerate(zip(xs.numpy(), ys.numpy(), strict=True)):
        outputs = points @ x.T  # P K
        log_posterior = log_prior + log_weights
        for k in range(len(y)):
            weights = np.exp(log_posterior - log_posterior.max())
            predictions[prompt, k] = weights @ outputs[:, k] / weights.sum()
            log_posterior = log_posterior + log_density(noise, y[k] - outputs[:, k], VARIANCE**0.5)
    return torch.from_numpy(predictions)


def quadrature_nll(xs, ys, points, log_weights, noise):
    """Return -log p(y) of all targets by a weighted sum over fixed values of w, in float64 loops over prompts."""
    found = np.zeros(ys.shape)
    for prompt, (x, y) in enumerate(zip(xs.numpy(), ys.numpy(), strict=True)):
        logs = log_weights - logsumexp(log_weights)
        for k in range(len(y)):
            logs = logs + log_density(noise, y[k] - points @ x[k], VARIANCE**0.5)
            found[prompt, k] = -logsumexp(logs)
            logs = logs + found[prompt, k]
    return torch.from_numpy(found)


def line():
    """Return points of one dimension that are dense about 0, with the logarithms of their trapezoid weights."""
    half = np.geomspace(1e-6, 200, 3000)
    points = np.concatenate((-half[::-1], [0.0], half))
    return points, np.log(np.gradient(points))


def assert_error_is_as_stated(make, xs, ys, expected, *, at_most, num_seeds=12):
    """Check the mean squared error over filters with other seeds. It must be small, and equal the stated one."""
    estimates = [make(xs, ys, seed=seed) for seed in range(num_seeds)]
    error = torch.stack([(one.predictions - expected).square().mean() for one in estimates]).mean().item()
    stated = torch.stack([one.stderrs.square().mean() for one in estimates]).mean().item()
    assert error < at_most**2
    assert 0.4 < error / stated < 2.2, (error, stated)


# Quadrature


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("prior", ["gaussian", "student_t", "laplace"])
def test_the_particle_filter_agrees_with_quadrature_in_one_dimension(prior, noise):
    config = world(prior, noise, task_size=1)
    xs, ys = prompts_of(config, 6)
    points, log_weights = line()
    expected = quadrature(xs, ys, points[:, None], log_density(prior, points), log_weights, noise)
    make = functools.partial(
        particle_filter, law=task_law(config), noise=noise_law(config), noise_variance=VARIANCE, num_particles=64
    )
    if (prior, noise) == ("gaussian", "gaussian"):
        torch.testing.assert_close(make(xs, ys).predictions, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(expected, baselines.ridge(xs, ys, noise_variance=VARIANCE), rtol=1e-4, atol=1e-4)
    else:
        assert_error_is_as_stated(make, xs, ys, expected, at_most=0.06)


@pytest.mark.parametrize(
    ("prior", "noise"), [("student_t", "gaussian"), ("gaussian", "student_t"), ("laplace", "laplace")]
)
def test_the_nll_of_the_particle_filter_agrees_with_quadrature_within_the_stated_error(prior, noise):
    config = world(prior, noise, task_size=1)
    xs, ys = prompts_of(config, 24)
    points, log_weights = line()
    expected = quadrature_nll(xs, ys, points[:, None], log_density(prior, points) + log_weights, noise)
    law = {"law": task_law(config), "noise": noise_law(config), "noise_variance": VARIANCE, "num_particles": 64}
    filters = [particle_filter(xs, ys, **law, seed=seed) for seed in range(8)]
    errors = torch.stack([one.nll - expected for one in filters])
    stated = torch.stack([one.nll_stderrs.square() for one in filters]).mean().item()
    assert stated < 0.06**2
    assert 0.4 < errors.square().mean().item() / stated < 2.2
    # The mean of the eight filters is too large by about half of the variance, and differs from it by chance.
    means = errors.mean((1, 2))
    assert abs(means.mean() - stated / 2) < 4 * means.std() / 8**0.5 + stated / 4


def test_the_particle_filter_agrees_with_quadrature_in_two_dimensions():
    config = world("student_t", "laplace", task_size=2)
    xs, ys = prompts_of(config, 4)
    half = np.geomspace(1e-3, 60, 200)
    axis = np.concatenate((-half[::-1], [0.0], half))
    points = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)
    log_weights = np.add.outer(np.log(np.gradient(axis)), np.log(np.gradient(axis))).ravel()
    log_prior = log_density("student_t", points).sum(1)
    expected = quadrature(xs, ys, points, log_prior, log_weights, "laplace")
    make = functools.partial(particle_filter, law=task_law(config), noise=noise_law(config), noise_variance=VARIANCE)
    assert_error_is_as_stated(make, xs, ys, expected, at_most=0.06)


def test_a_sparse_prior_with_other_noise_agrees_with_quadrature():
    """The prior has an atom at 0, which is a point of its own."""
    config = world("sparse", "student_t", task_size=1)
    xs, ys = prompts_of(config, 6)
    points, log_weights = line()
    log_prior = log_density("gaussian", points, (1 / 0.3) ** 0.5) + math.log(0.3)
    points, log_prior = np.append(points, 0.0), np.append(log_prior + log_weights, math.log(0.7))
    expected = quadrature(xs, ys, points[:, None], log_prior, np.zeros(len(points)), "student_t")
    make = functools.partial(particle_filter, law=task_law(config), noise=noise_law(config), noise_variance=VARIANCE)
    assert_error_is_as_stated(make, xs, ys, expected, at_most=0.06)


# Exact mixtures


def plain_mixture(xs, ys, components):
    """Return predictions and NLL by the multivariate normal likelihood of every prefix and component, in NumPy."""
    predictions, evidences = np.zeros(ys.shape), np.zeros((len(ys), ys.shape[1] + 1))
    weights, means, covariances = (part.numpy() for part in components)
    for prompt, (x, y) in enumerate(zip(xs.numpy(), ys.numpy(), strict=True)):
        for k in range(len(y)):
            logs, outputs = [], []
            for log_weight, mean, covariance in zip(weights, means, covariances, strict=True):
                spread = x[:k] @ covariance @ x[:k].T + VARIANCE * np.eye(k)
                gain = np.linalg.solve(spread, y[:k] - x[:k] @ mean) if k else np.zeros(0)
                outputs.append(x[k] @ (mean + covariance @ x[:k].T @ gain))
                evidence = stats.multivariate_normal(x[:k] @ mean, spread).logpdf(y[:k]) if k else 0.0
                logs.append(log_weight + evidence)
            posterior = np.exp(np.array(logs) - max(logs))
            predictions[prompt, k] = posterior @ outputs / posterior.sum()
        for k in range(len(y) + 1):
            terms = [
                stats.multivariate_normal(x[:k] @ mean, x[:k] @ spread @ x[:k].T + VARIANCE * np.eye(k)).logpdf(y[:k])
                if k
                else 0.0
                for mean, spread in zip(means, covariances, strict=True)
            ]
            evidences[prompt, k] = logsumexp(weights + terms)
    return torch.from_numpy(predictions), torch.from_numpy(-np.diff(evidences))


@pytest.mark.parametrize("prior", ["gaussian", "sparse", "low_rank", "mixture"])
def test_exact_predictors_match_plain_likelihoods(prior):
    config = world(prior)
    xs, ys = prompts_of(config)
    components = exact_components(task_law(config), 3)
    expected, nll = plain_mixture(xs, ys, components)
    found = gaussian_mixture(xs, ys, components=components, noise_variance=VARIANCE)
    torch.testing.assert_close(found.predictions, expected)
    torch.testing.assert_close(found.nll, nll)
    if prior != "gaussian":
        estimate = bayes(config, xs, ys)
        torch.testing.assert_close(estimate.predictions, expected)
        torch.testing.assert_close(estimate.nll, nll)
        assert not estimate.stderrs.any()
        assert not estimate.nll_stderrs.any()


def test_one_component_is_ridge():
    xs, ys = prompts_of(world(), 20)
    exact = gaussian_mixture(xs, ys, components=exact_components(TaskLaw(), 3), noise_variance=VARIANCE)
    torch.testing.assert_close(exact.predictions, baselines.ridge(xs, ys, noise_variance=VARIANCE))
    torch.testing.assert_close(exact.nll, evidence.ridge_nll(xs, ys, noise_variance=VARIANCE))


def test_components_about_their_means_are_the_smoothed_dmmse():
    config = world("mixture")
    xs, ys = prompts_of(config, 20)
    tasks = laws.component_means(task_law(config), 3).double()
    expected = baselines.smoothed_dmmse(xs, ys, tasks=tasks, noise_variance=VARIANCE, task_variance=1 - 0.8)
    torch.testing.assert_close(bayes(config, xs, ys).predictions, expected)


def test_low_rank_is_ridge_in_the_subspace():
    config = world("low_rank")
    xs, ys = prompts_of(config, 20)
    inside = xs @ laws.subspace(task_law(config), 3).double()
    expected = baselines.ridge(inside, ys, noise_variance=VARIANCE)
    torch.testing.assert_close(bayes(config, xs, ys).predictions, expected)


def test_components_of_sparse_tasks_have_the_prior_weights_and_variances():
    log_weights, means, covariances = exact_components(TaskLaw("sparse", density=0.3), 3)
    assert len(log_weights) == 8
    assert log_weights.exp().sum().item() == pytest.approx(1)
    mixed = (log_weights.exp()[:, None, None] * covariances).sum(0)
    torch.testing.assert_close(mixed, torch.eye(3).double())
    assert not means.any()
    assert exact_components(TaskLaw("sparse", density=0.3), 11) is None


@pytest.mark.parametrize("density", [0.1, 0.3, 1 - 1e-9])
def test_weights_of_sparse_components_are_in_double_precision(density):
    """The density was rounded to float32, so 1 - 1e-9 became 1 and the smallest weights became 0."""
    weights = exact_components(TaskLaw("sparse", density=density), 2).log_weights.exp()
    absent = 1 - density
    assert weights.tolist() == pytest.approx([absent**2, absent * density, absent * density, density**2], rel=1e-12)


def test_the_filters_error_is_unknown_for_sparse_tasks_with_little_noise():
    """With D = 8 the spread over runs was 2 times too small for the noise variance 0.01, and 10 times for 0.001."""
    xs, ys = prompts_of(world("sparse", task_size=12), batch_size=2)
    run = functools.partial(particle_filter, xs, ys, noise=Law(), num_runs=2, num_particles=8)
    unknown = run(law=TaskLaw("sparse", density=0.3), noise_variance=0.09)
    assert unknown.stderrs.isnan().all()
    assert unknown.nll_stderrs.isnan().all()
    assert unknown.predictions.isfinite().all()
    assert unknown.nll.isfinite().all()
    for law, noise_variance in ((TaskLaw("sparse", density=0.3), 0.1), (TaskLaw("student_t", df=3.0), 0.09)):
        known = run(law=law, noise_variance=noise_variance)
        assert known.stderrs.isfinite().all()
        assert known.nll_stderrs.isfinite().all()


@pytest.mark.parametrize("prior", ["sparse", "mixture", "low_rank"])
def test_the_particle_filter_agrees_with_the_exact_predictor(prior):
    config = world(prior)
    xs, ys = prompts_of(config, 6)
    make = functools.partial(particle_filter, law=task_law(config), noise=Law(), noise_variance=VARIANCE)
    expected = bayes(config, xs, ys).predictions
    if prior != "sparse":  # all particles are the same
        torch.testing.assert_close(make(xs, ys).predictions, expected)
    else:
        assert_error_is_as_stated(make, xs, ys, expected, at_most=0.06)


@pytest.mark.parametrize("noise", ["gaussian", "student_t"])
def test_no_component_of_a_mixture_with_other_noise_is_lost(noise):
    """With 64 components, 16 particles that had one component each would lose most of them."""
    config = world(
        "mixture",
        noise,
        task_size=8,
        max_examples=8,
        prior_components=64,
        noise_df=1e9 if noise != "gaussian" else None,
    )
    xs, ys = prompts_of(config, 4)
    law = task_law(config)
    found = particle_filter(
        xs, ys, law=law, noise=noise_law(config), noise_variance=VARIANCE, num_runs=2, num_particles=16
    )
    expected = gaussian_mixture(xs, ys, components=exact_components(law, 8), noise_variance=VARIANCE)
    tolerance = {"rtol": 1e-10, "atol": 1e-10} if noise == "gaussian" else {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(found.predictions, expected.predictions, **tolerance)
    torch.testing.assert_close(found.nll, expected.nll, **tolerance)


def test_the_filter_of_a_mixture_agrees_with_quadrature():
    config = world("mixture", "laplace", task_size=1, prior_components=12, prior_between=0.99)
    xs, ys = prompts_of(config, 6)
    points, log_weights = line()
    means = laws.component_means(task_law(config), 1).double().numpy()[:, 0]
    log_prior = logsumexp(log_density("gaussian", points[:, None] - means, 0.1), axis=1)
    expected = quadrature(xs, ys, points[:, None], log_prior, log_weights, "laplace")
    make = functools.partial(particle_filter, law=task_law(config), noise=noise_law(config), noise_variance=VARIANCE)
    assert_error_is_as_stated(make, xs, ys, expected, at_most=0.03)


@pytest.mark.parametrize("name", ["gaussian", "sparse"])
def test_the_smallest_noise_variance_gives_accurate_predictions(name):
    xs, _ = prompts_of(world(max_examples=12))
    ys = xs.sum(-1)
    components = exact_components(TaskLaw(name, density=0.3), 3)
    found = gaussian_mixture(xs, ys, components=components, noise_variance=MIN_NOISE_VARIANCE)
    torch.testing.assert_close(found.predictions[:, 3:], ys[:, 3:], rtol=0, atol=1e-6)
    assert found.nll.isfinite().all()


def test_a_smaller_noise_variance_is_refused():
    config = RunConfig(task=TaskConfig(prior="laplace", task_size=2, noise_variance=1e-15))
    xs, ys = torch.ones(1, 1, 2).double(), torch.ones(1, 1).double()
    with pytest.raises(ConfigError, match="must be at least 1e-12"):
        bayes(config, xs, ys)
    with pytest.raises(ConfigError, match="must be at least 1e-12"):
        posterior_tasks(config, "gaussian", xs, ys, torch.zeros(1).double())


def test_rare_coordinates_of_sparse_tasks_need_more_noise_because_their_variance_is_larger():
    """With p = 1e-6 and the noise variance 1e-12, the NLL was wrong by 36 nats."""
    task = TaskConfig(prior="sparse", prior_density=1e-6, task_size=2, noise_variance=1e-7)
    xs, ys = torch.ones(1, 1, 2).double(), torch.ones(1, 1).double()
    with pytest.raises(ConfigError, match="must be at least 1e-06"):
        bayes(RunConfig(task=task), xs, ys)
    with pytest.raises(ConfigError, match="must be at least 1e-06"):
        posterior_tasks(RunConfig(task=task), "prior", xs, ys, torch.zeros(1).double())
    assert bayes(RunConfig(task=dataclasses.replace(task, noise_variance=1e-5)), xs, ys) is not None


# Posteriors


def draws_of(config, xs, ys, candidate="prior", count=4096):
    """Return draws of the task given the examples of one prompt."""
    many = xs.expand(count, -1, -1).contiguous(), ys.expand(count, -1).contiguous()
    uniforms = torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pool = training_pool(config).double() if candidate == "pool" else None
    return posterior_tasks(config, candidate, *many, uniforms, pool=pool)


def assert_moments(draws, points, log_weights, spread):
    """Compare E w and E|w| of one-dimensional draws with those of weighted points. Errors are those of independent blocks."""
    weights = np.exp(log_weights - logsumexp(log_weights))
    for function in (lambda w: w, abs):
        blocks = function(draws[:, 0]).unflatten(0, (NUM_FILTERS, -1)).mean(1)
        assert abs(blocks.mean() - weights @ function(points)) < 4 * blocks.std() / NUM_FILTERS**0.5 + spread


@pytest.mark.parametrize(
    ("prior", "noise", "candidate"),
    [
        ("sparse", "gaussian", "prior"),
        ("student_t", "laplace", "prior"),
        ("student_t", "laplace", "gaussian"),
        ("laplace", "student_t", "pool"),
    ],
)
@pytest.mark.parametrize("count", [0, 3])
def test_tasks_are_drawn_from_the_posterior_of_a_candidate(prior, noise, candidate, count):
    """The oracle is quadrature; for `sparse`, its point at 0 has the weight of the atom."""
    config = world(prior, noise, task_size=1, num_tasks=5)
    xs, ys = (part[:1, :count] for part in prompts_of(config, 1))
    xs = 0.2 * xs  # so that the examples leave several tasks possible
    if candidate == "pool":
        points = training_pool(config).double().numpy()[:, 0]
        logs = np.zeros(5)
    elif prior == "sparse":
        points, steps = line()
        points = np.append(points, 0.0)
        logs = np.append(log_density("gaussian", points[:-1], (1 / 0.3) ** 0.5) + math.log(0.3) + steps, math.log(0.7))
    else:
        points, steps = line()
        logs = log_density("gaussian" if candidate == "gaussian" else prior, points) + steps
    for k in range(count):
        logs = logs + log_density(noise, ys[0, k].item() - points * xs[0, k, 0].item(), VARIANCE**0.5)
    exact = candidate == "pool" or noise == "gaussian" or count == 0
    assert_moments(draws_of(config, xs, ys, candidate), points, logs, 0.0 if exact else 2 / 512)


def test_candidates_are_named_by_the_run():
    assert candidates(world("laplace", num_tasks=4)) == ("pool", "prior", "gaussian")
    assert candidates(world("laplace")) == ("prior", "gaussian")
    assert candidates(world(noise="laplace", num_tasks=4)) == ("pool", "gaussian")
    assert NUM_FILTERS == NUM_BLOCKS  # so that the jackknife includes the errors of the filters


# Limits


@pytest.mark.parametrize(
    ("law", "noise"),
    [
        (TaskLaw("student_t", df=1e9), Law()),
        (TaskLaw(), Law("student_t", 1e9)),
        (TaskLaw("sparse", density=1.0), Law()),
    ],
)
def test_gaussian_limits_are_ridge(law, noise):
    xs, ys = prompts_of(world())
    estimate = particle_filter(xs, ys, law=law, noise=noise, noise_variance=VARIANCE, num_particles=16)
    expected = baselines.ridge(xs, ys, noise_variance=VARIANCE)
    torch.testing.assert_close(estimate.predictions, expected, rtol=1e-3, atol=1e-3)


def test_dense_sparse_tasks_have_ridge_as_their_predictor():
    config = world("sparse", prior_density=1.0)
    xs, ys = prompts_of(config)
    torch.testing.assert_close(bayes(config, xs, ys).predictions, baselines.ridge(xs, ys, noise_variance=VARIANCE))


@pytest.mark.parametrize(
    "inputs", [{"inputs": "student_t", "input_df": 3.0}, {"inputs": "ar1", "input_correlation": 0.9}]
)
def test_ridge_remains_the_predictor_whatever_the_inputs(inputs):
    config = world(**inputs)
    xs, ys = prompts_of(config, 6)
    assert bayes(config, xs, ys) is None
    expected, _ = plain_mixture(xs, ys, exact_components(TaskLaw(), 3))
    torch.testing.assert_close(baselines.ridge(xs, ys, noise_variance=VARIANCE), expected)


def test_there_is_no_other_predictor_in_the_usual_world_or_without_noise():
    xs, ys = prompts_of(world())
    assert bayes(world(), xs, ys) is None
    silent = RunConfig(task=TaskConfig(prior="laplace", noise_variance=0.0))
    assert bayes(silent, xs[..., :2], ys) is None


# Contract of a predictor


@pytest.mark.parametrize("noise", ["gaussian", "laplace"])
@pytest.mark.parametrize("prior", ["student_t", "sparse", "mixture"])
def test_predictions_depend_on_earlier_examples_of_their_own_prompt_only(prior, noise):
    config = world(prior, noise)
    xs, ys = prompts_of(config, 5)
    before = bayes(config, xs, ys)
    changed = ys.clone()
    changed[:, 3:] += 1.0
    torch.testing.assert_close(bayes(config, xs, changed).predictions[:, :4], before.predictions[:, :4])
    assert (bayes(config, xs, changed).predictions[:, 4:] != before.predictions[:, 4:]).all()
    alone = bayes(config, xs[2:3], ys[2:3])
    torch.testing.assert_close(alone.predictions[0], before.predictions[2])
    assert before.predictions.shape == before.stderrs.shape == ys.shape


@pytest.mark.parametrize("prior", ["student_t", "laplace", "sparse"])
def test_without_examples_the_prediction_is_zero(prior):
    config = world(prior, "laplace")
    assert not bayes(config, *prompts_of(config)).predictions[:, 0].any()


@pytest.mark.parametrize(
    ("prior", "noise"),
    [("sparse", "gaussian"), ("mixture", "gaussian"), ("low_rank", "gaussian"), ("gaussian", "student_t")],
)
def test_in_its_own_world_the_bayes_predictor_is_better_than_ridge(prior, noise):
    """The losses are compared within prompts, and the difference must be three standard errors."""
    config = world(prior, noise, **({"noise_df": 2.1} if noise == "student_t" else {}))
    xs, ys = prompts_of(config, 256 if noise == "student_t" else 600)
    ridge = baselines.ridge(xs, ys, noise_variance=VARIANCE)
    gain = ((ridge - ys).square() - (bayes(config, xs, ys).predictions - ys).square()).mean(1)
    assert gain.mean() > 3 * gain.std() / math.sqrt(len(gain))


# dMMSE


@pytest.mark.parametrize("noise", NOISES)
def test_dmmse_matches_a_plain_loop_over_tasks_with_the_noise_density(noise):
    config = world("laplace", noise, num_tasks=9)
    xs, ys = prompts_of(config, 6, stream="pretrain")
    tasks = training_pool(config).double()
    zeros = np.zeros(len(tasks))
    expected = quadrature(xs, ys, tasks.numpy(), zeros, zeros, noise)
    found = baselines.dmmse(xs, ys, tasks=tasks, noise_variance=VARIANCE, noise=noise_law(config))
    torch.testing.assert_close(found, expected)
    nll = evidence.dmmse_nll(xs, ys, tasks=tasks, noise_variance=VARIANCE, noise=noise_law(config))
    torch.testing.assert_close(nll, quadrature_nll(xs, ys, tasks.numpy(), zeros, noise))


def test_dmmse_with_many_degrees_of_freedom_is_that_of_gaussian_noise():
    config = world(num_tasks=9)
    xs, ys = prompts_of(config, 6, stream="pretrain")
    settings = {"tasks": training_pool(config).double(), "noise_variance": VARIANCE}
    torch.testing.assert_close(
        baselines.dmmse(xs, ys, **settings, noise=Law("student_t", 1e9)), baselines.dmmse(xs, ys, **settings)
    )


def test_dmmse_refuses_another_law_of_no_noise():
    xs, ys = prompts_of(world())
    with pytest.raises(ValueError, match="`noise_variance` must be positive"):
        baselines.dmmse(xs, ys, tasks=torch.zeros(1, 3), noise_variance=0.0, noise=Law("laplace"))


def test_weights_of_components_may_differ():
    """A component with weight zero has no effect."""
    xs, ys = prompts_of(world())
    unit = torch.eye(3).double()
    two = Components(torch.tensor([0.0, -math.inf]).double(), torch.ones(2, 3).double(), torch.stack((unit, 5 * unit)))
    one = Components(torch.zeros(1).double(), torch.ones(1, 3).double(), unit[None])
    predict = functools.partial(gaussian_mixture, xs, ys, noise_variance=VARIANCE)
    torch.testing.assert_close(predict(components=two).predictions, predict(components=one).predictions)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("prior", "noise"), [("sparse", "gaussian"), ("student_t", "laplace"), ("mixture", "student_t")]
)
def test_prompts_and_predictions_on_cuda_agree_with_those_on_the_cpu(prior, noise):
    """The filter makes the same choices on both devices except where a rounding error decides, so errors are compared on average."""
    config = world(prior, noise, inputs="ar1", input_correlation=0.5)
    xs, ys, ws = sample_prompts(config, stream="true", step=0, batch_size=64, device="cuda")
    for ours, theirs in zip(sample_prompts(config, stream="true", step=0, batch_size=64), (xs, ys, ws), strict=True):
        torch.testing.assert_close(theirs.cpu(), ours, rtol=1e-4, atol=1e-4)
    there, here = bayes(config, xs, ys), bayes(config, xs.cpu(), ys.cpu())
    difference = (there.predictions.cpu() - here.predictions).square().mean()
    assert difference <= here.stderrs.square().mean() + 1e-8
