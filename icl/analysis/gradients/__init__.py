"""Gradients of the loss at every saved step, with respect to the weights and to the parameters of the data distribution.

- Kind `weights` (`icl.analysis.gradients.weights`): norm, noise trace and simple noise scale; the alignment of the
  gradients at consecutive saved steps, and of the gradients of single tasks. Each number is computed for all weights and
  for groups of parameters.
- Kind `data` (`icl.analysis.gradients.data`): the gradient of the expected loss with respect to the means and scales of x,
  w and the noise, by the pathwise estimator. Two other estimators serve as checks: the score function and finite differences.

For each kind there is a PCA of the gradients at all saved steps. scikit-learn chooses the sign of a component
such that its entry with the largest absolute value is positive.

All steps use the same prompts (streams `gradients/...` of `seeds.evaluation`), so differences between steps have small
errors. The loss is the training loss per target (squared error, or negative log-likelihood), averaged over positions. Standard
errors are over prompts. PC scores have no standard errors. `explained_share` is the share of the variance that a component
explains. Its verdict is `suspect` if estimation noise could be more than half of the variance.
"""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sklearn.decomposition import PCA

from icl import metrics
from icl.analysis import NotApplicableError
from icl.analysis.gradients import data as data_gradients
from icl.analysis.gradients import weights as weight_gradients
from icl.analysis.prompts import PromptSettings, fixed_prompts, require_multiple
from icl.analysis.run import Members, Result, as_table, over_checkpoints, setting
from icl.config import RunConfig
from icl.config.validation import require_count
from icl.metrics import Estimate
from icl.runs.measure import Entry, Measurement
from icl.tasks.prompts import training_pool

NUM_COMPONENTS = 3
TASK_BATCHES = 8
VERSION = 2
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Settings(PromptSettings):
    """Options of `icl analyse RUN --what gradients`."""

    num_prompts: int = setting(1024, "number of prompts for the gradients with respect to the weights")
    num_batches: int = setting(32, "number of batches into which the num_prompts prompts are split")
    num_compared_tasks: int = setting(8, "number of tasks whose gradients are compared; 0 compares none")
    num_task_prompts: int = setting(
        128, f"number of prompts for each of the compared tasks, split into {TASK_BATCHES} batches"
    )
    num_data_prompts: int = setting(2048, "number of prompts for the gradients with respect to the data distribution")

    def __post_init__(self) -> None:
        require_count("num_batches", self.num_batches, 3)
        require_count("num_compared_tasks", self.num_compared_tasks, 0)
        require_count("num_data_prompts", self.num_data_prompts, 16)
        require_multiple("num_prompts", self.num_prompts, self.num_batches)
        require_multiple("num_task_prompts", self.num_task_prompts, TASK_BATCHES)


def analyse(path: Path, settings: Settings) -> Result:
    """Compute gradients of both kinds at every saved step, and a PCA of each kind.

    Raises:
        CheckpointError: If there is no usable checkpoint.
    """
    measure = partial(measure_members, settings=settings)
    entries, config = over_checkpoints("gradients", path, settings, measure, version=VERSION, uses_predecessor=True)
    component_rows = _component_rows(entries, "weights") + _component_rows(entries, "data")
    return Result(as_table(entries, settings, whole_run=component_rows), _summary(entries, config))


def measure_members(members: Members, *, settings: Settings) -> list[Measurement]:
    """Return the rows of the table and the mean gradients of every checkpoint, except one that is only a predecessor (`Members.lead`).

    Raises:
        NotApplicableError: If tasks, inputs or noise are not Gaussian, or the pool of tasks changes.
    """
    if not members.config.task.is_usual:
        raise NotApplicableError(
            "`gradients` differentiates with respect to the means and scales of Gaussian tasks, inputs and noise, so it needs a run with the "
            "default `task.prior`, `task.noise`, `task.inputs` and `task.pool`."
        )
    weight_rows, weight_vectors = _measure_weights(members, settings)
    members = _without_lead(members)
    task_rows = _measure_tasks(members, settings)
    data_rows, data_vectors = _measure_data(members, settings)
    per_member = zip(weight_rows, task_rows, data_rows, weight_vectors, data_vectors, strict=True)
    return [Measurement([*a, *b, *c], {"weights": weights, "data": data}) for a, b, c, weights, data in per_member]


