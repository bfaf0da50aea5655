"""Read W&B sweep files strictly. If W&B would ignore or guess at a part of the file, raise an error that says what to write instead.

The schema is W&B's: `method`, `parameters` (dotted names, nested `parameters:`, `value`, `values`, `min` and
`max`, a `distribution`), `command` or `program`, and `run_cap`. Keys that only W&B's server uses are accepted and
ignored.
"""

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from icl.config.validation import ConfigError, is_count, require
from icl.files.reading import MAX_YAML, ContentError, parse_yaml, read_bytes
from icl.sweeps.command import DEFAULT_COMMAND, refuse_unused_macros
from icl.sweeps.distributions import DISTRIBUTIONS, EXPONENTS, Parameter, extremes, grid_values, has_too_long_grid

_OWN_KEYS = ("method", "parameters", "command", "program", "run_cap")
_SERVER_KEYS = (
    *("apiVersion", "kind", "name", "description", "entity", "project", "controller", "metric", "metrics"),
    *("scheduler", "early_terminate", "job", "image_uri"),
)
_PARAMETER_KEYS = ("distribution", "parameters", "value", "values", "probabilities", "min", "max", "mu", "sigma", "q")


MAX_POINTS = 100_000
"""Largest number of points (combinations of settings) of a sweep. The number is limited because all points are checked before the first
point runs."""


class SweepFileError(ConfigError):
    """Raised if a sweep file cannot be used. The message names the faulty part and says what to write instead."""


@dataclass(frozen=True, kw_only=True)
class SweepFile:
    """A checked sweep file."""

    path: Path
    method: Literal["grid", "random"]
    parameters: tuple[Parameter, ...]
    """Parameters in W&B's order: sorted by name. A nested group is sorted by its own name, and its parameters are sorted within the
    group."""
    command: tuple[str, ...]
    """Words of the command that starts a run; macros are not replaced yet."""
    program: str | None = None
    run_cap: int | None = None
    """Largest number of points to run; None if the file sets no limit."""
    stops_early: bool = False
    """Whether the file has `early_terminate`. W&B stops bad runs of such a sweep, but `icl sweep` does not."""
    warnings: tuple[str, ...] = ()
    """Warnings about valid settings that are probably mistakes. W&B gives the same warnings."""


def read_sweep_file(path: str | Path) -> SweepFile:
    """Read and check a sweep file.

    Raises:
        SweepFileError: If the file cannot be read, violates W&B's schema, or uses a part of the schema that `icl sweep` does not
            support.
    """
    tree = _read_yaml(Path(path))
    try:
        return _read_tree(Path(path), tree)
    except ConfigError as error:
        raise SweepFileError(f"{path}: {error}") from None


def _read_yaml(path: Path) -> Mapping[Any, Any]:
    try:
        tree = parse_yaml(read_bytes(path, limit=MAX_YAML))
    except OSError as error:
        raise SweepFileError(f"The sweep file {path} cannot be read: {error.strerror}.") from None
    except ContentError as error:
        raise SweepFileError(f"The sweep file {path} cannot be used: {error}.") from None
    if not isinstance(tree, dict):
        raise SweepFileError(f"{path} is not a sweep file: it needs `method:` and `parameters:`.")
    return tree


def _read_tree(path: Path, tree: Mapping[Any, Any]) -> SweepFile:
    _refuse_unknown(tree, (*_OWN_KEYS, *_SERVER_KEYS), "A sweep file has no key")
    method, run_cap = _read_method(tree.get("method")), tree.get("run_cap")
    command, program = _read_command(tree.get("command"), tree.get("program"))
    parameters = tuple(_read_parameters(tree.get("parameters"), ()))
    for parameter in parameters if method == "grid" else ():
        _require_grid(parameter)
    is_cap = run_cap is None or (is_count(run_cap) and run_cap > 0)
    require(is_cap, f"`run_cap` must be a whole number from 1 to 2^63 - 1, got {run_cap!r}.")
    exponents = [parameter for parameter in parameters if parameter.distribution in EXPONENTS]
    return SweepFile(
        path=path,
        method=method,
        parameters=parameters,
        command=command,
        program=program,
        run_cap=run_cap,
        stops_early=bool(tree.get("early_terminate")),
        warnings=tuple(map(_warn_of_exponents, exponents)),
    )


