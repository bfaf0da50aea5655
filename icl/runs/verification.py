"""Verify a run's files in its folder and in its store, for `icl checkpoints RUN verify`.

- Each file of weights or of Adam's moments must match its digest, its file name and the run's settings. Every step for which the
  settings schedule a checkpoint must have a checkpoint.
- `last.ckpt` and `previous.ckpt` must match their digests and the run's settings.
- `metrics.csv` must have a row of numbers for every logged step. The rows up to the last save are compared with the digest in
  `last.ckpt`.
- `config.yaml` and `status.json` must be readable and agree with `last.ckpt`.
- Arrays and images in `results/` and `figures/` are compared with their checksums. Tables have no checksums. Instead, all rows of a
  table must have the same number of columns, and columns of numbers must contain only numbers.
- The copy in the store is checked in the same way. In addition, each file in the store must match the digest that was sent with the
  file, and the store must have every file of the folder.
"""

import contextlib
import csv
import io
import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image

from icl.config import RunConfig, config_differences
from icl.config.validation import UserError
from icl.files.arrays import array_digest
from icl.files.reading import is_number, parse_json
from icl.progress import progress_bar
from icl.runs.checkpoints import MOMENTS, checkpoint_name, parse_checkpoint
from icl.runs.contents import expected_steps, name_checkpoints
from icl.runs.copied_files import CHECKPOINT_FOLDERS, copied_names, is_checkpoint, size_limit
from icl.runs.folder import RunFolder, parse_config
from icl.runs.measure import parse_entry
from icl.runs.metrics_file import are_rows_altered, logged_steps, metric_columns
from icl.runs.mirror import Mirror
from icl.runs.resume_file import Resume, parse_resume
from icl.runs.status import Status, parse_status
from icl.runs.tasks_file import NAME as TASKS_NAME
from icl.runs.tasks_file import parse_tasks
from icl.runs.transfer import in_parallel
from icl.store.base import MissingKeyError, Store
from icl.tasks.priors import table_digest

_TASKS = f"checkpoints/{TASKS_NAME}"
_NUMBERS = ("step", "value", "stderr", "llc", "init_loss", "mean_loss")
"""Columns that must contain only numbers in every table of results."""


class _Copy(NamedTuple):
    """A run's folder, or its copy in a store."""

    store: Store
    names: list[str]
    """Names of the files that exist or should exist."""
    config: RunConfig | None
    resume: Resume | None
    status: Status | None


def find_damage(run: RunFolder, mirror: Mirror | None) -> list[str]:
    """Return a sentence for each file that is damaged or missing in the run's folder or in the store.

    Raises:
        StorageError: If the store cannot be listed.
    """
    copies = [_read_copy(run.store)] if run.path.is_dir() else []
    mine = copies[0].names if copies else []
    if mirror is not None:
        copies.append(_read_copy(mirror.there, mine))
    jobs = [(copy, name) for copy in copies for name in copy.names]
    jobs += [(copies[0], "previous.ckpt")] if run.previous_file.is_file() else []
    with progress_bar("verifying", len(jobs), "file") as bar:
        problems = [problem for problem in in_parallel(_problem, jobs, bar) if problem]
    for copy in copies[:1]:  # files that are missing in the store have already been reported above
        problems += _what_is_missing(copy)
    return problems


def _read_copy(store: Store, others: Sequence[str] = ()) -> _Copy:
    """Return a copy with its settings, resume file and status.

    If one of these cannot be read, its field is None, and `_problem` reports the damage later.

    The names in `others` are added to the copy's names, because these files should exist too.
    """
    config = resume = status = None
    with contextlib.suppress(UserError):
        config = parse_config(store.read("config.yaml", limit=size_limit("config.yaml")), str(store))
    with contextlib.suppress(UserError):
        resume = parse_resume(store.read("last.ckpt"), str(store))
    with contextlib.suppress(UserError):
        status = parse_status(store.read("status.json", limit=size_limit("status.json")))
    names = sorted({*copied_names(store), *others})
    return _Copy(store, names, config or (resume.config if resume else None), resume, status)


