"""Read a table of settings from one word of a command line, as JSON, as Python prints it, or as YAML.

W&B's `${args}` passes a nested group of parameters as one word, the Python `str` of a dict: `--task={'num_tasks': 2}`.
That text is not JSON, and for an infinite value (`{'num_tasks': inf}`) not a Python literal either.
"""

import ast
from collections.abc import Callable
from typing import Any

from icl.files.reading import is_beyond_floats, parse_json, parse_yaml


def read_table(text: str) -> dict[Any, Any] | None:
    """Return the table that a word spells, or None if it spells none."""
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


class _NumberNames(ast.NodeTransformer):
    """Replace the names by which Python prints floats that it has no literal for."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.copy_location(ast.Constant(float(node.id)), node) if node.id in ("inf", "nan") else node


def _python_literal(text: str) -> Any:
    tree = ast.parse(text, mode="eval")
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, float):
            written = ast.get_source_segment(text, node) or ""
            if is_beyond_floats(written, node.value):
                raise ValueError(f"a float cannot hold {written}")
    return ast.literal_eval(_NumberNames().visit(tree))
