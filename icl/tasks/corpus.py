"""Read text from disk or from the Hugging Face Hub as rows of tokens. Sources are arrays (.npy), text files, JSONL and datasets.

An array is either a table of rows (R, T) with at least `context_size` columns, or one long text (L,). Of each row of a table, only the
first `context_size` tokens are used. A long text, and every text that is tokenised here, is cut into rows. Each of these rows consists of
the token BOS and the next `context_size` - 1 tokens of the text. The token BOS also follows each document (Hoogland et al. 2024). Tokens
after the last whole row are left out.

The packages `tokenizers` and `datasets` are optional (`pip install icl[language]`), and are imported only where they are used.
"""

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from icl.config import LanguageConfig
from icl.config.validation import ConfigError

HUB = "hf://"
_TEXT, _RECORDS, _ARRAY = ".txt", (".jsonl", ".json"), ".npy"
_EXTRA = "Install it with `pip install icl[language]`."
_CHECKED = 2**20
"""Number of tokens at the start of an array that are checked when it is opened. They must be in the vocabulary."""


class Corpus(NamedTuple):
    """A text as rows of tokens."""

    tokens: np.ndarray
    """Tokens: rows of equal length (R, T), or one long text (L,). An array on disk is memory-mapped, so it is not loaded as a whole."""
    language: LanguageConfig

    def __hash__(self) -> int:
        return hash(self.language)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Corpus) and self.language == other.language

    @property
    def num_rows(self) -> int:
        """Number of whole rows."""
        if self.tokens.ndim == 2:
            return len(self.tokens)
        return len(self.tokens) // self.language.num_predictions

    def rows(self, numbers: Int64[Tensor, "..."]) -> Int64[Tensor, "... T"]:
        """Return the rows at these positions of the corpus, counted from 0.

        Raises:
            ConfigError: If a token is not in the vocabulary.
        """
        text, flat = self.language, numbers.flatten().numpy()
        if self.tokens.ndim == 2:
            rows = self.tokens[flat, : text.context_size].astype(np.int64)
        else:
            places = flat[:, None] * text.num_predictions + np.arange(text.num_predictions)
            rows = np.pad(self.tokens[places].astype(np.int64), ((0, 0), (1, 0)), constant_values=text.bos)
        _require_tokens(rows, text)
        return torch.from_numpy(rows).unflatten(0, numbers.shape)


@lru_cache(maxsize=4)
def open_corpus(language: LanguageConfig) -> Corpus:
    """Open the text that `language.source` names. Text files are tokenised, and only their tokens are kept in memory.

    Raises:
        ConfigError: If the text cannot be read, or a package or the tokenizer is missing.
    """
    if language.source.startswith(HUB):
        return Corpus(_from_dataset(language), language)
    path = Path(language.source).expanduser()
    if path.suffix == _ARRAY:
        return Corpus(_open_array(path, language), language)
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    files = [
        file for file in files if file.is_file() and file.suffix in (_TEXT, *_RECORDS) and file.name != "tokenizer.json"
    ]
    if not files:
        raise ConfigError(
            f"`language.source` is {language.source}, but there is no .npy, .txt, .jsonl or .json file at this path."
        )
    documents = (document for file in files for document in _documents(file, language.column))
    return Corpus(tokenise(documents, language, beside=path), language)


def tokenise(documents: Iterator[str], language: LanguageConfig, *, beside: Path | None = None) -> np.ndarray:
    """Return the tokens of documents, with the token BOS after each document. Special tokens of the tokenizer are not added.

    Args:
        documents: The texts to tokenise.
        language: The tokenizer and the size of the vocabulary.
        beside: Folder or file of the text. If `language.tokenizer` is not set, `tokenizer.json` in this folder or beside this file is used.

    Raises:
        ConfigError: If there is no usable tokenizer, or a token of the documents is not in the vocabulary.
    """
    tokenizer = load_tokenizer(language, beside=beside)
    parts = [np.asarray([*tokenizer.encode(text, add_special_tokens=False).ids, language.bos]) for text in documents]
    tokens = np.concatenate(parts).astype(np.int32) if parts else np.zeros(0, np.int32)
    _require_tokens(tokens, language)
    return tokens


