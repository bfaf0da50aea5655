"""Behaviours of language models on rows of tokens: pure functions of a model, its stacked parameters and tokens.

The definitions follow Hoogland et al. (2024), arXiv 2402.02364, and their code. Every estimate is a mean over rows, with its
standard error. The leading axis N counts models. Losses are in nats.
"""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from icl import metrics
from icl.config import ModelConfig
from icl.metrics import Estimate
from icl.model.language import attention_patterns, last_residual, logits_of, next_token_losses, rows_at_once
from icl.model.stacked import Params

Rows = Int64[Tensor, "B T"]


def token_losses(config: ModelConfig, params: Params, rows: Rows) -> Float[Tensor, "N B T-1"]:
    """Return -log P(token p + 1 | tokens 0 .. p) for every row and every position p."""
    return _in_chunks(config, params, rows, lambda part: next_token_losses(config, params, part[:, :-1], part[:, 1:]))


def bigram_score(
    config: ModelConfig, params: Params, rows: Rows, at: Int64[Tensor, " B"], pairs: Float[Tensor, "V V"]
) -> tuple[Estimate, Estimate]:
    """Return the cross-entropy of the model's prediction relative to bigram frequencies, and the floor of this number.

    For each row the model reads the tokens up to position `at`. Let s be the token at this position, and P(t) the
    probability that the model gives to token t as the next token. The cross-entropy is the sum of -q(t | s) log P(t)
    over t. The floor is the lowest possible cross-entropy: the mean entropy of q(t | s). A model that predicts q
    reaches the floor. A row is left out if its token s never occurs in the text from which q was counted.

    Args:
        config: The architecture of the language models.
        params: Stacked parameters of the N models.
        rows: Rows of tokens.
        at: One position in each row.
        pairs: Empirical frequencies q(t | s), with a row of zeros for a token s that does not occur.
    """
    rows, at = rows[:, : int(at.max()) + 1], at.to(rows.device)
    targets = pairs.to(rows.device)[rows.gather(1, at[:, None]).squeeze(1)]  # B V
    is_known = targets.sum(1) > 0
    rows, at, targets = rows[is_known], at[is_known], targets[is_known]

    def logits(part: Tensor, chosen: Tensor) -> Tensor:
        return logits_of(params, _rows_at(last_residual(config, params, part), chosen))[:, :, 0].log_softmax(-1)

    logs = _in_chunks(config, params, rows, logits, at)  # N B V
    floors = -torch.special.xlogy(targets, targets).sum(-1)
    return _mean(-(targets * logs).sum(-1)), _mean(floors.expand(len(logs), -1))


def next_token_logits(config: ModelConfig, params: Params, rows: Rows, at: Int64[Tensor, " B"]) -> Float[Tensor, "N B"]:
    """Return the logit of the true next token at one position of each row.

    These logits are the state for essential dynamics in Hoogland et al. (2024).
    """

    def logits(part: Tensor, chosen: Tensor) -> Tensor:
        x = last_residual(config, params, part[:, :-1])
        return _gathered(logits_of(params, _rows_at(x, chosen))[:, :, 0], part.gather(1, chosen[:, None] + 1))

    return _in_chunks(config, params, rows, logits, at.to(rows.device))


def ngram_score(
    config: ModelConfig, params: Params, ngrams: Int64[Tensor, "G n"], test_losses: Float[Tensor, "N B"], *, bos: int
) -> Estimate:
    """Return the n-gram score: the loss at one position of test rows, divided by the loss of the last token of common n-grams.

    Token 0 of every row is BOS, so the last token of an n-gram is token n. The score is the mean loss of token n in the
    test rows, divided by the mean loss of token n in rows that consist of BOS and an n-gram. The test rows and the
    n-grams are independent samples. The standard error of the ratio is propagated to first order.

    Args:
        config: The architecture of the language models.
        params: Stacked parameters of the N models.
        ngrams: Common n-grams, one in each row of the tensor, without BOS.
        test_losses: Each model's loss of token n in every test row: index n - 1 on the last axis of `token_losses`.
        bos: The index of the token BOS, which begins every row.
    """
    rows = torch.cat([torch.full_like(ngrams[:, :1], bos), ngrams], dim=1)
    ours, test = _mean(token_losses(config, params, rows)[..., -1]), _mean(test_losses)
    ratio = test.value / ours.value
    relative = ((test.stderr / test.value) ** 2 + (ours.stderr / ours.value) ** 2).sqrt()
    return Estimate(ratio, ratio * relative)


def previous_token_scores(
    config: ModelConfig, params: Params, rows: Rows, last: Int64[Tensor, " B"]
) -> Float[Tensor, "N B L H"]:
    """Return the attention weight of every head from position `last` of each row to the position before `last`."""
    return _attention(config, params, rows, last, last - 1)


def prefix_matching_scores(
    config: ModelConfig, params: Params, rows: Rows, first: Int64[Tensor, " B"], second: Int64[Tensor, " B"]
) -> Float[Tensor, "N B L H"]:
    """Return the attention weight of every head from the second occurrence of a token to the position after the first occurrence."""
    return _attention(config, params, rows, second, first + 1)


def without_positions(params: Params) -> Params:
    """Return the parameters with the position embeddings set to zero."""
    return {**params, "pos_embed.W_pos": torch.zeros_like(params["pos_embed.W_pos"])}


def paired_difference(first: Float[Tensor, "N B"], second: Float[Tensor, "N B"]) -> Estimate:
    """Return the mean over rows of the first number minus the second.

    Noise that both numbers of a row share does not enter the standard error.
    """
    return _mean(first - second)


def _rows_at(x: Float[Tensor, "N B T C"], places: Int64[Tensor, " B"]) -> Float[Tensor, "N B 1 C"]:
    """Return the vector at one position of each row."""
    return x.gather(2, places[None, :, None, None].expand(len(x), -1, -1, x.shape[-1]))


def _gathered(values: Float[Tensor, "N B V"], tokens: Int64[Tensor, "B 1"]) -> Float[Tensor, "N B"]:
    return values.gather(-1, tokens.expand(len(values), -1, -1)).squeeze(-1)


def _attention(config: ModelConfig, params: Params, rows: Rows, queries: Tensor, keys: Tensor) -> Tensor:
    def chosen(part: Tensor, query: Tensor, key: Tensor) -> Tensor:
        patterns = attention_patterns(config, params, part, query[:, None])[:, :, :, :, 0]  # N b L H T
        places = key[None, :, None, None, None].expand(*patterns.shape[:-1], 1)
        return patterns.gather(-1, places).squeeze(-1)

    return _in_chunks(config, params, rows, chosen, queries.to(rows.device), keys.to(rows.device))


def _in_chunks(
    config: ModelConfig, params: Params, rows: Rows, function: Callable[..., Tensor], *beside: Tensor
) -> Tensor:
    """Apply a function to all rows, as many at a time as memory allows.

    The tensors `beside` are split into the same chunks as the rows.
    """
    size = rows_at_once(config, params, rows.shape[1])
    with torch.no_grad():
        return torch.cat([function(*part) for part in _parts(size, rows, *beside)], dim=1)


def _parts(size: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)


def _mean(values: Float[Tensor, "N B"]) -> Estimate:
    return metrics.overall_mean(values.unsqueeze(-1))
