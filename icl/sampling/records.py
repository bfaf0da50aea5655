"""LLC estimates of a run, kept under the settings that made them, and the tables made of all of them.

An estimate is an entry (`icl.measure`) of `results/llc/<settings>/` in the run's folder. It has the row of `llc.csv`, the
rows per position, and the traces. `<settings>` is a hash of everything that decides the chains; the entry's key also names
the rules that judged them. So estimates under several settings stand in the tables as rows of their own, and several programs
may estimate the same run at once. Estimates that 0.1.0 kept as `.npz` stay in the tables; asked for, they are made again.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import pandas as pd
import torch

from icl.array_files import read_archive
from icl.config import SamplerConfig
from icl.file_system import lock_file
from icl.measure import Cache, Entry, Measurement
from icl.reading import ContentError, is_table
from icl.runs import RunFolder
from icl.sampling import verdict
from icl.sampling.result import LLCResult
from icl.validation import has_type, is_count

COLUMNS = (
    *("step", "checkpoint_hash", "llc", "stderr", "init_loss", "mean_loss"),
    *("nbeta", "localization", "lr", "num_samples"),
    *("num_chains", "num_chains_used", "num_draws", "num_burnin_steps", "rhat", "ess", "verdict", "reasons"),
)
"""The first columns of `llc.csv`."""
RENAMED_COLUMNS = {"heat": "bias_bound", "settled": "drop_at_mean", "settled_stderr": "drop_at_mean_stderr"}
"""Names of columns in version 0.1.0, and what they are now; readers accept both."""
_TEXTS = ("checkpoint_hash", "loss_name", "kernel", "minibatches", "mode", "settings", "verdict", "reasons")
"""The columns of a row that are text; all others are numbers."""
_POSITION_NUMBERS = ("step", "position", "llc", "stderr")
MAX_TRACE = 1000
"""Largest number of points kept of each chain's trace."""
VERSION = 3
"""Version of the method; estimates of another one are made again."""
_NOT_SAMPLED = ("steps", "memory")
"""Settings that do not change any chain."""


class Record(NamedTuple):
    """One estimate that is kept."""

    row: dict[str, Any]
    positions: list[dict[str, Any]]
    """LLC and standard error at each position, with step, hash and settings."""
    traces: np.ndarray
    """Minibatch losses (K, S), burn-in first, every `stride`-th move."""
    stride: int

    @property
    def measurement(self) -> Measurement:
        """The record as an entry keeps it: the estimate's row first, then the positions."""
        return Measurement([self.row | {"stride": self.stride}, *self.positions], {"traces": self.traces})


class Kind(NamedTuple):
    """Everything that decides an estimate beside the checkpoint."""

    sampler: SamplerConfig
    """With `nbeta` resolved."""
    mode: str = ""
    """A label for the rows, such as `published`."""
    rescale: float = 1.0
    """The factor of `icl.sampling.rescaling`; 1 is the checkpoint as it is."""

    @property
    def settings(self) -> dict[str, Any]:
        """The values by name."""
        fields = dataclasses.asdict(self.sampler)
        sampled = {name: value for name, value in fields.items() if name not in _NOT_SAMPLED}
        return sampled | {"mode": self.mode, "rescale": self.rescale, "version": VERSION}

    @property
    def name(self) -> str:
        """A short hash of the settings."""
        return hashlib.blake2b(json.dumps(self.settings, sort_keys=True).encode(), digest_size=4).hexdigest()

    @property
    def key(self) -> dict[str, Any]:
        """What an entry of this kind depends on beside the checkpoint."""
        return self.settings | {"rules": verdict.VERSION}

    def cache(self, run: RunFolder) -> Cache:
        """Return the place of a run's estimates of this kind."""
        return Cache(run.results / "llc" / self.name)


