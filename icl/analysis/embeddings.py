"""Embeddings, layer norms and unembedding over training: spectra, overlaps and collapse.

All numbers are exact functions of the weights, so they have no standard errors. If a weight of a checkpoint is not
finite, all numbers of this checkpoint are NaN.

W_E (C, D + 1) embeds tokens. W_P (2K, C) has one row for each position. W_U maps the residual stream to the outputs,
and has one row for each output. If `model.output` is `scalar`, W_U has one row. If it is `token`, only row 0 of W_U
gives predictions. If it is `gaussian`, row 0 gives the mean of the predictive distribution. If it is `mixture`, row 0
gives the mean of the first component.

Some rows get no gradient: the last row of W_P and, if `model.output` is `token`, all rows of W_U except row 0. Only
weight decay changes these rows. They still enter the spectra of W_P and W_U, the overlaps of W_P, and the shares of
dead weights.

Rows of the table, by `quantity`:

- `spectrum_share`: s_i^2 / sum s^2 for the singular values s_i of part `token_embedding`, `position_embedding` or
  `unembedding`. `component` is the index i, and the largest singular value has i = 1. These shares show embedding
  collapse (Hoogland et al. 2024). `norm` is sqrt(sum s^2). `effective_rank` is the participation ratio
  (sum s^2)^2 / sum s^4.
- `overlap`, part `A on B`: the mean squared cosine of the principal angles (Bjorck and Golub 1973) between two
  subspaces of the C channels. The subspace of W_E, or of W_P transposed, is spanned by the fewest left singular vectors
  that hold at least the share `spectrum_kept` of sum s^2. The subspace `readout` is the direction of the effective
  unembedding (below). `cosine` is the cosine of each principal angle, largest first. `overlap_chance` is the mean
  overlap of two random subspaces with the same dimensions d1 and d2: max(d1, d2) / C. Hoogland et al. 2024 show cosines
  between W_E and W_P. We do not repeat their computation. They multiplied each column of W_E by the full C x C factor U
  of the singular value decomposition of W_P transposed. Their cosine is between the column and this product. U is
  orthogonal, but it does not project onto a subspace. Their cosines therefore say nothing about subspaces.
- Layer-norm collapse, part `<norm>.weight` (gamma) or `<norm>.bias` (beta): `mean`, `std`, `min`, `max`, `norm`, and
  `share_small`, the share of entries whose absolute value is below `threshold`. The threshold is absolute, so the share
  falls when a vector grows.
- Unembedding collapse, part `effective_unembedding`: `weight` is W_U[0] * gamma_f, with the channel in `component`. The
  rows `mean`, `std`, `min`, `max`, `norm` and `share_small` of this part are statistics of the vector of these weights.
  `bias` is W_U[0] . beta_f + b_U[0]. Here gamma_f and beta_f are the weight and the bias of the final norm, and b_U is
  the bias of the unembedding. If there is a final norm, it centres its input, so adding one constant to all weights of
  this part changes no prediction. As in the published figures, we do not subtract the mean of the weights.
- `share_small` is also given for every other parameter tensor (including biases) and, in part `all`, for all parameters
  together. There it is the share of dead weights.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from icl.analysis.run import Members, Result, as_table, over_checkpoints, setting
from icl.config.validation import require, require_number
from icl.model.stacked import Params, unstack
from icl.runs.measure import Entry, Measurement

VERSION = 1

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of `icl analyse RUN --what embeddings`."""

    threshold: float = setting(0.1, "weights below this absolute value count as dead")
    spectrum_kept: float = setting(
        0.99, "share of the sum of squared singular values that the subspace of a matrix must cover"
    )

    def __post_init__(self) -> None:
        require_number("threshold", self.threshold, "positive")
        is_share = 0 < self.spectrum_kept <= 1
        require(is_share, f"`spectrum_kept` must be above 0 and at most 1, got {self.spectrum_kept}.")


class Readout(NamedTuple):
    """The linear map from the normalised residual stream to the prediction: final layer norm and unembedding combined."""

    weight: Float[Tensor, " C"]
    bias: Float[Tensor, ""]


def analyse(path: Path, settings: Settings) -> Result:
    """Analyse the weights at every saved step.

    Raises:
        CheckpointError: If there is no usable checkpoint.
    """
    entries, _ = over_checkpoints(
        "embeddings", path, settings, partial(measure_members, settings=settings), version=VERSION
    )
    table = as_table(entries, settings)
    table["component"] = table["component"].astype("Int64")
    return Result(table, _summary(entries, settings))


def measure_members(members: Members, *, settings: Settings) -> list[Measurement]:
    """Measure the weights of every checkpoint, in float64."""
    params = {name: tensor.cpu().double() for name, tensor in members.params.items()}
    return [Measurement(_rows(each, settings)) for each in unstack(params)]


def effective_unembedding(params: Params) -> Readout:
    """Return W_U[0] * gamma_f and W_U[0] . beta_f + b_U[0].

    Without a final norm, gamma_f is 1 and beta_f is 0. Without a bias, b_U is 0.
    """
    row = params["unembedding.weight"][0]
    weight = row * params.get("final_norm.weight", torch.ones_like(row))
    bias = row @ params.get("final_norm.bias", torch.zeros_like(row))
    return Readout(weight, bias + params["unembedding.bias"][0] if "unembedding.bias" in params else bias)


def spectrum_shares(matrix: Float[Tensor, "C R"]) -> Float[Tensor, " r"]:
    """Return s_i^2 / sum s^2 for the singular values s_i, largest first; NaN for a matrix of zeros."""
    squares = torch.linalg.svdvals(matrix).square()
    return squares / squares.sum()


