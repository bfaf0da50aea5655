"""Whole runs evaluated: every saved step of one run or of many, in and out of distribution, and the tables they become.

What a checkpoint gave is kept in the run's `results/evaluation/`, so nothing is computed twice. Prompts and their
baselines are made once for all runs that share them: of the same sizes, noise, tasks and evaluation seed, and of a shift
whatever M is. On a CPU dMMSE at large M costs more than all the models.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from icl.analysis.run import Members, over_checkpoints, torch_device
from icl.checkpoints import checkpoint_files, load_checkpoint_file
from icl.compiling import keep_freed_memory
from icl.config import RunConfig, SeedsConfig, TaskConfig
from icl.evaluation import VERSION, EvaluationSet, evaluate, evaluate_baselines, evaluation_set
from icl.measure import Measurement, entry_rows
from icl.runs import run_of
from icl.stacked import apply
from icl.storage import plain_rows, table_format, write_atomically
from icl.tasks.shifts import SHIFTS, available_shifts, require_shift
from icl.validation import ConfigError, whole

_SETS_KEPT = 64
"""Those of about three runs: runs that share theirs usually follow each other."""


class RunEvaluator:
    """Evaluates one run after another; sets of prompts and baselines that they share are made once.

    Example:
        evaluate = RunEvaluator(num_prompts=4096)
        tables = {run: evaluate(run) for run in ("runs/a", "runs/b")}
    """

    def __init__(
        self,
        *,
        num_prompts: int | None = None,
        num_ood_prompts: int | None = None,
        shifts: Sequence[str] | None = None,
        bar: Any = None,
    ) -> None:
        """What to ask of every run.

        Args:
            num_prompts: Prompts per set; left out, each run's `evaluation.num_prompts`.
            num_ood_prompts: Prompts of every set but the training tasks' (`pretrain`); left out, `num_prompts`.
            shifts: Names from `icl.tasks.shifts.SHIFTS`; left out, all that fit the run's D and K.
            bar: A progress bar over the checkpoints of all runs; left out, each run has its own.

        Raises:
            ConfigError: If a number of prompts is too small.
        """
        if num_prompts is not None:
            num_prompts = whole("num_prompts", num_prompts, 2)
        if num_ood_prompts is not None:
            num_ood_prompts = whole("num_ood_prompts", num_ood_prompts, 2)
        if isinstance(shifts, str):
            raise ConfigError(f"`shifts` must be a list of names, got {shifts!r}.")
        for name in shifts or ():
            require_shift(name)
        keep_freed_memory()
        self.num_prompts, self.num_ood_prompts, self.shifts, self.bar = num_prompts, num_ood_prompts, shifts, bar
        self._set = lru_cache(maxsize=_SETS_KEPT)(partial(_make_set, torch_device()))

    def __call__(self, path: str | Path) -> tuple[pd.DataFrame, pd.DataFrame]:
        """What `evaluate_run` returns."""
        config = load_checkpoint_file(checkpoint_files(path)[0]).config
        asked = self._asked(config)
        sets = [self._set_of(config, "pretrain", asked.num_prompts)]
        sets += [self._set_of(config, name, asked.num_ood_prompts) for name in asked.distributions]

        def measure(members: Members) -> list[Measurement]:
            predict = partial(apply, members.config.model)
            return [Measurement(rows) for rows in evaluate(predict, members.params, sets)]

        entries, _ = over_checkpoints("evaluation", Path(path), asked, measure, version=VERSION, bar=self.bar)
        return pd.DataFrame(entry_rows(entries)), pd.DataFrame(evaluate_baselines(sets))

    def _asked(self, config: RunConfig) -> "_Asked":
        num_prompts = config.evaluation.num_prompts if self.num_prompts is None else self.num_prompts
        return _Asked(
            num_prompts=num_prompts,
            num_ood_prompts=num_prompts if self.num_ood_prompts is None else self.num_ood_prompts,
            distributions=("true", *(available_shifts(config) if self.shifts is None else self.shifts)),
        )

    def _set_of(self, config: RunConfig, name: str, num_prompts: int) -> EvaluationSet:
        """By what a set depends on alone, so that runs which differ in something else share it."""
        task, seeds = config.task, SeedsConfig(tasks=config.seeds.tasks, evaluation=config.seeds.evaluation)
        if name in SHIFTS:  # of new tasks, and without dMMSE
            task, seeds = dataclasses.replace(task, num_tasks=math.inf), dataclasses.replace(seeds, tasks=0)
        return self._set(task, seeds, name, num_prompts)


def evaluate_run(
    path: str | Path,
    *,
    num_prompts: int | None = None,
    num_ood_prompts: int | None = None,
    shifts: Sequence[str] | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Evaluate every saved step of a run, or one checkpoint, in and out of distribution.

    Checkpoints are evaluated many at a time, as a population. A run's are kept in `results/evaluation/` as they are done:
    interrupted, the same call goes on, and of a run that was trained further only the new steps are evaluated. Many runs
    are faster one after another by one `RunEvaluator`, which shares their prompts and baselines.

    Args:
        path: A run's folder or a checkpoint file.
        num_prompts: Prompts per set; left out, the run's `evaluation.num_prompts`.
        num_ood_prompts: Prompts of every set but the training tasks' (`pretrain`); left out, `num_prompts`.
        shifts: Names from `icl.tasks.shifts.SHIFTS`; left out, all that fit the run's D and K.

    Returns:
        A row per number (step, checkpoint_hash, distribution, quantity, position, value, stderr), and the same without
        step for the baselines' losses.

    Raises:
        CheckpointError: If there is no usable checkpoint, or the checkpoints are of different models.
        ConfigError: If a number of prompts is too small.
    """
    return RunEvaluator(num_prompts=num_prompts, num_ood_prompts=num_ood_prompts, shifts=shifts)(path)


