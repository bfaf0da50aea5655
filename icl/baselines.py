"""Baselines to compare a model with: the Bayes predictors ridge and dMMSE, least squares, and simpler predictors.

Each function takes a batch of prompts and predicts every target. Prediction k uses x_1, y_1, ..., x_{k-1}, y_{k-1} and x_k, never y_k or
anything later. All functions except `ols` and `lasso` compute the predictions for all k in one pass.

- `zero` predicts 0, and `task_mean` predicts (mean of the tasks) . x_k. Both ignore the examples (Hoogland et al. 2024).
- `averaging`, `knn` and `ols` follow the file models.py of Garg et al. (2022). Without examples, they predict 0.
- `lasso` is least squares with an l1 penalty (Garg et al. 2022, appendix). It is a suitable baseline for sparse tasks.
- `ridge` is the Bayes predictor under w ~ N(0, I), and `dmmse` is the Bayes predictor under w uniform on M tasks (Raventos et al. 2023,
  section 2). The sigma^2 of Raventos et al. is our `noise_variance`. The Bayes predictors of other priors are in `icl.bayes`.
- `smoothed_dmmse` is the Bayes predictor under a mixture of M Gaussians around the tasks (Raventos et al. 2023, section 3.1). It lies
  between `dmmse` and `ridge`. The parameter `task_variance` is tuned on new tasks (`tune_task_variance`).

Prompts and tasks may also be arrays or lists. Baselines compute in float64 (`dmmse` in float32 if this is precise enough), and return
predictions with the dtype and device of the prompts. Devices other than CPU and CUDA have no float64; for prompts on such a device,
baselines compute on the CPU.

To add a baseline, write a function of the same form, add it to the table `BASELINES`, and test it against an independent implementation.
The contract tests cover all entries of this table.
"""

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn import functional as F

from icl.arrays import real_tensor
from icl.compute.task_sums import mean_outputs, sums_dtype
from icl.config.validation import ConfigError, real, whole
from icl.tasks.laws import GAUSSIAN, Law, squared_error_equivalent


def zero(xs: Float[Tensor, "*S B K D"], ys: Float[Tensor, "*S B K"]) -> Float[Tensor, "*S B K"]:
    """Predict 0, the mean target under w ~ N(0, I). For tasks from this prior, the expected loss of this predictor is D + sigma^2.

    Raises:
        ConfigError: If the prompts' shapes do not agree.
    """
    xs, ys = _prompts(xs, ys)
    return torch.zeros_like(ys)


def task_mean(
    xs: Float[Tensor, "*S B K D"], ys: Float[Tensor, "*S B K"], *, tasks: Float[Tensor, "M D"]
) -> Float[Tensor, "*S B K"]:
    """Predict with the mean task. For the first target of a prompt, this is the Bayes predictor under a uniform prior on the tasks.

    Raises:
        ConfigError: If the shapes do not agree or there are no tasks.
    """
    xs, ys = _prompts(xs, ys)
    tasks = _tasks(tasks, xs)
    return (_widen(xs) @ _widen(tasks).mean(0)).to(ys)


def averaging(xs: Float[Tensor, "*S B K D"], ys: Float[Tensor, "*S B K"]) -> Float[Tensor, "*S B K"]:
    """Predict w . x_k, with w the mean of y_j x_j over the examples. This is least squares with the covariance of x set to I.

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
    """Predict the mean target of the `k` nearest examples, or of all examples if there are fewer.

    Of two equally near examples, the earlier one is preferred.

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
    """Predict by least squares on the examples. With fewer than D examples, use the solution with the smallest norm.

    Directions in which the inputs vary only by rounding errors are ignored. These are the directions whose singular value is less than
    min(max(K, D) eps, 0.01) times the largest singular value. So if the inputs lie in a subspace, the solution lies in the same subspace.
    The computation is always on the CPU, because PyTorch's solvers for other devices need full rank.

    Raises:
        ConfigError: If the prompts' shapes do not agree.
    """
    xs, ys = _prompts(xs, ys)
    num_examples, task_size = xs.shape[-2:]
    inputs, targets = xs.cpu().double(), ys.cpu().double().unsqueeze(-1)
    # Rounding to 16 bits changes singular values by less than 1 %, but max(K, D) eps can be 50 %.
    tolerance = min(torch.finfo(xs.dtype).eps * max(num_examples, task_size), 0.01)
    predictions = torch.zeros_like(inputs[..., 0])  # B K
    for k in range(1, num_examples):
        fit = torch.linalg.lstsq(inputs[..., :k, :], targets[..., :k, :], rcond=tolerance, driver="gelsy")
        predictions[..., k] = (inputs[..., k, :] * fit.solution[..., 0]).sum(-1)
    return predictions.to(ys)


