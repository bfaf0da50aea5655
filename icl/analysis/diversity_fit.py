"""OOD error as a linear function of task diversity and other features of trained models, with an honest verdict.

A point is a model: one M at one saved step of the table that `icl evaluate --checkpoint_base_dir` writes. The target is its
loss on new tasks (`true`) or on a shift. Features are log2(M), and on the M training tasks its loss, ICL score (first to
last position) and gaps to ridge and dMMSE; each is standardised, so coefficients are losses per standard deviation.
M = inf has no logarithm: its models are left out of the fit (and drawn beside it), or, with `infinite=next`, put one octave
after the largest finite M, which is a convention and not a measurement.

Models are linear, ridge or lasso (scikit-learn); the penalty is chosen by cross-validation inside every fit. Validation
leaves out one M at a time, all its steps together:

    R2_cv = 1 - sum_i (y_i - prediction without i's M)^2 / sum_i (y_i - mean without i's M)^2 ,

with a bootstrap standard error over M. Coefficients have delete-one-M jackknife standard errors, for the lasso a rough guide.
Verdict: `invalid` if R2_cv <= 0 (the mean predicts as well); `suspect` if R2_cv is within two standard errors of 0 or there
are few M for so many features; else `ok`. Fewer than four M are refused.
"""

import warnings
from dataclasses import dataclass, field
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

from icl.analysis.run import Result
from icl.reading import MAX_TABLE, ContentError, parse_json, read_bytes
from icl.table_files import read_table, require_numbers
from icl.validation import ConfigError, UserError, parse_num_tasks

MIN_GROUPS = 4
FEW_GROUPS = 10
GROUPS_PER_COEFFICIENT = 3
FEATURES = ("log2_num_tasks", "loss", "icl_score", "delta_ridge", "delta_dmmse")
"""In the order in which they are taken while there are enough points; see `Settings.features`."""
_MODEL = ["num_tasks", "step", "checkpoint_hash"]
"""What tells one trained model from another."""
_COLUMNS = (*_MODEL, "distribution", "quantity", "position", "value", "stderr")
_RIDGE_GRID = np.logspace(-4, 3, 29)
_LASSO_GRID = np.logspace(0, -3, 19)
_NUM_RESAMPLES = 2000
_STRONG_CORRELATION = 0.95
_MUCH_NOISE = 0.1


class FitError(UserError, ValueError):
    """A table that no model can be fitted to; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What `icl analyse --what diversity` can be told."""

    model_type: Literal["linear", "ridge", "lasso"] = field(default="linear", metadata={"help": "the model"})
    target: str = field(default="true", metadata={"help": "distribution whose loss is explained: true, or a shift"})
    features: str = field(
        default="auto",
        metadata={
            "help": f"comma list from {', '.join(FEATURES)}; auto: the first of these, as many as there are values of M for"
        },
    )
    steps: Literal["last", "all"] = field(default="last", metadata={"help": "of each M its last step, or every one"})
    infinite: Literal["leave_out", "next"] = field(
        default="leave_out", metadata={"help": "M = inf: outside the fit, or an octave after the largest M"}
    )

    def __post_init__(self) -> None:
        names = self.features.split(",")
        if len(set(names)) < len(names):
            raise ConfigError(f"`features` names one twice, got {self.features!r}.")
        unknown = [name for name in self.features.split(",") if name not in (*FEATURES, "auto")]
        if unknown or ("auto" in self.features and self.features != "auto"):
            raise ConfigError(
                f"`features` must be `auto` or a comma list from {', '.join(FEATURES)}, got {self.features!r}."
            )


class Fit(NamedTuple):
    """A fitted model, its validation and its verdict."""

    intercept: float
    coefficients: Float[np.ndarray, " F"]
    stderr: Float[np.ndarray, " F"]
    fitted: Float[np.ndarray, " B"]
    held_out: Float[np.ndarray, " B"]
    """The prediction for each point by the fit without its group."""
    r2: float
    r2_cv: float
    r2_cv_stderr: float
    penalty: float
    """Of the fit to all points; 0 for `linear`."""
    verdict: str
    reasons: list[str]


