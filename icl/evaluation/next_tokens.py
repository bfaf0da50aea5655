"""The most likely next tokens of a language model after a user's own text or tokens.

A prompt file is text (.txt), which the run's tokenizer splits into tokens, or JSON `{"tokens": [1, 2, 3]}`. The token that begins a row
(BOS) is put before the prompt. If the prompt is longer than the context, only its last tokens are used.
"""

import csv
import json
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import torch

from icl.config import RunConfig
from icl.evaluation.prediction import PromptError
from icl.files.reading import MAX_TABLE, ContentError, parse_json, read_bytes
from icl.files.writing import table_format, write_atomically
from icl.model.language import LanguageModel
from icl.tasks.corpus import load_tokenizer

NUM_SHOWN = 5
"""Number of next tokens that are shown."""


class NextToken(NamedTuple):
    """A possible next token."""

    token: int
    probability: float
    text: str | None
    """The token as text, or None if the run has no tokenizer."""


def predict_next(model: LanguageModel, config: RunConfig, path: Path, *, count: int = NUM_SHOWN) -> list[NextToken]:
    """Return the most likely next tokens after the prompt in a file, most likely first.

    Raises:
        PromptError: If the file cannot be read, is neither text nor a list of tokens, or has a token outside the
            model's vocabulary.
        ConfigError: If the file contains text and the run has no tokenizer.
    """
    text = config.language
    try:
        data = read_bytes(path, limit=MAX_TABLE)
        tree: Any = None if path.suffix == ".txt" else parse_json(data)
    except OSError as error:
        raise PromptError(f"The prompt file {path} cannot be read: {error.strerror}.") from None
    except ContentError as error:
        raise PromptError(f'{path} must be text (.txt) or JSON like {{"tokens": [1, 2, 3]}} ({error}).') from None
    tokenizer: Any = load_tokenizer(text) if tree is None or text.tokenizer else None
    tokens = (
        tokenizer.encode(data.decode("utf-8", "replace"), add_special_tokens=False).ids
        if tree is None
        else _tokens_of(tree, path)
    )
    unknown = [token for token in tokens if not 0 <= token < text.vocab_size]
    if unknown:
        raise PromptError(f"Tokens must be from 0 to {text.vocab_size - 1:,}, got {unknown[0]:,}.")
    row = torch.tensor([[text.bos, *tokens[-text.num_predictions :]]])
    with torch.no_grad():
        chances, best = model(row)[0, -1].softmax(-1).topk(min(count, text.vocab_size))
    shown = [None if tokenizer is None else tokenizer.decode([token]) for token in best.tolist()]
    return [NextToken(*each) for each in zip(best.tolist(), chances.tolist(), shown, strict=True)]


def is_tokens(path: Path) -> bool:
    """Return whether a prompt file is for a language model: text, or JSON with tokens. `read_prompt_file` reads other files."""
    if path.suffix == ".txt":
        return True
    try:
        tree = parse_json(read_bytes(path, limit=MAX_TABLE)) if path.suffix == ".json" else None
    except (OSError, ContentError):
        return False
    return isinstance(tree, dict) and "tokens" in tree


def write_next(path: Path, predictions: list[NextToken]) -> Path:
    """Write the next tokens as JSON or CSV, depending on the file's suffix."""
    rows = [prediction._asdict() for prediction in predictions]
    if table_format(path) == "json":
        text = json.dumps(rows, indent=1) + "\n"
    else:
        table = StringIO(newline="")
        writer = csv.DictWriter(table, NextToken._fields, lineterminator="\n")  # it quotes tokens that contain a comma
        writer.writeheader()
        writer.writerows(rows)
        text = table.getvalue()
    write_atomically(path, text.encode())
    return path


def _tokens_of(tree: Any, path: Path) -> list[int]:
    tokens = tree.get("tokens") if isinstance(tree, dict) else None
    if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
        raise PromptError(
            f'{path} must be text (.txt) or JSON like {{"tokens": [1, 2, 3]}}, because the model is a language model.'
        )
    return tokens
