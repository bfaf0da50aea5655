"""Baselines compared with plain loops, scikit-learn and closed forms; a contract for all baselines; speed and memory of dMMSE."""

import inspect
import math
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import Lasso, Ridge
from sklearn.neighbors import KNeighborsRegressor

from icl.baselines import (
    BASELINES,
    averaging,
    dmmse,
    knn,
    lasso,
    ols,
    ridge,
    smoothed_dmmse,
    task_mean,
    tune_task_variance,
    zero,
)
from icl.compute import task_sums

SETTINGS = {
    "noise_variance": 0.25,
    "tasks": torch.randn(7, 3, generator=torch.Generator().manual_seed(5)),
    "task_variance": 0.3,
    "alpha": 0.1,
}
SIZES = {"batch_size": st.integers(1, 4), "num_examples": st.integers(1, 9), "task_size": st.integers(1, 6)}
NAMES = sorted(BASELINES)


def make_prompts(batch_size=5, num_examples=6, task_size=3, *, noise_variance=0.25, tasks=None, seed=0, dtype=None):
    """Return prompts as in the papers: xs, ys, ws. The task vectors are rows of `tasks`, or standard normal."""
    generator = torch.Generator().manual_seed(seed)
    xs = torch.randn(batch_size, num_examples, task_size, generator=generator, dtype=torch.float64)
    ws = torch.randn(batch_size, task_size, generator=generator, dtype=torch.float64)
    if tasks is not None:
        ws = tasks[torch.randint(len(tasks), (batch_size,), generator=generator)].double()
    noise = torch.randn(batch_size, num_examples, generator=generator, dtype=torch.float64)
    ys = torch.einsum("bkd,bd->bk", xs, ws) + noise_variance**0.5 * noise
    return tuple(part.to(dtype or torch.float64) for part in (xs, ys, ws))


