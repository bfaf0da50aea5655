"""Gradients with respect to the data distribution, compared with closed forms, finite differences and the score function."""

from functools import partial

import pytest
import torch
from tiny_runs import TINY, change

from icl import metrics
from icl.analysis.gradients import data as dg
from icl.build import build_model
from icl.model.stacked import stack, target_losses
from icl.tasks.priors import task_pool

D, K = 3, 4
AWAY = torch.tensor([0.3, 1.2, -0.4, 0.8, 0.2, 0.5], dtype=torch.float64)
"""A point at which no term of the closed form vanishes."""


def draws(num_prompts, *, tasks=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    normal = partial(torch.randn, generator=generator, dtype=torch.float64)
    own = normal(num_prompts, D)
    if tasks is not None:
        own = tasks[torch.randint(len(tasks), (num_prompts,), generator=generator)]
    return dg.Draws(normal(num_prompts, K, D), own, normal(num_prompts, K))


def zero(xs, ys):
    """Return the losses of predicting zero."""
    return ys.square()


def sum_of_inputs(xs, ys):
    """Return the losses of predicting 0.7 sum(x)."""
    return (0.7 * xs.sum(-1) - ys).square()


def zero_loss(at):
    m_x, s_x, m_w, s_w, m_e, s_e = at
    squares = D * (m_x**2 + s_x**2) * (m_w**2 + s_w**2) + D * (D - 1) * m_x**2 * m_w**2
    return squares + 2 * D * m_x * m_w * m_e + m_e**2 + s_e**2


def linear_loss(at):
    """Return the loss of predicting 0.7 sum(x). It is the loss of predicting zero, if 0.7 is subtracted from the mean of w."""
    return zero_loss(torch.stack([at[0], at[1], at[2] - 0.7, at[3], at[4], at[5]]))


def estimates(losses_of, drawn, at=AWAY, *, is_pool=False):
    point = at.expand(1, len(drawn.tasks), 6)
    pathwise, losses = dg.pathwise(losses_of, drawn, point)
    scores = dg.score_function(losses, drawn, at, is_pool=is_pool)
    return pathwise, scores, losses


@pytest.mark.parametrize(("losses_of", "loss"), [(zero, zero_loss), (sum_of_inputs, linear_loss)])
def test_both_estimators_have_the_closed_forms_gradient(losses_of, loss):
    exact = torch.func.grad(loss)(AWAY)
    assert (exact.abs() > 0.05).all()
    pathwise, scores, losses = estimates(losses_of, draws(200_000))
    mean = metrics.position_mean(losses.unsqueeze(-1))
    assert abs(mean.value.item() - loss(AWAY).item()) < 4 * mean.stderr.item()
    for values in (pathwise, scores):
        found = metrics.position_mean(values[0])
        assert ((found.value - exact).abs() < 4 * found.stderr).all()
    assert metrics.position_mean(pathwise[0]).stderr.max() < 0.05


def test_at_the_training_point_the_zero_predictors_gradient_is_known():
    at = dg.training_point(0.25)
    pathwise, _, _ = estimates(zero, draws(100_000), at)
    found = metrics.position_mean(pathwise[0])
    exact = torch.tensor([0, 2 * D, 0, 2 * D, 0, 2 * 0.5], dtype=torch.float64)
    assert ((found.value - exact).abs() < 4 * found.stderr).all()


def test_a_pool_is_shifted_and_stretched_affinely():
    """For finitely many tasks, both estimators give the derivatives of E (w . x)^2, averaged over the pool itself."""
    pool = task_pool(3, D, seed=1).double()

    def loss(at):
        m_x, s_x, m_w, s_w, m_e, s_e = at
        ws = m_w + s_w * pool
        return (s_x**2 * ws.square().sum(-1) + (m_x * ws.sum(-1) + m_e) ** 2).mean() + s_e**2

    exact = torch.func.grad(loss)(AWAY)
    pathwise, scores, _ = estimates(zero, draws(200_000, tasks=pool), is_pool=True)
    for values in (pathwise, scores):
        found = metrics.position_mean(values[0])
        assert ((found.value - exact).abs() < 4 * found.stderr).all()


def test_one_task_serves_a_whole_prompt():
    """Without noise and in one dimension, the ratio y / x is the same at every position."""
    generator = torch.Generator().manual_seed(3)
    drawn = dg.Draws(*(torch.randn(*size, generator=generator) for size in ((5, K, 1), (5, 1), (5, K))))
    seen = {}

    def losses_of(xs, ys):
        seen["ratio"] = ys / xs[..., 0]
        return ys

    dg.prompt_losses(losses_of, drawn, torch.tensor([0.1, 1.5, 0.2, 2.0, 0.0, 0.0]).expand(1, 5, 6))
    expected = (0.2 + 2 * drawn.tasks).expand(5, K)
    torch.testing.assert_close(seen["ratio"][0], expected)


@pytest.mark.parametrize("output", ["token", "mixture"])
def test_a_transformers_gradient_is_that_of_finite_differences(output):
    """Compare prompt by prompt in float64, for two members at once, with the same draws on both sides."""
    models = [build_model(change(TINY, model={"output": output})) for _ in range(2)]
    params = stack([{n: p.detach().double() * (1 + i) for n, p in m.named_parameters()} for i, m in enumerate(models)])
    losses_of = partial(target_losses, models[0].config, params)
    generator = torch.Generator().manual_seed(0)
    sizes = ((40, 4, 2), (40, 2), (40, 4))
    drawn = dg.Draws(*(torch.randn(*size, generator=generator, dtype=torch.float64) for size in sizes))
    at = dg.training_point(0.25).expand(2, 40, 6)
    pathwise, _ = dg.pathwise(losses_of, drawn, at)
    differences = dg.finite_difference(losses_of, drawn, at, step=1e-5)
    wrong = (pathwise - differences).abs() > 1e-5 * (1 + pathwise.abs())
    assert wrong.float().mean() < 0.01  # where a step crosses the corner of a ReLU
    assert not torch.allclose(pathwise[0], pathwise[1])


def test_without_noise_the_score_is_undefined_where_it_needs_a_density():
    at = dg.training_point(0.0)
    pathwise, scores, _ = estimates(zero, draws(100), at)
    assert pathwise.isfinite().all()
    assert scores[0].isnan().all(0).tolist() == [False] * 4 + [True] * 2
    assert estimates(zero, draws(100), at, is_pool=True)[1][0].isnan().all(0).tolist() == [False] * 2 + [True] * 4
