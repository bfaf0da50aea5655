"""The theory curve of Wurgaft et al. 2025 (arXiv 2506.17859): the step at which a rational learner memorises its tasks.

A learner weighs a memorising predictor (dMMSE) against a generalising predictor (ridge). The prior odds favour the simpler predictor, and
each training step is evidence for the predictor with the lower loss. After n steps, the log posterior odds of memorising are

    eta(n, M) = gamma n^(1 - alpha) (L_ridge - L_dMMSE) - ln 2 (K_dMMSE^beta - K_ridge^beta),

and the learner predicts with the fixed weight sigmoid(eta) for dMMSE. L is the loss on training tasks in nats per target: the mean squared
error divided by 2 sigma^2. K is a complexity in bits. The exponent alpha makes the evidence grow less than linearly with n. The exponent
beta makes the penalty grow less than linearly with K. The factor gamma scales the evidence. We took the formula from the authors' code
(DanielWurgaft/rational-icl, `HierarchicalBayesianModel`), which fits the three numbers to the predictions of many models and steps.

Where we differ: the authors compress the predictors' source code and their tables of tasks, and take the smallest
compressed size. We count `CODE_BITS` for the program of each predictor and 32 bits for each number of the table,
because random numbers do not compress. The authors use a median of means of the loss; we use the mean. They fit the
curve to prompts of training tasks, or to prompts of training tasks and of new tasks together. We fit one curve to
prompts of training tasks and one curve to prompts of new tasks. We leave out steps at which no mixture explains the
model. Our fit has the same objective: up to a constant, the mean squared difference of predictions is
(sigmoid(eta) - p)^2 times the mean of d^2. The best weight p and the difference d are defined in
`icl.analysis.mixture.fits`.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.optimize import OptimizeResult, least_squares
from scipy.special import expit

CODE_BITS = 8192
"""Complexity of the program of either predictor, in bits: 1 KiB. This number is our choice."""
BITS_PER_NUMBER = 32
PARAMETERS = ("alpha", "beta", "gamma")
_BOUNDS = ((0.0, 0.0, -40.0), (0.99, 1.0, 40.0))
"""Bounds of alpha, beta and ln(gamma)."""
_STARTS = [(alpha, beta) for alpha in (0.1, 0.5, 0.8) for beta in (0.1, 0.3, 0.5)]
_MIN_POINTS = 6
_MIN_RUNS_FOR_JACKKNIFE = 4
_GOOD_R2 = 0.8


class CurvePoints(NamedTuple):
    """Fixed weights of all runs and steps."""

    steps: Float[np.ndarray, " P"]
    advantage: Float[np.ndarray, " P"]
    """L_ridge - L_dMMSE on training tasks, in nats per target."""
    bits: Float[np.ndarray, " P"]
    """Size of the table of tasks, in bits."""
    weights: Float[np.ndarray, " P"]
    separation: Float[np.ndarray, " P"]
    """Mean squared difference between dMMSE and ridge."""
    runs: np.ndarray
    """Index of the run to which each point belongs."""

    def without(self, run: float) -> "CurvePoints":
        """Return the points of all runs except the run with index `run`."""
        return CurvePoints(*(column[self.runs != run] for column in self))


class Curve(NamedTuple):
    """A fitted theory curve with its verdict."""

    values: tuple[float, float, float]
    """alpha, beta and gamma."""
    stderr: tuple[float, float, float]
    """Standard errors from the jackknife over runs if there are at least four runs, else from least squares with independent points."""
    r2: float
    """Share of the variance of the weights that the curve explains. In this variance, points are weighted by `separation`."""
    verdict: str
    reasons: list[str]

    def weight(self, points: CurvePoints) -> Float[np.ndarray, " P"]:
        """Return sigmoid(eta) at each point."""
        return expit(log_odds(points.steps, points.advantage, points.bits, self.values))

    def transition(self, advantage: float, bits: float) -> float:
        """Return the step at which the curve of a run crosses 1/2; inf if it never crosses."""
        alpha, beta, gamma = self.values
        ratio = _price(bits, beta) / (gamma * advantage) if gamma * advantage > 0 else math.inf
        with np.errstate(over="ignore"):
            return float(np.float64(ratio) ** (1 / (1 - alpha)))


def table_bits(num_tasks: int | float, task_size: int) -> float:
    """Return the number of bits in a table of M tasks of size D."""
    return float(BITS_PER_NUMBER * num_tasks * task_size)


def log_odds(steps: np.ndarray, advantage: np.ndarray, bits: np.ndarray, values: tuple[float, ...]) -> np.ndarray:
    """Return eta at each point, for alpha, beta and gamma."""
    alpha, beta, gamma = values
    odds: np.ndarray = gamma * steps ** (1 - alpha) * advantage - _price(bits, beta)
    return odds


def fit_curve(points: CurvePoints) -> Curve:
    """Fit alpha, beta and gamma by least squares from several starts."""
    count, runs = len(points.steps), np.unique(points.runs)
    if count < _MIN_POINTS:
        nothing = (math.nan, math.nan, math.nan)
        reasons = [f"a mixture explains the model at only {count} saved steps; the curve needs at least {_MIN_POINTS}"]
        return Curve(nothing, nothing, math.nan, "invalid", reasons)
    starts = [(alpha, beta, _start(points, alpha, beta)) for alpha, beta in _STARTS]
    best = min((_fit_from(points, start) for start in starts), key=lambda fit: fit.cost)
    mean = np.average(points.weights, weights=points.separation)
    total = (points.separation * (points.weights - mean) ** 2).sum()
    r2 = 1 - 2 * best.cost / total if total > 1e-12 * points.separation.sum() else math.nan
    if len(runs) >= _MIN_RUNS_FOR_JACKKNIFE:
        deleted = np.array([_values(_fit_from(points.without(run), best.x)) for run in runs.tolist()])
        stderr = np.sqrt((len(runs) - 1) / len(runs) * ((deleted - deleted.mean(0)) ** 2).sum(0))
    else:
        stderr = _least_squares_stderr(best)
    return Curve(_values(best), tuple(stderr.tolist()), float(r2), *_judge(r2, best.x, len(runs)))


def _price(bits: np.ndarray | float, beta: float) -> np.ndarray | float:
    return math.log(2) * ((CODE_BITS + bits) ** beta - CODE_BITS**beta)


def _start(points: CurvePoints, alpha: float, beta: float) -> float:
    """Return the ln(gamma) for which eta is zero at the median step, loss advantage and table size."""
    middle = np.median(points.steps[points.steps > 0]) if (points.steps > 0).any() else 1.0
    evidence = middle ** (1 - alpha) * max(float(np.median(points.advantage)), 1e-12)
    ratio = float(_price(float(np.median(points.bits)), beta)) / evidence
    return min(max(math.log(ratio), _BOUNDS[0][2]), _BOUNDS[1][2])


def _fit_from(points: CurvePoints, start: tuple[float, float, float] | np.ndarray) -> OptimizeResult:
    root = np.sqrt(points.separation)

    def errors(x: np.ndarray) -> np.ndarray:
        odds = log_odds(points.steps, points.advantage, points.bits, (x[0], x[1], math.exp(x[2])))
        return root * (expit(odds) - points.weights)

    return least_squares(errors, start, bounds=_BOUNDS, max_nfev=300)


def _values(fit: OptimizeResult) -> tuple[float, float, float]:
    alpha, beta, log_gamma = fit.x.tolist()
    return alpha, beta, math.exp(log_gamma)


def _least_squares_stderr(fit: OptimizeResult) -> np.ndarray:
    count, size = fit.jac.shape
    if np.linalg.matrix_rank(fit.jac) < size:
        return np.full(size, math.nan)
    variances = np.diag(np.linalg.inv(fit.jac.T @ fit.jac)) * 2 * fit.cost / (count - size)
    return np.sqrt(variances) * np.array([1, 1, math.exp(fit.x[2])])


def _judge(r2: float, x: np.ndarray, num_runs: int) -> tuple[str, list[str]]:
    if math.isnan(r2):
        return "invalid", ["the weights do not change, so there is no curve to fit"]
    if r2 <= 0:
        return "invalid", ["the curve explains the weights no better than a constant does"]
    reasons = []
    if r2 < _GOOD_R2:
        reasons.append(f"the curve explains only {r2:.0%} of the variance of the weights")
    for name, value, low, high in zip(PARAMETERS, x, *_BOUNDS, strict=True):
        if min(value - low, high - value) < 1e-3 * (high - low):
            reasons.append(f"{name} is at a limit of its range")
    if num_runs < _MIN_RUNS_FOR_JACKKNIFE:
        reasons.append(
            f"with fewer than {_MIN_RUNS_FOR_JACKKNIFE} runs, the standard errors assume that saved steps are independent"
        )
    return ("suspect" if reasons else "ok"), reasons
