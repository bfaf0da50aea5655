"""Whether a run's files, here and in its store, are whole: what `icl checkpoints RUN verify` looks at.

- Checkpoints and Adam's moments: each against its own digest; and that every step of the schedule is there.
- `last.ckpt` and `previous.ckpt`: against their digests.
- `metrics.csv`: a row of numbers for every logged step; up to the last save also against the digest that `last.ckpt` holds.
- `config.yaml` and `status.json`: that they can be read, and agree with `last.ckpt`.
- Results and figures: records and pictures against their checksums. Tables have none: that all rows have the same number of
  columns, and columns of numbers only numbers.
- In the store: all of these, every object against the digest it was sent with, and that nothing is missing that is here.
"""

import contextlib
import csv
import io
import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from PIL import Image

from icl.checkpoints import checkpoint_name, parse_checkpoint
from icl.checks import UserError
from icl.config import RunConfig
from icl.contents import describe_missing, missing_steps
from icl.metrics_file import are_rows_altered, logged_steps, metric_columns
from icl.mirror import Mirror, copied_names, in_parallel, is_checkpoint, progress
from icl.reading import parse_json
from icl.resume_file import NAMES, Resume, parse_resume
from icl.runs import DONE, RunFolder, config_differences, parse_config, parse_status
from icl.storage import LocalStore, MissingKeyError, Store

_NUMBERS = ("step", "value", "stderr", "llc", "init_loss", "mean_loss")
"""Columns of tables of results that hold nothing but numbers."""


class _Place(NamedTuple):
    """A copy of a run, and what its `last.ckpt` says of it."""

    store: Store
    config: RunConfig | None
    resume: Resume | None


def find_damage(run: RunFolder, mirror: Mirror | None) -> list[str]:
    """Return a sentence for everything that is damaged or missing, here and in the store.

    Raises:
        StorageError: If the store cannot be listed.
    """
    here = LocalStore(run.path)
    mine = [*copied_names(here), *(name for name in NAMES[1:] if (run.path / name).is_file())]
    theirs = copied_names(mirror.there) if mirror else []
    own = _place(here)
    jobs = [(own, name) for name in mine]
    if mirror:
        copy = _place(mirror.there)
        jobs += [(copy, name) for name in sorted({*theirs, *(name for name in mine if name not in NAMES[1:])})]
    with progress("verifying", len(jobs)) as bar:
        found = [problem for problem in in_parallel(_problem, jobs, bar) if problem]
    return [*found, *_what_is_missing(run, own)]


def _place(store: Store) -> _Place:
    """A copy with what can be read of its settings and its resume file; damage of these is told with the others."""
    config = resume = None
    with contextlib.suppress(UserError):
        config = parse_config(store.read("config.yaml"), str(store))
    with contextlib.suppress(UserError):
        resume = parse_resume(store.read(NAMES[0]), str(store))
    return _Place(store, config or (resume.config if resume else None), resume)


def _what_is_missing(run: RunFolder, own: _Place) -> Iterator[str]:
    """What should be in the run's folder and is not."""
    status = run.read_status()
    has_ended = status is not None and status.state in DONE
    for name in ("config.yaml", "status.json"):
        if not (run.path / name).exists():
            yield f"There is no {run.path / name}."
    step = status.step if status is not None and has_ended else own.resume.step if own.resume else 0
    if own.config is not None and step > 0:
        if not run.metrics_file.exists():
            yield f"There is no {run.metrics_file}."
        missing = missing_steps(run, own.config, step, status if has_ended else None)
        if missing:
            yield describe_missing(run, missing)


def _problem(job: tuple[_Place, str]) -> str | None:
    """What is wrong with a file, in a sentence."""
    place, name = job
    where = f"{place.store}/{name}"
    try:
        data = place.store.read(name)
        reason = _check(place, name, data, where)
    except MissingKeyError as error:
        return str(error)
    except UserError as error:
        text = str(error)
        return text if where in text else f"{where} is damaged: {text.rstrip('.')}."
    except Exception as error:  # zipfile, PIL and csv raise a dozen kinds for a damaged file
        reason = f"it cannot be read ({type(error).__name__})"
    return f"{where} is damaged: {reason}." if reason else None


