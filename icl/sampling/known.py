"""Known learning coefficients, with which tests compare estimates.

Functions without the argument `nbeta` return the asymptotic coefficient lambda, the limit as nbeta goes to infinity. Some also return the
multiplicity m. Both appear in the free energy of n samples, n L0 + lambda log n - (m - 1) log log n + O(1) (Watanabe 2009).

At finite nbeta and with localization, the estimator has a different target (true value): nbeta E[L - L0] under the density exp(-nbeta L -
localization/2 |w|^2). Functions with the argument `nbeta` return this target. For quadratic losses, we compute this target in closed form,
including the effect of a finite step size. For other losses, we compute it by quadrature in up to three dimensions.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

_POINTS = {1: 4001, 2: 801, 3: 161}
"""Number of quadrature nodes on each axis, keyed by the number of dimensions."""
_REACH = 8.0  # nodes extend to this many standard deviations of the prior on each side
_STRETCH = 7.0  # nodes are sinh-spaced: cosh 7 (about 550) times denser at 0 than at the ends


class LearningCoefficient(NamedTuple):
    """Asymptotic learning coefficient lambda and its multiplicity m."""

    value: float
    multiplicity: int


def regular(rank: int) -> float:
    """Return lambda of a loss that is quadratic in `rank` directions and exactly flat in all others."""
    return rank / 2


def quadratic_llc(
    eigenvalues: Float[Tensor, " d"],
    *,
    nbeta: float,
    localization: float,
    lr: float = 0.0,
    gradient_variance: float | Float[Tensor, " d"] = 0.0,
    friction: float | None = None,
) -> float:
    """Return the exact mean of nbeta (L - L0) for L = sum_i h_i w_i^2 / 2, over infinitely long chains with step size `lr`.

    Let a_i = nbeta h_i + localization, and let v_i be the variance of the minibatch gradient in direction i. Then SGLD gives w_i the
    stationary variance (1 + lr nbeta^2 v_i / 4) / (a_i (1 - lr a_i / 4)), which is infinite if lr a_i >= 4. With `lr` = 0 this is the
    variance under the target density itself. If `friction` is given, the chains use the kernel `baoab`, whose variance is given in the
    docstring of `icl.sampling.kernels`.
    """
    a = nbeta * eigenvalues + localization
    if bool((lr * a >= 4).any()):
        return math.inf
    noise, stability = lr * nbeta**2 * torch.as_tensor(gradient_variance) / 4, 1 - lr * a / 4
    if friction is None:
        factor = (1 + noise) / stability
    else:
        factor = 1 + noise * (1 + friction) / (1 - friction) / stability
    return float((nbeta * eigenvalues / 2 * factor / a).sum())


def normal_crossing(powers: Sequence[int], prior_powers: Sequence[int] | None = None) -> LearningCoefficient:
    """Return lambda and m of L = prod_i w_i^(2 k_i), under a prior proportional to prod_i |w_i|^(h_i) (Watanabe 2009, section 6.1).

    Args:
        powers: The k_i. An axis with k_i = 0 is flat.
        prior_powers: The h_i. By default all are zero.

    Raises:
        ValueError: If no k_i is positive.
    """
    h = [0] * len(powers) if prior_powers is None else list(prior_powers)
    ratios = [(hi + 1) / (2 * k) for k, hi in zip(powers, h, strict=True) if k]
    if not ratios:
        raise ValueError("A normal crossing needs at least one positive power, got none in `powers`.")
    return LearningCoefficient(min(ratios), sum(math.isclose(ratio, min(ratios)) for ratio in ratios))


def separable(powers: Sequence[int]) -> float:
    """Return lambda of L = sum_i w_i^(2 k_i): each direction adds 1/(2 k_i), and a flat one (k_i = 0) adds nothing."""
    return sum(1 / (2 * k) for k in powers if k)


def reduced_rank(inputs: int, hidden: int, outputs: int, rank: int) -> float:
    """Return lambda of reduced-rank regression for a true map of rank `rank`.

    The model is the product of two matrices, one of shape (outputs, hidden) and one of shape (hidden, inputs).

    Source: Aoyagi and Watanabe (2005), main theorem.

    Raises:
        ValueError: If no product of matrices with these shapes has rank `rank`.
    """
    m, h, n, r = inputs, hidden, outputs, rank
    if not 0 <= r <= min(m, h, n):
        raise ValueError(f"The rank must be from 0 to {min(m, h, n)}, got {r}.")
    if m + h < n + r:
        return (h * m - h * r + n * r) / 2
    if n + h < m + r:
        return (h * n - h * r + m * r) / 2
    if m + n < h + r:
        return m * n / 2
    odd = (m + h + n + r) % 2
    return (2 * (h + r) * (m + n) - (m - n) ** 2 - (h + r) ** 2 + odd) / 8


def localized_reduced_rank_llc(inputs: int, hidden: int, outputs: int, *, nbeta: float, localization: float) -> float:
    """Return the mean of nbeta L under the localised density, for L = |B A|^2 / 2 (a true map of rank 0) with up to three hidden units.

    Given B, the density is Gaussian in A, so we integrate A out (our derivation). The result depends only on the
    eigenvalues x_i of B^T B. Under a Gaussian prior, B^T B is a Wishart matrix, whose eigenvalues have a known density (Muirhead 1982,
    theorem 3.2.18). Given these eigenvalues,

        nbeta E[L | x] = (inputs / 2) sum_i nbeta x_i / (nbeta x_i + localization).

    Raises:
        ValueError: If there are more than three hidden units, or more hidden units than outputs, or no localization.
    """
    if hidden not in _POINTS or hidden > outputs or localization <= 0:
        raise ValueError(
            f"Expected one to three hidden units, at most {outputs} (the number of outputs), and a positive localization, got "
            f"{hidden} and {localization}."
        )
    lowest = math.log(localization / max(nbeta, 1.0)) - 30 / (
        outputs - hidden + 1
    )  # the probability below `lowest` is about e^-15
    log_x = torch.linspace(lowest, math.log(80 / localization), _POINTS[hidden], dtype=torch.float64)
    x = _grid(log_x, hidden).exp()  # P H
    log_density = (outputs - hidden + 1) / 2 * x.log() - localization / 2 * x  # includes one power of x from d(log x)
    log_density = (log_density - inputs / 2 * (nbeta * x + localization).log()).sum(1)
    first, second = torch.triu_indices(hidden, hidden, 1)
    repulsion = (x[:, first] - x[:, second]).abs().prod(1)
    density = (log_density - log_density.max()).exp() * repulsion
    values = inputs / 2 * (nbeta * x / (nbeta * x + localization)).sum(1)
    return float((density * values).sum() / density.sum())


def deep_linear(widths: Sequence[int], rank: int) -> LearningCoefficient:
    """Return lambda and m of a deep linear network with layer widths H_0, ..., H_L and a true map of rank `rank` (Aoyagi 2024).

    Only the smallest excess widths H_i - rank appear in the formula.

    Raises:
        ValueError: If there are fewer than two layers, or no product of matrices with these widths has rank `rank`.
    """
    if len(widths) < 3 or not 0 <= rank <= min(widths):
        raise ValueError(f"Expected three or more widths and a rank from 0 to {min(widths)}, got {widths}, {rank}.")
    chosen = _counting_widths(sorted(width - rank for width in widths))
    layers, total = len(chosen) - 1, sum(chosen)
    a = total - (math.ceil(total / layers) - 1) * layers
    pairs = (total**2 - sum(width**2 for width in chosen)) / 2
    value = (
        (rank * (widths[0] + widths[-1]) - rank**2) / 2
        + (a * (layers - a) - (layers - 1) * total**2) / (4 * layers)
        + pairs / 2
    )
    return LearningCoefficient(value, a * (layers - a) + 1)


def _counting_widths(excess: list[int]) -> list[int]:
    """Return the excess widths that appear in the formula: the first ones of the sorted list `excess`."""
    for num in range(2, len(excess) + 1):
        chosen, others = excess[:num], excess[num:]
        total, layers = sum(chosen), num - 1
        if total >= layers * chosen[-1] and (not others or (chosen[-1] < others[0] and total < layers * others[0])):
            return chosen
    raise AssertionError(f"No prefix of the excess widths {excess} fits.")  # Aoyagi proves that one always fits


def localized_llc(
    loss: Callable[[Float[Tensor, "P d"]], Float[Tensor, " P"]],
    num_params: int,
    *,
    nbeta: float,
    localization: float,
) -> float:
    """Return the mean of nbeta L under the localised density, in one to three dimensions, for a loss with its minimum L = 0 at w = 0.

    The mean is computed by the trapezoidal rule, on nodes that are densest near zero on each axis.

    Raises:
        ValueError: If there are more than three dimensions, or no localization. Without localization, the density may not be normalisable.
    """
    if num_params not in _POINTS or localization <= 0:
        raise ValueError(
            f"Quadrature needs one to three dimensions and a positive localization, got {num_params} and {localization}."
        )
    u = torch.linspace(-_STRETCH, _STRETCH, _POINTS[num_params], dtype=torch.float64)
    nodes = _REACH / math.sqrt(localization) * u.sinh() / math.sinh(_STRETCH)
    w = _grid(nodes, num_params)  # P d
    spacing = _grid(u.cosh(), num_params).prod(1)  # P
    values = loss(w)
    density = spacing * (-nbeta * values - localization / 2 * w.square().sum(1)).exp()
    return nbeta * float((density * values).sum() / density.sum())


def _grid(nodes: Float[Tensor, " n"], num_dimensions: int) -> Float[Tensor, "P d"]:
    """Return the points of a grid that has these nodes on every axis."""
    return torch.stack(torch.meshgrid(*[nodes] * num_dimensions, indexing="ij"), dim=-1).flatten(0, -2)