def _require_grid(parameter: Parameter) -> None:
    """Check that a parameter has a list of values, and that the list is not too long."""
    if has_too_long_grid(parameter, MAX_POINTS):
        raise SweepFileError(
            f"`{parameter.name}` has more than {MAX_POINTS:,} values in a grid. List fewer `values`, or use `method: random`."
        )
    if grid_values(parameter) is None:
        raise SweepFileError(
            f"`{parameter.name}` has the distribution {parameter.distribution}, which has no grid. List its `values`, or use `method: random`."
        )


def _warn_of_exponents(parameter: Parameter) -> str:
    """Return W&B's own warning, followed by the range of values that the exponents give."""
    low, high = extremes(parameter)
    return (
        f"`{parameter.name}` uses {parameter.distribution}, where min/max specify base-e exponents. Use "
        f"{EXPONENTS[parameter.distribution]} to specify limit values. As written, values go from {low:.4g} to {high:.4g}."
    )


def _read_method(method: Any) -> Literal["grid", "random"]:
    if method == "grid" or method == "random":
        return method
    if method in ("bayes", "custom"):
        raise SweepFileError(
            f"`method: {method}` chooses each point from earlier results, which needs W&B's server. "
            "Run the sweep with `wandb sweep` and `wandb agent`, or use `method: random`."
        )
    raise SweepFileError(f"`method` must be grid or random (or bayes, under `wandb agent`), got {method!r}.")


def _read_command(command: Any, program: Any) -> tuple[tuple[str, ...], str | None]:
    if isinstance(command, str):
        raise SweepFileError(
            "`command` is a single string, which W&B silently ignores. Write a list of words, such as "
            '`command: ["${env}", icl, train]`.'
        )
    if command is not None and not isinstance(command, list):
        raise SweepFileError(f"`command` must be a list of words, got {command!r}.")
    if program is not None and not (isinstance(program, str) and program.strip() and "\0" not in program):
        raise SweepFileError(f"`program` must be a file name, got {program!r}.")
    for word in command or ():
        if not isinstance(word, (str, int, float)) or isinstance(word, bool) or "\0" in str(word):
            raise SweepFileError(f"`command` must be a list of words, but {word!r} is not a word; write it in quotes.")
    words = tuple(str(word) for word in command or DEFAULT_COMMAND)
    refuse_unused_macros(words)
    if program is None and "${program}" in words:
        raise SweepFileError(
            "`program` is missing, but the command contains `${program}`, as does W&B's default command. Add a `program`, or "
            'write a command without it, such as `command: ["${env}", icl, train]`.'
        )
    return words, program


def _read_parameters(tree: Any, outer: tuple[str, ...]) -> Iterable[Parameter]:
    """Yield the parameters of a group in the order of their names. A nested group is sorted by its own name."""
    if not isinstance(tree, dict) or not tree:
        where = f"`{'.'.join(outer)}.parameters`" if outer else "`parameters`"
        raise SweepFileError(f"{where} must be a table of at least one `key: {{values: [...]}}`, got {tree!r}.")
    for name in tree:
        is_name = isinstance(name, str) and re.fullmatch(r"[A-Za-z_][\w.-]*", name) is not None
        require(is_name, f"`{name}` is not a valid name for a parameter. Write a key such as `task.num_tasks`.")
    for name, entry in sorted(tree.items()):
        path = (*outer, name)
        if isinstance(entry, dict) and "parameters" in entry:
            _refuse_unknown(entry, ("parameters",), f"The group `{'.'.join(path)}` can have only `parameters`, not")
            yield from _read_parameters(entry["parameters"], path)
        else:
            yield _read_parameter(path, entry)


