"""Gradients at every saved step, of two kinds: in the weights, and in the parameters of the data distribution.

Kind `weights` (`icl.analysis.gradients.weights`): norm, noise trace and simple noise scale, overall and for each group of
parameters; alignment with the previous saved step's gradient and between the gradients of single tasks. Kind `data`
(`icl.analysis.gradients.data`): the gradient of the expected loss in the means and scales of x, w and the noise, by the
pathwise estimator, checked by the score function and by finite differences. Of each kind a PCA over the saved steps: the
gradients, centred, as points; component k's sign is scikit-learn's, which is fixed by its largest entry.

All steps see the same prompts, streams `gradients/...` of `seeds.evaluation`, so their differences have small errors. The
loss is per target, the mean over positions. Standard errors are over prompts. PC scores have none; `explained_share` is
`suspect` where estimation noise could make up more than half of the variance.
"""

import math
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from sklearn.decomposition import PCA
from torch import Tensor

from icl import metrics, rng
from icl.analysis.gradients import data as data_gradients
from icl.analysis.gradients import weights as weight_gradients
from icl.analysis.prompts import fixed_prompts, prompts_at_once
from icl.analysis.run import Members, Result, as_table, over_checkpoints
from icl.config import RunConfig
from icl.measure import Entry, Measurement
from icl.metrics import Estimate
from icl.stacked import apply
from icl.tasks.priors import task_pool
from icl.tasks.prompts import prompt_source
from icl.validation import ConfigError

