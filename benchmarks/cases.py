"""What is measured: our step against the plain loop, one member at a time and its floor; evaluation; dMMSE; an LLC's chains."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.application import start_application
from benchmarks.peers import dmmse_by_prefix, matrix_products, plain_loop
from benchmarks.sampling import devinterp_chains, has_devinterp, our_chains
from icl import population
from icl.baselines import dmmse
from icl.build import build_model
from icl.evaluation import evaluate, evaluation_set
from icl.presets import preset
from icl.step import adam_state, make_step, shapes_of
from icl.tasks.priors import task_pool
from icl.tasks.prompts import prompt_source

CONFIG = preset("L2H4")
BLOCK = 8
"""Steps whose prompts are made at once, as in training; a turn has as many."""


class Case(NamedTuple):
    """One ratio: the peer's time over ours, for the same work."""

    name: str
    peer: Callable[[], object]
    ours: Callable[[], object]
    work: int = 1
    """How many of the peer's calls one of ours replaces."""
    calls: int = BLOCK
    """Calls of either side in one turn."""
    target: str = ""


def make_cases(device: str) -> Iterator[Case]:
    """All cases that this device has, each made when it is its turn.

    The application is last: its thread brings threads of its own into PyTorch, beside which every loop on a CPU is slower.
    """
    many = 32 if device == "cuda" else 8
    plain, one = plain_loop(CONFIG, device), training_step(1, device, compiled=True)
    half, packed = (training_step(num, device, compiled=True) for num in (many // 2, many))
    targets = ("5", "15") if device == "cuda" else ("1.5", "")
    yield Case("plain loop / one member, eager", plain, training_step(1, device), target="1")
    yield Case("plain loop / one member, compiled", plain, one, target=targets[0])
    yield Case(f"plain loop / {many} members, compiled", plain, packed, many, target="" if device == "cuda" else "1.5")
    yield Case(f"one at a time / {many} members, compiled", one, packed, many, target=targets[1])
    yield Case(f"{many // 2} members / {many}, compiled", half, packed, 2, target="1")
    yield Case("matrix products alone / one member, compiled", matrix_products(CONFIG, device), one)
    yield Case("checkpoints one by one / 16 at once, evaluation", *evaluation_sides(16, device), calls=1)
    yield Case("loop over prefixes / dMMSE, M = 2^14", *dmmse_sides(device), calls=1, target="5")
    yield from sampling_cases(device)
    application = start_application(CONFIG, device)

    def bare_steps() -> None:
        for _ in range(application.num_steps or 1):
            one()

    yield Case("bare loop / the application, one member", bare_steps, application, target="0.9")


def sampling_cases(device: str) -> list[Case]:
    """8 chains against devinterp's; on a GPU those of 16 checkpoints at once. None where there is no devinterp."""
    if not has_devinterp():
        return []
    num = 16 if device == "cuda" else 1
    what, target = ("8 chains", "2") if num == 1 else (f"8 chains x {num} checkpoints", "20")
    ours = our_chains(CONFIG, device, num_checkpoints=num)
    return [Case(f"devinterp / {what}, compiled", devinterp_chains(CONFIG, device), ours, num, calls=1, target=target)]


def training_step(num_members: int, device: str, *, compiled: bool = False) -> Callable[[], None]:
    """One step of a population at each call, prompts included."""
    members = population.stack([dict(build_model(CONFIG).named_parameters()) for _ in range(num_members)])
    params = {name: tensor.to(device) for name, tensor in members.items()}
    settings = {"compiled": compiled, "packed": num_members > 1}
    step, state = make_step(CONFIG.model, CONFIG.optim, shapes_of(params), **settings), adam_state(params)
    rates, source = torch.full((num_members,), 1e-3, device=device), prompt_source(CONFIG, stream="train")
    indices, steps = range(num_members * CONFIG.trainer.batch_size), count()
    block: list[Tensor] = []

    def call() -> None:
        number = next(steps)
        if number % BLOCK == 0:
            prompts = source.sample(range(number, number + BLOCK), indices, device=device)
            block[:] = [part.unflatten(1, (num_members, -1)) for part in (prompts.xs, prompts.ys)]
        xs, ys = block
        step(state, xs[number % BLOCK], ys[number % BLOCK], rates)

    return call


def evaluation_sides(num_checkpoints: int, device: str) -> tuple[Callable[[], object], Callable[[], object]]:
    """All numbers of some checkpoints on the training tasks and on new ones: a loop over checkpoints, and at once."""
    model, num_prompts = build_model(CONFIG), CONFIG.evaluation.num_prompts
    alone = population.stack([{name: p.detach().to(device) for name, p in model.named_parameters()}])
    together = {name: tensor.repeat(num_checkpoints, *[1] * (tensor.ndim - 1)) for name, tensor in alone.items()}
    predict = partial(population.apply, model)
    sets = [evaluation_set(CONFIG, name, num_prompts=num_prompts, device=device) for name in ("pretrain", "true")]
    return lambda: [evaluate(predict, alone, sets) for _ in range(num_checkpoints)], lambda: evaluate(
        predict, together, sets
    )


def dmmse_sides(device: str) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Every prefix of 256 prompts of K = 16 examples under 2^14 tasks of D = 8: the loop, and ours."""
    tasks = task_pool(2**14, 8, seed=0).to(device)
    generator = torch.Generator().manual_seed(0)
    xs = torch.randn(256, 16, 8, generator=generator).to(device)
    ys = (xs * tasks[:256, None]).sum(-1) + 0.5 * torch.randn(256, 16, generator=generator).to(device)
    return (
        lambda: dmmse_by_prefix(xs, ys, tasks, 0.25),
        lambda: dmmse(xs, ys, tasks=tasks, noise_variance=0.25),
    )