def ridge(
    xs: Float[Tensor, "*S B K D"], ys: Float[Tensor, "*S B K"], *, noise_variance: float
) -> Float[Tensor, "*S B K"]:
    """Predict by the posterior mean under w ~ N(0, I): ridge regression on the examples with lambda = sigma^2.

    One factorisation gives the predictions for every prefix. The targets of a prompt are jointly Gaussian with covariance X X^T + lambda I
    = L L^T, where L is lower triangular. Let z = L^-1 y. Then L_kk z_k is the part of y_k that the targets before it do not explain, and
    the prediction of y_k is sum_{j<k} L_kj z_j. L^T is the upper triangle in the QR decomposition of (X, sqrt(lambda) I)^T. So X X^T is
    never formed, and the result is accurate even for a very small lambda.

    Raises:
        ConfigError: If the prompts' shapes do not agree, or `noise_variance` is not positive. For zero noise use `ols`.
    """
    xs, ys = _prompts(xs, ys)
    noise_variance = real("noise_variance", noise_variance, "positive", repair="; for zero noise use `ols`")
    inputs, targets = _widen(xs), _widen(ys).unsqueeze(-1)
    triangle = covariance_root(inputs, noise_variance)  # L: B K K
    unexplained = torch.linalg.solve_triangular(triangle, targets, upper=False)  # z: B K 1
    return (triangle.tril(-1) @ unexplained).squeeze(-1).to(ys)


def dmmse(
    xs: Float[Tensor, "*S B K D"],
    ys: Float[Tensor, "*S B K"],
    *,
    tasks: Float[Tensor, "M D"],
    noise_variance: float,
    noise: Law = GAUSSIAN,
) -> Float[Tensor, "*S B K"]:
    """Predict by the posterior mean under w uniform on `tasks`: the discrete minimum mean squared error (dMMSE) estimator.

    Task m has weight exp(-S_m / (2 sigma^2)), where S_m is its sum of squared errors on the examples. If the noise is not Gaussian, each
    squared error is replaced by -2 sigma^2 times the log density of the residual. Tasks are processed in chunks. The sums over chunks are
    merged as in a streaming softmax, so memory does not grow with M. For zero noise we take the limit, which is the mean over the tasks
    with the smallest S_m.

    The computation is in float32 if this changes no weight by more than about 1 %. For float64 prompts, for small noise, and for noise that
    is not Gaussian, the computation is in float64.

    Raises:
        ConfigError: If the shapes do not agree, there are no tasks, `noise_variance` is negative, or `noise_variance` is zero
            and the noise is not Gaussian.
    """
    xs, ys = _prompts(xs, ys)
    tasks = _tasks(tasks, xs)
    noise_variance = real("noise_variance", noise_variance, "zero or positive" if noise == GAUSSIAN else "positive")
    is_gaussian = noise == GAUSSIAN
    dtype = sums_dtype(xs, ys, tasks, noise_variance) if is_gaussian else torch.float64
    error = None if is_gaussian else partial(squared_error_equivalent, noise, noise_variance=noise_variance)
    inputs = xs.to(_computing_device(xs), dtype).flatten(0, -3)  # B K D
    targets = ys.to(_computing_device(xs), dtype).flatten(0, -2)  # B K
    outputs = mean_outputs(inputs, targets, tasks.to(dtype), noise_variance, error)  # B K
    return outputs.view_as(ys).to(ys)


