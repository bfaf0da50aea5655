"""A sweep's command: W&B's macros filled in for a point, and the environment that its program gets.

Macros, as W&B documents them: `${env}`, `${interpreter}`, `${program}`, `${args}` and its variants, `${args_json}`,
`${args_json_file}`, `${envvar:NAME}`. As W&B does, we fill in `${envvar:NAME}` anywhere, and the others where they are a word
of their own. Where we differ: what W&B would pass on unfilled, or drop, is refused; `${interpreter}` is the Python that runs
`icl sweep`, not whatever `python` is on the PATH, and `icl` is the one beside it.
"""

import difflib
import itertools
import json
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from icl.environment import COMMANDS, OWN_PROGRAM
from icl.resolve import OPTIONS, POINT_VARIABLE
from icl.validation import ConfigError

DEFAULT_COMMAND = ("${env}", "${interpreter}", "${program}", "${args}")
"""What W&B runs for a file that has a `program` and no `command`."""

JSON_FILE_MACRO = "${args_json_file}"
_OWN_COMMAND = '`command: ["${env}", icl, train]`'
_ENV = "/usr/bin/env"
_MACROS = (
    *("env", "interpreter", "program", "args", "args_no_equals", "args_no_hyphens", "args_no_boolean_flags"),
    *("args_append_hydra", "args_override_hydra", "args_json", "args_json_file"),
)
_VARIABLE = re.compile(r"\$\{envvar:([A-Z0-9_]*)\}")
_SWEEP_VARIABLES = ("WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH", "WANDB_RUN_ID")


def refuse_unused_macros(command: Sequence[str]) -> None:
    """Refuse a macro that W&B would not fill in: it drops a word that it takes for an unknown macro, and passes on the rest.

    Raises:
        ConfigError: Saying what to write instead.
    """
    for word in command:
        if word in {f"${{{name}}}" for name in _MACROS}:
            continue
        rest = _VARIABLE.sub("", word)
        names = re.findall(r"\$\{([^{}]*)\}", rest)
        for name in names:
            if name.startswith("envvar:"):
                raise ConfigError(
                    f"`${{{name}}}` in the command must name a variable in capital letters, digits and _."
                )
            if name in _MACROS:
                raise ConfigError(
                    f"`{word}` in the command holds `${{{name}}}`, which is filled in only where it is a word of its own; "
                    f"write {_apart(word, name)}."
                )
        if rest.startswith("${") and rest.endswith("}"):
            nearest = difflib.get_close_matches(names[0] if names else rest, _MACROS, n=1, cutoff=0.5)
            hint = f"Did you mean `${{{nearest[0]}}}`?" if nearest else "A variable is written `${envvar:NAME}`."
            raise ConfigError(f"A command has no macro `{word}`. {hint}")


def _apart(word: str, name: str) -> str:
    """How to write a word that holds a macro, as words of the command's list."""
    macro = f"${{{name}}}"
    before, _, after = word.partition(macro)
    if before.endswith("=") and before.startswith("-") and not after and name == "args_json_file":
        return f"`{before[:-1]}` and `{macro}` as two words"
    return f"`{macro}` as a word alone"


def fill_macros(
    command: Sequence[str], settings: Mapping[str, Any], *, program: str | None, json_file: str | Path
) -> list[str]:
    """The words that start a point's program.

    Args:
        command: The words with macros.
        settings: The point, by the outermost names of the sweep file.
        program: What stands for `${program}`.
        json_file: Where the point lies as JSON.
    """
    filled = _arguments(settings) | {
        "env": [_ENV],
        "interpreter": [sys.executable],
        "program": [program or ""],
        "args_json_file": [str(json_file)],
    }
    words: list[str] = []
    for word in command:
        word = _VARIABLE.sub(lambda match: os.environ.get(match[1], match[1]), word)
        words += filled[word[2:-1]] if word.startswith("${") and word[2:-1] in filled else [word]
    return words


def own_words(words: Sequence[str]) -> tuple[str, list[str]] | None:
    """`train` or `llc` and what follows it, if the command is `icl train` or `icl llc`, whose settings are a run's."""
    for place, (word, following) in enumerate(itertools.pairwise(words)):
        if Path(word).name == "icl" and following in OPTIONS:
            return following, list(words[place + 2 :])
    return None


def require_packable(command: Sequence[str]) -> None:
    """Refuse to pack points into a program that would not read them all: they reach `icl train` by a file only.

    Raises:
        ConfigError: If the command is another one, or takes its point from its words.
    """
    takes_words = any(re.fullmatch(r"\$\{args.*\}", word) for word in command)
    own = own_words(command)
    if own is None or own[0] != "train" or takes_words:
        raise ConfigError(f"`--pack` needs {_OWN_COMMAND}, which reads its points from a file.")


