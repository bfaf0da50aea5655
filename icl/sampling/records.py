"""Stored LLC estimates of a run, and the tables that are made from them.

An estimate is an entry (`icl.runs.measure`) in the folder `results/llc/<settings>/` of the run. The entry contains the row of `llc.csv`, a
row for each position, and the traces. `<settings>` is a hash of everything that determines the chains. So the tables have separate rows for
different settings, and several programs may estimate LLCs of the same run at once.

Each entry is stored under a key. The key consists of the settings of the estimate, the hash of the checkpoint, and the
version of the rules that decide the verdict (`icl.sampling.verdict.VERSION`). If any part of the key has changed, `icl
llc` does not use the stored estimate, and estimates the LLC again. Estimates that version 0.1.0 stored as `.npz` files
stay in the tables until new estimates replace them.
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

from icl.config import SamplerConfig
from icl.config.validation import has_type, is_count
from icl.files.arrays import read_archive
from icl.files.reading import ContentError, is_table
from icl.files.system import lock_file
from icl.runs.folder import RunFolder
from icl.runs.measure import Cache, Entry, Measurement
from icl.sampling import verdict
from icl.sampling.prompt_loss import PARTS
from icl.sampling.published import llc_with_initial_loss_bug
from icl.sampling.result import LLCResult
from icl.sampling.susceptibility import susceptibility

COLUMNS = (
    *("step", "checkpoint_hash", "llc", "stderr", "init_loss", "mean_loss"),
    *("nbeta", "localization", "lr", "num_samples"),
    *("num_chains", "num_chains_used", "num_draws", "num_burnin_steps", "rhat", "ess", "verdict", "reasons"),
)
"""The first columns of `llc.csv`."""
RENAMED_COLUMNS = {"heat": "bias_bound", "settled": "drop_at_mean", "settled_stderr": "drop_at_mean_stderr"}
"""Current names of columns, keyed by their names in version 0.1.0. The current and the older names can be read."""
_TEXTS = (
    *("checkpoint_hash", "loss_name", "kernel", "minibatches", "mode", "component", "settings", "verdict", "reasons"),
)
"""Columns of a row that contain text. All other columns contain numbers."""
_POSITION_NUMBERS = ("step", "position", "llc", "stderr")
COMPONENT_TABLE, SUSCEPTIBILITY_TABLE = "llc-components.csv", "llc-susceptibilities.csv"
PARTS_NAME = "parts"
"""Name of the observable that records the losses on each part of the data (`prompt_loss.losses_by_part`)."""
WITH_BUG = "llc_with_initial_loss_bug"
"""Column with the LLC that the published code for language models would compute, including the bug of that code.
Only estimates of language models in the published mode have this column."""
MAX_TRACE = 1000
"""Largest number of stored points of each chain's trace."""
VERSION = 3
"""Version of the estimation method. A stored estimate of another version is computed again."""
_TRIVIAL_PREDICTORS = {"cross_entropy": "the uniform distribution", "nll": "N(0, E[y²])"}
_NOT_SAMPLED = ("steps", "memory")
"""Settings that do not change any chain."""


class Record(NamedTuple):
    """One stored estimate."""

    row: dict[str, Any]
    positions: list[dict[str, Any]]
    """LLC and standard error at each position, with step, hash and settings."""
    traces: np.ndarray
    """Minibatch losses (K, S), burn-in first, every `stride`-th move."""
    stride: int
    """Number of moves from one stored point of a trace to the next."""
    excess: np.ndarray
    """Excess nbeta (L(w) - L(w0)) on the draw's minibatch, in nats, at draws that are `stride` moves apart (K, S). Empty for estimates of
    older versions, which did not store the excess."""
    susceptibilities: np.ndarray
    """A component's susceptibilities to the Q losses of `prompt_loss.losses_by_part`, and their standard errors (2, Q). Empty for the whole
    model."""

    @property
    def measurement(self) -> Measurement:
        """Content of the entry that stores this record. The estimate's row comes first, then the rows for the positions."""
        arrays = {"traces": self.traces, "excess": self.excess}
        if self.susceptibilities.size:
            arrays["susceptibilities"] = self.susceptibilities
        return Measurement([self.row | {"stride": self.stride}, *self.positions], arrays)


