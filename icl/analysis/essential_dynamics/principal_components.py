"""Principal components of a trajectory, and the random walks with which their shares of variance are compared.

Components are eigenvectors of the covariance of the states; each checkpoint counts once. If there are more features than checkpoints, we
compute components from the centred inner products G of the states (scikit-learn's KernelPCA with a linear kernel), otherwise from the
states themselves (scikit-learn's PCA). Both methods give the same result. Components are sorted by variance. We choose the sign of a
component such that the runs begin at negative scores. The sign then does not depend on the solver.

Null models. In a random walk of many equal steps in very many dimensions, component k has the share 6 / (pi k)^2 of the
variance. (For S states, the share is proportional to 1 / sin^2(pi k / 2S).) The scores of component k form a cosine
(Antognini and Sohl-Dickstein 2018). So a smooth curve with a large first component is not evidence of structure.
Checkpoints are not evenly spaced, and training slows down. So we compare with walks made from the run's own steps d_i,
the differences between consecutive states:

- `walk_shares`: the expected shares of the variance in a walk whose steps have the lengths |d_i| and independent
  directions. They are computed from the expected G of this walk. This walk is Brownian motion at the times tau_i =
  sum_{j<=i} |d_j|^2. If all `durations` (squared step lengths) are equal, the shares have the closed form above. With
  the numbers of updates as durations, the walk is Brownian motion of constant rate, observed at the saved steps. The
  first state of each run stays where it is; only the later states are random.
- `flipped_walks`: walks with the steps d_i, each multiplied by a random sign. Such a walk moves only in the run's own directions,
  which may be few. The mean of G over these walks is the expected G of `walk_shares`. The spread over walks shows which shares can
  occur by chance.

For comparison, the first three shares that Hoogland et al. 2024 give for L2H4 are 0.65, 0.08 and 0.05. For Brownian motion of
500,000 steps, observed at 190 checkpoints, these shares depend on the grid of checkpoints. For the union of a logarithmic and a
linear grid they are 0.68, 0.14 and 0.05. For a linear grid they are 0.61, 0.15 and 0.07.

The displacement ratio |sum d_i|^2 / sum |d_i|^2 is 1 on average for all these walks. For equal steps along a line it is the number
of steps.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from scipy.linalg import eigh
from scipy.sparse.linalg import eigsh
from sklearn.decomposition import PCA, KernelPCA

from icl.analysis.essential_dynamics.trajectories import Products, Row, Trajectory, centred_products, feature_blocks
from icl.runs.checkpoints import CheckpointError

_DENSE = 60
"""Largest size of a matrix for which a dense solver is faster than an iterative one."""
_MANY = 2500
"""Number of checkpoints above which only `SCORED_WALKS` walks are drawn."""
_LEAST_SHARE = 1e-10
"""Components with a smaller share of the variance are rounding errors."""
_SHARE_TOLERANCE = 1e-9
"""Sums of shares count as equal up to this difference, because the shares of the run and of the walks come from
different solvers."""
_LEVEL = 0.05
"""Significance level of the tests against random walks."""
SCORED_WALKS = 19
"""Number of walks whose scores are kept."""


class Components(NamedTuple):
    """Principal components of the rows of a matrix."""

    scores: Float[np.ndarray, "S C"]
    shares: Float[np.ndarray, " C"]
    """Shares of the variance, largest first."""
    projected: Float[np.ndarray, "R C"]
    """Scores of the references, which did not enter the fit."""
    captured: Float[np.ndarray, " R"]
    """Share of each reference's squared distance to the mean that lies within these components."""


class Walks(NamedTuple):
    """Random walks that are made from the run's steps, each multiplied by a random sign."""

    shares: Float[np.ndarray, "W C"]
    displacement: Float[np.ndarray, "W r"]
    """Displacement ratio |sum of steps|^2 / sum of |step|^2 of every run in every walk."""
    scores: Float[np.ndarray, "w S C"]
    """Scores of the first few walks; their signs have no meaning."""


