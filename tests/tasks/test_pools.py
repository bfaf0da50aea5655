"""Pools that change: the stated covariance, nested pools, and the state at any step without the steps before it."""

import math

import pytest
import torch
from scipy import stats

from icl import rng
from icl.config import RunConfig, TaskConfig
from icl.config.validation import ConfigError
from icl.tasks import priors
from icl.tasks.laws import TaskLaw
from icl.tasks.pools import PoolSchedule, tasks_at, tree_depth
from icl.tasks.priors import Discrete, sample_tasks, task_pool
from icl.tasks.prompts import last_pool_step, sample_prompts, training_pool

WALK, RESAMPLED = PoolSchedule("walk", 7), PoolSchedule("resampled", 5)
KEY = rng.stream(0, "test/pools")


def pool_at(time, schedule, count=6, size=3, **options):
    return task_pool(count, size, seed=4, schedule=schedule, time=time, **options)


@pytest.mark.parametrize("schedule", [WALK, RESAMPLED])
def test_the_first_pool_is_the_fixed_one(schedule):
    assert torch.equal(pool_at(0, schedule), task_pool(6, 3, seed=4))


@pytest.mark.parametrize("time", [0, 1, 13, 2**40 + 5])
@pytest.mark.parametrize("schedule", [WALK, RESAMPLED])
def test_pools_are_nested_at_every_step(schedule, time):
    assert torch.equal(pool_at(time, schedule), pool_at(time, schedule, count=50)[:6])


