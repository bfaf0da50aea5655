"""Rows of tokens on which behaviours are measured, as pure functions of a seed, and the common n-grams of a text.

Rows of random tokens begin with BOS. Their tokens are uniform over the vocabulary without BOS, so nothing but attention patterns can
explain what a head does with them (Hoogland et al. 2024).
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
"""Length of the rows for prefix-matching scores, if the context is so long."""


def previous_token_rows(
    seed: int, num_rows: int, *, bos: int, context_size: int
) -> tuple[Int64[Tensor, "B T"], Int64[Tensor, " B"]]:
    """Return rows and the last position of each: lengths are uniform from 16 to 64 tokens, as far as the context allows."""
    longest = min(LENGTHS[1], context_size - 1)
    shortest = min(LENGTHS[0], longest)
    rows = _random_rows(seed, "previous", num_rows, longest, bos)
    return rows, shortest - 1 + _uniform(seed, "previous/length", num_rows, longest - shortest + 1)


def prefix_rows(
    seed: int, num_rows: int, *, bos: int, context_size: int
) -> tuple[Int64[Tensor, "B T"], Int64[Tensor, " B"], Int64[Tensor, " B"]]:
    """Return rows in which one token occurs exactly twice, and its two positions.

    The first is uniform in 1 .. h - 1 and the second in h + 1 .. 2 h - 1, with rows of 2 h = 128 tokens or of what the context allows.
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
    """Return a position of each row, uniform from 1 to the last prediction."""
    return 1 + _uniform(seed, "bigram", num_rows, num_predictions - 1)


def frequent_ngrams(rows: Int64[Tensor, "B T"], n: int, count: int, *, bos: int) -> Int64[Tensor, "G n"]:
    """Return the most frequent n-grams of a text, in the order of their frequency; those with BOS are left out."""
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
    """Return the first entries of a larger vocabulary that a tokenizer splits into exactly n tokens (Hoogland et al. 2024).

    Args:
        tokenizer: The tokenizer of the run, of the package `tokenizers`.
        words: Texts of the entries of the larger vocabulary, in their order.
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
