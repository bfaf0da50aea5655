"""Behaviour of a language run at every saved step: the measurements of Hoogland et al. (2024), arXiv 2402.02364.

Every number that depends on rows of tokens has a standard error over rows. Rows of the table, by `quantity`:

- `loss`: loss on the test rows at each position, and averaged over positions (`mean`). Position k is the prediction of token k from the
  tokens before it.
- `icl_score`: late loss minus early loss, negative if context helps (`icl.evaluation.scores.icl_positions`).
- `bigram_score`: cross-entropy between the bigram frequencies q(t | s) and the model's prediction of the next token t,
  where s is the token at a random position. `bigram_floor`: the mean entropy of q(t | s), which is the lowest possible
  score.
- `ngram_score`, with n = 2, 3 or 4 in `position`: test loss at position n divided by the loss of the last token of
  common n-grams. In the paper, the n-grams are entries of a larger vocabulary (setting `vocabulary`). By default, we
  use the most frequent n-grams of the training text.
- `previous_token`, for each head (`part` is layer.head): attention to the token before the current one. `prefix_matching`, for each
  head: attention to the token after the earlier occurrence of the current token.
- `k_composition`, for each pair of heads: K-composition minus the mean over all pairs at the first saved step.
- `ablated_loss`: mean loss with the position embeddings set to zero. `ablation`: `ablated_loss` minus the mean loss.
- `weight_norm`: norm of all weights. `position_spectrum`: singular values of the position embeddings; `position` is the index
  of the singular value.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from icl import metrics
from icl.analysis.language import probes, released, scores, weights
from icl.analysis.run import Members, Result, as_table, over_checkpoints, setting
from icl.config import LanguageConfig, RunConfig
from icl.config.validation import ConfigError, require, require_count
from icl.evaluation.frequencies import frequencies
from icl.evaluation.scores import icl_positions
from icl.evaluation.sets import REPORT
from icl.files.reading import ContentError
from icl.files.tables import read_table
from icl.metrics import Estimate
from icl.runs.folder import run_of
from icl.runs.measure import Entry, Measurement
from icl.tasks.corpus import load_tokenizer, read_vocabulary
from icl.tasks.rows import TEST, RowSource, row_source

NAME = "language-behaviour"
VERSION = 1
NGRAMS = (2, 3, 4)
"""Lengths of the n-grams."""
_NUM_COUNTED = 2**18
"""Approximate number of tokens of the training text in which n-grams are counted."""

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of `icl analyse RUN --what behaviour` for a language run.

    The paper uses `num_rows` 10,016, `num_bigram_rows` 5,000, `num_probe_rows` 10,000 and `num_ngrams` 1,000.
    """

    num_rows: int = setting(
        1024, "number of test rows; for a run on a real text, at most the run's `evaluation.num_prompts` rows are used"
    )
    num_bigram_rows: int = setting(1024, "number of test rows for the bigram score")
    num_probe_rows: int = setting(1024, "number of rows of random tokens for each of the two scores of heads")
    num_ngrams: int = setting(100, "number of n-grams of each length")
    vocabulary: str | None = setting(
        None,
        "larger vocabulary whose entries are the n-grams, as in the paper: a file tokenizer.json, a list of texts (.json, or .txt with one "
        "text per line), or hf://USER/NAME; by default the n-grams are the most frequent ones of the training text",
    )
    tokenizer: str | None = setting(
        None,
        "tokenizer that made the run's tokens; needed only for `vocabulary`; by default the run's `language.tokenizer`",
    )

    def __post_init__(self) -> None:
        for name, least in (("num_rows", 2), ("num_bigram_rows", 2), ("num_probe_rows", 2), ("num_ngrams", 2)):
            require_count(name, getattr(self, name), least)
        require(
            self.tokenizer is None or self.vocabulary is not None,
            "`tokenizer` has an effect only with `vocabulary`; give both, or leave out `tokenizer`.",
        )


def analyse(path: Path, settings: Settings) -> Result:
    """Measure every saved step of a language run.

    Raises:
        CheckpointError: If there is no usable checkpoint.
        ConfigError: If the run is not a language run, or its text cannot be read.
    """
    measure = partial(measure_members, settings=settings)
    entries, config = over_checkpoints(NAME, path, settings, measure, version=VERSION)
    table = as_table(_from_start(entries), settings)
    lines = _summary(entries)
    if config.preset == released.PRESET:
        lines += released.beside_released(entries, _llcs(path))
    return Result(table, lines)


def _llcs(path: Path) -> pd.DataFrame:
    """Return the run's LLC estimates, or an empty table if there are none."""
    try:
        return pd.DataFrame() if path.is_file() else read_table(run_of(path).results / "llc.csv")
    except (OSError, ContentError):
        return pd.DataFrame()


