"""Convert the saved steps of an older code base to a run's folder, for `icl import`.

The folder contains `config.yaml`, `status.json` and `checkpoints/`. It also contains `imported.json`, which says where every setting comes
from. If the training tasks are known, `checkpoints/tasks.safetensors` contains them. There is no `metrics.csv` and no `last.ckpt`.
"""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from icl.config import RunConfig
from icl.config.validation import ConfigError, require_run_name
from icl.files.reading import ContentError
from icl.files.writing import write_atomically
from icl.importing.formats import FORMATS, Format, format_of
from icl.importing.models import (
    OlderStep,
    Settings,
    convert,
    find_files,
    number_files,
    read_step,
    require_one_model,
    settings_of,
    step_in_name,
)
from icl.importing.pickles import OlderFileError, read_pickle
from icl.importing.tasks import choose_tasks
from icl.progress import with_progress
from icl.runs.checkpoints import Checkpoint, save_checkpoint, weights_digest
from icl.runs.folder import RunError, RunFolder, leaving_nothing, name_of, require_own_place
from icl.runs.status import Status
from icl.runs.tasks_file import write_tasks

SUFFIXES = (".pt", ".pth")
"""Suffixes of files of `torch.save`."""


class ImportedRun(NamedTuple):
    """A run that was imported."""

    folder: RunFolder
    steps: list[int]
    settings: Settings
    tasks: str
    """A phrase that says where the training tasks come from."""


def import_run(
    path: str | Path,
    source: str,
    out: str | Path,
    *,
    options: Mapping[str, Any] | None = None,
    tasks: str | None = None,
    step: int | None = None,
) -> ImportedRun:
    """Make a run's folder from the saved steps of an older code base.

    Args:
        path: A file, or a folder of files.
        source: The code base: a key of `FORMATS`.
        out: The new run's folder.
        options: Settings that the files do not contain, keyed by dotted name.
        tasks: Source of the training tasks: a file, `recompute` or `unknown`. By default, the tasks in the checkpoint
            are used. If it contains none and the older code drew its tasks from a fixed seed, these tasks are drawn again.
        step: The step, if there is only one file and neither its name nor its content contains the step.

    Raises:
        OlderFileError: If a file cannot be read safely, comes from another code base, or belongs to a different run.
        ConfigError: If a setting is missing or contradicts the files.
        RunError: If the folder already contains a run or checkpoints.
        StorageError: If the folder cannot be written.
    """
    form, run = format_of(source), RunFolder(out)
    _require_new(run)
    require_own_place(run)
    numbered = number_files(find_files(Path(path), form), form, step)
    last = read_step(*numbered[-1], form)
    settings = settings_of(last, form, options or {})
    is_seed_given = "seeds.tasks" in {**settings.from_files, **settings.from_options}
    is_language = settings.config.model.is_language
    if is_language and tasks is not None:
        raise ConfigError("A language run has no tasks; leave out --tasks.")
    table, where = None, "none: it is a language run"
    if not is_language:
        table, where = choose_tasks(tasks, last.tree, form, settings.config, is_seed_given=is_seed_given)
    convert(last, form, settings.config)  # so that a file that does not fit is refused before anything is written
    with leaving_nothing(run), _no_half_run(run):
        pool = None if is_language or settings.config.task.is_gaussian else "unknown"
        if table is not None:
            pool = write_tasks(run.checkpoints.root, table)
        task = dataclasses.replace(settings.config.task, imported_tasks=pool)
        config = dataclasses.replace(settings.config, task=task, run_name=_name(run))
        digests = _write_steps(numbered, last, form, config, run)
        about = _describe(form, settings, where, digests)
        write_atomically(run.path / "imported.json", (json.dumps(about, indent=1) + "\n").encode())
        reason = f"imported from {form.about}"
        run.log(f"{reason}, {path}")
        run.write_status(Status(state="finished", step=last.step, max_steps=config.trainer.max_steps, reason=reason))
        run.write_config(config)
    return ImportedRun(run, sorted({number for number, _ in numbered}), settings._replace(config=config), where)


def _require_new(run: RunFolder) -> None:
    """Refuse a folder with a run, or with checkpoints of an import that was killed.

    Raises:
        RunError: If the folder contains a run or checkpoints.
    """
    if run.config_file.exists() or run.status_file.exists():
        raise RunError(f"There is already a run at {run.path}; choose another folder with --out.")
    if run.checkpoints.root.exists():
        raise RunError(
            f"{run.checkpoints.root} exists already, perhaps from an import that was killed; remove it, or choose another folder with --out."
        )


