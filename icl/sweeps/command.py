"""Make the command and the environment of a point's program, by replacing the macros in the command of the sweep.

A point is one combination of the sweep's settings. The macros are W&B's: `${env}`, `${interpreter}`, `${program}`,
`${args}` and its variants, `${args_json}`, `${args_json_file}` and `${envvar:NAME}`. Like W&B, we replace `${envvar:NAME}`
anywhere, and other macros only if they are separate words. We differ from W&B in two ways:

- A macro that W&B would drop or pass on unchanged is an error.
- The macro `${interpreter}` stands for the Python that runs `icl sweep`, not for the `python` on the PATH. Likewise, the command
  `icl` starts the `icl` of this Python's environment.
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

from icl.config.validation import ConfigError
from icl.resolve import POINT_VARIABLE
from icl.runs.environment import COMMANDS, OWN_PROGRAM

DEFAULT_COMMAND = ("${env}", "${interpreter}", "${program}", "${args}")
"""The command that W&B runs for a sweep file that has a `program` but no `command`."""

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
    """Check that every macro of a command will be replaced.

    W&B drops a word that looks like an unknown macro. If a macro is only a part of a word, W&B passes the word on unchanged.

    Raises:
        ConfigError: If a macro would not be replaced. The message says what to write instead.
    """
    for word in command:
        if word in {f"${{{name}}}" for name in _MACROS}:
            continue
        remainder = _VARIABLE.sub("", word)
        names = re.findall(r"\$\{([^{}]*)\}", remainder)
        for name in names:
            if name.startswith("envvar:"):
                raise ConfigError(
                    f"`${{{name}}}` in the command must name a variable that has only capital letters, digits and _."
                )
            if name in _MACROS:
                raise ConfigError(
                    f"`{word}` in the command contains `${{{name}}}`, which is replaced only if it is a separate word. "
                    f"Write {_separate_words(word, name)}."
                )
        if remainder.startswith("${") and remainder.endswith("}"):
            nearest = difflib.get_close_matches(names[0] if names else remainder, _MACROS, n=1, cutoff=0.5)
            hint = f"Did you mean `${{{nearest[0]}}}`?" if nearest else "A variable is written `${envvar:NAME}`."
            raise ConfigError(f"There is no macro `{word}` for commands. {hint}")


def _separate_words(word: str, name: str) -> str:
    """Return advice on how to split a word that contains a macro, so that the macro is a separate word."""
    macro = f"${{{name}}}"
    before, _, after = word.partition(macro)
    if before.endswith("=") and before.startswith("-") and not after and name == "args_json_file":
        return f"`{before[:-1]}` and `{macro}` as two words"
    return f"`{macro}` as a separate word"


def fill_macros(
    command: Sequence[str], settings: Mapping[str, Any], *, program: str | None, json_file: str | Path
) -> list[str]:
    """Return the words that start the program of a point.

    Args:
        command: Words of the command, with macros.
        settings: Settings of the point, with nested groups as in the sweep file.
        program: Value of `${program}`.
        json_file: Value of `${args_json_file}`: the file with the settings as JSON.
    """
    values = _arguments(settings) | {
        "env": [_ENV],
        "interpreter": [sys.executable],
        "program": [program or ""],
        "args_json_file": [str(json_file)],
    }
    words: list[str] = []
    for word in command:
        word = _VARIABLE.sub(lambda match: os.environ.get(match[1], match[1]), word)
        words += values[word[2:-1]] if word.startswith("${") and word[2:-1] in values else [word]
    return words


def own_command(words: Sequence[str]) -> tuple[str, list[str]] | None:
    """Return `train` or `llc`, with the arguments, if the command is `icl train` or `icl llc`. Otherwise return None."""
    for index, (word, following) in enumerate(itertools.pairwise(words)):
        if Path(word).name == "icl" and following in ("train", "llc"):
            return following, list(words[index + 2 :])
    return None


def require_packable(command: Sequence[str]) -> None:
    """Check that one program of a sweep can train several points at once. The option `--pack` needs such a program.

    Only `icl train` can train several points at once. For this, the command must let it read the settings from a file.

    Raises:
        ConfigError: If the command is not `icl train`, or passes the settings as arguments.
    """
    takes_words = any(re.fullmatch(r"\$\{args.*\}", word) for word in command)
    parsed = own_command(command)
    if parsed is None or parsed[0] != "train" or takes_words:
        raise ConfigError(f"`--pack` needs {_OWN_COMMAND}, which reads its points from a file.")


def with_own_icl(words: Sequence[str]) -> list[str]:
    """Return a command in which the word `icl` starts the installation of `icl` that runs now.

    So the Python environment of this installation need not be activated. The words `python -m icl` are replaced too, because they would
    import modules from the working folder, which may contain other modules named `icl` or `yaml`.
    """
    start = 1 if words[:1] == [_ENV] else 0
    before, program = list(words[:start]), list(words[start:])
    if program[:1] == ["icl"]:
        return [*before, *OWN_PROGRAM, *program[1:]]
    options = list(itertools.takewhile(lambda word: re.fullmatch(r"-[bBEIOPqsuv]+", word), program[1:]))
    arguments = program[1 + len(options) :]
    if arguments[:2] == ["-m", "icl"] and _is_this_python(program[0]):
        return [*before, OWN_PROGRAM[0], *options, *OWN_PROGRAM[1:], *arguments[2:]]
    return list(words)


def _is_this_python(word: str) -> bool:
    """Return whether a word of the command starts the Python interpreter that runs `icl`."""
    path = shutil.which(word, path=_search_path())
    return word == sys.executable or (path is not None and Path(path).resolve() == Path(sys.executable).resolve())


def refuse_missing_program(command: Sequence[str], program: str | None, settings: Mapping[str, Any]) -> None:
    """Check that the program of a sweep exists, so that a dry run reports a missing program.

    Args:
        command: Words of the sweep's command, with macros.
        program: The sweep's `program`.
        settings: Settings of any point.

    Raises:
        ConfigError: If there is no such program. The message says what to write instead.
    """
    filled = fill_macros(command, settings, program=program, json_file=JSON_FILE_MACRO)
    typed = filled[1:] if filled[:1] == [_ENV] else filled
    words = with_own_icl(typed)
    if typed[:1] == ["icl"] and (len(typed) == 1 or typed[1].startswith("-")):
        raise ConfigError(f"`icl` in the command needs a subcommand; write {_OWN_COMMAND}.")
    if typed[:1] == ["icl"] and typed[1] not in COMMANDS:
        raise ConfigError(f"`icl` has no command `{typed[1]}`; write {_OWN_COMMAND}.")
    if not words or words[0].startswith("-") or "=" in words[0]:  # options or variables of `env` are not parsed
        return
    if shutil.which(words[0], path=_search_path()) is None:
        raise ConfigError(
            f"The command cannot be started: there is no program `{words[0]}` on this machine. "
            "Install this program, or correct `command`."
        )
    is_python = words[0] == sys.executable or re.fullmatch(r"python[\d.]*", words[0])
    script = _script(words[1:]) if is_python else None
    is_ours = script is not None and Path(script).name == "icl"
    if script is not None and (is_ours or not (Path(script).is_file() or (Path(script) / "__main__.py").is_file())):
        default = " (W&B's command for a file without `command`)" if tuple(command) == DEFAULT_COMMAND else ""
        hint = f" For `icl` write {_OWN_COMMAND}." if is_ours else ""
        raise ConfigError(
            f"The command cannot be started: `python {script}`{default} needs a script, but there is no such file in this folder.{hint}"
        )


def _script(words: Sequence[str]) -> str | None:
    """Return the script among the arguments of `python`, or None if Python runs a module, the code after `-c`, or its standard input."""
    remaining = list(words)
    while remaining and remaining[0].startswith("-"):
        option = remaining.pop(0)
        if option in ("-m", "-c", "-"):
            return None
        if option in ("-W", "-X"):  # options that take a value
            del remaining[:1]
    return remaining[0] if remaining else None


def child_environment(point_file: Path, root: Path, *, num_workers: int) -> dict[str, str]:
    """Return the environment variables of a point's program.

    `POINT_VARIABLE` contains the path of the point's file. `OMP_NUM_THREADS` limits the program to its share of the cores, unless the
    user has set this variable. Variables of a W&B sweep are removed, so that the program does not join that sweep.
    """
    environment = {key: value for key, value in os.environ.items() if key not in _SWEEP_VARIABLES}
    environment[POINT_VARIABLE] = str(point_file.resolve())
    environment["LOCAL_ROOT"] = str(root.resolve())
    environment["PATH"] = _search_path()
    environment.setdefault("OMP_NUM_THREADS", str(max(1, _num_cores() // num_workers)))
    environment.setdefault("PYTHONUNBUFFERED", "1")
    return environment


def _search_path() -> str:
    """Return the PATH for a point's program. It begins with the folder of the Python interpreter that runs `icl`."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def _arguments(settings: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the settings of a point as arguments, keyed by the name of W&B's macro. The outermost names are in alphabetical order."""
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