def smoothed_dmmse(
    xs: Float[Tensor, "*S B K D"],
    ys: Float[Tensor, "*S B K"],
    *,
    tasks: Float[Tensor, "M D"],
    noise_variance: float,
    task_variance: float,
) -> Float[Tensor, "*S B K"]:
    """Predict by the posterior mean under w = w_m + N(0, tau^2 I), with w_m uniform on `tasks` and tau^2 = `task_variance`.

    Given m, the targets are Gaussian with mean X w_m and covariance tau^2 X X^T + sigma^2 I = L L^T. So the entries of L^-1 y are
    independent observations of the task w_m, with noise variance one, at the inputs L^-1 X. From these observations, dMMSE predicts each
    entry of L^-1 y. The prediction of y_k is L_kk times dMMSE's prediction of entry k, plus sum_{j<k} L_kj (L^-1 y)_j. For tau = 0 this is
    dMMSE. If w = 0 is the only task and tau = 1, this is ridge.

    Raises:
        ConfigError: If the shapes do not agree, there are no tasks, `noise_variance` is not positive, or `task_variance` is
            negative.
    """
    xs, ys = _prompts(xs, ys)
    tasks = _tasks(tasks, xs)
    noise_variance = real("noise_variance", noise_variance, "positive", repair="; for zero noise use `dmmse`")
    task_variance = real("task_variance", task_variance, "zero or positive")
    inputs, targets = _widen(xs), _widen(ys).unsqueeze(-1)
    triangle = covariance_root(task_variance**0.5 * inputs, noise_variance)  # L: B K K
    whitened = torch.linalg.solve_triangular(triangle, torch.cat((inputs, targets), dim=-1), upper=False)  # B K D+1
    # Whitened targets can be too large for `dmmse`, which accepts only numbers that float32 can represent. So we call `mean_outputs`.
    observations = whitened.flatten(0, -3)  # B K D+1
    outputs = mean_outputs(observations[..., :-1], observations[..., -1], _widen(tasks), 1.0).view_as(targets[..., 0])
    known = (triangle.tril(-1) @ whitened[..., -1:]).squeeze(-1)
    return (triangle.diagonal(dim1=-2, dim2=-1) * outputs + known).to(ys)


def tune_task_variance(
    xs: Float[Tensor, "*S B K D"],
    ys: Float[Tensor, "*S B K"],
    *,
    tasks: Float[Tensor, "M D"],
    noise_variance: float,
) -> float:
    """Return the `task_variance` with the smallest loss of `smoothed_dmmse` on these prompts, accurate to about 10 %.

    Pass prompts of new tasks. Do not use the same prompts again to compare predictors. The search covers variances from 1e-4 to 10. It
    takes the best of 11 values, and refines this value with Brent's method on the logarithm.
    """

    def loss(log_variance: float) -> float:
        predictions = smoothed_dmmse(
            xs, ys, tasks=tasks, noise_variance=noise_variance, task_variance=math.exp(log_variance)
        )
        return (predictions - real_tensor(ys, "ys").to(predictions)).double().square().mean().item()

    grid = [math.log(10) * (-4 + 0.5 * index) for index in range(11)]
    best = min(range(len(grid)), key=lambda index: loss(grid[index]))
    bounds = (grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)])
    return math.exp(minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 0.1}).x)