@contextlib.contextmanager
def _no_half_run(run: RunFolder) -> Iterator[None]:
    """Remove all files that the body of the `with` statement wrote, if the body fails.

    Otherwise a later import could mix its steps with the steps of the failed import.
    """
    _require_new(run)  # checked again, because another import may have finished before we had the lock
    files = (run.path / "imported.json", run.log_file, run.status_file, run.config_file)
    new = [file for file in files if not file.exists()]  # the folder may have contained files of the older code
    try:
        yield
    except BaseException:
        shutil.rmtree(run.checkpoints.root, ignore_errors=True)
        for file in new:
            file.unlink(missing_ok=True)
        raise


def load_older_file(path: Path, shape: RunConfig | None = None) -> Checkpoint:
    """Return the model in a single file that an older code base wrote with `torch.save`. Nothing is written.

    Args:
        path: The file.
        shape: Configuration that gives the settings that the file does not contain, such as the number of heads. If `shape` is None,
            M = inf and a noise variance of 0 are assumed, unless the file contains other values.

    Raises:
        OlderFileError: If the file cannot be read, or if the model needs a setting that neither the file nor `shape` contains.
    """
    forms = [form for form in FORMATS.values() if form.read is read_pickle]
    tree = forms[0].read(path)
    form = next((form for form in forms if form.is_mine(tree)), None)
    if form is None:
        raise OlderFileError(f"{path} is not a checkpoint of {' or '.join(form.about for form in forms)}.")
    number = form.step_of(tree)
    step = OlderStep(path, (step_in_name(path) or 0) if number is None else number, tree, "")
    given: dict[str, Any] = (
        {"task.num_tasks": "inf", "task.noise_variance": 0.0}
        if shape is None
        else {
            "task.num_tasks": shape.task.num_tasks,
            "task.noise_variance": shape.task.noise_variance,
            "model.num_heads": shape.model.num_heads,
            "model.layer_norm": shape.model.layer_norm,
        }
    )
    try:
        known = {**form.folder_facts(path), **form.facts(tree)}
    except ContentError as error:
        raise OlderFileError(
            f"{path} cannot be loaded: {error}. Check that it is a complete checkpoint of {form.about}."
        ) from None
    try:
        settings = settings_of(step, form, {key: value for key, value in given.items() if key not in known})
    except ConfigError as error:
        raise OlderFileError(
            f"{error} Give these options to `icl import`, or in Python, pass the settings as `cfg`."
        ) from None
    params = convert(step, form, settings.config)
    return Checkpoint(step.step, settings.config, params, weights_digest(params))


def _name(run: RunFolder) -> str | None:
    """Return the run's name for listings and stores, from the path of its folder. Return None if the path gives no valid name."""
    try:
        require_run_name(name := name_of(run.path))
    except ConfigError:
        try:
            require_run_name(name := run.path.name)
        except ConfigError:
            return None
    return name


def _write_steps(
    numbered: Sequence[tuple[int, Path]], first: OlderStep, form: Format, config: RunConfig, run: RunFolder
) -> dict[str, str]:
    """Write the checkpoint of every step. Return the SHA-256 of each older file, keyed by its path in the folder of all files."""
    written: dict[int, tuple[Path, str]] = {}
    digests: dict[str, str] = {}
    folder = os.path.commonpath([file.parent for _, file in numbered])
    for number, file in with_progress(numbered, "importing", "file"):
        step = first if file == first.file else read_step(number, file, form)
        require_one_model(step, first, form)
        params = convert(step, form, config)
        digest = weights_digest(params)
        other, known = written.setdefault(number, (file, digest))
        if digest != known:
            raise OlderFileError(f"{file} and {other} are both of step {number:,}, but differ; remove one of them.")
        if other == file:
            save_checkpoint(run.checkpoints, number, config, params)
        digests[file.relative_to(folder).as_posix()] = step.digest
    return digests


def _describe(form: Format, settings: Settings, tasks: str, digests: dict[str, str]) -> dict[str, Any]:
    """Return the content of `imported.json`."""
    return {
        "from": form.name,
        "code": form.about,
        "tasks": tasks,
        "settings_in_files": _plain(settings.from_files),
        "settings_given": _plain(settings.from_options),
        "settings_unknown": settings.unknown,
        "files": digests,
    }


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: "inf" if value == float("inf") else value for key, value in values.items()}