def principal_components(vectors: Float[np.ndarray, "S P"]) -> tuple[Float[np.ndarray, "S C"], Float[np.ndarray, " C"]]:
    """Return the scores of the centred vectors on at most three components, and the shares of variance explained.

    There are no components if there are fewer than two vectors, or if the vectors are all equal or not finite.
    """
    if len(vectors) < 2 or not np.isfinite(vectors).all() or np.allclose(vectors, vectors[0], atol=0):
        return np.zeros((len(vectors), 0)), np.zeros(0)
    model = PCA(n_components=min(NUM_COMPONENTS, *vectors.shape), svd_solver="full")
    scores = model.fit_transform(vectors.astype(np.float64))
    return scores, model.explained_variance_ratio_


def _measure_weights(members: Members, settings: Settings) -> tuple[list[list[Row]], list[np.ndarray]]:
    prompts = fixed_prompts(members, "gradients/weights", settings.distribution, settings.num_prompts)
    gradients = weight_gradients.batch_gradients(members.config.model, members.params, prompts, settings.num_batches)
    grams = weight_gradients.grams(gradients, gradients)
    batch_size = settings.num_prompts // settings.num_batches
    rows: list[list[Row]] = [[] for _ in members.checkpoints]
    for group, gram in grams.items():
        squared = weight_gradients.inner(gram)
        reasons = _doubts_about_norms(squared)
        _add(rows, "norm", group, weight_gradients.norm(squared), reasons)
        _add(rows, "squared_norm", group, weight_gradients.squared_norm(squared))
        _add(rows, "noise_trace", group, weight_gradients.noise_trace(gram, batch_size))
        _add(rows, "noise_scale", group, weight_gradients.noise_scale(gram, batch_size), reasons)
    if len(members.checkpoints) > 1:
        before = {name: gradient[:-1] for name, gradient in gradients.items()}
        after = {name: gradient[1:] for name, gradient in gradients.items()}
        for group, gram in weight_gradients.grams(before, after).items():
            sides = grams[group][:-1], grams[group][1:]
            reasons = _doubts_about_norms(*map(weight_gradients.inner, sides))
            _add(rows[1:], "alignment_previous", group, weight_gradients.alignment(gram, *sides), reasons)
    vectors = torch.cat([gradient.mean(1) for gradient in gradients.values()], dim=1).float().cpu().numpy()
    return rows[members.lead :], list(vectors[members.lead :])


def _measure_tasks(members: Members, settings: Settings) -> list[list[Row]]:
    """Measure the alignment between the gradients of single tasks, whose prompts have the same inputs and noise."""
    rows: list[list[Row]] = [[] for _ in members.checkpoints]
    task = members.config.task
    limit = math.inf if task.is_gaussian or settings.distribution == "true" else task.num_tasks
    count = int(min(settings.num_compared_tasks, limit))
    if count < 2:
        return rows
    prompts = fixed_prompts(members, "gradients/tasks", settings.distribution, settings.num_task_prompts)
    noise = prompts.ys - (prompts.xs * prompts.ws.unsqueeze(-2)).sum(-1)
    by_task = []
    for vector in training_pool(members.config, num_tasks=count, device=prompts.xs.device):
        single = prompts._replace(ys=(prompts.xs * vector).sum(-1) + noise)
        by_task.append(weight_gradients.batch_gradients(members.config.model, members.params, single, TASK_BATCHES))
    # `pop` frees each task's gradient as soon as it is copied.
    joined = {name: torch.cat([each.pop(name) for each in by_task], dim=1) for name in members.params}  # N QJ p
    for group, gram in weight_gradients.grams(joined, joined).items():
        between = gram.unflatten(-1, (count, -1)).unflatten(-3, (count, -1)).transpose(-3, -2)  # N Q Q J J
        reasons = _doubts_about_norms(weight_gradients.mean_squared_norm(between))
        _add(rows, "alignment_tasks", group, weight_gradients.task_alignment(between), reasons)
    return rows


