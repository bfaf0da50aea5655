"""Laws of tasks, noise and inputs: unit variances, exact shapes, limits, and draws that are pure functions of their counters."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from icl import rng
from icl.config import RunConfig, SeedsConfig, TaskConfig
from icl.tasks import laws
from icl.tasks.laws import Law, TaskLaw
from icl.tasks.priors import Continuous, Discrete, sample_tasks, task_pool
from icl.tasks.prompts import prompt_source, sample_prompts, sample_together, task_law
from icl.tasks.shifts import sample_shifted_prompts

KEY = rng.stream(0, "test/laws")
STEPS, INDICES = torch.arange(2), torch.arange(20_000)
SCALAR = {
    "student_t": (Law("student_t", 3.0), stats.t(3, scale=math.sqrt(1 / 3))),
    "nearly no variance": (Law("student_t", 2.1), stats.t(2.1, scale=math.sqrt(0.1 / 2.1))),
    "laplace": (Law("laplace"), stats.laplace(scale=math.sqrt(0.5))),
    "gaussian": (Law("gaussian"), stats.norm()),
}
TASKS = {
    "student_t": TaskLaw("student_t", df=3.0),
    "laplace": TaskLaw("laplace"),
    "sparse": TaskLaw("sparse", density=0.25),
    "low_rank": TaskLaw("low_rank", rank=2, seed=3),
    "mixture": TaskLaw("mixture", components=3, between=0.75, seed=3),
}
WORLDS = {
    "student_t": {"prior": "student_t", "prior_df": 3.0, "noise": "laplace", "inputs": "student_t", "input_df": 4.0},
    "laplace": {"prior": "laplace", "noise": "student_t", "noise_df": 4.0, "inputs": "ar1", "input_correlation": 0.6},
    "sparse": {"prior": "sparse", "prior_density": 0.25},
    "low_rank": {"prior": "low_rank", "prior_rank": 2},
    "mixture": {"prior": "mixture", "prior_components": 3, "prior_between": 0.75},
    "resampled": {"prior": "laplace", "pool": "resampled", "pool_steps": 3},
    "walk": {"pool": "walk", "pool_steps": 3},
}


def run(num_tasks=64, task_size=4, max_examples=6, **world):
    return RunConfig(task=TaskConfig(num_tasks=num_tasks, task_size=task_size, max_examples=max_examples, **world))


def tasks_of(law, size=4, num=20_000):
    return laws.draw_tasks(law, KEY, torch.zeros(1, dtype=torch.int64), torch.arange(num), size)[0].double()


def assert_mean(values, expected):
    """Check a mean over the first axis within four standard errors."""
    error = values.std(0) / math.sqrt(len(values))
    assert ((values.mean(0) - expected).abs() <= 4.5 * error + 1e-12).all()


# Scalar laws


@pytest.mark.parametrize("name", SCALAR)
def test_draws_have_the_distribution_of_scipy(name):
    law, expected = SCALAR[name]
    draws = laws.draw(law, KEY, STEPS, INDICES, 1).flatten().double()
    assert stats.kstest(draws.numpy(), expected.cdf).pvalue > 1e-3
    assert expected.var() == pytest.approx(1)


def test_coordinates_are_independent_also_in_size():
    draws = laws.draw(Law("student_t", 8.0), KEY, STEPS, INDICES, 4).flatten(0, 1).double()
    for values in (draws, draws.abs()):
        assert (torch.corrcoef(values.T) - torch.eye(4)).abs().max() < 5 / math.sqrt(len(values))


def test_student_t_with_many_degrees_of_freedom_is_normal():
    draws = laws.draw(Law("student_t", 1e9), KEY, STEPS, INDICES, 2).flatten().double()
    assert stats.kstest(draws.numpy(), "norm").pvalue > 1e-3


@pytest.mark.parametrize("name", SCALAR)
def test_fewer_numbers_are_the_first_of_more(name):
    law, indices = SCALAR[name][0], torch.arange(5)
    assert torch.equal(laws.draw(law, KEY, STEPS, indices, 3), laws.draw(law, KEY, STEPS, indices, 9)[..., :3])


@pytest.mark.parametrize("name", SCALAR)
def test_squared_error_equivalent_is_the_log_density(name):
    law, expected = SCALAR[name]
    residuals, variance = torch.linspace(-3, 3, 13).double(), 0.3
    cost = laws.squared_error_equivalent(law, residuals.clone(), variance) / (-2 * variance)
    density = expected.logpdf(residuals / math.sqrt(variance)) - expected.logpdf(0)
    np.testing.assert_allclose(cost, density, atol=1e-12)


# Tasks


@pytest.mark.parametrize("name", TASKS)
def test_tasks_have_mean_zero_and_squared_length_d(name):
    tasks = tasks_of(TASKS[name])
    assert_mean(tasks, 0.0)
    assert_mean(tasks.square().sum(1), 4.0)


@pytest.mark.parametrize("name", ["laplace", "sparse", "mixture"])
def test_every_coordinate_has_variance_one(name):
    assert_mean(tasks_of(TASKS[name]).square(), 1.0)


def test_sparse_tasks_have_the_share_of_coordinates_that_are_not_zero():
    tasks = tasks_of(TASKS["sparse"])
    assert_mean((tasks != 0).double(), 0.25)
    assert stats.kstest(tasks[tasks != 0].numpy() / 2, "norm").pvalue > 1e-3


def test_presence_is_independent_of_size_and_of_other_coordinates():
    tasks = tasks_of(TaskLaw("sparse", density=0.5))
    present = (tasks != 0).double()
    assert (torch.corrcoef(present.T) - torch.eye(4)).abs().max() < 5 / math.sqrt(len(tasks))


def test_dense_sparse_tasks_are_gaussian_bitwise():
    assert torch.equal(tasks_of(TaskLaw("sparse", density=1.0)), tasks_of(TaskLaw()))


def test_low_rank_tasks_lie_in_the_subspace_and_are_isotropic_there():
    law = TASKS["low_rank"]
    tasks, basis = tasks_of(law), laws.subspace(law, 4).double()
    assert torch.linalg.matrix_rank(tasks, rtol=1e-5) == 2
    torch.testing.assert_close(basis.T @ basis, 2 * torch.eye(2).double(), rtol=0, atol=1e-6)
    inside = tasks @ basis / 2  # the coordinates u
    torch.testing.assert_close(inside @ basis.T, tasks, rtol=0, atol=1e-5)
    assert_mean(inside.square(), 1.0)


def test_subspaces_are_uniformly_random():
    """The mean over seeds of the projection A A^T is (r / D) I. Each of its entries has a standard deviation below 0.5."""
    bases = torch.stack([laws.subspace(TaskLaw("low_rank", rank=2, seed=seed), 4).double() for seed in range(150)])
    projections = bases @ bases.mT / 2
    assert_mean(projections, torch.eye(4) / 2)


def test_components_have_exact_means_and_variances():
    law = TASKS["mixture"]
    means = laws.component_means(law, 4).double()
    torch.testing.assert_close(means.mean(0), torch.zeros(4).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(means.square().mean(0), torch.full((4,), 0.75).double(), rtol=1e-6, atol=0)


def test_tasks_of_a_mixture_lie_about_the_means_equally_often():
    law = TaskLaw("mixture", components=3, between=1 - 1e-6)
    tasks, means = tasks_of(law), laws.component_means(law, 4).double()
    nearest = torch.cdist(tasks, means).argmin(1)
    assert stats.chisquare(nearest.bincount(minlength=3).numpy()).pvalue > 1e-3
    assert_mean((tasks - means[nearest]) * 1e3, 0.0)
    assert_mean(((tasks - means[nearest]) * 1e3).square(), 1.0)


def test_a_mixture_without_variance_between_its_means_is_gaussian_bitwise():
    assert torch.equal(tasks_of(TaskLaw("mixture", components=3, between=0.0)), tasks_of(TaskLaw()))


def test_seed_of_the_tasks_chooses_the_subspace_and_the_components_only():
    for name, own in (("low_rank", True), ("mixture", True), ("laplace", False)):
        configs = [
            RunConfig(task=run(**WORLDS[name]).task, seeds=SeedsConfig(tasks=seed, evaluation=9)) for seed in (0, 1)
        ]
        assert (task_law(configs[0]) != task_law(configs[1])) is own


# Pools, steps, batches, members


@pytest.mark.parametrize("name", TASKS)
def test_pools_are_nested_bitwise(name):
    small, large = (task_pool(count, 4, seed=7, law=TASKS[name]) for count in (5, 300))
    assert torch.equal(small, large[:5])


@pytest.mark.parametrize("name", TASKS)
def test_draws_from_a_pool_are_its_members_bitwise(name):
    pool = {tuple(task) for task in task_pool(9, 4, seed=7, law=TASKS[name]).tolist()}
    drawn = sample_tasks([Discrete(9, 4, 7, TASKS[name])], [KEY], STEPS, torch.arange(50))
    assert {tuple(task) for task in drawn.flatten(0, 2).tolist()} <= pool


@pytest.mark.parametrize("stream", ["train", "pretrain", "true"])
@pytest.mark.parametrize("name", WORLDS)
def test_prompts_depend_on_their_counters_only(name, stream):
    """Steps together or alone, a part of the batch or all of it, and members together or alone give the same bits."""
    seeds = (SeedsConfig(data=1, noise=2), SeedsConfig(tasks=5))
    configs = [
        RunConfig(task=run(num_tasks, **WORLDS[name]).task, seeds=own)
        for num_tasks, own in zip((9, 70), seeds, strict=True)
    ]
    sources = [prompt_source(config, stream=stream, pool_step=8) for config in configs]
    together = sample_together(sources, range(4, 12), range(3, 20))
    for place, source in enumerate(sources):
        for offset, step in enumerate(range(4, 12)):
            for part, alone in zip(together, source.sample(range(step, step + 1), range(5, 9)), strict=True):
                assert torch.equal(part[place, offset, 2:6], alone[0])


@pytest.mark.parametrize("name", WORLDS)
def test_every_world_has_targets_with_the_variance_of_the_usual_world(name):
    """E y^2 = D + sigma^2. Heavy tails of the inputs, the tasks and the noise make the spread large, but finite."""
    prompts = sample_prompts(run(math.inf, **WORLDS[name] | {"pool": "fixed", "pool_steps": None}), stream="true", step=0, batch_size=20_000)  # fmt: skip
    noise = prompts.ys - (prompts.xs * prompts.ws.unsqueeze(1)).sum(-1)
    assert_mean(prompts.xs.double().square().mean((1, 2)), 1.0)
    assert_mean(noise.double().square().mean(1), 0.25)
    assert_mean(prompts.ys.double().square().mean(1), 4.25)


def test_default_world_is_bitwise_that_of_its_parts():
    """The prompts of the usual world, computed from the generator alone."""
    config = run(9)
    xs, ys, ws = sample_prompts(config, stream="train", step=7, batch_size=11)
    step, index = torch.tensor([7]), torch.arange(11)
    chosen = rng.integers(rng.stream(0, "train/tasks"), step, index, 9)[0]
    pool = rng.normal(rng.stream(0, "tasks"), torch.tensor([0]), torch.arange(9), 4)[0]
    assert torch.equal(xs.flatten(1), rng.normal(rng.stream(0, "train/xs"), step, index, 24)[0])
    assert torch.equal(ws, pool[chosen])
    noise = rng.normal(rng.stream(0, "train/noise"), step, index, 6)[0]
    assert torch.equal(ys, (xs * ws.unsqueeze(1)).sum(-1) + 0.5 * noise)


# Inputs


def test_ar1_inputs_match_a_plain_loop():
    config = run(math.inf, inputs="ar1", input_correlation=-0.7)
    free = sample_prompts(run(math.inf), stream="true", step=0, batch_size=3).xs.double().numpy()
    expected = free.copy()
    for k in range(1, 6):
        expected[:, k] = -0.7 * expected[:, k - 1] + math.sqrt(1 - 0.49) * free[:, k]
    np.testing.assert_allclose(sample_prompts(config, stream="true", step=0, batch_size=3).xs, expected, atol=1e-6)


def test_ar1_inputs_have_geometric_correlations_and_unit_variances():
    xs = sample_prompts(run(math.inf, inputs="ar1", input_correlation=0.6), stream="true", step=0, batch_size=20_000).xs
    for h in range(6):
        assert_mean((xs[:, 0] * xs[:, h]).double(), 0.6**h)
        assert_mean(xs[:, h].double().square(), 1.0)
    assert_mean((xs[..., 0] * xs[..., 1]).double(), 0.0)


def test_ar1_without_correlation_is_the_usual_world_bitwise():
    usual, other = (
        sample_prompts(config, stream="train", step=0, batch_size=9)
        for config in (run(), run(inputs="ar1", input_correlation=0.0))
    )
    assert torch.equal(usual.xs, other.xs)


# Shifts


@pytest.mark.parametrize("name", ["laplace", "mixture"])
def test_a_shift_that_changes_nothing_gives_the_prompts_of_new_tasks(name):
    config = run(**WORLDS[name])
    shifted = sample_shifted_prompts(config, "task_scale_2", batch_size=9)
    clean = sample_prompts(config, stream="true", step=0, batch_size=9)
    assert torch.equal(shifted.xs, clean.xs)
    torch.testing.assert_close(shifted.ys, clean.ys + (clean.xs * clean.ws.unsqueeze(1)).sum(-1), rtol=0, atol=1e-4)


def test_new_tasks_of_another_prior_are_its_own():
    source = prompt_source(run(**WORLDS["sparse"]), stream="true")
    assert source.prior == Continuous(4, TaskLaw("sparse", density=0.25))


@pytest.mark.parametrize("df", [0.9e6, 1e6, 1e8, 1e15, 1e300])
def test_the_peak_of_students_t_with_many_degrees_of_freedom_is_that_of_a_gaussian(df):
    expected = laws.log_peak(Law(), 0.25)
    assert laws.log_peak(Law("student_t", df), 0.25) == pytest.approx(expected + 0.75 / df, abs=2e-9)