def test_a_resampled_pool_is_new_every_few_steps():
    pools = [pool_at(time, RESAMPLED) for time in range(15)]
    for time, pool in enumerate(pools):
        assert torch.equal(pool, pools[5 * (time // 5)])
    assert len(torch.cat(pools).unique(dim=0)) == 3 * 6


def test_a_resampled_pool_of_another_prior_follows_it():
    law = TaskLaw("sparse", density=0.25)
    tasks = pool_at(12, RESAMPLED, count=4000, law=law)
    share = (tasks != 0).double().mean().item()
    assert share == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / tasks.numel()))


# The walk


def plain_walk(time, index, coordinate, correlation_time, depth):
    """Return one coordinate of one task by recursion over intervals in plain Python."""
    key = rng.stream(4, "tasks")

    def normal(step):
        return rng.normal(key, torch.tensor([step]), torch.tensor([index]), 3)[0, 0, coordinate].item()

    def between(left, right, at_left, at_right):
        if left == time:
            return at_left
        middle = (left + right) // 2
        r = math.exp(-(middle - left) / correlation_time)
        value = r / (1 + r * r) * (at_left + at_right) + math.sqrt((1 - r * r) / (1 + r * r)) * normal(middle)
        return between(left, middle, at_left, value) if time < middle else between(middle, right, value, at_right)

    root = time // 2**depth * 2**depth
    return between(root, root + 2**depth, normal(root), normal(root + 2**depth))


@pytest.mark.parametrize("time", [0, 1, 255, 256, 511, 512, 5000, 2**50 + 3])
def test_the_walk_matches_a_plain_recursion(time):
    depth = tree_depth(7)
    assert 2**depth >= 40 * 7 > 2 ** (depth - 1)
    pool = pool_at(time, WALK)
    for index, coordinate in ((0, 0), (5, 2)):
        assert pool[index, coordinate].item() == pytest.approx(plain_walk(time, index, coordinate, 7, depth), abs=1e-6)


def exact_covariance(times, correlation_time):
    """Return the covariance of the walk at these times, exactly: the coefficients of each normal of the tree, by linearity."""
    depth = tree_depth(correlation_time)
    nodes = {}

    def combine(parts):
        total = {}
        for factor, coefficients in parts:
            for node, value in coefficients.items():
                total[node] = total.get(node, 0.0) + factor * value
        return total

    for time in times:
        left = time // 2**depth * 2**depth
        right = left + 2**depth
        at_left, at_right = {left: 1.0}, {right: 1.0}
        while left != time:
            middle = (left + right) // 2
            r = math.exp(-(middle - left) / correlation_time)
            value = combine(
                [
                    (r / (1 + r * r), at_left),
                    (r / (1 + r * r), at_right),
                    (math.sqrt((1 - r * r) / (1 + r * r)), {middle: 1.0}),
                ]
            )
            if time < middle:
                right, at_right = middle, value
            else:
                left, at_left = middle, value
        nodes[time] = at_left
    return torch.tensor([[sum(a * nodes[t].get(n, 0.0) for n, a in nodes[s].items()) for t in times] for s in times])


@pytest.mark.parametrize("correlation_time", [1, 7, 100])
def test_the_tree_has_exactly_the_covariance_of_an_ornstein_uhlenbeck_process(correlation_time):
    """The times lie on both sides of a root of the tree. By linearity, no sampling error enters."""
    root = 2 ** tree_depth(correlation_time)
    times = [*range(6), root - 17, root - 1, root, root + 1, root + 2, root + 40]
    distances = (torch.tensor(times)[:, None] - torch.tensor(times)).abs().double()
    covariance = exact_covariance(times, correlation_time).double()
    torch.testing.assert_close(covariance, torch.exp(-distances / correlation_time), rtol=0, atol=1e-6)


def test_the_walk_of_many_tasks_has_this_covariance():
    """A sample correlation of n pairs has a standard error of (1 - r^2) / sqrt(n)."""
    times = torch.tensor([0, 1, 5, 511, 512, 513, 520])
    values = tasks_at(4, times, torch.arange(6000), 3, schedule=WALK).flatten(1).double()  # S, 18,000
    expected = torch.exp(-(times[:, None] - times).abs().double() / 7)
    error = (1 - expected.square()) / math.sqrt(values.shape[1])
    assert ((torch.corrcoef(values) - expected).abs() <= 4.5 * error + 1e-9).all()


@pytest.mark.parametrize("time", [3, 2**9 + 1, 2**45 + 77])
def test_the_walk_keeps_the_tasks_standard_normal(time):
    assert stats.kstest(pool_at(time, WALK, count=4000).flatten().double().numpy(), "norm").pvalue > 1e-3


def test_coordinates_and_tasks_walk_independently():
    moves = tasks_at(4, torch.tensor([100, 103]), torch.arange(6000), 3, schedule=WALK).diff(dim=0)[0].double()
    table = torch.cat((moves[:3000], moves[3000:]), dim=1)  # 3000, 6
    assert (torch.corrcoef(table.T) - torch.eye(6)).abs().max() < 5 / math.sqrt(3000)


def test_a_slow_walk_stands_still():
    pool = pool_at(1000, PoolSchedule("walk", 2**40))
    torch.testing.assert_close(pool, task_pool(6, 3, seed=4), rtol=0, atol=1e-3)


# Prompts


@pytest.mark.parametrize("schedule", [WALK, RESAMPLED])
def test_prompts_of_each_step_have_tasks_of_the_pool_of_this_step(schedule):
    config = RunConfig(task=TaskConfig(num_tasks=5, pool=schedule.name, pool_steps=schedule.steps))
    for step in (0, 4, 5, 1000):
        pool = {tuple(task) for task in training_pool(config, step=step).tolist()}
        ws = sample_prompts(config, stream="train", step=step, batch_size=100).ws
        assert {tuple(task) for task in ws.tolist()} == pool


@pytest.mark.parametrize("schedule", [WALK, RESAMPLED])
def test_a_large_pool_is_drawn_task_by_task_with_the_same_bits(schedule, monkeypatch):
    """A pool larger than the batch is not computed as a whole."""
    prior, steps, indices = Discrete(1000, 3, 4, schedule=schedule), torch.arange(3, 9), torch.arange(20)
    counts = []

    def noted(seed, times, chosen, *size, **options):
        counts.append(len(chosen))
        return tasks_at(seed, times, chosen, *size, **options)

    monkeypatch.setattr(priors, "tasks_at", noted)
    drawn = sample_tasks([prior], [KEY], steps, indices)[0]
    assert counts == [20] * 6
    chosen = rng.integers(KEY, steps, indices, 1000)
    for place, step in enumerate(steps.tolist()):
        assert torch.equal(drawn[place], pool_at(step, schedule, count=1000)[chosen[place]])


def test_evaluation_uses_the_pool_of_the_step_that_it_is_given():
    config = RunConfig(task=TaskConfig(num_tasks=5, pool="walk", pool_steps=7))
    pool = {tuple(task) for task in training_pool(config, step=12).tolist()}
    ws = sample_prompts(config, stream="pretrain", step=0, batch_size=100, pool_step=12).ws
    assert {tuple(task) for task in ws.tolist()} == pool
    assert [last_pool_step(step) for step in (0, 1, 2, 500)] == [0, 0, 1, 499]


def test_without_its_step_a_pool_that_changes_is_refused():
    config = RunConfig(task=TaskConfig(num_tasks=5, pool="walk", pool_steps=7))
    with pytest.raises(ConfigError, match="The run's pool of tasks changes"):
        sample_prompts(config, stream="pretrain", step=0, batch_size=4)
    with pytest.raises(ConfigError, match="The run's pool of tasks changes"):
        training_pool(config)
    assert sample_prompts(config, stream="true", step=0, batch_size=4).ws.shape == (4, 2)
