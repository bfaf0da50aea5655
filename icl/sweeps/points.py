"""The points of a sweep. A point is one combination of settings, with the resulting configuration and the name of its run.

The settings of all points are checked before any point runs. If a point has invalid settings, only this point fails and the other
points run, as under `wandb agent`.

A grid is the product of the values in W&B's order, where the last parameter changes fastest. Point i of a random sweep
depends only on the sweep file, the seed and i. The name of a point depends only on its configuration, so the point is the same run
under `icl sweep` and under `wandb agent`.
"""

import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from icl.command_line import llc_parser, train_parser
from icl.config import RunConfig, config_differences, flatten, is_free_on_resume
from icl.config.validation import ConfigError, UserError
from icl.resolve import read_config_file, refuse_conflicts, refuse_twice_set, resolve
from icl.run_names import run_name, sampler_name
from icl.runs.folder import RunFolder, local_root
from icl.sweeps.command import JSON_FILE_MACRO, fill_macros, own_command
from icl.sweeps.distributions import Parameter, draw, grid_values
from icl.sweeps.schema import MAX_POINTS, SweepFile, SweepFileError
from icl.training.refusals import require_learning, require_monitor

Settings = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Point:
    """A point of a sweep whose settings are valid."""

    number: int
    """The point's position in the sweep, counted from 1."""
    settings: Settings
    """Settings that the sweep chooses, with nested groups as in the sweep file."""
    config: RunConfig
    name: str
    """Name of the run, which is also its folder below $LOCAL_ROOT."""
    job: str
    """Hash of the command and of the settings that affect the result. Attempts with a different hash are ignored when we check whether the
    point is done or has failed."""
    trains: bool
    """Whether the program is `icl train`. In this case, the status of the run says whether the point is done."""


@dataclass(frozen=True, kw_only=True)
class InvalidPoint:
    """A point whose settings are invalid."""

    number: int
    """The point's position in the sweep, counted from 1."""
    name: str
    """The point's number, followed by the values of the settings that differ between points."""
    reason: str
    """Message that says why the point cannot run."""


def sweep_points(
    sweep: SweepFile, *, count: int | None = None, seed: int = 0, invalid: list[InvalidPoint] | None = None
) -> list[Point]:
    """Return the valid points of a sweep. In a random sweep, a draw that repeats an earlier draw is left out.

    Args:
        sweep: The sweep file.
        count: Largest number of points. If the sweep has more, only its first points are returned.
        seed: Seed of a random sweep.
        invalid: List to which invalid points are added. If `invalid` is None, an invalid point raises an error.

    Raises:
        SweepFileError: If no point is valid, two points of a grid are the same run, or a random sweep has no limit on its
            number of points.
    """
    caps = [cap for cap in (count, sweep.run_cap) if cap is not None]
    if sweep.method == "random" and not caps:
        raise SweepFileError(f"{sweep.path}: this random sweep has no end. Add a `run_cap`, or use --count N.")
    chosen = _grid(sweep) if sweep.method == "grid" else _random(sweep, seed)
    if sweep.method == "grid":
        caps.append(math.prod(len(grid_values(parameter) or []) for parameter in sweep.parameters))
    if min(caps) > MAX_POINTS:
        raise SweepFileError(
            f"{sweep.path}: the sweep has {min(caps):,} points, but at most {MAX_POINTS:,} can be run. Remove some points, or use "
            "--count N to run only the first N."
        )
    points: dict[str, Point] = {}
    refused: list[InvalidPoint] = []
    for number, settings in enumerate(itertools.islice(chosen, min(caps)), start=1):
        try:
            point = _resolve_point(sweep, number, settings)
        except ConfigError as error:
            refused.append(InvalidPoint(number=number, name=_name(sweep, number, settings), reason=str(error)))
            continue
        twin = points.setdefault(point.name, point)
        if twin is not point and (sweep.method == "grid" or twin.job != point.job):
            raise SweepFileError(
                f"{sweep.path}: points {twin.number} and {number} would both be the run `{point.name}`. "
                "Remove the repeated value, or the `run_name` that they share."
            )
    _refuse_nested(sweep, points)
    if refused and (invalid is None or not points):
        raise SweepFileError(f"{sweep.path}: {refused[0].name}: {refused[0].reason}")
    if invalid is not None:
        invalid += refused
    return list(points.values())


