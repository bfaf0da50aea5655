"""Run an analysis by name, and measure many checkpoints of a run at once on the device.

`over_checkpoints` measures the saved steps that have no cached result (`icl.runs.measure`), many at a time.
"""

import dataclasses
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pandas as pd
import torch
from tqdm import tqdm

from icl.analysis import ANALYSES, module_name, name_for
from icl.build import build_checkpoint_model
from icl.compute.devices import choose_device
from icl.config import RunConfig
from icl.config.validation import ConfigError, UserError, require
from icl.model.stacked import Params, stack
from icl.progress import progress_bar
from icl.runs.checkpoints import (
    Checkpoint,
    CheckpointError,
    checkpoint_files,
    load_checkpoint_file,
    read_config_of,
)
from icl.runs.folder import run_of
from icl.runs.measure import Cache, Entry, Measurement, entry_rows, measure_checkpoints, require_one_run

MEMBERS_AT_ONCE = 16
"""Largest number of checkpoints whose weights are stacked and measured together."""
MAX_PARAMETERS_AT_ONCE = 2_000_000
"""Largest total number of parameters of checkpoints that are measured together. A single checkpoint may have more."""


_TEST_ROWS_VERSION = 2
"""Version of the test rows of language runs. Cached entries for older versions are measured again. Since version 2, reports and the
evaluation during training use different rows."""

Value = TypeVar("Value")


class Result(NamedTuple):
    """Result of an analysis."""

    table: pd.DataFrame
    """Tidy table. Every row contains the settings. A row about one checkpoint also contains its step and hash."""
    summary: list[str]
    """Lines to print, verdicts first."""


class Members(NamedTuple):
    """Checkpoints of one run that are measured together, in the order of their steps."""

    config: RunConfig
    checkpoints: list[Checkpoint]
    params: Params
    """Weights of all N checkpoints on the device, stacked along a leading axis."""
    lead: int
    """1 if the first checkpoint is included only as the predecessor of the second, else 0."""


Measure = Callable[[Members], list[Measurement]]
"""Function that returns one measurement for each checkpoint. It returns none for a checkpoint that is only a predecessor
(`Members.lead`)."""


def setting(default: Value, text: str) -> Value:
    """Return a field of an analysis's `Settings`, with its default value and the help text of its option."""
    return dataclasses.field(default=default, metadata={"help": text})


def find(name: str) -> Any:
    """Import the module of an analysis, which defines `Settings` and `analyse`.

    Raises:
        ConfigError: If there is no analysis of that name.
    """
    if name not in ANALYSES:
        raise ConfigError(f"There is no analysis `{name}`; choose one of {', '.join(ANALYSES)}.")
    return importlib.import_module(f"icl.analysis.{module_name(name)}")


def analyse(name: str, path: str | Path, **settings: Any) -> Result:
    """Run one analysis by name, as `icl analyse PATH --what NAME` does. Settings are given as keywords.

    Raises:
        ConfigError: If there is no such analysis or setting.
        CheckpointError: If the analysis needs checkpoints and no checkpoint is usable.
    """
    module = find(name := served_analysis(name, Path(path)))
    known = [field.name for field in dataclasses.fields(module.Settings)]
    unknown = set(settings) - set(known)
    if unknown:
        raise ConfigError(
            f"The analysis `{name}` has no setting `{min(unknown)}`; its settings are {', '.join(known)}."
        )
    result: Result = module.analyse(Path(path), module.Settings(**settings))
    return result


def served_analysis(name: str, path: Path) -> str:
    """Return the full name of an analysis for the run at a path (see `icl.analysis.name_for`).

    Raises:
        NotApplicableError: If the analysis is not available for runs of this family.
    """
    if name not in ANALYSES or ANALYSES[name].of != "run":
        return name
    family = family_of(path)
    return name if family is None else name_for(name, family)  # a missing run is reported by the analysis


def family_of(path: Path) -> str | None:
    """Return `model.family` of the run or the checkpoint at a path, or None if no configuration can be read there."""
    try:
        return read_config_of(checkpoint_files(path)[0]).model.family
    except (CheckpointError, OSError):  # a run may have tables without checkpoints
        pass
    try:
        return run_of(path).read_config().model.family
    except UserError:
        return None