def analyse(path: Path, settings: Settings) -> Result:
    """Fit the table in a file.

    Raises:
        FitError: If the file is no such table, or has too few points.
    """
    points = read_points(path, settings)
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
) -> Fit:
    """Fit all points, then without each group; pure.

    Raises:
        FitError: If there are too few groups, or fewer than the features need.
    """
    labels = np.unique(groups)
    count, num_features = len(labels), features.shape[1]
    least = max(MIN_GROUPS, num_features + 3 if model_type == "linear" else 0)
    if count < least:
        raise FitError(
            f"Cross-validation of {num_features} feature(s) needs at least {least} finite values of M, got {count}; "
            "train more with `icl diversity --max_power`, or name fewer --features."
        )
    whole = _fitted(features, targets, model_type)
    held_out, means, deleted = np.empty(len(targets)), np.empty(len(targets)), []
    for label in labels:
        out = groups == label
        without = _fitted(features[~out], targets[~out], model_type)
        held_out[out], means[out] = without.predict(features[out]), targets[~out].mean()
        deleted.append(_slopes(without) * features.std(0))
    r2_cv, r2_cv_stderr = _validated(targets, held_out, means, groups)
    spread = np.stack(deleted)
    verdict, reasons = _judge(r2_cv, r2_cv_stderr, count, num_features)
    return Fit(
        intercept=float(targets.mean()),
        coefficients=_slopes(whole) * features.std(0),
        stderr=np.sqrt((count - 1) / count * ((spread - spread.mean(0)) ** 2).sum(0)),
        fitted=whole.predict(features),
        held_out=held_out,
        r2=float(whole.score(features, targets)),
        r2_cv=r2_cv,
        r2_cv_stderr=r2_cv_stderr,
        penalty=float(getattr(whole[-1], "alpha_", 0.0)),
        verdict=verdict,
        reasons=reasons,
    )


def read_points(path: Path, settings: Settings) -> pd.DataFrame:
    """A row per model: what tells it apart, is_inside (the fit), target, target_stderr and the features that the table has.

    Raises:
        FitError: If the file cannot be read, lacks columns, or has no loss on the target.
    """
    table = _read(path)
    try:
        table["num_tasks"] = [str(parse_num_tasks(str(value))) for value in table["num_tasks"]]
    except ConfigError as error:
        raise FitError(f"{path} cannot be used: {error}") from None
    targets = _headline(table, settings.target, "loss", path)
    points = pd.DataFrame({"target": targets["value"], "target_stderr": targets["stderr"]})
    for name in FEATURES[1:]:
        rows = table[(table["distribution"] == "pretrain") & (table["quantity"] == name)]
        points[name] = _full_span(rows, name).groupby(_MODEL)["value"].last()
    points = points.reset_index()
    diversity = points["num_tasks"].astype(float)
    finite = np.isfinite(diversity)
    octaves = np.log2(diversity.where(finite))
    points["log2_num_tasks"] = octaves.fillna(octaves.max() + 1)
    points["is_inside"] = (finite | (settings.infinite == "next")) & np.isfinite(points["target"])
    if settings.steps == "last":
        points = points[points["step"] == points.groupby("num_tasks")["step"].transform("max")]
    return points.sort_values(["log2_num_tasks", "step"]).reset_index(drop=True)


def _read(path: Path) -> pd.DataFrame:
    try:
        if path.suffix.lower() == ".json":
            held = parse_json(read_bytes(path, limit=MAX_TABLE))
            lists = [held] if isinstance(held, list) else [rows for rows in held.values() if isinstance(rows, list)]
            table = pd.DataFrame([row for rows in lists for row in rows if isinstance(row, dict)])
        else:
            table = read_table(path)
        require_numbers(table)
    except OSError as error:
        raise FitError(f"Cannot read the table {path}: {error.strerror}.") from None
    except (ContentError, AttributeError, ValueError) as error:
        why = f" ({error})" if isinstance(error, ContentError) else ""
        raise FitError(
            f"{path} is not a table in CSV or JSON{why}; `icl evaluate --checkpoint_base_dir` writes one."
        ) from None
    missing = [name for name in _COLUMNS if name not in table]
    if missing:
        raise FitError(
            f"{path} has no column {', '.join(missing)}; expected the table of `icl evaluate --checkpoint_base_dir`."
        )
    table["position"] = table["position"].astype(str)
    return table


