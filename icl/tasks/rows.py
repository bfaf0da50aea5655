"""Rows of tokens for language runs: the synthetic language, or a text on disk or on the Hugging Face Hub.

Like a prompt, a row is a pure function of (seed, stream, step, index). So data do not depend on the number of processes, and a resumed run
reads the same rows as an uninterrupted run. The stream `train` uses `seeds.data`; every other stream uses `seeds.evaluation`.

Text: each row is drawn uniformly from the corpus (`icl.tasks.corpus`). Let E = `evaluation.num_prompts`. The last 2 E rows of the corpus
are held out for the stream `test`, and are in no other stream. In the stream `test`, step 0 consists of the last E rows, and step 1 of the E
rows before them. `icl.evaluation.sets` uses step 0 during training and step 1 for reports. The text may change at the step
`language.change_step`. At this and all later steps, the rows of the stream `train` are drawn from the whole second text. Only the step
decides from which of the two texts a row comes, so resumed training reads the same rows.

Synthetic language: Markov text with copied segments. Each token has F successors, drawn once with `seeds.tasks`. The next token is successor j
with probability proportional to 1 / j. At each position outside a copy, from the fourth token on, a copy begins with probability
`copy_rate`. For each copy, an earlier position of the row and a length (from `copy_length` / 2 to `copy_length`) are drawn uniformly. The
next tokens repeat the segment of this length that starts at this position. So a model can learn three things in turn: the frequencies of
tokens, the table of bigrams, and, with an induction head, the continuation of a copy. The first tokens of a row do not depend on the length
of the row.
"""

import dataclasses
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from icl import rng
from icl.compute.devices import require_memory
from icl.config import LanguageConfig, RunConfig
from icl.config.validation import ConfigError
from icl.tasks.corpus import Corpus, open_corpus

_WORD = 2**32
_START, _LENGTH, _FROM, _SUCCESSOR = range(4)
"""Indices of the four random 32-bit words at each position. The words decide whether a copy begins, the length of the copy, the
position from which it is copied, and the successor."""
TEST = "test"
"""Name of the stream for evaluation. If the source is a text, training never uses the rows of this stream."""
_NUM_TEST_SETS = 2
"""Number of sets of rows that are held out from a text. Each set is one step of the stream `test`."""


class TokenRows(NamedTuple):
    """Batch of rows: the tokens that a model reads, and the tokens that it predicts. There may be more leading axes."""

    xs: Int64[Tensor, "*S B T"]
    ys: Int64[Tensor, "*S B T"]


