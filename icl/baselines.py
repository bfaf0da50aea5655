"""Predictors to hold a model against: Bayes under either prior, least squares, and the simple ones.

Each takes a batch of prompts and predicts every target: prediction k sees x_1, y_1, ..., x_{k-1}, y_{k-1} and x_k,
never y_k or anything later. All but `ols` serve every prefix from one pass.

- `zero`, `task_mean`: no look at the prompt, y_k = 0 and y_k = (mean of the tasks) . x_k (Hoogland et al. 2024).
- `averaging`, `knn`, `ols`: those of Garg et al. 2022, as in their models.py; all predict 0 without examples.
- `ridge`: the Bayes predictor under w ~ N(0, I); `dmmse`: the one under w uniform on M tasks (Raventos et al. 2023,
  section 2). Their sigma^2 is our `noise_variance`.

They compute in float64 (`dmmse` also in float32) and answer in the dtype and on the device of the prompts; devices
other than the CPU and CUDA lack float64 and are served from the CPU. Arrays and lists serve as prompts and tasks, too. To add a baseline write a function of this
signature, enter it in `BASELINES` (the contract tests run over that table) and test it against an oracle of its own.
"""

import math
import sys
from collections.abc import Callable
from functools import partial, reduce
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from icl.arrays import real_tensor
from icl.validation import ConfigError, real, whole

_SLAB = {"cpu": 2**19, "cuda": 2**25}
"""Weights, one for each prompt and task, that `dmmse` holds at a time: on a CPU few enough for its cache, on a GPU so many
that its kernels are not waited for, in 1 GiB at most."""
_MIN_TASKS_AT_A_TIME = 64
_LOG_WEIGHT_ERROR = 1e-2
"""The rounding error of a log-weight from which on `dmmse` computes in float64."""

_Weigh = Callable[[Tensor], Tensor]


def zero(xs: Float[Tensor, "*S B K D"], ys: Float[Tensor, "*S B K"]) -> Float[Tensor, "*S B K"]:
    """Always 0, the mean over the Gaussian prior; its loss is D + sigma^2.

    Raises:
        ConfigError: If the prompts' shapes do not agree.
    """
    xs, ys = _prompts(xs, ys)
    return torch.zeros_like(ys)


def task_mean(
    xs: Float[Tensor, "*S B K D"], ys: Float[Tensor, "*S B K"], *, tasks: Float[Tensor, "M D"]
) -> Float[Tensor, "*S B K"]:
    """The mean of the tasks applied to x_k: Bayes under a uniform prior on them before any example.

    Raises:
        ConfigError: If the shapes do not agree or there are no tasks.
    """
    xs, ys = _prompts(xs, ys)
    tasks = _tasks(tasks, xs)
    return (_widen(xs) @ _widen(tasks).mean(0)).to(ys)


def averaging(xs: Float[Tensor, "*S B K D"], ys: Float[Tensor, "*S B K"]) -> Float[Tensor, "*S B K"]:
    """The mean of y_j x_j over the examples, applied to x_k: least squares for a covariance known to be I.

    Raises:
        ConfigError: If the prompts' shapes do not agree.
    """
    xs, ys = _prompts(xs, ys)
    inputs = _widen(xs)
    moments = (_widen(ys).unsqueeze(-1) * inputs).cumsum(-2)  # B K D
    before = F.pad(moments[..., :-1, :], (0, 0, 1, 0))  # B K D
    counts = torch.arange(xs.shape[-2], device=inputs.device).clamp(min=1)  # K
    return ((before * inputs).sum(-1) / counts).to(ys)


def knn(xs: Float[Tensor, "*S B K D"], ys: Float[Tensor, "*S B K"], *, k: int = 3) -> Float[Tensor, "*S B K"]:
    """The mean target of the `k` nearest examples, or of all while there are fewer; ties go to the earlier one.

    Raises:
        ConfigError: If the prompts' shapes do not agree or `k` is below 1.
    """
    xs, ys = _prompts(xs, ys)
    k = whole("k", k, 1)
    inputs, targets = _widen(xs), _widen(ys)
    distances = torch.cdist(inputs, inputs, compute_mode="donot_use_mm_for_euclid_dist")  # B K K
    later = torch.ones_like(distances, dtype=torch.bool).triu()
    nearest = distances.masked_fill(later, math.inf).argsort(dim=-1, stable=True)[..., :k]  # B K k
    is_example = ~later.gather(-1, nearest)  # B K k
    neighbours = targets.unsqueeze(-2).expand_as(later).gather(-1, nearest)  # B K k
    return ((neighbours * is_example).sum(-1) / is_example.sum(-1).clamp(min=1)).to(ys)


