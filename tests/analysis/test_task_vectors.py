"""The task-vector probe reads the weights of linear predictors exactly, and agrees on the model with replacing one input at a time."""

import math

import pytest
import torch
from tiny_runs import TINY, change

from icl import baselines
from icl.analysis.behaviour.task_vectors import compare, effective_weights, estimates
from icl.build import build_model
from icl.model.stacked import apply, stack
from icl.tasks.priors import task_pool
from icl.tasks.prompts import Prompts, sample_prompts

CONFIG = change(TINY, task={"task_size": 3, "max_examples": 5})


def prompts(count=6):
    return sample_prompts(CONFIG, stream="true", step=0, batch_size=count)


def in_double(given):
    return Prompts(*(part.double() for part in given))


def test_weights_of_ridge_are_the_posterior_mean():
    given = in_double(prompts())
    found = effective_weights(lambda asked: baselines.ridge(asked.xs, asked.ys, noise_variance=0.25), given)
    for k in range(5):
        xs, ys = given.xs[:, :k], given.ys[:, :k]
        gram = xs.mT @ xs + 0.25 * torch.eye(3, dtype=torch.float64)
        expected = torch.linalg.solve(gram, (xs.mT @ ys.unsqueeze(-1)))[..., 0]
        torch.testing.assert_close(found[:, k], expected)
    assert compare(found, given.ws).cosine[:, 0].abs().max() == 0


def test_weights_of_dmmse_with_one_task_are_that_task():
    given, tasks = in_double(prompts()), task_pool(1, 3, seed=4).double()
    found = effective_weights(
        lambda asked: baselines.dmmse(asked.xs, asked.ys, tasks=tasks, noise_variance=0.25), given
    )
    torch.testing.assert_close(found, tasks.expand(6, 5, 3))


def test_prompts_whose_task_is_zero_are_left_out():
    """Under the prior `sparse` a task can be zero. One such prompt made the mean norm ratio infinite."""
    tasks = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 0.0], [0.0, -1.0, 0.0]])
    weights = torch.stack([tasks[0], torch.ones(3), 3 * tasks[2]]).unsqueeze(1).expand(3, 5, 3)
    numbers = estimates(compare(torch.stack([weights, 2 * weights]), tasks))
    assert numbers["norm_ratio"][1].value.tolist() == pytest.approx([2, 4])
    assert numbers["cosine"][1].value.tolist() == pytest.approx([1, 1])


@pytest.mark.parametrize(("angle", "length"), [(0.0, 1.0), (0.4, 0.7), (math.pi, 2.0)])
def test_a_linear_predictor_with_turned_and_stretched_weights(angle, length):
    """The cosine gives the rotation and the ratio gives the scaling. Each member has its own."""
    given = in_double(prompts())
    turn = torch.eye(3, dtype=torch.float64)
    turn[:2, :2] = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    tasks = given.ws.clone()
    tasks[:, 2] = 0  # in the plane of the turn
    weights = length * tasks @ turn.T

    def predict(asked):
        own = weights.repeat(len(asked.ws) // len(weights), 1).unsqueeze(1)
        exact = (asked.xs * own).sum(-1)
        return torch.stack([exact, 3 * exact])

    found = effective_weights(predict, given)
    assert found.shape == (2, 6, 5, 3)
    torch.testing.assert_close(found[0], weights.unsqueeze(1).expand(6, 5, 3))
    numbers = estimates(compare(found, tasks))
    positions, mean = numbers["cosine"]
    assert positions.value.flatten().tolist() == pytest.approx([math.cos(angle)] * 10)
    assert mean.stderr.abs().max() < 1e-8
    assert numbers["norm_ratio"][1].value.tolist() == pytest.approx([length, 3 * length])


def test_weights_of_the_model_by_replacing_one_input_of_the_whole_prompt():
    models = [build_model(change(CONFIG, seeds={"model": seed})) for seed in range(2)]
    params = stack([dict(model.named_parameters()) for model in models])
    given = prompts()
    with torch.no_grad():
        found = effective_weights(lambda asked: apply(models[0].config, params, asked.xs, asked.ys), given)
        length = given.xs.norm(dim=-1).mean()
        for n, model in enumerate(models):
            for k in range(5):
                for i in range(3):
                    xs = given.xs.clone()
                    xs[:, k] = length * torch.eye(3)[i]
                    expected = model(xs, given.ys)[:, k] / length
                    torch.testing.assert_close(found[n, :, k, i], expected, atol=1e-5, rtol=1e-4)
