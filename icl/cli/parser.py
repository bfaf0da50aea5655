"""The commands of `icl`: one module each, with `HELP` (a line for the overview) and `run(words) -> exit status`.

A command parses its words, calls one function of the library and says where its output is.
"""

import argparse
import difflib
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from icl.config.older import modern_setting
from icl.config.validation import ConfigError
from icl.files.reading import is_beyond_floats

_SENTENCES = (
    (r"argument (\S+): ((?:must|is) .+)", r"`\1` \2"),
    (r"argument (\S+): expected (?:one|at least one) argument", r"`\1` needs a value"),
    (r"argument (\S+): ignored explicit argument (.+)", r"`\1` takes no value, got \2"),
    (r"argument (\S+): not allowed with argument (\S+)", r"`\1` and `\2` cannot be given together"),
    (r"argument (\S+): invalid choice: (.+) \(choose from (.+)\)", r"`\1` must be one of \3, got \2"),
    (r"the following arguments are required: (.+)", r"give \1"),
)
"""Messages of argparse, and the sentences that we make of them."""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence: it names the nearest option, and says what a value must be."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for kind, reader in ((int, _whole_number), (float, _number), (Path, _path)):
            self.register("type", kind, reader)

    def error(self, message: str) -> NoReturn:
        """Refuse the words.

        Raises:
            ConfigError: Always.
        """
        for pattern, sentence in _SENTENCES:
            if match := re.fullmatch(pattern, message, re.DOTALL):
                message = match.expand(sentence)
                break
        raise ConfigError(f"{message[0].upper()}{message[1:]}. `{self.prog} --help` has an example.")

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


def _whole_number(text: str) -> int:
    if not re.fullmatch(r"\s*[+-]?\d[\d_]{0,29}\s*", text):
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}")
    return int(text)


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"must be a finite number, got {text!r}")
    if is_beyond_floats(text, number):
        raise argparse.ArgumentTypeError(f"is too small for a floating-point number, got {text!r}")
    return number


def _path(text: str) -> Path:
    """Return a path; pathlib takes the empty text for the working directory."""
    if not text.strip():
        raise argparse.ArgumentTypeError("must name a file or folder, got nothing")
    return Path(text)


def command_parser(command: str, description: str, example: str) -> argparse.ArgumentParser:
    """A parser whose help ends with an example."""
    return _Parser(
        prog=f"icl {command}",
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
