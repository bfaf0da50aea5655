"""Frequencies of tokens and of pairs of tokens in the training text of a language run, and the losses of predicting from them.

q(t) is the frequency of the token t. q(t | s) is the frequency with which t follows directly after the token s. Both
frequencies are counted in the first rows of the stream `frequencies`, which has the distribution of the training text.
So that no token has probability zero, 1/2 is added to the count of each token (Krichevsky and Trofimov 1981). For
pairs, q(t) / 2 is added to the count of each pair (s, t).
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from icl.config import RunConfig
from icl.tasks.rows import RowSource, TokenRows, row_source

_MIN_TOKENS, _MAX_TOKENS, _PER_PAIR = 2**17, 2**22, 128
"""The number of counted tokens is `_PER_PAIR` times the number of possible pairs, but at least `_MIN_TOKENS` and at most `_MAX_TOKENS`."""
_PRIOR = 0.5
_AT_ONCE = 2**17
"""Number of tokens that are drawn and counted at once."""


class Frequencies(NamedTuple):
    """Frequencies of tokens and of pairs of tokens in a text, as probabilities."""

    unigrams: Float[Tensor, " V"]
    pairs: Float[Tensor, "V V"]
    """Empirical probabilities q(t | s), without the added counts. If no token follows s in the text, q(t | s) is zero for all t."""
    smoothed: Float[Tensor, "V V"]
    """Probabilities q(t | s) with the added counts, so that none is zero."""


def frequencies(config: RunConfig) -> Frequencies:
    """Return the frequencies in the training text of a run."""
    return _counted(row_source(config, stream="frequencies"))


def frequency_losses(config: RunConfig, rows: TokenRows) -> dict[str, Float[Tensor, "B T"]]:
    """Return the losses, in nats, of predicting rows from the frequencies of tokens (`unigram`) and of pairs of tokens (`bigram`)."""
    counted = frequencies(config)
    return {
        "unigram": -counted.unigrams.log().to(rows.ys.device)[rows.ys],
        "bigram": -counted.smoothed.log().to(rows.ys.device)[rows.xs, rows.ys],
    }


def count_pairs(xs: Int64[Tensor, "..."], ys: Int64[Tensor, "..."], vocab_size: int) -> Int64[Tensor, "V V"]:
    """Return how often each token y follows each token x."""
    counts = torch.bincount((xs * vocab_size + ys).flatten(), minlength=vocab_size**2)
    return counts.unflatten(0, (vocab_size, vocab_size))


def from_counts(counts: Int64[Tensor, "V V"]) -> Frequencies:
    """Return the frequencies of tokens and of pairs of tokens. `counts[s, t]` is how often token t follows token s."""
    pairs = counts.float()
    unigrams = pairs.sum(0) + _PRIOR
    unigrams = unigrams / unigrams.sum()
    totals = pairs.sum(1, keepdim=True)
    smoothed = (pairs + _PRIOR * unigrams) / (totals + _PRIOR)
    return Frequencies(unigrams, pairs / totals.clamp(min=1), smoothed)


@lru_cache(maxsize=4)
def _counted(source: RowSource) -> Frequencies:
    """Return the frequencies in the rows that `source` draws from a text."""
    language = source.language
    counts = torch.zeros(language.vocab_size, language.vocab_size, dtype=torch.int64)
    each = max(1, _AT_ONCE // language.context_size)
    num_tokens = min(_MAX_TOKENS, max(_MIN_TOKENS, _PER_PAIR * language.vocab_size**2))
    for first in range(0, max(1, num_tokens // language.context_size), each):
        counts += count_pairs(*source.sample(range(1), range(first, first + each)), language.vocab_size)
    return from_counts(counts)
