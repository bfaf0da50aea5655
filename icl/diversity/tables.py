"""The numbers of a task-diversity experiment as one tidy table, and its figure.

A row is a number with its standard error: of a model (`loss`, `delta_ridge`, `delta_dmmse`, ...) or of a baseline, under its
name (`ridge`, `dmmse`, ...), for one M, one step and one distribution of prompts. A baseline has no step; its rows stand
beside those of every step, so that any selection by M and step is complete.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from tqdm import tqdm

from icl.checkpoints import CheckpointError, checkpoint_files
from icl.plotting.diversity import plot_diversity
from icl.plotting.style import save_figure
from icl.run_evaluation import RunEvaluator
from icl.runs import RunFolder
from icl.storage import plain_rows, write_atomically

COLUMNS = ("num_tasks", "step", "checkpoint_hash", "distribution", "quantity", "position", "value", "stderr")


class Evaluation(NamedTuple):
    """The table, and why the runs that are not in it are not."""

    table: pd.DataFrame
    problems: dict[str, str]
    """By M."""


def evaluate_experiment(
    runs: Mapping[str, RunFolder],
    *,
    num_prompts: int | None = None,
    num_ood_prompts: int | None = None,
    all_steps: bool = False,
    shifts: Sequence[str] | None = None,
) -> Evaluation:
    """Evaluate the last checkpoint of every run, or all of them, in and out of distribution.

    Args:
        runs: By M as text; `icl.diversity.runs.find_runs`.
        num_prompts: Prompts on the training tasks; left out, each run's `evaluation.num_prompts`.
        num_ood_prompts: Prompts of every other set; left out, as `num_prompts`.
        all_steps: Every saved step, not only the last.
        shifts: Names from `icl.tasks.shifts.SHIFTS`; left out, all that fit.

    Raises:
        ConfigError: If a number of prompts is too small.
    """
    evaluate = RunEvaluator(num_prompts=num_prompts, num_ood_prompts=num_ood_prompts, shifts=shifts)
    tables: list[pd.DataFrame] = []
    problems: dict[str, str] = {}
    with tqdm(runs.items(), desc="evaluating", unit="run", disable=len(runs) == 1) as bar:
        for label, folder in bar:
            bar.set_postfix_str(f"M={label}", refresh=False)
            try:
                numbers, baselines = evaluate(folder.path if all_steps else checkpoint_files(folder.path)[-1])
            except CheckpointError as error:
                problems[label] = str(error)
                continue
            steps = numbers[["step", "checkpoint_hash"]].drop_duplicates()
            both = pd.concat([numbers, steps.merge(baselines, how="cross")])
            tables.append(both.sort_values("step", kind="stable").assign(num_tasks=label))
    table = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=COLUMNS)
    return Evaluation(table[list(COLUMNS)], problems)


def save_tables(table: pd.DataFrame, path: Path) -> list[Path]:
    """Write a table as JSON (a list of records) and as CSV, side by side under one stem.

    Raises:
        StorageError: If a file cannot be written.
    """
    texts = {
        ".json": json.dumps(plain_rows(table), indent=1, allow_nan=False) + "\n",
        ".csv": table.to_csv(index=False),
    }
    files = [path.with_suffix(suffix) for suffix in texts]
    for file, text in zip(files, texts.values(), strict=True):
        write_atomically(file, text.encode())
    return files


def draw_experiment(runs: Mapping[str, RunFolder], plots: Path, *, title: str) -> list[Path]:
    """The figure of the last checkpoints, `diversity.png`, and its numbers, `diversity.csv`.

    Raises:
        CheckpointError: If a run has no usable checkpoint.
        StorageError: If a file cannot be written.
    """
    table, problems = evaluate_experiment(runs, shifts=())
    if problems:
        raise CheckpointError("; ".join(problems.values()))
    write_atomically(plots / "diversity.csv", table.to_csv(index=False).encode())
    return [save_figure(plot_diversity(table, title=title), plots / "diversity.png"), plots / "diversity.csv"]