def _check(place: _Place, name: str, data: bytes, where: str) -> str | None:
    """Why a file's bytes are not what they should be; readers' own errors say it too."""
    if is_checkpoint(name):
        step = parse_checkpoint(data, where).step
        return None if name.rpartition("/")[2] == checkpoint_name(step) else f"it holds step {step:,}"
    whole_files: dict[str, Callable[[_Place, bytes, str], str | None]] = {
        "last.ckpt": _check_resume,
        "previous.ckpt": _check_resume,
        "config.yaml": _check_config,
        "status.json": _check_status,
        "metrics.csv": _check_metrics,
    }
    if name in whole_files:
        return whole_files[name](place, data, where)
    kinds: dict[str, Callable[[bytes], str | None]] = {
        "npz": _check_archive,
        "csv": _check_table,
        "json": _check_json,
        "png": _check_picture,
    }
    check = kinds.get(name.rpartition(".")[2])
    return check(data) if check is not None else None


def _check_resume(place: _Place, data: bytes, where: str) -> str | None:
    config = parse_resume(data, where).config
    differences = config_differences(place.config, config) if place.config is not None else []
    return f"it is of another run than config.yaml: {'; '.join(differences)}" if differences else None


def _check_config(place: _Place, data: bytes, where: str) -> str | None:
    config = parse_config(data, where)
    differences = config_differences(place.resume.config, config) if place.resume is not None else []
    return f"it is of another run than last.ckpt: {'; '.join(differences)}" if differences else None


def _check_status(place: _Place, data: bytes, where: str) -> str | None:
    status = parse_status(data)
    if status is None:
        return "it cannot be read"
    if status.state in DONE and place.resume is not None and status.step != place.resume.step:
        return f"it says that the run ended at step {status.step:,}, and last.ckpt is of step {place.resume.step:,}"
    return None


def _check_metrics(place: _Place, data: bytes, where: str) -> str | None:
    columns = metric_columns(place.config) if place.config is not None else ["step"]
    reason = _check_table(data, columns)
    if reason or place.config is None:
        return reason
    rows = list(csv.reader(io.StringIO(data.decode())))
    if rows[0] != columns:
        return "its columns are not those of the run's settings"
    steps = [int(float(row[0] or "nan")) for row in rows[1:]]
    reached = place.resume.step if place.resume is not None else 0
    lost = sorted(logged_steps(place.config, reached) - set(steps))
    if lost:
        return f"it has lost the row of step {lost[0]:,}"
    if steps != sorted(set(steps)):
        return "its rows are not in the order of steps"
    is_altered = place.resume is not None and are_rows_altered(data, place.resume.member.get("rows"))
    return "its rows are not those that were saved" if is_altered else None


def _check_archive(data: bytes) -> str | None:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        bad = archive.testzip()
    return f"its part {bad} does not match its checksum" if bad else None


def _check_json(data: bytes) -> str | None:
    parse_json(data)
    return None


def _check_picture(data: bytes) -> str | None:
    with Image.open(io.BytesIO(data)) as image:
        image.verify()
    return None


def _check_table(data: bytes, numbers: Sequence[str] = _NUMBERS) -> str | None:
    """Whether a table is one, and its columns of numbers hold nothing else."""
    text = data.decode("utf-8")
    if any(not character.isprintable() and character not in "\r\n\t" for character in text):
        return "it holds characters that no table has"
    rows = list(csv.reader(io.StringIO(text), strict=True))
    if not rows or not text.endswith("\n"):
        return "it was cut short"
    if len({len(row) for row in rows}) > 1:
        return "its rows are of different lengths"
    for name, *column in zip(*rows, strict=True):
        wrong = next((value for value in column if name in numbers and value and not _is_number(value)), None)
        if wrong is not None:
            return f"its column {name} of numbers holds {json.dumps(wrong[:30])}"
    return None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
