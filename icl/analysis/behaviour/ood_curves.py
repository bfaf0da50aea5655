"""Out of distribution over seven decades: what predictions are worth when inputs or tasks are g times as large.

Families, as in the sweep of Hoogland et al. 2024 (their code: x -> g x, so a variance of g^2; their text has a variance of g), over
multipliers g from 10^-2.5 to 10^4.5:

- `input_scale`: the model sees (g x, y), with y = w . (g x) + noise.
- `task_scale`: it sees (x, y) with the same y, which is what a task g w gives.

The noise is not scaled: its deviation is sigma, the root of `noise_variance`. (The authors' evaluation took sigma^2 for it, so
their released curves have a floor of sigma^4.) Of each g two numbers, over prompts and positions: `loss_over_g2`, the mean squared
error / g^2 (D + sigma^2 / g^2 for predicting zero), and `size_ratio`, |predictions| / |targets|: 1 is the right size, 0 silence.
Both agree with the shifts `input_scale_<g>` and `task_scale_<g>` of `icl evaluate`, and all g see the same prompts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from icl import metrics
from icl.evaluation import Predict, predict_prompts
from icl.metrics import Estimate
from icl.stacked import Params
from icl.tasks.prompts import Prompts
from icl.validation import ConfigError

LOWEST, HIGHEST = -2.5, 4.5
"""log10 of the first and last multiplier."""
Family = Literal["input_scale", "task_scale"]
FAMILIES: tuple[Family, ...] = get_args(Family)

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class CurveSettings:
    """What a curve is; with others, it is computed anew."""

    num_scales: int = field(default=100, metadata={"help": "multipliers g of inputs and tasks; 0 for no such curves"})
    num_ood_prompts: int = field(default=64, metadata={"help": "prompts at each multiplier"})

    def __post_init__(self) -> None:
        if self.num_scales < 0 or self.num_scales == 1:
            raise ConfigError(f"`num_scales` must be 0 or at least 2, got {self.num_scales}.")
        if self.num_ood_prompts < 2:
            raise ConfigError(f"`num_ood_prompts` must be at least 2, got {self.num_ood_prompts}.")


class Curve(NamedTuple):
    """Numbers at every scale, (*N, S)."""

    loss_over_g2: Estimate
    size_ratio: Estimate


def scales(count: int) -> list[float]:
    """The multipliers, evenly spaced in their logarithm."""
    return torch.logspace(LOWEST, HIGHEST, count, dtype=torch.float64).tolist()


def scaled_prompts(prompts: Prompts, family: Family, factors: Sequence[float]) -> Prompts:
    """The same prompts at every scale, one scale after the other: xs (S B, K, D)."""
    signal = (prompts.xs * prompts.ws.unsqueeze(-2)).sum(-1)  # B K
    noise = prompts.ys - signal
    factor = signal.new_tensor(factors)[:, None, None]  # S 1 1
    ys = factor * signal + noise  # S B K
    scaled, same = factor.unsqueeze(-1) * prompts.xs, prompts.xs.expand(len(factors), *prompts.xs.shape)
    tasks, own = factor * prompts.ws, prompts.ws.expand(len(factors), *prompts.ws.shape)
    xs, ws = (scaled, own) if family == "input_scale" else (same, tasks)
    return Prompts(xs.flatten(0, 1), ys.flatten(0, 1), ws.flatten(0, 1))


def curve(predictions: Float[Tensor, "*N P K"], targets: Float[Tensor, "P K"], factors: Sequence[float]) -> Curve:
    """The two numbers at every scale, of predictions for `scaled_prompts` (P = S B)."""
    shape = (len(factors), -1)
    given = predictions.double().unflatten(-2, shape)  # *N S B K
    wanted = targets.double().unflatten(0, shape)  # S B K
    squares = wanted.new_tensor(factors).square()[:, None]  # S 1
    errors = metrics.squared_error(given, wanted).mean(-1) / squares  # *N S B
    ratio = metrics.ratio_of_means(given.square().mean(-1), wanted.square().mean(-1))
    root = ratio.value.sqrt()
    return Curve(
        metrics.overall_mean(errors.unsqueeze(-1)), Estimate(root, (ratio.stderr / (2 * root)).nan_to_num(nan=0.0))
    )


def curve_rows(predict: Predict, params: Params, prompts: Prompts, factors: Sequence[float]) -> list[list[Row]]:
    """The rows of every member, in both families."""
    members: list[list[Row]] = []
    for family in FAMILIES:
        scaled = scaled_prompts(prompts, family, factors)
        found = curve(predict_prompts(predict, params, scaled).cpu(), scaled.ys.cpu(), factors)
        for index in range(len(found.size_ratio.value)):
            if index == len(members):
                members.append([])
            members[index] += _rows(family, factors, found, index)
    return members


def _rows(family: str, factors: Sequence[float], found: Curve, index: int) -> Iterator[Row]:
    for quantity, estimate in found._asdict().items():
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
