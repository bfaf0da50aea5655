"""A bad input, and the words that its error message must contain."""

import contextlib
import os
import re
import shlex
import tempfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from icl.cli import COMMANDS
from icl.cli import main as icl


class Case(NamedTuple):
    """A bad input and the words that its error message must contain."""

    group: str
    """The command; `none` for a word that is not a command, or `api` for a Python function."""
    label: str
    mentions: tuple[str, ...]
    act: Callable[[], Any]
    """Function that tries the input. A command returns its exit status; a Python function raises an error."""
    environment: Mapping[str, str] = {}


def command_case(line: str, *mentions: str) -> Case:
    """Return the case of a command line in shell syntax. Variables come first: `LOCAL_ROOT=x runs`."""
    words = shlex.split(line)
    environment = {}
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0], re.DOTALL):
        name, _, value = words.pop(0).partition("=")
        environment[name] = value
    group = words[0] if words and words[0] in COMMANDS else "none"
    return Case(group, line, mentions, lambda: icl(words), environment)


def nowhere_case(line: str) -> Case:
    """Return the case of a command line in a working folder that has been deleted."""
    case = command_case(line, "working folder", "no longer exists")

    def act() -> int:
        before = os.open(".", os.O_RDONLY)
        try:
            with contextlib.suppress(FileNotFoundError), tempfile.TemporaryDirectory() as folder:
                os.chdir(folder)
                os.rmdir(folder)  # noqa: PTH106 (a `Path` may look for the working folder)
            return case.act()
        finally:
            os.fchdir(before)
            os.close(before)

    return case._replace(label=f"in a deleted folder: {line}", act=act)
