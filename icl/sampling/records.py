"""Estimates that are kept: one file for each checkpoint and settings, and the tables made of all of them.

`results/llc/<settings>/step-000001465.npz` of a run holds an estimate's row, its values per position and its traces, under
a key: the checkpoint's hash and everything that decides its chains. `<settings>` is a hash of the latter. An estimate
with another key, a damaged one, or one that older rules judged is made again; nothing is ever unpickled. `results/llc.csv` and
`results/llc-positions.csv` are made of all that is kept, whichever settings; so estimates under several settings
stand there as rows of their own, and several programs may estimate the same run at once.
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

from icl.array_files import read_arrays, write_arrays
from icl.config import SamplerConfig
from icl.file_system import lock_file
from icl.reading import ContentError, is_table
from icl.runs import RunFolder
from icl.sampling import verdict
from icl.sampling.result import LLCResult
from icl.validation import has_type, is_count

COLUMNS = (
    *(
        "step",
        "checkpoint_hash",
        "llc",
        "stderr",
        "init_loss",
        "mean_loss",
        "nbeta",
        "localization",
        "lr",
        "num_samples",
    ),
    *("num_chains", "num_chains_used", "num_draws", "num_burnin_steps", "rhat", "ess", "verdict", "reasons"),
)
"""How every row of `llc.csv` begins."""
RENAMED_COLUMNS = {"heat": "bias_bound", "settled": "drop_at_mean", "settled_stderr": "drop_at_mean_stderr"}
"""Names of columns in version 0.1.0, and what they are now; readers accept both."""
_TEXTS = ("checkpoint_hash", "loss_name", "kernel", "minibatches", "mode", "settings", "verdict", "reasons")
"""The columns of a row that are text; all others are numbers."""
_POSITION_NUMBERS = ("step", "position", "llc", "stderr")
MAX_TRACE = 1000
"""Points kept of each chain's trace."""
_VERSION = 3
"""Of the method; estimates of another one are made again."""
_NOT_SAMPLED = ("steps", "memory")
"""Settings that decide no chain."""


class Record(NamedTuple):
    """One kept estimate."""

    row: dict[str, Any]
    positions: list[dict[str, Any]]
    """LLC and standard error at each position, with step, hash and settings."""
    traces: np.ndarray
    """Minibatch losses (K, S), burn-in first, every `stride`-th move."""
    stride: int


class Kind(NamedTuple):
    """What decides an estimate beside the checkpoint."""

    sampler: SamplerConfig
    """With `nbeta` resolved."""
    mode: str = ""
    """A label for the rows, such as `published`."""
    rescale: float = 1.0
    """The factor of `icl.sampling.rescaling`; 1 is the checkpoint as it is."""

    @property
    def settings(self) -> dict[str, Any]:
        """By name."""
        fields = dataclasses.asdict(self.sampler)
        kept = {name: value for name, value in fields.items() if name not in _NOT_SAMPLED}
        return kept | {"mode": self.mode, "rescale": self.rescale, "version": _VERSION}

    @property
    def name(self) -> str:
        """A short hash of them."""
        return hashlib.blake2b(json.dumps(self.settings, sort_keys=True).encode(), digest_size=4).hexdigest()