def save_evaluation(
    path: str | Path, numbers: pd.DataFrame, baselines: pd.DataFrame, *, out: Path | None = None
) -> list[tuple[str, Path]]:
    """Write what `evaluate_run` returned, and its figure.

    A run's numbers go to `results/evaluation.csv` and `results/baselines.csv`, its figure to `figures/evaluation.png`;
    those of one checkpoint only to `out`.

    Args:
        path: What was evaluated.
        numbers: The first table.
        baselines: The second table.
        out: Also a file of one's own, as of `write_numbers`.

    Returns:
        A label and the path of every file written.

    Raises:
        StorageError: If `out` has another suffix, or a file cannot be written.
    """
    from icl.plotting.evaluation import plot_evaluation
    from icl.plotting.style import save_figure

    written = [] if out is None else [("Output", write_numbers(Path(out), numbers, baselines))]
    if Path(path).is_dir():
        run = run_of(path)
        written.append(("Numbers", run.write_result("evaluation.csv", numbers.to_csv(index=False))))
        written.append(("Baselines", run.write_result("baselines.csv", baselines.to_csv(index=False))))
        figure = plot_evaluation(numbers, baselines, title=run.path.name)
        written.append(("Figure", save_figure(figure, run.figures / "evaluation.png")))
    return written


def write_numbers(out: Path, numbers: pd.DataFrame, baselines: pd.DataFrame) -> Path:
    """Write the first table of `evaluate_run` as .csv, or both as .json.

    Raises:
        StorageError: If `out` has another suffix, or cannot be written.
    """
    if table_format(out) == "csv":
        text = numbers.to_csv(index=False)
    else:
        tables = {"evaluation": plain_rows(numbers), "baselines": plain_rows(baselines)}
        text = json.dumps(tables, indent=1, allow_nan=False) + "\n"
    write_atomically(out, text.encode())
    return out


def headline_table(table: pd.DataFrame, *, by: str) -> pd.DataFrame:
    """Loss and gaps of the last step of every run, on the training tasks and on new ones: a row per run.

    Args:
        table: Numbers of several runs.
        by: The column that tells them apart.
    """
    last = table[table["step"] == table.groupby(by)["step"].transform("max")]
    wanted = last[
        (last["position"] == "mean")
        & last["distribution"].isin(["pretrain", "true"])
        & last["quantity"].isin(["loss", "delta_dmmse", "delta_ridge"])
    ]
    means = wanted.pivot(index=[by, "step"], columns=["distribution", "quantity"], values="value")
    in_order = pd.MultiIndex.from_frame(wanted[[by, "step"]].drop_duplicates())
    return means.sort_index(axis=1).reindex(in_order)


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """What numbers of a checkpoint depend on, beside the run."""

    num_prompts: int
    num_ood_prompts: int
    distributions: tuple[str, ...]


def _make_set(device: torch.device, task: TaskConfig, seeds: SeedsConfig, name: str, num_prompts: int) -> EvaluationSet:
    return evaluation_set(RunConfig(task=task, seeds=seeds), name, num_prompts=num_prompts, device=device)
