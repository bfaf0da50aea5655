"""The frame of every analysis: find it by name, feed it checkpoints as populations, keep what is done.

`over_checkpoints` reads a run's saved steps one by one, skips those whose part is there already (`icl.analysis.parts`),
and hands the others over stacked, as many at a time as memory allows. Killed anywhere, the same call goes on from the
last finished population.
"""

import dataclasses
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pandas as pd
import torch
from tqdm import tqdm

from icl.analysis import ANALYSES, module_name
from icl.analysis.parts import Part, read_part, write_part
from icl.build import build_checkpoint_model, choose_device
from icl.checkpoints import Checkpoint, checkpoint_files, load_checkpoint_file, load_same_run, require_one_run
from icl.config import RunConfig
from icl.runs import RunFolder
from icl.stacked import Params, stack
from icl.validation import ConfigError

MEMBERS_AT_ONCE = 16
MAX_PARAMETERS_AT_ONCE = 2_000_000
"""Checkpoints in one population, and the parameters they may have in all."""


class Result(NamedTuple):
    """What an analysis hands back."""

    table: pd.DataFrame
    """Tidy: each row says which checkpoint and which settings it is of, where it is of one."""
    summary: list[str]
    """What to tell the person who asked, a line each; verdicts first."""


class Members(NamedTuple):
    """Some checkpoints of one run, stacked in the order of their steps."""

    config: RunConfig
    checkpoints: list[Checkpoint]
    params: Params
    """Their weights on the device, with a leading axis."""
    lead: int
    """1 if the first of them is here only as the second's predecessor, else 0."""


class Measurement(NamedTuple):
    """What was found at one checkpoint."""

    rows: list[dict[str, Any]]
    """Rows of the table, without step, hash and settings; values that JSON can hold, NaN included."""
    vectors: Mapping[str, Any] = MappingProxyType({})
    """Arrays that the whole run needs later."""


Measure = Callable[[Members], list[Measurement]]
"""One measurement for each member after the lead."""


def find(name: str) -> Any:
    """The module of an analysis, with `Settings` and `analyse`.

    Raises:
        ConfigError: If there is none of that name.
    """
    if name not in ANALYSES:
        raise ConfigError(f"There is no analysis `{name}`; there are {', '.join(ANALYSES)}.")
    return importlib.import_module(f"icl.analysis.{module_name(name)}")


def analyse(name: str, path: str | Path, **settings: Any) -> Result:
    """Run one analysis by name, as `icl analyse PATH --what NAME`; its settings are keywords.

    Raises:
        ConfigError: If there is no such analysis or setting.
        CheckpointError: If it needs checkpoints and there are none that can be used.
    """
    module = find(name)
    known = [field.name for field in dataclasses.fields(module.Settings)]
    unknown = set(settings) - set(known)
    if unknown:
        raise ConfigError(f"The analysis `{name}` has no setting `{min(unknown)}`; it has {', '.join(known)}.")
    result: Result = module.analyse(Path(path), module.Settings(**settings))
    return result


def over_checkpoints(
    name: str,
    path: Path,
    settings: Any,
    measure: Measure,
    *,
    version: int,
    uses_predecessor: bool = False,
    keep_vectors: bool = True,
    max_members: int | None = None,
    files: Sequence[Path] | None = None,
    bar: tqdm | None = None,
) -> tuple[list[Part], RunConfig]:
    """Measure every saved step of a run, or one checkpoint; those measured before are taken from their parts.

    Args:
        name: The analysis; parts go to `results/<name>/` of the run.
        path: A run's folder, its folder of checkpoints, or one checkpoint file (which leaves no part).
        settings: A dataclass of plain values; with other settings everything is done again.
        measure: The measurements of a population.
        version: Of the method; a new one means that old parts are done again.
        uses_predecessor: Whether a measurement looks at the checkpoint before it, too.
        keep_vectors: Whether to return the parts with their vectors; where all together do not fit in memory, leave
            them on disk and read them by `parts.stored_vector`.
        max_members: Of one population, where a measurement is so long that it should be kept more often.
        files: Of `checkpoint_files(path)` those to measure; left out, all.
        bar: Of several runs, to be moved on by this one's checkpoints; left out, it has its own.

    Returns:
        A part for every step, in order, and the run's configuration.

    Raises:
        CheckpointError: If there is no usable checkpoint, or the checkpoints are of different runs.
        StorageError: If a part cannot be written.
    """
    files = files or checkpoint_files(path)
    folder = None if path.is_file() else run_folder(path).results / name
    parts: list[Part] = []
    config = load_checkpoint_file(files[0]).config
    require_one_run(files)
    own = tqdm(total=len(files), desc=name, unit="checkpoint", disable=len(files) == 1 or bar is not None)
    with own:
        for stretch in _stretches(files, config, folder, settings, version, uses_predecessor, max_members):
            found = list(stretch.done)
            if stretch.pending:
                fresh = _measure(stretch, measure)
                for part, key in zip(fresh, stretch.keys, strict=True):
                    write_part(folder, part, key)
                found += fresh
            parts += found if keep_vectors else [part._replace(vectors={}) for part in found]
            (own if bar is None else bar).update(len(stretch.done) + len(stretch.pending))
    return parts, config