class RowSource(NamedTuple):
    """Everything that determines a stream's rows: the settings of the text, the keys of the random streams, and the corpus if there is one."""

    language: LanguageConfig
    key: rng.Stream
    table_key: rng.Stream
    corpus: Corpus | None
    num_held_out: int
    """Number of rows of each held-out set."""
    is_test: bool
    next_corpus: Corpus | None = None
    """Corpus that replaces `corpus` at step `language.change_step`, if the text changes."""

    @property
    def numbers_per_row(self) -> int:
        """Number of random numbers and tokens that are needed to draw a row."""
        return 6 * self.language.context_size

    def sample(
        self, steps: range, indices: range | Int64[Tensor, " B"], *, device: torch.device | str = "cpu"
    ) -> TokenRows:
        """Return the rows with these indices at each step, as xs and ys (S, B, T)."""
        num_rows = indices.stop - indices.start if isinstance(indices, range) else len(indices)
        tokens = f"{len(steps) * num_rows:,} rows of {self.language.context_size:,} tokens"
        require_memory({tokens: 8 * len(steps) * num_rows * self.numbers_per_row}, device)
        step = steps.start + torch.arange(len(steps), device=device)
        index = torch.arange(indices.start, indices.stop, device=device) if isinstance(indices, range) else indices
        rows = self._synthetic(step, index) if self.corpus is None else self._from_texts(self.corpus, step, index)
        return TokenRows(rows[..., :-1], rows[..., 1:])

    def _synthetic(self, step: Tensor, index: Tensor) -> Int64[Tensor, "S B T"]:
        text = self.language
        words = rng.words(self.key, step, index, 4 * text.context_size).unflatten(-1, (-1, 4))  # S B T 4
        successors = _successors(self.table_key, text.vocab_size, text.num_successors).to(step.device)  # V F
        limits = _cumulative(text.num_successors).to(step.device)  # F
        choices = torch.searchsorted(limits, words[..., _SUCCESSOR].contiguous(), right=True)  # S B T
        starts = words[..., _START] < int(text.copy_rate * _WORD)
        shortest = max(1, text.copy_length // 2)
        lengths = shortest + _below(words[..., _LENGTH], text.copy_length - shortest + 1)
        rows = torch.full(words.shape[:-1], text.bos, dtype=torch.int64, device=step.device)  # S B T
        left = rows.new_zeros(rows.shape[:-1])  # S B, number of tokens that are left to copy
        source = left.clone()  # S B, position of the next token to copy
        for t in range(1, text.context_size):
            if t > 2:
                begins = (left == 0) & starts[..., t]
                left = torch.where(begins, lengths[..., t], left)
                source = torch.where(begins, 1 + _below(words[..., t, _FROM], t - 2), source)
            is_copy = left > 0
            copied = rows.gather(-1, source.clamp(max=t - 1).unsqueeze(-1)).squeeze(-1)
            rows[..., t] = torch.where(is_copy, copied, successors[rows[..., t - 1], choices[..., t]])
            left, source = (left - 1).clamp(min=0), source + 1
        return rows

    def _from_texts(self, corpus: Corpus, step: Tensor, index: Tensor) -> Int64[Tensor, "S B T"]:
        """Return rows of the corpus, or of the two corpora if the text changes."""
        if self.next_corpus is None or self.language.change_step is None:
            return self._from_corpus(corpus, step, index)
        is_later = step >= self.language.change_step
        numbers = rng.integers(self.key, step[is_later], index, self.next_corpus.num_rows)
        later = self.next_corpus.rows(numbers.cpu()).to(step.device)
        return torch.cat([self._from_corpus(corpus, step[~is_later], index), later])

    def _from_corpus(self, corpus: Corpus, step: Tensor, index: Tensor) -> Int64[Tensor, "S B T"]:
        if self.is_test:
            if int(step.max()) >= _NUM_TEST_SETS or int(index.max()) >= self.num_held_out:
                raise ConfigError(
                    f"The text has {_NUM_TEST_SETS} sets of {self.num_held_out:,} rows for evaluation (`evaluation.num_prompts`), "
                    f"so there is no row {int(index.max())} of set {int(step.max())}."
                )
            numbers = corpus.num_rows - self.num_held_out * (1 + step[:, None]) + index
        else:
            numbers = rng.integers(self.key, step, index, corpus.num_rows - _NUM_TEST_SETS * self.num_held_out)
        return corpus.rows(numbers.cpu()).to(step.device)


def row_source(config: RunConfig, *, stream: str) -> RowSource:
    """Return the source of one stream of a language run.

    Raises:
        ConfigError: If a text cannot be read, the text is too short to hold out the rows for evaluation, or the second
            text has no whole row.
    """
    text, num_held_out = config.language, config.evaluation.num_prompts
    corpus = None if text.is_synthetic else open_corpus(text)
    if corpus is not None and corpus.num_rows <= _NUM_TEST_SETS * num_held_out:
        raise ConfigError(
            f"The text {text.source} has {corpus.num_rows:,} rows of {text.context_size:,} tokens, too few to hold out "
            f"{_NUM_TEST_SETS} x {num_held_out:,} rows for evaluation (during training, and in reports). Lower `evaluation.num_prompts` "
            "or `language.context_size`."
        )
    next_corpus = None
    if stream == "train" and text.next_source is not None:
        next_corpus = open_corpus(
            dataclasses.replace(text, source=text.next_source, next_source=None, change_step=None)
        )
        if not next_corpus.num_rows:
            raise ConfigError(
                f"The text {text.next_source} (`language.next_source`) has no row of {text.context_size:,} tokens. Use a longer text, or lower "
                "`language.context_size`."
            )
    seed = config.seeds.data if stream == "train" else config.seeds.evaluation
    keys = rng.stream(seed, f"language/{stream}"), rng.stream(config.seeds.tasks, "language/table")
    return RowSource(text, *keys, corpus, num_held_out, stream == TEST, next_corpus)


def sample_rows_together(
    sources: Sequence[RowSource],
    steps: range,
    indices: range | Int64[Tensor, " B"],
    *,
    device: torch.device | str = "cpu",
) -> TokenRows:
    """Sample the rows of N sources: xs and ys (N, S, B, T)."""
    parts = zip(*(source.sample(steps, indices, device=device) for source in sources), strict=True)
    return TokenRows(*(torch.stack(part) for part in parts))


def bigram_table(source: RowSource) -> Float[Tensor, "V V"]:
    """Return the probabilities of the next token after each token of the synthetic language, outside copies."""
    text = source.language
    successors = _successors(source.table_key, text.vocab_size, text.num_successors)
    weights = torch.diff(_cumulative(text.num_successors), prepend=torch.zeros(1, dtype=torch.int64)).double() / _WORD
    table = torch.zeros(text.vocab_size, text.vocab_size, dtype=torch.float64)
    return table.scatter_add(1, successors, weights.expand(text.vocab_size, -1))


@lru_cache(maxsize=8)
def _successors(key: rng.Stream, vocab_size: int, num_successors: int) -> Int64[Tensor, "V F"]:
    """Return the successors of every token. None of them is the token that begins a row. Two successors of a token may be equal."""
    words = rng.words(key, torch.zeros(1, dtype=torch.int64), torch.arange(vocab_size), num_successors)
    return _below(words[0], vocab_size - 1)


@lru_cache(maxsize=8)
def _cumulative(num_successors: int) -> Int64[Tensor, " F"]:
    """Return limits for a random 32-bit word w. If limit j is the first one above w, successor j is chosen.

    The limits give successor j a probability proportional to 1 / j.
    """
    weights = 1 / torch.arange(1, num_successors + 1, dtype=torch.float64)
    limits = (weights.cumsum(0) / weights.sum() * _WORD).long()
    limits[-1] = _WORD
    return limits


def _below(words: Int64[Tensor, "..."], bound: int) -> Int64[Tensor, "..."]:
    """Convert words of 32 random bits to uniform whole numbers below `bound`."""
    return torch.bitwise_right_shift(words * bound, 32)
