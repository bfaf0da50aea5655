"""The training tasks of an imported run, in `checkpoints/tasks.safetensors`.

An imported run was trained by an older code base. The file contains one table, with the tasks on which the older code trained the run.
The run's settings contain the digest of this table (`task.imported_tasks`). When `icl` reads the run's checkpoints or settings, it
also reads the table. So prompts of the training tasks, dMMSE and the mean task all use the tasks in the table.
"""

from pathlib import Path

import safetensors.torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor

from icl.config import RunConfig
from icl.config.validation import UserError
from icl.files.reading import ContentError, first_line, read_bytes
from icl.files.writing import write_atomically
from icl.tasks.priors import is_known, keep_table, table_digest

NAME = "tasks.safetensors"
MAX_TASKS_FILE = 2**32
"""Largest size of the file in bytes."""
_KEY = "tasks"


class TasksError(UserError, ValueError):
    """Raised if a table of tasks cannot be used. The message says why."""


def write_tasks(folder: Path, table: Float[Tensor, "M D"]) -> str:
    """Write a table of tasks into a folder of checkpoints, and return its digest."""
    write_atomically(folder / NAME, safetensors.torch.save({_KEY: table.contiguous()}))
    return keep_table(table)


def parse_tasks(data: bytes, where: str) -> Float[Tensor, "M D"]:
    """Return the table of tasks from the bytes of its file.

    Raises:
        TasksError: If the file is damaged, or is not a table of tasks.
    """
    try:
        table = safetensors.torch.load(data).get(_KEY)
    except SafetensorError as error:
        raise TasksError(
            f"The table of tasks {where} is damaged ({first_line(error)}). Import the run again with `icl import`."
        ) from None
    if table is None or table.ndim != 2 or not table.is_floating_point():
        raise TasksError(
            f"{where} is not a table of tasks; `icl import` writes such a table with the run's checkpoints."
        )
    return table


def remember_tasks(folder: Path, config: RunConfig) -> None:
    """Read the table of an imported run from its folder of checkpoints, unless it was read before.

    Runs that `icl` trained have no table. If the file is missing, no error is raised here, but later work that needs the tasks fails.

    Raises:
        TasksError: If the file is damaged, or its digest differs from the one in the run's settings.
    """
    digest = config.task.imported_tasks
    if digest in (None, "unknown") or is_known(str(digest)):
        return
    file = folder / NAME
    try:
        table = parse_tasks(read_bytes(file, limit=MAX_TASKS_FILE), str(file))
    except FileNotFoundError:
        return
    except (OSError, ContentError) as error:
        raise TasksError(f"The table of tasks {file} cannot be read: {first_line(error)}.") from None
    if table_digest(table) != digest:
        raise TasksError(
            f"{file} was altered or belongs to another run: its digest differs from `task.imported_tasks` in the run's settings. "
            "Import the run again with `icl import`."
        )
    keep_table(table)
