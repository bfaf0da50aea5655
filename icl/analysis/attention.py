"""Attention of every head at every saved step: mean patterns on fixed prompts, and scores of the patterns.

A prompt has T = 2K - 1 tokens x1, y1, ..., xK, numbered from k = 0 to T - 1. Query token k attends to the tokens j <= k with weights p_kj,
which sum to 1. We compute the following scores of a query k, as in the attention figures of Hoogland et al. 2024. Each score is averaged
over prompts, and has the standard error of this average.

- `entropy`: -sum_j p_kj log p_kj / log(k + 1). It is 1 for uniform attention and 0 for attention to a single token.
- `variability`: half of sum_j |p_kj - m_kj|, where m is the mean pattern over prompts (a total variation distance). It is 0 if
  the pattern is the same for all prompts.
- `self`: p_kk. `previous`: p_k,k-1. `x_tokens`, `y_tokens`: the sums of p_kj over even j and over odd j.
- `lag`: sum_j p_kj (k - j) / k. It is 0 for the token itself, 1 for the first token, and 1/2 for uniform attention.
- `hardness`: the share of the k + 1 visible tokens with p_kj <= 0.001.

The published code has errors that we do not repeat:

- `hardness` was the share of all T tokens with p_kj <= 0.001, so it included the masked tokens j > k. This share was
  then divided by k + 1.
- The distance to the attended token was sum_j p_kj j / (k + 1). This is a mean position, not a distance.
- The averages over the x- and y-tokens of a whole block took every second head instead of every second token.
- In one place, an entropy in nats was divided by a logarithm to base 2.
- The averages included k = 0. Token 0 can attend only to itself, so the entropy was 0 / 0 and the score `previous` was
  0. We leave k = 0 out of every average.

Every score is averaged over each of three sets of queries: `all` tokens, the x-tokens (`x`) and the y-tokens (`y`). For example, a
head that attends from y-tokens to x-tokens has a high score `x_tokens` for the queries `y`.

The column `part` names the head: `b1h1` is the first head of the first block. For comparison, rows with part `uniform`
contain the scores of uniform attention over all visible tokens. Rows with quantity `pattern` contain the mean weights at
the last saved step, one row for each pair of tokens. The mean patterns of all steps are in `results/attention/`.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from icl import metrics
from icl.analysis.prompts import PromptSettings, fixed_prompts, prompts_at_once
from icl.analysis.run import Members, Result, as_table, over_checkpoints, setting
from icl.build import build_architecture
from icl.config.validation import require_count
from icl.metrics import Estimate
from icl.model.stacked import Params, unstack
from icl.model.transformer import Attention, Transformer
from icl.runs.measure import Entry, Measurement
from icl.tasks.prompts import Prompts

HARD = 1e-3
"""Largest attention weight that counts as zero in `hardness`."""
QUERIES: tuple[Literal["all", "x", "y"], ...] = ("all", "x", "y")
VERSION = 1

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Settings(PromptSettings):
    """Options of `icl analyse RUN --what attention`."""

    num_prompts: int = setting(512, "number of prompts")

    def __post_init__(self) -> None:
        require_count("num_prompts", self.num_prompts, 2)


def analyse(path: Path, settings: Settings) -> Result:
    """Score every head at every saved step, and return the mean patterns of the last step.

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
    """Measure the scores of all heads and the mean patterns (L, H, T, T) of every checkpoint."""
    prompts = fixed_prompts(members, "attention/prompts", settings.distribution, settings.num_prompts)
    at_once = prompts_at_once(members)
    model = build_architecture(members.config).to(prompts.xs.device)
    assert isinstance(model, Transformer)  # `icl.analysis.name_for` refuses language runs
    measurements = []
    for params in unstack(members.params):
        layers = patterns(model, params, prompts, prompts_at_once=at_once)  # L B H T T
        rows: list[Row] = []
        for block, layer in enumerate(layers, start=1):
            for head, pattern in enumerate(layer.unbind(1), start=1):
                rows += _score_rows(f"b{block}h{head}", scores(pattern))
        mean = torch.stack([layer.mean(0) for layer in layers]).cpu().numpy()
        measurements.append(Measurement(rows, {"patterns": mean}))
    return measurements


@torch.no_grad()
def patterns(
    model: Transformer, params: Params, prompts: Prompts, *, prompts_at_once: int
) -> list[Float[Tensor, "B H T T"]]:
    """Return the attention weights of every block for one parameter set. Rows are queries, columns are keys."""
    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    recorded: list[list[Tensor]] = [[] for _ in attentions]
    with ExitStack() as stack:
        for attention, parts in zip(attentions, recorded, strict=True):
            stack.callback(attention.qkv.register_forward_hook(partial(_record, attention, parts)).remove)
        for xs, ys in zip(prompts.xs.split(prompts_at_once), prompts.ys.split(prompts_at_once), strict=True):
            functional_call(model, params, (xs, ys))
    return [torch.cat(parts) for parts in recorded]


