"""The function that predicts for the checkpoints of a run. It is compiled if there is enough work.

`icl evaluate` predicts for every checkpoint on many sets of prompts, and nearly all of its time is the forward pass. For L2H4, a compiled
forward pass of one member takes about 0.6 of the time of the eager one on a CPU core. Predictions differ by rounding.

The choice depends only on the sizes of the run and of the sets, and not on what is already done. So an evaluation that was
interrupted continues with the same function.
"""

import threading
from functools import partial

from torch import Tensor

from icl.compute.calls import RELEASE_GIL, one_graph
from icl.config import ModelConfig
from icl.evaluation.sets import PROMPTS_ON_CPU, Predict
from icl.model.stacked import Params, apply

_COMPILING_PAYS = 3e12
"""Compile only above this many floating-point operations. Two CPU cores need a minute for them in eager mode, and compiling takes
about ten seconds."""


def compiling_pays(*, num_params: int, num_tokens: int, num_checkpoints: int) -> bool:
    """Return whether evaluating a run is so much work that compiling saves time.

    Args:
        num_params: Number of parameters of one checkpoint.
        num_tokens: Number of tokens for which each checkpoint predicts: 2 K times the number of prompts in all sets.
        num_checkpoints: Number of checkpoints of the run, whether they are already evaluated or not.
    """
    # Each weight takes 2 operations per token in the forward pass.
    return 2.0 * num_params * num_tokens * num_checkpoints >= _COMPILING_PAYS


def compiled_apply(model: ModelConfig) -> Predict:
    """Return `icl.model.stacked.apply` for this model, compiled for one member and a full batch of prompts on a CPU.

    Other inputs, such as the rest of a set that is no full batch, are computed in eager mode: each new shape would be compiled again.
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
    """Return a function with a name of its own, because the compiler cannot name a partial function."""

    def forward(params: Params, xs: Tensor, ys: Tensor) -> Tensor:
        return function(params, xs, ys)

    return forward
