"""Eigenvalues, trace and spectral density of a symmetric matrix from products with vectors alone.

The matrix is A = mean of A_1 .. A_J, one for each batch of data, and `products` gives A_1 v .. A_J v. Lanczos with full
reorthogonalisation makes an orthonormal basis Q (m, P) of the Krylov space of a random start; everything comes from
Q and the projections Q A_j Q' (m, m), which cost nothing more:

- eigenvalues: those of Q A Q' (Ritz values), best at both ends of the spectrum. One with residual r lies within r of an
  eigenvalue of A, and within r^2 / gap if no other is nearer than the gap (Parlett 1998, "The symmetric eigenvalue problem",
  section 11.7); the gap is taken from the other Ritz values, so the stated error misses an eigenvalue that Q has not
  seen yet. Exactly multiple eigenvalues are found once, until the Krylov space is exhausted.
- trace: tr(Q A Q') + mean over probes v of v' P A P v with P = I - Q'Q and random signs v: Hutch++ with a Krylov space as
  sketch (Meyer, Musco, Musco, Woodruff 2021, "Hutch++: optimal stochastic trace estimation", algorithm 1; Chen and Hallman
  2023, "Krylov-aware stochastic trace estimation"). Unbiased, and what is large lies in Q, where nothing is random.
- density: Ritz values as nodes, squared first components of their vectors as weights: stochastic Lanczos quadrature from
  one start (Ubaru, Chen, Saad 2017, "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature"). The share of P
  eigenvalues in an interval has a standard error of about sqrt(2 share (1 - share) / P).

Everything has a leading axis N: members of a population, each with a matrix of its own.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from icl.metrics import Estimate

Products: TypeAlias = Callable[[Tensor], Tensor]
"""Vectors (N, P) to their images under each batch's matrix, (N, J, P)."""

_BREAKDOWN = 100
"""In units of rounding: a residual this small beside the images is noise."""


class Krylov(NamedTuple):
    """An orthonormal basis, and the matrices seen from it."""

    basis: Float[Tensor, "N m P"]
    projected: Float[Tensor, "N J m m"]
    """In float64 on the CPU."""
    remainder: Float[Tensor, " N"]
    """The norm of what A adds to the space from the last vector."""


class Ritz(NamedTuple):
    """Eigenvalues of the projected matrix, from the smallest."""

    values: Float[Tensor, "N m"]
    stderr: Float[Tensor, "N m"]
    """Of each, for another draw of the J batches, to first order; NaN for one batch."""
    errors: Float[Tensor, "N m"]
    """Estimated distance to an eigenvalue of A."""
    weights: Float[Tensor, "N m"]
    """Of each as a node of the spectral density; they sum to 1."""


class Trace(NamedTuple):
    """The trace with its standard errors."""

    whole: Estimate
    """Its error counts the probes and another draw of the J batches."""
    probe_stderr: Float[Tensor, " N"]
    """Against the trace of this very A."""


def lanczos(products: Products, start: Float[Tensor, "N P"], num_steps: int) -> Krylov:
    """The Krylov space of A and a start, of `num_steps` dimensions or, if that is less, P.

    A space that A maps into itself is left for a new direction, so that its end is no end of the search.
    """
    count, size = start.shape
    num_steps = min(num_steps, size)
    basis = start.new_zeros(count, num_steps, size)
    projected: Tensor | None = None
    scale = remainder = start.new_zeros(count)
    vector = start / start.norm(dim=-1, keepdim=True)
    for step in range(num_steps):
        basis[:, step] = vector
        seen = basis[:, : step + 1]
        images = products(vector)  # N J P
        if projected is None:
            projected = torch.zeros(count, images.shape[1], num_steps, num_steps, dtype=torch.float64)
        column = (images @ seen.mT).cpu().double()  # N J step+1
        projected[:, :, : step + 1, step] = projected[:, :, step, : step + 1] = column
        image = images.mean(1)
        scale = torch.maximum(scale, image.norm(dim=-1))
        residual = _outside(image, seen)
        remainder = residual.norm(dim=-1)
        is_over = remainder <= _BREAKDOWN * torch.finfo(start.dtype).eps * scale
        remainder = remainder.masked_fill(is_over, 0)
        if is_over.any() and step + 1 < num_steps:
            fresh = _outside(start.roll(step + 1, dims=-1), seen)  # as good as a new random start
            residual = torch.where(is_over.unsqueeze(-1), fresh, residual)
        vector = residual / residual.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(start.dtype).tiny)
    if projected is None:
        raise ValueError("Lanczos needs a matrix of at least one row and at least one step.")
    return Krylov(basis, projected, remainder.cpu().double())


def ritz(krylov: Krylov) -> Ritz:
    """The eigenvalues of the mean projected matrix, with their errors and weights."""
    values, vectors = torch.linalg.eigh(krylov.projected.mean(1))  # N m, N m m
    by_batch = torch.einsum("nam,njab,nbm->njm", vectors, krylov.projected, vectors)
    residuals = krylov.remainder.unsqueeze(-1) * vectors[:, -1].abs()  # N m
    apart, far = values.diff(dim=-1), torch.full_like(values[:, :1], torch.inf)
    below = torch.cat((far, apart - residuals[:, :-1]), dim=-1)  # how far the next eigenvalue is at the least
    above = torch.cat((apart - residuals[:, 1:], far), dim=-1)
    gaps = torch.minimum(below, above).clamp(min=torch.finfo(torch.float64).tiny)
    errors = torch.minimum(residuals, residuals.square() / gaps)
    return Ritz(values, _spread(by_batch, dim=1), errors, vectors[:, 0].square())


def trace(products: Products, krylov: Krylov, probes: Iterable[Float[Tensor, "N P"]]) -> Trace:
    """The trace: exact within the Krylov space, estimated by random signs outside of it.

    Args:
        products: Of A.
        krylov: Of A, from a start that is independent of the probes.
        probes: At least two vectors of random signs.
    """
    inside = krylov.projected.diagonal(dim1=-2, dim2=-1).sum(-1)  # N J
    found = []
    for probe in probes:
        rest = _outside(probe, krylov.basis)
        found.append((products(rest) * rest.unsqueeze(1)).sum(-1).cpu().double())  # N J
    outside = torch.stack(found)  # R N J
    by_batch = inside + outside.mean(0)  # N J
    probe_stderr = _spread(outside.mean(-1), dim=0)
    batch_stderr = _spread(by_batch, dim=-1).nan_to_num(0.0)
    return Trace(Estimate(by_batch.mean(-1), (probe_stderr.square() + batch_stderr.square()).sqrt()), probe_stderr)


def _outside(vectors: Float[Tensor, "N P"], basis: Float[Tensor, "N m P"]) -> Float[Tensor, "N P"]:
    """What is orthogonal to the basis; done twice, as rounding leaves a part the first time."""
    for _ in range(2):
        vectors = vectors - ((vectors.unsqueeze(1) @ basis.mT) @ basis).squeeze(1)
    return vectors


def _spread(values: Tensor, dim: int) -> Tensor:
    """The standard error of the mean along an axis; NaN for one value."""
    count = values.shape[dim]
    deviations = values - values.mean(dim, keepdim=True)
    return (deviations.square().sum(dim) / (count - 1) / count).sqrt() if count > 1 else deviations.sum(dim) * torch.nan