def ols(xs: Float[Tensor, "*S B K D"], ys: Float[Tensor, "*S B K"]) -> Float[Tensor, "*S B K"]:
    """Least squares on the examples; of the many solutions with fewer than D of them, the one of least norm.

    Directions in which the inputs vary by no more than the rounding of their dtype count as absent, so inputs on a
    subspace get the least norm solution within it. Solved on the CPU: elsewhere torch wants full rank.

    Raises:
        ConfigError: If the prompts' shapes do not agree.
    """
    xs, ys = _prompts(xs, ys)
    num_examples, task_size = xs.shape[-2:]
    inputs, targets = xs.cpu().double(), ys.cpu().double().unsqueeze(-1)
    tolerance = torch.finfo(xs.dtype).eps * max(num_examples, task_size)
    predictions = torch.zeros_like(inputs[..., 0])  # B K
    for k in range(1, num_examples):
        fit = torch.linalg.lstsq(inputs[..., :k, :], targets[..., :k, :], rcond=tolerance, driver="gelsy")
        predictions[..., k] = (inputs[..., k, :] * fit.solution[..., 0]).sum(-1)
    return predictions.to(ys)


def ridge(
    xs: Float[Tensor, "*S B K D"], ys: Float[Tensor, "*S B K"], *, noise_variance: float
) -> Float[Tensor, "*S B K"]:
    """The posterior mean under w ~ N(0, I): ridge regression on the examples with lambda = sigma^2.

    The targets of a prompt are jointly Gaussian with covariance X X^T + lambda I = L L^T. With z = L^-1 y, the part of
    each target that was new given those before, the prediction of y_k is sum_{j<k} L_kj z_j: one factorisation gives
    every prefix. L^T is the triangle of the QR decomposition of (X, sqrt(lambda) I)^T, so nothing is squared and the
    smallest lambda does no harm.

    Raises:
        ConfigError: If the prompts' shapes do not agree, or `noise_variance` is not positive; for zero noise use `ols`.
    """
    xs, ys = _prompts(xs, ys)
    noise_variance = real("noise_variance", noise_variance, "positive", repair="; for zero noise use `ols`")
    inputs, targets = _widen(xs), _widen(ys).unsqueeze(-1)
    noise = noise_variance**0.5 * torch.eye(xs.shape[-2], dtype=torch.float64, device=inputs.device)  # K K
    root = torch.cat((inputs, noise.expand(*inputs.shape[:-1], -1)), dim=-1)  # B K D+K
    triangle = torch.linalg.qr(root.mT, mode="r").R.mT  # B K K
    news = torch.linalg.solve_triangular(triangle, targets, upper=False)  # B K 1
    return (triangle.tril(-1) @ news).squeeze(-1).to(ys)


