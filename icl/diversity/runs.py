"""The runs of a task-diversity experiment: one for each M, in a folder of its own below the experiment's.

`<base>/checkpoints_M8/` *is* the folder of the run with M = 8. The runs differ in M alone; their task pools are nested,
and everything else that is drawn (prompts, initial weights, new tasks) is the same, so they can be compared M by M.
"""

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from icl.config import RunConfig
from icl.runs import RunError, RunFolder, config_differences
from icl.validation import ConfigError, parse_num_tasks

DEFAULT_BASE = "checkpoints"
METADATA = "experiment_metadata.json"
MAX_POWER = 30
"""M is below 2^31."""


class ExperimentRun(NamedTuple):
    """The run of one M."""

    config: RunConfig
    folder: RunFolder

    @property
    def label(self) -> str:
        """M as text: `8`, `inf`."""
        return num_tasks_label(self.config.task.num_tasks)


def num_tasks_label(num_tasks: int | float) -> str:
    """M as text, such as `1024` or `inf`."""
    return "inf" if num_tasks == math.inf else str(num_tasks)


def experiment_runs(config: RunConfig, *, max_power: int, base: Path) -> list[ExperimentRun]:
    """The runs of M = 2^1 .. 2^max_power and infinity, in that order.

    Args:
        config: Everything but M.
        max_power: The largest finite M is two to this power.
        base: The experiment's folder.

    Raises:
        ConfigError: If `max_power` is out of range, or one run would need several processes.
    """
    if not 1 <= max_power <= MAX_POWER:
        raise ConfigError(f"`--max_power` must be a whole number from 1 to {MAX_POWER}, got {max_power}.")
    if config.trainer.devices * config.trainer.num_nodes > 1:
        raise ConfigError(
            "The experiment trains its runs in one process on one device, but `trainer.devices` x `trainer.num_nodes` is "
            f"{config.trainer.devices * config.trainer.num_nodes}; leave them at 1, or run the same settings by "
            "`icl sweep sweeps/training-runs/icr-diversity.yaml --workers N`."
        )
    diversities = [*(2**power for power in range(1, max_power + 1)), math.inf]
    configs = [
        dataclasses.replace(config, task=dataclasses.replace(config.task, num_tasks=num_tasks))
        for num_tasks in diversities
    ]
    return [ExperimentRun(own, run_folder(base, own.task.num_tasks)) for own in configs]


def run_folder(base: Path, num_tasks: int | float) -> RunFolder:
    """The folder of one M."""
    return RunFolder(base / f"checkpoints_M{num_tasks_label(num_tasks)}")


def find_runs(base: Path) -> dict[str, RunFolder]:
    """The runs that an experiment's folder holds, by M as text, in the order of M.

    Raises:
        RunError: If it holds none.
    """
    names = (re.fullmatch(r"checkpoints_M(\d+|inf)", path.name) for path in base.glob("checkpoints_M*"))
    diversities = sorted(parse_num_tasks(match[1]) for match in names if match and match[1] != "0")
    runs = {num_tasks_label(num_tasks): run_folder(base, num_tasks) for num_tasks in diversities}
    if not runs:
        raise RunError(
            f"{base} holds no task-diversity experiment: expected folders such as checkpoints_M8; `icl diversity` makes them."
        )
    return runs


def require_same_settings(runs: list[ExperimentRun], base: Path) -> None:
    """Refuse to mix runs of other settings into an experiment.

    Raises:
        ConfigError: Naming the first run that was begun with others, and the differences.
    """
    for run in runs:
        try:
            old = run.folder.read_config()
        except ConfigError:  # not begun, or damaged: training says so of this run alone
            continue
        changed = config_differences(old, run.config)
        if changed:
            raise ConfigError(
                f"{run.folder.path} was begun with other settings: {'; '.join(changed)}. Use the old ones to go on with "
                f"the experiment in {base}, or give the new one its own --base_checkpoint_dir."
            )


@contextlib.contextmanager
def holding(base: Path) -> Iterator[None]:
    """Hold an experiment for this process; the system lets go of it when the process dies.

    Raises:
        RunError: If another process holds it.
        StorageError: If the folder cannot be written.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(RunFolder(base).lock())
        except RunError:
            raise RunError(
                f"Another process runs the experiment in {base} (`icl runs {base}` shows it); wait for it, or give this one "
                "another --base_checkpoint_dir."
            ) from None
        yield
