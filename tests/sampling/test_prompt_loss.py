"""The run's own loss as a sampling target: it equals the model's loss, and its minibatches are pure functions."""

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from llc_runs import CONFIG, QUICK
from tiny_runs import change

from icl.build import build_model
from icl.compute import calls
from icl.model.flat import layout_of, restricted_layout
from icl.model.stacked import stack
from icl.sampling.prompt_loss import prompt_target, trivial_loss
from icl.sampling.target import vmapped_gradient
from icl.tasks.prompts import sample_prompts

MODEL = build_model(CONFIG)
PARAMS = {name: tensor.detach() for name, tensor in MODEL.named_parameters()}


def sampler(**changes):
    return dataclasses.replace(QUICK, **changes)


def test_the_loss_is_the_models_squared_error_at_each_position():
    loss = prompt_target(CONFIG, QUICK)
    xs, ys = loss.batches(0, 3)
    expected = (MODEL(xs, ys).detach() - ys).square().mean(0)
    torch.testing.assert_close(loss.loss(PARAMS, (xs, ys)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("output", ["gaussian", "mixture"])
def test_the_loss_of_a_predictive_distribution_is_its_negative_log_likelihood(output):
    """It is the loss of training, and is named so. The trivial predictor is N(0, E[y^2]), whose loss is a Gaussian's entropy."""
    config = change(CONFIG, model={"output": output})
    model = build_model(config)
    target = prompt_target(config, QUICK)
    xs, ys = target.batches(0, 3)
    params = {name: tensor.detach() for name, tensor in model.named_parameters()}
    torch.testing.assert_close(target.loss(params, (xs, ys)), model.losses(xs, ys).detach().mean(0))
    assert target.name == "nll"
    assert prompt_target(config, sampler(loss="subsequence")).name == "subsequence_nll"
    assert prompt_target(CONFIG, QUICK).name == "mse"
    marginal = torch.distributions.Normal(0.0, trivial_loss(CONFIG) ** 0.5)
    assert trivial_loss(config) == pytest.approx(float(marginal.entropy()), rel=1e-6)


def test_the_subsequence_loss_is_the_mean_over_all_lengths():
    loss = prompt_target(CONFIG, sampler(loss="subsequence"))
    xs, ys = loss.batches(0, 0)
    errors = (MODEL(xs, ys).detach() - ys).square()
    lengths = range(1, CONFIG.task.max_examples + 1)
    expected = torch.stack([errors[:, :length].mean() for length in lengths]).mean()
    torch.testing.assert_close(loss.loss(PARAMS, (xs, ys)).mean(), expected, rtol=1e-5, atol=1e-6)


def test_the_pool_knows_the_minibatch_of_every_move_however_late():
    """The chains of a calibration are longer than those of the settings with which the target is made."""
    batches = prompt_target(CONFIG, QUICK).batches
    for chain, draw in ((0, 0), (1, QUICK.num_moves), (0, 1023), (0, 1024), (1, 5000)):
        block = batches.pool.get(batches.pool.number_of(chain, draw))
        assert all(map(torch.equal, batches(chain, draw), block))


@pytest.mark.parametrize("name", ["mse", "subsequence"])
def test_the_fast_gradient_is_the_mapped_one(name):
    loss = prompt_target(CONFIG, sampler(loss=name))
    moved = {key: tensor + 0.01 for key, tensor in PARAMS.items()}
    members = stack([PARAMS, moved])
    layout = restricted_layout(PARAMS, [name for name in PARAMS if name != "unembedding.weight"])
    rows, fixed = layout.to_rows(members), layout.fixed(members)
    assert fixed.keys() == {"unembedding.weight"}
    batch = tuple(torch.stack(pair) for pair in zip(loss.batches(0, 0), loss.batches(1, 0), strict=True))
    fast, fast_values = loss.gradient(layout, rows, fixed, batch)
    slow, slow_values = vmapped_gradient(loss.loss)(layout, rows, fixed, batch)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(fast_values, slow_values, rtol=1e-5, atol=1e-6)


def test_losses_of_many_members_are_each_ones_own():
    loss = prompt_target(CONFIG, sampler(loss="subsequence"))
    moved = {key: tensor + 0.01 for key, tensor in PARAMS.items()}
    batch = loss.batches(0, 0)
    expected = torch.stack([loss.loss(one, batch) for one in (PARAMS, moved, PARAMS)])
    torch.testing.assert_close(
        loss.shared_losses(stack([PARAMS, moved, PARAMS]), batch), expected, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("num_tasks", [1, 16, math.inf])
def test_the_trivial_loss_is_the_mean_square_of_the_targets(num_tasks):
    config = change(CONFIG, task={"num_tasks": num_tasks})
    squares = sample_prompts(config, stream="train", step=0, batch_size=20_000).ys.square().mean(1)
    error = float(squares.std()) / len(squares) ** 0.5
    assert trivial_loss(config) == pytest.approx(float(squares.mean()), abs=4 * error)
    if num_tasks == math.inf:
        assert trivial_loss(config) == config.task.task_size + config.task.noise_variance


def test_fixed_minibatches_are_blocks_of_one_set_that_a_larger_one_holds():
    small, large = (prompt_target(CONFIG, sampler(num_samples=n)) for n in (64, 1024))
    whole = sample_prompts(CONFIG, stream="llc", step=0, batch_size=1024)
    for loss, size in ((small, 64), (large, 1024)):
        blocks = whole.xs[:size].split(QUICK.batch_size)
        for chain, draw in ((0, 0), (1, 0), (0, 1), (3, 17)):
            xs, _ = loss.batches(chain, draw)
            assert any(torch.equal(xs, block) for block in blocks)


def test_one_block_is_the_whole_data_at_every_draw():
    loss = prompt_target(CONFIG, sampler(num_samples=16))
    assert all(torch.equal(loss.batches(0, 0)[0], loss.batches(chain, draw)[0]) for chain in (0, 1) for draw in (0, 5))


@pytest.mark.parametrize("kind", ["fixed", "fresh"])
def test_minibatches_are_a_pure_function_of_seed_chain_and_draw(kind):
    first, again, other = (
        prompt_target(CONFIG, sampler(minibatches=kind, seed=seed, num_samples=2**20)).batches for seed in (0, 0, 1)
    )
    places = [(0, 0), (1, 0), (0, 1), (1, 1)]
    for place in places:
        assert torch.equal(first(*place)[0], again(*place)[0])
        assert not torch.equal(first(*place)[0], other(*place)[0])
    assert len({first(*place)[0].numpy().tobytes() for place in places}) == len(places)


@pytest.mark.parametrize("kind", ["fixed", "fresh"])
def test_minibatches_made_ahead_do_not_depend_on_what_was_asked_before(kind):
    settings = sampler(minibatches=kind, num_samples=2**20)
    forwards, backwards = (prompt_target(CONFIG, settings).batches for _ in range(2))
    places = [(chain, draw) for draw in (0, 1, 1023, 1024, 5000) for chain in (0, 1)]
    found = {place: forwards(*place) for place in places}
    for place in reversed(places):
        assert all(torch.equal(one, other) for one, other in zip(found[place], backwards(*place), strict=True))


# Gradients of several chains, each on a core of its own


def three_chains(loss, dtype):
    """Return the parameters and minibatches of three chains."""
    params = stack([{name: p.to(dtype) + 0.01 * i for name, p in PARAMS.items()} for i in range(3)])
    found = [loss.batches(chain, 0) for chain in range(3)]
    return params, tuple(torch.stack([one[part] for one in found]).to(dtype) for part in (0, 1))


def gradients(num_moves=0, dtype=torch.float64):
    """Return the gradients of three chains, and of the last chain alone."""
    loss = prompt_target(CONFIG, sampler(num_chains=3), num_moves=num_moves)
    params, batch = three_chains(loss, dtype)
    layout = layout_of(params)
    rows = layout.to_rows(params)
    alone = loss.gradient(layout, rows[2:], {}, tuple(part[2:] for part in batch))
    return loss.gradient(layout, rows, {}, batch), alone


def own_losses(num_moves=0):
    """Return the losses of three chains, in the precision that sampling uses."""
    loss = prompt_target(CONFIG, sampler(num_chains=3), num_moves=num_moves)
    return loss.own_losses(*three_chains(loss, torch.float32))


@pytest.mark.parametrize("num_threads", [1, 2, 3, 7])
def test_any_number_of_threads_gives_the_chains_own_gradients(num_threads):
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    (grads, values), (alone, value) = gradients()
    torch.set_num_threads(before)
    torch.testing.assert_close(values[2:], value, rtol=1e-10, atol=0)
    torch.testing.assert_close(grads[2:], alone, rtol=1e-9, atol=1e-12)


def test_short_chains_do_not_wait_for_a_compiler_and_long_ones_use_one(monkeypatch):
    """A gradient of the tiny run takes 6 x 563 x 8 x 16 = 432,384 operations, so 1e13 operations are 2.3e7 gradients."""
    asked = []
    monkeypatch.setattr(calls.torch, "compile", lambda function, **_: asked.append(function) or function)
    prompt_target(CONFIG, QUICK, num_moves=10**7)
    assert not asked
    prompt_target(CONFIG, QUICK, num_moves=10**8)
    assert asked


COMPILED = """
import torch
torch.set_num_threads(2)
import test_prompt_loss as t
for ours, other in zip(t.gradients(num_moves=10**8), t.gradients(), strict=True):
    torch.testing.assert_close(ours[1], other[1], rtol=1e-10, atol=0)
    torch.testing.assert_close(ours[0], other[0], rtol=1e-8, atol=1e-11)
single = torch.float32  # which attention's own kernel is for
for ours, other in zip(t.gradients(10**8, single), t.gradients(0, single), strict=True):
    torch.testing.assert_close(ours[1], other[1], rtol=1e-5, atol=0)
    torch.testing.assert_close(ours[0], other[0], rtol=1e-4, atol=1e-6)
torch.testing.assert_close(t.own_losses(10**8), t.own_losses(), rtol=1e-5, atol=0)
"""


@pytest.mark.slow
def test_compiled_gradients_and_losses_are_the_eager_ones_up_to_rounding():
    """This runs in a separate process, because the shape checks of the test run cannot be traced."""
    folder = Path(__file__).parent
    code = f"import sys; sys.path[:0] = [{str(folder)!r}, {str(folder.parent)!r}]\n{COMPILED}"
    run = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code], capture_output=True, text=True, timeout=900
    )
    assert run.returncode == 0, run.stderr
