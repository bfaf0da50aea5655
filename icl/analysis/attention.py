"""What every head attends to at every saved step: its patterns on fixed prompts, and scores of them.

Token k = 0 .. T - 1 of the T = 2K - 1 (x1, y1, ..., xK) gives the tokens j <= k weights p_kj that sum to 1. Scores of a query k are
those of Hoogland et al. 2024 (figures on attention), each averaged over prompts, with standard errors over prompts:

- `entropy`: -sum_j p_kj log p_kj / log(k + 1); 1 is uniform, 0 a single token.
- `variability`: half of sum_j |p_kj - mean over prompts of p_kj|, the total variation distance to the mean pattern; 0 is a
  pattern fixed by position alone.
- `self`: p_kk. `previous`: p_k,k-1. `x_tokens`, `y_tokens`: the sums of p_kj over even and over odd j.
- `lag`: sum_j p_kj (k - j) / k; 0 is the token itself, 1 the first one, 1/2 uniform.
- `hardness`: the share of the k + 1 visible tokens with p_kj <= 0.001.

What was wrong in the published code and is not here: its hardness counted the masked tokens j > k as well but divided by k + 1;
its distance was the mean position sum_j p_kj j / (k + 1) and no lag; averages over x- and y-tokens of a whole block
took every second head instead of every second token; an entropy in bits was divided by natural logarithms in one place; and at
k = 0, where the pattern is 1 whatever the head does, entropy was 0 / 0 and the previous token's score 0. We leave k = 0
out of every average. Averages over queries come three times: `all`, those at `x` and those at `y` (a head named "y to x-tokens"
is high in `x_tokens` of query `y`).

Head h of block b is `b1h1`, counted from 1; `uniform` is a head that weighs all visible tokens alike, which a score must be held
against. Rows `pattern` are the mean weights of the last saved step, token by token; those of all steps are kept in the entries.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from icl import metrics
from icl.analysis.prompts import fixed_prompts, prompts_at_once
from icl.analysis.run import Members, Result, as_table, over_checkpoints
from icl.build import build_architecture
from icl.measure import Entry, Measurement
from icl.metrics import Estimate
from icl.stacked import Params, unstack
from icl.tasks.prompts import Prompts
from icl.transformer import Attention, Transformer
from icl.validation import ConfigError

HARD = 1e-3
"""A weight that counts as none."""
QUERIES: tuple[Literal["all", "x", "y"], ...] = ("all", "x", "y")
VERSION = 1

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What `icl analyse RUN --what attention` can be told."""

    distribution: Literal["pretrain", "true"] = field(
        default="pretrain", metadata={"help": "tasks of the prompts: the run's M, or new ones"}
    )
    num_prompts: int = field(default=512, metadata={"help": "prompts"})

    def __post_init__(self) -> None:
        if self.num_prompts < 2:
            raise ConfigError(f"`num_prompts` must be at least 2, got {self.num_prompts}.")


def analyse(path: Path, settings: Settings) -> Result:
    """The scores of every head at every saved step, and the mean patterns of the last.

    Raises:
        CheckpointError: If there is no usable checkpoint.
    """
    entries, config = over_checkpoints(
        "attention", path, settings, partial(measure_members, settings=settings), version=VERSION
    )
    uniform = list(_score_rows("uniform", scores(uniform_pattern(2 * config.task.max_examples - 1))))
    table = as_table(entries, settings, whole_run=[*uniform, *_pattern_rows(entries[-1])])
    for column in ("query_token", "key_token"):
        table[column] = table[column].astype("Int64")
    return Result(table, _summary(entries, uniform))


def measure_members(members: Members, *, settings: Settings) -> list[Measurement]:
    """The rows of every member, and its mean patterns (L, H, T, T)."""
    prompts = fixed_prompts(
        members, stream="attention/prompts", distribution=settings.distribution, count=settings.num_prompts
    )
    at_once = prompts_at_once(members)
    model = build_architecture(members.config).to(prompts.xs.device)
    found = []
    for params in unstack(members.params):
        seen = patterns(model, params, prompts, prompts_at_once=at_once)  # L B H T T
        rows: list[Row] = []
        for block, layer in enumerate(seen, start=1):
            for head, pattern in enumerate(layer.unbind(1), start=1):
                rows += _score_rows(f"b{block}h{head}", scores(pattern))
        mean = torch.stack([layer.mean(0) for layer in seen]).cpu().numpy()
        found.append(Measurement(rows, {"patterns": mean}))
    return found


@torch.no_grad()
def patterns(
    model: Transformer, params: Params, prompts: Prompts, *, prompts_at_once: int
) -> list[Float[Tensor, "B H T T"]]:
    """The attention weights of every block, in a forward pass of one parameter set: rows are queries, columns keys."""
    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    found: list[list[Tensor]] = [[] for _ in attentions]
    with ExitStack() as stack:
        for attention, kept in zip(attentions, found, strict=True):
            stack.callback(attention.qkv.register_forward_hook(partial(_keep, attention, kept)).remove)
        for xs, ys in zip(prompts.xs.split(prompts_at_once), prompts.ys.split(prompts_at_once), strict=True):
            functional_call(model, params, (xs, ys))
    return [torch.cat(kept) for kept in found]


