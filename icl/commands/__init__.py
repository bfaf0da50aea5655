"""The commands of `icl`: one module each, with `HELP` (a line for the overview) and `run(words) -> exit status`.

A command parses its words, calls one function of the library and says where its output is.
"""

import argparse
import difflib
from collections.abc import Iterable, Sequence
from typing import Any

from icl.checks import ConfigError
from icl.older import modern_setting


class _Parser(argparse.ArgumentParser):
    """One that names the option nearest to an unknown one."""

    def parse_args(  # type: ignore[override]  # of overloads
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """The options.

        Raises:
            ConfigError: For a word that is none.
        """
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            word = next((word for word in unknown if word.startswith("-")), unknown[0]).partition("=")[0]
            known = [option for action in self._actions for option in action.option_strings]
            older = modern_setting(word.lstrip("-")) if word.startswith("--") else None
            hint = nearest(word, known) or (f" {older}" if older else f" `{self.prog} --help` lists what it takes.")
            raise ConfigError(f"`{self.prog}` takes no `{word}`.{hint}")
        return options


def nearest(word: str, known: Iterable[str]) -> str:
    """A question whether the nearest known word was meant; nothing if none is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean `{near[0]}`?" if near else ""


def command_parser(command: str, description: str, example: str) -> argparse.ArgumentParser:
    """A parser whose help ends with an example."""
    return _Parser(
        prog=f"icl {command}",
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
