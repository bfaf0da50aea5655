"""The section `language`: the text that a language run reads.

`model.family` selects a regression run or a language run. Both use the sections `model`, `optim`, `trainer`, `evaluation`,
`early_stopping`, `checkpoints`, `seeds` and `sampler`. The section `task` describes the prompts of a regression run, and must keep its
defaults in a language run. The section `language` describes the text of a language run, and must keep its defaults in a regression run.
The first versions had no language models. To give a regression run the same `config.yaml`, the same digests of the settings and the same
default name as in those versions, its saved settings have no section `language`. They also leave out all settings of `LATER_SETTINGS`
(`icl.config.tree`) that have their defaults.

A row is a sequence of `context_size` tokens. Its first token is always `vocab_size` - 1. This token marks the beginning and the end of
documents (BOS and EOS, as in Hoogland et al. 2024). The model predicts the `context_size` - 1 tokens after the first.
"""

from dataclasses import dataclass

from icl.config.validation import ConfigError, require, validate

SYNTHETIC = "synthetic"
"""Value of `language.source` that selects the synthetic language, which needs no files."""
MAX_VOCAB_SIZE = 2**24
"""Largest allowed number of tokens in the vocabulary, far above the sizes in use."""


@dataclass(frozen=True, kw_only=True)
class LanguageConfig:
    """Text of a language run: its source, the size of its rows of tokens, and the statistics of the synthetic language."""

    source: str = SYNTHETIC
    """Source of the text: `synthetic`, a file of tokens (.npy), a folder or file of text (.txt, .jsonl), or a dataset of the Hugging Face
    Hub (hf://USER/NAME)."""
    next_source: str | None = None
    """Source of the training rows at step `change_step` and later. All other rows, such as test rows, still come from `source`."""
    change_step: int | None = None
    """First step whose training rows come from `next_source`; 25,000 in Hoogland et al. 2024."""
    tokenizer: str | None = None
    """Tokenizer of text: a file tokenizer.json, or hf://USER/NAME. A source that consists of tokens needs no tokenizer."""
    column: str = "text"
    """Name of the field that contains the text in a JSONL record, or of the column that contains the text in a dataset."""
    vocab_size: int = 64
    """Number V of tokens in the vocabulary, including token V - 1, which marks the beginning of a row."""
    context_size: int = 64
    """Number of tokens in a row. The first token of a row is always V - 1; the model predicts the others."""
    num_successors: int = 8
    """Number F of possible successors of each token in the synthetic language. Outside copies, the next token is successor j with a
    probability proportional to 1 / j."""
    copy_rate: float = 0.1
    """Probability that a copy of an earlier segment of the row begins at a given token of the synthetic language. No copy begins while
    another copy is in progress."""
    copy_length: int = 16
    """Largest number of tokens in a copied segment. The length of each copy is drawn uniformly from `copy_length` / 2 to `copy_length`."""

    def __post_init__(self) -> None:
        counts = {"vocab_size": 3, "context_size": 4, "num_successors": 1, "copy_length": 2, "change_step": 1}
        validate("language", self, counts=counts, numbers={"copy_rate": "zero or positive"})
        require(self.copy_rate <= 1, f"`language.copy_rate` must be at most 1, got {self.copy_rate!r}.")
        require(
            self.vocab_size <= MAX_VOCAB_SIZE,
            f"`language.vocab_size` must be at most {MAX_VOCAB_SIZE:,}, got {self.vocab_size:,}.",
        )
        require(bool(self.source.strip()), "`language.source` must name a source of text, got nothing.")
        require(
            (self.next_source is None) == (self.change_step is None),
            "`language.next_source` and `language.change_step` belong together: set both, or neither.",
        )
        if self.next_source is not None:
            require(bool(self.next_source.strip()), "`language.next_source` must name a source of text, got nothing.")
            require(
                SYNTHETIC not in (self.source, self.next_source),
                "`language.next_source` works only with texts: set neither `language.source` nor `language.next_source` to synthetic.",
            )

    @property
    def is_synthetic(self) -> bool:
        """Whether the text is the synthetic language."""
        return self.source == SYNTHETIC

    @property
    def bos(self) -> int:
        """The token that begins every row, and ends every document."""
        return self.vocab_size - 1

    @property
    def num_predictions(self) -> int:
        """Number of tokens of a row that the model predicts: all tokens except the first."""
        return self.context_size - 1


def require_regression(family: str, what: str) -> None:
    """Refuse a language run for a command or option that accepts only regression runs.

    Args:
        family: `model.family` of the run.
        what: Subject of the error message, such as "`--rescale`".

    Raises:
        ConfigError: If the run is a language run.
    """
    if family == "language":
        raise ConfigError(
            f"{what} accepts only regression runs, but this is a language run (`model.family` is `language`)."
        )
