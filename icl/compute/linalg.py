"""Eigenvalues, trace and spectral density of a symmetric matrix, from matrix-vector products alone.

The matrix A (P, P) is the mean of the matrices A_1, ..., A_J, one for each batch of data. The function `products` maps v to A_1 v, ...,
A_J v. Lanczos with full reorthogonalisation builds an orthonormal basis Q (m, P) of the Krylov space of a random start vector. All
results are computed from Q and the projections Q A_j Q' (m, m). The projections need no further matrix-vector products. Only the trace
needs one more product for each random probe vector. The results are:

- Eigenvalues: the eigenvalues of Q A Q' (Ritz values), which are most accurate at both ends of the spectrum. A Ritz value
  with residual r lies within r of an eigenvalue of A. If all other eigenvalues are farther away than a distance `gap`, this bound improves
  to r^2 / gap (Parlett 1998, "The symmetric eigenvalue problem", section 11.7). We compute the gap from the other Ritz values, so the
  stated error ignores eigenvalues that Lanczos has not found yet. Until the Krylov space is exhausted (until A maps it into itself), a
  multiple eigenvalue is found only once.
- Trace: tr(Q A Q') plus the mean of v' R A R v over probe vectors v of random signs, where R = I - Q'Q. This is Hutch++ with a Krylov space
  as its sketch (Meyer, Musco, Musco, Woodruff 2021, "Hutch++: optimal stochastic trace estimation", algorithm 1; Chen and Hallman 2023,
  "Krylov-aware stochastic trace estimation"). The estimate is unbiased. Only the part outside the Krylov space is random, and this part is
  small.
- Density: the Ritz values are nodes, and the squared first components of the Ritz vectors (in the basis Q) are their weights. This is
  stochastic Lanczos quadrature from one start vector (Ubaru, Chen, Saad 2017, "Fast estimation of tr(f(A)) via stochastic Lanczos
  quadrature"). The estimated share of the P eigenvalues in an interval has a standard error of about sqrt(2 share (1 - share) / P).

All tensors have a leading axis N for the members of a population, each with its own matrix.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from icl.metrics import Estimate

Products: TypeAlias = Callable[[Tensor], Tensor]
"""Function that maps vectors (N, P) to their products with each batch's matrix, (N, J, P)."""

_BREAKDOWN = 100
"""The Krylov space counts as exhausted if the residual is at most this number times the rounding error of the largest product A v so
far."""


class Krylov(NamedTuple):
    """An orthonormal basis of a Krylov space, and the matrices projected on it."""

    basis: Float[Tensor, "N m P"]
    projected: Float[Tensor, "N J m m"]
    """Q A_j Q' for every batch j, in float64 on the CPU."""
    remainder: Float[Tensor, " N"]
    """Norm of the residual of the last step: the part of A times the last basis vector that lies outside the space."""


class Ritz(NamedTuple):
    """Eigenvalues of the projected matrix, in ascending order."""

    values: Float[Tensor, "N m"]
    stderr: Float[Tensor, "N m"]
    """First-order standard error due to the random choice of the J batches; NaN if there is only one batch."""
    errors: Float[Tensor, "N m"]
    """Estimated upper bound on the distance to the nearest eigenvalue of A."""
    weights: Float[Tensor, "N m"]
    """Weight of each value as a node of the spectral density; the weights sum to 1."""


class Trace(NamedTuple):
    """The estimated trace and its standard errors."""

    whole: Estimate
    """Estimate of the trace. Its standard error includes the randomness of the probes and, if J > 1, of the batches."""
    probe_stderr: Float[Tensor, " N"]
    """Standard error due to the probes alone, for the trace of A with these J batches."""


