"""A sweep's command: W&B's macros filled in for a point, and the environment that its program gets.

Macros, as W&B documents them: `${env}`, `${interpreter}`, `${program}`, `${args}` and its variants, `${args_json}`,
`${args_json_file}`, `${envvar:NAME}`. Where we differ: `${interpreter}` is the Python that runs `icl sweep`, not whatever
`python` is on the PATH, and `icl` is the one beside it.
"""

import difflib
import itertools
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from icl.checks import ConfigError
from icl.resolve import OPTIONS, POINT_VARIABLE

DEFAULT_COMMAND = ("${env}", "${interpreter}", "${program}", "${args}")
"""What W&B runs for a file that has a `program` and no `command`."""

JSON_FILE_MACRO = "${args_json_file}"
_ENV = "/usr/bin/env"
_MACROS = (
    *("env", "interpreter", "program", "args", "args_no_equals", "args_no_hyphens", "args_no_boolean_flags"),
    *("args_append_hydra", "args_override_hydra", "args_json", "args_json_file"),
)
_VARIABLE = re.compile(r"\$\{envvar:([A-Z0-9_]*)\}")
_SWEEP_VARIABLES = ("WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH", "WANDB_RUN_ID")


def refuse_unknown_macros(command: Sequence[str]) -> None:
    """Refuse a macro that W&B does not have; W&B itself would drop the word.

    Raises:
        ConfigError: Naming the nearest.
    """
    for word in command:
        macro = re.fullmatch(r"\$\{(.*)\}", word)
        if macro and macro[1] not in _MACROS and not macro[1].startswith("envvar:"):
            nearest = difflib.get_close_matches(macro[1], _MACROS, n=1, cutoff=0.0)
            raise ConfigError(f"A command has no macro `{word}`. Did you mean `${{{nearest[0]}}}`?")


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
        raise ConfigError('`--pack` needs `command: ["${env}", icl, train]`, which reads its points from a file.')


def with_own_icl(words: Sequence[str]) -> list[str]:
    """The command with `icl` as the one of this environment, whether it is activated or not."""
    place = 1 if words[:1] == [_ENV] else 0
    if list(words[place : place + 1]) == ["icl"]:
        return [*words[:place], sys.executable, "-m", "icl", *words[place + 1 :]]
    return list(words)


def child_environment(point_file: Path, root: Path, *, num_workers: int) -> dict[str, str]:
    """The environment of a point's program: where its point lies, its share of the cores, and no W&B sweep to join."""
    environment = {key: value for key, value in os.environ.items() if key not in _SWEEP_VARIABLES}
    environment[POINT_VARIABLE] = str(point_file.resolve())
    environment["LOCAL_ROOT"] = str(root.resolve())
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])
    environment.setdefault("OMP_NUM_THREADS", str(max(1, _num_cores() // num_workers)))
    environment.setdefault("PYTHONUNBUFFERED", "1")
    return environment


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
