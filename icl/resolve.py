"""One `RunConfig` from several sources: defaults < preset < file < sweep < command line, in one strict parse.

An unknown key is an error that names the nearest one; a value of the wrong type is one sentence. `jsonargparse` checks
the types and prints the help; what people write (`inf`, `None`, `1e-5`, `10_000`) is read here before it sees it.
"""

import dataclasses
import difflib
import functools
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from icl.config import RunConfig, flatten
from icl.config.literals import read_table
from icl.config.older import modern_setting
from icl.config.validation import ConfigError, parse_num_tasks, require_run_name, require_steps
from icl.files.reading import MAX_BITS, MAX_YAML, ContentError, is_beyond_floats, is_number, parse_yaml, read_bytes
from icl.presets import preset

if TYPE_CHECKING:
    import jsonargparse

OPTIONS = {"train": ("config",), "llc": ("config", "out", "steps", "rescale")}
"""Options with a value that a command takes beside the settings of a run."""
FLAGS = {"train": (), "llc": ("published", "calibrate", "self-test")}
"""Options without a value."""
POINT_VARIABLE = "ICL_SWEEP_POINT"
"""The environment variable by which `icl sweep` hands a point to the program that it starts."""
_REPEATED = ("config",)
"""Options that may be given several times: their values are a list, in order."""
_SET_FOR_EACH = {
    "population.seeds": ("seeds.model", "seeds.data", "seeds.noise"),
    "population.num_tasks": ("task.num_tasks",),
}
_NONE = ("none", "null", "~")
_TYPE_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def known_keys() -> dict[str, Any]:
    """Every dotted key with its declared type, such as `optim.lr: float`."""
    keys: dict[str, Any] = {}
    for field in dataclasses.fields(RunConfig):
        if dataclasses.is_dataclass(field.type):
            keys |= {f"{field.name}.{leaf.name}": leaf.type for leaf in dataclasses.fields(field.type)}
        else:
            keys[field.name] = field.type
    return keys


def _sections() -> set[str]:
    return {field.name for field in dataclasses.fields(RunConfig) if dataclasses.is_dataclass(field.type)}


def resolve(*sources: Mapping[str, Any]) -> RunConfig:
    """One checked config from layers of settings, the later over the earlier.

    Args:
        sources: Nested or dotted settings; a `preset` in any of them (the last wins) is the ground under all.

    Raises:
        ConfigError: For an unknown key, a value of the wrong type, or settings that contradict each other.
    """
    layers = [flatten(dict(source)) for source in sources]
    for layer in layers:
        _refuse_unknown(layer, known_keys())
    given = {key: value for layer in layers for key, value in layer.items()}
    name = str(given.get("preset", RunConfig().preset))
    merged = flatten(preset(name).to_dict()) | given
    return _validated({key: _read_value(key, value) for key, value in merged.items()})


def read_config_file(path: str | Path) -> dict[str, Any]:
    """The settings in a YAML or JSON file.

    Raises:
        ConfigError: If the file is missing, is not YAML, or is not a table of settings.
    """
    return _require_table(_read_yaml(path), path)