def over_checkpoints(
    name: str,
    path: Path,
    settings: Any,
    measure: Measure,
    *,
    version: int,
    uses_predecessor: bool = False,
    keep_arrays: bool = True,
    max_members: int = MEMBERS_AT_ONCE,
    files: Sequence[Path] | None = None,
    bar: tqdm | None = None,
) -> tuple[list[Entry], RunConfig]:
    """Measure every saved step of a run, or one checkpoint. Steps with a cached result are not measured again.

    Args:
        name: Name of the analysis. Its entries are cached in `results/<name>/` of the run.
        path: A run's folder, its folder of checkpoints, or one checkpoint file (for which nothing is cached).
        settings: A dataclass of plain values. If they change, every step is measured again.
        measure: Function that measures several checkpoints together.
        version: Version of the method. Entries of another version are measured again.
        uses_predecessor: Whether the measurement of a checkpoint also uses the checkpoint before it.
        keep_arrays: Whether the returned entries contain their arrays. If all arrays together do not fit in memory,
            pass False and read them with `Cache.stored_array`.
        max_members: Largest number of checkpoints that are measured together. Choose a small number if one measurement takes long.
        files: Subset of `checkpoint_files(path)` to measure; None measures all.
        bar: Progress bar that several runs share; None makes a new bar for this run.

    Returns:
        An entry for every step, in order, and the run's configuration.

    Raises:
        CheckpointError: If there is no usable checkpoint, or the checkpoints belong to different runs.
        StorageError: If an entry cannot be written.
    """
    files = files or checkpoint_files(path)
    if path.is_dir():
        run_of(path).require_own_files()
    first = load_checkpoint_file(files[0])
    require_one_run(files)
    cache = None if path.is_file() else Cache(run_of(path).results / name)
    if first.config.model.is_language:
        version += 1000 * _TEST_ROWS_VERSION
    size = sum(tensor.numel() for tensor in first.params.values())
    batches = measure_checkpoints(
        files,
        first.config,
        lambda checkpoints, lead: measure(_members(checkpoints, lead)),
        cache=cache,
        settings=dataclasses.asdict(settings),
        version=version,
        max_members=max(1, min(max_members, MEMBERS_AT_ONCE, MAX_PARAMETERS_AT_ONCE // size)),
        uses_predecessor=uses_predecessor,
    )
    entries: list[Entry] = []
    with progress_bar(name, len(files), "checkpoint", disable=len(files) == 1 or bar is not None) as run_bar:
        for batch in batches:
            entries += batch.entries if keep_arrays else [entry._replace(arrays={}) for entry in batch.entries]
            (run_bar if bar is None else bar).update(len(batch.entries))
    return entries, first.config


def named_runs(path: Path, others: str | None) -> dict[str, Path]:
    """Return all runs, keyed by the names of their folders. Folders with the same name are keyed by their whole paths.

    Args:
        path: The run that is analysed.
        others: Other runs, separated by commas (the setting `jointly_with`). Names of runs may contain commas. A pattern such as
            `runs/ladder/*` stands for all runs that it matches, except the run that is analysed.

    Raises:
        CheckpointError: If a run has no checkpoints.
        ConfigError: If a run is named twice.
    """
    paths = [path, *_listed_runs(others or "", path)]
    is_unique = len({folder.resolve() for folder in paths}) == len(paths)
    require(is_unique, "`jointly_with` must not name a run twice, and must not name the run that is analysed.")
    for folder in paths:
        checkpoint_files(folder)  # raises an error for a missing run before work on the other runs begins
    names = [run_of(folder).path.resolve().name for folder in paths]
    return {name if names.count(name) == 1 else str(folder): folder for name, folder in zip(names, paths, strict=True)}


def _listed_runs(text: str, analysed: Path) -> Iterator[Path]:
    """Yield the runs in a comma-separated list.

    A name may itself contain commas. So we read the text from the left. Each run is the longest piece that is the name
    of a folder, or a pattern with matches.
    """
    words = [word.strip() for word in text.split(",")]
    while words:
        lengths = range(len(words), 0, -1)
        count = next((n for n in lengths if Path(",".join(words[:n])).exists() or _matches(",".join(words[:n]))), 1)
        name, words = ",".join(words[:count]), words[count:]
        if Path(name).exists() or not (found := _matches(name)):
            yield from [Path(name)] if name else []
        else:
            yield from (folder for folder in found if folder.resolve() != analysed.resolve())


def _matches(pattern: str) -> list[Path]:
    """Return the folders of runs that match a pattern with `*` in its last part, sorted."""
    place = Path(pattern)
    found = sorted(place.parent.glob(place.name)) if "*" in place.name else []
    return [folder for folder in found if (folder / "config.yaml").is_file()]


def as_table(entries: Sequence[Entry], settings: Any, *, whole_run: Sequence[Mapping[str, Any]] = ()) -> pd.DataFrame:
    """Return one tidy table: step, checkpoint_hash, the columns of the rows, then a column for every setting.

    Args:
        entries: Entries from `over_checkpoints`.
        settings: Settings of the analysis.
        whole_run: Additional rows. These rows describe the whole run, or contain their own `step` and `checkpoint_hash`.

    Raises:
        ValueError: If a setting and a column have the same name.
    """
    table = pd.DataFrame([*entry_rows(entries), *whole_run])
    for key, value in dataclasses.asdict(settings).items():
        if key in table:
            raise ValueError(f"`{key}` is the name of both a setting and a column.")
        table[key] = value
    table["step"] = table["step"].astype("Int64")
    return table


def _members(checkpoints: list[Checkpoint], lead: int) -> Members:
    """Stack checkpoints of one architecture on the device."""
    build_checkpoint_model(checkpoints[0])  # raises an error if the weights do not fit the configuration
    device = torch_device()
    stacked = stack([checkpoint.params for checkpoint in checkpoints])
    params = {name: tensor.to(device) for name, tensor in stacked.items()}
    return Members(checkpoints[0].config, checkpoints, params, lead)


def torch_device() -> torch.device:
    """Return the device for short computations. This is never a TPU, which would compile again for every shape."""
    kind = choose_device()
    return torch.device("cpu" if kind == "tpu" else kind)
