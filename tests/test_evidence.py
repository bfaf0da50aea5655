"""Evidence and the negative log-likelihood of the Bayes predictors: scipy's densities, closed forms and limits."""

import math

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import multivariate_normal, norm

from icl import baselines, evidence
from icl.config.validation import ConfigError

B, K, D, VARIANCE = 6, 5, 3, 0.3


def prompts(*, count=B, tasks=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    xs = torch.randn(count, K, D, generator=generator, dtype=torch.float64)
    ws = torch.randn(count, D, generator=generator, dtype=torch.float64)
    if tasks is not None:
        ws = tasks[torch.randint(len(tasks), (count,), generator=generator)]
    noise = torch.randn(count, K, generator=generator, dtype=torch.float64)
    return xs, (xs @ ws.unsqueeze(-1)).squeeze(-1) + math.sqrt(VARIANCE) * noise


TASKS = torch.randn(7, D, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def test_ridge_is_a_gaussian_with_the_posterior_variance():
    """The oracle forms the posterior of w by a plain inverse, one prompt and one position at a time."""
    xs, ys = prompts()
    found = evidence.ridge_nll(xs, ys, noise_variance=VARIANCE)
    means = baselines.ridge(xs, ys, noise_variance=VARIANCE)
    for b in range(B):
        for k in range(K):
            x, before = xs[b, k].numpy(), xs[b, :k].numpy()
            covariance = np.linalg.inv(before.T @ before / VARIANCE + np.eye(D))
            mean = x @ covariance @ before.T @ ys[b, :k].numpy() / VARIANCE
            assert means[b, k] == pytest.approx(mean)
            expected = norm.logpdf(ys[b, k], mean, math.sqrt(x @ covariance @ x + VARIANCE))
            assert found[b, k] == pytest.approx(-expected)


def test_dmmse_is_a_mixture_with_the_posterior_weights(monkeypatch):
    xs, ys = prompts(tasks=TASKS)
    found = evidence.dmmse_nll(xs, ys, tasks=TASKS, noise_variance=VARIANCE)
    monkeypatch.setattr(evidence, "_TASKS_AT_ONCE", 2 * B)  # chunks of two tasks
    torch.testing.assert_close(evidence.dmmse_nll(xs, ys, tasks=TASKS, noise_variance=VARIANCE), found)
    scale = math.sqrt(VARIANCE)
    for b in range(B):
        logs = np.zeros(len(TASKS))
        for k in range(K):
            each = norm.logpdf(float(ys[b, k]), TASKS.numpy() @ xs[b, k].numpy(), scale)
            assert found[b, k] == pytest.approx(-(logsumexp(logs + each) - logsumexp(logs)))
            logs += each


def test_evidence_is_the_joint_density_of_the_targets():
    xs, ys = prompts()
    for b in range(B):
        covariance = (xs[b] @ xs[b].T + VARIANCE * torch.eye(K)).numpy()
        expected = multivariate_normal.logpdf(ys[b].numpy(), np.zeros(K), covariance)
        found = evidence.gaussian_evidence(xs, ys, noise_variance=VARIANCE)[b, -1]
        assert found == pytest.approx(expected)


def test_each_predictor_is_the_best_on_its_own_prior():
    """The mean excess of the other predictor is a Kullback-Leibler divergence, which is positive."""
    for tasks, sign in ((TASKS, 1), (None, -1)):
        xs, ys = prompts(count=4000, tasks=tasks, seed=1)
        ridge = evidence.ridge_nll(xs, ys, noise_variance=VARIANCE)
        dmmse = evidence.dmmse_nll(xs, ys, tasks=TASKS, noise_variance=VARIANCE)
        excess = sign * (ridge - dmmse).mean(-1)
        assert excess.mean() > 4 * excess.std() / math.sqrt(len(excess))


def test_with_one_task_the_loss_is_the_entropy_of_the_noise():
    xs, ys = prompts(count=20_000, tasks=TASKS[:1], seed=2)
    found = evidence.dmmse_nll(xs, ys, tasks=TASKS[:1], noise_variance=VARIANCE).mean(-1)
    entropy = math.log(2 * math.pi * math.e * VARIANCE) / 2
    assert abs(found.mean() - entropy) < 4 * found.std() / math.sqrt(len(found))
    noise = ys - xs @ TASKS[0]
    exact = (math.log(2 * math.pi * VARIANCE) + noise.square() / VARIANCE) / 2
    torch.testing.assert_close(found, exact.mean(-1))


def test_float32_prompts_give_float32_and_no_noise_is_refused():
    xs, ys = prompts()
    assert evidence.ridge_nll(xs.float(), ys.float(), noise_variance=VARIANCE).dtype == torch.float32
    for function in (evidence.ridge_nll, lambda *args, **more: evidence.dmmse_nll(*args, tasks=TASKS, **more)):
        with pytest.raises(ConfigError, match="there is no density"):
            function(xs, ys, noise_variance=0.0)
