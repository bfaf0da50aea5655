"""Evaluation: fixed prompts, their baselines computed once, and a population's predictions turned into numbers.

An ordinary function of parameters and prompts, usable without Lightning: training calls it at intervals, `icl evaluate`
over all checkpoints of a run at once. Losses are squared errors per target, not divided by D. Every number comes with
its standard error over prompts.

The sets are `pretrain` (the run's M tasks), `true` (tasks from N(0, I)) and the shifts of `icl.tasks.shifts`. The gap to a
baseline is the mean squared distance between predictions (Raventos et al. 2023, section 2, there divided by D). ICL
scores are loss(k2) - loss(k1): negative is good. Prior-task scores are distances to predicting with w = 0 and with the mean
task (Hoogland et al. 2024).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from icl import baselines, metrics
from icl.config import RunConfig
from icl.stacked import Params, size
from icl.tasks.priors import task_pool
from icl.tasks.prompts import Prompts, require_prompt_memory, sample_prompts
from icl.tasks.shifts import SHIFTS, sample_shifted_prompts
from icl.threads import in_parallel

if TYPE_CHECKING:
    import pandas as pd

Predict: TypeAlias = Callable[[Params, Tensor, Tensor], Tensor]
"""Function of stacked parameters, xs and ys that returns predictions (N, B, K), as `stacked.apply` with its model filled in."""

VERSION = 1
"""Of the numbers' definitions: numbers kept under an older one are made anew."""
COLUMNS = ("distribution", "quantity", "position", "value", "stderr")
_PROMPTS_AT_ONCE = 256  # of one member: their activations fit a CPU's caches
_PROMPTS_AT_ONCE_ELSEWHERE = 2**14  # over all members


class EvaluationSet(NamedTuple):
    """Fixed prompts and what each baseline predicts for them (B, K)."""

    name: str
    prompts: Prompts
    baselines: dict[str, Tensor]
    is_about_query: bool
    """Whether only the last position is what the name says; then only its numbers are given."""


Row: TypeAlias = dict[str, Any]
"""One number: distribution, quantity, position (1..K, `mean`, or `k1:k2`), value, stderr."""


def evaluation_set(
    config: RunConfig, name: str, *, num_prompts: int, device: torch.device | str = "cpu"
) -> EvaluationSet:
    """The fixed prompts called `name`: `pretrain`, `true`, or a shift.

    dMMSE and the mean task belong to `pretrain` and `true` of a run with finitely many tasks; OLS and zero are
    everywhere. Without noise, ridge is its limit OLS.
    """
    shift, task = SHIFTS.get(name), config.task
    has_noise = task.noise_variance > 0
    require_prompt_memory(num_prompts, task.max_examples, task.task_size, device, for_ridge=has_noise)
    if shift is not None:
        prompts = sample_shifted_prompts(config, name, batch_size=num_prompts, device=device)
    else:
        prompts = sample_prompts(config, stream=name, step=0, batch_size=num_prompts, device=device)
    is_about_query = shift is not None and shift.is_about_query
    return EvaluationSet(name, prompts, _baseline_predictions(config, name, prompts), is_about_query)


