"""Members side by side: the numbers of one at a time, whatever the number of threads, and nobody's threads are changed."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from llc_runs import CONFIG, QUICK

from icl import compiling
from icl.build import build_model
from icl.population import size, stack
from icl.sampling.cores import side_by_side
from icl.sampling.prompt_loss import prompt_loss

SAMPLER = dataclasses.replace(QUICK, num_chains=3)


def members(num=3, dtype=torch.float64):
    model = {name: p.detach().to(dtype) for name, p in build_model(CONFIG).named_parameters()}
    return stack([{name: p + 0.01 * i for name, p in model.items()} for i in range(num)])


def minibatches(loss, num=3, dtype=torch.float64):
    found = [loss.batches(chain, 0) for chain in range(num)]
    return tuple(torch.stack([batch[part] for batch in found]).to(dtype) for part in (0, 1))


def gradients(num_moves=0):
    """Of three members and of the last alone."""
    loss, params = prompt_loss(CONFIG, SAMPLER, num_moves=num_moves), members()
    batch = minibatches(loss)
    alone = loss.gradient({n: t[2:] for n, t in params.items()}, {}, tuple(part[2:] for part in batch))
    return loss.gradient(params, {}, batch), alone


@pytest.fixture(params=[1, 2, 3, 7])
def num_threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_any_number_of_threads_gives_the_members_own_gradients(num_threads):
    (grads, values), (alone, value) = gradients()
    torch.testing.assert_close(values[2:], value, rtol=1e-10, atol=0)
    for name in grads:
        torch.testing.assert_close(grads[name][2:], alone[name], rtol=1e-9, atol=1e-12)


def test_threads_are_shared_out_and_the_callers_number_stays(num_threads):
    seen = []

    def noting(moving, frozen, batch):
        seen.append((size(moving), torch.get_num_threads(), torch.is_grad_enabled()))
        return moving, torch.zeros(size(moving))

    side_by_side(noting)(members(), {}, minibatches(prompt_loss(CONFIG, SAMPLER)))
    assert seen == [(1, max(1, num_threads // 3), False)] * 3
    assert torch.get_num_threads() == num_threads


def test_members_are_in_their_order_and_an_error_is_not_lost(num_threads):
    def echo(moving, frozen, batch):
        return moving, batch[1].mean((1, 2))

    params, batch = members(), minibatches(prompt_loss(CONFIG, SAMPLER))
    grads, values = side_by_side(echo)(params, {}, batch)
    assert all(torch.equal(grads[name], params[name]) for name in params)
    torch.testing.assert_close(values, batch[1].mean((1, 2)))
    with pytest.raises(TypeError):
        side_by_side(lambda *_: None)(params, {}, batch)


def test_short_chains_do_not_wait_for_a_compiler_and_long_ones_use_one(monkeypatch):
    """The tiny run has 6 x 563 x 8 x 16 = 432,384 operations for a gradient; 1e13 of them are 2.3e7 gradients."""
    asked = []
    monkeypatch.setattr(compiling.torch, "compile", lambda function, **_: asked.append(function) or function)
    prompt_loss(CONFIG, SAMPLER, num_moves=10**7)
    assert not asked
    prompt_loss(CONFIG, SAMPLER, num_moves=10**8)
    assert asked


COMPILED = """
import torch
torch.set_num_threads(2)
import test_cores as t
for ours, other in zip(t.gradients(num_moves=10**8), t.gradients(), strict=True):
    torch.testing.assert_close(ours[1], other[1], rtol=1e-10, atol=0)
    torch.testing.assert_close(dict(ours[0]), dict(other[0]), rtol=1e-8, atol=1e-11)
"""


@pytest.mark.slow
def test_compiled_is_eager_up_to_rounding():
    """In a process of its own: the shape checks of the test run cannot be traced."""
    folder = Path(__file__).parent
    code = f"import sys; sys.path[:0] = [{str(folder)!r}, {str(folder.parent)!r}]\n{COMPILED}"
    run = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code], capture_output=True, text=True, timeout=900
    )
    assert run.returncode == 0, run.stderr