def measure_members(members: Members, *, settings: Settings) -> list[Measurement]:
    """Return the rows of the table for every checkpoint."""
    if not members.config.model.is_language:
        raise ConfigError(
            "The analysis `language-behaviour` is for language runs only; use `behaviour` for a regression run."
        )
    rows: list[list[Row]] = [[] for _ in members.checkpoints]
    for quantity, part, position, estimate in _estimates(members, settings):
        for member, (value, error) in enumerate(zip(estimate.value.tolist(), estimate.stderr.tolist(), strict=True)):
            rows[member].append(_row(quantity, part, position, value, error))
    return [Measurement(member_rows) for member_rows in rows]


def _estimates(members: Members, settings: Settings) -> Iterator[tuple[str, str, str, Estimate]]:
    """Yield quantity, part, position, and the estimate (N,) of all members."""
    losses, rows = _test_losses(members, settings.num_rows)
    for position, (value, error) in enumerate(
        zip(*(part.unbind(1) for part in metrics.position_mean(losses)), strict=True)
    ):
        yield "loss", "", str(position + 1), Estimate(value, error)
    yield "loss", "", "mean", metrics.overall_mean(losses)
    first, second = icl_positions(losses.shape[-1])
    yield "icl_score", "", f"{first}:{second}", metrics.icl_score(losses, first, second)
    model = members.config.model
    ablated = scores.token_losses(model, scores.without_positions(members.params), rows)
    yield "ablated_loss", "", "mean", metrics.overall_mean(ablated)
    yield "ablation", "", "mean", scores.paired_difference(ablated.mean(-1), losses.mean(-1))
    yield from _frequency_scores(members, settings, losses)
    yield from _head_scores(members, settings)
    yield from _of_weights(members)


def _test_losses(members: Members, num_rows: int) -> tuple[Float[Tensor, "N B T"], Tensor]:
    rows = test_rows(members.config, num_rows).to(_device(members))
    return scores.token_losses(members.config.model, members.params, rows), rows


def test_rows(config: RunConfig, num_rows: int) -> Tensor:
    """Return the first `num_rows` test rows for reports, with BOS.

    For a real text, return at most `evaluation.num_prompts` rows.
    """
    text = config.language
    count = num_rows if text.is_synthetic else min(num_rows, config.evaluation.num_prompts)
    xs, ys = row_source(config, stream=TEST).sample(range(REPORT, REPORT + 1), range(count))
    return torch.cat([xs[0], ys[0, :, -1:]], dim=1)


def _frequency_scores(members: Members, settings: Settings, losses: Tensor) -> Iterator[tuple[str, str, str, Estimate]]:
    config, device = members.config, _device(members)
    seed, text = config.seeds.evaluation, config.language
    rows = test_rows(config, settings.num_bigram_rows).to(device)
    at = probes.positions(seed, len(rows), num_predictions=text.num_predictions)
    score, floor = scores.bigram_score(config.model, members.params, rows, at, frequencies(config).pairs)
    yield "bigram_score", "", "", score
    yield "bigram_floor", "", "", floor
    for n, ngrams in zip(NGRAMS, _ngrams(config, settings), strict=True):
        if len(ngrams) > 1:
            ngrams = ngrams.to(device)
            estimate = scores.ngram_score(config.model, members.params, ngrams, losses[..., n - 1], bos=text.bos)
            yield "ngram_score", "", str(n), estimate


def _ngrams(config: RunConfig, settings: Settings) -> list[Tensor]:
    """Return n-grams of every length in `NGRAMS`, from the larger vocabulary if `settings` names one, else from the training text."""
    if settings.vocabulary is None:
        return _frequent_ngrams(row_source(config, stream="frequencies"), settings.num_ngrams)
    text = dataclasses.replace(config.language, tokenizer=settings.tokenizer or config.language.tokenizer)
    return _vocabulary_ngrams(text, settings.vocabulary, settings.num_ngrams)


@lru_cache(maxsize=2)
def _vocabulary_ngrams(text: LanguageConfig, vocabulary: str, count: int) -> list[Tensor]:
    """Split the entries of a larger vocabulary into tokens, and return the first n-grams of every length in `NGRAMS`.

    N-grams that contain the space token are left out.

    Raises:
        ConfigError: If the vocabulary or the tokenizer cannot be read, or the vocabulary has no n-gram.
    """
    tokenizer, words = load_tokenizer(text), read_vocabulary(vocabulary)
    space = tokenizer.encode(" ", add_special_tokens=False).ids
    skipped = space[0] if len(space) == 1 else None
    ngrams = [probes.vocabulary_ngrams(tokenizer, words, n, count, skipped=skipped) for n in NGRAMS]
    if not any(map(len, ngrams)):
        raise ConfigError(f"The tokenizer splits no entry of {vocabulary} into {NGRAMS[0]} to {NGRAMS[-1]} tokens.")
    largest = max(int(each.max()) for each in ngrams if len(each))
    require(
        largest < text.bos,
        f"The tokenizer returns the token {largest:,}, but all tokens of the run's text are below {text.bos:,}. Give the tokenizer with "
        "which the run was trained as `tokenizer`.",
    )
    return ngrams