def _headline(table: pd.DataFrame, distribution: str, quantity: str, path: Path) -> pd.DataFrame:
    """A quantity of every model: its mean over positions, or the query's where the set is about the query."""
    rows = table[(table["distribution"] == distribution) & (table["quantity"] == quantity)]
    if rows.empty:
        there = ", ".join(sorted(map(str, table["distribution"].unique())))
        raise FitError(f"{path} has no {quantity} on `{distribution}`; its distributions are {there}.")
    means = rows[rows["position"] == "mean"]
    return (rows if means.empty else means).groupby(_MODEL)[["value", "stderr"]].last()


def _full_span(rows: pd.DataFrame, quantity: str) -> pd.DataFrame:
    """The rows of the mean over positions; of the ICL score those from position 1 to the furthest."""
    if quantity != "icl_score":
        return rows[rows["position"] == "mean"]
    ends = rows["position"].str.extract(r"^1:(\d+)$")[0].astype(float)
    return rows[ends == ends.max()]


def _features(settings: Settings, inside: pd.DataFrame) -> list[str]:
    """The features asked for, or as many as the values of M allow; without those that are absent or constant."""
    usable = [name for name in FEATURES if inside[name].notna().all() and inside[name].nunique() > 1]
    if settings.features == "auto":
        return usable[: max(1, inside["num_tasks"].nunique() // GROUPS_PER_COEFFICIENT - 1)] or [FEATURES[0]]
    wanted = settings.features.split(",")
    unusable = [name for name in wanted if name not in usable]
    if unusable and len(inside) > 1:
        raise FitError(
            f"The feature `{unusable[0]}` is missing from the table or the same at every point; leave it out."
        )
    return wanted


def _fitted(features: np.ndarray, targets: np.ndarray, model_type: str) -> Pipeline:
    estimator: Any = LinearRegression()
    if model_type == "ridge":
        estimator = RidgeCV(alphas=_RIDGE_GRID)
    elif model_type == "lasso":
        folds = KFold(min(len(targets), 10), shuffle=True, random_state=0)
        largest = max(float(targets.std()), 1e-12)  # of standardised features; beyond it every coefficient is 0
        estimator = LassoCV(alphas=largest * _LASSO_GRID, cv=folds, max_iter=2000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # at the smallest penalties, which are then not chosen
        return make_pipeline(StandardScaler(), estimator).fit(features, targets)


def _slopes(model: Pipeline) -> np.ndarray:
    """Coefficients per unit of each feature, so that fits with other standardisations compare."""
    slopes: np.ndarray = model[-1].coef_ / model[0].scale_
    return slopes


def _validated(targets: np.ndarray, held_out: np.ndarray, means: np.ndarray, groups: np.ndarray) -> tuple[float, float]:
    """R2_cv and its standard error by resampling groups."""
    labels, places = np.unique(groups, return_inverse=True)
    missed, total = (np.bincount(places, weights=(targets - guess) ** 2) for guess in (held_out, means))
    if not total.sum() > 0:
        return float("nan"), float("nan")
    chosen = np.random.default_rng(0).integers(len(labels), size=(_NUM_RESAMPLES, len(labels)))
    totals = total[chosen].sum(1)
    ratios = missed[chosen].sum(1)[totals > 0] / totals[totals > 0]
    return float(1 - missed.sum() / total.sum()), float(ratios.std(ddof=1))


def _judge(r2_cv: float, stderr: float, count: int, num_features: int) -> tuple[str, list[str]]:
    reasons = []
    if count < FEW_GROUPS:
        reasons.append(f"only {count} values of M")
    if count < GROUPS_PER_COEFFICIENT * (num_features + 1):
        reasons.append(f"fewer than {GROUPS_PER_COEFFICIENT} values of M for each of {num_features + 1} numbers fitted")
    if not r2_cv > 0:
        return "invalid", ["held-out M are predicted no better than by the mean", *reasons]
    if r2_cv < 2 * stderr:
        reasons.insert(0, "the cross-validated R² is within two standard errors of zero")
    return ("suspect" if reasons else "ok"), reasons


def _table(points: pd.DataFrame, names: list[str], fitted: Fit, settings: Settings) -> pd.DataFrame:
    """Numbers of the fit, then of every point; the settings in columns of their own."""
    nan = float("nan")
    coefficients = zip(names, fitted.coefficients, fitted.stderr, strict=True)
    rows: list[dict[str, Any]] = [
        {"quantity": "r2", "value": fitted.r2, "stderr": nan},
        {"quantity": "r2_cv", "value": fitted.r2_cv, "stderr": fitted.r2_cv_stderr},
        {"quantity": "intercept", "value": fitted.intercept, "stderr": nan},
        {"quantity": "penalty", "value": fitted.penalty, "stderr": nan},
        *({"quantity": "coefficient", "item": name, "value": v, "stderr": e} for name, v, e in coefficients),
    ]
    for row in rows:
        row |= {"verdict": fitted.verdict, "reasons": "; ".join(fitted.reasons)}
    for point in points.to_dict("records"):
        of = {key: point[key] for key in _MODEL}
        rows.append(of | {"quantity": "measured", "value": point["target"], "stderr": point["target_stderr"]})
    inside = points[points["is_inside"]]
    for quantity, values in (("fitted", fitted.fitted), ("held_out", fitted.held_out)):
        pairs = zip(inside.to_dict("records"), values, strict=True)
        rows += [{key: point[key] for key in _MODEL} | {"quantity": quantity, "value": v} for point, v in pairs]
    table = pd.DataFrame(rows).assign(
        model_type=settings.model_type, target=settings.target, infinite=settings.infinite
    )
    columns = ["quantity", "item", *_MODEL, "value", "stderr", "verdict", "reasons", "model_type", "target", "infinite"]
    return table.reindex(columns=columns).astype({"step": "Int64"})


def _summary(points: pd.DataFrame, names: list[str], fitted: Fit, settings: Settings) -> list[str]:
    inside = points[points["is_inside"]]
    left = len(points) - len(inside)
    why = "; ".join(fitted.reasons)
    spare = f"; {left} outside the fit (M = inf, or a loss that is not finite)" if left else ""
    lines = [
        f"Verdict: {fitted.verdict}{f' ({why})' if why else ''}.",
        f"{settings.model_type} fit of the loss on `{settings.target}`: {len(inside)} models of "
        f"{inside['num_tasks'].nunique()} values of M{spare}.",
        f"R² {fitted.r2:.3f} in sample, {fitted.r2_cv:.3f} ± {fitted.r2_cv_stderr:.3f} leaving out one M at a time.",
        "Change of the loss per standard deviation of a feature (± jackknife standard error):",
    ]
    values = zip(names, fitted.coefficients, fitted.stderr, strict=True)
    lines += [f"  {name:16s}{value:>10.4g} ± {stderr:.2g}" for name, value, stderr in values]
    correlations = np.abs(np.corrcoef(inside[names].to_numpy(float), rowvar=False))
    if len(names) > 1 and np.triu(correlations, 1).max() > _STRONG_CORRELATION:
        lines.append("Some features are almost copies of each other, so their coefficients trade; read them together.")
    noise = float((inside["target_stderr"] ** 2).mean() / max(inside["target"].var(ddof=0), 1e-300))
    if noise > _MUCH_NOISE:
        lines.append(f"Measurement errors are {noise:.0%} of the variance of the loss; evaluate with more prompts.")
    return lines
