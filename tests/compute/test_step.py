"""The training step equals PyTorch's: losses, gradients, clipping and Adam, for each member."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from icl.build import build_architecture
from icl.compute.calls import compiling_pays
from icl.compute.step import (
    AdamState,
    adam_state,
    losses_and_grads,
    make_step,
    most_parts,
)
from icl.config import ModelConfig, OptimConfig
from icl.model.flat import layout_of
from icl.model.stacked import stack
from icl.model.transformer import Transformer, initialise
from icl.presets import preset

D, K, B, N = 3, 4, 5, 3
CONFIG = ModelConfig(num_heads=2, embed_size=8, mlp_size=5)
RATES = (1e-3, 3e-3, 1e-2)


def make_members(num=N, dtype=torch.float64):
    members = [Transformer(CONFIG, task_size=D, max_examples=K).to(dtype) for _ in range(num)]
    for seed, member in enumerate(members):
        initialise(member, CONFIG, torch.Generator().manual_seed(seed))
    return members


def make_params(num=N, dtype=torch.float64):
    return stack([{n: p.detach() for n, p in m.named_parameters()} for m in make_members(num, dtype)])


def make_prompts(step, num=N, dtype=torch.float64):
    generator = torch.Generator().manual_seed(step)
    xs = torch.randn(num, B, K, D, generator=generator, dtype=dtype)
    return xs, torch.randn(num, B, K, generator=generator, dtype=dtype)


def train(num_steps, optim, *, num=N, dtype=torch.float64, state=None, first=0, **how):
    """Return the state after some steps, and the output of each step."""
    params = make_params(num, dtype)
    step = make_step(CONFIG, optim, layout_of(params), **how)
    state = adam_state(params) if state is None else state
    rates = torch.tensor(RATES[:num], dtype=dtype)
    return state, [step(state, *make_prompts(s, num, dtype), rates) for s in range(first, first + num_steps)]


def train_alone(number, num_steps, optim, dtype=torch.float64):
    """Train the same member with `torch.optim.Adam` and `clip_grad_norm_`. Return also its losses and gradient norms."""
    member = make_members(N, dtype)[number]
    adam = torch.optim.Adam(member.parameters(), RATES[number], (optim.beta1, optim.beta2), optim.eps)
    told = []
    for s in range(num_steps):
        xs, ys = (part[number] for part in make_prompts(s, N, dtype))
        adam.zero_grad()
        loss = (member(xs, ys) - ys).square().mean()
        loss.backward()
        limit = torch.inf if optim.grad_clip is None else optim.grad_clip
        told.append((loss.item(), float(torch.nn.utils.clip_grad_norm_(member.parameters(), limit))))
        adam.step()
    return {name: parameter.detach() for name, parameter in member.named_parameters()}, told


# Rows


def test_rows_give_back_what_was_laid_out_and_begin_at_full_cache_lines():
    params = make_params()
    rows = layout_of(params).to_rows(params)
    back = layout_of(params).to_params(rows)
    assert list(back) == list(params)
    assert all(torch.equal(back[name], params[name]) for name in params)
    assert rows.shape[1] % 16 == 0


def test_rows_read_back_are_views():
    layout = layout_of(make_params())
    rows = layout.to_rows(make_params())
    layout.to_params(rows)["unembedding.bias"].fill_(7.0)
    assert (rows == 7.0).sum() == N * (D + 1)


# Losses and gradients


def test_losses_and_gradients_are_the_members_own():
    params, (xs, ys) = make_params(), make_prompts(0)
    losses, grads = losses_and_grads(CONFIG, layout_of(params), layout_of(params).to_rows(params), xs, ys)
    for i, member in enumerate(make_members()):
        loss = (member(xs[i], ys[i]) - ys[i]).square().mean()
        loss.backward()
        torch.testing.assert_close(losses[i], loss.detach(), rtol=1e-12, atol=0)
        for name, parameter in member.named_parameters():
            torch.testing.assert_close(layout_of(params).to_params(grads)[name][i], parameter.grad, rtol=0, atol=1e-13)


def test_losses_and_gradients_of_shared_prompts():
    params, (xs, ys) = make_params(), make_prompts(0, 1)
    shared = losses_and_grads(CONFIG, layout_of(params), layout_of(params).to_rows(params), xs[0], ys[0])
    own = losses_and_grads(
        CONFIG, layout_of(params), layout_of(params).to_rows(params), xs.expand(N, -1, -1, -1), ys.expand(N, -1, -1)
    )
    for ours, expected in zip(shared, own, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)


# Steps


@pytest.mark.parametrize(
    "optim",
    [
        OptimConfig(),
        OptimConfig(grad_clip=0.5),
        OptimConfig(grad_clip=1e-2, beta1=0.0, beta2=0.5, eps=1e-3),
    ],
    ids=["plain", "clipped", "other decays"],
)
def test_several_steps_are_those_of_torch(optim):
    """In float64, ten steps differ only by rounding."""
    state, infos = train(10, optim)
    params = layout_of(make_params()).to_params(state.rows)
    for i in range(N):
        expected, told = train_alone(i, 10, optim)
        for name in expected:
            torch.testing.assert_close(params[name][i], expected[name], rtol=0, atol=1e-11)
        for info, (loss, norm) in zip(infos, told, strict=True):
            assert info.losses[i].item() == pytest.approx(loss, rel=1e-10)
            assert info.norms[i].item() == pytest.approx(norm, rel=1e-10)


def test_float32_keeps_the_first_bias_corrections():
    """At step 1 Adam moves by the learning rate, whatever the gradient's size. So 1 - beta2 = 0.001 must not lose digits."""
    state, _ = train(1, OptimConfig(eps=1e-30), dtype=torch.float32)
    params = make_params(dtype=torch.float32)
    moved = (state.rows - layout_of(params).to_rows(params)).abs()
    for row, rate in zip(moved, RATES, strict=True):
        at_most_rounding = row[row > 0].double() / rate
        assert at_most_rounding.median().item() == pytest.approx(
            1, abs=2e-4
        )  # weights near 1 store steps of 1e-3 to 1e-4