NUM_COMPONENTS = 3
TASK_BATCHES = 8
VERSION = 2
_FD_STEP = {torch.float64: 1e-5, torch.float32: 1e-2}
_FD_PROMPTS = 64
_MAX_Z = 5.0
"""Standard errors by which two estimators of one gradient may differ: a run makes hundreds of comparisons."""

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What `icl analyse RUN --what gradients` can be told."""

    distribution: Literal["pretrain", "true"] = field(
        default="pretrain", metadata={"help": "tasks of the prompts: the run's M, or new ones"}
    )
    num_prompts: int = field(default=1024, metadata={"help": "prompts of the weight gradients"})
    num_batches: int = field(default=32, metadata={"help": "batches that they are cut into"})
    num_compared_tasks: int = field(default=8, metadata={"help": "tasks whose gradients are compared; 0 for none"})
    num_task_prompts: int = field(
        default=128, metadata={"help": f"prompts for each of these tasks, in {TASK_BATCHES} batches"}
    )
    num_data_prompts: int = field(default=2048, metadata={"help": "prompts of the data gradients"})

    def __post_init__(self) -> None:
        for name, least in (("num_batches", 3), ("num_compared_tasks", 0), ("num_data_prompts", 16)):
            if getattr(self, name) < least:
                raise ConfigError(f"`{name}` must be at least {least}, got {getattr(self, name)}.")
        for name, count in (("num_prompts", self.num_batches), ("num_task_prompts", TASK_BATCHES)):
            value = getattr(self, name)
            if value < count or value % count:
                raise ConfigError(f"`{name}` must be a multiple of {count}, the number of its batches, got {value}.")


def analyse(path: Path, settings: Settings) -> Result:
    """Both kinds at every saved step, and the two PCAs.

    Raises:
        CheckpointError: If there is no usable checkpoint.
    """
    measure = partial(measure_members, settings=settings)
    entries, config = over_checkpoints("gradients", path, settings, measure, version=VERSION, uses_predecessor=True)
    principal = [row for kind in ("weights", "data") for row in _component_rows(entries, kind)]
    table = as_table(entries, settings, whole_run=principal)
    return Result(table, _summary(entries, config))


def measure_members(members: Members, *, settings: Settings) -> list[Measurement]:
    """The rows of every member after the lead, and its two mean gradients."""
    weight_rows, weight_vectors = _measure_weights(members, settings)
    data_rows, data_vectors = _measure_data(members, settings)
    for rows, tasks in zip(weight_rows, _measure_tasks(members, settings), strict=True):
        rows += tasks
    pairs = zip(weight_rows, data_rows, weight_vectors, data_vectors, strict=True)
    return [Measurement([*a, *b], {"weights": v, "data": w}) for a, b, v, w in pairs]


def principal_components(vectors: Float[np.ndarray, "S P"]) -> tuple[Float[np.ndarray, "S C"], Float[np.ndarray, " C"]]:
    """The scores of centred vectors on their first components (at most three), and the shares of variance explained."""
    if len(vectors) < 2 or not np.isfinite(vectors).all() or np.allclose(vectors, vectors[0]):
        return np.zeros((len(vectors), 0)), np.zeros(0)
    model = PCA(n_components=min(NUM_COMPONENTS, *vectors.shape), svd_solver="full")
    scores = model.fit_transform(vectors.astype(np.float64))
    return scores, model.explained_variance_ratio_


def _measure_weights(members: Members, settings: Settings) -> tuple[list[list[Row]], list[np.ndarray]]:
    prompts = fixed_prompts(
        members, stream="gradients/weights", distribution=settings.distribution, count=settings.num_prompts
    )
    gradients = weight_gradients.batch_gradients(members.config.model, members.params, prompts, settings.num_batches)
    grams = weight_gradients.grams(gradients, gradients)
    batch_size = settings.num_prompts // settings.num_batches
    rows: list[list[Row]] = [[] for _ in members.checkpoints]
    for group, gram in grams.items():
        squared = weight_gradients.inner(gram)
        judged = _judge_squares(squared)
        _add(rows, "norm", group, weight_gradients.norm(squared), judged)
        _add(rows, "squared_norm", group, weight_gradients.squared_norm(squared))
        _add(rows, "noise_trace", group, weight_gradients.noise_trace(gram, batch_size))
        _add(rows, "noise_scale", group, weight_gradients.noise_scale(gram, batch_size), judged)
    if len(members.checkpoints) > 1:
        before = {name: gradient[:-1] for name, gradient in gradients.items()}
        after = {name: gradient[1:] for name, gradient in gradients.items()}
        for group, gram in weight_gradients.grams(before, after).items():
            sides = grams[group][:-1], grams[group][1:]
            judged = _judge_squares(*map(weight_gradients.inner, sides))
            _add(rows[1:], "alignment_previous", group, weight_gradients.alignment(gram, *sides), judged)
    vectors = torch.cat([gradient.mean(1) for gradient in gradients.values()], dim=1).float().cpu().numpy()
    return rows[members.lead :], list(vectors[members.lead :])


def _measure_tasks(members: Members, settings: Settings) -> list[list[Row]]:
    """The alignment between gradients of single tasks, all on the same inputs and noise."""
    own = _without_lead(members)
    rows: list[list[Row]] = [[] for _ in own.checkpoints]
    task, seed = own.config.task, own.config.seeds.tasks
    limit = math.inf if task.is_gaussian or settings.distribution == "true" else task.num_tasks
    count = int(min(settings.num_compared_tasks, limit))
    if count < 2:
        return rows
    prompts = fixed_prompts(
        own, stream="gradients/tasks", distribution=settings.distribution, count=settings.num_task_prompts
    )
    noise = prompts.ys - (prompts.xs * prompts.ws.unsqueeze(-2)).sum(-1)
    gradients = []
    for vector in task_pool(count, task.task_size, seed, device=prompts.xs.device):
        single = prompts._replace(ys=(prompts.xs * vector).sum(-1) + noise)
        gradients.append(weight_gradients.batch_gradients(own.config.model, own.params, single, TASK_BATCHES))
    joined = {name: torch.cat([one.pop(name) for one in gradients], dim=1) for name in own.params}  # N QJ p
    for group, gram in weight_gradients.grams(joined, joined).items():
        between = gram.unflatten(-1, (count, -1)).unflatten(-3, (count, -1)).transpose(-3, -2)  # N Q Q J J
        judged = _judge_squares(weight_gradients.mean_squared_norm(between))
        _add(rows, "alignment_tasks", group, weight_gradients.task_alignment(between), judged)
    return rows


def _measure_data(members: Members, settings: Settings) -> tuple[list[list[Row]], list[np.ndarray]]:
    own = _without_lead(members)
    draws = _draws(own, settings.distribution, settings.num_data_prompts)
    dtype, count = draws.inputs.dtype, len(own.checkpoints)
    params = {name: tensor.to(dtype) for name, tensor in own.params.items()}
    predict = partial(apply, own.config.model, params)
    at = data_gradients.training_point(own.config.task.noise_variance).to(draws.inputs)
    pathwise, losses = [], []
    size = max(1, prompts_at_once(own) // len(own.checkpoints))
    for start in range(0, settings.num_data_prompts, size):
        batch = draws.part(start, start + size)
        found_here = data_gradients.pathwise(predict, batch, at.expand(count, len(batch.tasks), 6))
        pathwise.append(found_here[0])
        losses.append(found_here[1])
    few = draws.part(0, _FD_PROMPTS)
    everywhere = at.expand(count, len(few.tasks), 6)
    is_pool = settings.distribution == "pretrain" and not own.config.task.is_gaussian
    found = {
        "pathwise": torch.cat(pathwise, dim=1),
        "score_function": data_gradients.score_function(torch.cat(losses, dim=1), draws, at, is_pool=is_pool),
        "finite_difference": data_gradients.finite_difference(predict, few, everywhere, step=_FD_STEP[dtype]).detach(),
    }
    means = {name: metrics.position_mean(values) for name, values in found.items()}  # over prompts: N 6
    verdicts = _judge_data(found)
    rows: list[list[Row]] = [[] for _ in own.checkpoints]
    for index, name in enumerate(data_gradients.PARAMETERS):
        for estimator, mean in means.items():
            estimate = Estimate(mean.value[:, index], mean.stderr[:, index])
            judged = verdicts[index] if estimator == "pathwise" else None
            _add(rows, "gradient", name, estimate, judged, kind="data", estimator=estimator)
    return rows, list(means["pathwise"].value.cpu().numpy())


def _judge_squares(*squares: weight_gradients.WithDeleted) -> list[str]:
    """What is made of squared norms is only as good as they are."""
    estimates = [weight_gradients.squared_norm(square) for square in squares]
    known = torch.stack([one.value > 3 * one.stderr for one in estimates]).all(0)
    return ["" if fine else "a squared gradient is not three standard errors above zero" for fine in known.tolist()]


def _judge_data(found: dict[str, Tensor]) -> list[list[str]]:
    """For each parameter and member, why the pathwise estimate is in doubt."""
    pathwise, scores, differences = found["pathwise"], found["score_function"], found["finite_difference"]
    paired = metrics.position_mean(pathwise - scores)
    far = paired.value.abs() > _MAX_Z * paired.stderr  # false where the score function is NaN
    short = metrics.position_mean(pathwise[:, : differences.shape[1]] - differences)
    size = differences.abs().mean(1)
    wrong = short.value.abs() > (_MAX_Z * short.stderr).clamp(min=1e-9) + 1e-3 * size
    reasons = []
    for index in range(pathwise.shape[-1]):
        own = []
        for is_far, is_wrong in zip(far[:, index].tolist(), wrong[:, index].tolist(), strict=True):
            named = (("the score function disagrees", is_far), ("finite differences disagree", is_wrong))
            own.append("; ".join(text for text, holds in named if holds))
        reasons.append(own)
    return reasons


def _component_rows(entries: list[Entry], kind: str) -> list[Row]:
    """PC scores of every step, and the explained shares, which belong to no step."""
    vectors = np.stack([entry.arrays[kind] for entry in entries])
    scores, shares = principal_components(vectors)
    noise = _noise_share(entries, vectors, kind)
    reason = f"estimation noise may be up to {noise:.0%} of the variance between steps" if noise > 0.5 else ""
    rows = []
    for component in range(len(shares)):
        item = f"PC{component + 1}"
        for entry, score in zip(entries, scores[:, component], strict=True):
            at = {"step": entry.step, "checkpoint_hash": entry.checkpoint_hash}
            rows.append(at | _row(kind, "pc_score", item, float(score), math.nan, ""))
        rows.append(_row(kind, "explained_share", item, float(shares[component]), math.nan, reason))
    return rows


def _noise_share(entries: list[Entry], vectors: np.ndarray, kind: str) -> float:
    """The variance of the estimates at one step over the variance between steps; an upper bound, as steps share prompts."""
    between = float(((vectors - vectors.mean(0)) ** 2).sum())
    within = 0.0
    for entry in entries:
        if kind == "data":
            within += sum(row["stderr"] ** 2 for row in entry.rows if row["estimator"] == "pathwise")
        else:
            found = {
                row["quantity"]: row["value"] for row in entry.rows if row["item"] == "all" and row["kind"] == kind
            }
            within += max(0.0, float((entry.arrays[kind].astype(np.float64) ** 2).sum()) - found["squared_norm"])
    return within / between if between > 0 else math.inf


def _summary(entries: list[Entry], config: RunConfig) -> list[str]:
    rows = [row for entry in entries for row in entry.rows]
    doubtful = [row for row in rows if row["verdict"] != "ok"]
    last = {(row["quantity"], row["item"], row["estimator"]): row for row in entries[-1].rows}
    lines = [f"Step {entries[-1].step:,}, the last of {len(entries)}:"]
    for quantity in ("norm", "noise_scale", "alignment_previous", "alignment_tasks"):
        row = last.get((quantity, "all", ""))
        if row is not None:
            limit = _limit(last, quantity) if row["verdict"] != "ok" else ""
            lines.append(f"  {quantity:20s} {limit or _told(row)}")
    lines += [
        f"  dE[loss]/d {name:12s}{_told(last['gradient', name, 'pathwise'])}" for name in data_gradients.PARAMETERS
    ]
    lines.append(f"  (training batch size {config.trainer.batch_size:,}; bars are standard errors)")
    checks = sum(row["estimator"] == "pathwise" for row in rows)
    failed = sum(row["estimator"] == "pathwise" for row in doubtful)
    lines.append(f"Pathwise gradients that their checks dispute: {failed} of {checks}.")
    scales = [row for row in rows if row["quantity"] == "noise_scale"]
    lines.append(f"Noise scales in doubt: {sum(row['verdict'] != 'ok' for row in scales)} of {len(scales)}.")
    return lines


def _limit(last: dict[tuple[str, str, str], Row], quantity: str) -> str:
    """What noise leaves of a quantity of all weights, at two standard errors, as the figure draws it; nothing if it is known."""
    row, square, trace = (last[name, "all", ""] for name in (quantity, "squared_norm", "noise_trace"))
    most = max(square["value"], 0.0) + 2 * square["stderr"]
    if quantity == "norm" and math.isfinite(most):
        return f"at most {most**0.5:.4g}, at two standard errors: noise drowns the gradient"
    if quantity == "noise_scale" and 0 < most < math.inf:
        return f"at least {trace['value'] / most:.4g}, at two standard errors: noise drowns the gradient"
    return "" if math.isfinite(row["value"]) else f"not known: {row['reasons']}"


def _told(row: Row) -> str:
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
    """A row for every member."""
    values = zip(rows, estimate.value.tolist(), estimate.stderr.tolist(), reasons or [""] * len(rows), strict=True)
    for own, value, stderr, reason in values:
        own.append(_row(kind, quantity, item, value, stderr, reason, estimator))


def _row(kind: str, quantity: str, item: str, value: float, stderr: float, reason: str, estimator: str = "") -> Row:
    if quantity not in ("pc_score", "explained_share") and not (math.isfinite(value) and math.isfinite(stderr)):
        reason = reason or ("no density to differentiate" if estimator == "score_function" else "not finite")
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
    """The same without the predecessor."""
    lead = members.lead
    params = {name: tensor[lead:] for name, tensor in members.params.items()}
    return members._replace(checkpoints=members.checkpoints[lead:], params=params, lead=0)


def _draws(members: Members, distribution: Literal["pretrain", "true"], count: int) -> data_gradients.Draws:
    """Standard inputs, tasks and noise, in float64 where the device has it."""
    device = next(iter(members.params.values())).device
    source = prompt_source(members.config, stream="gradients/data", distribution=distribution)
    prompts = source.sample(range(1), range(count), device=device)
    zero, indices = torch.zeros(1, dtype=torch.int64, device=device), torch.arange(count, device=device)
    noise = rng.normal(source.noise_key, zero, indices, source.max_examples)
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return data_gradients.Draws(*(tensor[0].to(dtype) for tensor in (prompts.xs, prompts.ws, noise)))