def subspace(matrix: Float[Tensor, "C R"], kept: float) -> Float[Tensor, "C r"]:
    """Return the fewest left singular vectors that hold at least the share `kept` of sum s^2, as an orthonormal basis.

    With kept = 1 this is a basis of the column space. Vectors whose singular value is zero up to rounding are left out.
    """
    directions, values, _ = torch.linalg.svd(matrix, full_matrices=False)
    shares = values.square().cumsum(0) / values.square().sum()
    rounding = values[0] * max(matrix.shape) * torch.finfo(matrix.dtype).eps
    count = min(int((shares < kept).sum()) + 1, int((values > rounding).sum()))
    return directions[:, :count]


def principal_cosines(first: Float[Tensor, "C r"], second: Float[Tensor, "C s"]) -> Float[Tensor, " c"]:
    """Return the cosines of the principal angles between two subspaces, largest first.

    Args:
        first: Orthonormal basis of one subspace.
        second: Orthonormal basis of the other subspace.
    """
    return torch.linalg.svdvals(first.mT @ second).clamp(max=1)


def _rows(params: Params, settings: Settings) -> list[Row]:
    if all(bool(tensor.isfinite().all()) for tensor in params.values()):
        return [*_matrix_rows(params, settings), *_weight_rows(params, settings)]
    # These weights would make the singular value decomposition raise an error. So we compute the rows for weights of zero (which give
    # no `cosine` rows), and then set their values to NaN.
    zeros = {name: torch.zeros_like(tensor) for name, tensor in params.items()}
    return [row | {"value": torch.nan} for row in _rows(zeros, settings)]


def _matrix_rows(params: Params, settings: Settings) -> Iterator[Row]:
    matrices = {
        "token_embedding": params["token_embedding.weight"],
        "position_embedding": params["position_embedding"].mT,
        "unembedding": params["unembedding.weight"].mT,
    }
    for part, matrix in matrices.items():
        shares = spectrum_shares(matrix)
        yield from _component_rows("spectrum_share", part, shares)
        yield _row("norm", part, matrix.norm().item())
        yield _row("effective_rank", part, (1 / shares.square().sum()).item())
    tokens = subspace(matrices["token_embedding"], settings.spectrum_kept)
    positions = subspace(matrices["position_embedding"], settings.spectrum_kept)
    readout = subspace(effective_unembedding(params).weight.unsqueeze(-1), 1.0)
    for part, first, second in (
        ("token_embedding on position_embedding", tokens, positions),
        ("readout on token_embedding", readout, tokens),
        ("readout on position_embedding", readout, positions),
    ):
        cosines = principal_cosines(first, second)
        yield from _component_rows("cosine", part, cosines)
        yield _row("overlap", part, cosines.square().mean().item())
        yield _row("overlap_chance", part, max(first.shape[1], second.shape[1]) / len(first))


def _weight_rows(params: Params, settings: Settings) -> Iterator[Row]:
    readout = effective_unembedding(params)
    yield from _component_rows("weight", "effective_unembedding", readout.weight)
    yield _row("bias", "effective_unembedding", readout.bias.item())
    vectors = {**params, "effective_unembedding": readout.weight}
    for part in [*(name for name in params if "norm" in name), "effective_unembedding"]:
        values = vectors[part]
        yield _row("mean", part, values.mean().item())
        yield _row("std", part, values.std(correction=0).item())
        yield _row("min", part, values.min().item())
        yield _row("max", part, values.max().item())
        yield _row("norm", part, values.norm().item())
    all_parameters = torch.cat([tensor.flatten() for tensor in params.values()])
    for part, values in {**vectors, "all": all_parameters}.items():
        yield _row("share_small", part, (values.abs() < settings.threshold).double().mean().item())


def _component_rows(quantity: str, part: str, values: Tensor) -> Iterator[Row]:
    for number, value in enumerate(values.tolist(), start=1):
        yield _row(quantity, part, value, number)


def _row(quantity: str, part: str, value: float, component: int | None = None) -> Row:
    return {"quantity": quantity, "part": part, "component": component, "value": value}


def _summary(entries: list[Entry], settings: Settings) -> list[str]:
    first, last = (
        {(row["quantity"], row["part"]): row["value"] for row in entry.rows if row["component"] in (None, 1)}
        for entry in (entries[0], entries[-1])
    )
    first_step = f"step {entries[0].step:,} -> " if len(entries) > 1 else ""
    lines = [f"{first_step}step {entries[-1].step:,}, the last of {len(entries)} saved steps:".capitalize()]
    for (quantity, part), value in last.items():
        is_share = quantity == "share_small" and part in ("effective_unembedding", "all")
        if is_share or quantity in ("effective_rank", "overlap"):
            chance = f"   (by chance: {last['overlap_chance', part]:.3f})" if quantity == "overlap" else ""
            change = f"{first[quantity, part]:.3f} -> " if len(entries) > 1 else ""
            name = f"share below {settings.threshold:g}" if is_share else quantity.replace("_", " ")
            lines.append(f"  {name:17s} {part:38s} {change}{value:.3f}{chance}")
    diverged = [entry.step for entry in entries if all(math.isnan(row["value"]) for row in entry.rows)]
    if diverged:
        steps = f"{len(diverged)} of {len(entries)} saved steps, first at step {diverged[0]:,}"
        advice = "Check the loss in metrics.csv: training may have diverged."
        lines.append(f"Weights are not finite at {steps}, so the numbers of these steps are NaN. {advice}")
    return lines