def lasso(xs: Float[Tensor, "*S B K D"], ys: Float[Tensor, "*S B K"], *, alpha: float) -> Float[Tensor, "*S B K"]:
    """Predict with the w that minimises |y - X w|^2 / (2 k) + alpha |w|_1 on the k examples. Without examples, predict 0.

    scikit-learn fits each prefix of each prompt separately on the CPU. One fit takes about 0.2 ms. A fit stops after 100,000 iterations
    even if it has not converged. Convergence is slow if the numbers in a prompt differ greatly in size.

    Raises:
        ConfigError: If the prompts' shapes do not agree, or `alpha` is not positive. For alpha = 0 use `ols`.
    """
    # Imported here, because importing scikit-learn takes half a second.
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import Lasso

    xs, ys = _prompts(xs, ys)
    alpha = real("alpha", alpha, "positive", repair="; for alpha = 0 use `ols`")
    inputs = xs.cpu().double().flatten(0, -3).numpy()  # B K D
    targets = ys.cpu().double().flatten(0, -2).numpy()  # B K
    predictions = np.zeros_like(targets)
    fit = Lasso(alpha=alpha, fit_intercept=False, max_iter=100_000, tol=1e-8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for prompt, (x, y) in enumerate(zip(inputs, targets, strict=True)):
            for k in range(1, len(y)):
                predictions[prompt, k] = fit.fit(x[:k], y[:k]).predict(x[k : k + 1])[0]
    return torch.from_numpy(predictions).view_as(ys).to(ys)


BASELINES: dict[str, Callable[..., Tensor]] = {
    "zero": zero,
    "task_mean": task_mean,
    "averaging": averaging,
    "knn": knn,
    "ols": ols,
    "ridge": ridge,
    "dmmse": dmmse,
    "smoothed_dmmse": smoothed_dmmse,
    "lasso": lasso,
}
"""All baselines, keyed by name. Everything that a baseline needs in addition to the prompts is a keyword-only argument."""


def covariance_root(inputs: Float[Tensor, "*S B K D"], noise_variance: float) -> Float[Tensor, "*S B K K"]:
    """Return the lower triangle L with L L^T = X X^T + sigma^2 I. The entries of its diagonal may have either sign."""
    noise = noise_variance**0.5 * torch.eye(inputs.shape[-2], dtype=torch.float64, device=inputs.device)  # K K
    root = torch.cat((inputs, noise.expand(*inputs.shape[:-1], -1)), dim=-1)  # B K D+K
    return torch.linalg.qr(root.mT, mode="r").R.mT


def _computing_device(tensor: Tensor) -> torch.device:
    """Return the device of a tensor if this device supports float64, otherwise the CPU."""
    return tensor.device if tensor.device.type in ("cpu", "cuda") else torch.device("cpu")


def _widen(tensor: Tensor) -> Tensor:
    return tensor.to(_computing_device(tensor), torch.float64)


def _prompts(xs: Any, ys: Any) -> tuple[Tensor, Tensor]:
    """Return inputs and targets as tensors of floats on one device. Refuse shapes that do not agree."""
    xs = _bounded(real_tensor(xs, "xs"), "xs")
    ys = _bounded(real_tensor(ys, "ys", device=xs.device), "ys")
    if xs.ndim < 3 or ys.shape != xs.shape[:-1]:
        raise ConfigError(
            f"`xs` must have shape (..., B, K, D) and `ys` (..., B, K), got {tuple(xs.shape)} and {tuple(ys.shape)}."
        )
    if xs.shape[-2] == 0 or xs.shape[-1] == 0:
        raise ConfigError(
            f"Prompts need at least one example and one input dimension, got xs of shape {tuple(xs.shape)}."
        )
    return xs, ys


def _tasks(tasks: Any, xs: Tensor) -> Tensor:
    """Return the tasks as a tensor of floats on the device of the computation. Refuse tasks of the wrong shape."""
    tasks = _bounded(real_tensor(tasks, "tasks", device=_computing_device(xs)), "tasks")
    if tasks.ndim != 2 or len(tasks) == 0 or tasks.shape[1] != xs.shape[-1]:
        raise ConfigError(
            f"`tasks` must have shape (M, D) with M >= 1 and D = {xs.shape[-1]}, the size of the inputs, got {tuple(tasks.shape)}."
        )
    return tasks


def _bounded(tensor: Tensor, name: str) -> Tensor:
    """Refuse a tensor with numbers too large for float32, because squares of their products may be infinite."""
    is_wide = tensor.dtype == torch.float64 and tensor.numel() > 0
    if is_wide and tensor.abs().amax().item() > torch.finfo(torch.float32).max:
        raise ConfigError(f"`{name}` has a number that is too large for float32. Rescale the prompts.")
    return tensor
