"""Predictions averaged over many tasks with posterior weights, the core of dMMSE (`icl.baselines.dmmse`).

Task m has weight exp(-S_m / (2 sigma^2)), where S_m is its sum of squared errors on the examples and sigma^2 the noise variance. Tasks
are processed in chunks. The sums over chunks are merged as in a streaming softmax, so memory does not grow with the number of tasks.
"""

import math
import sys
from collections.abc import Callable
from functools import partial, reduce
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

_SLAB = {"cpu": 2**19, "cuda": 2**25}
"""Number of weights that are computed at once, for each kind of device. There is one weight per prompt and task.

On a CPU, this number of weights fits in the cache. On a GPU, it makes the cost of kernel launches small and takes at most 1 GiB.
"""
_MIN_TASKS_AT_A_TIME = 64
"""Minimum number of tasks in a chunk. Chunks have this size if there are many prompts."""
_LOG_WEIGHT_ERROR = 1e-2
"""Use float32 only if the rounding error of a log-weight is below this number."""

_MIN_NOISE_VARIANCE = 1e-30
"""Use float32 only if the noise variance is at least this number. For a smaller variance, squares underflow or the inverse of the variance
overflows in float32."""

_Weigh = Callable[[Tensor], Tensor]
"""Function that maps the excess sums of squared errors, S_m - min S_m, to the tasks' weights."""


def mean_outputs(
    xs: Float[Tensor, "B K D"],
    ys: Float[Tensor, "B K"],
    tasks: Float[Tensor, "M D"],
    noise_variance: float,
    error: Callable[[Tensor], Tensor] | None = None,
) -> Float[Tensor, "B K"]:
    """Return the weighted mean of w . x_k over the tasks w, at every prefix. For zero noise, return the limit as the noise goes to zero.

    `error` is a function of residuals that replaces the squared error, for noise that is not Gaussian.
    """
    is_limit = noise_variance < sys.float_info.min  # the inverse of a smaller variance would overflow
    weigh = _indicator if is_limit else partial(_boltzmann, noise_variance=noise_variance)
    at_once = max(_MIN_TASKS_AT_A_TIME, _SLAB[xs.device.type] // max(1, len(xs)))
    chunks = (_sums(xs, ys, chunk, weigh, error) for chunk in tasks.split(at_once))
    sums = reduce(partial(_merge, weigh=weigh), chunks)
    return sums.output / sums.weight


class _Sums(NamedTuple):
    """Sums over a chunk of tasks at every prefix, each of shape (B, K).

    The best task is the one with the smallest sum of squared errors. Weights are relative to the weight of the chunk's best task.
    """

    least: Tensor
    """Sum of squared errors of the best task."""
    weight: Tensor
    """Sum of the weights."""
    output: Tensor
    """Weighted sum of w . x_k over the tasks w."""


def _sums(
    xs: Float[Tensor, "B K D"],
    ys: Float[Tensor, "B K"],
    tasks: Float[Tensor, "M D"],
    weigh: _Weigh,
    error: Callable[[Tensor], Tensor] | None,
) -> _Sums:
    """Return the sums over these tasks.

    The weights at prefix k depend only on the examples before k. So we use the weights before we add the error of example k.
    """
    squares = xs.new_zeros(len(xs), len(tasks))  # B M
    prefixes = []
    for k in range(xs.shape[1]):
        outputs = xs[:, k] @ tasks.T  # B M
        least = squares.amin(-1, keepdim=True)  # B 1
        weights = weigh(squares - least)  # B M
        prefixes.append(torch.stack((least[:, 0], weights.sum(-1), torch.linalg.vecdot(weights, outputs))))  # 3 B
        # Subtract in place, because another tensor of this size would not fit in the cache.
        residuals = outputs.sub_(ys[:, k, None])  # B M
        if error is None:
            squares.addcmul_(residuals, residuals)
        else:
            squares.add_(error(residuals))
    return _Sums(*torch.stack(prefixes, dim=-1).double())


def _merge(first: _Sums, second: _Sums, *, weigh: _Weigh) -> _Sums:
    """Return the sums over the tasks of both chunks, with weights relative to the best of all these tasks."""
    least = torch.minimum(first.least, second.least)
    a, b = weigh(first.least - least), weigh(second.least - least)
    return _Sums(least, a * first.weight + b * second.weight, a * first.output + b * second.output)


def _boltzmann(excess: Tensor, *, noise_variance: float) -> Tensor:
    """Overwrite `excess` with exp(-excess / (2 sigma^2)), or with 0 if this is at most 2^-99, and return it.

    On CPUs `exp` is ten times slower than `exp2`, and arguments for which the result underflows are ten times slower too. So we
    use `exp2`, and clamp its argument.
    """
    weights = excess.mul_(-0.5 / math.log(2) / noise_variance).clamp_(min=-100).exp2_()
    return torch.threshold_(weights, 2.0**-99, 0.0)


def _indicator(excess: Tensor) -> Tensor:
    """Return the limit of `_boltzmann` for zero noise: 1 for the best tasks, 0 for all others."""
    return (excess == 0).to(excess.dtype)


def sums_dtype(xs: Tensor, ys: Tensor, tasks: Tensor, noise_variance: float) -> torch.dtype:
    """Return float32 if its rounding changes the weights by less than about 1 %, else float64.

    In float32, the rounding error of a task's log-weight, -S_m / (2 sigma^2), is about eps / (2 sigma^2) times the sum of y_k^2 +
    |x_k|^2 |w|^2 over the positions of a prompt, where eps is the machine epsilon. We use the mean of |w|^2 over the tasks, and the prompt
    with the largest sum. Return float64 in any case if `xs` is float64, if float32 cannot represent squares of the size of the noise variance, or if PyTorch may round the inputs
    of float32 products to fewer bits.
    """
    is_inexact = torch.get_float32_matmul_precision() != "highest"
    if xs.dtype == torch.float64 or noise_variance < _MIN_NOISE_VARIANCE or is_inexact:
        return torch.float64
    task_square = tasks.float().square().sum(-1).mean()
    squares = (ys.float().square() + xs.float().square().sum(-1) * task_square.to(xs.device)).sum(-1)  # B
    largest = squares.amax().item() if len(squares) else 0.0
    error = torch.finfo(torch.float32).eps * largest / 2
    return torch.float32 if error < _LOG_WEIGHT_ERROR * noise_variance else torch.float64
