"""Numbers of a population on fixed prompts: losses, gaps to baselines and scores, each with a standard error over prompts.

`evaluate` is an ordinary function of parameters and prompts. `icl evaluate` calls it for many checkpoints at once. At intervals, training
calls `summarise`, which returns some of the numbers. The module `icl.metrics` computes them:

- `loss`: the mean squared error per target, not divided by D.
- `bayes_excess`: the model's loss minus the loss of the Bayes predictor, on the same prompts (a paired difference). On `pretrain` with
  finite M, the Bayes predictor is dMMSE. On `true`, and on `pretrain` with M = inf, it is ridge, or `bayes` if the prior or the noise is
  not Gaussian. Shifts have no `bayes_excess`. If the Bayes predictor is exact, the expectation of `bayes_excess` is
  the mean squared difference between the model's predictions and the Bayes predictor's. So `bayes_excess` is negative only by chance. If `bayes` is a particle estimate, the excess is
  too small by `bayes_variance`.
- `delta_ridge`, `delta_dmmse`: the gap to a baseline, which is the mean squared difference of predictions (Raventós et al. 2023,
  section 2, who divide by D).
- `delta_bayes`: the gap to the Bayes predictor for new tasks (`icl.bayes`), if the prior or the noise is not Gaussian.
  For some priors and noise distributions, particle filters estimate the predictions of this Bayes predictor. The errors
  of the estimates make the gap larger by `bayes_variance`, which is the mean squared standard error of the estimated
  predictions.
- `icl_score`: the loss at position k2 minus the loss at an earlier position k1. A negative ICL score means that the
  model predicts better after more examples.
- `nll`: the negative log-likelihood in nats per target, only for models with a predictive distribution (`model.output` is `gaussian` or
  `mixture`).
- `nll_over_ridge`, `nll_over_dmmse`, `nll_over_bayes`: `nll` minus the NLL of a predictor. The predictors are ridge (with Gaussian noise)
  and dMMSE (`icl.evidence`). If the prior or the noise is not Gaussian, there is also the Bayes predictor for new tasks (`icl.bayes`). The
  expected difference is at least 0 on the prompts for which the predictor is optimal. dMMSE is optimal on `pretrain`. On `true`, `bayes` is
  optimal, or ridge if there is no `bayes`. If `bayes` is estimated, its NLL is too large by about half of `bayes_nll_variance`, the mean
  squared standard error of this NLL.
- `prior_zero`, `prior_task_mean`: prior-task scores, which are the gaps to the predictions with w = 0 and with the mean task (Hoogland
  et al. 2024).

For a language run, the loss is -log P(next token) in nats. A language model is represented by its losses instead of its predictions, so
there are no gaps. Hoogland et al. compute the ICL score from tokens 50 and 500 of 1,024. For rows of another length, we scale these
positions in proportion.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from icl import metrics
from icl.evaluation.predictors import Predict, predict_prompts
from icl.evaluation.sets import EvaluationSet
from icl.model.stacked import Params
from icl.tasks.rows import TokenRows

if TYPE_CHECKING:
    import pandas as pd

Row: TypeAlias = dict[str, Any]
"""One number as a row: distribution, quantity, position (1..K, `mean`, or `k1:k2`), value, stderr."""
VERSION = 2
"""Version of the definitions of the numbers. Saved numbers of an older version are computed again. Version 2 added `bayes_excess`, and
replaced the prompts of `MONITOR` by the prompts of `REPORT`."""
COLUMNS = ("distribution", "quantity", "position", "value", "stderr")
EXCESS = ("bayes_excess", "bayes_excess_stderr")
"""Columns of `tabulate_losses` with the excess over the Bayes predictor and its standard error."""


def evaluate(
    predict: Predict, params: Params, sets: Sequence[EvaluationSet], *, nll: Predict | None = None
) -> list[list[Row]]:
    """Return all numbers of every member on all sets, as one list of rows for each member.

    Args:
        predict: Function that predicts targets.
        params: Stacked parameters.
        sets: The sets of prompts.
        nll: Function that returns the negative log-likelihood of targets, if the models have predictive distributions.
    """
    parts = []
    for each in sets:
        losses = None if nll is None else predict_prompts(nll, params, each.prompts)
        parts.append(evaluate_predictions(each, predict_prompts(predict, params, each.prompts), losses))
    return [[row for rows in member_rows for row in rows] for member_rows in zip(*parts, strict=True)]


def evaluate_predictions(
    prompt_set: EvaluationSet, predictions: Float[Tensor, "N B K"], nll: Float[Tensor, "N B K"] | None = None
) -> list[list[Row]]:
    """Return loss, excess, gaps, prior-task scores and ICL scores on one set, as one list of rows for each of N predictors.

    If the negative log-likelihoods of the targets are given (`nll`), the rows of `nll`, `nll_over_ridge` and so on are included.
    """
    errors = set_losses(predictions, prompt_set)  # N B K
    numbers = _position_numbers(prompt_set, "loss", errors)
    if prompt_set.bayes is not None:
        numbers += _position_numbers(prompt_set, "bayes_excess", errors - _bayes_errors(prompt_set))
    if nll is not None:
        numbers += _position_numbers(prompt_set, "nll", nll)
        for quantity in ("nll_over_ridge", "nll_over_dmmse", "nll_over_bayes"):
            floor = prompt_set.nll.get(quantity.rpartition("_")[2])
            if floor is not None:
                numbers += _position_numbers(prompt_set, quantity, nll - floor)
    for quantity in ("delta_ridge", "delta_dmmse", "delta_bayes", "prior_zero", "prior_task_mean"):
        reference = prompt_set.baselines.get(quantity.partition("_")[2])
        if reference is not None:
            numbers += _position_numbers(prompt_set, quantity, metrics.squared_error(predictions, reference))
    for first, second in _score_pairs(prompt_set):
        numbers.append(_Numbers("icl_score", [f"{first}:{second}"], metrics.icl_score(errors, first, second)))
    return _rows(prompt_set.name, numbers)


def set_losses(predictions: Float[Tensor, "*N B K"], prompt_set: EvaluationSet) -> Float[Tensor, "*N B K"]:
    """Return the loss at every position.

    For a language model, `predictions` already contains the losses (`icl.evaluation.predictors.predictor`).
    """
    if isinstance(prompt_set.prompts, TokenRows):
        return predictions
    return metrics.squared_error(predictions, prompt_set.prompts.ys)


def evaluate_baselines(sets: Sequence[EvaluationSet]) -> list[Row]:
    """Return the loss of every baseline on every set. The `quantity` of such a row is the baseline's name.

    A quantity such as `ridge_nll` is the negative log-likelihood (NLL) of a baseline. If there is a baseline `bayes`, the quantity
    `bayes_variance` is the mean squared standard error of its predictions, and `bayes_nll_variance` is the mean squared standard error of
    its NLL. The loss of `bayes` is too large by `bayes_variance`, and its NLL by about half of `bayes_nll_variance`.
    """
    rows = []
    for each in sets:
        for name, predictions in each.baselines.items():
            errors = set_losses(predictions, each).unsqueeze(0)
            rows += _rows(each.name, _position_numbers(each, name, errors))[0]
        for name, losses in each.nll.items():
            rows += _rows(each.name, _position_numbers(each, f"{name}_nll", losses.unsqueeze(0)))[0]
        for name, variances in each.variances.items():
            rows += _rows(each.name, _position_numbers(each, name, variances.unsqueeze(0)))[0]
    return rows


def headlines(numbers: "pd.DataFrame") -> "pd.DataFrame":
    """Return the main rows of a table from `evaluate`: the means over positions.

    For a shift that is evaluated only at the query, the main rows are the numbers at the query.
    """
    has_mean = numbers["distribution"].isin(numbers.loc[numbers["position"] == "mean", "distribution"])
    return numbers[(numbers["position"] == "mean") | ~has_mean]


def tabulate_losses(predictions: Float[Tensor, "B K"], prompt_set: EvaluationSet) -> "pd.DataFrame":
    """Return the losses of one model and of the baselines by position, on `pretrain` or `true`.

    Returns:
        A row for each position 1..K and a row for their mean. For regression, the columns are `model`, `bayes` (if it is not ridge),
        `ridge`, `dmmse` (finite M), `ols` and `zero`. If the Bayes predictor is known, there are also the columns `bayes_excess` and
        `bayes_excess_stderr` (its standard error over prompts). For language, the columns are `model`, `unigram` and `bigram`.
    """
    import pandas as pd

    predicted = {"model": predictions} | prompt_set.baselines
    order = ("model", "bayes", "ridge", "dmmse", "ols", "zero", "unigram", "bigram")
    names = [name for name in order if name in predicted]
    losses = {name: set_losses(predicted[name], prompt_set).mean(dim=0).tolist() for name in names}
    table = pd.DataFrame(losses, index=[str(k + 1) for k in range(predictions.shape[-1])])
    table.loc["mean"] = table.mean()
    if prompt_set.bayes is not None:
        excess = set_losses(predictions, prompt_set) - _bayes_errors(prompt_set)
        for name, *parts in zip(EXCESS, metrics.position_mean(excess), metrics.overall_mean(excess), strict=True):
            table[name] = torch.cat([part.reshape(-1) for part in parts]).tolist()
    table.index.name = "position"
    return table


def summarise(
    predict: Predict, params: Params, sets: Sequence[Sequence[EvaluationSet]], *, nll: Predict | None = None
) -> list[dict[str, float]]:
    """Return the numbers that are logged during training, for each member on its own sets.

    Returns:
        For each member, a dict with the keys `eval/<set>/{loss,delta_ridge,delta_dmmse,icl_score}`. `delta_dmmse` exists only for finite
        M. A language run has only `loss` and `icl_score`. If `nll` is given, there is also the key `eval/<set>/nll`.
    """
    results: list[dict[str, float]] = [{} for _ in sets]
    for member_sets in zip(*sets, strict=True):  # the sets with the same name, one for each member
        joined = _join(member_sets)
        predictions = predict_prompts(predict, params, joined.prompts)
        losses = None if nll is None else predict_prompts(nll, params, joined.prompts)
        positions = ("mean", *(f"{first}:{second}" for first, second in _score_pairs(joined)[-1:]))
        members_rows = evaluate_predictions(joined, predictions, losses)
        for result, own_set, rows in zip(results, member_sets, members_rows, strict=True):
            wanted = {
                "loss",
                "nll",
                "icl_score",
                *(f"delta_{name}" for name in ("ridge", "dmmse") if name in own_set.baselines),
            }
            result |= {
                f"eval/{row['distribution']}/{row['quantity']}": row["value"]
                for row in rows
                if row["position"] in positions and row["quantity"] in wanted
            }
    return results


def icl_positions(num_predictions: int) -> tuple[int, int]:
    """Return the two positions, counted from 1, of a language model's ICL score.

    In rows of 1,023 predictions the positions are 49 and 499, as in Hoogland et al. 2024 (who write l_48 and l_498,
    counted from 0). In rows of another length, both positions are scaled in proportion to the length. Both positions
    are at least 2, because the prediction after BOS has no context.
    """
    first, second = (max(2, round(position / 1023 * num_predictions)) for position in (49, 499))
    return first, second


def _bayes_errors(prompt_set: EvaluationSet) -> Float[Tensor, "*N B K"]:
    """Return the squared errors of the Bayes predictor of these prompts."""
    name = prompt_set.bayes
    if name is None:
        raise ValueError(f"The prompts `{prompt_set.name}` have no Bayes predictor among the baselines.")
    return metrics.squared_error(prompt_set.baselines[name], prompt_set.prompts.ys)


def _join(sets: Sequence[EvaluationSet]) -> EvaluationSet:
    """Stack the sets of several members into one. A baseline that some members lack is NaN for these members. A shared set is returned unchanged."""
    if all(each is sets[0] for each in sets):
        return sets[0]
    prompts = type(sets[0].prompts)(
        *(torch.stack(parts) for parts in zip(*(each.prompts for each in sets), strict=True))
    )
    missing = torch.full_like(sets[0].prompts.ys, torch.nan, dtype=torch.float32)
    names = dict.fromkeys(name for each in sets for name in each.baselines)
    stacked = {name: torch.stack([each.baselines.get(name, missing) for each in sets]) for name in names}
    return sets[0]._replace(prompts=prompts, baselines=stacked, nll={})


class _Numbers(NamedTuple):
    """One quantity at P positions, for N predictors."""

    quantity: str
    positions: list[str]
    estimate: metrics.Estimate
    """Value and standard error, of shape (N, P), or (N,) for a single position."""


def _position_numbers(prompt_set: EvaluationSet, quantity: str, values: Float[Tensor, "N B K"]) -> list[_Numbers]:
    """Return a quantity at every position and its mean over positions.

    For a shift that is evaluated only at the query, return only the value at the query.
    """
    names = [str(k + 1) for k in range(values.shape[-1])]
    if prompt_set.is_about_query:
        return [_Numbers(quantity, names[-1:], metrics.position_mean(values[..., -1:]))]
    return [
        _Numbers(quantity, names, metrics.position_mean(values)),
        _Numbers(quantity, ["mean"], metrics.overall_mean(values)),
    ]


def _rows(distribution: str, numbers: Sequence[_Numbers]) -> list[list[Row]]:
    """Return a row for each number, as one list for each predictor."""
    keys = [(distribution, part.quantity, position) for part in numbers for position in part.positions]
    columns = zip(*(part.estimate for part in numbers), strict=True)  # values, standard errors
    values, stderrs = (torch.cat([part.reshape(len(part), -1) for part in column], dim=1) for column in columns)
    # One `tolist` for all numbers, because each call waits for the GPU.
    return [
        [dict(zip(COLUMNS, (*key, *pair), strict=True)) for key, pair in zip(keys, pairs, strict=True)]
        for pairs in torch.stack((values, stderrs), dim=-1).tolist()
    ]


def _score_pairs(prompt_set: EvaluationSet) -> list[tuple[int, int]]:
    """Return the pairs of positions of the ICL scores; training logs the score of the last pair.

    For prompts, the pairs combine the first, middle and last position (1:4, 4:8 and 1:8 in Hoogland et al., where K = 8).
    """
    count = prompt_set.prompts.ys.shape[-1]
    if isinstance(prompt_set.prompts, TokenRows):
        pairs = [icl_positions(count)]
    else:
        middle = max(1, count // 2)
        pairs = [(1, middle), (middle, count), (1, count)]
    return [] if prompt_set.is_about_query else list(dict.fromkeys(pair for pair in pairs if pair[0] < pair[1]))
