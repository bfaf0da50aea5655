"""The section `language`: the text that a language run reads. A run whose `model.family` is `regression` has no such section.

`RunConfig` holds a language run in the same sections as a regression run. `model.family` chooses the family. The sections `model`, `optim`,
`trainer`, `evaluation`, `early_stopping`, `checkpoints`, `seeds` and `sampler` serve both. `task` describes the prompts of a regression
run, and must keep its defaults in a language run; `language` describes the text of a language run, and must keep its defaults in a
regression run. A saved regression run has neither this section nor those settings of `LATER_SETTINGS` (`icl.config.tree`) that have their defaults,
so its file, its digests and its name are those of versions without language models.

A row is one sequence of `context_size` tokens that begins with the token `vocab_size` - 1, which marks the beginning and the end of
documents (BOS and EOS, as in Hoogland et al. 2024). The model predicts the `context_size` - 1 tokens after the first.
"""

from dataclasses import dataclass

from icl.config.validation import ConfigError, require, validate

SYNTHETIC = "synthetic"
"""Value of `language.source` for the language that needs no files."""
MAX_VOCAB_SIZE = 2**24
"""Largest vocabulary, far above those in use."""


@dataclass(frozen=True, kw_only=True)
class LanguageConfig:
    """Text of a language run: token rows, their source, and the statistics of the synthetic language."""

    source: str = SYNTHETIC
    """Source of the text: `synthetic`, a file of tokens (.npy), a folder or file of text (.txt, .jsonl), or a dataset of the Hugging Face
    Hub (hf://USER/NAME)."""
    next_source: str | None = None
    """Source of the training rows from step `change_step` on. All other rows, such as test rows, still come from `source`."""
    change_step: int | None = None
    """First step whose training rows come from `next_source`; 25,000 in Hoogland et al. 2024."""
    tokenizer: str | None = None
    """Tokenizer of text: a file tokenizer.json, or hf://USER/NAME. A source of tokens needs none."""
    column: str = "text"
    """Field of each record of JSONL, or column of a dataset, that has the text."""
    vocab_size: int = 64
    """Number V of tokens, with the token that marks the beginning of a row, V - 1."""
    context_size: int = 64
    """Number of tokens of a row, with the first one, which is always V - 1."""
    num_successors: int = 8
    """Number F of the synthetic language's successors of each token. Successor j has probability proportional to 1 / j, so the
    language's table of bigrams is known."""
    copy_rate: float = 0.1
    """Probability that a copy begins at a token of the synthetic language: an earlier segment of the row is repeated."""
    copy_length: int = 16
    """Largest length of a copied segment. Lengths are uniform from half of it to all of it."""

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
                "`language.next_source` needs a text as `language.source`, and must be a text itself, not the synthetic language.",
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
        """Number of predictions of a row."""
        return self.context_size - 1


def require_regression(family: str, what: str) -> None:
    """Refuse a language run where only regression runs are served.

    Args:
        family: `model.family` of the run.
        what: The beginning of the sentence, such as "`--rescale`".

    Raises:
        ConfigError: If it is a language run.
    """
    if family == "language":
        raise ConfigError(f"{what} serves regression runs only, and this is a language run (`model.family`).")
