"""Merge settings from several sources into one `RunConfig`: defaults < preset < file < sweep < command line.

An unknown key raises an error that names the nearest key. A value of the wrong type is refused too (`icl.config.values`).
"""

import difflib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from icl.config import RunConfig, flatten
from icl.config.older import modern_setting
from icl.config.validation import ConfigError
from icl.config.values import SECTIONS, known_keys, read_value
from icl.files.reading import MAX_YAML, ContentError, parse_yaml, read_bytes
from icl.presets import preset

POINT_VARIABLE = "ICL_SWEEP_POINT"
"""Environment variable with the name of a file. In this file, `icl sweep` passes the settings of one or more points of
the sweep to the program that it starts. A point is one combination of swept settings."""
_SET_FOR_EACH = {
    "population.seeds": ("seeds.model", "seeds.data", "seeds.noise"),
    "population.num_tasks": ("task.num_tasks",),
}
"""For each setting of a population, the settings that it determines in each member."""


def resolve(*sources: Mapping[str, Any]) -> RunConfig:
    """Merge sources of settings into one validated configuration. A later source overrides an earlier one.

    Args:
        sources: Nested or dotted settings. Any source may name a `preset`. The preset that is named last is the base of all sources.

    Raises:
        ConfigError: For an unknown key, a value of the wrong type, or settings that contradict each other.
    """
    given: dict[str, Any] = {}
    for source in sources:
        layer = flatten(dict(source))
        refuse_unknown(layer)
        given |= layer
    name = str(given.get("preset", RunConfig().preset))
    tree: dict[str, Any] = {section: {} for section in SECTIONS}
    for key, value in (flatten(preset(name).to_dict()) | given).items():
        section, _, leaf = key.rpartition(".")
        (tree[section] if section else tree)[leaf] = read_value(key, value)
    return RunConfig.from_dict(tree)


def read_config_file(path: str | Path) -> dict[str, Any]:
    """Return the settings in a YAML or JSON file.

    Raises:
        ConfigError: If the file is missing, is not YAML, or does not contain a table of settings.
    """
    return _require_table(_read_yaml(path), path)


def read_points(environment: Mapping[str, str] = os.environ) -> list[dict[str, Any]]:
    """Read the settings of the sweep points that this program has to run, from the file that `$ICL_SWEEP_POINT` names.

    Returns:
        A list with one table of settings per point. Outside a sweep, the list contains one empty table.

    Raises:
        ConfigError: If the file is missing or has no settings.
    """
    path = environment.get(POINT_VARIABLE)
    content = _read_yaml(path) if path else {}
    return [_require_table(point, path) for point in (content if isinstance(content, list) else [content])]


def refuse_conflicts(swept: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse a command line that sets a swept key to a value other than the sweep's value.

    Raises:
        ConfigError: If there is such a key. The message names the key and both values.
    """
    for key, value in flatten(dict(swept)).items():
        if key in given and read_value(key, given[key]) != read_value(key, value):
            raise ConfigError(
                f"`{key}` is swept ({value!r} at this point), but the command line sets it to {given[key]!r}; remove one of the two."
            )


def refuse_overridden(*sources: Mapping[str, Any]) -> None:
    """Refuse a setting that has no effect, because a setting of the population determines its value for each member.

    For example, `population.seeds` determines `seeds.model`. The source that sets `population.seeds`, and every later source, must not
    set `seeds.model`, unless `population.seeds` contains only this value. A value in an earlier source is overridden: for example, a
    population on the command line overrides a run's config.yaml.

    Args:
        sources: Sources of settings that `resolve` has accepted.

    Raises:
        ConfigError: If there is such a setting. The message names both settings and their values.
    """
    layers = [flatten(dict(source)) for source in sources]
    for key, member_keys in _SET_FOR_EACH.items():
        last = max((index for index, layer in enumerate(layers) if key in layer), default=None)
        values = [] if last is None else read_value(key, layers[last][key]) or []
        for layer in layers[last:] if values else ():
            for member_key in member_keys:
                if member_key in layer and [read_value(member_key, layer[member_key])] != values:
                    raise ConfigError(
                        f"`{member_key}` is set to {layer[member_key]!r}, but `{key}` sets it for each member "
                        f"({', '.join(map(str, values))}); remove one of the two."
                    )


def refuse_twice_set(settings: Mapping[str, Any]) -> None:
    """Refuse a key that is set both by its dotted name and within a table, because it is unclear which value counts.

    Raises:
        ConfigError: If there is such a key. The message names the key.
    """
    seen: set[str] = set()
    for name, value in settings.items():
        for key in flatten({name: value}):
            if key in seen:
                raise ConfigError(f"`{key}` is set twice, by a dotted name and within a table; keep one of the two.")
            seen.add(key)


def refuse_unknown(keys: Iterable[Any]) -> None:
    """Refuse a dotted key that is not a setting.

    Raises:
        ConfigError: If there is such a key. The message names the key, and the setting that was probably meant.
    """
    known = known_keys()
    for key in keys:
        if key not in known:
            text = " ".join(str(key).split())  # a key in YAML need not be a string
            if text in SECTIONS:
                raise ConfigError(f"`{text}` is a section; write `{text}: {{key: value}}` or `--{text}.key VALUE`.")
            raise ConfigError(f"There is no setting `{text}`. {_suggestion(text, known)}")


def _suggestion(key: str, known: Mapping[str, Any]) -> str:
    """Return a hint for an unknown key: the present name of an older key, the nearest key, or the command that lists the keys."""
    section, _, leaf = key.rpartition(".")
    leaves = {
        name.rpartition(".")[2]: name for name in reversed(list(known))
    }  # if several sections have a setting of the same name, the first section counts
    older = modern_setting(leaf)
    if section not in SECTIONS:
        if older is not None:
            return older
        if leaf in leaves:
            return f"Did you mean `{leaves[leaf]}`?"
    near = difflib.get_close_matches(key, known, n=1)
    near += [leaves[match] for match in difflib.get_close_matches(leaf, leaves, n=1)]
    if near:
        return f"Did you mean `{near[0]}`?"
    return older or "`icl train --help` lists the keys."


def _read_yaml(path: str | Path) -> Any:
    if not str(path).strip():
        raise ConfigError("`--config` must name a file, got an empty name.")
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
        raise ConfigError(f"The config file {path} must contain `section: {{key: value}}`, got {type(tree).__name__}.")
    refuse_twice_set(tree)
    return tree
