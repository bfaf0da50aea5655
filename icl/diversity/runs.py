"""The runs of a task-diversity experiment: one run for each number of tasks M.

The run with M = 8 has the folder `checkpoints_M8/` in the experiment's folder. The M tasks of a run are the first M tasks of every run
that has more tasks. Prompts, initial weights and new tasks come from the same random streams in all runs. So differences between runs are
due to M.
"""

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from icl.config import RunConfig, config_differences
from icl.config.validation import ConfigError, parse_num_tasks
from icl.runs.folder import RunError, RunFolder

METADATA = "experiment_metadata.json"
MAX_POWER = 30
"""Largest exponent p of M = 2^p. M must be below 2^31."""


class ExperimentRun(NamedTuple):
    """A run of an experiment, with one value of the task diversity M."""

    config: RunConfig
    folder: RunFolder

    @property
    def label(self) -> str:
        """M as a string, such as `8` or `inf`."""
        return num_tasks_label(self.config.task.num_tasks)


def num_tasks_label(num_tasks: int | float) -> str:
    """Return M as a string, such as `1024` or `inf`."""
    return "inf" if num_tasks == math.inf else str(num_tasks)


def experiment_runs(config: RunConfig, *, max_power: int, base: Path) -> list[ExperimentRun]:
    """Return the runs with M = 2, 4, 8, ..., 2^max_power and infinity, in this order.

    Args:
        config: Settings of all runs. `task.num_tasks` (M) is replaced.
        max_power: The largest finite M is 2^max_power.
        base: Folder of the experiment.

    Raises:
        ConfigError: If `max_power` is out of range, or if a run would need several processes.
    """
    if not 1 <= max_power <= MAX_POWER:
        raise ConfigError(f"`--max_power` must be a whole number from 1 to {MAX_POWER}, got {max_power}.")
    if config.trainer.num_processes > 1:
        raise ConfigError(
            "The experiment trains its runs in one process on one device, but `trainer.devices` x `trainer.num_nodes` is "
            f"{config.trainer.num_processes}. Leave both at 1, or train runs side by side with "
            "`icl sweep sweeps/training-runs/icr-diversity.yaml --workers N`."
        )
    runs = []
    for num_tasks in (*(2**power for power in range(1, max_power + 1)), math.inf):
        task = dataclasses.replace(config.task, num_tasks=num_tasks)
        runs.append(ExperimentRun(dataclasses.replace(config, task=task), run_folder(base, num_tasks)))
    return runs


def run_folder(base: Path, num_tasks: int | float) -> RunFolder:
    """Return the folder of the run with this M."""
    return RunFolder(base / f"checkpoints_M{num_tasks_label(num_tasks)}")


def find_runs(base: Path) -> dict[str, RunFolder]:
    """Return the runs in an experiment's folder, in the order of M. The keys of the dict are the values of M as strings.

    Raises:
        RunError: If the folder contains no run.
    """
    matches = (re.fullmatch(r"checkpoints_M(\d+|inf)", path.name) for path in base.glob("checkpoints_M*"))
    diversities = sorted(parse_num_tasks(match[1]) for match in matches if match and match[1] != "0")
    runs = {num_tasks_label(num_tasks): run_folder(base, num_tasks) for num_tasks in diversities}
    if not runs:
        raise RunError(
            f"{base} contains no task-diversity experiment: expected folders such as checkpoints_M8, which `icl diversity` makes."
        )
    return runs


def require_same_settings(runs: list[ExperimentRun], base: Path) -> None:
    """Check that all runs that have started have the settings of the experiment.

    Raises:
        ConfigError: If a run has other settings. The message names the run and the differences.
    """
    for run in runs:
        try:
            old = run.folder.read_config()
        except ConfigError:  # the run has not started, or is damaged; training it reports the damage
            continue
        changed = config_differences(old, run.config)
        if changed:
            raise ConfigError(
                f"{run.folder.path} was started with other settings: {'; '.join(changed)}. Use the old settings to continue "
                f"the experiment in {base}, or choose another --base_checkpoint_dir for the new experiment."
            )


@contextlib.contextmanager
def lock_experiment(base: Path) -> Iterator[None]:
    """Lock an experiment for this process while the context is open. If the process dies, the system releases the lock.

    Raises:
        RunError: If another process holds the lock.
        StorageError: If the folder cannot be written.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(RunFolder(base).lock())
        except RunError:
            raise RunError(
                f"Another process is training the experiment in {base} (see `icl runs {base}`). Wait until it ends, or choose "
                "another --base_checkpoint_dir."
            ) from None
        yield
