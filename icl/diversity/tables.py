"""The numbers of a task-diversity experiment as one tidy table, and the experiment's figure.

Each row has one number and its standard error, for one M, one step and one distribution of prompts. The column
`quantity` says what the number is. For a model, it is `loss`, `delta_ridge`, `delta_dmmse` and so on. For the loss of a
baseline, it is the baseline's name, such as `ridge`. Baselines do not depend on the step. Their rows are repeated at
every step, so that a selection by M and step includes the baselines.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from icl.files.writing import plain_rows, write_atomically
from icl.plotting.diversity import plot_diversity
from icl.plotting.style import save_figure
from icl.progress import progress_bar
from icl.runs.checkpoints import CheckpointError, checkpoint_files
from icl.runs.folder import RunFolder
from icl.whole_runs import RunEvaluator

COLUMNS = ("num_tasks", "step", "checkpoint_hash", "distribution", "quantity", "position", "value", "stderr", "prompts")


class Evaluation(NamedTuple):
    """The table of an experiment, and the runs that are missing from it."""

    table: pd.DataFrame
    problems: dict[str, str]
    """The reason why each missing run could not be evaluated, by its M as text."""


def evaluate_experiment(
    runs: Mapping[str, RunFolder],
    *,
    num_prompts: int | None = None,
    num_ood_prompts: int | None = None,
    all_steps: bool = False,
    shifts: Sequence[str] | None = None,
) -> Evaluation:
    """Evaluate the last checkpoint of every run, or all checkpoints, in and out of distribution.

    Args:
        runs: Folders of the runs by M as text, from `icl.diversity.runs.find_runs`.
        num_prompts: Number of prompts from the training tasks. The default is each run's `evaluation.num_prompts`.
        num_ood_prompts: Number of prompts from each other distribution. The default is `num_prompts`.
        all_steps: Whether to evaluate all saved steps instead of only the last one.
        shifts: Names of shifts in `icl.tasks.shifts.SHIFTS`. The default is all shifts that the runs' D and K allow.

    Raises:
        ConfigError: If a number of prompts is too small.
    """
    evaluate = RunEvaluator(num_prompts=num_prompts, num_ood_prompts=num_ood_prompts, shifts=shifts)
    tables: list[pd.DataFrame] = []
    problems: dict[str, str] = {}
    with progress_bar("evaluating", len(runs), "run", disable=len(runs) == 1) as bar:
        for label, folder in runs.items():
            bar.set_postfix_str(f"M={label}", refresh=False)
            bar.update()
            try:
                numbers, baselines = evaluate(folder.path if all_steps else checkpoint_files(folder.path)[-1])
            except CheckpointError as error:
                problems[label] = str(error)
                continue
            steps = numbers[["step", "checkpoint_hash"]].drop_duplicates()
            rows = pd.concat([numbers, steps.merge(baselines, how="cross")])
            tables.append(rows.sort_values("step", kind="stable").assign(num_tasks=label))
    table = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=COLUMNS)
    return Evaluation(table[list(COLUMNS)], problems)


def save_tables(table: pd.DataFrame, path: Path) -> list[Path]:
    """Write a table as JSON (a list of records) and as CSV. Return both paths, which differ only in their suffix.

    Raises:
        StorageError: If a file cannot be written.
    """
    json_file, csv_file = path.with_suffix(".json"), path.with_suffix(".csv")
    write_atomically(json_file, (json.dumps(plain_rows(table), indent=1, allow_nan=False) + "\n").encode())
    write_atomically(csv_file, table.to_csv(index=False).encode())
    return [json_file, csv_file]


def draw_experiment(runs: Mapping[str, RunFolder], plots: Path, *, title: str) -> list[Path]:
    """Draw `diversity.png` from the last checkpoints, write its numbers to `diversity.csv`, and return both paths.

    Raises:
        CheckpointError: If a run has no usable checkpoint.
        StorageError: If a file cannot be written.
    """
    table, problems = evaluate_experiment(runs, shifts=())
    if problems:
        raise CheckpointError("; ".join(problems.values()))
    write_atomically(plots / "diversity.csv", table.to_csv(index=False).encode())
    return [save_figure(plot_diversity(table, title=title), plots / "diversity.png"), plots / "diversity.csv"]
