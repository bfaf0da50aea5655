"""What is measured: our step against the plain loop, one member at a time and its floor; evaluation; dMMSE; an LLC's chains."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch

from benchmarks.application import measure_application
from benchmarks.peers import dmmse_by_prefix, matrix_products, plain_loop
from benchmarks.sampling import devinterp_chains, has_devinterp, our_chains
from benchmarks.turns import Side, Turn, take_turns
from icl.baselines import dmmse
from icl.build import build_model
from icl.compute.step import adam_state, make_step
from icl.evaluation.sets import evaluate, evaluate_predictions, evaluation_set
from icl.model.flat import layout_of
from icl.model.stacked import apply, stack
from icl.presets import preset
from icl.tasks.priors import task_pool
from icl.training.data import PromptStream

CONFIG = preset("L2H4")


class Case(NamedTuple):
    """One ratio: the peer's time over ours, for the same work."""

    name: str
    turns: Callable[[float], list[Turn]]
    """Measures both sides for so many seconds."""
    target: str = ""


def make_cases(device: str) -> Iterator[Case]:
    """All cases that this device has, each made when it is its turn, so that what it alone needs weighs on no other."""
    many = 32 if device == "cuda" else 8
    plain, one = Side(plain_loop(CONFIG, device)), training_step(1, device, compiled=True)
    half, packed = (training_step(num, device, compiled=True) for num in (many // 2, many))
    targets = ("5", "", "15") if device == "cuda" else ("1.5", "1.5", "")

    def against(peer: Side, ours: Side, work: int = 1) -> Callable[[float], list[Turn]]:
        return partial(take_turns, peer, ours, device, work=work)

    eager = training_step(1, device)
    yield Case("plain loop / one member, eager", against(plain, eager), "1")
    yield Case("plain loop / one member, compiled", against(plain, one), targets[0])
    yield Case(f"plain loop / {many} members, compiled", against(plain, packed, many), targets[1])
    yield Case(f"one at a time / {many} members, compiled", against(one, packed, many), targets[2])
    if device == "cuda":  # on a CPU eager members take turns
        yield Case(
            f"one at a time / {many} members, eager", against(eager, training_step(many, device), many), targets[2]
        )
    yield Case(f"{many // 2} members / {many}, compiled", against(half, packed, 2), "1")
    yield Case("matrix products alone / one member, compiled", against(Side(matrix_products(CONFIG, device)), one))
    yield Case("loop over checkpoints / 16 at once, evaluation", against(*evaluation_sides(16, device)))
    yield Case("loop over prefixes / dMMSE, M = 2^14", against(*dmmse_sides(device)), "5")
    yield from sampling_cases(device)
    yield Case("bare loop / the application, one member", partial(measure_application, CONFIG, device, one.call), "0.9")


def sampling_cases(device: str) -> list[Case]:
    """8 chains against devinterp's; on a GPU those of 16 checkpoints at once. None where there is no devinterp."""
    if not has_devinterp():
        return []
    num = 16 if device == "cuda" else 1
    what, target = ("8 chains", "2") if num == 1 else (f"8 chains x {num} checkpoints", "20")
    theirs, ours = devinterp_chains(CONFIG, device), our_chains(CONFIG, device, num_checkpoints=num)
    turns = partial(take_turns, Side(theirs, calls=1), Side(ours, calls=1), device, work=num)
    return [Case(f"devinterp / {what}, compiled", turns, target)]


def training_step(num_members: int, device: str, *, compiled: bool = False) -> Side:
    """One step of a population at each call, on prompts made as in training; a turn is one block of them."""
    members = stack([dict(build_model(CONFIG).named_parameters()) for _ in range(num_members)])
    params = {name: tensor.to(device) for name, tensor in members.items()}
    settings = {"compiled": compiled, "packed": num_members > 1}
    step, state = make_step(CONFIG.model, CONFIG.optim, layout_of(params), **settings), adam_state(params)
    rates = torch.full((num_members,), 1e-3, device=device)
    stream = PromptStream([CONFIG] * num_members, lambda: 0, device=device)
    prompts = iter(stream)

    def call() -> None:
        xs, ys, _ = next(prompts)
        step(state, xs, ys, rates)

    return Side(call, stream.block)


def evaluation_sides(num_checkpoints: int, device: str) -> tuple[Side, Side]:
    """All numbers of some checkpoints on the training tasks and on new ones: a plain loop over checkpoints, and at once."""
    model, num_prompts = build_model(CONFIG).to(device), CONFIG.evaluation.num_prompts
    together = stack([{name: p.detach() for name, p in model.named_parameters()}] * num_checkpoints)
    predict = partial(apply, CONFIG.model)
    sets = [evaluation_set(CONFIG, name, num_prompts=num_prompts, device=device) for name in ("pretrain", "true")]

    def loop() -> None:
        for _ in range(num_checkpoints):
            for one in sets:
                with torch.no_grad():
                    predictions = model(one.prompts.xs, one.prompts.ys)
                evaluate_predictions(one, predictions.unsqueeze(0))

    return Side(loop, calls=1), Side(lambda: evaluate(predict, together, sets), calls=1)


def dmmse_sides(device: str) -> tuple[Side, Side]:
    """Every prefix of 256 prompts of K = 16 examples under 2^14 tasks of D = 8: the loop, and ours."""
    tasks = task_pool(2**14, 8, seed=0).to(device)
    generator = torch.Generator().manual_seed(0)
    xs = torch.randn(256, 16, 8, generator=generator).to(device)
    ys = (xs * tasks[:256, None]).sum(-1) + 0.5 * torch.randn(256, 16, generator=generator).to(device)
    return (
        Side(lambda: dmmse_by_prefix(xs, ys, tasks, 0.25), calls=1),
        Side(lambda: dmmse(xs, ys, tasks=tasks, noise_variance=0.25), calls=1),
    )