def uniform_pattern(num_tokens: int) -> Float[Tensor, "1 T T"]:
    """Return the pattern of uniform attention over all visible tokens."""
    visible = torch.ones(1, num_tokens, num_tokens, dtype=torch.float64).tril()
    return visible / visible.sum(-1, keepdim=True)


def scores(pattern: Float[Tensor, "B T T"]) -> dict[str, Float[Tensor, "B Q"]]:
    """Return the scores of one head for every prompt and each of the Q = T - 1 queries k = 1 to T - 1."""
    pattern = pattern.cpu().double()
    positions = torch.arange(pattern.shape[-1], dtype=torch.float64)  # positions of queries (k) and of keys (j)
    visible = torch.ones(pattern.shape[-2:], dtype=torch.bool).tril()
    lag = (positions.unsqueeze(-1) - positions) / positions.unsqueeze(-1)  # T T; row 0 is NaN and is left out below
    previous = torch.nn.functional.pad(pattern.diagonal(-1, dim1=-2, dim2=-1), (1, 0))  # B T
    by_query = {
        "entropy": -torch.special.xlogy(pattern, pattern).sum(-1) / (positions + 1).log(),
        "variability": (pattern - pattern.mean(0)).abs().sum(-1) / 2,
        "self": pattern.diagonal(dim1=-2, dim2=-1),
        "previous": previous,
        "x_tokens": pattern[..., ::2].sum(-1),
        "y_tokens": pattern[..., 1::2].sum(-1),
        "lag": (pattern * lag).sum(-1),
        "hardness": ((pattern <= HARD) & visible).sum(-1) / (positions + 1),
    }
    return {name: values[:, 1:] for name, values in by_query.items()}


def over_queries(values: Float[Tensor, "B Q"], queries: Literal["all", "x", "y"]) -> Estimate:
    """Return the mean over a set of queries (without k = 0) and over prompts; NaN if the set is empty."""
    # The first column is k = 1, a y-token.
    return metrics.overall_mean({"all": values, "x": values[:, 1::2], "y": values[:, ::2]}[queries])


def _record(
    attention: Attention, parts: list[Tensor], module: nn.Module, inputs: Any, qkv: Float[Tensor, "B T E"]
) -> None:
    """Append the attention weights that `Attention.forward` computes from these queries and keys."""
    heads = qkv.unflatten(-1, (attention.num_heads, 3, attention.head_size))  # B T H 3 c
    q, k = heads[..., 0, :].transpose(1, 2), heads[..., 1, :].transpose(1, 2)  # B H T c
    future = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool, device=q.device).triu(1)
    logits = q @ k.mT / math.sqrt(attention.head_size)  # B H T T
    parts.append(logits.masked_fill(future, -math.inf).softmax(dim=-1))


def _score_rows(head: str, by_query: dict[str, Tensor]) -> Iterator[Row]:
    for quantity, values in by_query.items():
        for queries in QUERIES:
            value, stderr = (number.item() for number in over_queries(values, queries))
            yield _row(quantity, head, queries, value, stderr)


def _pattern_rows(entry: Entry) -> Iterator[Row]:
    """Yield the mean weights of one step, for visible tokens only."""
    mean = entry.arrays["patterns"]
    checkpoint = {"step": entry.step, "checkpoint_hash": entry.checkpoint_hash}
    for block, head, query, key in zip(*np.nonzero(np.tril(np.ones_like(mean))), strict=True):
        weight = float(mean[block, head, query, key])
        row = _row("pattern", f"b{block + 1}h{head + 1}", "", weight, math.nan)
        yield checkpoint | row | {"query_token": int(query), "key_token": int(key)}


def _row(quantity: str, head: str, queries: str, value: float, stderr: float) -> Row:
    return {"quantity": quantity, "part": head, "queries": queries, "value": value, "stderr": stderr}


def _summary(entries: list[Entry], uniform: list[Row]) -> list[str]:
    """Return lines that name the head with the highest value of each score at the last step."""
    lines = [
        f"Head with the highest value of each score at step {entries[-1].step:,}, the last of {len(entries)} saved steps:"
    ]
    for quantity in ("entropy", "variability", "self", "previous", "x_tokens", "y_tokens"):
        heads, (reference,) = (
            [row for row in rows if row["quantity"] == quantity and row["queries"] == "all"]
            for rows in (entries[-1].rows, uniform)
        )
        top = max(heads, key=lambda row: row["value"])
        value = f"{top['value']:.3f} ± {top['stderr']:.2g}"
        lines.append(f"  {quantity:12s} {top['part']:8s} {value}   (uniform attention: {reference['value']:.3f})")
    return lines
