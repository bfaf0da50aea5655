"""Read the values of settings as people, YAML 1.1 and W&B write them: `inf`, `None`, `1e-5`, `10_000`, `0,1,2`.

Each value is converted to the declared type of its setting. A value that cannot be converted is refused. W&B's `${args}` passes
a nested group of parameters as one argument, the Python `str` of a dict: `--task={'num_tasks': 2}` (`read_table`).
"""

import argparse
import ast
import dataclasses
import functools
import math
import re
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from icl.config.tree import RunConfig
from icl.config.validation import ConfigError, has_type, parse_num_tasks, require_run_name, require_steps
from icl.files.reading import MAX_BITS, is_beyond_floats, is_number, parse_json, parse_yaml

SECTIONS = {field.name: field.type for field in dataclasses.fields(RunConfig) if dataclasses.is_dataclass(field.type)}
"""The sections of the tree of settings, with their classes."""
_NONE = ("none", "null", "~")
_TRUTH_WORDS = {"yes": True, "on": True, "no": False, "off": False}
"""Words for truth values in YAML 1.1, in addition to true and false."""
_TYPE_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


@functools.cache
def known_keys() -> dict[str, Any]:
    """Return every dotted key with its declared type, such as `optim.lr: float`."""
    keys: dict[str, Any] = {}
    for field in dataclasses.fields(RunConfig):
        if field.name in SECTIONS:
            keys |= {f"{field.name}.{leaf.name}": leaf.type for leaf in dataclasses.fields(SECTIONS[field.name])}
        else:
            keys[field.name] = field.type
    return keys


def describe_type(kind: Any) -> str:
    """Return a declared type in words, such as `a whole number or none`."""
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(str(choice) for choice in typing.get_args(kind))
    if _is_list(kind):
        return "a list such as 0,1,2, or none"
    if isinstance(kind, types.UnionType):
        return " or ".join("none" if part is types.NoneType else describe_type(part) for part in kind.__args__)
    return _TYPE_WORDS.get(kind, getattr(kind, "__name__", str(kind)))


def read_value(key: str, value: Any) -> Any:
    """Convert a value of a setting to its declared type. Text may become a number, and a number may become text.

    Raises:
        ConfigError: If the value cannot be converted. The message names the key and the value.
    """
    if key == "task.num_tasks":
        return parse_num_tasks(value)
    if key == "sampler.steps":
        return _read_steps(value)
    if key == "trainer.loggers" and isinstance(value, list):
        return ",".join(map(str, value))
    kind = known_keys()[key]
    if _is_list(kind):
        return _read_list(key, value)
    parts = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    is_text = any(part is str or typing.get_origin(part) is Literal for part in parts)
    if isinstance(value, bool) and "true" in typing.get_args(
        kind
    ):  # such as `trainer.compile`: YAML reads the words `true` and `false` as truth values
        return str(value).lower()
    if isinstance(value, str):
        if key == "run_name":
            require_run_name(
                "~" if value == "~" else "name"
            )  # `~` is refused: it is the home folder in a shell, but null in YAML
        if not is_text or (types.NoneType in parts and value.strip().lower() in _NONE):
            value = _read_scalar(key, value)
    elif is_text and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, int) and value.bit_length() > MAX_BITS:  # too large for a float and too long for a message
        raise ConfigError(f"`{key}` is too large: a whole number of {value.bit_length():,} bits.")
    if int in parts and isinstance(value, float) and value.is_integer():
        value = int(value)
    if not has_type(value, kind):
        raise _wrong_type(key, value)
    return float(value) if float in parts and isinstance(value, int) else value


def parse_scalar(text: str) -> Any:
    """Convert text that spells a number, a truth value or None. Return other text unchanged.

    A number that is too large or too small for a float, such as 1e400, also remains text, because it would become infinite or zero.
    """
    word = text.strip()
    lowered = word.lower()
    if lowered in _NONE:
        return None
    if lowered in ("true", "false"):
        return lowered == "true"
    if re.fullmatch(r"[+-]?\d[\d_]*", word):
        return int(word.replace("_", "")) if len(word) < 1000 else text
    if re.fullmatch(r"[+-]?\.?(inf|infinity|nan)", lowered):
        return float(lowered.replace(".", ""))
    try:
        number = float(word.replace("_", ""))
    except ValueError:
        return text
    return text if is_beyond_floats(word, number) else number