class ComparedPCA(NamedTuple):
    """The PCA of all runs, and the random walks with which it is compared."""

    components: Components
    nulls: dict[str, Float[np.ndarray, " C"]]
    """Expected shares of the variance in random walks. The keys are the names of the kinds of walks."""
    walks: Walks
    displacement: Float[np.ndarray, " r"]
    """Displacement ratio |sum of steps|^2 / sum of |step|^2 of every run."""
    variance: float
    """Sum over states of the squared distance to their mean."""

    @property
    def high_shares(self) -> Float[np.ndarray, " C"]:
        """For every k, the 95 % quantile, over walks with the run's own steps, of the sum of the first k shares."""
        return np.quantile(np.cumsum(self.walks.shares, axis=1), 0.95, axis=0)

    @property
    def is_too_short(self) -> bool:
        """Whether there are too few steps for a comparison with walks: more than 5 % of the walks are the run itself.

        A single run needs at least seven states.
        """
        num_runs = len(self.displacement)
        num_steps = len(self.components.scores) - num_runs
        return is_too_short(num_steps) if num_runs == 1 else 0.5**num_steps > _LEVEL

    @property
    def is_reached(self) -> Bool[np.ndarray, " C"]:
        """For every k, whether the sum of the run's first k shares is at most `high_shares`, up to rounding.

        If so, about 5 % or more of the walks reach this sum. If there are too few steps (`is_too_short`), the entry is
        True for every k.
        """
        return (np.cumsum(self.components.shares) <= self.high_shares + _SHARE_TOLERANCE) | self.is_too_short

    @property
    def displacement_limits(self) -> Float[np.ndarray, " r"]:
        """For every run, the 95 % quantile of the displacement ratio over walks with the run's own steps."""
        return np.quantile(self.walks.displacement, 0.95, axis=0)


def is_too_short(num_steps: int) -> bool:
    """Return whether more than 5 % of the walks made from the steps of one run have the run's shares and displacement.

    If the signs of all steps change, shares and displacement stay the same. So two of the 2^num_steps walks are
    equivalent to the run itself.
    """
    return 0.5 ** (num_steps - 1) > _LEVEL


def fit_components(
    trajectories: Sequence[Trajectory], points: dict[str, Float[np.ndarray, " F"]], *, num_components: int
) -> ComparedPCA:
    """Compute the PCA of all states, by the cheaper of two methods, and the random walks for comparison.

    Raises:
        CheckpointError: If there are fewer than three states, or if the states are not finite or are all equal.
    """
    rows = [row for trajectory in trajectories for row in trajectory.rows]
    begins = np.concatenate([np.arange(len(trajectory.steps)) == 0 for trajectory in trajectories])
    if len(rows) < 3:
        raise CheckpointError(
            f"Essential dynamics needs at least three saved steps, got {len(rows)}. Train with --checkpoints.num_log 60."
        )
    others = np.array(list(points.values())).reshape(len(points), len(rows[0]))
    products = centred_products(rows, others)
    if not np.isfinite(products.rows).all() or np.trace(products.rows) <= 0:
        raise CheckpointError(
            "The states of these checkpoints are not finite, or are all equal. Check the loss in metrics.csv: training may have diverged."
        )
    count = min(num_components, len(rows) - 1, len(rows[0]))
    if len(rows[0]) > len(rows):
        components = from_products(products, begins, num_components=count)
    else:
        components = from_rows(rows, others, begins, num_components=count)
    scores, shares, projected, captured = components
    count = int((shares > _LEAST_SHARE).sum())
    components = Components(scores[:, :count], shares[:count], projected[:, :count], captured)
    gram = products.rows
    durations = np.concatenate([np.diff(trajectory.steps, prepend=0) for trajectory in trajectories]).astype(float)
    nulls = {
        "null_walk": walk_shares(gram, begins, num_components=count),
        "null_brownian": walk_shares(gram, begins, num_components=count, durations=durations),
        "null_equal": walk_shares(gram, begins, num_components=count, durations=np.ones(len(rows))),
    }
    walks = flipped_walks(gram, begins, num_components=count)
    return ComparedPCA(components, nulls, walks, displacement_ratios(gram, begins), float(np.trace(gram)))


