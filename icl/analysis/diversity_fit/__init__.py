"""Regression of the OOD error on task diversity and other features of trained models, with cross-validation and a verdict.

Each point is a model: one M at one saved step in the table that `icl evaluate --checkpoint_base_dir` writes. The target is the
out-of-distribution (OOD) error: the model's loss on new tasks (`true`) or on a shift. The features are log2(M) and, on the M
training tasks, the loss, the ICL score (from the first to the last position) and the gaps to ridge and dMMSE. Each feature is
standardised, so a coefficient is the change of the loss per standard deviation. Because M = inf has no finite logarithm, models
with M = inf are left out of the fit, but shown in the figure. With `infinite=next` they enter the fit as if M were twice the
largest finite M. This value is a convention.

The fit is linear, ridge or lasso (scikit-learn). Every ridge or lasso fit chooses its own penalty by cross-validation. To
validate the fit, we leave out one M at a time, with all its steps:

    R2_cv = 1 - sum_i (y_i - prediction without i's M)^2 / sum_i (y_i - mean without i's M)^2 .

The standard error of R2_cv is from a bootstrap over M. The standard errors of coefficients are from the delete-one-M jackknife;
for the lasso they are only a rough guide.

The verdict is `invalid` if R2_cv <= 0, because predicting the mean is then at least as good as the fit. It is `suspect` if R2_cv is within
two standard errors of 0, or if there are too few values of M: fewer than `FEW_GROUPS`, or fewer than `GROUPS_PER_COEFFICIENT` for each
coefficient (including the intercept). Otherwise it is `ok`. Fewer than four values of M raise an error.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LassoCV, LinearRegression, RidgeCV
from sklearn.model_selection import KFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from icl.analysis.diversity_fit.points import FEATURES, MODEL, FitError, read_points
from icl.analysis.run import Result, setting
from icl.config.validation import require

MIN_GROUPS = 4
FEW_GROUPS = 10
GROUPS_PER_COEFFICIENT = 3
_RIDGE_GRID = np.logspace(-4, 3, 29)
_LASSO_GRID = np.logspace(0, -3, 19)
_NUM_RESAMPLES = 2000
_STRONG_CORRELATION = 0.95
_MUCH_NOISE = 0.1


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of `icl analyse --what diversity`."""

    model_type: Literal["linear", "ridge", "lasso"] = setting("linear", "kind of regression")
    target: str = setting("true", "distribution whose loss is predicted: true (new tasks), or a shift")
    features: str = setting(
        "auto",
        f"comma-separated list from {', '.join(FEATURES)}; auto takes as many features from the start of this "
        "list as the number of values of M allows",
    )
    steps: Literal["last", "all"] = setting("last", "saved steps of each M that enter the fit: the last one, or all")
    infinite: Literal["leave_out", "next"] = setting(
        "leave_out", "models with M = inf: left out of the fit, or treated as if M were twice the largest finite M"
    )

    def __post_init__(self) -> None:
        names = self.features.split(",")
        is_unique, is_known = len(set(names)) == len(names), self.features == "auto" or set(names) <= set(FEATURES)
        require(is_unique, f"`features` must not name a feature twice, got {self.features!r}.")
        choices = f"`auto` or a comma-separated list from {', '.join(FEATURES)}"
        require(is_known, f"`features` must be {choices}, got {self.features!r}.")


class ValidatedFit(NamedTuple):
    """A fitted regression, its cross-validation and its verdict."""

    intercept: float
    coefficients: Float[np.ndarray, " F"]
    stderr: Float[np.ndarray, " F"]
    """Jackknife standard errors of the coefficients."""
    fitted: Float[np.ndarray, " B"]
    held_out: Float[np.ndarray, " B"]
    """Prediction for each point, from a fit without the point's group."""
    r2: float
    r2_cv: float
    r2_cv_stderr: float
    penalty: float
    """Penalty of the fit to all points; 0 for `linear`."""
    verdict: str
    reasons: list[str]


def analyse(path: Path, settings: Settings) -> Result:
    """Fit the regression to the models in a table.

    Raises:
        FitError: If the file is not a table from `icl evaluate`, or has too few values of M.
    """
    points = read_points(path, settings.target, steps=settings.steps, infinite=settings.infinite)
    is_inside = points["is_inside"].to_numpy()
    inside = points[is_inside]
    names = _features(settings, inside)
    fitted = fit(
        inside[names].to_numpy(float),
        inside["target"].to_numpy(float),
        inside["num_tasks"].to_numpy(str),
        model_type=settings.model_type,
    )
    return Result(_table(points, names, fitted, settings), _summary(points, names, fitted, settings))