def dmmse(
    xs: Float[Tensor, "*S B K D"],
    ys: Float[Tensor, "*S B K"],
    *,
    tasks: Float[Tensor, "M D"],
    noise_variance: float,
) -> Float[Tensor, "*S B K"]:
    """The posterior mean under w uniform on `tasks`, the discrete minimum mean squared error predictor.

    Task m has weight exp(-S_m / (2 sigma^2)), S_m its sum of squared errors on the examples, which grows by one term
    per example. Tasks pass in chunks whose sums merge as in a streaming softmax, so memory does not grow with M.
    Zero noise is the limit: the mean over the tasks with the least S_m. Computes in float32 where that cannot change
    a weight by more than about 1 %, in float64 for float64 prompts and for small noise.

    Raises:
        ConfigError: If the shapes do not agree, there are no tasks, or `noise_variance` is negative.
    """
    xs, ys = _prompts(xs, ys)
    tasks = _tasks(tasks, xs)
    noise_variance = real("noise_variance", noise_variance, "zero or positive")
    dtype = _dmmse_dtype(xs, ys, tasks, noise_variance)
    inputs = xs.to(_home(xs), dtype).flatten(0, -3)  # B K D
    targets = ys.to(_home(xs), dtype).flatten(0, -2)  # B K
    is_limit = noise_variance < sys.float_info.min  # its inverse would overflow
    weigh = _indicator if is_limit else partial(_boltzmann, noise_variance=noise_variance)
    at_once = max(_MIN_TASKS_AT_A_TIME, _SLAB[inputs.device.type] // max(1, len(inputs)))
    chunks = tasks.to(dtype).split(at_once)
    sums = reduce(partial(_merge, weigh=weigh), (_sums(inputs, targets, chunk, weigh) for chunk in chunks))
    return (sums.output / sums.weight).view_as(ys).to(ys)


BASELINES: dict[str, Callable[..., Tensor]] = {
    "zero": zero,
    "task_mean": task_mean,
    "averaging": averaging,
    "knn": knn,
    "ols": ols,
    "ridge": ridge,
    "dmmse": dmmse,
}
"""Every baseline by name; the keyword-only arguments of its signature are what it needs."""


class _Sums(NamedTuple):
    """Sums over some tasks at every prefix, with weights relative to the best of these tasks; each is (B, K)."""

    least: Tensor  # its sum of squared errors
    weight: Tensor  # sum of the weights
    output: Tensor  # weighted sum of w . x_k


def _sums(xs: Float[Tensor, "B K D"], ys: Float[Tensor, "B K"], tasks: Float[Tensor, "M D"], weigh: _Weigh) -> _Sums:
    """The sums over these tasks: at each k weigh them by what came before, then let y_k count."""
    squares = xs.new_zeros(len(xs), len(tasks))  # B M
    prefixes = []
    for k in range(xs.shape[1]):
        outputs = xs[:, k] @ tasks.T  # B M
        least = squares.amin(-1, keepdim=True)  # B 1
        weights = weigh(squares - least)  # B M
        prefixes.append(torch.stack((least[:, 0], weights.sum(-1), torch.linalg.vecdot(weights, outputs))))  # 3 B
        residuals = outputs.sub_(ys[:, k, None])  # B M
        squares.addcmul_(residuals, residuals)
    return _Sums(*torch.stack(prefixes, dim=-1).double())


def _merge(first: _Sums, second: _Sums, *, weigh: _Weigh) -> _Sums:
    """The sums over the tasks of both."""
    least = torch.minimum(first.least, second.least)
    scales = weigh(first.least - least), weigh(second.least - least)
    return _Sums(
        least,
        scales[0] * first.weight + scales[1] * second.weight,
        scales[0] * first.output + scales[1] * second.output,
    )


def _boltzmann(excess: Tensor, *, noise_variance: float) -> Tensor:
    """exp(-excess / (2 sigma^2)) in place, held above 2^-100: exp, and any underflow, is ten times slower on CPUs."""
    return excess.mul_(-0.5 / math.log(2) / noise_variance).clamp_(min=-100).exp2_()


def _indicator(excess: Tensor) -> Tensor:
    """The limit of `_boltzmann` for zero noise."""
    return (excess == 0).to(excess.dtype)


def _dmmse_dtype(xs: Tensor, ys: Tensor, tasks: Tensor, noise_variance: float) -> torch.dtype:
    """float32 unless rounding, eps times the squares that make up S_m / (2 sigma^2), would show in the weights."""
    if xs.dtype == torch.float64 or torch.get_float32_matmul_precision() != "highest":
        return torch.float64
    task_square = tasks.float().square().sum(-1).mean()
    squares = (ys.float().square() + xs.float().square().sum(-1) * task_square.to(xs.device)).sum(-1)  # B
    error = torch.finfo(torch.float32).eps * squares.amax().item() / 2
    return torch.float32 if error < _LOG_WEIGHT_ERROR * noise_variance else torch.float64


def _home(tensor: Tensor) -> torch.device:
    """The tensor's device if float64 exists there, else the CPU."""
    return tensor.device if tensor.device.type in ("cpu", "cuda") else torch.device("cpu")


def _widen(tensor: Tensor) -> Tensor:
    return tensor.to(_home(tensor), torch.float64)


def _prompts(xs: Any, ys: Any) -> tuple[Tensor, Tensor]:
    """Return inputs and targets as tensors of floats on one device, or refuse them."""
    xs = real_tensor(xs, "xs")
    ys = real_tensor(ys, "ys", device=xs.device)
    if xs.ndim < 3 or ys.shape != xs.shape[:-1]:
        raise ConfigError(
            f"Expected xs (..., B, K, D) and ys (..., B, K), got {tuple(xs.shape)} and {tuple(ys.shape)}."
        )
    if xs.shape[-2] == 0 or xs.shape[-1] == 0:
        raise ConfigError(f"Expected prompts of K >= 1 examples of D >= 1 inputs, got xs of shape {tuple(xs.shape)}.")
    return xs, ys


def _tasks(tasks: Any, xs: Tensor) -> Tensor:
    """Return the tasks as a tensor of floats beside the prompts, or refuse them."""
    tasks = real_tensor(tasks, "tasks", device=_home(xs))
    if tasks.ndim != 2 or len(tasks) == 0 or tasks.shape[1] != xs.shape[-1]:
        raise ConfigError(
            f"`tasks` must be (M, D), at least one task of the inputs' size D = {xs.shape[-1]}, got {tuple(tasks.shape)}."
        )
    return tasks
