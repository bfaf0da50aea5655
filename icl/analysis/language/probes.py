"""Make rows of tokens on which behaviours are measured, and find the common n-grams of a text.

Rows of random tokens depend only on the arguments, which include a seed. They begin with BOS. The other tokens are
drawn uniformly from the vocabulary without BOS. So the meaning of tokens cannot explain where a head attends (Hoogland
et al. 2024).
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from icl import rng

LENGTHS = (16, 64)
"""Shortest and longest length of the rows for previous-token scores."""
PREFIX_LENGTH = 128
"""Length of the rows for prefix-matching scores; shorter if the context is shorter."""


def previous_token_rows(
    seed: int, num_rows: int, *, bos: int, context_size: int
) -> tuple[Int64[Tensor, "B T"], Int64[Tensor, " B"]]:
    """Return rows of random tokens, and the last position of each row.

    The lengths are drawn uniformly from 16 to 64 tokens. In a short context, these limits are lower.
    """
    longest = min(LENGTHS[1], context_size - 1)
    shortest = min(LENGTHS[0], longest)
    rows = _random_rows(seed, "previous", num_rows, longest, bos)
    return rows, shortest - 1 + _uniform(seed, "previous/length", num_rows, longest - shortest + 1)


def prefix_rows(
    seed: int, num_rows: int, *, bos: int, context_size: int
) -> tuple[Int64[Tensor, "B T"], Int64[Tensor, " B"], Int64[Tensor, " B"]]:
    """Return rows of random tokens in which one token occurs exactly twice, and the two positions of this token.

    Rows have 2 h = 128 tokens, or fewer if the context is shorter. The first position is uniform in 1 .. h - 1, and the second in
    h + 1 .. 2 h - 1.
    """
    half = min(PREFIX_LENGTH, context_size - 1) // 2
    rows = _random_rows(seed, "prefix", num_rows, 2 * half, bos)
    special = _uniform(seed, "prefix/token", num_rows, bos)
    others = torch.where(rows == special[:, None], (rows + 1) % bos, rows)
    first = 1 + _uniform(seed, "prefix/first", num_rows, half - 1)
    second = half + 1 + _uniform(seed, "prefix/second", num_rows, half - 1)
    for place in (first, second):
        others.scatter_(1, place[:, None], special[:, None])
    return others, first, second


def positions(seed: int, num_rows: int, *, num_predictions: int) -> Int64[Tensor, " B"]:
    """Return one random position for each row, uniform from 1 to the last prediction."""
    return 1 + _uniform(seed, "bigram", num_rows, num_predictions - 1)


def frequent_ngrams(rows: Int64[Tensor, "B T"], n: int, count: int, *, bos: int) -> Int64[Tensor, "G n"]:
    """Return the most frequent n-grams of a text, most frequent first. N-grams with BOS are left out."""
    windows = rows.unfold(1, n, 1).flatten(0, 1)  # M n
    windows = windows[(windows != bos).all(1)]
    codes = windows[:, 0]
    for token in windows.unbind(1)[
        1:
    ]:  # ranks keep the codes small; sorting numbers is many times as fast as sorting rows
        codes = codes.unique(return_inverse=True)[1] * (bos + 1) + token
    _, inverse, counts = codes.unique(return_inverse=True, return_counts=True)
    first = torch.full_like(counts, len(codes)).scatter_reduce(0, inverse, torch.arange(len(codes)), "amin")
    return windows[first[counts.argsort(descending=True, stable=True)[:count]]]


def vocabulary_ngrams(
    tokenizer: Any, words: Sequence[str], n: int, count: int, *, skipped: int | None = None
) -> Int64[Tensor, "G n"]:
    """Split the entries of another, larger vocabulary with the run's tokenizer, and return the first `count` results with n tokens.

    Hoogland et al. 2024 define common n-grams in this way.

    Args:
        tokenizer: The tokenizer of the run, an object of the package `tokenizers`.
        words: The entries of the larger vocabulary as strings, in the order of that vocabulary.
        n: Number of tokens.
        count: Largest number of n-grams.
        skipped: A token that no n-gram may contain, such as the space.
    """
    found: list[list[int]] = []
    for word in words:
        tokens = tokenizer.encode(word, add_special_tokens=False).ids
        if len(tokens) == n and skipped not in tokens:
            found.append(tokens)
        if len(found) == count:
            break
    return torch.tensor(found, dtype=torch.int64).reshape(-1, n)


def _random_rows(seed: int, name: str, num_rows: int, length: int, bos: int) -> Int64[Tensor, "B T"]:
    words = rng.words(
        rng.stream(seed, f"language/{name}"), torch.zeros(1, dtype=torch.int64), torch.arange(num_rows), length
    )
    rows = torch.bitwise_right_shift(words[0] * bos, 32)
    rows[:, 0] = bos
    return rows


def _uniform(seed: int, name: str, num_rows: int, bound: int) -> Int64[Tensor, " B"]:
    return rng.integers(
        rng.stream(seed, f"language/{name}"), torch.zeros(1, dtype=torch.int64), torch.arange(num_rows), bound
    )[0]
