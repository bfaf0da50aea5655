"""Measure every saved step of a run once, and cache the results in the run's folder.

`measure_checkpoints` reads a run's checkpoints in the order of their steps. Checkpoints that have no cached result yet are passed to a
function, several at a time, and this function measures them. The result of each step is stored as one entry, in one or two files below
`results/<name>/`:

- `step-000001465.json` contains the step's rows in the table of results, the entry's key, and the name, shape and position of each
  array. The key consists of the hash of the checkpoint, the settings of the measurement, and the version of the method. If the
  measurement also uses the previous checkpoint, the key also includes the hash and the step of that checkpoint.
- `step-000001465.npy` contains the numbers of all arrays, one array after the other. The file is missing if there are no arrays.
  Analyses of the whole run, such as a principal component analysis, need these arrays. Each array can be read separately, so the arrays
  of all checkpoints need not fit in memory.

If an entry is damaged or has a different key, its checkpoint is measured again. Nothing is ever unpickled. If the process is killed,
the next call with the same arguments continues after the last stored entry.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from icl.config import RunConfig, config_differences
from icl.files.arrays import StoredArray, array_digest, locate_array, read_array, write_array
from icl.files.reading import MAX_TABLE, ContentError, is_table, parse_json, read_bytes
from icl.files.writing import write_atomically
from icl.runs.checkpoints import Checkpoint, CheckpointError, load_checkpoint_file, read_config_of


class Measurement(NamedTuple):
    """The result of measuring one checkpoint."""

    rows: list[dict[str, Any]]
    """Rows of the table, without the columns for step, hash and settings. The values must be of types that JSON can store. NaN is
    allowed."""
    arrays: Mapping[str, np.ndarray] = MappingProxyType({})
    """Arrays for later analyses of the whole run, keyed by name. All arrays have the same dtype."""


class Entry(NamedTuple):
    """A cached measurement, with the step and the hash of its checkpoint."""

    step: int
    checkpoint_hash: str
    rows: list[dict[str, Any]]
    arrays: Mapping[str, np.ndarray] = MappingProxyType({})


class Batch(NamedTuple):
    """Entries of consecutive steps that were measured together, or one entry from the cache."""

    entries: list[Entry]
    is_new: bool
    """True if the entries were measured in this call, False if they come from the cache."""


Measure: TypeAlias = Callable[[list[Checkpoint], int], Sequence[Measurement]]
"""Function that measures a list of checkpoints. The list may begin with the predecessor of the first checkpoint to measure. If it does,
the second argument is 1, and the predecessor is not measured. Otherwise the second argument is 0."""


class Cache:
    """Entries stored in one folder of a run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, step: int, key: Mapping[str, Any] | None = None) -> Entry | None:
        """Return the entry of a step, or None if the entry is missing or damaged, or has another key.

        Args:
            step: Step of the checkpoint.
            key: Key that the entry must have. If it is None, the entry may have any key.
        """
        try:
            content = self._content(step)
            if key is not None and content["key"] != json.loads(json.dumps(key)):
                return None
            places = content["places"]
            numbers = read_array(self._array_file(step)) if places else np.zeros(0)
            if array_digest(numbers) != content["array_digest"]:
                return None
            arrays = {name: numbers[start:stop].reshape(shape) for name, (start, stop, shape) in places.items()}
            return Entry(step, content["key"]["checkpoint_hash"], content["rows"], arrays)
        except (ContentError, OSError, LookupError, TypeError, ValueError, AttributeError):
            return None

    def write(self, entry: Entry, key: Mapping[str, Any]) -> None:
        """Store an entry together with its key.

        If the process is killed during the write, the old entry, the new entry or no entry remains, but never a mixture.

        Raises:
            StorageError: If the entry cannot be written.
        """
        places, stop = {}, 0
        for name, array in entry.arrays.items():
            places[name] = (stop, stop + array.size, array.shape)
            stop += array.size
        numbers = np.concatenate([array.ravel() for array in entry.arrays.values()]) if places else np.zeros(0)
        if places:
            write_array(self._array_file(entry.step), numbers)
        content = {"key": dict(key), "rows": entry.rows, "places": places, "array_digest": array_digest(numbers)}
        text = json.dumps({"digest": _digest(content), **content})
        write_atomically(self._file(entry.step), text.encode())
        # Remove the file in which version 0.1.0 stored the entry.
        self._file(entry.step).with_suffix(".npz").unlink(missing_ok=True)

    def stored_array(self, step: int, name: str) -> StoredArray:
        """Return a reference to one flattened array in the entry of a step. The numbers stay in the file until the array is sliced.

        Raises:
            ContentError: If the entry is damaged, or the file with its arrays is missing.
            OSError: If there is no entry.
            KeyError: If the entry has no array of that name.
        """
        start, stop, _ = self._content(step)["places"][name]
        numbers = locate_array(self._array_file(step))
        offset = numbers.offset + start * numbers.dtype.itemsize
        return dataclasses.replace(numbers, offset=offset, size=stop - start)

    def steps(self, settings: Mapping[str, Any], version: int) -> set[int]:
        """Return the steps that have an entry with these settings and this version. The checkpoint's hash is not compared."""
        wanted = (json.loads(json.dumps(settings)), version)
        steps = set()
        for file in self.folder.glob("step-*.json"):
            with contextlib.suppress(ContentError, OSError, LookupError, TypeError, ValueError):
                key = parse_entry(read_bytes(file, limit=MAX_TABLE))["key"]
                if (key["settings"], key["version"]) == wanted:
                    steps.add(int(file.stem.removeprefix("step-")))
        return steps

    def _content(self, step: int) -> dict[str, Any]:
        return parse_entry(read_bytes(self._file(step), limit=MAX_TABLE))

    def _file(self, step: int) -> Path:
        return self.folder / f"step-{step:09d}.json"

    def _array_file(self, step: int) -> Path:
        return self.folder / f"step-{step:09d}.npy"