class EstimateSettings(NamedTuple):
    """Everything that determines an estimate, except for the checkpoint."""

    sampler: SamplerConfig
    mode: str = ""
    """A label for the rows, such as `published`."""
    rescale: float = 1.0
    """The factor of `icl.sampling.rescaling`; 1 leaves the checkpoint unchanged."""
    component: str = ""
    """The component of the model that the chains move (`icl.sampling.components`); empty for the whole model."""

    @property
    def values(self) -> dict[str, Any]:
        """The settings, keyed by name."""
        fields = dataclasses.asdict(self.sampler)
        sampled = {name: value for name, value in fields.items() if name not in _NOT_SAMPLED}
        if self.sampler.kernel != "baoab":
            del sampled["friction"]
        if self.sampler.target_stderr is None:
            del sampled["target_stderr"]  # so that the settings of older versions keep their hash
        if self.component:
            sampled["component"] = self.component
        sampled["nbeta"] = self.sampler.inverse_temperature  # so that equal chains have equal settings
        return sampled | {"mode": self.mode, "rescale": self.rescale, "version": VERSION}

    @property
    def digest(self) -> str:
        """A short hash of the settings."""
        return hashlib.blake2b(json.dumps(self.values, sort_keys=True).encode(), digest_size=4).hexdigest()

    @property
    def key(self) -> dict[str, Any]:
        """The settings and the version of the verdict's rules. An estimate is stored under these and under the checkpoint's hash."""
        return self.values | {"rules": verdict.VERSION}

    def cache(self, run: RunFolder) -> Cache:
        """Return the cache of a run's estimates under these settings."""
        return Cache(run.results / "llc" / self.digest)


def trivial_predictor(loss_name: object) -> str:
    """Return what the trivial predictor of a loss predicts. `loss_name` is the name of the loss in `llc.csv`.

    Examples:
        >>> trivial_predictor("mse"), trivial_predictor("cross_entropy")
        ('zero', 'the uniform distribution')
    """
    return next((text for name, text in _TRIVIAL_PREDICTORS.items() if str(loss_name).endswith(name)), "zero")


