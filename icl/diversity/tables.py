"""The numbers of a task-diversity experiment as one tidy table, and the experiment's figure.

Each row has one measured value and its standard error, for one number of tasks M, one step and one distribution of prompts. The column
`quantity` says what the value is. For a model, it is `loss`, `delta_ridge`, `delta_dmmse` and so on. For the loss of a baseline, it is
the baseline's name, such as `ridge`. Baselines do not depend on the step, but their rows are repeated at every step. So a selection by
M and step includes the baselines.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from icl.analysis.seeds import pool
from icl.config import config_differences
from icl.config.validation import ConfigError, UserError
from icl.diversity.threshold import thresholds
from icl.files.writing import plain_rows, write_atomically
from icl.plotting.diversity import plot_diversity
from icl.plotting.style import save_figure
from icl.progress import progress_bar
from icl.runs.checkpoints import CheckpointError, checkpoint_files
from icl.runs.folder import RunFolder
from icl.whole_runs import PROMPTS, RunEvaluator

COLUMNS = ("num_tasks", "step", "checkpoint_hash", "distribution", "quantity", "position", "value", "stderr", "prompts")


class Evaluation(NamedTuple):
    """The table of an experiment, and the runs that are missing from it."""

    table: pd.DataFrame
    problems: dict[str, str]
    """The reason why each missing run could not be evaluated. The keys are the values of M as strings."""


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
        runs: Folders of the runs, keyed by M as a string, from `icl.diversity.runs.find_runs`.
        num_prompts: Number of prompts from the training tasks. The default is each run's `evaluation.num_prompts`.
        num_ood_prompts: Number of prompts from each other distribution. The default is `num_prompts`.
        all_steps: Whether to evaluate all saved steps instead of only the last one.
        shifts: Names of shifts in `icl.tasks.shifts.SHIFTS`. The default is all shifts that the runs' D and K allow.

    Raises:
        ConfigError: If a number of prompts is too small.
    """
    evaluator = RunEvaluator(num_prompts=num_prompts, num_ood_prompts=num_ood_prompts, shifts=shifts)
    table, problems = evaluate_seeds({"": runs}, evaluator, all_steps=all_steps)
    return Evaluation(table[list(COLUMNS)], {label: problem for (_, label), problem in problems.items()})


def evaluate_seeds(
    experiments: Mapping[str, Mapping[str, RunFolder]], evaluator: RunEvaluator, *, all_steps: bool = False
) -> tuple[pd.DataFrame, dict[tuple[str, str], str]]:
    """Evaluate several experiments that differ only in their seeds.

    Args:
        experiments: The runs of each experiment. The keys are the experiments' names; the keys of the inner dicts are M as a string.
        evaluator: Function that evaluates a run. It shares prompts and baselines between the experiments.
        all_steps: See `evaluate_experiment`.

    Returns:
        Two values. The first is the table, with the name of the experiment in the column `run`. The second is a dict with the
        reason why each missing run could not be evaluated. Its keys are pairs of the experiment's name and M as a string.
    """
    tables: list[pd.DataFrame] = []
    problems: dict[tuple[str, str], str] = {}
    labels = sorted({label for runs in experiments.values() for label in runs}, key=float)
    runs = [(name, label, own[label]) for label in labels for name, own in experiments.items() if label in own]
    with progress_bar("evaluating", len(runs), "run", disable=len(runs) == 1) as bar:
        for name, label, folder in runs:
            bar.set_postfix_str(f"M={label}", refresh=False)
            bar.update()
            try:
                numbers, baselines = evaluator(folder.path if all_steps else checkpoint_files(folder.path)[-1])
            except UserError as error:
                problems[name, label] = str(error)
                continue
            steps = numbers[["step", "checkpoint_hash"]].drop_duplicates()
            rows = pd.concat([numbers, steps.merge(baselines, how="cross")])
            tables.append(rows.sort_values("step", kind="stable").assign(num_tasks=label, run=name))
    table = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=["run", *COLUMNS])
    return table[["run", *COLUMNS]], problems


def pool_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """Pool the numbers at the last step of every M over the experiments in the column `run` (`icl.analysis.seeds.pool`)."""
    last = table[table["step"] == table.groupby(["run", "num_tasks"])["step"].transform("max")]
    return pool(last, by=["num_tasks", "distribution", "quantity", "position"]).assign(prompts=PROMPTS)


def require_same_experiment(experiments: Mapping[str, Mapping[str, RunFolder]]) -> None:
    """Check that experiments have the same settings, but different seeds.

    Raises:
        ConfigError: If two runs with the same M differ in a setting other than their seeds, or have the same seeds. The message names the
            experiments.
    """
    (first, runs), *others = experiments.items()
    for name, own in others:
        for label in runs.keys() & own.keys():
            one, other = runs[label].read_config(), own[label].read_config()
            differences = config_differences(dataclasses.replace(one, seeds=other.seeds), other)
            if differences or one.seeds == other.seeds:
                what = "; ".join(differences) or "no setting"
                raise ConfigError(
                    f"{first} and {name} must differ only in their seeds, but for M = {label} they differ in {what}."
                )


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
    figure = plot_diversity(table, title=title, thresholds=thresholds(table.assign(run="")))
    return [save_figure(figure, plots / "diversity.png"), plots / "diversity.csv"]