def read_config_files(options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The settings of every `--config` file, in order, each as a layer of its own for `resolve`.

    Args:
        options: What `read_arguments` returned; `config` is the list of files, if there are any.

    Raises:
        ConfigError: As `read_config_file`.
    """
    return [read_config_file(path) for path in options.get("config", ())]


def read_points(environment: Mapping[str, str] = os.environ) -> list[dict[str, Any]]:
    """The settings of a sweep's point, or of several packed into this program, from the file that `$ICL_SWEEP_POINT` names.

    Returns:
        One table of settings per point; outside a sweep one that is empty.

    Raises:
        ConfigError: If the file is missing or holds no settings.
    """
    path = environment.get(POINT_VARIABLE)
    content = _read_yaml(path) if path else {}
    return (
        [_require_table(one, path) for one in content] if isinstance(content, list) else [_require_table(content, path)]
    )


def refuse_conflicts(swept: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse a command line that sets a swept key to another value.

    Raises:
        ConfigError: Naming the key and both values.
    """
    for key, value in flatten(dict(swept)).items():
        if key in given and _read_value(key, given[key]) != _read_value(key, value):
            raise ConfigError(
                f"`{key}` is swept (here {value!r}) and the command line sets it to {given[key]!r}; remove one of the two."
            )


def refuse_overridden(*sources: Mapping[str, Any]) -> None:
    """Refuse a setting that a population sets for each member, where the population's own source or a later one sets it.

    An earlier source gives way, as everywhere: a file, such as a run's own config.yaml, to a population on the command line.

    Args:
        sources: As `resolve` takes them, and has accepted.

    Raises:
        ConfigError: Naming both settings and their values.
    """
    layers = [flatten(dict(source)) for source in sources]
    for key, names in _SET_FOR_EACH.items():
        own = max((index for index, layer in enumerate(layers) if key in layer), default=len(layers))
        values: list[Any] = (_read_value(key, layers[own][key]) if own < len(layers) else None) or []
        for layer in layers[own:] if values else ():
            for name in names:
                if name in layer and [_read_value(name, layer[name])] != values:
                    raise ConfigError(
                        f"`{name}` is set to {layer[name]!r}, but `{key}` sets it for each member "
                        f"({', '.join(map(str, values))}); remove one of the two."
                    )


class Words(typing.NamedTuple):
    """A command line, taken apart."""

    path: str | None
    """The word that is no option."""
    flags: frozenset[str]
    settings: dict[str, Any]
    """Flat: settings of a run, and the command's own options."""


def read_words(command: str, arguments: Sequence[str]) -> Words:
    """The words after `icl train` or `icl llc`; several steps after `--steps` are one list.

    Raises:
        ConfigError: For a second word that is no option, an option without value, or an unknown key.
    """
    paths: list[str] = []
    flags: set[str] = set()
    rest: list[str] = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            paths.append(word)
        elif word[2:] in FLAGS[command]:
            flags.add(word[2:])
        elif word[2:] not in OPTIONS[command] and (flag := difflib.get_close_matches(word[2:], FLAGS[command], n=1)):
            raise ConfigError(f"There is no option `{word}`. Did you mean `--{flag[0]}`?")
        elif "=" in word or not words or words[0].startswith("--"):
            rest.append(word)
        else:
            value = words.pop(0)
            while word == "--steps" and words and re.fullmatch(r"[\d:,]+", words[0]):
                value += f",{words.pop(0)}"
            rest += [word, value]
    if len(paths) > (0 if command == "train" else 1):
        raise ConfigError(f"Expected `--section.key VALUE`, got `{paths[-1]}`.")
    return Words(paths[0] if paths else None, frozenset(flags), read_arguments(rest, extra=OPTIONS[command]))


def read_arguments(arguments: Sequence[str], *, extra: Sequence[str] = ()) -> dict[str, Any]:
    """Return `--section.key VALUE` and `--section.key=VALUE` as a flat dict; the later of two values of a key wins.

    A bare boolean `--key` means true. A section takes a table, as W&B writes nested parameters: `--task={'num_tasks': 2}`.
    The value of `--config`, which may be given several times, is the list of its files.

    Args:
        arguments: The words of the command line.
        extra: Options of the command itself, beside the settings of a run.

    Raises:
        ConfigError: For a word that is no option, an option without value, or an unknown key.
    """
    settings: dict[str, Any] = {}
    words = list(arguments)
    kinds = known_keys() | dict.fromkeys(extra, str)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise ConfigError(f"Expected `--section.key VALUE`, got `{word}`.")
        key, equals, value = word[2:].partition("=")
        text = value if equals else words[0] if words else ""
        table = read_table(text) if key in _sections() else None
        if table is None and key in _sections() and text.lstrip().startswith("{"):
            raise ConfigError(
                f"`{key}` is a section, and {text!r} cannot be read as a table of settings; write `--{key}.key VALUE`."
            )
        if table is not None:
            _refuse_unknown(flatten({key: table}), kinds)
            settings |= flatten({key: table})
            words = words if equals else words[1:]
            continue
        _refuse_unknown([key], kinds)
        if not equals:
            if words and not words[0].startswith("--"):
                value = words.pop(0)
            elif kinds[key] is bool:
                value = "true"
            else:
                raise ConfigError(f"The option `--{key}` needs a value, {describe(kinds[key])}.")
        if key in _REPEATED:
            settings.setdefault(key, []).append(value)
        else:
            settings[key] = value
    return settings


def parse_scalar(text: str) -> Any:
    """A number, truth value or None from the way people, YAML 1.1 and W&B write it; other text stays text.

    So does a number that a float cannot hold, such as 1e400, which would become infinite.
    """
    word = text.strip()
    lowered = word.lower()
    if lowered in _NONE:
        return None
    if lowered in ("true", "false"):
        return lowered == "true"
    if re.fullmatch(r"[+-]?\d[\d_]*", word):
        return int(word.replace("_", "")) if len(word) < 1000 else text
    if re.fullmatch(r"[+-]?\.?(inf|infinity|nan)", lowered):
        return float(lowered.replace(".", ""))
    try:
        number = float(word.replace("_", ""))
    except ValueError:
        return text
    return text if is_beyond_floats(word, number) else number


def describe(kind: Any) -> str:
    """A declared type in words, such as `a whole number or none`."""
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(str(choice) for choice in typing.get_args(kind))
    if _is_list(kind):
        return "a list such as 0,1,2, or none"
    if isinstance(kind, types.UnionType):
        return " or ".join("none" if part is types.NoneType else describe(part) for part in kind.__args__)
    return _TYPE_WORDS.get(kind, getattr(kind, "__name__", str(kind)))


def _read_yaml(path: str | Path) -> Any:
    if not str(path).strip():
        raise ConfigError("`--config` must name a file, got nothing.")
    try:
        return parse_yaml(read_bytes(Path(path), limit=MAX_YAML))
    except OSError as error:
        raise ConfigError(f"The config file {path} cannot be read: {error.strerror}.") from None
    except ContentError as error:
        raise ConfigError(f"The config file {path} cannot be used: {error}.") from None


def _require_table(tree: Any, path: str | Path | None) -> dict[str, Any]:
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"The config file {path} must hold `section: {{key: value}}`, got {type(tree).__name__}.")
    refuse_twice_set(tree)
    return tree