def load_tokenizer(language: LanguageConfig, *, beside: Path | None = None) -> Any:
    """Return the tokenizer of a run: a `tokenizers.Tokenizer`.

    Raises:
        ConfigError: If `tokenizers` is not installed, or the file is missing or is not a tokenizer.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ConfigError(f"Text needs the package `tokenizers`. {_EXTRA}") from None
    near = None if beside is None else (beside if beside.is_dir() else beside.parent) / "tokenizer.json"
    name = language.tokenizer or (str(near) if near is not None and near.is_file() else None)
    if name is None:
        raise ConfigError(
            "There is no tokenizer. Set `language.tokenizer` to a file tokenizer.json, or to hf://USER/NAME."
        )
    path = _tokenizer_from_hub(name) if name.startswith(HUB) else Path(name).expanduser()
    try:
        return Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"The tokenizer {name} cannot be read: {error.strerror}.") from None
    except Exception as error:  # `tokenizers` raises Exception itself
        reason = " ".join(str(error).split())
        raise ConfigError(f"{name} is not a tokenizer.json: {reason}.") from None


def read_vocabulary(name: str) -> list[str]:
    """Return the entries of a vocabulary as strings, in order.

    Args:
        name: File with a list of strings (.json, or .txt with one string per line), a file tokenizer.json, or hf://USER/NAME. Entries of a
            tokenizer that are not a complete string, such as parts of a character, are left out.

    Raises:
        ConfigError: If the vocabulary cannot be read, or has no entries.
    """
    path = Path(name).expanduser()
    words: Any = None
    try:
        if not name.startswith(HUB) and path.suffix == _TEXT:
            words = path.read_text(encoding="utf-8").split("\n")
        elif not name.startswith(HUB):
            words = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"The vocabulary {name} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise ConfigError(
            f"The vocabulary {name} is neither a list of strings nor a tokenizer.json: {_first(error)}."
        ) from None
    if not isinstance(words, list):
        tokenizer = load_tokenizer(LanguageConfig(tokenizer=name))
        words = [tokenizer.decode([number]) for number in range(tokenizer.get_vocab_size())]
    words = [word for word in words if isinstance(word, str) and word and "\ufffd" not in word]
    if not words:
        raise ConfigError(f"The vocabulary {name} has no entries.")
    return words


def _tokenizer_from_hub(name: str) -> Path:
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise ConfigError(f"The tokenizer {name} needs the package `huggingface_hub`. {_EXTRA}") from None
    try:
        return Path(hf_hub_download(name.removeprefix(HUB), "tokenizer.json"))
    except Exception as error:  # a dozen kinds of exceptions, such as no network, no such repository, or no access
        raise ConfigError(
            f"The tokenizer {name} cannot be fetched from the Hugging Face Hub: {_first(error)}"
        ) from None


def _from_dataset(language: LanguageConfig) -> np.ndarray:
    """Return the tokens of a dataset from the Hugging Face Hub. Its column `language.column` contains texts or lists of tokens."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise ConfigError(f"{language.source} needs the package `datasets`. {_EXTRA}") from None
    try:
        table = load_dataset(language.source.removeprefix(HUB), split="train")
    except Exception as error:  # a dozen kinds of exceptions, such as no network, no such dataset, or no access
        raise ConfigError(f"{language.source} cannot be fetched from the Hugging Face Hub: {_first(error)}") from None
    if language.column not in table.column_names:
        raise ConfigError(
            f"`language.column` is {language.column!r}, but the columns of {language.source} are {', '.join(table.column_names)}."
        )
    values = (record[language.column] for record in table)
    first = next(iter(table))[language.column] if len(table) else ""
    if isinstance(first, str):
        return tokenise(values, language)
    parts = [np.asarray([*tokens, language.bos]) for tokens in values]
    tokens = np.concatenate(parts).astype(np.int32)
    _require_tokens(tokens, language)
    return tokens


def _open_array(path: Path, language: LanguageConfig) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise ConfigError(f"`language.source` {path} cannot be read: {error.strerror or error}.") from None
    except (ValueError, EOFError) as error:
        raise ConfigError(f"`language.source` {path} is not a NumPy array of tokens: {_first(error)}") from None
    is_table = array.ndim == 2 and array.shape[1] >= language.context_size
    if array.dtype.kind not in "ui" or not (array.ndim == 1 or is_table):
        raise ConfigError(
            f"`language.source` {path} must have whole numbers of shape (L,), or (R, T) with T of at least "
            f"{language.context_size:,} (`language.context_size`), got {array.dtype} of shape {array.shape}."
        )
    _require_tokens(array[: max(1, _CHECKED // (1 if array.ndim == 1 else array.shape[1]))], language)
    return array


def _documents(file: Path, column: str) -> Iterator[str]:
    """Yield the documents of a file: the whole of a .txt file as one document, or the field `column` of each JSON record."""
    try:
        if file.suffix == _TEXT:
            yield file.read_text(encoding="utf-8")
            return
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _text_of(json.loads(line), column, file, number)
    except OSError as error:
        raise ConfigError(f"The text {file} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise ConfigError(f"{file} is not UTF-8 text with one JSON record per line: {_first(error)}") from None


def _text_of(record: Any, column: str, file: Path, number: int) -> str:
    text = record.get(column) if isinstance(record, Mapping) else None
    if not isinstance(text, str):
        raise ConfigError(f"Line {number} of {file} has no text in the field {column!r} (`language.column`).")
    return text


def _require_tokens(tokens: np.ndarray, language: LanguageConfig) -> None:
    if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < language.vocab_size:
        raise ConfigError(
            f"{language.source} has tokens from {int(tokens.min()):,} to {int(tokens.max()):,}, but `language.vocab_size` is "
            f"{language.vocab_size:,}, so tokens must be from 0 to {language.vocab_size - 1:,}."
        )


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