def fit(
    features: Float[np.ndarray, "B F"],
    targets: Float[np.ndarray, " B"],
    groups: np.ndarray,
    *,
    model_type: Literal["linear", "ridge", "lasso"],
) -> ValidatedFit:
    """Fit a regression to all points, then again without each group for the cross-validation and the jackknife.

    A group is the set of points with the same M.

    Raises:
        FitError: If there are too few groups for this number of features.
    """
    labels = np.unique(groups)
    count, num_features = len(labels), features.shape[1]
    least = max(MIN_GROUPS, num_features + 3 if model_type == "linear" else 0)
    if count < least:
        raise FitError(
            f"Cross-validation of {num_features} feature(s) needs at least {least} finite values of M, got {count}. "
            "Train with more values of M (`icl diversity --max_power`), or name fewer --features."
        )
    whole = _fit_pipeline(features, targets, model_type)
    held_out, means, deleted = np.empty(len(targets)), np.empty(len(targets)), np.empty((count, num_features))
    for index, label in enumerate(labels):
        is_out = groups == label
        without = _fit_pipeline(features[~is_out], targets[~is_out], model_type)
        held_out[is_out], means[is_out] = without.predict(features[is_out]), targets[~is_out].mean()
        deleted[index] = _slopes(without) * features.std(0)
    r2_cv, r2_cv_stderr = _validated(targets, held_out, means, groups)
    verdict, reasons = _judge(r2_cv, r2_cv_stderr, count, num_features)
    return ValidatedFit(
        intercept=float(targets.mean()),
        coefficients=_slopes(whole) * features.std(0),
        stderr=np.sqrt((count - 1) / count * ((deleted - deleted.mean(0)) ** 2).sum(0)),
        fitted=whole.predict(features),
        held_out=held_out,
        r2=float(whole.score(features, targets)),
        r2_cv=r2_cv,
        r2_cv_stderr=r2_cv_stderr,
        penalty=float(getattr(whole[-1], "alpha_", 0.0)),
        verdict=verdict,
        reasons=reasons,
    )


