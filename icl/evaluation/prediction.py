"""Predictions for a user's own prompts: context examples and queries, as tensors or in a file.

Each query is predicted from the whole context, and independently of the other queries. A prompt file is JSON `{"x_context": [[...]],
"y_context": [...], "x_query": [[...]]}`, or CSV with the columns x1..xD,y. In CSV, an empty y marks a query.
"""

import csv
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from icl.arrays import real_tensor
from icl.config.validation import ConfigError, UserError
from icl.files.reading import MAX_TABLE, ContentError, parse_json, read_bytes
from icl.files.writing import table_format, write_atomically
from icl.model.transformer import Transformer


class PromptError(UserError, ValueError):
    """Error for a prompt that cannot be used. The message says what was expected."""


class PromptFile(NamedTuple):
    """Content of a prompt file."""

    x_context: Float[Tensor, "n D"]
    y_context: Float[Tensor, " n"]
    x_query: Float[Tensor, "q D"]


def predict_from_prompt(model: Transformer, x_context: Any, y_context: Any, x_query: Any) -> Float[Tensor, " q"]:
    """Predict the target of every query from the whole context.

    Args:
        model: A trained model.
        x_context: Inputs of the examples, (n, D) with n from 0 to K - 1, as a tensor, an array or nested lists.
        y_context: Targets of the examples (n,).
        x_query: Inputs whose targets are to be predicted (q, D).

    Raises:
        PromptError: If the shapes do not match, or a number is not finite.
    """
    parameter = parameter_of(model)
    x_context, y_context, x_query = (
        real_tensor(value, name, dtype=parameter.dtype, device=parameter.device, error=PromptError)
        for value, name in _named(x_context, y_context, x_query)
    )
    if x_context.ndim > 0 and len(x_context) == 0:  # an empty list has no D
        x_context = x_context.reshape(0, model.task_size)
    _check_shapes(model, x_context, y_context, x_query)
    num_queries = len(x_query)
    xs = torch.cat((x_context.expand(num_queries, *x_context.shape), x_query.unsqueeze(1)), dim=1)  # q n+1 D
    ys = torch.nn.functional.pad(y_context, (0, 1)).expand(num_queries, -1)  # q n+1; the model ignores the last target
    with torch.no_grad():
        predictions = model(xs, ys)[:, -1]
    if not predictions.isfinite().all():
        raise PromptError(
            "The model's predictions are not finite. Either the prompt's numbers are too large, or training diverged."
        )
    return predictions


def read_prompt_file(path: str | Path) -> PromptFile:
    """Read the prompt in a JSON or CSV file.

    Raises:
        PromptError: If the file is missing or malformed, or has no query.
    """
    path = Path(path)
    try:
        text = read_bytes(path, limit=MAX_TABLE).decode("utf-8-sig")
    except OSError as error:
        raise PromptError(f"The prompt file {path} cannot be read: {error.strerror}.") from None
    except ContentError as error:
        raise PromptError(f"The prompt file {path} cannot be used: {error}.") from None
    except UnicodeDecodeError:
        raise PromptError(f"The prompt file {path} cannot be used: it is not text in UTF-8.") from None
    prompt = _from_csv(text, path) if path.suffix.lower() == ".csv" else _from_json(text, path)
    if len(prompt.x_query) == 0:
        raise PromptError(f"{path} has no query. Give `x_query` in JSON, or leave y empty in a row of a CSV file.")
    return prompt


def write_predictions(path: Path, prompt: PromptFile, predictions: Float[Tensor, " q"]) -> Path:
    """Write queries and predictions as JSON or CSV, depending on the file's suffix.

    Raises:
        StorageError: If the file has another suffix or cannot be written.
    """
    queries, values = prompt.x_query.tolist(), predictions.tolist()
    if table_format(path) == "json":
        text = json.dumps({"x_query": queries, "y_predicted": values}, indent=1) + "\n"
    else:
        header = [*(f"x{i + 1}" for i in range(prompt.x_query.shape[1])), "y_predicted"]
        lines = [header, *([*query, value] for query, value in zip(queries, values, strict=True))]
        text = "".join(",".join(map(str, line)) + "\n" for line in lines)
    write_atomically(path, text.encode())
    return path