def lanczos(products: Products, start: Float[Tensor, "N P"], num_steps: int) -> Krylov:
    """Build the Krylov space of A and a start vector, with min(`num_steps`, P) dimensions.

    If A maps the space into itself, the space is extended by a new direction outside it.

    Raises:
        ValueError: If the matrix has no rows, or `num_steps` is below 1.
    """
    if start.shape[-1] < 1 or num_steps < 1:
        raise ValueError(f"Lanczos needs at least one row and one step, got {start.shape[-1]} and {num_steps}.")
    count, size = start.shape
    num_steps = min(num_steps, size)
    basis = start.new_zeros(count, num_steps, size)
    columns = []
    scale = remainder = start.new_zeros(count)
    vector = start / start.norm(dim=-1, keepdim=True)
    for step in range(num_steps):
        basis[:, step] = vector
        built = basis[:, : step + 1]
        images = products(vector)  # N J P
        column = (images @ built.mT).cpu().double()  # N J step+1
        columns.append(torch.nn.functional.pad(column, (0, num_steps - step - 1)))
        image = images.mean(1)
        scale = torch.maximum(scale, image.norm(dim=-1))
        residual = _outside(image, built)
        remainder = residual.norm(dim=-1)
        is_exhausted = remainder <= _BREAKDOWN * torch.finfo(start.dtype).eps * scale
        remainder = remainder.masked_fill(is_exhausted, 0)
        if is_exhausted.any() and step + 1 < num_steps:
            # Rolling the random start gives a vector as good as a new random one.
            new_direction = _outside(start.roll(step + 1, dims=-1), built)
            residual = torch.where(is_exhausted.unsqueeze(-1), new_direction, residual)
        vector = residual / residual.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(start.dtype).tiny)
    # Row s contains the inner products of basis vectors 0 to s with A_j times basis vector s.
    lower = torch.stack(columns, dim=-2)  # N J m m
    return Krylov(basis, lower + lower.tril(-1).mT, remainder.cpu().double())


def ritz(krylov: Krylov) -> Ritz:
    """Return the eigenvalues of the mean projected matrix, with their errors and weights."""
    values, vectors = torch.linalg.eigh(krylov.projected.mean(1))  # N m, N m m
    by_batch = torch.einsum("nam,njab,nbm->njm", vectors, krylov.projected, vectors)
    residuals = krylov.remainder.unsqueeze(-1) * vectors[:, -1].abs()  # N m
    distances, infinity = values.diff(dim=-1), torch.full_like(values[:, :1], torch.inf)
    # Lower bounds on the distances to the next eigenvalues. A neighbouring Ritz value may be wrong by its residual, so we subtract the
    # residual.
    below = torch.cat((infinity, distances - residuals[:, :-1]), dim=-1)
    above = torch.cat((distances - residuals[:, 1:], infinity), dim=-1)
    gaps = torch.minimum(below, above).clamp(min=torch.finfo(torch.float64).tiny)
    errors = torch.minimum(residuals, residuals.square() / gaps)
    return Ritz(values, _spread(by_batch, dim=1), errors, vectors[:, 0].square())


def trace(products: Products, krylov: Krylov, probes: Iterable[Float[Tensor, "N P"]]) -> Trace:
    """Estimate the trace. The part within the Krylov space is exact, and the part outside is estimated with random signs.

    Args:
        products: Function that computes the products with A_1, ..., A_J.
        krylov: Krylov space of A, from a start vector that is independent of the probes.
        probes: At least two vectors of random signs.
    """
    inside = krylov.projected.diagonal(dim1=-2, dim2=-1).sum(-1)  # N J
    quadratic_forms = []
    for probe in probes:
        vector = _outside(probe, krylov.basis)
        quadratic_forms.append((products(vector) * vector.unsqueeze(1)).sum(-1).cpu().double())  # N J
    outside = torch.stack(quadratic_forms)  # R N J
    by_batch = inside + outside.mean(0)  # N J
    probe_stderr = _spread(outside.mean(-1), dim=0)
    batch_stderr = _spread(by_batch, dim=-1).nan_to_num(0.0)
    return Trace(Estimate(by_batch.mean(-1), (probe_stderr.square() + batch_stderr.square()).sqrt()), probe_stderr)


def _outside(vectors: Float[Tensor, "N P"], basis: Float[Tensor, "N m P"]) -> Float[Tensor, "N P"]:
    """Return the part of the vectors that is orthogonal to the basis."""
    for _ in range(2):  # project twice, because rounding errors of the first pass leave a part inside the space
        vectors = vectors - ((vectors.unsqueeze(1) @ basis.mT) @ basis).squeeze(1)
    return vectors


def _spread(values: Tensor, dim: int) -> Tensor:
    """Return the standard error of the mean along an axis; NaN for one value."""
    count = values.shape[dim]
    deviations = values - values.mean(dim, keepdim=True)
    return (deviations.square().sum(dim) / (count - 1) / count).sqrt() if count > 1 else deviations.sum(dim) * torch.nan