@lru_cache(maxsize=2)
def _frequent_ngrams(source: RowSource, count: int) -> list[Tensor]:
    """Return the most frequent n-grams of a text, for every length in `NGRAMS`."""
    rows = source.sample(range(1), range(max(1, _NUM_COUNTED // source.language.context_size))).ys[0]
    return [probes.frequent_ngrams(rows, n, count, bos=source.language.bos) for n in NGRAMS]


def _head_scores(members: Members, settings: Settings) -> Iterator[tuple[str, str, str, Estimate]]:
    config, device = members.config, _device(members)
    sizes = {"bos": config.language.bos, "context_size": config.language.context_size}
    seed, model, params = config.seeds.evaluation, config.model, members.params
    rows, last = (part.to(device) for part in probes.previous_token_rows(seed, settings.num_probe_rows, **sizes))
    previous = scores.previous_token_scores(model, params, rows, last)
    rows, first, second = (part.to(device) for part in probes.prefix_rows(seed, settings.num_probe_rows, **sizes))
    matching = scores.prefix_matching_scores(model, params, rows, first, second)
    for name, values in (("previous_token", previous), ("prefix_matching", matching)):
        for layer in range(model.num_layers):
            for head in range(model.num_heads):
                yield name, f"{layer}.{head}", "", metrics.overall_mean(values[:, :, layer, head].unsqueeze(-1))


def _of_weights(members: Members) -> Iterator[tuple[str, str, str, Estimate]]:
    params = {name: tensor.double().cpu() for name, tensor in members.params.items()}
    composition = weights.k_composition(members.config.model, params)
    for number, (earlier, later) in enumerate(weights.head_pairs(members.config.model)):
        part = f"{earlier[0]}.{earlier[1]} -> {later[0]}.{later[1]}"
        yield "k_composition", part, "", _exact(composition[:, number])
    yield "weight_norm", "", "", _exact(weights.weight_norm(params))
    for number, values in enumerate(weights.position_spectrum(params).unbind(1), start=1):
        yield "position_spectrum", "", str(number), _exact(values)


def _from_start(entries: list[Entry]) -> list[Entry]:
    """Subtract the mean K-composition of the first saved step."""
    start = [row["value"] for row in entries[0].rows if row["quantity"] == "k_composition"]
    if not start:
        return entries
    mean = sum(start) / len(start)

    def shifted(row: Row) -> Row:
        return {**row, "value": row["value"] - mean} if row["quantity"] == "k_composition" else row

    return [entry._replace(rows=[shifted(row) for row in entry.rows]) for entry in entries]


def _summary(entries: list[Entry]) -> list[str]:
    """Return a line for each main quantity, with its values at the first and at the last step."""
    first, last = (
        {(row["quantity"], row["part"], row["position"]): row for row in entry.rows}
        for entry in (entries[0], entries[-1])
    )
    lines = [f"Step {entries[0].step:,} -> step {entries[-1].step:,}, the last of {len(entries):,} saved steps:"]
    for quantity in (
        "loss",
        "icl_score",
        "bigram_score",
        "ngram_score",
        "previous_token",
        "prefix_matching",
        "k_composition",
        "ablation",
    ):
        keys = [key for key in last if key[0] == quantity and (quantity != "loss" or key[2] == "mean")]
        if keys:
            key = max(keys, key=lambda key: last[key]["value"])
            place = " ".join(filter(None, key[1:]))
            now = f"{last[key]['value']:.3f} ± {last[key]['stderr']:.3f}"
            lines.append(f"  {quantity:16s} {place:12s} {first[key]['value']:.3f} -> {now}")
    floor = next(row["value"] for row in entries[-1].rows if row["quantity"] == "bigram_floor")
    return [
        *lines,
        f"  The floor of the bigram score is {floor:.3f}. For n-grams, heads and pairs of heads, only the one with the largest "
        "value at the last step is shown.",
    ]


def _row(quantity: str, part: str, position: str, value: float, error: float) -> Row:
    return {"quantity": quantity, "part": part, "position": position, "value": value, "stderr": error}


def _exact(values: Float[Tensor, " N"]) -> Estimate:
    return Estimate(values, torch.zeros_like(values))


def _device(members: Members) -> torch.device:
    return next(iter(members.params.values())).device