def test_processes_that_share_a_batch_move_as_one_that_has_all_of_it():
    """Two shares of a batch are computed one after the other. Each gets the mean that a reduction over both would give."""
    params, (xs, ys) = make_params(), make_prompts(0)
    layout, rates = layout_of(params), torch.tensor(RATES, dtype=torch.float64)
    whole, halves = adam_state(params), adam_state(params)
    expected = make_step(CONFIG, OptimConfig(grad_clip=0.5), layout)(whole, xs[:, :4], ys[:, :4], rates)
    others = [
        losses_and_grads(CONFIG, layout, halves.rows[i : i + 1], xs[i : i + 1, 2:4], ys[i : i + 1, 2:4])
        for i in range(N)
    ]
    missing = iter([part for other in others for part in other])
    step = make_step(CONFIG, OptimConfig(grad_clip=0.5), layout, reduce=lambda own: own.add_(next(missing)).div_(2))
    info = step(halves, xs[:, :2], ys[:, :2], rates)
    torch.testing.assert_close(tuple(halves), tuple(whole), rtol=0, atol=1e-12)
    torch.testing.assert_close(tuple(info), tuple(expected), rtol=1e-12, atol=0)


def train_last(num_steps, **how):
    """Return the weights of the last member after some steps alone."""
    state = adam_state(make_params(N, torch.float32)).members(slice(2, 3))
    step = make_step(CONFIG, OptimConfig(), layout_of(make_params()), **how)
    for s in range(num_steps):
        xs, ys = (part[2:3].clone() for part in make_prompts(s, dtype=torch.float32))
        step(state, xs, ys, torch.tensor(RATES[2:]))
    return state.rows[0]


def test_a_member_in_a_population_is_bitwise_the_member_alone():
    together, _ = train(4, OptimConfig(), dtype=torch.float32)
    assert torch.equal(train_last(4), together.rows[2])


def test_a_member_that_goes_wrong_goes_alone():
    params = make_params()
    params["unembedding.weight"][1] = torch.inf
    state = adam_state(params)
    step = make_step(CONFIG, OptimConfig(grad_clip=0.5), layout_of(params))
    info = step(state, *make_prompts(0), torch.full((N,), 1e-3, dtype=torch.float64))
    assert info.losses.isfinite().tolist() == [True, False, True]
    assert state.rows[[0, 2]].isfinite().all()


def test_the_filling_of_a_row_stays_zero():
    state, _ = train(3, OptimConfig())
    used = layout_of(make_params()).size
    assert (state.rows[:, used:] == 0).all()
    assert state.rows.shape[1] > used


def copy(state):
    return AdamState(*(tensor.clone() for tensor in state))


# When to compile, and what if it cannot be


def steps_that_pay(name):
    config = preset(name)
    num_params = sum(parameter.numel() for parameter in build_architecture(config).parameters())
    num_tokens = 2 * config.task.max_examples * config.trainer.batch_size
    return min(
        s
        for s in (2**i for i in range(24))
        if compiling_pays(num_params=num_params, num_tokens=num_tokens, num_steps=s)
    )


def test_the_quickstart_does_not_wait_for_a_compiler_and_long_trainings_use_one():
    """A step of L2H4 takes 6 x 51,717 x 16 x 256 = 1.27e9 operations, so 1e13 operations are about 7,900 steps."""
    assert steps_that_pay("quickstart") > 2 * preset("quickstart").trainer.max_steps
    assert steps_that_pay("L2H4") == 2**13


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_without_a_compiler_the_step_is_eager_and_says_so(packed, monkeypatch):
    """With `packed`, members still run in parallel, and changes that one member makes in place do not affect the others."""

    def refuse(*_, **__):
        raise torch._dynamo.exc.BackendCompilerFailed(refuse, RuntimeError("No working C++ compiler found"), None)

    monkeypatch.setattr(torch, "compile", lambda *_, **__: refuse)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.warns(UserWarning, match="continues without torch.compile.*No working"):
            state, _ = train(40, OptimConfig(), compiled=True, packed=packed)
    finally:
        torch.set_num_threads(before)
    expected, _ = train(40, OptimConfig())
    torch.testing.assert_close(tuple(state), tuple(expected), rtol=0, atol=1e-10)