def refuse_twice_set(settings: Mapping[str, Any]) -> None:
    """Refuse a key that is set by its dotted name and within a table; which of the two won would be chance.

    Raises:
        ConfigError: Naming the key.
    """
    seen: set[str] = set()
    for name, value in settings.items():
        for key in flatten({name: value}):
            if key in seen:
                raise ConfigError(f"`{key}` is set twice, by a dotted name and within a table; keep one of the two.")
            seen.add(key)


def settings_parser(section: str | None = None, **options: Any) -> "jsonargparse.ArgumentParser":
    """The parser of the whole tree, or of a section: its types, defaults and one-line descriptions."""
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(exit_on_error=False, allow_abbrev=False, **options)
    kinds = {field.name: field.type for field in dataclasses.fields(RunConfig)}
    parser.add_class_arguments(RunConfig if section is None else kinds[section], section)
    return parser


@functools.cache
def _validator() -> "jsonargparse.ArgumentParser":
    return settings_parser()


def _validated(flat: Mapping[str, Any]) -> RunConfig:
    import jsonargparse

    try:
        return RunConfig.from_dict(_validator().parse_object(_nest(flat)).as_dict())
    except jsonargparse.ArgumentError as error:
        named = re.search(r'key "([\w.]+)"', str(error))
        key = named[1] if named else ""
        if key not in flat:
            raise ConfigError(f"The settings cannot be used: {' '.join(str(error).split())}.") from None
        raise ConfigError(f"`{key}` must be {describe(known_keys()[key])}, got {flat[key]!r}.") from None


