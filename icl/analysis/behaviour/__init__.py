"""What a run does at every saved step: losses and scores, distances to ridge and dMMSE, the loss on new tasks, task vectors.

Of fixed prompts of the tasks trained on (`pretrain`) and of new ones (`true`), those of `icl evaluate` and in its words, each with its
standard error over prompts:

- `loss` by position and mean; `icl_score`, loss(k2) - loss(k1), negative when examples help (Hoogland et al. 2024 print the opposite).
- `prior_zero` and `prior_task_mean`: mean squared distance to predicting 0 and to the mean task, by position, mean, and summed
  over positions as in their figure for finite M. What a model does that knows only the prior.
- `delta_ridge`, `delta_dmmse`: mean squared distance to either Bayes predictor, per target (Raventos et al. 2023, there also
  divided by D); `delta_difference`, ridge's less dMMSE's: positive is nearer to dMMSE.
- `cosine`, `norm_ratio`: the task-vector probe (`icl.analysis.behaviour.task_vectors`), on the first prompts of each set.
- `loss_over_g2`, `size_ratio` on `input_scale` and `task_scale`, by `scale` (`icl.analysis.behaviour.ood_curves`): of some saved steps, spread
  evenly in log(t + 1), and of new tasks.

`predictor` is `model`, or the baseline whose numbers are given beside it. Of the whole run (`icl.analysis.behaviour.turning_points`), with
`lower` and `upper` the saved steps that enclose it, a verdict and reasons: `minimum_step` of the prior-task scores on `pretrain`;
`crossing_step`, where delta_difference changes its sign (`finding` says to which side; finite M); `critical_step` and
`rise`, the transience of ridge (Carroll et al. 2025), and `dip`, how near ridge the loss came. Among runs that differ in M,
t_crit(M) is their `critical_step`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from icl import baselines, metrics
from icl.analysis.behaviour import ood_curves, task_vectors
from icl.analysis.behaviour.findings import findings, summary
from icl.analysis.behaviour.ood_curves import CurveSettings
from icl.analysis.prompts import fixed_prompts
from icl.analysis.run import Members, Result, as_table, over_checkpoints
from icl.checkpoints import checkpoint_files
from icl.config import RunConfig
from icl.evaluation import EvaluationSet, evaluate_predictions, evaluation_set, predict_prompts
from icl.measure import Entry, Measurement
from icl.metrics import Estimate
from icl.stacked import Params, apply
from icl.tasks.priors import task_pool
from icl.tasks.prompts import Prompts, sample_prompts
from icl.validation import ConfigError

VERSION = 1
SETS = ("pretrain", "true")
REFERENCES = ("ridge", "dmmse", "zero")
"""Baselines whose numbers are given beside the model's."""

Row = dict[str, Any]
Baseline = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """What is measured at every saved step; with others, it is measured anew."""

    num_prompts: int = field(default=1024, metadata={"help": "prompts of each set"})
    num_probe_prompts: int = field(default=64, metadata={"help": "of them those that the task-vector probe looks at"})

    def __post_init__(self) -> None:
        if not 2 <= self.num_probe_prompts <= self.num_prompts:
            raise ConfigError(
                f"`num_probe_prompts` must be at least 2 and at most `num_prompts`, got {self.num_probe_prompts} of {self.num_prompts}."
            )


@dataclass(frozen=True, kw_only=True)
class Settings(StepSettings, CurveSettings):
    """What `icl analyse RUN --what behaviour` can be told."""

    num_ood_steps: int = field(default=8, metadata={"help": "saved steps whose curves over multipliers are computed"})

    def __post_init__(self) -> None:
        StepSettings.__post_init__(self)
        CurveSettings.__post_init__(self)
        if self.num_ood_steps < 1:
            raise ConfigError(f"`num_ood_steps` must be at least 1, got {self.num_ood_steps}.")


def analyse(path: Path, settings: Settings) -> Result:
    """Every saved step, the curves over multipliers of some, and what the whole run shows.

    Raises:
        CheckpointError: If there is no usable checkpoint.
    """
    files = checkpoint_files(path)
    each = StepSettings(num_prompts=settings.num_prompts, num_probe_prompts=settings.num_probe_prompts)
    measure = partial(measure_members, settings=each)
    entries, config = over_checkpoints("behaviour", path, each, measure, version=VERSION, files=files)
    sets = evaluation_sets(config, settings.num_prompts, "cpu")
    found = findings(entries, sets)
    whole_run = [*found, *_reference_rows(config, sets, settings)]
    curves: list[Entry] = []
    if settings.num_scales:
        wanted = CurveSettings(num_scales=settings.num_scales, num_ood_prompts=settings.num_ood_prompts)
        chosen = [files[place] for place in spread([entry.step for entry in entries], settings.num_ood_steps)]
        measure = partial(measure_curves, settings=wanted)
        curves, _ = over_checkpoints("behaviour-ood", path, wanted, measure, version=VERSION, files=chosen)
    return Result(as_table([*entries, *curves], settings, whole_run=whole_run), summary(entries, found))