# Compiled, in processes of their own: the shape checks of the test run cannot be traced

COMPILED = """
import hashlib, shutil, torch, warnings
import test_step as t
from icl.config import OptimConfig

if shutil.which("g++"):  # else the steps stay eager, which is equal to itself
    warnings.filterwarnings("error", message=".*continues without torch.compile")

eager, expected = t.train(5, OptimConfig(grad_clip=0.5))
for packed, num_parts in ((False, 1), (True, 1), (False, t.B)):
    how = {"compiled": True, "packed": packed, "num_parts": num_parts}
    compiled, told = t.train(5, OptimConfig(grad_clip=0.5), **how)
    for ours, other in zip(compiled, eager, strict=True):
        torch.testing.assert_close(ours, other, rtol=0, atol=1e-12)
    for ours, other in zip(told, expected, strict=True):
        torch.testing.assert_close(tuple(ours), tuple(other), rtol=1e-10, atol=0)
    state, _ = t.train(4, OptimConfig(), dtype=torch.float32, **how)
    resumed, _ = t.train(2, OptimConfig(), dtype=torch.float32, **how)
    resumed, _ = t.train(2, OptimConfig(), dtype=torch.float32, **how, state=t.copy(resumed), first=2)
    assert all(torch.equal(ours, other) for ours, other in zip(state, resumed, strict=True))
    assert torch.equal(state.rows[2], t.train_last(4, **how))
    print(packed, num_parts, hashlib.sha256(b"".join(part.numpy().tobytes() for part in state)).hexdigest())
"""


TRACED = """
import torch
import test_step as t
from icl.model.flat import layout_of
from icl.compute.step import losses_and_grads

params = t.make_params()
rows = layout_of(params).to_rows(params)
graph = torch.compile(losses_and_grads, backend="eager", fullgraph=True)
for ours, other in zip(*(f(t.CONFIG, layout_of(params), rows, *t.make_prompts(0)) for f in (graph, losses_and_grads))):
    torch.testing.assert_close(ours, other, rtol=1e-12, atol=1e-14)
"""


@pytest.mark.slow
def test_a_step_is_one_graph_with_a_layout_that_was_never_used():
    run_alone(TRACED)


@pytest.mark.slow
def test_compiled_is_eager_up_to_rounding_and_gives_the_same_bits_in_every_process():
    """With `packed` or with parts, this holds for any number of threads."""
    alone, packed, parts = zip(*(run_alone(COMPILED, num_threads) for num_threads in (2, 2, 1)), strict=True)
    assert alone[0] == alone[1]
    assert len(set(packed)) == len(set(parts)) == 1


@pytest.mark.parametrize(
    ("batch_size", "num_threads", "expected"), [(256, 2, 2), (256, 1, 1), (33, 2, 1), (96, 4, 3), (255, 2, 1)]
)
def test_a_batch_is_split_into_equal_parts_of_a_useful_size(batch_size, num_threads, expected):
    assert most_parts(batch_size, num_threads) == expected


def run_alone(program, num_threads=1):
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parent,
        env={**os.environ, "OMP_NUM_THREADS": str(num_threads)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


# On a GPU


def assert_it_steps_as_a_cpu(device, **how):
    """Check five clipped steps of members that train together."""
    optim = OptimConfig(grad_clip=0.5)
    params = {name: tensor.to(device) for name, tensor in make_params().items()}
    step, state = make_step(CONFIG, optim, layout_of(params), **how), adam_state(params)
    rates = torch.tensor(RATES, dtype=torch.float64, device=device)
    for s in range(5):
        info = step(state, *(part.to(device) for part in make_prompts(s)), rates)
    expected, told = train(5, optim)
    for ours, other in zip(state, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), other, rtol=0, atol=1e-11)
    torch.testing.assert_close(info.losses.cpu(), told[-1].losses, rtol=1e-10, atol=0)


COMPILED_ON_A_GPU = """
import warnings
import test_step as t
from torch._dynamo.utils import counters

warnings.filterwarnings("error", message=".*continues without torch.compile")
t.assert_it_steps_as_a_cpu("cuda", compiled=True)
assert counters["inductor"]["cudagraph_skips"] == 0, counters
assert counters["inductor"]["cudagraph_recorded_non_static_inputs"] > 0, counters  # it was recorded
"""


@pytest.mark.gpu
def test_members_that_move_together_on_a_gpu_are_those_of_the_cpu():
    assert_it_steps_as_a_cpu("cuda")


@pytest.mark.gpu
def test_compiled_on_a_gpu_they_are_one_cuda_graph():
    run_alone(COMPILED_ON_A_GPU)