def make_tasks(num_tasks, task_size, seed=1, dtype=torch.float64):
    return torch.randn(num_tasks, task_size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(
        dtype
    )


def call(name, xs, ys, **changes):
    """Call the baseline with those settings that it accepts."""
    settings = {**SETTINGS, **changes}
    parameters = inspect.signature(BASELINES[name]).parameters
    return BASELINES[name](xs, ys, **{key: value for key, value in settings.items() if key in parameters})


def prefix_by_prefix(xs, ys, predict):
    """Apply `predict(examples, targets, query)` in NumPy to every prefix of every prompt."""
    xs, ys = xs.double().numpy(), ys.double().numpy()
    rows = [[predict(x[:k], y[:k], x[k]) for k in range(len(y))] for x, y in zip(xs, ys, strict=True)]
    return torch.tensor(np.array(rows))


# Independent oracles, transcribed from PAPERS.md, section 3


def plain_averaging(x, y, query):
    return sum(y_j * x_j for x_j, y_j in zip(x, y, strict=True)) @ query / len(y) if len(y) else 0.0


def plain_ols(x, y, query):
    return np.linalg.lstsq(x, y, rcond=None)[0] @ query if len(y) else 0.0


def plain_ridge(noise_variance):
    def predict(x, y, query):
        return np.linalg.solve(x.T @ x + noise_variance * np.eye(len(query)), x.T @ y) @ query

    return predict


def plain_dmmse(tasks, noise_variance):
    tasks = tasks.double().numpy()

    def predict(x, y, query):
        exponents = [
            -sum((y_j - w @ x_j) ** 2 for x_j, y_j in zip(x, y, strict=True)) / 2 / noise_variance for w in tasks
        ]
        weights = [math.exp(exponent - max(exponents)) for exponent in exponents]
        return sum(weight * w for weight, w in zip(weights, tasks, strict=True)) @ query / sum(weights)

    return predict


@given(**SIZES, seed=st.integers(0, 1000))
def test_averaging_matches_plain_loops(batch_size, num_examples, task_size, seed):
    xs, ys, _ = make_prompts(batch_size, num_examples, task_size, seed=seed)
    torch.testing.assert_close(averaging(xs, ys), prefix_by_prefix(xs, ys, plain_averaging))


@given(**SIZES, seed=st.integers(0, 1000))
def test_ols_matches_numpy_at_every_rank(batch_size, num_examples, task_size, seed):
    """With fewer than D examples, the solution must have the least norm, as from NumPy's SVD."""
    xs, ys, _ = make_prompts(batch_size, num_examples, task_size, seed=seed)
    torch.testing.assert_close(ols(xs, ys), prefix_by_prefix(xs, ys, plain_ols), rtol=1e-6, atol=1e-8)


@given(**SIZES, seed=st.integers(0, 1000), noise_variance=st.floats(1e-4, 10))
def test_ridge_matches_the_normal_equations(batch_size, num_examples, task_size, seed, noise_variance):
    xs, ys, _ = make_prompts(batch_size, num_examples, task_size, seed=seed)
    expected = prefix_by_prefix(xs, ys, plain_ridge(noise_variance))
    torch.testing.assert_close(ridge(xs, ys, noise_variance=noise_variance), expected, rtol=1e-7, atol=1e-9)


def test_ridge_matches_scikit_learn():
    xs, ys, _ = make_prompts(4, 10, 5)

    def predict(x, y, query):
        return Ridge(alpha=0.125, fit_intercept=False).fit(x, y).predict(query[None])[0] if len(y) else 0.0

    torch.testing.assert_close(ridge(xs, ys, noise_variance=0.125), prefix_by_prefix(xs, ys, predict))


def test_lasso_solves_its_optimality_conditions():
    """X^T (y - X w) / k is alpha sign(w) where w is not 0, and has magnitude at most alpha elsewhere."""
    xs, ys, _ = make_prompts(4, 10, 5)
    alpha = 0.1

    def predict(x, y, query):
        if not len(y):
            return 0.0
        w = Lasso(alpha=alpha, fit_intercept=False, max_iter=100_000, tol=1e-10).fit(x, y).coef_
        slope = x.T @ (y - x @ w) / len(y)
        assert np.abs(slope - alpha * np.sign(w))[w != 0].max(initial=0) < 1e-4
        assert np.abs(slope).max() < alpha + 1e-4
        return w @ query

    expected = prefix_by_prefix(xs, ys, predict)
    torch.testing.assert_close(lasso(xs, ys, alpha=alpha), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("neighbours", [1, 3, 5])
def test_knn_matches_scikit_learn(neighbours):
    xs, ys, _ = make_prompts(4, 10, 5)

    def predict(x, y, query):
        return KNeighborsRegressor(min(neighbours, len(y))).fit(x, y).predict(query[None])[0] if len(y) else 0.0

    torch.testing.assert_close(knn(xs, ys, k=neighbours), prefix_by_prefix(xs, ys, predict))


@given(**SIZES, num_tasks=st.integers(1, 20), seed=st.integers(0, 1000), noise_variance=st.floats(0.01, 10))
def test_dmmse_matches_plain_loops(batch_size, num_examples, task_size, num_tasks, seed, noise_variance):
    tasks = make_tasks(num_tasks, task_size)
    xs, ys, _ = make_prompts(batch_size, num_examples, task_size, seed=seed)
    expected = prefix_by_prefix(xs, ys, plain_dmmse(tasks, noise_variance))
    torch.testing.assert_close(dmmse(xs, ys, tasks=tasks, noise_variance=noise_variance), expected)


def plain_smoothed_dmmse(tasks, noise_variance, task_variance):
    """Return the prediction component by component: the evidence, and the posterior mean of ridge about the component's center."""
    tasks = tasks.double().numpy()

    def predict(x, y, query):
        covariance = task_variance * x @ x.T + noise_variance * np.eye(len(y))
        residuals = [y - x @ w for w in tasks]
        logs = np.array([-0.5 * r @ np.linalg.solve(covariance, r) if len(y) else 0.0 for r in residuals])
        weights = np.exp(logs - logs.max())
        means = [
            w + (task_variance * x.T @ np.linalg.solve(covariance, r) if len(y) else 0.0)
            for w, r in zip(tasks, residuals, strict=True)
        ]
        return weights @ np.array(means) @ query / weights.sum()

    return predict


@given(
    **SIZES,
    num_tasks=st.integers(1, 20),
    seed=st.integers(0, 1000),
    noise_variance=st.floats(0.01, 10),
    task_variance=st.floats(1e-4, 10),
)
def test_smoothed_dmmse_matches_plain_loops(
    batch_size, num_examples, task_size, num_tasks, seed, noise_variance, task_variance
):
    tasks = make_tasks(num_tasks, task_size)
    xs, ys, _ = make_prompts(batch_size, num_examples, task_size, seed=seed)
    variances = {"noise_variance": noise_variance, "task_variance": task_variance}
    expected = prefix_by_prefix(xs, ys, plain_smoothed_dmmse(tasks, **variances))
    found = smoothed_dmmse(xs, ys, tasks=tasks, **variances)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("noise_variance", [1e-20, 1e-80, 1e-200])
def test_smoothed_dmmse_has_a_limit_for_tiny_noise(noise_variance):
    """The whitened targets exceed float32. The error was that `ys` is too large, although the targets are about 1."""
    xs, ys, _ = make_prompts(4, 6, 2, seed=3)
    found = smoothed_dmmse(xs, ys, tasks=torch.zeros(1, 2), noise_variance=noise_variance, task_variance=1.0)
    torch.testing.assert_close(found, ols(xs, ys))


def test_smoothed_dmmse_lies_between_dmmse_and_ridge():
    """Without smoothing it is dMMSE. With one Gaussian of mean 0 and variance 1, which is ridge's prior, it is ridge."""
    xs, ys, _ = make_prompts(20, 8, 3)
    tasks = make_tasks(7, 3)
    sharp = smoothed_dmmse(xs, ys, tasks=tasks, noise_variance=0.25, task_variance=0.0)
    torch.testing.assert_close(sharp, dmmse(xs, ys, tasks=tasks, noise_variance=0.25))
    wide = smoothed_dmmse(xs, ys, tasks=torch.zeros(1, 3), noise_variance=0.25, task_variance=1.0)
    torch.testing.assert_close(wide, ridge(xs, ys, noise_variance=0.25))


def test_the_variance_is_tuned_to_that_of_the_prior():
    """Tasks are drawn around a few centers. The smallest loss is that of the Bayes predictor, at the true variance."""
    centres, variance = 2 * make_tasks(4, 3), 0.2
    xs, _, offsets = make_prompts(4000, 8, 3, seed=1)
    picked = torch.randint(4, (4000,), generator=torch.Generator().manual_seed(2))
    noise = 0.5 * torch.randn(4000, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    ys = torch.einsum("bkd,bd->bk", xs, centres[picked] + variance**0.5 * offsets) + noise
    tuned = tune_task_variance(xs, ys, tasks=centres, noise_variance=0.25)
    assert tuned == pytest.approx(variance, rel=0.3)
    losses = {
        each: (smoothed_dmmse(xs, ys, tasks=centres, noise_variance=0.25, task_variance=each) - ys).square().mean()
        for each in (tuned, tuned / 4, tuned * 4)
    }
    assert min(losses, key=losses.get) == tuned


@pytest.mark.parametrize("num_tasks", [1, 64, 65, 1000])
def test_dmmse_in_chunks_of_tasks_is_dmmse_of_all(monkeypatch, num_tasks):
    """A chunk has 64 tasks. The cases have one chunk, a full chunk, a chunk with a single task, and many chunks."""
    tasks = make_tasks(num_tasks, 3)
    xs, ys, _ = make_prompts(tasks=tasks)
    monkeypatch.setitem(task_sums._SLAB, "cpu", 1)
    expected = prefix_by_prefix(xs, ys, plain_dmmse(tasks, 0.25))
    torch.testing.assert_close(dmmse(xs, ys, tasks=tasks, noise_variance=0.25), expected)


@pytest.mark.parametrize("noise_variance", [0.25, 0.125, 1e-2])
def test_dmmse_in_float32_stays_close_to_float64(noise_variance):
    tasks = make_tasks(500, 8, dtype=torch.float32)
    xs, ys, _ = make_prompts(100, 16, 8, noise_variance=noise_variance, tasks=tasks, dtype=torch.float32)
    exact = dmmse(xs.double(), ys.double(), tasks=tasks, noise_variance=noise_variance)
    single = dmmse(xs, ys, tasks=tasks, noise_variance=noise_variance)
    torch.testing.assert_close(single.double(), exact, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e2])
def test_dmmse_computes_in_float64_where_float32_would_change_the_weights(scale):
    """No task explains the targets, so small differences of large sums of squares decide the weights."""
    tasks = make_tasks(500, 8, dtype=torch.float32)
    xs, ys, _ = make_prompts(50, 16, 8, dtype=torch.float32)
    exact = dmmse(scale * xs.double(), scale * ys.double(), tasks=tasks, noise_variance=0.125)
    single = dmmse(scale * xs, scale * ys, tasks=tasks, noise_variance=0.125)
    torch.testing.assert_close(single.double(), exact, rtol=1e-3, atol=1e-3 * scale)


def test_dmmse_does_not_trust_rough_float32_products():
    """After `torch.set_float32_matmul_precision("medium")`, products may be rounded to bfloat16."""
    tasks = make_tasks(500, 8, dtype=torch.float32)
    xs, ys, _ = make_prompts(100, 16, 8, tasks=tasks, dtype=torch.float32)
    exact = dmmse(xs.double(), ys.double(), tasks=tasks, noise_variance=0.25)
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        rough = dmmse(xs, ys, tasks=tasks, noise_variance=0.25)
    finally:
        torch.set_float32_matmul_precision(precision)
    assert torch.equal(rough, exact.float())


# Limits


def test_zero_is_zero():
    xs, ys, _ = make_prompts()
    assert torch.equal(zero(xs, ys), torch.zeros(5, 6, dtype=torch.float64))


def test_task_mean_is_the_mean_task_at_every_position():
    xs, ys, _ = make_prompts()
    tasks = make_tasks(7, 3)
    expected = torch.stack([torch.stack([tasks.mean(0) @ query for query in x]) for x in xs])
    torch.testing.assert_close(task_mean(xs, ys, tasks=tasks), expected)


@pytest.mark.parametrize("name", ["averaging", "knn", "lasso", "ols", "ridge"])
def test_without_examples_the_prediction_is_zero(name):
    xs, ys, _ = make_prompts()
    assert (call(name, xs, ys)[:, 0] == 0).all()


def test_dmmse_without_examples_is_the_mean_task():
    xs, ys, _ = make_prompts()
    tasks = make_tasks(7, 3)
    first = dmmse(xs, ys, tasks=tasks, noise_variance=0.25)[:, 0]
    torch.testing.assert_close(first, task_mean(xs, ys, tasks=tasks)[:, 0])


def test_dmmse_of_one_task_knows_it():
    tasks = make_tasks(1, 3)
    xs, ys, _ = make_prompts()
    torch.testing.assert_close(dmmse(xs, ys, tasks=tasks, noise_variance=0.25), xs @ tasks[0])


def test_ols_knows_the_task_after_d_examples_without_noise():
    xs, ys, _ = make_prompts(100, 8, 4, noise_variance=0)
    torch.testing.assert_close(ols(xs, ys)[:, 4:], ys[:, 4:], rtol=1e-6, atol=1e-6)
    assert ((ols(xs, ys) - ys)[:, :4].abs() > 1e-3).float().mean() > 0.9


@pytest.mark.parametrize("noise_variance", [1e-6, 1e-12, 1e-20, 1e-28])
def test_ridge_tends_to_ols_as_noise_vanishes(noise_variance):
    """If the targets fit, ridge differs from least squares by about lambda / (smallest singular value)^2, however small this is."""
    xs, ys, _ = make_prompts(20, 10, 4, noise_variance=0)
    close = ridge(xs, ys, noise_variance=noise_variance) - ols(xs, ys)
    assert close.abs().max() < max(1e5 * noise_variance, 1e-7)


@pytest.mark.parametrize("noise_variance", [1e-8, 1e-30, 1e-300, 5e-324, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dmmse_at_small_noise_finds_the_task(noise_variance, dtype):
    """Squares divided by 2 sigma^2 reach 1e9 and more. Two noiseless examples distinguish 50 tasks."""
    tasks = make_tasks(50, 3, dtype=dtype)
    xs, ys, ws = make_prompts(100, 8, 3, noise_variance=0, tasks=tasks, dtype=dtype)
    found = dmmse(xs, ys, tasks=tasks, noise_variance=noise_variance)
    clean = (xs * ws[:, None]).sum(-1)
    assert found.isfinite().all()
    torch.testing.assert_close(found[:, 2:], clean[:, 2:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[:, 0], task_mean(xs, ys, tasks=tasks)[:, 0])


def test_dmmse_at_small_noise_stays_finite_when_no_task_fits():
    tasks = make_tasks(50, 8, dtype=torch.float32)
    xs, ys, _ = make_prompts(100, 16, 8, dtype=torch.float32)
    found = dmmse(100 * xs, 100 * ys, tasks=tasks, noise_variance=1e-8)
    assert found.isfinite().all()
    squares = (100 * (ys[:, :, None].double() - xs.double() @ tasks.double().T)).square().cumsum(1)  # B K M
    best = tasks[squares[:, -2].argmin(-1)]  # B D
    torch.testing.assert_close(found[:, -1], 100 * (xs[:, -1] * best).sum(-1), rtol=1e-5, atol=1e-3)


def test_dmmse_without_noise_is_uniform_over_the_tasks_that_fit_best():
    """With the tasks (1, 0), (1, 1), (3, 0), the example y = 1 at x = (1, 0) fits the first two. At (0, 1) they predict 0 and 1."""
    tasks = torch.tensor([[1.0, 0.0], [1.0, 1.0], [3.0, 0.0]])
    xs, ys = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]]), torch.tensor([[1.0, 1.0, 7.0]])
    torch.testing.assert_close(dmmse(xs, ys, tasks=tasks, noise_variance=0.0), torch.tensor([[5 / 3, 0.5, 2.0]]))


def test_dmmse_of_a_uselessly_noisy_prompt_is_the_mean_task():
    xs, ys, _ = make_prompts()
    tasks = make_tasks(7, 3)
    found = dmmse(xs, ys, tasks=tasks, noise_variance=1e12)
    torch.testing.assert_close(found, task_mean(xs, ys, tasks=tasks), rtol=1e-6, atol=1e-6)


def test_repeated_tasks_weigh_as_often_as_they_occur():
    tasks = make_tasks(4, 3)
    xs, ys, _ = make_prompts()
    twice = dmmse(xs, ys, tasks=tasks.repeat(2, 1), noise_variance=0.25)
    torch.testing.assert_close(twice, dmmse(xs, ys, tasks=tasks, noise_variance=0.25))


def test_ols_of_inputs_on_a_subspace_keeps_the_least_norm_within_it():
    """Inputs rounded to float32 leave their plane by 1e-7. The fit in this direction would be noise."""
    generator = torch.Generator().manual_seed(3)
    plane = torch.linalg.qr(torch.randn(6, 2, generator=generator, dtype=torch.float64)).Q  # 6 2
    flat, ys, _ = make_prompts(50, 8, 2, noise_variance=0.25)
    embedded = ols((flat @ plane.T).float(), ys.float())
    torch.testing.assert_close(embedded[:, 4:].double(), ols(flat, ys)[:, 4:], rtol=1e-3, atol=1e-3)


def test_knn_of_a_seen_input_is_its_target():
    xs, ys, _ = make_prompts()
    xs[:, -1] = xs[:, 1]
    assert torch.equal(knn(xs, ys, k=1)[:, -1], ys[:, 1])


def test_knn_gives_ties_to_the_earlier_example():
    xs, ys = torch.tensor([[[1.0], [-1.0], [1.0], [0.0]]]), torch.tensor([[1.0, 2.0, 3.0, 0.0]])
    assert knn(xs, ys, k=2)[0, -1] == 1.5


# Monte Carlo: the Bayes losses of PAPERS.md, section 3


def test_ridge_has_the_bayes_loss_of_hoogland_et_al():
    """For D = 4, K = 8, sigma^2 = 0.125 the losses per token are 4.13 3.19 2.28 1.48 0.90 0.58 0.41 0.32, with mean 1.66."""
    xs, ys, _ = make_prompts(2**16, 8, 4, noise_variance=0.125)
    errors = (ridge(xs, ys, noise_variance=0.125) - ys).square()
    stderr = errors.std(0) / math.sqrt(len(errors))
    published = torch.tensor([4.13, 3.19, 2.28, 1.48, 0.90, 0.58, 0.41, 0.32], dtype=torch.float64)
    assert ((errors.mean(0) - published).abs() < 4 * stderr + 0.01).all()  # theirs are estimates too, to 0.01
    assert abs(errors.mean() - 1.66) < 4 * errors.mean(1).std() / math.sqrt(len(errors)) + 0.005


def test_first_two_losses_of_ridge_are_exact():
    """At k = 1 it is D + sigma^2. At k = 2, D - 1 directions are unknown and one has the error E[sigma^2 / (|x|^2 + sigma^2)]."""
    task_size, variance, num = 4, 0.125, 2**16
    xs, ys, _ = make_prompts(num, 2, task_size, noise_variance=variance)
    errors = (ridge(xs, ys, noise_variance=variance) - ys).square()
    known = task_size - 1 + (variance / (xs[:, 0].square().sum(-1) + variance)).mean() + variance
    expected = torch.stack((torch.tensor(task_size + variance, dtype=torch.float64), known))
    assert ((errors.mean(0) - expected).abs() < 4 * errors.std(0) / math.sqrt(num)).all()


@pytest.mark.parametrize(("best", "tasks"), [("ridge", None), ("dmmse", SETTINGS["tasks"])])
def test_bayes_beats_every_other_baseline_on_its_own_prior(best, tasks):
    """After 7 examples, each other baseline is worse by more than 4 standard errors, paired over prompts."""
    xs, ys, _ = make_prompts(2**14, 8, 3, tasks=tasks)
    rivals = set(NAMES) - {best, "lasso"}  # a hundred thousand fits of the lasso would take a minute
    least = (call(best, xs, ys) - ys)[:, -1].square()
    for name in rivals:
        excess = (call(name, xs, ys) - ys)[:, -1].square() - least
        assert excess.mean() > 4 * excess.std() / math.sqrt(len(excess)), name


def test_dmmse_of_many_tasks_is_ridge_within_monte_carlo_error():
    """M Gaussian tasks are an importance sample of the Gaussian posterior, so the mean squared error is about spread / M."""
    num_tasks, variance = 2**15, 1.0
    tasks = make_tasks(num_tasks, 2)
    xs, ys, _ = make_prompts(64, 4, 2, noise_variance=variance)
    squares = (ys[..., None] - xs @ tasks.T).square().cumsum(1)  # B K M
    squares = torch.cat((torch.zeros_like(squares[:, :1]), squares[:, :-1]), dim=1)
    weights = torch.softmax(-squares / 2 / variance, dim=-1)  # B K M
    outputs = xs @ tasks.T  # B K M
    limit = ridge(xs, ys, noise_variance=variance)
    stderr = (weights * (outputs - limit[..., None])).square().sum(-1).sqrt()  # of self-normalised importance sampling
    scores = (dmmse(xs, ys, tasks=tasks, noise_variance=variance) - limit) / stderr
    is_covered = weights.square().sum(-1) < 1 / 2000  # enough tasks carry the posterior for the error to be normal
    assert is_covered.float().mean() > 0.8
    assert scores[is_covered].abs().max() < 4.5
    assert stderr[is_covered].mean() < 0.02


# The contract of every baseline


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_predictions_have_the_shape_and_dtype_of_the_targets(name, dtype):
    xs, ys, _ = make_prompts(dtype=dtype)
    found = call(name, xs, ys)
    assert (found.shape, found.dtype, found.device) == (ys.shape, dtype, ys.device)
    assert found.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_leading_axes_are_populations_of_batches(name):
    xs, ys, _ = make_prompts(12)
    stacked = call(name, xs.unflatten(0, (2, 3, 2)), ys.unflatten(0, (2, 3, 2)))
    torch.testing.assert_close(stacked.flatten(0, 2), call(name, xs, ys))


@pytest.mark.parametrize("name", NAMES)
def test_batch_is_its_prompts_one_by_one(name):
    xs, ys, _ = make_prompts()
    alone = torch.cat([call(name, x[None], y[None]) for x, y in zip(xs, ys, strict=True)])
    torch.testing.assert_close(call(name, xs, ys), alone)


@pytest.mark.parametrize("name", NAMES)
def test_longer_prompts_begin_with_the_predictions_of_shorter_ones(name):
    xs, ys, _ = make_prompts()
    torch.testing.assert_close(call(name, xs, ys)[:, :4], call(name, xs[:, :4], ys[:, :4]))


@pytest.mark.parametrize("name", NAMES)
@given(position=st.integers(0, 5), seed=st.integers(0, 100))
def test_target_and_everything_later_do_not_matter(name, position, seed):
    xs, ys, _ = make_prompts(seed=seed)
    before = call(name, xs, ys)
    xs[:, position + 1 :], ys[:, position:] = -1e3, 1e3
    after = call(name, xs, ys)[:, : position + 1]
    torch.testing.assert_close(after, before[:, : position + 1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
@given(order=st.permutations(range(5)), seed=st.integers(0, 100))
def test_earlier_examples_permute_freely(name, order, seed):
    xs, ys, _ = make_prompts(seed=seed)
    order = [*order, 5]
    torch.testing.assert_close(call(name, xs[:, order], ys[:, order])[:, -1], call(name, xs, ys)[:, -1])


@pytest.mark.parametrize("name", ["zero", "averaging", "knn", "ols", "ridge"])
def test_rotating_the_inputs_changes_nothing(name):
    """Baselines without tasks do not depend on the choice of axes."""
    xs, ys, _ = make_prompts()
    rotation = torch.linalg.qr(make_tasks(3, 3)).Q
    torch.testing.assert_close(call(name, xs @ rotation, ys), call(name, xs, ys))


@pytest.mark.parametrize("name", NAMES)
def test_prompts_are_not_written_to(name):
    xs, ys, _ = make_prompts()
    tasks = make_tasks(7, 3)
    before = xs.clone(), ys.clone(), tasks.clone()
    call(name, xs, ys, tasks=tasks)
    assert all(torch.equal(old, new) for old, new in zip(before, (xs, ys, tasks), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_one_example_of_one_dimension_will_do(name):
    xs, ys, _ = make_prompts(1, 1, 1)
    assert call(name, xs, ys, tasks=make_tasks(2, 1)).shape == (1, 1)


@pytest.mark.parametrize("name", NAMES)
def test_no_prompts_have_no_predictions(name):
    assert call(name, torch.zeros(0, 3, 2), torch.zeros(0, 3), tasks=torch.ones(4, 2)).shape == (0, 3)


@pytest.mark.parametrize("name", NAMES)
def test_numbers_whose_squares_are_infinite_are_refused(as_users_run, name):
    xs, ys = torch.ones(2, 3, 2, dtype=torch.float64), torch.ones(2, 3, dtype=torch.float64)
    for wide in ((xs * 1e200, ys), (xs, ys * 1e200)):
        with pytest.raises(ValueError, match="too large for float32"):
            call(name, *wide, tasks=torch.ones(4, 2))
    assert call(name, xs * 1e15, ys * 1e15, tasks=torch.ones(4, 2)).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_shapes_that_disagree_are_refused(as_users_run, name):
    xs, ys, _ = make_prompts()
    for wrong_xs, wrong_ys in ((xs, ys[:, :-1]), (xs[:-1], ys), (xs[0], ys[0]), (xs, ys[..., None])):
        with pytest.raises(ValueError, match=r"`xs` must have shape \(\.\.\., B, K, D\)"):
            call(name, wrong_xs, wrong_ys)


@pytest.mark.parametrize("name", ["task_mean", "dmmse"])
def test_tasks_that_do_not_fit_are_refused(as_users_run, name):
    xs, ys, _ = make_prompts()
    for tasks in (make_tasks(7, 4), make_tasks(0, 3), make_tasks(7, 3)[0]):
        with pytest.raises(ValueError, match=r"`tasks` must have shape \(M, D\).* D = 3"):
            call(name, xs, ys, tasks=tasks)


@pytest.mark.parametrize("noise_variance", [0.0, -1.0, math.nan, math.inf])
def test_ridge_refuses_noise_that_is_not_positive(noise_variance):
    xs, ys, _ = make_prompts()
    with pytest.raises(ValueError, match=r"`noise_variance` must be positive.*use `ols`"):
        ridge(xs, ys, noise_variance=noise_variance)


@pytest.mark.parametrize("noise_variance", [-1.0, math.nan, math.inf])
def test_dmmse_refuses_negative_noise(noise_variance):
    xs, ys, _ = make_prompts()
    with pytest.raises(ValueError, match="`noise_variance` must be zero or positive"):
        dmmse(xs, ys, tasks=make_tasks(7, 3), noise_variance=noise_variance)


def test_knn_refuses_zero_neighbours():
    xs, ys, _ = make_prompts()
    with pytest.raises(ValueError, match="`k` must be a whole number of at least 1"):
        knn(xs, ys, k=0)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_predictions_on_cuda_agree_with_those_on_the_cpu(name):
    xs, ys, _ = make_prompts()
    found = call(name, xs.cuda(), ys.cuda())
    assert found.is_cuda
    torch.testing.assert_close(found.cpu(), call(name, xs, ys))


# Speed and memory


def plain_dmmse_in_torch(xs, ys, *, tasks, noise_variance):
    """Compute dMMSE in a simple loop, which starts from the beginning for every prefix of every prompt."""
    predictions = torch.zeros_like(ys)
    for b in range(len(xs)):
        for k in range(xs.shape[1]):
            squares = (ys[b, :k, None] - xs[b, :k] @ tasks.T).square().sum(0)  # M
            weights = torch.softmax(-squares / (2 * noise_variance), dim=0)
            predictions[b, k] = weights @ tasks @ xs[b, k]
    return predictions


@pytest.mark.slow
def test_dmmse_is_many_times_faster_than_a_plain_loop():
    tasks = make_tasks(2**16, 8, dtype=torch.float32)
    xs, ys, _ = make_prompts(256, 16, 8, tasks=tasks, dtype=torch.float32)
    seconds = {}
    for name, function, count in (("ours", dmmse, 256), ("plain", plain_dmmse_in_torch, 16)):
        function(xs[:2], ys[:2], tasks=tasks, noise_variance=0.25)
        start = time.perf_counter()
        function(xs[:count], ys[:count], tasks=tasks, noise_variance=0.25)
        seconds[name] = (time.perf_counter() - start) / count
    assert seconds["plain"] > 5 * seconds["ours"], seconds


LARGE_POOL = """
import resource, torch
from icl.baselines import dmmse
from icl.tasks.priors import task_pool
tasks = task_pool(2**20, 8, seed=0)
generator = torch.Generator().manual_seed(0)
xs, ws = torch.randn(256, 16, 8, generator=generator), tasks[torch.randint(2**20, (256,), generator=generator)]
ys = (xs * ws[:, None]).sum(-1) + 0.5 * torch.randn(256, 16, generator=generator)
found = dmmse(xs, ys, tasks=tasks, noise_variance=0.25)
assert found.isfinite().all()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


@pytest.mark.slow
def test_dmmse_of_2_to_20_tasks_fits_in_3_gigabytes():
    """This is the peak resident memory of a whole process, including torch."""
    result = subprocess.run([sys.executable, "-c", LARGE_POOL], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ols_of_prompts_with_16_bits_drops_no_direction_that_the_inputs_determine(dtype):
    """max(K, D) eps is 0.5 for 64 examples in bfloat16."""
    generator = torch.Generator().manual_seed(3)
    xs = torch.randn(20, 64, 4, generator=generator)
    xs[..., 0] /= 4
    ys = (xs * torch.tensor([4.0, -1, 1, 2])).sum(-1)
    error = ols(xs.to(dtype), ys.to(dtype)).float() - ys
    assert error[:, 16:].abs().mean() < 3 * torch.finfo(dtype).eps


def test_dmmse_of_very_small_prompts_is_finite():
    """In float32, the inverse of these noise variances is infinite, and the squares of 1e-25 are zero."""
    tasks = torch.tensor([[1.0], [-1.0]])
    assert not dmmse(torch.zeros(1, 3, 1), torch.zeros(1, 3), tasks=tasks, noise_variance=1e-39).any()
    tiny = torch.full((1, 3), 1e-25)
    found = dmmse(tiny.unsqueeze(-1), tiny, tasks=tasks, noise_variance=1e-52)
    torch.testing.assert_close(found, torch.tensor([[0.0, 1e-25, 1e-25]]), rtol=1e-5, atol=0)


def test_a_task_that_the_examples_exclude_has_weight_zero_in_dmmse():
    found = dmmse(torch.ones(1, 3, 1), torch.zeros(1, 3), tasks=torch.tensor([[0.0], [1e35]]), noise_variance=1.0)
    assert found[0, 1:].tolist() == [0, 0]
