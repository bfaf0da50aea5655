"""Predictions of a population of models for fixed prompts, in batches that fit into a CPU's caches.

`icl evaluate` predicts for every checkpoint on many sets of prompts, and nearly all of its time is the forward pass. For L2H4, a compiled
forward pass of one member takes about 0.6 times as long as an eager one on a CPU core. Compiled and eager predictions differ only by
rounding.

Whether to compile depends only on the sizes of the run and of the sets, and not on how much is already done. So an evaluation that was
interrupted continues with the same kind of forward pass.
"""

import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from icl.compute.calls import RELEASE_GIL, in_parallel, one_graph
from icl.config import ModelConfig
from icl.model.losses import batch_losses
from icl.model.stacked import Params, apply, size
from icl.tasks.prompts import Prompts
from icl.tasks.rows import TokenRows

Predict: TypeAlias = Callable[[Params, Tensor, Tensor], Tensor]
"""Function of stacked parameters, xs and ys that returns numbers (N, B, K). For regression these are predictions, such
as those of `partial(stacked.apply, model)`. For language models they are the losses of the predicted tokens."""
PROMPTS_ON_CPU = 256
"""Size of a full batch: the number of prompts for which the activations of one member fit into a CPU's caches."""
_PROMPTS_ON_GPU = 2**14  # number of prompts of all members together
_COMPILING_PAYS = 3e12
"""Compile only above this many floating-point operations. In eager mode, this many operations take a minute on two CPU cores. Compiling
takes about ten seconds."""


def predictor(model: ModelConfig) -> Predict:
    """Return the function that evaluations apply to a model's parameters.

    This function returns predictions, or for a language model the losses.
    """
    return partial(batch_losses if model.is_language else apply, model)


def predict_prompts(predict: Predict, params: Params, prompts: Prompts | TokenRows) -> Float[Tensor, "N B K"]:
    """Predict in batches, for prompts (B, K, D) that all members share, or (N, B, K, D) that differ between members.

    On a CPU a batch has one member and runs on one core, because the activations of all members would overflow the
    CPU's caches. So a member's numbers do not depend on the other members or on the number of cores.
    """
    num_members = size(params) if params else 1
    if prompts.xs.device.type != "cpu":
        batch_size = max(32, _PROMPTS_ON_GPU // num_members)
        with torch.no_grad():
            return torch.cat([_predict(predict, params, *batch) for batch in _batches(prompts, batch_size)], dim=1)
    calls = [
        (predict, {name: tensor[i : i + 1] for name, tensor in params.items()}, *batch)
        for i in range(num_members)
        for batch in _batches(prompts if prompts.ys.ndim == 2 else _select(prompts, i), PROMPTS_ON_CPU)
    ]
    results = _predict_in_parallel(calls)
    num_batches = len(results) // num_members
    starts = range(0, len(results), num_batches)
    return torch.cat([torch.cat(results[start : start + num_batches], dim=1) for start in starts])


def compiling_pays(*, num_params: int, num_tokens: int, num_checkpoints: int) -> bool:
    """Return whether evaluating a run is so much work that compiling saves time.

    Args:
        num_params: Number of parameters of one checkpoint.
        num_tokens: Number of tokens for which each checkpoint predicts: 2 K times the number of prompts in all sets.
        num_checkpoints: Number of checkpoints of the run, including those that are already evaluated.
    """
    # Each weight takes 2 operations per token in the forward pass.
    return 2.0 * num_params * num_tokens * num_checkpoints >= _COMPILING_PAYS


def compiled_apply(model: ModelConfig) -> Predict:
    """Return `icl.model.stacked.apply` for this model, compiled for one member and a full batch of prompts on a CPU.

    Other inputs, such as a last batch that is not full, are computed in eager mode, because every new shape would have to be compiled.
    """
    eager = partial(apply, model)
    graph = one_graph(_named(eager), work="Evaluation", options=RELEASE_GIL)
    first_call = threading.Lock()
    is_compiled = False

    def predict(params: Params, xs: Tensor, ys: Tensor) -> Tensor:
        nonlocal is_compiled
        if xs.device.type != "cpu" or xs.shape[-3] != PROMPTS_ON_CPU:
            return eager(params, xs, ys)
        if is_compiled:
            return graph(params, xs, ys)
        with first_call:  # so that two threads do not compile the same graph
            predictions = graph(params, xs, ys)
            is_compiled = True
            return predictions

    return predict


def _named(function: Predict) -> Predict:
    """Wrap a partial function in a function that has a name, which the compiler needs."""

    def forward(params: Params, xs: Tensor, ys: Tensor) -> Tensor:
        return function(params, xs, ys)

    return forward


def _predict(predict: Predict, params: Params, xs: Tensor, ys: Tensor) -> Tensor:
    return predict(params, xs, ys).float()


_predict_in_parallel = in_parallel(_predict, threads_each=1)


def _select(prompts: Prompts | TokenRows, member: int) -> Prompts | TokenRows:
    return type(prompts)(*(part[member] for part in prompts))


def _batches(prompts: Prompts | TokenRows, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    row_axis = -2 if isinstance(prompts, TokenRows) else -3
    return zip(prompts.xs.split(size, dim=row_axis), prompts.ys.split(size, dim=-2), strict=True)