def predict_prompts(predict: Predict, params: Params, prompts: Prompts) -> Float[Tensor, "N B K"]:
    """Every member's predictions, for the same prompts (B, K, D) or its own (N, B, K, D), a batch of prompts at a time.

    On a CPU each batch is one member's, for all together overflow its caches, and has one core to itself: a member's
    numbers are what they are alone, however many cores there are.
    """
    num_members = size(params) if params else 1
    if prompts.xs.device.type != "cpu":
        at_once = max(32, _PROMPTS_AT_ONCE_ELSEWHERE // num_members)
        with torch.no_grad():
            return torch.cat([_predict(predict, params, *batch) for batch in _batches(prompts, at_once)], dim=1)
    calls = [
        (predict, {name: tensor[i : i + 1] for name, tensor in params.items()}, *batch)
        for i in range(num_members)
        for batch in _batches(_prompts_of(i, prompts), _PROMPTS_AT_ONCE)
    ]
    found = _on_cores(calls)
    each = len(found) // num_members
    return torch.cat([torch.cat(found[start : start + each], dim=1) for start in range(0, len(found), each)])


def evaluate(predict: Predict, params: Params, sets: Sequence[EvaluationSet]) -> list[list[Row]]:
    """All numbers of every member, on all sets: one list of rows per member."""
    parts = [evaluate_predictions(one, predict_prompts(predict, params, one.prompts)) for one in sets]
    return [[row for rows in own for row in rows] for own in zip(*parts, strict=True)]


def evaluate_predictions(one: EvaluationSet, predictions: Float[Tensor, "N B K"]) -> list[list[Row]]:
    """Loss, gaps, prior-task scores and ICL scores on one set: one list of rows per predictor."""
    errors = metrics.squared_error(predictions, one.prompts.ys)  # N B K
    numbers = _positions(one, "loss", errors)
    for prefix, names in (("delta", ("ridge", "dmmse")), ("prior", ("zero", "task_mean"))):
        for name in names:
            if name in one.baselines:
                numbers += _positions(one, f"{prefix}_{name}", metrics.squared_error(predictions, one.baselines[name]))
    for first, second in () if one.is_about_query else _score_pairs(errors.shape[-1]):
        numbers.append(_Numbers("icl_score", [f"{first}:{second}"], metrics.icl_score(errors, first, second)))
    return _rows(one.name, numbers)


def evaluate_baselines(sets: Sequence[EvaluationSet]) -> list[Row]:
    """The loss of every baseline on every set; the quantity is the baseline's name."""
    return [
        row
        for one in sets
        for name, predictions in one.baselines.items()
        for row in _rows(
            one.name, _positions(one, name, metrics.squared_error(predictions, one.prompts.ys).unsqueeze(0))
        )[0]
    ]


def headlines(numbers: "pd.DataFrame") -> "pd.DataFrame":
    """The rows that sum up a table of `evaluate`: means over positions, or the query where a shift is about it alone."""
    has_mean = numbers["distribution"].isin(numbers.loc[numbers["position"] == "mean", "distribution"])
    return numbers[(numbers["position"] == "mean") | ~has_mean]


def losses_by_position(predict: Predict, params: Params, one: EvaluationSet) -> "pd.DataFrame":
    """Loss of one model beside the baselines.

    Returns:
        A row per position 1..K and one for their mean; columns `model`, `ridge`, `dmmse` (finite M), `ols`, `zero`.
    """
    return tabulate_losses(predict_prompts(predict, params, one.prompts)[0], one)


def excess_over_optimum(
    predictions: Float[Tensor, "B K"], one: EvaluationSet, *, is_gaussian: bool
) -> tuple[str, metrics.Estimate]:
    """Return the name of the Bayes predictor of the training tasks, and by how much more the model loses on average.

    The difference is taken prompt by prompt, so its standard error does not count what both lose to the same noise.

    Args:
        predictions: The model's.
        one: The prompts of the training tasks, `pretrain`.
        is_gaussian: Whether the training tasks come from N(0, I), where ridge is the Bayes predictor; else dMMSE is.
    """
    name = "ridge" if is_gaussian else "dmmse"
    errors, least = (metrics.squared_error(each, one.prompts.ys) for each in (predictions, one.baselines[name]))
    return name, metrics.overall_mean(errors - least)


def tabulate_losses(predictions: Float[Tensor, "B K"], one: EvaluationSet) -> "pd.DataFrame":
    """Return the table of `losses_by_position` for one model's predictions."""
    import pandas as pd

    predicted = {"model": predictions} | one.baselines
    names = [name for name in ("model", "ridge", "dmmse", "ols", "zero") if name in predicted]
    errors = {name: metrics.squared_error(predicted[name], one.prompts.ys).mean(dim=0) for name in names}
    positions = range(1, one.prompts.ys.shape[1] + 1)
    table = pd.DataFrame({name: error.tolist() for name, error in errors.items()}, index=[*map(str, positions)])
    table.loc["mean"] = table.mean()
    table.index.name = "position"
    return table


def summarise(predict: Predict, params: Params, sets: Sequence[Sequence[EvaluationSet]]) -> list[dict[str, float]]:
    """The few numbers that are logged during training, per member on sets of its own.

    Returns:
        For each member `eval/<set>/{loss,delta_ridge,delta_dmmse,icl_score}`; dMMSE only for finite M.
    """
    results: list[dict[str, float]] = [{} for _ in sets]
    for same in zip(*sets, strict=True):  # the members' sets of one name
        together = _together(same)
        predictions = predict_prompts(predict, params, together.prompts)
        positions = ("mean", f"1:{predictions.shape[-1]}")
        for result, one, rows in zip(results, same, evaluate_predictions(together, predictions), strict=True):
            wanted = {"loss", "icl_score", *(f"delta_{name}" for name in ("ridge", "dmmse") if name in one.baselines)}
            result |= {
                f"eval/{row['distribution']}/{row['quantity']}": row["value"]
                for row in rows
                if row["position"] in positions and row["quantity"] in wanted
            }
    return results


def _predict(predict: Predict, params: Params, xs: Tensor, ys: Tensor) -> Tensor:
    return predict(params, xs, ys).float()


_on_cores = in_parallel(_predict, threads_each=1)


def _prompts_of(member: int, prompts: Prompts) -> Prompts:
    """Everybody's, or the member's own."""
    return prompts if prompts.xs.ndim == 3 else Prompts(*(part[member] for part in prompts))


def _batches(prompts: Prompts, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(prompts.xs.split(size, dim=-3), prompts.ys.split(size, dim=-2), strict=True)


def _together(sets: Sequence[EvaluationSet]) -> EvaluationSet:
    """Several members' sets as one: itself if all have the same, else stacked, with NaN for a baseline that one lacks."""
    if all(one is sets[0] for one in sets):
        return sets[0]
    prompts = Prompts(*(torch.stack(parts) for parts in zip(*(one.prompts for one in sets), strict=True)))
    missing = torch.full_like(sets[0].prompts.ys, torch.nan)
    names = dict.fromkeys(name for one in sets for name in one.baselines)
    stacked = {name: torch.stack([one.baselines.get(name, missing) for one in sets]) for name in names}
    return sets[0]._replace(prompts=prompts, baselines=stacked)


def _baseline_predictions(config: RunConfig, name: str, prompts: Prompts) -> dict[str, Tensor]:
    task = config.task
    xs, ys = prompts.xs, prompts.ys
    least_squares = baselines.ols(xs, ys)
    ridge = baselines.ridge(xs, ys, noise_variance=task.noise_variance) if task.noise_variance > 0 else least_squares
    predictions = {"ridge": ridge, "ols": least_squares, "zero": baselines.zero(xs, ys)}
    if not task.is_gaussian and name in ("pretrain", "true"):
        tasks = task_pool(int(task.num_tasks), task.task_size, config.seeds.tasks, device=xs.device)
        predictions["dmmse"] = baselines.dmmse(xs, ys, tasks=tasks, noise_variance=task.noise_variance)
        predictions["task_mean"] = baselines.task_mean(xs, ys, tasks=tasks)
    return predictions


class _Numbers(NamedTuple):
    """A quantity at P positions, of N predictors."""

    quantity: str
    positions: list[str]
    estimate: metrics.Estimate
    """(N, P), or (N,) for a single position."""


def _positions(one: EvaluationSet, quantity: str, values: Float[Tensor, "N B K"]) -> list[_Numbers]:
    """At every position, and their mean; of a set about the query, only at the last position."""
    names = [str(k + 1) for k in range(values.shape[-1])]
    if one.is_about_query:
        return [_Numbers(quantity, names[-1:], metrics.position_mean(values[..., -1:]))]
    return [
        _Numbers(quantity, names, metrics.position_mean(values)),
        _Numbers(quantity, ["mean"], metrics.overall_mean(values)),
    ]


def _rows(distribution: str, numbers: Sequence[_Numbers]) -> list[list[Row]]:
    """For each predictor, a row per number. All leave the device at once: a GPU is waited for once, not once a number."""
    keys = [(distribution, some.quantity, position) for some in numbers for position in some.positions]
    columns = zip(*(some.estimate for some in numbers), strict=True)  # values, standard errors
    values, stderrs = (torch.cat([part.reshape(len(part), -1) for part in column], dim=1) for column in columns)
    return [
        [dict(zip(COLUMNS, (*key, *pair), strict=True)) for key, pair in zip(keys, own, strict=True)]
        for own in torch.stack((values, stderrs), dim=-1).tolist()
    ]


def _score_pairs(num_examples: int) -> Iterator[tuple[int, int]]:
    """First to middle, middle to last, first to last (Hoogland et al.: 1:4, 4:8 and 1:8 for K = 8)."""
    middle = max(1, num_examples // 2)
    pairs = [(1, middle), (middle, num_examples), (1, num_examples)]
    yield from dict.fromkeys(pair for pair in pairs if pair[0] < pair[1])
