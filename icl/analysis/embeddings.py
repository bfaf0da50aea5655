"""What training does to the embeddings, the layer norms and the unembedding: spectra, overlaps, collapse.

All numbers are exact functions of the weights, so they have no standard errors. W_E (C, D + 1) embeds tokens, W_P (C, 2K)
positions, W_U reads out; its row 0 alone gives predictions, the others and the last position are never trained.

- `spectrum_share`, part `token_embedding`, `position_embedding` or `unembedding`: s_i^2 / sum s^2 of its singular values, largest
  first in `component` (embedding collapse, Hoogland et al. 2024); `norm` is sqrt(sum s^2), `effective_rank` (sum s^2)^2 / sum s^4.
- `overlap`, part `A on B`: the mean squared cosine of the principal angles (Bjorck and Golub 1973) between the subspaces spanned by
  the directions of A and B that carry all but 1 - `spectrum_kept` of sum s^2; `cosine` has each angle's, largest first, and
  `overlap_chance` is what a random subspace of A's size has on average, dim B / C with B the larger. The third subspace is the
  direction that is read out, the effective unembedding below. The authors' figure instead multiplied by the full C x C factor U of a
  singular value decomposition: a rotation, which changes no norm and so says nothing of a subspace.
- Layer-norm collapse, part `<norm>.weight` (gamma) or `.bias` (beta): `mean`, `std`, `min`, `max`, `norm` and `share_small`, the share
  of entries smaller than `threshold` in absolute value. The threshold is absolute, so the share of a growing vector falls.
- Unembedding collapse: `weight` in part `effective_unembedding`, W_U[0] * gamma_f, one for each channel in `component`, with the
  same statistics; `bias` is W_U[0] . beta_f + b_U[0]. The final norm centres its input, so a constant may be added to all weights
  and nothing changes; nothing is subtracted here, as nothing was in the published figures.
- `share_small` of every other weight tensor, and in part `all` of all parameters: the share of dead weights.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from icl.analysis.run import Members, Result, as_table, over_checkpoints
from icl.measure import Entry, Measurement
from icl.stacked import Params
from icl.validation import ConfigError

VERSION = 1

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What `icl analyse RUN --what embeddings` can be told."""

    threshold: float = field(default=0.1, metadata={"help": "a weight below this in absolute value counts as dead"})
    spectrum_kept: float = field(
        default=0.99, metadata={"help": "share of a matrix's squared singular values that its subspace must carry"}
    )

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise ConfigError(f"`threshold` must be positive, got {self.threshold}.")
        if not 0 < self.spectrum_kept <= 1:
            raise ConfigError(f"`spectrum_kept` must be above 0 and at most 1, got {self.spectrum_kept}.")


class Readout(NamedTuple):
    """What the last layer norm and the unembedding do together to the normalised stream."""

    weight: Float[Tensor, " C"]
    bias: Float[Tensor, ""]


def analyse(path: Path, settings: Settings) -> Result:
    """Every saved step's weights.

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
    """The rows of every member."""
    weights = [
        {name: tensor[n].cpu().double() for name, tensor in members.params.items()}
        for n in range(len(members.checkpoints))
    ]
    return [Measurement([*_matrix_rows(one, settings), *_weight_rows(one, settings)]) for one in weights]


def effective_unembedding(params: Params) -> Readout:
    """W_U[0] * gamma_f and W_U[0] . beta_f + b_U[0]; without a layer norm, or without a bias, what there is."""
    row = params["unembedding.weight"][0]
    weight = row * params.get("final_norm.weight", torch.ones_like(row))
    bias = row @ params.get("final_norm.bias", torch.zeros_like(row))
    return Readout(weight, bias + params["unembedding.bias"][0] if "unembedding.bias" in params else bias)


def spectrum_shares(matrix: Float[Tensor, "C R"]) -> Float[Tensor, " r"]:
    """s_i^2 / sum s^2, largest first; NaN for a matrix of zeros."""
    squares = torch.linalg.svdvals(matrix).square()
    return squares / squares.sum()


def subspace(matrix: Float[Tensor, "C R"], kept: float) -> Float[Tensor, "C r"]:
    """An orthonormal basis of the fewest left singular directions that carry a share `kept` of sum s^2.

    With kept = 1 this is the column space, without the directions that are zero to rounding.
    """
    directions, values, _ = torch.linalg.svd(matrix, full_matrices=False)
    carried = values.square().cumsum(0) / values.square().sum()
    rounding = values[0] * max(matrix.shape) * torch.finfo(matrix.dtype).eps
    count = min(int((carried < kept).sum()) + 1, int((values > rounding).sum()))
    return directions[:, :count]


def principal_cosines(first: Float[Tensor, "C r"], second: Float[Tensor, "C s"]) -> Float[Tensor, " c"]:
    """The cosines of the principal angles between two subspaces, given by orthonormal bases; largest first."""
    return torch.linalg.svdvals(first.mT @ second).clamp(max=1)


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
    bases = {
        name: subspace(matrices[name], settings.spectrum_kept) for name in ("token_embedding", "position_embedding")
    }
    bases["readout"] = subspace(effective_unembedding(params).weight.unsqueeze(-1), 1.0)
    pairs = (
        ("token_embedding", "position_embedding"),
        ("readout", "token_embedding"),
        ("readout", "position_embedding"),
    )
    for name, other in pairs:
        part, cosines = f"{name} on {other}", principal_cosines(bases[name], bases[other])
        yield from _component_rows("cosine", part, cosines)
        yield _row("overlap", part, cosines.square().mean().item())
        larger = max(bases[name].shape[1], bases[other].shape[1])
        yield _row("overlap_chance", part, larger / len(bases[name]))


def _weight_rows(params: Params, settings: Settings) -> Iterator[Row]:
    readout = effective_unembedding(params)
    yield from _component_rows("weight", "effective_unembedding", readout.weight)
    yield _row("bias", "effective_unembedding", readout.bias.item())
    norms = {name: tensor for name, tensor in params.items() if "norm" in name}
    for part, values in {**norms, "effective_unembedding": readout.weight}.items():
        yield _row("mean", part, values.mean().item())
        yield _row("std", part, values.std(correction=0).item())
        yield _row("min", part, values.min().item())
        yield _row("max", part, values.max().item())
        yield _row("norm", part, values.norm().item())
    everything = torch.cat([tensor.flatten() for tensor in params.values()])
    for part, values in {**params, "effective_unembedding": readout.weight, "all": everything}.items():
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
    before = f"step {entries[0].step:,} -> " if len(entries) > 1 else ""
    lines = [f"{before}step {entries[-1].step:,}, the last of {len(entries)}:".capitalize()]
    for (quantity, part), value in last.items():
        if quantity in ("effective_rank", "overlap") or (
            quantity == "share_small" and part in ("effective_unembedding", "all")
        ):
            chance = f"   (by chance {last['overlap_chance', part]:.3f})" if quantity == "overlap" else ""
            change = f"{first[quantity, part]:.3f} -> " if len(entries) > 1 else ""
            name = f"share below {settings.threshold:g}" if quantity == "share_small" else quantity.replace("_", " ")
            lines.append(f"  {name:17s} {part:38s} {change}{value:.3f}{chance}")
    return lines
