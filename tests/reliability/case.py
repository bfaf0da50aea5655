"""One bad input, and what its message must mention."""

import re
import shlex
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from icl.cli import COMMANDS
from icl.cli import main as icl


class Case(NamedTuple):
    """A bad input and the words that its message must have."""

    group: str
    """The command, `none` for a word that is no command, or `api` for a Python function."""
    label: str
    mentions: tuple[str, ...]
    act: Callable[[], Any]
    """Returns the exit status; a Python function raises instead."""
    environment: Mapping[str, str] = {}


def command_case(line: str, *mentions: str) -> Case:
    """A case from a command line as a shell would read it, variables first: `LOCAL_ROOT=x runs`."""
    words = shlex.split(line)
    environment = {}
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0], re.DOTALL):
        name, _, value = words.pop(0).partition("=")
        environment[name] = value
    group = words[0] if words and words[0] in COMMANDS else "none"
    return Case(group, line, mentions, lambda: icl(words), environment)