def _measure_data(members: Members, settings: Settings) -> tuple[list[list[Row]], list[np.ndarray]]:
    by_estimator = data_gradients.estimates(members, settings.distribution, settings.num_data_prompts)
    means = {name: metrics.position_mean(values) for name, values in by_estimator.items()}  # over prompts: N 6
    reasons = data_gradients.doubts_about_pathwise(**by_estimator)
    rows: list[list[Row]] = [[] for _ in members.checkpoints]
    for index, name in enumerate(data_gradients.PARAMETERS):
        for estimator, mean in means.items():
            estimate = Estimate(mean.value[:, index], mean.stderr[:, index])
            doubts = [member[index] for member in reasons] if estimator == "pathwise" else None
            _add(rows, "gradient", name, estimate, doubts, kind="data", estimator=estimator)
    return rows, list(means["pathwise"].value.cpu().numpy())


def _doubts_about_norms(*squares: weight_gradients.WithDeleted) -> list[str]:
    """Return for each checkpoint the reason to doubt numbers computed from these squared norms; empty if there is none."""
    estimates = [weight_gradients.squared_norm(square) for square in squares]
    is_known = torch.stack([estimate.value > 3 * estimate.stderr for estimate in estimates]).all(0)
    reason = "a squared gradient norm is less than three standard errors above zero"
    return ["" if known else reason for known in is_known.tolist()]


def _component_rows(entries: list[Entry], kind: str) -> list[Row]:
    """Return the PC scores of every step, and the explained shares of the whole run."""
    vectors = np.stack([entry.arrays[kind] for entry in entries])
    scores, shares = principal_components(vectors)
    noise = _noise_share(entries, vectors, kind)
    reason = f"estimation noise may be up to {noise:.0%} of the variance between steps" if noise > 0.5 else ""
    rows = []
    for component, share in enumerate(shares.tolist()):
        item = f"PC{component + 1}"
        for entry, score in zip(entries, scores[:, component].tolist(), strict=True):
            checkpoint = {"step": entry.step, "checkpoint_hash": entry.checkpoint_hash}
            rows.append(checkpoint | _row(kind, "pc_score", item, score, math.nan, ""))
        rows.append(_row(kind, "explained_share", item, share, math.nan, reason))
    return rows


def _noise_share(entries: list[Entry], vectors: np.ndarray, kind: str) -> float:
    """Return the summed squared errors of the gradients at all steps, divided by their summed squared deviations from the mean over steps.

    All steps use the same prompts, so part of their errors is the same at every step and does not contribute to the variance
    between steps. The ratio is therefore an upper bound on the share of noise in this variance.
    """
    between = float(((vectors - vectors.mean(0)) ** 2).sum())
    within = 0.0
    for entry in entries:
        if kind == "data":
            within += sum(row["stderr"] ** 2 for row in entry.rows if row["estimator"] == "pathwise")
        else:
            unbiased = next(
                row["value"] for row in entry.rows if (row["quantity"], row["item"]) == ("squared_norm", "all")
            )
            within += max(0.0, float((entry.arrays[kind].astype(np.float64) ** 2).sum()) - unbiased)
    return within / between if between > 0 else math.inf


