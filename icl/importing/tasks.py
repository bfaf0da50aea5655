"""The training tasks of an imported run: from a file, drawn again from the older code's seed, or unknown."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from icl.config import RunConfig
from icl.config.validation import ConfigError
from icl.files.reading import ContentError, first_line, read_bytes
from icl.importing.formats import Format
from icl.importing.pickles import OlderFileError, read_pickle
from icl.runs.tasks_file import MAX_TASKS_FILE

WORDS = ("recompute", "unknown")
_KEYS = ("tasks", "task_pool")
"""Names under which a file may contain the table of tasks."""


def choose_tasks(
    choice: str | None, tree: Any, source: Format, config: RunConfig, *, is_seed_given: bool
) -> tuple[Float[Tensor, "M D"] | None, str]:
    """Return the table of the run's M training tasks, and a phrase that says where it comes from.

    Args:
        choice: A file, `recompute`, `unknown`, or None if the user did not choose.
        tree: Content of a file of the run, which may contain the table.
        source: The code base.
        config: The run's settings.
        is_seed_given: Whether the user's options or the run's files contain the seed of the tasks.

    Returns:
        Two values: the table, or None if the run has the Gaussian prior or the tasks remain unknown; and the phrase.

    Raises:
        ConfigError: If the user has to choose, or the choice is impossible.
        OlderFileError: If the file cannot be used.
    """
    if config.task.is_gaussian:
        if choice is not None:
            raise ConfigError(
                "`--tasks` has no effect if M = inf, because the tasks are drawn from N(0, I); leave out `--tasks`."
            )
        return None, "from N(0, I)"
    size = 4 * int(config.task.num_tasks) * config.task.task_size
    if choice != "unknown" and size > MAX_TASKS_FILE:
        raise ConfigError(
            f"The table of M = {int(config.task.num_tasks):,} tasks would have {size:,} bytes, and the limit is {MAX_TASKS_FILE:,}. "
            "Write --tasks unknown to import the run without its tasks and without dMMSE."
        )
    if choice == "unknown":
        return None, "unknown, so `pretrain` prompts and dMMSE are not available"
    inside = next((tree[key] for key in _KEYS if isinstance(tree, Mapping) and key in tree), None)
    if choice is None and isinstance(inside, Tensor):
        return _fitting(inside, config, "The checkpoint's table of tasks"), "saved in the checkpoint"
    if choice == "recompute" or (choice is None and source.tasks_seed is not None):
        if source.tasks_seed is None and not is_seed_given:
            raise ConfigError(
                "`--tasks recompute` needs the seed of the older run's tasks; give it as --seeds.tasks N."
            )
        if source.tasks_seed is not None and config.seeds.tasks != source.tasks_seed:
            raise ConfigError(
                f"`seeds.tasks` is {config.seeds.tasks}, but {source.about} always draws its tasks with seed {source.tasks_seed}; "
                "leave out `seeds.tasks`."
            )
        table = source.draw_tasks(tree, config)
        return table, f"drawn again with seed {config.seeds.tasks}, as in {source.about}"
    if choice is None:
        raise ConfigError(
            f"The files do not contain the run's {int(config.task.num_tasks):,} training tasks. Give the table with --tasks FILE, "
            "or draw it again with --tasks recompute --seeds.tasks N, or write --tasks unknown to import the run without dMMSE."
        )
    return _fitting(_read_table(Path(choice)), config, choice), f"from {choice}"


def _read_table(path: Path) -> Any:
    """Return the table in a .npy, .pt or .safetensors file."""
    try:
        if path.suffix == ".npy":
            return _read_numpy(path)
        if path.suffix == ".safetensors":
            tree: Any = load(read_bytes(path, limit=MAX_TASKS_FILE))
        elif path.suffix in (".pt", ".pth"):
            tree = read_pickle(path)
        else:
            raise ConfigError(
                f"`--tasks` must be recompute, unknown, or a .npy, .pt or .safetensors file, got {str(path)!r}."
            )
    except OSError as error:
        raise OlderFileError(
            f"The file of tasks {path} cannot be read: {error.strerror or error}. Give a readable file with --tasks."
        ) from None
    except (SafetensorError, ContentError, ValueError, TypeError, EOFError) as error:
        if isinstance(error, (ConfigError, OlderFileError)):
            raise
        raise OlderFileError(
            f"The file of tasks {path} cannot be read ({first_line(error)}). Copy or save it again."
        ) from None
    if isinstance(tree, Mapping):
        named = [tree[key] for key in _KEYS if key in tree] or list(tree.values())
        if len(named) != 1:
            raise OlderFileError(
                f"{path} must contain one table, or a table with the name `tasks`; it contains {len(named):,} tables. "
                "Save the table of tasks in a separate file."
            )
        return named[0]
    return tree


def _read_numpy(path: Path) -> Tensor:
    """Return the array in a .npy file."""
    data = read_bytes(path, limit=2 * MAX_TASKS_FILE)
    try:
        array = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except (
        Exception
    ) as error:  # damaged headers make NumPy raise many kinds of errors, such as MemoryError and tokenize.TokenError
        raise ContentError(first_line(error)) from None
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))


def _fitting(table: Any, config: RunConfig, name: str) -> Float[Tensor, "M D"]:
    """Return the first M rows of a table in float32, as (M, D). The table may also have the shape (M, D, 1)."""
    count, size = int(config.task.num_tasks), config.task.task_size
    if not isinstance(table, Tensor) or not table.is_floating_point():
        got = table.dtype if isinstance(table, Tensor) else type(table).__name__
        raise OlderFileError(f"{name} must be a table of {count:,} tasks with D = {size} real numbers each, got {got}.")
    table = table.squeeze(-1) if table.ndim == 3 and table.shape[-1] == 1 else table
    if table.ndim != 2 or table.shape[1] != size or len(table) < count:
        raise OlderFileError(
            f"{name} has shape {tuple(table.shape)}, but must contain {count:,} tasks of D = {size} numbers each."
        )
    table = table[:count].float().contiguous()
    if not table.isfinite().all():
        raise OlderFileError(f"{name} contains numbers that are not finite in 32 bits. Give a table of finite numbers.")
    return table
