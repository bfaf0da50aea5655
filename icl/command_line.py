"""Parser for all commands: options, and for some commands also the settings of a run.

A setting is written `--section.key VALUE` or `--section.key=VALUE`. A whole section can be given as a table, because W&B writes
nested parameters in this way: `--task={'num_tasks': 2}`. This module keeps the values of settings as strings. `icl.resolve` converts
them, together with the values from files.

The parsers of `icl train` and `icl llc` are in this module and not beside their commands. The reason is that sweep files contain
command lines of these two commands, and the code for sweeps parses them too.
"""

import argparse
import difflib
import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from icl.config import RunConfig, flatten
from icl.config.older import modern_setting
from icl.config.validation import ConfigError
from icl.config.values import SECTIONS, describe_type, known_keys, read_number, read_path, read_table, read_whole_number
from icl.resolve import refuse_unknown

_SENTENCES = (
    (r"argument (\S+): ((?:must|is) .+)", r"`\1` \2"),
    (r"argument (\S+): expected (?:one|at least one) argument", r"`\1` needs a value"),
    (r"argument (\S+): ignored explicit argument (.+)", r"`\1` takes no value, got \2"),
    (r"argument (\S+): not allowed with argument (\S+)", r"`\1` and `\2` cannot be given together"),
    (r"argument (\S+): invalid choice: (.+) \(choose from (.+)\)", r"`\1` must be one of \3, got \2"),
    (r"the following arguments are required: (.+)", r"give \1"),
)
"""Patterns of argparse's messages, each with the sentence that replaces the message."""