def _summary(entries: list[Entry], config: RunConfig) -> list[str]:
    rows = [row for entry in entries for row in entry.rows]
    last = {(row["quantity"], row["item"], row["estimator"]): row for row in entries[-1].rows}
    lines = [f"At step {entries[-1].step:,}, the last of {len(entries)} saved steps:"]
    for quantity in ("norm", "noise_scale", "alignment_previous", "alignment_tasks"):
        row = last.get((quantity, "all", ""))
        if row is not None:
            limit = _limit(last, quantity) if row["verdict"] != "ok" else ""
            lines.append(f"  {quantity:20s} {limit or _value_text(row)}")
    lines += [
        f"  dE[loss]/d {name:12s}{_value_text(last['gradient', name, 'pathwise'])}"
        for name in data_gradients.PARAMETERS
    ]
    lines.append(f"  (± standard error; training batch size {config.trainer.batch_size:,})")
    pathwise = [row["verdict"] for row in rows if row["estimator"] == "pathwise"]
    lines.append(f"Pathwise gradients that disagree with a check: {_num_doubtful(pathwise)} of {len(pathwise)}.")
    scales = [row["verdict"] for row in rows if row["quantity"] == "noise_scale"]
    lines.append(f"Suspect noise scales: {_num_doubtful(scales)} of {len(scales)}.")
    return lines


def _num_doubtful(verdicts: list[str]) -> int:
    return sum(verdict != "ok" for verdict in verdicts)


def _limit(last: dict[tuple[str, str, str], Row], quantity: str) -> str:
    """Return a phrase for the summary about a quantity that is `suspect` for all weights together.

    The phrase gives a bound at two standard errors, or says why the value is unknown. It is empty if there is no bound and the value is finite.
    """
    row, square, trace = (last[name, "all", ""] for name in (quantity, "squared_norm", "noise_trace"))
    most = max(square["value"], 0.0) + 2 * square["stderr"]
    if quantity == "norm" and math.isfinite(most):
        return f"at most {most**0.5:.4g} (two standard errors): noise dominates the gradient"
    if quantity == "noise_scale" and 0 < most < math.inf:
        return f"at least {trace['value'] / most:.4g} (two standard errors): noise dominates the gradient"
    return "" if math.isfinite(row["value"]) else f"unknown: {row['reasons']}"


def _value_text(row: Row) -> str:
    doubt = f"   {row['verdict']}: {row['reasons']}" if row["verdict"] != "ok" else ""
    return f"{row['value']:>10.4g} ± {row['stderr']:.2g}{doubt}"


def _add(
    rows: list[list[Row]],
    quantity: str,
    item: str,
    estimate: Estimate,
    reasons: list[str] | None = None,
    *,
    kind: str = "weights",
    estimator: str = "",
) -> None:
    """Append a row to the rows of every checkpoint."""
    values = zip(rows, estimate.value.tolist(), estimate.stderr.tolist(), reasons or [""] * len(rows), strict=True)
    for member_rows, value, stderr, reason in values:
        member_rows.append(_row(kind, quantity, item, value, stderr, reason, estimator))


def _row(kind: str, quantity: str, item: str, value: float, stderr: float, reason: str, estimator: str = "") -> Row:
    if quantity not in ("pc_score", "explained_share") and not (math.isfinite(value) and math.isfinite(stderr)):
        no_density = "this parameter's distribution has no density, so the score does not exist"
        reason = reason or (no_density if estimator == "score_function" else "the value or its error is not finite")
    return {
        "kind": kind,
        "quantity": quantity,
        "item": item,
        "estimator": estimator,
        "value": value,
        "stderr": stderr,
        "verdict": "suspect" if reason else "ok",
        "reasons": reason,
    }


def _without_lead(members: Members) -> Members:
    """Return the members, without the first checkpoint if it is only the predecessor of the second (`Members.lead`)."""
    lead = members.lead
    params = {name: tensor[lead:] for name, tensor in members.params.items()}
    return members._replace(checkpoints=members.checkpoints[lead:], params=params, lead=0)