def read_table(text: str) -> dict[Any, Any] | None:
    """Parse a string as a table of settings in JSON, Python or YAML. Return None if it is not a table."""
    if not text.strip().startswith("{"):
        return None
    readers: tuple[Callable[[str], Any], ...] = (parse_json, _python_literal, parse_yaml)
    for read in readers:
        try:
            table = read(text.strip())
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(table, dict):
            return table
    return None


def whole_number(minimum: int, maximum: int = 999_999_999) -> Callable[[str], int]:
    """Return a function that reads a whole number within bounds from the text of an option."""

    def read(text: str) -> int:
        if not text.isdecimal() or len(text) > 20 or not minimum <= int(text) <= maximum:
            raise argparse.ArgumentTypeError(f"must be a whole number from {minimum} to {maximum:,}, got {text!r}")
        return int(text)

    return read


def read_whole_number(text: str) -> int:
    """Return a whole number from the text of an option."""
    if not re.fullmatch(r"\s*[+-]?\d[\d_]{0,29}\s*", text):
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}")
    return int(text)


def read_number(text: str) -> float:
    """Return a finite number from the text of an option."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"must be a finite number, got {text!r}")
    if is_beyond_floats(text, number):
        raise argparse.ArgumentTypeError(f"is too small for a floating-point number, got {text!r}")
    return number


def read_path(text: str) -> Path:
    """Convert the text of an option to a path. Refuse an empty string, which pathlib reads as the working directory."""
    if not text.strip():
        raise argparse.ArgumentTypeError("must name a file or folder, got nothing")
    return Path(text)


def _wrong_type(key: str, value: Any) -> ConfigError:
    return ConfigError(f"`{key}` must be {describe_type(known_keys()[key])}, got {value!r}.")


def _read_scalar(key: str, text: str) -> Any:
    """Convert text to the value of a setting that does not accept text: a number, a truth value or None."""
    value = parse_scalar(text)
    if not isinstance(value, str):
        return value
    if is_number(text):
        raise ConfigError(f"`{key}` is too large or too small for a floating-point number, got {text.strip()}.")
    word, kind = text.strip().lower(), known_keys()[key]
    if kind is bool and word in _TRUTH_WORDS:
        return _TRUTH_WORDS[word]
    if kind is not bool and re.fullmatch(r"[+-]?(0x[0-9a-f_]*[0-9a-f]|0b[01_]*[01])", word):
        return int(word.replace("_", ""), 0)
    raise _wrong_type(key, text)


def _read_steps(value: Any) -> Any:
    """Return a choice of steps as text: `all`, 1,2,3 or 0:1000:100. The value may also be a number or a list of numbers, as in YAML."""
    steps = value if isinstance(value, list) else [value]
    if all(isinstance(step, int) and not isinstance(step, bool) for step in steps):
        value = ",".join(map(str, steps))
    require_steps(value)
    return value


def _is_list(kind: Any) -> bool:
    return any(typing.get_origin(part) is tuple for part in typing.get_args(kind))


def _read_list(key: str, value: Any) -> list[Any] | None:
    """Convert `0,1,2`, `[0, 1, 2]`, a YAML list or a single value to a list. Return None if the value is null."""
    given = value
    if isinstance(value, str):
        text = value.strip()
        if (text[:1], text[-1:]) in (("[", "]"), ("(", ")")):
            text = text[1:-1]
        words = [word.strip() for word in text.removesuffix(",").split(",")]
        value = words if words[0] or words[1:] else []
        if len(words) == 1 and words[0].lower() in _NONE:
            value = None
    if value is None:
        return None
    values: Sequence[Any] = value if isinstance(value, (list, tuple)) else [value]
    if key == "population.num_tasks":
        return [parse_num_tasks(item) for item in values]
    numbers = [parse_scalar(item) if isinstance(item, str) else item for item in values]
    if not all(has_type(number, int) for number in numbers):
        raise _wrong_type(key, given)
    return numbers


class _NumberNames(ast.NodeTransformer):
    """Replace the names `inf` and `nan` by the floats. Python prints these floats by name, but has no literals for them."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.copy_location(ast.Constant(float(node.id)), node) if node.id in ("inf", "nan") else node


def _python_literal(text: str) -> Any:
    tree = ast.parse(text, mode="eval")
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, float):
            written = ast.get_source_segment(text, node) or ""
            if is_beyond_floats(written, node.value):
                raise ValueError(f"a float cannot represent {written}")
    return ast.literal_eval(_NumberNames().visit(tree))