def make_record(result: LLCResult, kind: Kind) -> Record:
    """Return what is kept of an estimate."""
    sampler = kind.sampler
    row = result.row() | {
        "batch_size": sampler.batch_size,
        "minibatches": sampler.minibatches,
        "mode": kind.mode,
        "rescale": kind.rescale,
        "settings": kind.name,
    }
    row = {name: row[name] for name in COLUMNS} | row
    origin = {name: row[name] for name in ("step", "checkpoint_hash", "settings")}
    components = [] if result.llc_per_component is None else result.to_dataframe("component").to_dict("records")
    positions = [
        {**origin, "position": component["component"] + 1, "llc": component["llc"], "stderr": component["stderr"]}
        for component in components
    ]
    traces = torch.cat([result.burnin_trace[:, :: sampler.thinning], result.loss_trace], dim=1)
    stride = -(-traces.shape[1] // MAX_TRACE)
    return Record(row, positions, traces[:, ::stride].float().numpy(), stride * sampler.thinning)


def as_record(entry: Entry) -> Record:
    """Return the record that an entry keeps.

    Raises:
        ContentError: If its rows or traces are not those of a record.
    """
    row, *positions = entry.rows or [{}]
    stride = row.get("stride")
    record = Record(
        {RENAMED_COLUMNS.get(name, name): value for name, value in row.items() if name != "stride"},
        positions,
        entry.arrays.get("traces", np.zeros(0)),
        stride if is_count(stride) else 0,
    )
    if not _is_whole(record):
        raise ContentError("it is no estimate")
    return record


def write_tables(run: RunFolder) -> None:
    """Write the run's tables, made of every estimate that is kept.

    Raises:
        StorageError: If they cannot be written.
    """
    with _lock(run):
        records = read_all(run)
        run.write_result("llc.csv", as_table(records).to_csv(index=False))
        positions = pd.DataFrame([row for record in records for row in record.positions])
        run.write_result("llc-positions.csv", positions.to_csv(index=False))


def as_table(records: list[Record]) -> pd.DataFrame:
    """Return the rows of records as a table."""
    return pd.DataFrame([record.row for record in records])


def read_all(run: RunFolder) -> list[Record]:
    """Return every estimate of a run that is kept and can be read, by settings and step."""
    records: list[Record] = []
    for file in sorted((run.results / "llc").glob("*/step-*.*")):
        with contextlib.suppress(ContentError, LookupError, TypeError, ValueError, AttributeError):
            entry = _read_entry(file)
            record = None if entry is None else as_record(entry)
            if record is not None and (record.row["settings"], record.row["step"]) == (
                file.parent.name,
                _step_of(file),
            ):
                records.append(record)
    return records


def _read_entry(file: Path) -> Entry | None:
    if file.suffix == ".npz":
        about, arrays = read_archive(file)
        rows = [about["row"] | {"stride": about["stride"]}, *about["positions"]]
        return Entry(_step_of(file), about["row"]["checkpoint_hash"], rows, arrays)
    return Cache(file.parent).read(_step_of(file)) if file.suffix == ".json" else None


def _step_of(file: Path) -> int:
    return int(file.stem.removeprefix("step-"))


def _is_whole(record: Record) -> bool:
    """Return whether a record has the columns, the kinds of values and the shapes that `make_record` gives it."""
    row, positions, traces = record.row, record.positions, record.traces
    if not is_table([row, *positions]) or not {*COLUMNS, "settings"} <= set(row):
        return False
    tables = ((row, set(row).difference(_TEXTS)), *((position, _POSITION_NUMBERS) for position in positions))
    return (
        all(has_type(table.get(name), float | None) for table, names in tables for name in names)
        and all(isinstance(row.get(name), str) for name in _TEXTS)
        and row["verdict"] in get_args(verdict.Verdict)
        and is_count(row["step"])
        and record.stride > 0
        and traces.ndim == 2
        and traces.size > 0
        and traces.dtype.kind == "f"
    )


@contextlib.contextmanager
def _lock(run: RunFolder) -> Iterator[None]:
    """Let one program at a time make the tables, so that none leaves out what another has just kept."""
    with (run.path / ".llc-lock").open("a+") as file:
        lock_file(file.fileno(), run.path, wait=True)
        yield