def measure_members(members: Members, *, settings: StepSettings) -> list[Measurement]:
    """The rows of every member, and its prompts' own numbers."""
    sets = evaluation_sets(members.config, settings.num_prompts, str(_device(members)))
    predict = partial(predict_prompts, partial(apply, members.config.model), members.params)
    rows: list[list[Row]] = [[] for _ in members.checkpoints]
    numbers: list[dict[str, np.ndarray]] = [{} for _ in members.checkpoints]
    for one in sets:
        few = Prompts(*(part[: settings.num_probe_prompts] for part in one.prompts))
        weights = task_vectors.effective_weights(predict, few)  # N B K D
        for index, predictions in enumerate(predict(one.prompts)):
            rows[index] += [*set_rows(one, predictions), *_probe_rows(one.name, weights[index], few.ws)]
            own = prompt_numbers(one, predictions)
            numbers[index] |= {f"{one.name}/{name}": values.cpu().numpy() for name, values in own.items()}
    return [Measurement(*both) for both in zip(rows, numbers, strict=True)]


def measure_curves(members: Members, *, settings: CurveSettings) -> list[Measurement]:
    """The rows over multipliers of every member."""
    prompts = fixed_prompts(members, stream="true", distribution="true", count=settings.num_ood_prompts)
    predict = partial(apply, members.config.model)
    factors = ood_curves.scales(settings.num_scales)
    found = ood_curves.curve_rows(predict, members.params, prompts, factors)
    return [Measurement([{"predictor": "model"} | row for row in rows]) for rows in found]


@lru_cache(maxsize=2)
def evaluation_sets(config: RunConfig, num_prompts: int, device: str) -> list[EvaluationSet]:
    """The two sets and their baselines, which all populations of a run share."""
    return [evaluation_set(config, name, num_prompts=num_prompts, device=device) for name in SETS]


def set_rows(one: EvaluationSet, predictions: Float[Tensor, "B K"], *, predictor: str = "model") -> Iterator[Row]:
    """Losses, scores and distances of one predictor on one set."""
    for row in evaluate_predictions(one, predictions.unsqueeze(0))[0]:
        yield {"predictor": predictor} | row
        if row["quantity"].startswith("prior") and row["position"] == "mean":
            count = predictions.shape[-1]
            total = {"position": "sum", "value": count * row["value"], "stderr": count * row["stderr"]}
            yield {"predictor": predictor} | row | total
    difference = prompt_numbers(one, predictions).get("delta_difference")
    if difference is not None:
        estimate = metrics.overall_mean(difference.unsqueeze(-1))
        yield _row("delta_difference", one.name, "mean", estimate, predictor)


def prompt_numbers(one: EvaluationSet, predictions: Float[Tensor, "B K"]) -> dict[str, Float[Tensor, " B"]]:
    """Of every prompt, the means over positions that steps are compared by."""
    found = {"loss": metrics.squared_error(predictions, one.prompts.ys).mean(-1)}
    distance = {name: metrics.squared_error(predictions, one.baselines[name]).mean(-1) for name in one.baselines}
    found |= {f"prior_{name}": distance[name] for name in ("zero", "task_mean") if name in distance}
    if "dmmse" in distance:
        found["delta_difference"] = distance["ridge"] - distance["dmmse"]
    return found


def spread(steps: Sequence[int], count: int) -> list[int]:
    """The places of up to `count` steps, nearest to an even spacing in log(t + 1) from the first to the last."""
    logs = np.log1p(np.array(steps, dtype=float))
    targets = np.linspace(logs[0], logs[-1], count) if count > 1 else logs[-1:]
    return sorted({int(np.abs(logs - target).argmin()) for target in targets})


def _reference_rows(config: RunConfig, sets: Sequence[EvaluationSet], settings: Settings) -> Iterator[Row]:
    """The numbers of baselines, on the same prompts."""
    predictors = _baseline_functions(config)
    for one in sets:
        for name in (name for name in REFERENCES if name in one.baselines):
            yield from set_rows(one, one.baselines[name], predictor=name)
        few = Prompts(*(part[: settings.num_probe_prompts] for part in one.prompts))
        for name in ("ridge", "dmmse") if one.name == "pretrain" else ("ridge",):
            if name in predictors:
                weights = task_vectors.effective_weights(partial(_on_prompts, predictors[name]), few)
                yield from _probe_rows(one.name, weights, few.ws, predictor=name)
    if settings.num_scales:
        prompts = sample_prompts(config, stream="true", step=0, batch_size=settings.num_ood_prompts)
        factors = ood_curves.scales(settings.num_scales)
        for name in ("ridge", "zero"):
            (rows,) = ood_curves.curve_rows(partial(_as_member, predictors[name]), {}, prompts, factors)
            yield from ({"predictor": name} | row for row in rows)


def _on_prompts(function: Baseline, asked: Prompts) -> Tensor:
    return function(asked.xs, asked.ys)


def _as_member(function: Baseline, _: Params, xs: Tensor, ys: Tensor) -> Tensor:
    """As a population of one without parameters."""
    return function(xs, ys).unsqueeze(0)


def _baseline_functions(config: RunConfig) -> dict[str, Baseline]:
    """The references as functions of xs and ys."""
    task = config.task
    ridge = partial(baselines.ridge, noise_variance=task.noise_variance) if task.noise_variance > 0 else baselines.ols
    functions: dict[str, Baseline] = {"ridge": ridge, "zero": baselines.zero}
    if not task.is_gaussian:
        tasks = task_pool(int(task.num_tasks), task.task_size, config.seeds.tasks)
        functions["dmmse"] = partial(baselines.dmmse, tasks=tasks, noise_variance=task.noise_variance)
    return functions


def _probe_rows(
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


def _device(members: Members) -> torch.device:
    return next(iter(members.params.values())).device