def _refuse_nested(sweep: SweepFile, points: Mapping[str, Point]) -> None:
    """Check that no run would lie inside the folder of another run."""
    for name, point in points.items():
        outer = next((points[str(path)] for path in PurePosixPath(name).parents if str(path) in points), None)
        if outer is not None and outer.trains and point.trains:
            raise SweepFileError(
                f"{sweep.path}: the run `{name}` of point {point.number} would lie inside the run `{outer.name}` of point "
                f"{outer.number}. Give one of them another `run_name`."
            )


def _grid(sweep: SweepFile) -> Iterator[Settings]:
    values = [grid_values(parameter) or [] for parameter in sweep.parameters]
    for chosen in itertools.product(*values):
        yield _settings(zip(sweep.parameters, chosen, strict=True))


def _random(sweep: SweepFile, seed: int) -> Iterator[Settings]:
    for index in itertools.count():
        yield _settings((parameter, draw(parameter, seed=seed, index=index)) for parameter in sweep.parameters)


def _settings(chosen: Iterable[tuple[Parameter, Any]]) -> Settings:
    """Return the settings of a point in the form that W&B gives to a program: dotted names stay as they are, and nested groups become dicts."""
    settings: Settings = {}
    for parameter, value in chosen:
        group = settings
        for name in parameter.path[:-1]:
            group = group.setdefault(name, {})
        group[parameter.path[-1]] = value
    return settings


def _resolve_point(sweep: SweepFile, number: int, settings: Settings) -> Point:
    words = fill_macros(sweep.command, settings, program=sweep.program, json_file=JSON_FILE_MACRO)
    command, arguments = own_command(words) or (None, [])
    refuse_twice_set(settings)
    config = resolve(settings) if command is None else _own_config(command, arguments, settings)
    if command == "train" and not _is_done(config):
        require_learning(config)
        require_monitor(config)
    if config.population:
        raise ConfigError("A point is one run. Remove `population`; `--pack` trains several points together.")
    return Point(
        number=number,
        settings=settings,
        config=config,
        name=run_name(config) if command != "llc" else f"{run_name(config)}/llc/{sampler_name(config)}",
        job=_job(sweep, config, samples=command == "llc"),
        trains=command == "train",
    )


def _is_done(config: RunConfig) -> bool:
    """Return whether the run is done. The settings of a done run are not checked again, because an older version may have allowed them."""
    run = RunFolder(local_root() / run_name(config))
    status = run.read_status()
    try:
        return status is not None and status.is_done and not config_differences(run.read_config(), config)
    except UserError:
        return False


def _name(sweep: SweepFile, number: int, settings: Settings) -> str:
    """Return the number of a point, with the values of the settings that differ between points."""
    changing = {parameter.name for parameter in sweep.parameters if parameter.distribution != "constant"}
    values = ", ".join(f"{key}={value}" for key, value in flatten(settings).items() if key in changing)
    return f"point {number}{f' ({values})' if values else ''}"


def _own_config(command: str, arguments: list[str], settings: Mapping[str, Any]) -> RunConfig:
    """Return the configuration of `icl train` or `icl llc`, from the arguments of the command and the point."""
    if {"-h", "--help"} & set(arguments):
        raise ConfigError("The command of the sweep only prints a help text; leave out `--help`.")
    options = (train_parser() if command == "train" else llc_parser()).parse_args(arguments)
    given = options.settings
    if command == "llc" and options.steps is not None:
        given["sampler.steps"] = options.steps
    layers = [settings if file == JSON_FILE_MACRO else read_config_file(file) for file in options.config]
    config = resolve(*layers, settings, given)
    refuse_conflicts(settings, given)
    return config


def _job(sweep: SweepFile, config: RunConfig, *, samples: bool) -> str:
    relevant = {
        key: value
        for key, value in flatten(config.to_dict()).items()
        if key != "run_name" and (not is_free_on_resume(key) or (samples and key.startswith("sampler.")))
    }
    text = json.dumps([sweep.command, sweep.program, relevant], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
