"""Read JSON and YAML from files of unknown origin, within limits on size, depth, numbers and time.

For damaged or malicious text, Python's parsers raise a dozen kinds of errors. They accept repeated keys, and they return values that
cause failures later: nesting that exhausts the stack, aliases that expand to gigabytes, infinities for numbers too large for a float,
and dates. This module raises the same error, `ContentError`, in all these cases. The error's message completes a sentence such as
"status.json cannot be used: ...". PyYAML also reads clock times as numbers: 1:30 becomes 90. This module reads clock times as
strings.
"""

import datetime
import json
import math
import os
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from icl.config.validation import UserError

MAX_DEPTH = 50
"""Largest number of levels of nesting. Files that `icl` writes have at most six levels."""
MAX_BITS = 1000
"""Largest number of bits of a whole number. Numbers of more than 1024 bits do not fit into a float."""
MAX_SMALL_FILE = 2**20
"""Largest number of bytes of a file that describes a run or a point of a sweep. Files that `icl` writes have a few thousand bytes."""
MAX_YAML = 2**18
"""Largest number of bytes of a YAML file. PyYAML needs a few seconds to read a file of this size."""
MAX_TABLE = 2**29
"""Largest number of bytes of a table's file. For a run with 190 checkpoints, a table has about 30 million bytes."""
_MAX_YAML_VALUES = 2**18
_MAX_DIGITS = 300
_TYPES: dict[type, str] = {
    datetime.date: "date",
    datetime.datetime: "date",
    bytes: "YAML's type `!!binary`",
    set: "YAML's type `!!set`",
    tuple: "YAML's type `!!omap` or `!!pairs`",
}
"""Types that YAML has and JSON does not, with their names for messages. Our files never contain them."""


class ContentError(UserError, ValueError):
    """Raised if content cannot be used. The message says why in a few words, without the file's name."""


def read_bytes(path: Path, *, limit: int | None = MAX_SMALL_FILE) -> bytes:
    """Return the bytes of a regular file of at most `limit` bytes. If `limit` is None, the file may have any size.

    Raises:
        ContentError: If the file is larger, or is not a regular file. A pipe is refused because reading it might never end.
        OSError: If there is no such file, or it cannot be read.
    """
    with open(path, "rb", opener=_open_without_waiting) as file:
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode):
            raise ContentError("it is not a regular file")
        if limit is not None and about.st_size > limit:
            raise ContentError(f"it has {about.st_size:,} bytes, and the limit is {limit:,}")
        # `read` allocates memory for all bytes that we request, so we request only a little more than the file's size.
        return file.read() if limit is None else file.read(min(limit, about.st_size + 2**16))


def parse_json(data: bytes | str, *, limit: int | None = None) -> Any:
    """Return the content of a JSON document.

    Args:
        data: The document, in UTF-8 if it is bytes.
        limit: Largest number of values. The default is no limit.

    Raises:
        ContentError: If the document is not JSON, repeats a key, is nested too deeply, or contains a number that is too large.
    """
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
        tree = json.loads(text, object_pairs_hook=_table, parse_int=_whole_number, parse_float=_real_number)
    except ContentError:
        raise
    except RecursionError:
        raise ContentError(f"it is nested more than {MAX_DEPTH} levels deep") from None
    except ValueError as error:
        raise ContentError(f"it is not valid JSON ({_in_one_line(error)})") from None
    _require_bounded(tree, limit)
    return tree


def parse_yaml(data: bytes | str) -> Any:
    """Return the content of a YAML document. The content has only plain types. A class that the document names is never loaded.

    Raises:
        ContentError: If the document is not YAML, repeats a key, merges tables (`<<`), is too long or nested too deeply, or has
            aliases that expand to too many values.
    """
    if len(data) > MAX_YAML:
        raise ContentError(f"it has {len(data):,} bytes, and the limit is {MAX_YAML:,}")
    try:
        tree = yaml.load(data, _Loader)  # a SafeLoader
    except ContentError:
        raise
    except RecursionError:
        raise ContentError(f"it is nested more than {MAX_DEPTH} levels deep") from None
    except Exception as error:  # odd scalars, such as a month 13, make PyYAML raise many kinds of errors
        raise ContentError(f"it is not valid YAML ({_in_one_line(error)})") from None
    _require_bounded(tree, _MAX_YAML_VALUES)
    return tree


def is_table(rows: Any) -> bool:
    """Return whether a value from JSON is a list of rows. Each row is a dict of strings, numbers, booleans and nulls."""
    return isinstance(rows, list) and all(
        isinstance(row, dict) and all(value is None or isinstance(value, (str, int, float)) for value in row.values())
        for row in rows
    )


