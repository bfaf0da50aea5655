"""Evidence (marginal likelihood) of prompts under the Gaussian prior and the prior on M tasks, and the NLL of both Bayes predictors.

Given the inputs, the targets y_1, ..., y_k of a prompt have a log density, which we call the evidence:

- `gaussian_evidence` is the evidence under w ~ N(0, I): log N(y; 0, X X^T + sigma^2 I).
- `discrete_evidence` is the evidence under w uniform on M tasks: log (1/M) sum_m N(y; X w_m, sigma^2 I), an exact log-sum-exp. The noise
  may also have one of the other distributions in `icl.tasks.laws`.

The chain rule gives the predictive density of each target: log p(y_k | earlier examples, x_k) is the evidence of the first k targets minus
the evidence of the first k - 1. The negative of this log density is the negative log-likelihood (NLL), in nats per target:

- `ridge_nll` is the NLL under the Gaussian N(ridge's prediction, x_k^T (X^T X / sigma^2 + I)^-1 x_k + sigma^2), with X the earlier inputs.
- `dmmse_nll` is the NLL under a mixture of M Gaussians N(w_m . x_k, sigma^2) with the posterior weights of the tasks.

If prompts come from the prior that a Bayes predictor assumes, no other predictor has a smaller expected NLL. So the NLL of this Bayes
predictor is a lower bound for models whose `model.output` is `gaussian` or `mixture`. The lower bounds for other task priors are in
`icl.bayes`. Everything is computed in float64.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from icl.baselines import covariance_root
from icl.config.validation import real
from icl.tasks.laws import GAUSSIAN, Law, log_peak, squared_error_equivalent

_TASKS_AT_ONCE = 2**21
"""Largest number of (prompt, task) pairs that are processed at once. Each array of this size needs 16 MiB."""
_LOG_2_PI = math.log(2 * math.pi)


def ridge_nll(xs: Float[Tensor, "B K D"], ys: Float[Tensor, "B K"], *, noise_variance: float) -> Float[Tensor, "B K"]:
    """Return -log p(y_k | earlier examples, x_k) under w ~ N(0, I), in nats.

    Raises:
        ConfigError: If `noise_variance` is not positive.
    """
    return -_increments(gaussian_evidence(xs, ys, noise_variance=noise_variance)).to(ys)


def dmmse_nll(
    xs: Float[Tensor, "B K D"],
    ys: Float[Tensor, "B K"],
    *,
    tasks: Float[Tensor, "M D"],
    noise_variance: float,
    noise: Law = GAUSSIAN,
) -> Float[Tensor, "B K"]:
    """Return -log p(y_k | earlier examples, x_k) under w uniform on `tasks`, in nats.

    Raises:
        ConfigError: If `noise_variance` is not positive.
    """
    return -_increments(discrete_evidence(xs, ys, tasks=tasks, noise_variance=noise_variance, noise=noise)).to(ys)


def gaussian_evidence(
    xs: Float[Tensor, "B K D"], ys: Float[Tensor, "B K"], *, noise_variance: float
) -> Float[Tensor, "B K"]:
    """Return the log density of the first k targets under w ~ N(0, I), for every k.

    The covariance is X X^T + sigma^2 I = L L^T, with L lower triangular. With z = L^-1 y, the log density is
    -sum_{j<=k} (z_j^2 / 2 + log |L_jj| + log(2 pi) / 2).

    Raises:
        ConfigError: If `noise_variance` is not positive.
    """
    noise_variance = _noise(noise_variance)
    inputs, targets = _widen(xs, ys)
    root = covariance_root(inputs, noise_variance)  # B K K
    whitened = torch.linalg.solve_triangular(root, targets.unsqueeze(-1), upper=False).squeeze(-1)  # B K
    scales = root.diagonal(dim1=-2, dim2=-1).abs()
    return -(whitened.square() / 2 + scales.log() + _LOG_2_PI / 2).cumsum(-1)


def discrete_evidence(
    xs: Float[Tensor, "B K D"],
    ys: Float[Tensor, "B K"],
    *,
    tasks: Float[Tensor, "M D"],
    noise_variance: float,
    noise: Law = GAUSSIAN,
) -> Float[Tensor, "B K"]:
    """Return the log density of the first k targets under w uniform on `tasks`, for every k.

    Raises:
        ConfigError: If `noise_variance` is not positive.
    """
    noise_variance = _noise(noise_variance)
    inputs, targets = _widen(xs, ys)
    parts = []
    for chunk in tasks.to(inputs).split(max(1, _TASKS_AT_ONCE // max(1, len(inputs)))):
        squares, sums = inputs.new_zeros(len(inputs), len(chunk)), []
        for k in range(inputs.shape[1]):
            residuals = inputs[:, k] @ chunk.T - targets[:, k, None]  # B M
            squares = squares + squared_error_equivalent(noise, residuals, noise_variance)
            sums.append(torch.logsumexp(-squares / (2 * noise_variance), dim=-1))
        parts.append(torch.stack(sums, dim=-1))  # B K
    counts = torch.arange(1, inputs.shape[1] + 1, dtype=torch.float64, device=inputs.device)
    peaks = counts * log_peak(noise, noise_variance)
    return torch.logsumexp(torch.stack(parts), 0) - math.log(len(tasks)) + peaks


def _increments(evidence: Float[Tensor, "B K"]) -> Float[Tensor, "B K"]:
    return evidence - F.pad(evidence[:, :-1], (1, 0))


def _noise(noise_variance: float) -> float:
    return real("noise_variance", noise_variance, "positive", repair="; without noise there is no density")


def _widen(xs: Tensor, ys: Tensor) -> tuple[Tensor, Tensor]:
    """Return inputs and targets in float64. If their device has no float64, they are moved to the CPU."""
    device = xs.device if xs.device.type in ("cpu", "cuda") else torch.device("cpu")
    return xs.to(device, torch.float64), ys.to(device, torch.float64)