def _read_parameter(path: tuple[str, ...], entry: Any) -> Parameter:
    name = ".".join(path)
    if not isinstance(entry, dict):
        raise SweepFileError(f"`{name}` must be a table such as `{{value: 3}}` or `{{values: [1, 2]}}`, got {entry!r}.")
    kind = entry["distribution"] if "distribution" in entry else _infer_distribution(name, entry)
    if not isinstance(kind, str) or kind not in DISTRIBUTIONS:
        raise SweepFileError(f"`{name}`: W&B has no distribution {kind!r}.{_hint(kind, DISTRIBUTIONS)}")
    distribution = DISTRIBUTIONS[kind]
    allowed = ("distribution", *distribution.required, *distribution.defaults)
    _refuse_unknown(entry, allowed, f"`{name}` ({kind}) has no key")
    missing = [f"`{key}`" for key in distribution.required if key not in entry]
    require(not missing, f"`{name}` ({kind}) needs {' and '.join(missing)}.")
    options = {key: entry[key] for key in allowed[1:] if key in entry}
    _check_options(name, kind, options)
    parameter = Parameter(path=path, distribution=kind, options=distribution.defaults | options)
    try:
        if kind != "constant":
            extremes(parameter)
    except OverflowError:
        hint = f" Its bounds are exponents of e; {EXPONENTS[kind]} takes the values." if kind in EXPONENTS else ""
        raise SweepFileError(
            f"`{name}` ({kind}) has values that are too large for a number in floating point.{hint}"
        ) from None
    return parameter


def _infer_distribution(name: str, entry: Mapping[str, Any]) -> str:
    """Return the distribution that W&B assumes for a parameter that does not name a distribution."""
    _refuse_unknown(entry, _PARAMETER_KEYS, f"`{name}` has no key")
    if "value" in entry:
        return "constant"
    if "values" in entry:
        return "categorical_w_probabilities" if "probabilities" in entry else "categorical"
    if "min" in entry and "max" in entry:
        low, high = entry["min"], entry["max"]
        _require_numbers(name, {"min": low, "max": high})
        if isinstance(low, int) is not isinstance(high, int):
            raise SweepFileError(
                f"`{name}` goes from {low!r} to {high!r}, but only one of them is an integer. Add `distribution: uniform` or "
                "`int_uniform`."
            )
        return "int_uniform" if isinstance(low, int) else "uniform"
    raise SweepFileError(f"`{name}` needs one of these: `value`, `values`, both `min` and `max`, or a `distribution`.")


def _check_options(name: str, kind: str, options: Mapping[str, Any]) -> None:
    values = options.get("values", [None])
    is_list = isinstance(values, list) and len(values) > 0
    require(is_list, f"`{name}.values` must be a list of at least one value, got {values!r}.")
    _require_numbers(name, {key: options[key] for key in options if key not in ("value", "values", "probabilities")})
    if "min" in options:
        _check_bounds(name, kind, options["min"], options["max"])
    for key in options.keys() & {"q", "a", "b"}:
        require(options[key] > 0, f"`{name}.{key}` must be positive, got {options[key]!r}.")
    sigma = options.get("sigma", 0)
    require(sigma >= 0, f"`{name}.sigma` must be zero or positive, got {sigma!r}.")
    if "probabilities" in options:
        _check_probabilities(name, options["probabilities"], len(values))


def _check_bounds(name: str, kind: str, low: int | float, high: int | float) -> None:
    require(low < high, f"`{name}.min` must be below its `max`, got {low!r} and {high!r}.")
    require(low > 0 or not kind.endswith("_values"), f"`{name}.min` must be positive for {kind}, got {low!r}.")
    require(
        kind != "int_uniform" or (isinstance(low, int) and isinstance(high, int)),
        f"`{name}` is int_uniform, so `min` and `max` must be whole numbers, got {low!r} and {high!r}.",
    )


def _check_probabilities(name: str, probabilities: Any, num_values: int) -> None:
    are_numbers = isinstance(probabilities, list) and all(_is_number(share) and share >= 0 for share in probabilities)
    require(
        are_numbers and len(probabilities) == num_values and math.isclose(sum(probabilities), 1, abs_tol=1e-6),
        f"`{name}.probabilities` must be {num_values} numbers, one for each of `values`, that sum to 1, got {probabilities!r}.",
    )


def _require_numbers(name: str, options: Mapping[str, Any]) -> None:
    for key, value in options.items():
        if not _is_number(value):
            hint = " YAML reads 1e-5 as a string; write 1.0e-5." if isinstance(value, str) else ""
            raise SweepFileError(f"`{name}.{key}` must be a finite number, got {value!r}.{hint}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _refuse_unknown(keys: Iterable[Any], known: Sequence[str], message: str) -> None:
    for key in keys:
        if key not in known:
            raise SweepFileError(f"{message} `{key}`.{_hint(key, known)}")


def _hint(word: Any, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.5)
    return f" Did you mean `{nearest[0]}`?" if nearest else f" Choose one of {', '.join(known)}."