def _named(x_context: Any, y_context: Any, x_query: Any) -> list[tuple[Any, str]]:
    return [(x_context, "x_context"), (y_context, "y_context"), (x_query, "x_query")]


def parameter_of(model: Any) -> Tensor:
    """Return one parameter of the model, from which callers take the model's dtype and device.

    Raises:
        ConfigError: If `model` is not a model of `icl`.
    """
    if not (isinstance(model, torch.nn.Module) and hasattr(model, "task_size") and hasattr(model, "max_examples")):
        raise ConfigError(f"`model` must come from `load_model` or `build_model`, got {type(model).__name__}.")
    return next(model.parameters())


def _check_shapes(model: Transformer, x_context: Tensor, y_context: Tensor, x_query: Tensor) -> None:
    for tensor, name in ((x_context, "x_context"), (x_query, "x_query")):
        if tensor.ndim != 2 or tensor.shape[1] != model.task_size:
            raise PromptError(
                f"`{name}` must have shape (rows, {model.task_size}) for this model, got {tuple(tensor.shape)}."
            )
    if y_context.shape != x_context.shape[:1]:
        raise PromptError(
            f"`y_context` must have one target per example: {len(x_context)} expected, got shape {tuple(y_context.shape)}."
        )
    if len(x_context) > model.max_examples - 1:
        raise PromptError(
            f"This model takes at most {model.max_examples - 1} context examples before a query, got {len(x_context)}."
        )


def _from_json(text: str, path: Path) -> PromptFile:
    try:
        content = parse_json(text)
        parts = _named(content["x_context"], content["y_context"], content["x_query"])
    except (ContentError, KeyError, TypeError) as error:
        reason = f" ({error})" if isinstance(error, ContentError) else ""
        raise PromptError(
            f'{path} must be JSON like {{"x_context": [[0.1, 0.2]], "y_context": [0.3], "x_query": [[1.0, 2.0]]}}{reason}.'
        ) from None
    prompt = PromptFile(*(_file_tensor(value, name) for value, name in parts))
    for tensor, name in _named(*prompt):
        if tensor.ndim == 0:
            raise PromptError(f"{path} must have a list in `{name}`, got one number.")
    return prompt


def _file_tensor(value: Any, name: str) -> Tensor:
    return real_tensor(value, name, dtype=torch.float32, error=PromptError)


def _from_csv(text: str, path: Path) -> PromptFile:
    try:
        rows = [row for row in csv.reader(text.splitlines()) if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise PromptError(f"{path} is not a CSV file ({error}).") from None
    size = len(rows[0]) - 1 if rows else 0
    if not rows or [cell.strip() for cell in rows[0]] != [*(f"x{i + 1}" for i in range(size)), "y"] or size < 1:
        raise PromptError(f"{path} must begin with the header x1,x2,...,xD,y. An empty y marks a query.")
    try:
        if any(len(row) != size + 1 for row in rows):
            raise ValueError
        xs = [[float(cell) for cell in row[:size]] for row in rows[1:]]
        ys = [float(row[size]) if row[size].strip() else None for row in rows[1:]]
    except ValueError:
        raise PromptError(
            f"Every row of {path} must have {size} numbers, followed by y, which is a number or empty."
        ) from None
    context = [(x, y) for x, y in zip(xs, ys, strict=True) if y is not None]
    return PromptFile(
        _file_tensor([x for x, _ in context], "x_context").reshape(-1, size),
        _file_tensor([y for _, y in context], "y_context"),
        _file_tensor([x for x, y in zip(xs, ys, strict=True) if y is None], "x_query").reshape(-1, size),
    )