def uniform_pattern(num_tokens: int) -> Float[Tensor, "1 T T"]:
    """The pattern of a head that weighs all visible tokens alike."""
    visible = torch.ones(1, num_tokens, num_tokens, dtype=torch.float64).tril()
    return visible / visible.sum(-1, keepdim=True)


def scores(pattern: Float[Tensor, "B T T"]) -> dict[str, Float[Tensor, "B Q"]]:
    """The scores of one head for every prompt and each of the Q = T - 1 queries k = 1 .. T - 1."""
    pattern = pattern.cpu().double()
    lengths = torch.arange(pattern.shape[-1], dtype=torch.float64)  # k, also the position of a key
    visible = torch.ones(pattern.shape[-2:], dtype=torch.bool).tril()
    lag = (lengths.unsqueeze(-1) - lengths) / lengths.unsqueeze(-1)  # T T; row 0 is NaN and is left out below
    mean = pattern.mean(0)
    previous = torch.nn.functional.pad(pattern.diagonal(-1, dim1=-2, dim2=-1), (1, 0))  # B T
    found = {
        "entropy": -torch.special.xlogy(pattern, pattern).sum(-1) / (lengths + 1).log(),
        "variability": (pattern - mean).abs().sum(-1) / 2,
        "self": pattern.diagonal(dim1=-2, dim2=-1),
        "previous": previous,
        "x_tokens": pattern[..., ::2].sum(-1),
        "y_tokens": pattern[..., 1::2].sum(-1),
        "lag": (pattern * lag).sum(-1),
        "hardness": ((pattern <= HARD) & visible).sum(-1) / (lengths + 1),
    }
    return {name: values[:, 1:] for name, values in found.items()}


def over_queries(values: Float[Tensor, "B Q"], queries: Literal["all", "x", "y"]) -> Estimate:
    """The mean over queries of a kind, k = 0 left out, and over prompts; NaN if there is no such query."""
    chosen = {"all": values, "x": values[:, 1::2], "y": values[:, ::2]}[queries]  # the first column is k = 1, a y-token
    return metrics.overall_mean(chosen)


def _keep(
    attention: Attention, kept: list[Tensor], module: nn.Module, inputs: Any, qkv: Float[Tensor, "B T E"]
) -> None:
    """The weights that the attention is about to use, from its own queries and keys; as `Attention.forward`."""
    heads = qkv.unflatten(-1, (attention.num_heads, 3, attention.head_size))  # B T H 3 c
    q, k = heads[..., 0, :].transpose(1, 2), heads[..., 1, :].transpose(1, 2)  # B H T c
    future = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool, device=q.device).triu(1)
    logits = q @ k.mT / math.sqrt(attention.head_size)  # B H T T
    kept.append(logits.masked_fill(future, -math.inf).softmax(dim=-1))


def _score_rows(head: str, found: dict[str, Tensor]) -> Iterator[Row]:
    for quantity, values in found.items():
        for queries in QUERIES:
            value, stderr = (number.item() for number in over_queries(values, queries))
            yield _row(quantity, head, queries, value, stderr)


def _pattern_rows(entry: Entry) -> Iterator[Row]:
    """The mean weights of one step, visible tokens only."""
    mean = entry.arrays["patterns"]
    at = {"step": entry.step, "checkpoint_hash": entry.checkpoint_hash}
    for block, head, query, key in zip(*np.nonzero(np.tril(np.ones_like(mean))), strict=True):
        weight = float(mean[block, head, query, key])
        row = _row("pattern", f"b{block + 1}h{head + 1}", "", weight, math.nan)
        yield at | row | {"query_token": int(query), "key_token": int(key)}


def _row(quantity: str, head: str, queries: str, value: float, stderr: float) -> Row:
    return {"quantity": quantity, "part": head, "queries": queries, "value": value, "stderr": stderr}


def _summary(entries: list[Entry], uniform: list[Row]) -> list[str]:
    """Of the last step, for each score, the head that is farthest above what is uniform."""
    lines = [f"Step {entries[-1].step:,}, the last of {len(entries)}; the head with most of each score:"]
    for quantity in ("entropy", "variability", "self", "previous", "x_tokens", "y_tokens"):
        own = [row for row in entries[-1].rows if row["quantity"] == quantity and row["queries"] == "all"]
        most = max(own, key=lambda row: row["value"])
        chance = next(row["value"] for row in uniform if row["quantity"] == quantity and row["queries"] == "all")
        lines.append(
            f"  {quantity:12s} {most['part']:8s} {most['value']:.3f} ± {most['stderr']:.2g}   (uniform attention {chance:.3f})"
        )
    return lines
