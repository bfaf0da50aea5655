"""Behaviour of a run at every saved step: losses and scores, gaps to ridge and dMMSE, losses on new tasks, task vectors.

Every number is measured on fixed prompts of the training tasks (`pretrain`) and of new tasks (`true`), and has a standard error
over prompts. The prompts and the names of the quantities are the same as in `icl evaluate`. Rows of the table, by `quantity`:

- `loss`: the mean squared error at each position, and averaged over positions (`mean`).
- `bayes_excess`: the loss minus the loss of the Bayes predictor.
- `icl_score`: loss(k2) - loss(k1) with k1 < k2, negative if more examples help. (Hoogland et al. 2024 print the
  opposite sign.)
- `prior_zero`, `prior_task_mean`: the prior-task scores. Each is the mean squared difference between the predictions of the model and of a
  predictor that uses only the prior. For `prior_zero`, this predictor always predicts 0; for `prior_task_mean`, it predicts with the mean
  task. There is a row for each position, for the `mean` over positions and for the `sum`. The figure of Hoogland et al. shows the sum, for
  finite M.
- `delta_ridge`, `delta_dmmse`: mean squared difference, per target, between the predictions of the model and of ridge or dMMSE.
  (Raventos et al. 2023 also divide by D.) `delta_difference` is delta_ridge - delta_dmmse. It is positive if the model is closer
  to dMMSE.
- `cosine`, `norm_ratio`: comparison of the model's task vector with the true task (`icl.analysis.behaviour.task_vectors`), on
  the first `num_probe_prompts` prompts of each set.
- `loss_over_g2`, `size_ratio`: loss and size of predictions when inputs (`input_scale`) or tasks (`task_scale`) are multiplied
  by g (column `scale`; see `icl.analysis.behaviour.ood_curves`). Both quantities use new tasks. They are computed only at `num_ood_steps`
  saved steps, spread evenly in log(t + 1).

The column `predictor` is `model`, or the name of a baseline that is given for comparison.

Some rows describe the whole run (`icl.analysis.behaviour.turning_points`). These rows have a verdict with reasons. If the value
is a step, `lower` and `upper` are the saved steps between which it lies.

- `prior_zero_minimum_step`, `prior_task_mean_minimum_step`: the step at which the score `prior_zero` or `prior_task_mean` is lowest on
  `pretrain`.
- `crossing_step`: the step at which delta_difference changes sign (finite M only). `finding` says which of ridge and dMMSE
  is closer to the model after this step.
- `critical_step`, `rise`, `dip`: the transience of ridge (Carroll et al. 2025). The critical step (t_crit in the paper) is the
  saved step with the lowest loss on new tasks. The rise is the increase of this loss from t_crit to the last saved step. The dip says how
  close the loss at t_crit came to the loss of ridge.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from icl import baselines, metrics
from icl.analysis.behaviour import ood_curves, task_vectors
from icl.analysis.behaviour.findings import findings, summary
from icl.analysis.behaviour.ood_curves import CurveSettings
from icl.analysis.prompts import fixed_prompts
from icl.analysis.run import Members, Result, as_table, over_checkpoints, setting
from icl.config import RunConfig
from icl.config.validation import require, require_count
from icl.evaluation.predictors import predict_prompts
from icl.evaluation.scores import evaluate_predictions
from icl.evaluation.sets import REPORT, EvaluationSet, evaluation_set
from icl.metrics import Estimate
from icl.model.stacked import Params, apply
from icl.runs.checkpoints import checkpoint_files
from icl.runs.measure import Entry, Measurement
from icl.tasks.prompts import Prompts, noise_law, sample_prompts, training_pool

VERSION = 3
"""Version of the measurements. Results of older versions are computed again. Version 2 uses the fixed prompts for reports
(`icl.evaluation.sets.REPORT`); version 1 used other prompts. Version 3 leaves out prompts whose task is zero in `cosine` and
`norm_ratio`."""
SETS = ("pretrain", "true")
REFERENCES = ("ridge", "dmmse", "zero")
"""Baselines that are measured on the same prompts, for comparison."""

Row = dict[str, Any]
Baseline = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """Settings of the measurements at every saved step. If they change, all steps are measured again."""

    num_prompts: int = setting(1024, "number of prompts in each set")
    num_probe_prompts: int = setting(64, "number of prompts in each set that are used for the task vectors")

    def __post_init__(self) -> None:
        limits = f"between 2 and `num_prompts` = {self.num_prompts}"
        is_inside = 2 <= self.num_probe_prompts <= self.num_prompts
        require(is_inside, f"`num_probe_prompts` must be {limits}, got {self.num_probe_prompts}.")


@dataclass(frozen=True, kw_only=True)
class Settings(StepSettings, CurveSettings):
    """Options of `icl analyse RUN --what behaviour`."""

    num_ood_steps: int = setting(
        8, "number of saved steps at which losses are computed with inputs or tasks multiplied by g"
    )

    def __post_init__(self) -> None:
        StepSettings.__post_init__(self)
        CurveSettings.__post_init__(self)
        require_count("num_ood_steps", self.num_ood_steps, 1)


def analyse(path: Path, settings: Settings) -> Result:
    """Measure every saved step, compute the curves against the multiplier g at some steps, and find the turning points.

    Raises:
        CheckpointError: If there is no usable checkpoint.
    """
    files = checkpoint_files(path)
    step_settings = StepSettings(num_prompts=settings.num_prompts, num_probe_prompts=settings.num_probe_prompts)
    measure = partial(measure_members, settings=step_settings)
    entries, config = over_checkpoints("behaviour", path, step_settings, measure, version=VERSION, files=files)
    sets = evaluation_sets(config, settings.num_prompts, "cpu")
    found = findings(entries, sets)
    whole_run = [*found, *_reference_rows(config, sets, settings)]
    curves: list[Entry] = []
    if settings.num_scales:
        curve_settings = CurveSettings(num_scales=settings.num_scales, num_ood_prompts=settings.num_ood_prompts)
        chosen = [files[index] for index in spread([entry.step for entry in entries], settings.num_ood_steps)]
        measure = partial(measure_curves, settings=curve_settings)
        curves, _ = over_checkpoints("behaviour-ood", path, curve_settings, measure, version=VERSION, files=chosen)
    return Result(as_table([*entries, *curves], settings, whole_run=whole_run), summary(entries, found))


def measure_members(members: Members, *, settings: StepSettings) -> list[Measurement]:
    """Return the rows of every checkpoint, and arrays with the loss, the scores and delta_difference of every single prompt."""
    device = str(next(iter(members.params.values())).device)
    predict = partial(predict_prompts, partial(apply, members.config.model), members.params)
    rows: list[list[Row]] = [[] for _ in members.checkpoints]
    arrays: list[dict[str, np.ndarray]] = [{} for _ in members.checkpoints]
    for prompt_set in evaluation_sets(members.config, settings.num_prompts, device):
        name, few = prompt_set.name, _first_prompts(prompt_set, settings.num_probe_prompts)
        weights = task_vectors.effective_weights(predict, few)  # N B K D
        for index, predictions in enumerate(predict(prompt_set.prompts)):
            rows[index] += [*set_rows(prompt_set, predictions), *_task_vector_rows(name, weights[index], few.ws)]
            for quantity, values in prompt_numbers(prompt_set, predictions).items():
                arrays[index][f"{name}/{quantity}"] = values.cpu().numpy()
    return list(map(Measurement, rows, arrays))


def measure_curves(members: Members, *, settings: CurveSettings) -> list[Measurement]:
    """Measure the loss and the size of predictions of every checkpoint when inputs or tasks are multiplied by g."""
    prompts = fixed_prompts(members, "true", "true", settings.num_ood_prompts, step=REPORT)
    predict = partial(apply, members.config.model)
    by_member = ood_curves.curve_rows(predict, members.params, prompts, ood_curves.scales(settings.num_scales))
    return [Measurement([{"predictor": "model"} | row for row in rows]) for rows in by_member]


@lru_cache(maxsize=2)
def evaluation_sets(config: RunConfig, num_prompts: int, device: str) -> list[EvaluationSet]:
    """Return the two sets of prompts with their baselines. All checkpoints of a run share these sets."""
    return [evaluation_set(config, name, num_prompts=num_prompts, device=device) for name in SETS]


def set_rows(
    prompt_set: EvaluationSet, predictions: Float[Tensor, "B K"], *, predictor: str = "model"
) -> Iterator[Row]:
    """Yield losses, scores and gaps of one predictor on one set of prompts."""
    for row in evaluate_predictions(prompt_set, predictions.unsqueeze(0))[0]:
        yield {"predictor": predictor} | row
        if row["quantity"].startswith("prior") and row["position"] == "mean":
            count = predictions.shape[-1]
            total = {"position": "sum", "value": count * row["value"], "stderr": count * row["stderr"]}
            yield {"predictor": predictor} | row | total
    difference = prompt_numbers(prompt_set, predictions).get("delta_difference")
    if difference is not None:
        estimate = metrics.overall_mean(difference.unsqueeze(-1))
        yield _row("delta_difference", prompt_set.name, "mean", estimate, predictor)


def prompt_numbers(prompt_set: EvaluationSet, predictions: Float[Tensor, "B K"]) -> dict[str, Float[Tensor, " B"]]:
    """Return loss, prior-task scores and delta_difference of every single prompt, averaged over positions."""
    gaps = {
        name: metrics.squared_error(predictions, reference).mean(-1) for name, reference in prompt_set.baselines.items()
    }
    numbers = {"loss": metrics.squared_error(predictions, prompt_set.prompts.ys).mean(-1)}
    numbers |= {f"prior_{name}": gaps[name] for name in ("zero", "task_mean") if name in gaps}
    if "dmmse" in gaps:
        numbers["delta_difference"] = gaps["ridge"] - gaps["dmmse"]
    return numbers


def spread(steps: Sequence[int], count: int) -> list[int]:
    """Return the indices of up to `count` steps that are evenly spaced in log(t + 1).

    They include the first and the last step. If `count` is 1, only the last step is included.
    """
    logs = np.log1p(np.array(steps, dtype=float))
    targets = np.linspace(logs[0], logs[-1], count) if count > 1 else logs[-1:]
    return sorted({int(np.abs(logs - target).argmin()) for target in targets})


def _reference_rows(config: RunConfig, sets: Sequence[EvaluationSet], settings: Settings) -> Iterator[Row]:
    """Yield the rows of the baselines, measured on the same prompts."""
    predictors = _baseline_functions(config)
    for prompt_set in sets:
        for name in (name for name in REFERENCES if name in prompt_set.baselines):
            yield from set_rows(prompt_set, prompt_set.baselines[name], predictor=name)
        few = _first_prompts(prompt_set, settings.num_probe_prompts)
        for name in ("ridge", "dmmse") if prompt_set.name == "pretrain" else ("ridge",):
            if name in predictors:
                weights = task_vectors.effective_weights(partial(_predict, predictors[name]), few)
                yield from _task_vector_rows(prompt_set.name, weights, few.ws, predictor=name)
    if settings.num_scales:
        prompts = sample_prompts(config, stream="true", step=REPORT, batch_size=settings.num_ood_prompts)
        factors = ood_curves.scales(settings.num_scales)
        for name in ("ridge", "zero"):
            (rows,) = ood_curves.curve_rows(partial(_predict_as_member, predictors[name]), {}, prompts, factors)
            yield from ({"predictor": name} | row for row in rows)


def _first_prompts(prompt_set: EvaluationSet, count: int) -> Prompts:
    return Prompts(*(tensor[:count] for tensor in prompt_set.prompts))


def _predict(function: Baseline, prompts: Prompts) -> Tensor:
    return function(prompts.xs, prompts.ys)


def _predict_as_member(function: Baseline, _: Params, xs: Tensor, ys: Tensor) -> Tensor:
    """Return the predictions of a baseline with a leading axis of length 1, as for one checkpoint. The parameters are ignored."""
    return function(xs, ys).unsqueeze(0)


def _baseline_functions(config: RunConfig) -> dict[str, Baseline]:
    """Return the baselines as functions of xs and ys."""
    task = config.task
    ridge = partial(baselines.ridge, noise_variance=task.noise_variance) if task.noise_variance > 0 else baselines.ols
    functions: dict[str, Baseline] = {"ridge": ridge, "zero": baselines.zero}
    if not task.is_gaussian:
        tasks, noise = training_pool(config), noise_law(config)
        functions["dmmse"] = partial(baselines.dmmse, tasks=tasks, noise_variance=task.noise_variance, noise=noise)
    return functions


def _task_vector_rows(
    name: str, weights: Float[Tensor, "B K D"], ws: Float[Tensor, "B D"], *, predictor: str = "model"
) -> Iterator[Row]:
    for quantity, (positions, mean) in task_vectors.estimates(task_vectors.compare(weights, ws)).items():
        for k, pair in enumerate(zip(*positions, strict=True), start=1):
            yield _row(quantity, name, str(k), Estimate(*pair), predictor)
        yield _row(quantity, name, "mean", mean, predictor)


def _row(quantity: str, name: str, position: str, estimate: Estimate, predictor: str = "model") -> Row:
    value, stderr = (number.item() for number in estimate)
    return {
        "predictor": predictor,
        "quantity": quantity,
        "distribution": name,
        "position": position,
        "value": value,
        "stderr": stderr,
    }
