"""The cases that are measured: our training step, evaluation, dMMSE, LLC chains, and the whole training program.

Our training step is compared with three alternatives: a plain training loop, training the members of a population one at a time, and
the matrix products of the step alone.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from benchmarks.application import measure_application
from benchmarks.modules import devinterp_module_chains, modules, our_module_chains
from benchmarks.peers import dmmse_by_prefix, matrix_products, plain_loop
from benchmarks.sampling import devinterp_chains, has_devinterp, our_chains
from benchmarks.turns import Side, Turn, take_turns
from icl.baselines import dmmse
from icl.build import build_evaluation_sets, build_model
from icl.compute.step import adam_state, make_step, most_parts
from icl.evaluation.scores import evaluate, evaluate_predictions
from icl.evaluation.sets import evaluation_set
from icl.model.flat import layout_of
from icl.model.stacked import apply, stack
from icl.presets import preset
from icl.runs.checkpoints import checkpoint_files, load_checkpoint_file, save_checkpoint
from icl.runs.folder import RunFolder
from icl.tasks.priors import task_pool
from icl.training.data import PromptStream
from icl.whole_runs import RunEvaluator

CONFIG = preset("L2H4")
NUM_CHECKPOINTS = 190
"""Number of checkpoints of a whole run, as in Hoogland et al. 2024."""


class Case(NamedTuple):
    """One ratio: the other program's time divided by our time, for the same work."""

    name: str
    turns: Callable[[float], list[Turn]]
    """Function that times both programs in turns for a given number of seconds."""
    target: str = ""