def require_one_run(files: Sequence[Path]) -> None:
    """Refuse checkpoints of different runs.

    This function does not read the weights, so call it before the work on the checkpoints starts.

    Raises:
        CheckpointError: If a checkpoint and the first checkpoint belong to different runs.
    """
    first: RunConfig | None = None
    for path in files:
        # Skip damaged checkpoints here. A damaged checkpoint is reported when its weights are loaded, so the checkpoints before it are
        # measured first.
        with contextlib.suppress(OSError, CheckpointError):
            config = read_config_of(path)
            first = first or config
            if differences := config_differences(first, config):
                break
    else:
        return
    raise CheckpointError(
        f"{path} and {files[0].name} belong to different runs: {'; '.join(differences)}. Keep the checkpoints of each run in a separate folder."
    )


def load_same_run(path: Path, config: RunConfig) -> Checkpoint:
    """Return a checkpoint from its file. Refuse the file if it belongs to a run whose settings differ from `config`.

    Raises:
        CheckpointError: If the file is not a usable checkpoint, or belongs to another run.
    """
    checkpoint = load_checkpoint_file(path)
    differences = config_differences(config, checkpoint.config)
    if differences:
        raise CheckpointError(
            f"{path} and the checkpoints before it belong to different runs: {'; '.join(differences)}. "
            "Keep the checkpoints of each run in a separate folder."
        )
    return checkpoint


def measure_checkpoints(
    files: Sequence[Path],
    config: RunConfig,
    measure: Measure,
    *,
    cache: Cache | None,
    settings: Mapping[str, Any],
    version: int,
    max_members: int,
    uses_predecessor: bool = False,
) -> Iterator[Batch]:
    """Yield the entries of checkpoints in the order of their steps. Checkpoints with a cached entry are not measured again.

    Args:
        files: Checkpoint files of one run, sorted by step.
        config: The run's configuration.
        measure: Function that measures some consecutive checkpoints.
        cache: Cache that stores the entries. If it is None, nothing is stored.
        settings: Settings on which the measurements depend. Checkpoints whose entry has other settings are measured again.
        version: Version of the method. Checkpoints whose entry has another version are measured again.
        max_members: Largest number of checkpoints to measure at once.
        uses_predecessor: Whether the measurement of a checkpoint also uses the checkpoint before it.

    Raises:
        CheckpointError: If a checkpoint cannot be used, or belongs to another run.
        StorageError: If an entry cannot be written.
    """
    previous: Checkpoint | None = None
    lead: Checkpoint | None = None  # predecessor of the first pending checkpoint
    pending: list[tuple[Checkpoint, dict[str, Any]]] = []  # checkpoints to measure, and their keys
    for file in files:
        checkpoint = load_same_run(file, config)
        predecessor = previous if uses_predecessor else None
        key = {
            "checkpoint_hash": checkpoint.digest,
            "predecessor_hash": predecessor.digest if predecessor else None,
            "predecessor_step": predecessor.step if predecessor else None,
            "settings": dict(settings),
            "version": version,
        }
        entry = None if cache is None else cache.read(checkpoint.step, key)
        if pending and (entry is not None or len(pending) == max_members):
            yield Batch(_measure_pending(pending, lead, measure, cache), is_new=True)
            pending = []
        if entry is not None:
            yield Batch([entry], is_new=False)
        else:
            lead = lead if pending else predecessor
            pending.append((checkpoint, key))
        previous = checkpoint
    if pending:
        yield Batch(_measure_pending(pending, lead, measure, cache), is_new=True)


def _measure_pending(
    pending: Sequence[tuple[Checkpoint, Mapping[str, Any]]],
    lead: Checkpoint | None,
    measure: Measure,
    cache: Cache | None,
) -> list[Entry]:
    """Measure checkpoints, and store each result together with its key. Return the entries."""
    leads = [] if lead is None else [lead]
    measurements = measure([*leads, *(checkpoint for checkpoint, _ in pending)], len(leads))
    entries = []
    for (checkpoint, key), (rows, arrays) in zip(pending, measurements, strict=True):
        entries.append(Entry(checkpoint.step, checkpoint.digest, rows, dict(arrays)))
        if cache is not None:
            cache.write(entries[-1], key)
    return entries


def parse_entry(data: bytes) -> dict[str, Any]:
    """Return the content of an entry's JSON file: `key`, `rows`, `places` (start, stop, shape of each array), `array_digest`.

    Raises:
        ContentError: If the file is damaged.
    """
    content = parse_json(data)
    if not isinstance(content, dict) or content.pop("digest", None) != _digest(content):
        raise ContentError("the content does not match its digest")
    if not is_table(content.get("rows")):
        raise ContentError("there are no rows")
    return content


def entry_rows(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Return the rows of all entries, for one table. Each row gets the `step` and the `checkpoint_hash` of its entry."""
    return [
        {"step": entry.step, "checkpoint_hash": entry.checkpoint_hash, **row} for entry in entries for row in entry.rows
    ]


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(content).encode(errors="surrogatepass"), digest_size=16).hexdigest()
