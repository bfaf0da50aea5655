"""Curves of out-of-distribution behaviour: the loss and size of predictions when inputs or tasks are multiplied by g.

There are two families, as in the sweep of Hoogland et al. 2024, with multipliers g from 10^-2.5 to 10^4.5. (Their code uses
x -> g x, which gives a variance of g^2; their text states a variance of g.)

- `input_scale`: the model sees (g x, y), with y = w . (g x) + noise.
- `task_scale`: the model sees (x, y) with the same y, so y = (g w) . x + noise and the task is g w.

The noise is not multiplied. Its standard deviation is sigma, the square root of `noise_variance`. (Hoogland et al. used
sigma^2 as the standard deviation, so their released curves do not fall below sigma^4.) For each g there are two numbers,
averaged over prompts and positions:

- `loss_over_g2`: the mean squared error divided by g^2. Predicting zero gives D + sigma^2 / g^2.
- `size_ratio`: |predictions| / |targets|. It is 1 for predictions of the right size, and 0 for predictions of zero.

Both numbers agree with the results of `icl evaluate` for the shifts `input_scale_<g>` and `task_scale_<g>`. All g use the
same prompts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from icl import metrics
from icl.analysis.run import setting
from icl.config.validation import require, require_count
from icl.evaluation.predictors import Predict, predict_prompts
from icl.metrics import Estimate
from icl.model.stacked import Params
from icl.tasks.prompts import Prompts

LOWEST, HIGHEST = -2.5, 4.5
"""log10 of the first and last multiplier."""
Family = Literal["input_scale", "task_scale"]
FAMILIES: tuple[Family, ...] = get_args(Family)

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class CurveSettings:
    """Settings of the curves against the multiplier g. If they change, the curves are computed again."""

    num_scales: int = setting(100, "number of factors g by which inputs or tasks are multiplied; 0 computes no curves")
    num_ood_prompts: int = setting(64, "number of prompts at each multiplier")

    def __post_init__(self) -> None:
        is_valid = self.num_scales == 0 or self.num_scales >= 2
        require(is_valid, f"`num_scales` must be 0 or at least 2, got {self.num_scales}.")
        require_count("num_ood_prompts", self.num_ood_prompts, 2)


class Curve(NamedTuple):
    """Loss divided by g^2, and size ratio, at each of the S multipliers. Values and errors have the shape (*N, S)."""

    loss_over_g2: Estimate
    size_ratio: Estimate


def scales(count: int) -> list[float]:
    """Return the multipliers, evenly spaced in their logarithm."""
    return torch.logspace(LOWEST, HIGHEST, count, dtype=torch.float64).tolist()


def scaled_prompts(prompts: Prompts, family: Family, factors: Sequence[float]) -> Prompts:
    """Scale all prompts with each of the S multipliers, and return the results one after the other: xs (S B, K, D)."""
    signal = (prompts.xs * prompts.ws.unsqueeze(-2)).sum(-1)  # B K
    noise = prompts.ys - signal
    factor, one = signal.new_tensor(factors)[:, None, None], signal.new_ones(len(factors), 1, 1)  # S 1 1
    x_factor, w_factor = (factor, one) if family == "input_scale" else (one, factor)
    xs, ws = x_factor.unsqueeze(-1) * prompts.xs, w_factor * prompts.ws  # S B K D and S B D
    return Prompts(xs.flatten(0, 1), (factor * signal + noise).flatten(0, 1), ws.flatten(0, 1))


def curve(predictions: Float[Tensor, "*N P K"], targets: Float[Tensor, "P K"], factors: Sequence[float]) -> Curve:
    """Compute `loss_over_g2` and `size_ratio` at every multiplier, from predictions and targets of `scaled_prompts` (P = S B)."""
    predictions = predictions.double().unflatten(-2, (len(factors), -1))  # *N S B K
    targets = targets.double().unflatten(0, (len(factors), -1))  # S B K
    squares = targets.new_tensor(factors).square()[:, None]  # S 1
    errors = metrics.squared_error(predictions, targets).mean(-1) / squares  # *N S B
    ratio = metrics.ratio_of_means(predictions.square().mean(-1), targets.square().mean(-1))
    root = ratio.value.sqrt()
    stderr = torch.where(root == 0, 0.0, ratio.stderr / (2 * root))  # predicting zero gives 0 / 0
    return Curve(metrics.overall_mean(errors.unsqueeze(-1)), Estimate(root, stderr))


def curve_rows(predict: Predict, params: Params, prompts: Prompts, factors: Sequence[float]) -> list[list[Row]]:
    """Return one list of rows for every checkpoint. Each list covers the families `input_scale` and `task_scale`."""
    curves = {}
    for family in FAMILIES:
        scaled = scaled_prompts(prompts, family, factors)
        curves[family] = curve(predict_prompts(predict, params, scaled).cpu(), scaled.ys.cpu(), factors)
    num_members = len(curves[FAMILIES[0]].size_ratio.value)
    return [
        [row for family in FAMILIES for row in _rows(family, factors, curves[family], index)]
        for index in range(num_members)
    ]


def _rows(family: str, factors: Sequence[float], curves: Curve, index: int) -> Iterator[Row]:
    for quantity, estimate in curves._asdict().items():
        pairs = zip(factors, estimate.value[index].tolist(), estimate.stderr[index].tolist(), strict=True)
        for scale, value, stderr in pairs:
            yield {
                "quantity": quantity,
                "distribution": family,
                "position": "mean",
                "scale": scale,
                "value": value,
                "stderr": stderr,
            }
