"""Frequencies of tokens and of pairs of tokens in a language run's training text, and the losses of predictions from these frequencies.

q(t) is the frequency of the token t. q(t | s) is the frequency with which t follows directly after the token s. Both
frequencies are counted in the first rows of the stream `frequencies`, which has the distribution of the training text.
So that no token has probability zero, 1/2 is added to the count of each token (Krichevsky and Trofimov 1981). For
pairs, q(t) / 2 is added to the count of each pair (s, t).
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from icl.compute.devices import require_memory
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
    """Return the frequencies in the training text of a run.

    Raises:
        ConfigError: If there is not enough memory for the tables with V^2 entries.
    """
    size = config.language.vocab_size
    # A count has 8 bytes. There are two tables of counts while the text is counted.
    require_memory({f"the frequencies of the pairs of {size:,} tokens (`language.vocab_size`)": 16 * size**2})
    return _tables(row_source(config, stream="frequencies"))


def frequency_losses(config: RunConfig, rows: TokenRows) -> dict[str, Float[Tensor, "B T"]]:
    """Return the losses, in nats, of predicting rows from the frequencies of tokens (`unigram`) and of pairs of tokens (`bigram`)."""
    counted, xs, ys = _counted(row_source(config, stream="frequencies")), rows.xs.cpu(), rows.ys.cpu()
    size = config.language.vocab_size
    unigrams = _unigrams(counted.totals(size, of_second=True).float())
    pairs, totals = counted.look_up(xs * size + ys).float(), counted.totals(size, of_second=False).float()
    bigrams = _smoothed(pairs, totals[xs], unigrams[ys])
    return {"unigram": -unigrams.log()[ys].to(rows.ys.device), "bigram": -bigrams.log().to(rows.ys.device)}


def count_pairs(xs: Int64[Tensor, "..."], ys: Int64[Tensor, "..."], vocab_size: int) -> Int64[Tensor, "V V"]:
    """Return how often each token y follows each token x."""
    counts = torch.bincount((xs * vocab_size + ys).flatten(), minlength=vocab_size**2)
    return counts.unflatten(0, (vocab_size, vocab_size))


def from_counts(counts: Int64[Tensor, "V V"]) -> Frequencies:
    """Return the frequencies of tokens and of pairs of tokens. `counts[s, t]` is how often token t follows token s."""
    pairs = counts.float()
    unigrams, totals = _unigrams(pairs.sum(0)), pairs.sum(1, keepdim=True)
    return Frequencies(unigrams, pairs / totals.clamp(min=1), _smoothed(pairs, totals, unigrams))


def _unigrams(counts: Float[Tensor, " V"]) -> Float[Tensor, " V"]:
    """Return q(t) for every token t, from how often it occurs."""
    smoothed = counts + _PRIOR
    return smoothed / smoothed.sum()


def _smoothed(pairs: Tensor, totals: Tensor, unigrams: Tensor) -> Tensor:
    """Return q(t | s) with the added counts, from the counts of the pairs (s, t) and of the tokens s, and from q(t)."""
    return (pairs + _PRIOR * unigrams) / (totals + _PRIOR)


class _Counted(NamedTuple):
    """Pairs of tokens that occur in a text. Memory grows with the number of these pairs, not with V^2."""

    pairs: Int64[Tensor, " P"]
    """Numbers s V + t of the pairs (s, t), in increasing order."""
    counts: Int64[Tensor, " P"]

    def totals(self, vocab_size: int, *, of_second: bool) -> Int64[Tensor, " V"]:
        """Return how often each token is the second token of a pair, or the first token."""
        tokens = self.pairs % vocab_size if of_second else self.pairs // vocab_size
        return torch.zeros(vocab_size, dtype=torch.int64).index_add(0, tokens, self.counts)

    def look_up(self, pairs: Int64[Tensor, "*S"]) -> Int64[Tensor, "*S"]:
        """Return how often each of these pairs occurs."""
        at = torch.searchsorted(self.pairs, pairs).clamp(max=len(self.pairs) - 1)
        return torch.where(self.pairs[at] == pairs, self.counts[at], 0)


@lru_cache(maxsize=4)
def _tables(source: RowSource) -> Frequencies:
    """Return the frequencies in the rows that `source` draws from a text."""
    size = source.language.vocab_size
    counts = torch.zeros(size, size, dtype=torch.int64)
    for xs, ys in _rows(source):
        counts += count_pairs(xs, ys, size)
    return from_counts(counts)


@lru_cache(maxsize=4)
def _counted(source: RowSource) -> _Counted:
    """Count the pairs in the rows that `source` draws from a text."""
    pairs = torch.cat([(xs * source.language.vocab_size + ys).flatten() for xs, ys in _rows(source)])
    return _Counted(*pairs.unique(return_counts=True))


def _rows(source: RowSource) -> Iterator[TokenRows]:
    """Yield the rows in which pairs are counted, in batches."""
    language = source.language
    each = max(1, _AT_ONCE // language.context_size)
    num_tokens = min(_MAX_TOKENS, max(_MIN_TOKENS, _PER_PAIR * language.vocab_size**2))
    for first in range(0, max(1, num_tokens // language.context_size), each):
        yield source.sample(range(1), range(first, first + each))
