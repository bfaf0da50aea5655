"""Principal components of a trajectory, and the random walks that their shares of variance are held against.

Components: eigenvectors of the covariance of the rows, each checkpoint counting once. Where features outnumber
checkpoints they come from the centred inner products G (scikit-learn's KernelPCA of the linear kernel), else from the rows
(scikit-learn's PCA); both give the same. Each component's sign is such that the runs begin on its negative side (where a
cosine of a random walk has its largest value), so that it does not depend on the solver; order is by variance.

Null models. A walk of many equal steps in very many dimensions has shares 6 / (pi k)^2 (S states: proportional to
1 / sin^2(pi k / 2S)) and components that are cosines (Antognini and Sohl-Dickstein 2018): a smooth curve with a large first
component is nothing remarkable. Checkpoints are not evenly spaced and training slows down, so the walks to compare with
take the run's own steps d_i, the differences between saved states:

- `walk_shares`: the expected G of a walk whose steps have the lengths |d_i| and independent directions, so Brownian motion
  at the times tau_i = sum_{j<=i} |d_j|^2; for equal `durations` it is the closed form, with the
  numbers of updates as durations Brownian motion of one rate, seen at the saved steps. Runs keep their starting points.
- `flipped_walks`: the steps as they are, each with a random sign: a walk in the run's own directions, of which there may
  be few. Its mean G is that of `walk_shares`; its spread says what shares chance can give.

The first shares that Hoogland et al. 2024 give for L2H4, 0.65, 0.08 and 0.05, have such walks beside them: Brownian motion
seen at 190 checkpoints on a log and a linear grid of 500,000 steps has 0.68, 0.14 and 0.05, on a linear one 0.61, 0.15, 0.07.

The displacement ratio |sum d_i|^2 / sum |d_i|^2 is 1 on average for any of these, and the number of steps for a line.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from scipy.linalg import eigh
from scipy.sparse.linalg import eigsh
from sklearn.decomposition import PCA, KernelPCA

from icl.analysis.essential_dynamics.trajectories import Products, Row, feature_blocks

_DENSE = 60
"""Up to this size all eigenvalues cost less than iterating for the first."""
_MANY = 2500
"""From this many checkpoints on, fewer walks are drawn."""
SCORED_WALKS = 19


class Components(NamedTuple):
    """Principal components of the rows of a matrix."""

    scores: Float[np.ndarray, "S C"]
    shares: Float[np.ndarray, " C"]
    """Of the variance, largest first."""
    projected: Float[np.ndarray, "R C"]
    """The references' scores; they had no part in the fit."""
    captured: Float[np.ndarray, " R"]
    """The share of each reference's squared distance to the mean that lies within these components."""


class Walks(NamedTuple):
    """What random signs of the steps give."""

    shares: Float[np.ndarray, "W C"]
    displacement: Float[np.ndarray, "W r"]
    """The displacement ratio of every run."""
    scores: Float[np.ndarray, "w S C"]
    """Of the first few walks, their components; signs are of no meaning."""


def from_products(products: Products, begins: Bool[np.ndarray, " S"], *, num_components: int) -> Components:
    """Components by way of the inner products, for more features than checkpoints.

    Args:
        products: Of `trajectories.centred_products`.
        begins: Which rows are the first of a run.
        num_components: How many, at most one less than there are rows.
    """
    model = KernelPCA(n_components=num_components, kernel="precomputed", eigen_solver="dense")
    scores = model.fit_transform(products.rows)
    shares = model.eigenvalues_ / np.trace(products.rows)
    has_references = len(products.references) > 0
    projected = model.transform(products.references) if has_references else np.zeros((0, scores.shape[1]))
    return _signed(scores, shares, projected, products.squares, begins)


def from_rows(
    rows: Sequence[Row], points: Float[np.ndarray, "R F"], begins: Bool[np.ndarray, " S"], *, num_components: int
) -> Components:
    """Components of the matrix itself, which is read whole, for no more features than checkpoints."""
    matrix = np.concatenate(list(feature_blocks(rows)), axis=1)
    model = PCA(n_components=num_components, svd_solver="full").fit(matrix)
    scores = model.transform(matrix)
    projected = model.transform(points) if len(points) else np.zeros((0, scores.shape[1]))
    squares = ((points - model.mean_) ** 2).sum(1)
    return _signed(scores, model.explained_variance_ratio_, projected, squares, begins)