def with_own_icl(words: Sequence[str]) -> list[str]:
    """Return the command with `icl`, or this Python's `-m icl`, as the one of this environment, activated or not.

    `python -m icl` would import from the working folder, where `icl` or `yaml` may be a file of somebody else.
    """
    place = 1 if words[:1] == [_ENV] else 0
    before, own = list(words[:place]), list(words[place:])
    if own[:1] == ["icl"]:
        return [*before, *OWN_PROGRAM, *own[1:]]
    options = list(itertools.takewhile(lambda word: re.fullmatch(r"-[bBEIOPqsuv]+", word), own[1:]))
    rest = own[1 + len(options) :]
    if rest[:2] == ["-m", "icl"] and _is_this_python(own[0]):
        return [*before, OWN_PROGRAM[0], *options, *OWN_PROGRAM[1:], *rest[2:]]
    return list(words)


def _is_this_python(word: str) -> bool:
    found = shutil.which(word, path=_search_path())
    return word == sys.executable or (found is not None and Path(found).resolve() == Path(sys.executable).resolve())


def refuse_missing_program(command: Sequence[str], program: str | None, settings: Mapping[str, Any]) -> None:
    """Refuse a command whose program is not here, before a dry run promises to run it.

    Args:
        command: The sweep's, macros and all.
        program: The sweep's.
        settings: Those of any point.

    Raises:
        ConfigError: Saying what would be started, and what to write instead.
    """
    filled = fill_macros(command, settings, program=program, json_file=JSON_FILE_MACRO)
    typed = filled[1:] if filled[:1] == [_ENV] else filled
    words = with_own_icl(typed)
    if typed[:1] == ["icl"] and (len(typed) == 1 or typed[1].startswith("-")):
        raise ConfigError(f"`icl` in the command wants a command of its own; write {_OWN_COMMAND}.")
    if typed[:1] == ["icl"] and typed[1] not in COMMANDS:
        raise ConfigError(f"`icl` has no command `{typed[1]}`; write {_OWN_COMMAND}.")
    if not words or words[0].startswith("-") or "=" in words[0]:  # options and settings of `env`
        return
    if shutil.which(words[0], path=_search_path()) is None:
        raise ConfigError(f"The command cannot be started: there is no program `{words[0]}` here.")
    is_python = words[0] == sys.executable or re.fullmatch(r"python[\d.]*", words[0])
    script = _script(words[1:]) if is_python else None
    is_ours = script is not None and Path(script).name == "icl"
    if script is not None and (is_ours or not (Path(script).is_file() or (Path(script) / "__main__.py").is_file())):
        default = " (W&B's command for a file that has none)" if tuple(command) == DEFAULT_COMMAND else ""
        hint = f" For `icl` write {_OWN_COMMAND}." if is_ours else ""
        raise ConfigError(
            f"The command cannot be started: `python {script}`{default} wants a script, and there is none of that name here.{hint}"
        )


def _script(words: Sequence[str]) -> str | None:
    """The script among the words after `python`; None if it is told to run something else."""
    left = list(words)
    while left and left[0].startswith("-"):
        option = left.pop(0)
        if option in ("-m", "-c", "-"):
            return None
        if option in ("-W", "-X"):
            del left[:1]
    return left[0] if left else None


def child_environment(point_file: Path, root: Path, *, num_workers: int) -> dict[str, str]:
    """The environment of a point's program: where its point lies, its share of the cores, and no W&B sweep to join."""
    environment = {key: value for key, value in os.environ.items() if key not in _SWEEP_VARIABLES}
    environment[POINT_VARIABLE] = str(point_file.resolve())
    environment["LOCAL_ROOT"] = str(root.resolve())
    environment["PATH"] = _search_path()
    environment.setdefault("OMP_NUM_THREADS", str(max(1, _num_cores() // num_workers)))
    environment.setdefault("PYTHONUNBUFFERED", "1")
    return environment


def _search_path() -> str:
    """Where a point's program is looked for: beside this Python first."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def _arguments(settings: Mapping[str, Any]) -> dict[str, list[str]]:
    """W&B's spellings of a point as arguments: a word for each outermost name, in name order."""
    pairs = sorted(settings.items())
    return {
        "args": [f"--{key}={value}" for key, value in pairs],
        "args_no_equals": [word for key, value in pairs for word in (f"--{key}", str(value))],
        "args_no_hyphens": [f"{key}={value}" for key, value in pairs],
        "args_no_boolean_flags": [
            f"--{key}" if value is True else f"--{key}={value}" for key, value in pairs if value is not False
        ],
        "args_append_hydra": [f"+{key}={value}" for key, value in pairs],
        "args_override_hydra": [f"++{key}={value}" for key, value in pairs],
        "args_json": [json.dumps(dict(pairs))],
    }


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
