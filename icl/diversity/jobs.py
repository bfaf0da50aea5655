"""Run the task-diversity experiment as Slurm jobs.

Each run becomes a point of a sweep, that is, one combination of settings. The jobs divide the points among themselves
(`icl.sweeps.engine`). A run is the same with and without Slurm. So an experiment can start with Slurm and continue without it, or the
other way round.
"""

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from icl.config import flatten
from icl.config.validation import ConfigError, require_run_name
from icl.diversity.metadata import Metadata
from icl.diversity.runs import ExperimentRun, run_folder
from icl.files.writing import StorageError, remove_temporaries
from icl.progress import print_at_once
from icl.runs.folder import local_root
from icl.sweeps.engine import SweepResult, run_sweep
from icl.sweeps.points import Point
from icl.sweeps.schema import SweepFile
from icl.sweeps.slurm.job import SlurmJob
from icl.sweeps.state import PointState, point_state

RESERVED = ("task.num_tasks", "run_name", "population.seeds", "population.num_tasks")
"""Names of the settings that the experiment sets itself."""
_COMMAND = ("${env}", "icl", "train")


def root_of(base: Path) -> Path:
    """Return the folder to which the names of an experiment's runs are relative. The names are the same as without Slurm."""
    root = local_root()
    if not base.is_relative_to(root):
        root = base.parent if base.is_absolute() or ".." in base.parts else Path()
    try:
        require_run_name(run_folder(base, math.inf).path.relative_to(root).as_posix())
    except ConfigError:  # the folder may have any name, such as `my experiment`, but the name of a run may not
        return base
    return root


def experiment_points(runs: Sequence[ExperimentRun], base: Path) -> list[Point]:
    """Return the runs of an experiment as points of a sweep."""
    points = []
    for number, run in enumerate(runs, start=1):
        name = run.folder.path.relative_to(root_of(base)).as_posix()
        config = dataclasses.replace(run.config, run_name=name)
        settings = {key: value for key, value in flatten(config.to_dict()).items() if not key.startswith("population.")}
        points.append(
            Point(number=number, settings=settings, config=config, name=name, job="icl diversity", trains=True)
        )
    return points


def experiment_states(runs: Sequence[ExperimentRun], base: Path) -> dict[str, PointState]:
    """Return the state of every run of an experiment, as a dict whose keys are the values of M as strings."""
    points = experiment_points(runs, base)
    return {run.label: point_state(point, root_of(base)) for run, point in zip(runs, points, strict=True)}


def shared_settings(run: ExperimentRun) -> dict[str, Any]:
    """Return the settings that all runs share, as a dict with dotted keys that `--config` can read."""
    return {key: value for key, value in flatten(run.config.to_dict()).items() if key not in RESERVED}


def run_job(
    runs: Sequence[ExperimentRun], *, base: Path, max_power: int, retry: bool, job: SlurmJob
) -> tuple[SweepResult, Metadata]:
    """Train runs in a Slurm job until no run is left, a signal arrives or the time limit is near."""
    remove_temporaries(base)
    about = {"max_power": max_power, "base_checkpoint_dir": str(base), "pid": None, "host": "Slurm"}
    metadata = Metadata(base, runs, about=about)

    def say(line: str) -> None:
        print_at_once(line)
        _update(metadata, experiment_states(runs, base))

    sweep = SweepFile(path=base, method="grid", parameters=(), command=_COMMAND)
    result = run_sweep(sweep, experiment_points(runs, base), root_of(base), retry=retry, job=job, say=say)
    states = experiment_states(runs, base)
    _update(metadata, states)
    if result.is_over:
        failed = [label for label, state in states.items() if state.state == "failed"]
        reason = f"failed: M = {', '.join(failed)}" if failed else None
        with contextlib.suppress(StorageError):
            metadata.end(state="failed" if failed else "finished", reason=reason)
    return result, metadata


def _update(metadata: Metadata, states: dict[str, PointState]) -> None:
    with contextlib.suppress(StorageError):  # the file is only for information
        metadata.update_states({label: (state.state, state.reason) for label, state in states.items()})