def from_products(products: Products, begins: Bool[np.ndarray, " S"], *, num_components: int) -> Components:
    """Compute components from inner products. This is cheaper if there are more features than checkpoints.

    Args:
        products: Products from `trajectories.centred_products`.
        begins: Whether each row is the first of a run.
        num_components: Number of components; it must be smaller than the number of rows.
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
    """Compute components from the whole matrix, in memory. This is cheaper if there are few features."""
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
    """Return the share of the variance that each component explains in a walk with independent step directions.

    The shares are computed from the expected G of the walk.

    Args:
        gram: Centred inner products of the states.
        begins: Whether each state is the first of a run. The first state of each run stays where it is.
        num_components: Number of components.
        durations: Squared length of the step to each state, up to a common factor. Values for first states are ignored. None
            uses the squared lengths of the run's own steps.
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
    """Draw walks that multiply each of the run's steps by a random sign: 99 walks, or 19 if there are many checkpoints."""
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
    """Return |sum of steps|^2 / sum of |step|^2 of every run; NaN for a run that does not move."""
    return _displacement(_steps(gram, begins), begins)


def _signed(
    scores: Float[np.ndarray, "S C"],
    shares: Float[np.ndarray, " C"],
    projected: Float[np.ndarray, "R C"],
    squares: Float[np.ndarray, " R"],
    begins: Bool[np.ndarray, " S"],
) -> Components:
    """Build components, with signs chosen so that the runs begin at negative scores."""
    starts, largest = scores[begins].mean(0), np.abs(scores).max(0, initial=0)
    peaks = np.take_along_axis(scores, np.abs(scores).argmax(0)[None], axis=0)[0]
    # If the runs begin at zero on average, the sign is chosen so that the largest score is positive.
    decisive = np.where(np.abs(starts) > 1e-6 * largest, -starts, peaks)
    signs = np.where(decisive < 0, -1.0, 1.0)
    captured = (projected**2).sum(1) / np.where(squares > 0, squares, np.nan)
    return Components(scores * signs, np.asarray(shares), projected * signs, captured)


def _steps(gram: Float[np.ndarray, "S S"], begins: Bool[np.ndarray, " S"]) -> Float[np.ndarray, "S S"]:
    """Return the inner products of all steps. A run's first entry is its first state; the others are differences of states."""
    # Subtract the previous row and then the previous column, except at the first state of each run.
    is_step = (~begins).astype(float)
    by_row = gram - is_step[:, None] * np.roll(gram, 1, axis=0)
    return by_row - is_step * np.roll(by_row, 1, axis=1)


def _walk(steps: Float[np.ndarray, "S S"], begins: Bool[np.ndarray, " S"]) -> Float[np.ndarray, "S S"]:
    """Return the inner products of the states that result from steps. This is the inverse of `_steps`."""
    starts = np.flatnonzero(begins)[1:]
    for axis in (0, 1):
        steps = np.concatenate([np.cumsum(run, axis=axis) for run in np.split(steps, starts, axis=axis)], axis=axis)
    return steps


def _displacement(steps: Float[np.ndarray, "S S"], begins: Bool[np.ndarray, " S"]) -> Float[np.ndarray, " r"]:
    indices = np.split(np.arange(len(steps)), np.flatnonzero(begins)[1:])
    squared = np.array([steps[np.ix_(run[1:], run[1:])].sum() for run in indices])  # squared length of the displacement
    total = np.array([np.diag(steps)[run[1:]].sum() for run in indices])  # sum of the squared lengths of the steps
    return np.divide(squared, total, out=np.full(len(total), np.nan), where=total > 0)


def _leading(
    gram: Float[np.ndarray, "S S"], num_components: int
) -> tuple[Float[np.ndarray, " C"], Float[np.ndarray, "S C"]]:
    """Return the largest eigenvalues of the centred products as shares of the trace, and their eigenvectors."""
    centred = gram - gram.mean(0) - gram.mean(1)[:, None] + gram.mean()
    size = len(centred)
    if size <= _DENSE:
        values, vectors = eigh(centred, subset_by_index=[size - num_components, size - 1])
    else:
        values, vectors = eigsh(centred, num_components, which="LA", tol=1e-9, v0=np.linspace(-1, 1, size))
    order = np.argsort(values)[::-1]
    return np.maximum(values[order], 0) / np.trace(centred), vectors[:, order]