def _read_value(key: str, value: Any) -> Any:
    """A value as its declared type would have it written: numbers from text, and text from numbers."""
    if key == "task.num_tasks":
        return parse_num_tasks(value)
    kind = known_keys()[key]
    if _is_list(kind):
        return _read_list(key, value)
    if key == "sampler.steps":
        return _read_steps(value)
    parts = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    is_text = any(part is str or typing.get_origin(part) is Literal for part in parts)
    if isinstance(value, bool) and "true" in typing.get_args(kind):  # a choice of words that YAML has truth values for
        return str(value).lower()
    if isinstance(value, str):
        if key == "run_name":
            require_run_name("~" if value == "~" else "name")  # a shell's home folder, which YAML takes for null
        if not is_text or (types.NoneType in parts and value.strip().lower() in _NONE):
            value = _read_scalar(key, value, parts)
    elif is_text and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, int) and value.bit_length() > MAX_BITS:  # too large for a float, and for messages
        raise ConfigError(f"`{key}` is too large: a whole number of {value.bit_length():,} bits.")
    return int(value) if int in parts and isinstance(value, float) and value.is_integer() else value


def _read_scalar(key: str, text: str, parts: Sequence[Any]) -> Any:
    """A number, truth value or None from text.

    What is no number where one is wanted is refused here; only 0x10 and its kin go on, to a parser of YAML that would read
    1:30 as 90.
    """
    value = parse_scalar(text)
    if isinstance(value, str) and is_number(text):
        raise ConfigError(f"`{key}` is too large or too small for a floating-point number, got {text.strip()}.")
    is_other = isinstance(value, str) and not re.fullmatch(r"[+-]?0[xb][0-9a-f_]+", value.strip().lower())
    if is_other and (int in parts or float in parts):
        raise ConfigError(f"`{key}` must be {describe(known_keys()[key])}, got {text!r}.")
    return value


def _read_steps(value: Any) -> Any:
    """Saved steps as text: `all`, 1,2,3 or 0:1000:100; YAML also has them as a number, or as a list of numbers."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if isinstance(value, list) and all(isinstance(one, int) and not isinstance(one, bool) for one in value):
        value = ",".join(map(str, value))
    require_steps(value)
    return value


def _is_list(kind: Any) -> bool:
    return any(typing.get_origin(part) is tuple for part in typing.get_args(kind))


def _read_list(key: str, value: Any) -> list[Any] | None:
    """`0,1,2`, `[0, 1, 2]`, a YAML list, or one value alone."""
    given = value
    if isinstance(value, str):
        text = value.strip()
        if (text[:1], text[-1:]) in (("[", "]"), ("(", ")")):
            text = text[1:-1]
        words = [word.strip() for word in text.removesuffix(",").split(",")]
        value = (
            None
            if len(words) == 1 and words[0].lower() in _NONE
            else [*filter(None, words)]
            if len(words) == 1
            else words
        )
    if value is None:
        return None
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    if key == "population.num_tasks":
        return [parse_num_tasks(one) for one in values]
    numbers = [parse_scalar(one) if isinstance(one, str) else one for one in values]
    if any(isinstance(number, str) for number in numbers):
        raise ConfigError(f"`{key}` must be {describe(known_keys()[key])}, got {given!r}.")
    return numbers


def _refuse_unknown(settings: Iterable[Any], keys: Mapping[str, Any]) -> None:
    for given in settings:
        if given in keys:
            continue
        key = " ".join(str(given).split())  # YAML has keys that are not text
        if any(known.startswith(f"{key}.") for known in keys):
            raise ConfigError(f"`{key}` is a section; write `{key}: {{key: value}}` or `--{key}.key VALUE`.")
        raise ConfigError(f"There is no setting `{key}`. {_suggestion(key, keys)}")


def _suggestion(key: str, keys: Mapping[str, Any]) -> str:
    """Return what to write in place of an unknown key: its modern name, else the nearest key, else where to look."""
    section, _, leaf = key.rpartition(".")
    leaves = {known.rpartition(".")[2]: known for known in reversed(list(keys))}  # the first section of a name counts
    older = modern_setting(leaf)
    if section not in _sections():
        if older is not None:
            return older
        if leaf in leaves:
            return f"Did you mean `{leaves[leaf]}`?"
    nearest = difflib.get_close_matches(key, keys, n=1, cutoff=0.6)
    near_leaf = difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.6)
    suggestion = nearest[0] if nearest else leaves[near_leaf[0]] if near_leaf else None
    if suggestion is not None:
        return f"Did you mean `{suggestion}`?"
    return older or "`icl train --help` lists the keys."


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        section, _, leaf = key.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[leaf] = value
    return tree