def _what_is_missing(copy: _Copy) -> Iterator[str]:
    """Yield a sentence for each file that is missing in a copy, and one sentence for all missing checkpoints."""
    end = copy.status if copy.status is not None and copy.status.is_done else None
    step = end.step if end is not None else copy.resume.step if copy.resume is not None else 0
    is_begun = end is None and copy.status is not None and copy.status.step > 0
    needed = ["config.yaml", "status.json"]
    is_imported = copy.config is not None and copy.config.checkpoints.imported_from is not None
    needed += ["metrics.csv"] if step > 0 and not is_imported else []
    needed += [_TASKS] if is_imported and copy.config is not None and _has_table(copy.config) else []
    needed += ["last.ckpt"] if is_begun else []
    for name in needed:
        if name not in copy.names:
            yield f"There is no {copy.store}/{name}."
    if copy.config is None or step == 0:
        return
    folders = CHECKPOINT_FOLDERS if copy.config.checkpoints.moments else CHECKPOINT_FOLDERS[:1]
    missing = [
        expected
        for expected in expected_steps(copy.config, step, end)
        if not all(f"{folder}/{checkpoint_name(expected)}" in copy.names for folder in folders)
    ]
    if missing:
        yield f"{copy.store} lacks the {name_checkpoints(missing)}."


def _problem(job: tuple[_Copy, str]) -> str | None:
    """Return a sentence that says what is wrong with a file, or None if nothing is wrong."""
    copy, name = job
    where = f"{copy.store}/{name}"
    check = _CHECKS.get(name) or _CHECKS.get(PurePosixPath(name).suffix)
    if is_checkpoint(name):
        check = _check_checkpoint
    try:
        data = copy.store.read(name, limit=size_limit(name))
        reason = check(copy, name, data) if check is not None else None
    except MissingKeyError as error:
        return str(error)
    except UserError as error:
        text = str(error)
        return text if where in text else f"{where} is damaged: {text.rstrip('.')}."
    except Exception as error:  # zipfile, PIL and csv raise a dozen kinds of errors for a damaged file
        reason = f"it cannot be read ({type(error).__name__})"
    return f"{where} is damaged: {reason}." if reason else None


# Each check returns a phrase that says what is wrong with a file's bytes, or None if nothing is wrong. Parsers raise their own errors.


def _check_checkpoint(copy: _Copy, name: str, data: bytes) -> str | None:
    """Check that a checkpoint is undamaged, and that its step and settings match its file name and the run."""
    folder, _, file = name.rpartition("/")
    checkpoint = parse_checkpoint(data, f"{copy.store}/{name}")
    if file != checkpoint_name(checkpoint.step):
        return f"it contains step {checkpoint.step:,}"
    if any(key.startswith(MOMENTS) for key in checkpoint.params) != (folder == CHECKPOINT_FOLDERS[1]):
        return "it contains weights in the folder of Adam's moments, or moments in the folder of the weights"
    return _compare(copy.config, checkpoint.config, "config.yaml")


def _check_resume(copy: _Copy, name: str, data: bytes) -> str | None:
    return _compare(copy.config, parse_resume(data, f"{copy.store}/{name}").config, "config.yaml")


def _check_config(copy: _Copy, name: str, data: bytes) -> str | None:
    config = parse_config(data, f"{copy.store}/{name}")
    return _compare(copy.resume.config if copy.resume else None, config, "last.ckpt")


def _check_status(copy: _Copy, name: str, data: bytes) -> str | None:
    status = parse_status(data)
    if status is None:
        return "it cannot be read"
    if status.is_done and copy.resume is not None and status.step != copy.resume.step:
        return f"it says that the run ended at step {status.step:,}, but last.ckpt is from step {copy.resume.step:,}"
    return None