class CommandParser(argparse.ArgumentParser):
    """A parser with short error messages, which name the nearest option or say what a value must be.

    Args:
        command: The command, such as `train`.
        description: What the command does.
        examples: Examples of command lines, one per line.
        settings: Whether the command also takes the settings of a run.
        help_of: The section of settings that the help describes, or `all`. By default, the help describes no settings.
        options: Further arguments of argparse's parser.
    """

    def __init__(
        self,
        command: str,
        description: str,
        examples: str,
        *,
        settings: bool = False,
        help_of: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            prog=f"icl {command}",
            description=description,
            epilog="example:\n" + "\n".join(f"  {line.strip()}" for line in examples.splitlines()),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **options,
        )
        self.settings, self.help_of = settings, help_of
        for kind, reader in ((int, read_whole_number), (float, read_number), (Path, read_path)):
            self.register("type", kind, reader)

    def add(self, spelling: str, text: str, **options: Any) -> None:
        """Add an option with its help text.

        Args:
            spelling: The names of the option, followed by a word that stands for its value in the help text. `--out
                FILE` is an option with a value. `--num_prompts --n_prompts N` is an option with two names; the second
                name is an older one. `--force` has no value: it is true if the user gives it, and false otherwise.
                `path RUN` is a positional argument, which the help text calls RUN.
            text: The help text of the option.
            options: Further arguments for argparse's `add_argument`.
        """
        *names, last = spelling.split()
        if last.startswith("--"):
            self.add_argument(*names, last, help=text, **{"action": "store_true", **options})
        else:
            once: dict[str, Any] = {"action": _StoreOnce} if len(names) > 1 else {}
            self.add_argument(*names, metavar=last, help=text, **{**once, **options})

    def error(self, message: str) -> NoReturn:
        """Refuse the command line.

        Raises:
            ConfigError: Always.
        """
        for pattern, sentence in _SENTENCES:
            if match := re.fullmatch(pattern, message, re.DOTALL):
                message = match.expand(sentence)
                break
        raise ConfigError(f"{message[0].upper()}{message[1:]}. `{self.prog} --help` has an example.")

    def parse_args(  # type: ignore[override]  # the parent's method has overloads
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """Parse the options. The result's attribute `settings` is a dict of the run's settings as strings, keyed by dotted name.

        Raises:
            ConfigError: For a word that is neither an option nor a setting, or for a value that an option does not accept.
        """
        words = list(args or ())
        settings, words = split_settings(_join_steps(words)) if self.settings else ({}, words)
        options, unknown = self.parse_known_args(words, namespace)
        if unknown:
            self._refuse(next((word.partition("=")[0] for word in unknown if word.startswith("-")), unknown[0]))
        options.settings = settings
        return options

    def format_help(self) -> str:
        """Return the help of the options, followed by the help of the settings."""
        if self.help_of is None:
            return super().format_help()
        below = "defaults < preset" if self.help_of == "all" else "the run's own settings"
        layers = f"a later source overrides an earlier one: {below} < --config files in the given order < command line"
        return f"{super().format_help()}\nsettings ({layers}):\n\n{_describe_settings(self.help_of)}"

    def _refuse(self, word: str) -> NoReturn:
        """Refuse a word that is not an option, and name the nearest option."""
        known = [option for action in self._actions for option in action.option_strings]
        if self.settings:
            if not word.startswith("--"):
                raise ConfigError(f"Expected `--section.key VALUE`, got `{word}`.")
            near = difflib.get_close_matches(word[2:], [option.removeprefix("--") for option in known], n=1)
            if near:
                raise ConfigError(f"There is no option `{word}`. Did you mean `--{near[0]}`?")
            refuse_unknown([word[2:]])
        older = modern_setting(word.lstrip("-")) if word.startswith("--") else None
        hint = nearest(word, known) or (f" {older}" if older else f" `{self.prog} --help` lists its options.")
        raise ConfigError(f"`{self.prog}` takes no `{word}`.{hint}")


class _StoreOnce(argparse.Action):
    """Action that stores the value of an option, and refuses the option if it is given twice.

    If an option also has an older name, a user could give a value under each name. It would be unclear which value counts.
    """

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Store the value of an option, or report an error if the option already has a value."""
        if (earlier := getattr(namespace, self.dest)) is not None:
            parser.error(f"`{self.option_strings[0]}` is given twice: {earlier} and {values}")
        setattr(namespace, self.dest, values)


def split_settings(words: Iterable[str]) -> tuple[dict[str, Any], list[str]]:
    """Split a command line into the settings of a run and all other words. If a key is given twice, the later value counts.

    For a setting that is true or false, `--key` without a value means true.

    Returns:
        The settings, keyed by dotted name, and a list of all other words in order. Values are strings, but values from a table keep their
        types.

    Raises:
        ConfigError: For a setting without a value, or a section without a table.
    """
    settings: dict[str, Any] = {}
    others: list[str] = []
    kinds = known_keys()
    rest = list(words)
    while rest:
        word = rest.pop(0)
        key, equals, text = word[2:].partition("=")
        if word == "--":  # argparse would drop it
            refuse_unknown([key])
        if not word.startswith("--") or not (key in kinds or key in SECTIONS):
            others.append(word)
            continue
        if not equals and rest and not rest[0].startswith("--"):
            equals, text = "=", rest.pop(0)
        if key in SECTIONS:
            settings |= _read_section(key, text)
        elif not equals and kinds[key] is not bool:
            raise ConfigError(f"The option `--{key}` needs a value, {describe_type(kinds[key])}.")
        else:
            settings[key] = text if equals else "true"
    return settings, others


def nearest(word: str, known: Iterable[str]) -> str:
    """Return a question that suggests the nearest known word, or an empty string if no known word is similar."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean `{near[0]}`?" if near else ""


def _join_steps(words: Iterable[str]) -> list[str]:
    """Join several steps after `--steps` into one word: `--steps 1 2` becomes `--steps 1,2`."""
    joined: list[str] = []
    for word in words:
        follows_steps = joined[-2:-1] == ["--steps"] and not joined[-1].startswith("--")
        if follows_steps and re.fullmatch(r"[\d:,]+", word):
            joined[-1] += f",{word}"
        else:
            joined.append(word)
    return joined


def _read_section(section: str, text: str) -> dict[str, Any]:
    """Return the settings in a section's table."""
    table = read_table(text)
    if table is None and text.lstrip().startswith("{"):
        raise ConfigError(
            f"`{section}` is a section, and {text!r} cannot be read as a table of settings; write `--{section}.key VALUE`."
        )
    if table is None:
        refuse_unknown([section])
    settings = flatten({section: table})
    refuse_unknown(settings)
    return settings


def _describe_settings(section: str) -> str:
    """Return the types, defaults and descriptions of a section's settings, or of all settings."""
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(add_help=False)
    kind: Any = RunConfig if section == "all" else SECTIONS[section]
    parser.add_class_arguments(kind, None if section == "all" else section)
    text = parser.format_help().partition("\n\n")[2]
    return re.sub(r"  --\w+ CONFIG\s+Path to a configuration file\.\n", "", text)


def add_config_option(parser: CommandParser) -> None:
    """Add the option `--config FILE`, which may be given several times."""
    text = "read settings from FILE, such as the file that `icl llc --calibrate` writes; a later --config overrides an earlier one"
    parser.add("--config FILE", text, action="append", default=[])


@cache
def train_parser() -> CommandParser:
    """Return the parser of `icl train`."""
    parser = CommandParser(
        "train",
        "Train a run. The same command resumes an unfinished run, or says that the run is finished.\n"
        "Without arguments: the preset `quickstart`, about two minutes on two CPU cores.",
        """icl train
        icl train --task.num_tasks 8 --run_name eight-tasks
        icl train --preset L2H4 --model.double_residual --trainer.max_steps 20000 --optim.schedule_steps 500000
        icl train --config my-run.yaml --seeds.model 1
        icl train --population.seeds 0,1,2,3,4 --population.num_tasks 8,64,inf""",
        settings=True,
        help_of="all",
        usage="icl train [--preset NAME] [--config FILE ...] [--section.key VALUE ...]",
    )
    add_config_option(parser)
    return parser


@cache
def llc_parser() -> CommandParser:
    """Return the parser of `icl llc`. The parsed option `flags` lists which of --published, --calibrate and --self-test are given."""
    parser = CommandParser(
        "llc",
        """\
Estimate the local learning coefficient (LLC) at saved steps of a run, each with standard error, diagnostics and verdict.
Finished steps are stored. After an interruption, run the same command again to continue. RUN is a folder or a run's
name; without RUN, the command uses the run that `icl train` makes from the same settings. If every estimate is invalid,
the exit status is 1. In a sweep, the exit status is 0 even then, because an invalid estimate is a result too.""",
        """icl llc runs/quickstart
        icl llc runs/quickstart --steps last --sampler.num_draws 1000
        icl llc runs/quickstart --calibrate
        icl llc runs/quickstart --config runs/quickstart/results/llc-calibration.yaml
        icl llc runs/quickstart --steps last --components heads
        icl llc --self-test""",
        settings=True,
        help_of="sampler",
        usage="icl llc [RUN|CHECKPOINT] [--steps STEPS] [--sampler.key VALUE ...] [--config FILE] [--out FILE]\n"
        "       icl llc [RUN] --published | --calibrate | --rescale C | --components heads|layers\n       icl llc --self-test [--out FILE]",
    )
    parser.add("path RUN|CHECKPOINT", "a run's folder or name, or a checkpoint", nargs="?")
    parser.add(
        "--steps STEPS",
        "saved steps at which to estimate the LLC: all, last, a list (1,2,3 or 1 2 3) or a range (0:1000:100); default: the run's `sampler.steps`",
    )
    add_config_option(parser)
    parser.add("--out FILE", "also write the rows to FILE (.csv or .json)")
    parser.add(
        "--rescale C",
        "as a control, also estimate the LLC after multiplying some weights by C and dividing others by C, "
        "which leaves the model's function unchanged",
    )
    parser.add(
        "--stderr X",
        "run each checkpoint's chains until the standard error of the LLC is at most X, but for at most `sampler.num_draws` "
        "draws; if you do not set `sampler.num_draws`, the limit is ten times the preset's number of draws",
        type=read_number,
    )
    parser.add(
        "--components heads|layers",
        "estimate the refined LLC and the susceptibilities of each attention head or of each layer, while all other weights are fixed",
        choices=("heads", "layers"),
    )
    flags = {
        "published": "use the sampler settings of Hoogland et al. 2024, and say what the estimates measure",
        "calibrate": "choose lr, nbeta, localization and burn-in by a search over a few checkpoints (or over --steps); this takes some "
        "minutes on a CPU (the command first prints how many); after an interruption, run the same command again to continue",
        "self-test": "run the sampler on losses whose learning coefficient is known; takes about a minute and needs no run",
    }
    for flag, text in flags.items():
        parser.add(f"--{flag}", text, dest="flags", action="append_const", const=flag, default=[])
    return parser
