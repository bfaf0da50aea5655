"""Task priors: smaller pools are the first tasks of larger pools, and draws from a pool follow its distribution."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from icl import rng
from icl.config.validation import ConfigError
from icl.tasks.priors import Discrete, Gaussian, sample_tasks, task_pool, task_prior

KEY = rng.stream(0, "test/tasks")


def draws(prior, *, num_steps=1, num=1000):
    return sample_tasks([prior], [KEY], torch.arange(num_steps), torch.arange(num))[0]


# Pools


@pytest.mark.parametrize("num_tasks", [1, 3, 1024])
def test_pool_is_the_beginning_of_a_larger_pool_bitwise(num_tasks):
    assert torch.equal(task_pool(num_tasks, 4, seed=7), task_pool(4096, 4, seed=7)[:num_tasks])


def test_pool_made_in_several_chunks_is_still_nested():
    """Chunks have 2^16 tasks. A pool that ends inside the second chunk begins with the first chunk."""
    assert torch.equal(task_pool(2**16 + 5, 2, seed=7)[: 2**16], task_pool(2**16, 2, seed=7))


@given(small=st.integers(1, 50), more=st.integers(0, 50), task_size=st.integers(1, 20), seed=st.integers(0, 2**63 - 1))
def test_pools_of_any_size_are_nested(small, more, task_size, seed):
    assert torch.equal(task_pool(small, task_size, seed), task_pool(small + more, task_size, seed)[:small])


@given(small=st.integers(1, 8), more=st.integers(0, 8))
def test_shorter_tasks_are_the_beginning_of_longer_ones(small, more):
    assert torch.equal(task_pool(5, small, seed=1), task_pool(5, small + more, seed=1)[:, :small])


def test_pool_is_standard_normal():
    assert stats.kstest(task_pool(2**14, 8, seed=0).flatten().double().numpy(), "norm").pvalue > 1e-3


def test_pool_is_isotropic():
    """The second moments of n tasks are 1 on the diagonal with standard error sqrt(2 / n), and else 0 with standard error sqrt(1 / n)."""
    pool = task_pool(2**15, 4, seed=3).double()
    moments = pool.T @ pool / len(pool)
    errors = torch.where(torch.eye(4) == 1, math.sqrt(2 / len(pool)), math.sqrt(1 / len(pool)))
    assert ((moments - torch.eye(4)).abs() < 4 * errors).all()


def test_tasks_of_a_pool_are_distinct():
    assert len(task_pool(4096, 2, seed=0).unique(dim=0)) == 4096


def test_other_seed_gives_other_tasks():
    assert not (task_pool(100, 2, seed=0) == task_pool(100, 2, seed=1)).any()


def test_pool_of_a_whole_float_is_that_of_the_int():
    assert torch.equal(task_pool(64.0, 2, seed=0), task_pool(64, 2, seed=0))


def test_infinite_pool_is_refused():
    with pytest.raises(ValueError, match="has no pool"):
        task_pool(math.inf, 2, seed=0)


@pytest.mark.parametrize("num_tasks", [0, -3, 2.5, None, True])
def test_impossible_pool_is_refused(as_users_run, num_tasks):
    with pytest.raises(ConfigError, match="number of tasks M"):
        task_pool(num_tasks, 2, seed=0)


# Priors


@pytest.mark.parametrize("infinite", [math.inf, "inf"])
def test_prior_of_infinitely_many_tasks_is_gaussian(as_users_run, infinite):
    assert task_prior(infinite, 4, seed=0) == Gaussian(4)


def test_prior_of_finitely_many_tasks_is_discrete():
    assert task_prior(64, 4, seed=5) == Discrete(num_tasks=64, task_size=4, seed=5)


def test_gaussian_tasks_are_standard_normal():
    assert stats.kstest(draws(Gaussian(4), num_steps=10).flatten().double().numpy(), "norm").pvalue > 1e-3


def test_gaussian_tasks_never_repeat():
    assert len(draws(Gaussian(2), num_steps=4).flatten(0, 1).unique(dim=0)) == 4000


@pytest.mark.parametrize("num_tasks", [1, 2, 64, 1000])
def test_discrete_draws_are_members_of_the_pool_bitwise(num_tasks):
    pool = {tuple(task) for task in task_pool(num_tasks, 3, seed=2).tolist()}
    assert {tuple(task) for task in draws(Discrete(num_tasks, 3, seed=2)).flatten(0, 1).tolist()} <= pool


def test_discrete_draws_are_uniform_over_the_pool():
    pool = task_pool(64, 3, seed=2)
    tasks = draws(Discrete(64, 3, seed=2), num_steps=20).flatten(0, 1)
    counts = (tasks[:, None] == pool).all(-1).sum(0)
    assert counts.sum() == len(tasks)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_singleton_prior_always_draws_the_first_task():
    first = task_pool(1, 3, seed=9)
    assert torch.equal(draws(Discrete(1, 3, seed=9)), first.expand(1, 1000, 3))


def test_draw_from_a_pool_of_2_to_20_equals_the_row_of_the_whole_pool():
    """Drawing makes no table. The last task, computed alone, equals its row of the table."""
    num_tasks = 2**20
    prior, indices = Discrete(num_tasks, 2, seed=0), torch.arange(500)
    chosen = rng.integers(KEY, torch.zeros(1, dtype=torch.int64), indices, num_tasks)
    pool = task_pool(num_tasks, 2, seed=0)
    assert torch.equal(draws(prior, num=500), pool[chosen])


def test_last_task_of_2_to_20_computed_alone_equals_the_row_of_the_whole_pool(monkeypatch):
    num_tasks = 2**20
    monkeypatch.setattr(rng, "integers", lambda key, steps, indices, bound: torch.full((1, 1, 1), bound[0] - 1))
    assert torch.equal(draws(Discrete(num_tasks, 2, seed=0), num=1)[0, 0], task_pool(num_tasks, 2, seed=0)[-1])


@pytest.mark.parametrize("prior", [Gaussian(5), Discrete(7, 5, seed=0)], ids=["gaussian", "discrete"])
def test_draws_of_many_steps_are_those_of_each_bitwise(prior):
    steps, indices = torch.arange(3, 7), torch.arange(11)
    alone = [sample_tasks([prior], [KEY], step[None], indices)[0] for step in steps]
    assert torch.equal(sample_tasks([prior], [KEY], steps, indices)[0], torch.cat(alone))