def make_record(result: LLCResult, kind: Kind) -> Record:
    """What is kept of an estimate."""
    sampler = kind.sampler
    extra = {
        **{name: getattr(sampler, name) for name in ("batch_size", "minibatches")},
        "mode": kind.mode,
        "rescale": kind.rescale,
        "settings": kind.name,
    }
    row = result.row() | extra
    row = {name: row[name] for name in COLUMNS} | row
    place = {name: row[name] for name in ("step", "checkpoint_hash", "settings")}
    by_position = [] if result.llc_per_component is None else result.to_dataframe("component").to_dict("records")
    positions = [
        {**place, "position": one["component"] + 1, "llc": one["llc"], "stderr": one["stderr"]} for one in by_position
    ]
    burnin, losses = result.burnin_trace, result.loss_trace
    traces = torch.cat([burnin[:, :: sampler.thinning], losses], dim=1)
    stride = -(-traces.shape[1] // MAX_TRACE)
    return Record(row, positions, traces[:, ::stride].float().numpy(), stride * sampler.thinning)


def read_record(run: RunFolder | None, kind: Kind, step: int, checkpoint_hash: str) -> Record | None:
    """The estimate that is kept under this key, or None."""
    record = None if run is None else _read(_file(run, kind.name, step), kind.settings)
    return record if record is not None and record.row["checkpoint_hash"] == checkpoint_hash else None


def write_record(run: RunFolder | None, kind: Kind, record: Record) -> None:
    """Keep an estimate, atomically.

    Raises:
        StorageError: If it cannot be written.
    """
    if run is None:
        return
    about = {
        "settings": kind.settings,
        "rules": verdict.VERSION,
        "row": record.row,
        "positions": record.positions,
        "stride": record.stride,
    }
    write_arrays(_file(run, kind.name, record.row["step"]), about, {"traces": record.traces}, compress=True)


def write_tables(run: RunFolder | None) -> None:
    """Make the run's tables of all that is kept.

    Raises:
        StorageError: If they cannot be written.
    """
    if run is None:
        return
    with _lock(run):
        records = read_all(run)
        run.write_result("llc.csv", as_table(records).to_csv(index=False))
        positions = pd.DataFrame([row for record in records for row in record.positions])
        run.write_result("llc-positions.csv", positions.to_csv(index=False))


def as_table(records: list[Record]) -> pd.DataFrame:
    """The rows, by settings and step."""
    return pd.DataFrame([record.row for record in records])


def read_all(run: RunFolder) -> list[Record]:
    """Everything that is kept of a run and can be read, by settings and step."""
    files = sorted((run.results / "llc").glob("*/step-*.npz"))
    records = (_read(file, None) for file in files)
    return [record for record in records if record is not None]


def _read(file: Path, settings: dict[str, Any] | None) -> Record | None:
    """Return the estimate that a file holds, or None if it is damaged or was made under other settings or rules."""
    try:
        about, arrays = read_arrays(file, needs_digest=False)
        traces = arrays["traces"]
        wanted = (json.loads(json.dumps(settings)), verdict.VERSION)
        if settings is not None and (about["settings"], about.get("rules")) != wanted:
            return None
        row = {RENAMED_COLUMNS.get(name, name): value for name, value in about["row"].items()}
        record = Record(row, about["positions"], traces, about["stride"])
    except (ContentError, LookupError, TypeError, AttributeError):
        return None
    return record if _is_whole(record, file) else None


def _is_whole(record: Record, file: Path) -> bool:
    """Return whether a record has the columns, the kinds of values and the shapes that `make_record` gives it."""
    row, traces = record.row, record.traces
    if not is_table([row]) or not is_table(record.positions) or not set(COLUMNS) | {"settings"} <= set(row):
        return False
    tables = ((row, set(row).difference(_TEXTS)), *((one, _POSITION_NUMBERS) for one in record.positions))
    return (
        all(has_type(table.get(name), float | None) for table, names in tables for name in names)
        and all(isinstance(row.get(name), str) for name in _TEXTS)
        and row["verdict"] in get_args(verdict.Verdict)
        and is_count(row["step"])
        and (row["settings"], f"step-{row['step']:09d}.npz") == (file.parent.name, file.name)
        and is_count(record.stride)
        and record.stride > 0
        and traces.ndim == 2
        and traces.size > 0
        and traces.dtype.kind == "f"
    )


def _file(run: RunFolder, settings: str, step: int) -> Path:
    return run.results / "llc" / settings / f"step-{step:09d}.npz"


@contextlib.contextmanager
def _lock(run: RunFolder) -> Iterator[None]:
    """One program at a time makes the tables, so that none leaves out what another has just kept."""
    with (run.path / ".llc-lock").open("a+") as file:
        lock_file(file.fileno(), run.path, wait=True)
        yield