def walk_shares(
    gram: Float[np.ndarray, "S S"],
    begins: Bool[np.ndarray, " S"],
    *,
    num_components: int,
    durations: Float[np.ndarray, " S"] | None = None,
) -> Float[np.ndarray, " C"]:
    """The expected shares of a walk with each step in a direction of its own.

    Args:
        gram: Centred inner products of the states.
        begins: Which are the first of a run; where runs begin is kept.
        num_components: How many.
        durations: Squared lengths of the step to each state, up to a factor (any number for a first state); left out,
            those it had.
    """
    steps = _steps(gram, begins)
    squares = np.diag(steps).copy()
    if durations is not None:
        squares[~begins] = durations[~begins] * (squares[~begins].sum() / durations[~begins].sum())
    expected = np.where(np.outer(begins, begins), steps, 0.0)
    expected[np.arange(len(steps)), np.arange(len(steps))] = squares
    return _leading(_walk(expected, begins), num_components)[0]


def flipped_walks(
    gram: Float[np.ndarray, "S S"], begins: Bool[np.ndarray, " S"], *, num_components: int, seed: int = 0
) -> Walks:
    """Walks of the steps as they are with random signs: 99 of them, 19 where checkpoints are many."""
    steps, generator = _steps(gram, begins), np.random.default_rng(seed)
    shares, ratios, scores = [], [], []
    for _ in range(99 if len(steps) <= _MANY else SCORED_WALKS):
        signs = np.where(begins, 1.0, generator.choice([-1.0, 1.0], len(steps)))
        flipped = steps * np.outer(signs, signs)
        ratios.append(_displacement(flipped, begins))
        values, vectors = _leading(_walk(flipped, begins), num_components)
        shares.append(values)
        scores.append(vectors * np.sqrt(values))
    return Walks(np.array(shares), np.array(ratios), np.array(scores[:SCORED_WALKS]))


def displacement_ratios(gram: Float[np.ndarray, "S S"], begins: Bool[np.ndarray, " S"]) -> Float[np.ndarray, " r"]:
    """|sum of steps|^2 / sum of |step|^2 of every run; NaN for one that does not move."""
    return _displacement(_steps(gram, begins), begins)


def _signed(
    scores: Float[np.ndarray, "S C"],
    shares: Float[np.ndarray, " C"],
    projected: Float[np.ndarray, "R C"],
    squares: Float[np.ndarray, " R"],
    begins: Bool[np.ndarray, " S"],
) -> Components:
    starts, largest = scores[begins].mean(0), np.abs(scores).max(0, initial=0)
    peaks = np.take_along_axis(scores, np.abs(scores).argmax(0)[None], axis=0)[0]
    decisive = np.where(np.abs(starts) > 1e-6 * largest, -starts, peaks)
    signs = np.where(decisive < 0, -1.0, 1.0)
    captured = (projected**2).sum(1) / np.where(squares > 0, squares, np.nan)
    return Components(scores * signs, np.asarray(shares), projected * signs, captured)


def _steps(gram: Float[np.ndarray, "S S"], begins: Bool[np.ndarray, " S"]) -> Float[np.ndarray, "S S"]:
    """Inner products of the first states of runs and of the steps after them."""
    keep = (~begins).astype(float)
    partly = gram - keep[:, None] * np.roll(gram, 1, axis=0)
    return partly - keep * np.roll(partly, 1, axis=1)


def _walk(steps: Float[np.ndarray, "S S"], begins: Bool[np.ndarray, " S"]) -> Float[np.ndarray, "S S"]:
    """Inner products of the places that steps lead to: the inverse of `_steps`."""
    starts = np.flatnonzero(begins)[1:]
    for axis in (0, 1):
        steps = np.concatenate([np.cumsum(own, axis=axis) for own in np.split(steps, starts, axis=axis)], axis=axis)
    return steps


def _displacement(steps: Float[np.ndarray, "S S"], begins: Bool[np.ndarray, " S"]) -> Float[np.ndarray, " r"]:
    places = np.split(np.arange(len(steps)), np.flatnonzero(begins)[1:])
    sums = [(steps[np.ix_(own[1:], own[1:])].sum(), np.diag(steps)[own[1:]].sum()) for own in places]
    return np.array([whole / total if total > 0 else np.nan for whole, total in sums])


def _leading(
    gram: Float[np.ndarray, "S S"], num_components: int
) -> tuple[Float[np.ndarray, " C"], Float[np.ndarray, "S C"]]:
    """The largest eigenvalues of the centred products over their sum, and the eigenvectors."""
    centred = gram - gram.mean(0) - gram.mean(1)[:, None] + gram.mean()
    size = len(centred)
    if size <= _DENSE:
        values, vectors = eigh(centred, subset_by_index=[size - num_components, size - 1])
    else:
        values, vectors = eigsh(centred, num_components, which="LA", tol=1e-9, v0=np.linspace(-1, 1, size))
    order = np.argsort(values)[::-1]
    return np.maximum(values[order], 0) / np.trace(centred), vectors[:, order]