def make_cases(device: str) -> Iterator[Case]:
    """Yield all cases for a device. Each case is made only when it is measured, so that it does not use memory during the others."""
    many = 32 if device == "cuda" else 8
    plain, one = Side(plain_loop(CONFIG, device)), training_step(1, device, compiled=True)
    half, packed = (training_step(num, device, compiled=True) for num in (many // 2, many))
    targets = ("5", "", "15") if device == "cuda" else ("2.6", "2.6", "")

    def against(peer: Side, ours: Side, work: int = 1) -> Callable[[float], list[Turn]]:
        return partial(take_turns, peer, ours, device, work=work)

    eager = training_step(1, device)
    yield Case("plain loop / one member, eager", against(plain, eager), "1")
    yield Case("plain loop / one member, compiled", against(plain, one), targets[0])
    yield Case(f"plain loop / {many} members, compiled", against(plain, packed, many), targets[1])
    yield Case(f"one at a time / {many} members, compiled", against(one, packed, many), targets[2])
    if device == "cuda":  # on a CPU, members without compilation are computed one after the other
        yield Case(
            f"one at a time / {many} members, eager", against(eager, training_step(many, device), many), targets[2]
        )
    yield Case(f"{many // 2} members / {many}, compiled", against(half, packed, 2), "1")
    yield Case("matrix products alone / one member, compiled", against(Side(matrix_products(CONFIG, device)), one))
    yield Case("loop over checkpoints / 16 at once, evaluation", against(*evaluation_sides(16, device)))
    yield Case(f"loop over checkpoints / icl evaluate, {NUM_CHECKPOINTS}", partial(take_evaluation_turns, device), "4")
    yield Case("loop over prefixes / dMMSE, M = 2^14", against(*dmmse_sides(device)), "5")
    yield from sampling_cases(device)
    if device == "cpu" and has_devinterp():
        for name, (module, inputs) in modules().items():
            theirs, ours = devinterp_module_chains(module, inputs), our_module_chains(module, inputs)
            yield Case(f"devinterp / 4 chains, {name}", against(Side(theirs, calls=1), Side(ours, calls=1)), "1")
    yield Case("bare loop / the application, one member", partial(measure_application, CONFIG, device, one.call), "0.9")


def sampling_cases(device: str) -> list[Case]:
    """Return the case that compares 8 LLC chains with devinterp, or no case if devinterp is not installed.

    On a GPU, `icl` runs the chains of 16 checkpoints at once.
    """
    if not has_devinterp():
        return []
    num = 16 if device == "cuda" else 1
    what, target = ("8 chains", "2") if num == 1 else (f"8 chains x {num} checkpoints", "20")
    theirs, ours = devinterp_chains(CONFIG, device), our_chains(CONFIG, device, num_checkpoints=num)
    turns = partial(take_turns, Side(theirs, calls=1), Side(ours, calls=1), device, work=num)
    return [Case(f"devinterp / {what}, compiled", turns, target)]


def training_step(num_members: int, device: str, *, compiled: bool = False) -> Side:
    """Return one side of a comparison, which makes one training step of a population at each call. A turn uses one block of training prompts."""
    members = stack([dict(build_model(CONFIG).named_parameters()) for _ in range(num_members)])
    params = {name: tensor.to(device) for name, tensor in members.items()}
    num_parts = most_parts(CONFIG.trainer.batch_size, torch.get_num_threads())  # as `icl train` does
    settings: dict[str, Any] = {"compiled": compiled, "packed": num_members > 1, "num_parts": num_parts}
    step, state = make_step(CONFIG.model, CONFIG.optim, layout_of(params), **settings), adam_state(params)
    rates = torch.full((num_members,), 1e-3, device=device)
    stream = PromptStream([CONFIG] * num_members, lambda: 0, device=device)
    prompts = iter(stream)

    def call() -> None:
        xs, ys, _ = next(prompts)
        step(state, xs, ys, rates)

    return Side(call, stream.block)


def evaluation_sides(num_checkpoints: int, device: str) -> tuple[Side, Side]:
    """Return two sides that evaluate some checkpoints on training tasks and on new tasks: in a plain loop, and all at once."""
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


def take_evaluation_turns(device: str, seconds: float) -> list[Turn]:
    """Time the evaluation of all checkpoint files of a run on training tasks and on new tasks: in a plain loop, and by `icl evaluate`.

    In every turn, both sides read the files. They compute prompts and baselines only once, before the first turn that counts. Our side
    also compiles before that turn, and saves the metrics of each checkpoint in the run's folder, as the command does. The loop saves
    nothing.
    """
    with tempfile.TemporaryDirectory(prefix="icl-bench-") as name:
        run = RunFolder(Path(name))
        weights = {key: p.detach() for key, p in build_model(CONFIG).named_parameters()}
        for step in range(NUM_CHECKPOINTS):
            save_checkpoint(run.checkpoints, step, CONFIG, {key: (1 + 1e-3 * step) * p for key, p in weights.items()})
        files, model, number = checkpoint_files(run.path), build_model(CONFIG).to(device), CONFIG.evaluation.num_prompts
        sets = build_evaluation_sets(CONFIG, num_prompts=number, device=device)
        evaluator = RunEvaluator(shifts=(), compiled=True, bar=tqdm(disable=True))

        def loop() -> None:
            for file in files:
                model.load_state_dict(load_checkpoint_file(file).params)
                for one in sets:
                    with torch.no_grad():
                        predictions = model(one.prompts.xs, one.prompts.ys)
                    evaluate_predictions(one, predictions.unsqueeze(0))

        def ours() -> None:
            shutil.rmtree(run.results, ignore_errors=True)
            evaluator(run.path)

        return take_turns(Side(loop, calls=1), Side(ours, calls=1), device, seconds)


def dmmse_sides(device: str) -> tuple[Side, Side]:
    """Return two sides that compute dMMSE for all prefixes of 256 prompts (K = 16, D = 8, M = 2^14): a plain loop, and `dmmse`."""
    tasks = task_pool(2**14, 8, seed=0).to(device)
    generator = torch.Generator().manual_seed(0)
    xs = torch.randn(256, 16, 8, generator=generator).to(device)
    ys = (xs * tasks[:256, None]).sum(-1) + 0.5 * torch.randn(256, 16, generator=generator).to(device)
    return (
        Side(lambda: dmmse_by_prefix(xs, ys, tasks, 0.25), calls=1),
        Side(lambda: dmmse(xs, ys, tasks=tasks, noise_variance=0.25), calls=1),
    )