def _check_metrics(copy: _Copy, name: str, data: bytes) -> str | None:
    columns = metric_columns(copy.config) if copy.config is not None else ["step"]
    reason = _find_fault(data, columns)
    if reason or copy.config is None:
        return reason
    rows = list(csv.reader(io.StringIO(data.decode())))
    if rows[0] != columns:
        return "its columns do not match the run's settings"
    steps = [int(float(row[0] or "nan")) for row in rows[1:]]
    reached = copy.resume.step if copy.resume is not None else 0
    lost = sorted(logged_steps(copy.config, reached) - set(steps))
    if lost:
        return f"it has lost the row of step {lost[0]:,}"
    if steps != sorted(set(steps)):
        return "its rows are not in the order of their steps"
    saved = copy.resume.member.get("rows") if copy.resume is not None else None
    has_ended = copy.status is not None and copy.status.is_done and copy.status.step == reached
    is_altered = are_rows_altered(data, saved, has_ended=has_ended)
    return "its rows differ from the saved rows" if is_altered else None


def _check_archive(copy: _Copy, name: str, data: bytes) -> str | None:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        bad = archive.testzip()
    return f"the part {bad} in this file does not match its checksum" if bad else None


def _check_json(copy: _Copy, name: str, data: bytes) -> str | None:
    tree = parse_json(data)
    if isinstance(tree, dict) and {"digest", "key", "rows"} <= set(tree):
        parse_entry(data)
    return None


def _check_arrays(copy: _Copy, name: str, data: bytes) -> str | None:
    """Compare the arrays of an entry (see `icl.runs.measure`) with the digest in the entry's JSON file."""
    entry = parse_entry(copy.store.read(name.removesuffix(".npy") + ".json"))
    numbers = np.load(io.BytesIO(data), allow_pickle=False)
    return None if array_digest(numbers) == entry["array_digest"] else "its numbers do not match their digest"


def _check_tasks(copy: _Copy, name: str, data: bytes) -> str | None:
    digest = table_digest(parse_tasks(data, f"{copy.store}/{name}"))
    is_named = copy.config is None or digest == copy.config.task.imported_tasks
    return None if is_named else "it is not the table of tasks that config.yaml names"


def _has_table(config: RunConfig) -> bool:
    """Return whether a run has a table of imported tasks."""
    return config.task.imported_tasks not in (None, "unknown")


def _check_picture(copy: _Copy, name: str, data: bytes) -> str | None:
    with Image.open(io.BytesIO(data)) as image:
        image.verify()
    return None


def _check_table(copy: _Copy, name: str, data: bytes) -> str | None:
    return _find_fault(data, _NUMBERS)


_CHECKS: dict[str, Callable[[_Copy, str, bytes], str | None]] = {
    "last.ckpt": _check_resume,
    "previous.ckpt": _check_resume,
    "config.yaml": _check_config,
    "status.json": _check_status,
    "metrics.csv": _check_metrics,
    _TASKS: _check_tasks,
    ".npy": _check_arrays,
    ".npz": _check_archive,
    ".csv": _check_table,
    ".json": _check_json,
    ".png": _check_picture,
}
"""Functions that check files, keyed by a file's name in the run's folder or by its suffix."""


def _compare(expected: RunConfig | None, config: RunConfig, name: str) -> str | None:
    """Return a phrase that lists how `config` differs from `expected`, the settings in the file `name`.

    Return None if the settings are equal, or if `expected` is None because that file could not be read.
    """
    differences = config_differences(expected, config) if expected is not None else []
    return f"its settings differ from those in {name}: {'; '.join(differences)}" if differences else None


def _find_fault(data: bytes, numbers: Sequence[str]) -> str | None:
    """Return a phrase that says what is wrong with a table, or None if nothing is wrong. Columns named in `numbers` must be numeric."""
    text = data.decode("utf-8")
    if any(not character.isprintable() and character not in "\r\n\t" for character in text):
        return "it contains control characters"
    rows = list(csv.reader(io.StringIO(text), strict=True))
    if not rows or not text.endswith("\n"):
        return "it was cut short"
    if len({len(row) for row in rows}) > 1:
        return "its rows have different numbers of columns"
    for name, *column in zip(*rows, strict=True):
        wrong = next((value for value in column if name in numbers and value and not is_number(value)), None)
        if wrong is not None:
            return f"its column {name} must contain only numbers, but contains {json.dumps(wrong[:30])}"
    return None