def is_beyond_floats(text: str, number: float) -> bool:
    """Return whether a number in text, such as 1e400 or 1e-400, is too large or too small for a float.

    Args:
        text: The number as text.
        number: Python's float for this text.
    """
    mantissa = re.split("[eE]", text)[0]
    return bool(re.search(r"[1-9]", mantissa)) and (math.isinf(number) or number == 0)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type if there is no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def is_number(text: str) -> bool:
    """Return whether Python's `float` accepts a string as a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def _without_clock(tag: str, pattern: re.Pattern[str]) -> re.Pattern[str]:
    """Return YAML's pattern for numbers, changed so that it does not match clock times."""
    if not tag.endswith((":int", ":float")):
        return pattern
    return re.compile(rf"(?!.*:){pattern.pattern}", pattern.flags)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, with changes for repeated keys, merges, numbers that a float cannot represent, and clock times.

    - PyYAML keeps only the last value of a repeated key. This loader refuses repeated keys.
    - PyYAML copies all entries of a table that is merged by `<<`. A small file with many merges would need much time and memory, so
      this loader refuses merges.
    - PyYAML makes numbers beyond the range of a float infinite or zero. This loader refuses them.
    - PyYAML reads 1:30 as 90. This loader reads it as a string.
    """

    def construct_yaml_float(self, node: Any) -> float:
        """Return a number. Refuse a number that a float cannot represent."""
        number: float = super().construct_yaml_float(node)
        if is_beyond_floats(node.value, number):
            raise ContentError(
                f"it contains {node.value[:50]}, which is too large or too small for a floating-point number"
            )
        return number

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Return the node of a table. Refuse a table with a repeated key or a merge."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise ContentError(
                "it merges a table by `<<`, which `icl` does not support; write the entries of the table out"
            )
        _refuse_repeated(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        return node


_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, _without_clock(tag, pattern)) for tag, pattern in resolvers]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        _refuse_repeated(name for name, _ in pairs)
    return table


def _refuse_repeated(names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ContentError(f"the key {name[:50]!r} appears twice")
        seen.add(name)


def _whole_number(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ContentError(f"it contains a whole number of {len(digits):,} digits")
    return int(digits)


def _real_number(digits: str) -> float:
    number = float(digits)
    if is_beyond_floats(digits, number):
        raise ContentError(f"it contains {digits[:50]}, which is too large or too small for a floating-point number")
    return number


def _require_bounded(tree: Any, limit: int | None) -> None:
    """Refuse deep nesting, large numbers, invalid Unicode and too many values, which would cause failures later.

    The walk keeps its own stack of iterators, so deep nesting cannot exhaust Python's stack. A value with aliases counts once for
    each alias.
    """
    stack: list[Iterator[Any]] = [iter((tree,))]
    count = 0
    while stack:
        value = next(stack[-1], _END)
        if value is _END:
            stack.pop()
            continue
        count += 1
        if limit is not None and count > limit:
            raise ContentError(f"it contains more than {limit:,} values")
        if isinstance(value, int) and value.bit_length() > MAX_BITS:
            raise ContentError("it contains a whole number that is too large")
        if isinstance(value, tuple(_TYPES)):
            what = f"the {_TYPES[type(value)]} {value}" if isinstance(value, datetime.date) else _TYPES[type(value)]
            raise ContentError(f"it contains {what}{_where(tree, value)}; write a number, or text in quotes")
        if isinstance(value, str) and not value.isascii() and not _is_unicode(value):
            raise ContentError("it contains text that is not valid Unicode")
        if isinstance(value, (dict, list)):
            if len(stack) > MAX_DEPTH:
                raise ContentError(f"it is nested more than {MAX_DEPTH} levels deep")
            stack.append(iter(_values(value)))


_END = object()


def _where(tree: Any, target: Any) -> str:
    """Return a phrase such as " in `section.key`" that says where a value is, or "" if the value has no key."""
    stack: list[tuple[tuple[str, ...], Any]] = [((), tree)]
    for _ in range(_MAX_YAML_VALUES):
        if not stack:
            break
        path, node = stack.pop()
        if node is target:
            return f" in `{'.'.join(path)[:100]}`" if path else ""
        if len(path) <= MAX_DEPTH:
            items = (
                node.items()
                if isinstance(node, dict)
                else ((None, item) for item in node)
                if isinstance(node, list)
                else ()
            )
            stack += [(path if key is None else (*path, str(key)), item) for key, item in items]
    return ""


def _values(value: dict[Any, Any] | list[Any]) -> Iterable[Any]:
    return (part for pair in value.items() for part in pair) if isinstance(value, dict) else value


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _open_without_waiting(path: str, flags: int) -> int:
    """Open a file without waiting. Opening a pipe that has no writer would otherwise block the program for ever."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