def as_table(parts: Sequence[Part], settings: Any, *, whole_run: Sequence[Mapping[str, Any]] = ()) -> pd.DataFrame:
    """One tidy table: step, checkpoint_hash, the rows' own columns, then a column for every setting.

    Args:
        parts: Of `over_checkpoints`.
        settings: The analysis's.
        whole_run: Rows that are of no single checkpoint, or have `step` and `checkpoint_hash` of their own.

    Raises:
        ValueError: If a setting and a column have the same name.
    """
    own = [{"step": part.step, "checkpoint_hash": part.digest, **row} for part in parts for row in part.rows]
    table = pd.DataFrame([*own, *whole_run])
    for key, value in dataclasses.asdict(settings).items():
        if key in table:
            raise ValueError(f"`{key}` is a setting and a column at once.")
        table[key] = value
    table["step"] = table["step"].astype("Int64")
    return table


def run_folder(path: Path) -> RunFolder:
    """The run that a folder belongs to: itself, or the parent of its `checkpoints`."""
    return RunFolder(path.parent if path.name == "checkpoints" else path)


class _Stretch(NamedTuple):
    """Neighbouring checkpoints: parts that are done, or checkpoints to be measured together after their lead."""

    done: list[Part]
    pending: list[Checkpoint]
    keys: list[dict[str, Any]]
    lead: Checkpoint | None


def _stretches(
    files: Sequence[Path],
    config: RunConfig,
    folder: Path | None,
    settings: Any,
    version: int,
    uses_predecessor: bool,
    max_members: int | None,
) -> Iterator[_Stretch]:
    before: Checkpoint | None = None
    waiting = _Stretch([], [], [], None)
    for file in files:
        checkpoint = load_same_run(file, config)
        lead = before if uses_predecessor else None
        key = {
            "checkpoint_hash": checkpoint.digest,
            "predecessor_hash": lead.digest if lead else None,
            "predecessor_step": lead.step if lead else None,
            "settings": dataclasses.asdict(settings),
            "version": version,
        }
        part = read_part(folder, checkpoint.step, key)
        is_full = len(waiting.pending) >= min(max_members or MEMBERS_AT_ONCE, _members_at_once(checkpoint.params))
        if waiting.pending and (part is not None or is_full):
            yield waiting
            waiting = _Stretch([], [], [], None)
        if part is not None:
            yield _Stretch([part], [], [], None)
        else:
            waiting = waiting._replace(lead=waiting.lead if waiting.pending else lead)
            waiting.pending.append(checkpoint)
            waiting.keys.append(key)
        before = checkpoint
    if waiting.pending:
        yield waiting


def _measure(stretch: _Stretch, measure: Measure) -> list[Part]:
    checkpoints = [*([stretch.lead] if stretch.lead else []), *stretch.pending]
    found = measure(_members(checkpoints, lead=len(checkpoints) - len(stretch.pending)))
    return [
        Part(checkpoint.step, checkpoint.digest, one.rows, dict(one.vectors))
        for checkpoint, one in zip(stretch.pending, found, strict=True)
    ]


def _members(checkpoints: list[Checkpoint], *, lead: int = 0) -> Members:
    """Checkpoints of one architecture on the device."""
    build_checkpoint_model(checkpoints[0])  # refuses weights that the configuration does not describe
    device = torch_device()
    stacked = stack([checkpoint.params for checkpoint in checkpoints])
    return Members(
        config=checkpoints[0].config,
        checkpoints=checkpoints,
        params={name: tensor.to(device) for name, tensor in stacked.items()},
        lead=lead,
    )


def _members_at_once(params: Params) -> int:
    count = sum(tensor.numel() for tensor in params.values())
    return max(1, min(MEMBERS_AT_ONCE, MAX_PARAMETERS_AT_ONCE // count))


def torch_device() -> torch.device:
    """The device for a little work: never a TPU's."""
    kind = choose_device()
    return torch.device("cpu" if kind == "tpu" else kind)  # an XLA device would compile for every shape