def make_record(result: LLCResult, settings: EstimateSettings) -> Record:
    """Return the parts of an estimate that are stored."""
    sampler = settings.sampler
    row = result.row() | {
        "batch_size": sampler.batch_size,
        "minibatches": sampler.minibatches,
        "mode": settings.mode,
        "rescale": settings.rescale,
        "component": settings.component,
        "settings": settings.digest,
    }
    if settings.mode.startswith("published") and result.loss_name.endswith("cross_entropy"):
        row[WITH_BUG] = llc_with_initial_loss_bug(result.loss_trace, nbeta=result.settings.inverse_temperature)
    row = {name: row[name] for name in COLUMNS} | row
    origin = {name: row[name] for name in ("step", "checkpoint_hash", "settings")}
    positions = []
    if result.llc_per_component is not None and result.stderr_per_component is not None:
        pairs = zip(result.llc_per_component.tolist(), result.stderr_per_component.tolist(), strict=True)
        positions = [
            {**origin, "position": position, "llc": llc, "stderr": stderr}
            for position, (llc, stderr) in enumerate(pairs, start=1)
        ]
    traces = torch.cat([result.burnin_trace[:, :: sampler.thinning], result.loss_trace], dim=1)
    stride = -(-traces.shape[1] // MAX_TRACE)
    return Record(
        row,
        positions,
        traces[:, ::stride].float().numpy(),
        stride * sampler.thinning,
        result.excess_trace[:, ::stride].float().numpy(),
        _susceptibilities(result),
    )


def _susceptibilities(result: LLCResult) -> np.ndarray:
    """Return the susceptibilities to the losses on the parts of the data, relative to the training loss.

    The array is empty if these losses were not recorded, or if all chains are masked.
    """
    used = result.llc_per_chain.isfinite()
    if PARTS_NAME not in result.observables or not used.any():
        return np.zeros(0)
    parts = result.observables[PARTS_NAME][used]
    training_loss = parts[..., : parts.shape[2] // 2].mean(2, keepdim=True)
    return torch.stack(susceptibility(result.excess_trace[used], parts - training_loss)).numpy()


def as_record(entry: Entry) -> Record:
    """Convert a stored entry into the record of its estimate.

    Raises:
        ContentError: If the rows or traces do not have the form of a record.
    """
    row, *positions = entry.rows or [{}]
    stride = row.get("stride")
    record = Record(
        {"component": ""} | {RENAMED_COLUMNS.get(name, name): value for name, value in row.items() if name != "stride"},
        positions,
        entry.arrays.get("traces", np.zeros(0)),
        stride if is_count(stride) else 0,
        entry.arrays.get("excess", np.zeros(0)),
        entry.arrays.get("susceptibilities", np.zeros(0)),
    )
    if not _is_complete(record):
        raise ContentError("it is not an estimate")
    return record


def write_tables(run: RunFolder) -> None:
    """Write the run's tables, made from all stored estimates.

    Raises:
        StorageError: If a table cannot be written.
    """
    with _lock(run):
        records = read_all(run)
        whole, parts = (
            [r for r in records if bool(r.row["component"]) == is_component] for is_component in (False, True)
        )
        if whole:
            run.write_result("llc.csv", as_table(whole).drop(columns="component").to_csv(index=False))
            positions = pd.DataFrame([row for record in whole for row in record.positions])
            run.write_result("llc-positions.csv", positions.to_csv(index=False))
        if parts:
            parts.sort(key=lambda record: (record.row["component"], record.row["settings"], record.row["step"]))
            run.write_result(COMPONENT_TABLE, as_table(parts).to_csv(index=False))
            run.write_result(SUSCEPTIBILITY_TABLE, susceptibility_table(parts).to_csv(index=False))


def as_table(records: list[Record]) -> pd.DataFrame:
    """Return the rows of records as a table."""
    return pd.DataFrame([record.row for record in records])


def susceptibility_table(records: list[Record]) -> pd.DataFrame:
    """Return the table of susceptibilities, with a row for each component, step, distribution and position."""
    rows = []
    for record in records:
        origin = {name: record.row[name] for name in ("step", "checkpoint_hash", "settings", "component")}
        for index, (value, stderr) in enumerate(record.susceptibilities.T.tolist()):
            distribution, position = divmod(index, record.susceptibilities.shape[1] // len(PARTS))
            part = {"distribution": PARTS[distribution], "position": position + 1}
            rows.append(origin | part | {"susceptibility": value, "stderr": stderr, "verdict": record.row["verdict"]})
    return pd.DataFrame(rows)


def read_all(run: RunFolder) -> list[Record]:
    """Return every stored estimate of a run that can be read, ordered by settings and step."""
    records: list[Record] = []
    for file in sorted((run.results / "llc").glob("*/step-*.*")):
        with contextlib.suppress(ContentError, LookupError, TypeError, ValueError, AttributeError):
            entry = _read_entry(file)
            record = None if entry is None else as_record(entry)
            origin = (file.parent.name, _step_of(file))
            if record is not None and (record.row["settings"], record.row["step"]) == origin:
                records.append(record)
    return records


def _read_entry(file: Path) -> Entry | None:
    if file.suffix == ".npz":  # as version 0.1.0 stored it
        about, arrays = read_archive(file)
        rows = [about["row"] | {"stride": about["stride"]}, *about["positions"]]
        return Entry(_step_of(file), about["row"]["checkpoint_hash"], rows, arrays)
    return Cache(file.parent).read(_step_of(file)) if file.suffix == ".json" else None


def _step_of(file: Path) -> int:
    return int(file.stem.removeprefix("step-"))


def _is_complete(record: Record) -> bool:
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
        and (not record.excess.size or record.excess.ndim == 2)
        and record.excess.dtype.kind == "f"
        and (not record.susceptibilities.size or record.susceptibilities.ndim == 2)
        and record.susceptibilities.dtype.kind == "f"
    )


@contextlib.contextmanager
def _lock(run: RunFolder) -> Iterator[None]:
    """Allow only one program at a time to write the tables. Otherwise a table could miss an estimate that another program just stored."""
    with (run.path / ".llc-lock").open("a+") as file:
        lock_file(file.fileno(), run.path, wait=True)
        yield
