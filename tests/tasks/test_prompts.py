"""Prompts are pure functions of (seed, stream, step, index), have the right distribution, and become tokens in the right order."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from icl.config import RunConfig, SeedsConfig, TaskConfig
from icl.tasks.priors import task_pool
from icl.tasks.prompts import prompt_source, sample_prompts, sample_together, to_tokens

TASKS = st.builds(
    TaskConfig,
    num_tasks=st.integers(1, 2**31 - 1) | st.just(math.inf),
    task_size=st.integers(1, 24) | st.just(64),
    max_examples=st.integers(1, 20) | st.just(33),
    noise_variance=st.floats(0, 4),
)
STEPS = st.integers(0, 100) | st.integers(0, 2**40)
STREAMS = st.sampled_from(["train", "pretrain", "true"])


def run(num_tasks=64, task_size=2, max_examples=4, noise_variance=0.25, **seeds):
    task = TaskConfig(
        num_tasks=num_tasks, task_size=task_size, max_examples=max_examples, noise_variance=noise_variance
    )
    return RunConfig(task=task, seeds=SeedsConfig(**seeds))


def draw(config, stream="train", step=5, batch_size=16, **options):
    return sample_prompts(config, stream=stream, step=step, batch_size=batch_size, **options)


def numbers(*shape):
    """Return the numbers 1, 2, 3, ... in a given shape. All are distinct, and none is zero."""
    return torch.arange(1.0, math.prod(shape) + 1).reshape(shape)


def same(first, second):
    return tuple(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# Any sizes


@given(task=TASKS, stream=STREAMS, step=STEPS, batch_size=st.integers(1, 70))
def test_prompts_have_the_promised_shapes(task, stream, step, batch_size):
    xs, ys, ws = draw(RunConfig(task=task), stream, step, batch_size)
    assert xs.shape == (batch_size, task.max_examples, task.task_size)
    assert ys.shape == (batch_size, task.max_examples)
    assert ws.shape == (batch_size, task.task_size)
    assert xs.dtype == ys.dtype == ws.dtype == torch.float32


@given(task=TASKS, stream=STREAMS, step=STEPS, batch_size=st.integers(1, 70))
def test_prompts_are_a_function_of_their_arguments(task, stream, step, batch_size):
    config = RunConfig(task=task)
    assert same(draw(config, stream, step, batch_size), draw(config, stream, step, batch_size)) == (True,) * 3


@given(task=TASKS, stream=STREAMS, step=STEPS, batch_size=st.integers(1, 70), more=st.integers(0, 70))
def test_smaller_batch_is_the_beginning_of_a_larger_one_bitwise(task, stream, step, batch_size, more):
    config = RunConfig(task=task)
    longer = draw(config, stream, step, batch_size + more)
    assert same(draw(config, stream, step, batch_size), [part[:batch_size] for part in longer]) == (True,) * 3


@given(task=TASKS, step=STEPS, share=st.integers(1, 20), num_ranks=st.integers(1, 5))
def test_shares_of_the_ranks_together_are_the_whole_batch_bitwise(task, step, share, num_ranks):
    source = prompt_source(RunConfig(task=task), stream="train")
    whole = source.sample(range(step, step + 1), range(share * num_ranks))
    shares = [
        source.sample(range(step, step + 1), range(rank * share, (rank + 1) * share)) for rank in range(num_ranks)
    ]
    assert same(whole, [torch.cat(parts, dim=1) for parts in zip(*shares, strict=True)]) == (True,) * 3


@given(task=TASKS, step=STEPS, num_steps=st.integers(1, 5), batch_size=st.integers(1, 40))
def test_steps_drawn_together_are_the_steps_drawn_alone_bitwise(task, step, num_steps, batch_size):
    source = prompt_source(RunConfig(task=task), stream="train")
    steps = range(step, step + num_steps)
    alone = [source.sample(range(one, one + 1), range(batch_size)) for one in steps]
    together = source.sample(steps, range(batch_size))
    assert same(together, [torch.cat(parts) for parts in zip(*alone, strict=True)]) == (True,) * 3


@pytest.mark.parametrize("batch_size", [2, 16, 257])
@pytest.mark.parametrize(("task_size", "max_examples"), [(4, 8), (8, 16), (16, 33), (64, 8), (64, 33)])
def test_targets_do_not_depend_on_the_batch_they_are_drawn_in(task_size, max_examples, batch_size):
    """A batched matrix product would round differently in batches of different shapes."""
    config = run(math.inf, task_size, max_examples)
    assert torch.equal(draw(config, batch_size=1).ys, draw(config, batch_size=batch_size).ys[:1])


def test_number_of_threads_does_not_change_prompts():
    config, before = run(math.inf, 8, 16), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = draw(config, batch_size=1025)
        torch.set_num_threads(2)
        together = draw(config, batch_size=1025)
    finally:
        torch.set_num_threads(before)
    assert same(alone, together) == (True,) * 3


def test_global_generator_is_neither_read_nor_set():
    torch.manual_seed(1)
    state, before = torch.get_rng_state(), draw(run())
    torch.manual_seed(2)
    assert same(draw(run()), before) == (True,) * 3
    torch.manual_seed(1)
    draw(run())
    assert torch.equal(torch.get_rng_state(), state)


# Laws


@pytest.mark.parametrize("num_tasks", [1, 64, math.inf])
@pytest.mark.parametrize("stream", ["train", "pretrain", "true"])
def test_noise_is_normal_with_the_given_variance(stream, num_tasks):
    config = run(num_tasks, 4, 8, noise_variance=0.125)
    xs, ys, ws = (part.double() for part in draw(config, stream, batch_size=4000))
    noise = (ys - torch.einsum("bkd,bd->bk", xs, ws)).flatten()
    assert abs(noise.square().mean() - 0.125) < 4 * 0.125 * math.sqrt(2 / len(noise))
    assert stats.kstest(noise.numpy() / math.sqrt(0.125), "norm").pvalue > 1e-3


def test_targets_without_noise_are_the_clean_ones():
    xs, ys, ws = (part.double() for part in draw(run(noise_variance=0.0)))
    np.testing.assert_allclose(ys, torch.einsum("bkd,bd->bk", xs, ws), atol=1e-5)


def test_inputs_are_standard_normal():
    assert stats.kstest(draw(run(), batch_size=4000).xs.flatten().double().numpy(), "norm").pvalue > 1e-3


def test_inputs_tasks_and_noise_are_uncorrelated():
    config = run(math.inf, 4, 4, noise_variance=1.0)
    xs, ys, ws = (part.double() for part in draw(config, batch_size=10_000))
    noise = ys - torch.einsum("bkd,bd->bk", xs, ws)
    table = torch.cat((xs.flatten(1), ws, noise), dim=1)  # B, 16 + 4 + 4
    off_diagonal = torch.corrcoef(table.T) - torch.eye(24)
    assert off_diagonal.abs().max() < 5 / math.sqrt(len(table))


def test_mean_square_of_the_targets_is_the_loss_of_the_zero_predictor():
    """E y^2 = D + sigma^2. The means of y^2 over K are independent between prompts, so their spread gives the standard error."""
    squares = draw(run(math.inf, 4, 8, noise_variance=0.125), batch_size=20_000).ys.double().square().mean(1)
    assert abs(squares.mean() - 4.125) < 4 * squares.std() / math.sqrt(len(squares))


@pytest.mark.parametrize("stream", ["train", "pretrain"])
def test_training_prompts_use_tasks_of_the_pool(stream):
    pool = {tuple(task) for task in task_pool(8, 2, seed=3).tolist()}
    assert {tuple(task) for task in draw(run(8, tasks=3), stream, batch_size=500).ws.tolist()} == pool


def test_true_prompts_have_tasks_of_their_own():
    assert len(draw(run(8), "true", batch_size=500).ws.unique(dim=0)) == 500


def test_distribution_overrides_that_of_the_stream():
    config = run(8)
    assert len(draw(config, "train", batch_size=500, distribution="true").ws.unique(dim=0)) == 500
    assert len(draw(config, "true", batch_size=500, distribution="pretrain").ws.unique(dim=0)) == 8


def test_other_steps_and_streams_have_other_prompts():
    config = run(math.inf)
    draws = [draw(config, stream, step).xs for stream in ("train", "pretrain", "true") for step in (0, 1, 2**32)]
    assert len(torch.stack(draws).flatten(1).unique(dim=0)) == 9


# Seeds: changing one leaves the other draws bitwise the same

SEEDS = ("model", "tasks", "data", "noise", "evaluation")
TOUCHED = {  # which of (xs, ys, ws) a seed changes, in training and in evaluation
    "model": ((), ()),
    "tasks": (("ys", "ws"), ("ys", "ws")),
    "data": (("xs", "ys", "ws"), ()),
    "noise": (("ys",), ()),
    "evaluation": ((), ("xs", "ys", "ws")),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("stream", "which"), [("train", 0), ("pretrain", 1)])
def test_seed_changes_its_own_draws_only(seed, stream, which):
    before, after = draw(run(4096), stream), draw(run(4096, **{seed: 1}), stream)
    for name in ("xs", "ys", "ws"):
        unchanged = torch.equal(getattr(before, name), getattr(after, name))
        assert unchanged == (name not in TOUCHED[seed][which]), name


def test_seed_of_the_tasks_leaves_the_noise_as_it_was():
    before, after = (prompt_source(run(tasks=seed), stream="train") for seed in (0, 1))
    assert before._replace(prior=after.prior) == after


def test_seed_of_the_tasks_leaves_the_true_distribution_as_it_was():
    assert same(draw(run(tasks=0), "true"), draw(run(tasks=1), "true")) == (True,) * 3


def test_seed_of_the_data_leaves_the_noise_as_it_was():
    before, after = (prompt_source(run(data=seed), stream="train") for seed in (0, 1))
    assert before.noise_key == after.noise_key


# Runs that differ in M


def test_runs_of_other_task_diversity_share_tasks_bitwise():
    """Every task of the run with M = 8 is also a task of the run with M = 64, with the same bits."""
    few, many = ({tuple(task) for task in draw(run(num_tasks), batch_size=2000).ws.tolist()} for num_tasks in (8, 64))
    assert (len(few), len(many), few < many) == (8, 64, True)


def test_runs_of_other_task_diversity_see_the_same_inputs():
    assert torch.equal(draw(run(8)).xs, draw(run(math.inf)).xs)


# Tokens


@given(
    batch=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    max_examples=st.integers(1, 9),
    task_size=st.integers(1, 9),
)
def test_tokens_have_the_promised_layout(batch, max_examples, task_size):
    """There are 2K - 1 tokens: x-tokens (0, x) at even positions, and y-tokens (y, 0, ..., 0) at odd positions."""
    xs, ys = numbers(*batch, max_examples, task_size), numbers(*batch, max_examples)
    tokens = to_tokens(xs, ys)
    assert tokens.shape == (*batch, 2 * max_examples - 1, task_size + 1)
    for k in range(max_examples):
        assert (tokens[..., 2 * k, 0] == 0).all()
        assert torch.equal(tokens[..., 2 * k, 1:], xs[..., k, :])
    for k in range(max_examples - 1):
        assert torch.equal(tokens[..., 2 * k + 1, 0], ys[..., k])
        assert (tokens[..., 2 * k + 1, 1:] == 0).all()


def test_tokens_of_a_small_prompt_written_out():
    xs, ys = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.tensor([[5.0, 6.0]])
    assert to_tokens(xs, ys).tolist() == [[[0, 1, 2], [5, 0, 0], [0, 3, 4]]]


def test_last_target_is_in_no_token():
    xs, ys = numbers(2, 3, 4), numbers(2, 3)
    changed = ys.clone()
    changed[:, -1] = 100.0
    assert torch.equal(to_tokens(xs, ys), to_tokens(xs, changed))


# CUDA


@pytest.mark.gpu
def test_prompts_on_cuda_agree_with_those_on_the_cpu():
    here, there = (draw(run(task_size=8), batch_size=500, device=device) for device in ("cpu", "cuda"))
    for ours, theirs in zip(here, there, strict=True):
        torch.testing.assert_close(theirs.cpu(), ours, rtol=1e-5, atol=1e-5)


def test_prompts_of_several_runs_at_once_are_those_of_each_alone_bitwise():
    seeds = [SeedsConfig(data=seed, noise=seed, tasks=seed % 2) for seed in range(5)]
    diversities = (4, math.inf, 3, 1_000_000, math.inf)
    sources = [
        prompt_source(RunConfig(task=TaskConfig(num_tasks=num_tasks), seeds=own), stream="train")
        for num_tasks, own in zip(diversities, seeds, strict=True)
    ]
    steps, indices = range(7, 10), range(2, 9)
    together = sample_together(sources, steps, indices)
    for place, source in enumerate(sources):
        for part, alone in zip(together, source.sample(steps, indices), strict=True):
            assert torch.equal(part[place], alone)