def _features(settings: Settings, inside: pd.DataFrame) -> list[str]:
    """Return the features in `settings`. For `auto`, return as many usable features as the number of values of M allows."""
    usable = [name for name in FEATURES if inside[name].notna().all() and inside[name].nunique() > 1]
    if settings.features == "auto":
        return usable[: max(1, inside["num_tasks"].nunique() // GROUPS_PER_COEFFICIENT - 1)] or [FEATURES[0]]
    wanted = settings.features.split(",")
    unusable = [name for name in wanted if name not in usable]
    if unusable and len(inside) > 1:
        raise FitError(
            f"The feature `{unusable[0]}` is missing, or has the same value at every point; leave it out of --features."
        )
    return wanted


def _fit_pipeline(features: np.ndarray, targets: np.ndarray, model_type: str) -> Pipeline:
    estimator: Any = LinearRegression()
    if model_type == "ridge":
        estimator = RidgeCV(alphas=_RIDGE_GRID)
    elif model_type == "lasso":
        folds = KFold(min(len(targets), 10), shuffle=True, random_state=0)
        # For standardised features, larger penalties set all coefficients to 0.
        largest = max(float(targets.std()), 1e-12)
        estimator = LassoCV(alphas=largest * _LASSO_GRID, cv=folds, max_iter=2000)
    with warnings.catch_warnings():
        # Lasso warns only at the smallest penalties, and cross-validation does not choose these.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return make_pipeline(StandardScaler(), estimator).fit(features, targets)


def _slopes(model: Pipeline) -> np.ndarray:
    """Return coefficients per unit of each feature, so that fits with different standardisations can be compared."""
    slopes: np.ndarray = model[-1].coef_ / model[0].scale_
    return slopes


def _validated(targets: np.ndarray, held_out: np.ndarray, means: np.ndarray, groups: np.ndarray) -> tuple[float, float]:
    """Return R2_cv, and its standard error from resampling groups."""
    labels, group_indices = np.unique(groups, return_inverse=True)
    residual, total = (np.bincount(group_indices, weights=(targets - guess) ** 2) for guess in (held_out, means))
    if not total.sum() > 0:
        return float("nan"), float("nan")
    resampled = np.random.default_rng(0).integers(len(labels), size=(_NUM_RESAMPLES, len(labels)))
    totals = total[resampled].sum(1)
    ratios = residual[resampled].sum(1)[totals > 0] / totals[totals > 0]
    return float(1 - residual.sum() / total.sum()), float(ratios.std(ddof=1))


def _judge(r2_cv: float, stderr: float, count: int, num_features: int) -> tuple[str, list[str]]:
    reasons = []
    if count < FEW_GROUPS:
        reasons.append(f"there are only {count} values of M")
    if count < GROUPS_PER_COEFFICIENT * (num_features + 1):
        reasons.append(
            f"there are fewer than {GROUPS_PER_COEFFICIENT} values of M for each of the {num_features + 1} coefficients"
        )
    if not r2_cv > 0:
        return "invalid", ["the fit predicts held-out values of M no better than the mean does", *reasons]
    if r2_cv < 2 * stderr:
        reasons.insert(0, "the cross-validated R² is within two standard errors of zero")
    return ("suspect" if reasons else "ok"), reasons


def _table(points: pd.DataFrame, names: list[str], fitted: ValidatedFit, settings: Settings) -> pd.DataFrame:
    """Return one table: the numbers of the fit, then the numbers of every point.

    The settings `model_type`, `target` and `infinite` have columns.
    """
    coefficients = zip(names, fitted.coefficients, fitted.stderr, strict=True)
    rows: list[dict[str, Any]] = [
        {"quantity": "r2", "value": fitted.r2},
        {"quantity": "r2_cv", "value": fitted.r2_cv, "stderr": fitted.r2_cv_stderr},
        {"quantity": "intercept", "value": fitted.intercept},
        {"quantity": "penalty", "value": fitted.penalty},
        *({"quantity": "coefficient", "item": name, "value": v, "stderr": e} for name, v, e in coefficients),
    ]
    for row in rows:
        row |= {"verdict": fitted.verdict, "reasons": "; ".join(fitted.reasons)}
    models, is_inside = points[MODEL], points["is_inside"]
    measured = models.assign(quantity="measured", value=points["target"], stderr=points["target_stderr"])
    predictions = [
        models[is_inside].assign(quantity=quantity, value=values)
        for quantity, values in (("fitted", fitted.fitted), ("held_out", fitted.held_out))
    ]
    table = pd.DataFrame([*rows, *(row for part in (measured, *predictions) for row in part.to_dict("records"))])
    table = table.assign(model_type=settings.model_type, target=settings.target, infinite=settings.infinite)
    columns = ["quantity", "item", *MODEL, "value", "stderr", "verdict", "reasons", "model_type", "target", "infinite"]
    return table.reindex(columns=columns).astype({"step": "Int64"})


def _summary(points: pd.DataFrame, names: list[str], fitted: ValidatedFit, settings: Settings) -> list[str]:
    inside = points[points["is_inside"]]
    num_outside = len(points) - len(inside)
    why = "; ".join(fitted.reasons)
    outside = f"; {num_outside} outside the fit (M = inf, or a loss that is not finite)" if num_outside else ""
    lines = [
        f"Verdict: {fitted.verdict}{f' ({why})' if why else ''}.",
        f"Fit ({settings.model_type}) of the loss on `{settings.target}`: {len(inside)} models with "
        f"{inside['num_tasks'].nunique()} values of M{outside}.",
        f"R² {fitted.r2:.3f} in sample; {fitted.r2_cv:.3f} ± {fitted.r2_cv_stderr:.3f} when leaving out one M at a time.",
        "Change of the loss per standard deviation of a feature (± jackknife standard error):",
    ]
    values = zip(names, fitted.coefficients, fitted.stderr, strict=True)
    lines += [f"  {name:16s}{value:>10.4g} ± {stderr:.2g}" for name, value, stderr in values]
    correlations = np.abs(np.corrcoef(inside[names].to_numpy(float), rowvar=False))
    if len(names) > 1 and np.triu(correlations, 1).max() > _STRONG_CORRELATION:
        lines.append(
            "Some features are strongly correlated, so the fit shows their joint effect, but not the effect of each feature."
        )
    noise = float((inside["target_stderr"] ** 2).mean() / max(inside["target"].var(ddof=0), 1e-300))
    if noise > _MUCH_NOISE:
        lines.append(f"Measurement errors make up {noise:.0%} of the variance of the loss; evaluate with more prompts.")
    return lines
