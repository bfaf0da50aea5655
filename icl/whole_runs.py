"""Evaluate every saved step of one or many runs, in and out of distribution, and write the tables.

The results of each checkpoint are cached in the run's `results/evaluation/`, so nothing is computed twice. Runs with equal
sizes, noise, tasks and evaluation seed share their prompts and the baselines' predictions. Sets of out-of-distribution
prompts do not depend on M, so runs with different M share them too. This saves much time, because on a CPU, dMMSE at large M takes
longer than evaluating all models.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from icl.analysis.run import Members, over_checkpoints, torch_device
from icl.analysis.seeds import pool_runs, pooled_text, seed_groups
from icl.compute.calls import keep_freed_memory
from icl.config import ModelConfig, RunConfig, SeedsConfig
from icl.config.validation import ConfigError, whole
from icl.evaluation.predictors import Predict, compiled_apply, compiling_pays, predictor
from icl.evaluation.scores import VERSION, evaluate, evaluate_baselines
from icl.evaluation.sets import EvaluationSet, evaluation_set, set_names
from icl.files.writing import plain_rows, table_format, write_atomically
from icl.model.stacked import target_losses
from icl.runs.checkpoints import Checkpoint, checkpoint_files, load_checkpoint_file
from icl.runs.folder import run_of
from icl.runs.measure import Measurement, entry_rows
from icl.tasks.rows import TEST
from icl.tasks.shifts import SHIFTS, available_shifts, require_shift

PROMPTS = "report"
"""Value of the column `prompts` in our tables. It means the fixed prompts of `icl.evaluation.sets.REPORT`. A table without this column
comes from an older version, which evaluated on the prompts of training's own evaluations and of early stopping (`MONITOR`)."""
_HEADLINES = ("loss", "bayes_excess", "delta_dmmse", "delta_ridge")
_SETS_KEPT = 64
"""Number of evaluation sets kept in memory, enough for about three runs. Runs that share sets usually follow each other."""


class RunEvaluator:
    """Function object that evaluates several runs. Prompts and baselines that runs share are computed only once.

    Example:
        ```python
        evaluate = RunEvaluator(num_prompts=4096)
        tables = {run: evaluate(run) for run in ("runs/a", "runs/b")}
        ```
    """

    def __init__(
        self,
        *,
        num_prompts: int | None = None,
        num_ood_prompts: int | None = None,
        shifts: Sequence[str] | None = None,
        compiled: bool | None = None,
        bar: Any = None,
    ) -> None:
        """Set the options of the evaluation, which are the same for all runs.

        Args:
            num_prompts: Number of prompts per set; None uses each run's `evaluation.num_prompts`.
            num_ood_prompts: Number of prompts in each set except `pretrain` (the training tasks); None uses `num_prompts`.
            shifts: Names from `icl.tasks.shifts.SHIFTS`; None uses every shift that is possible for the run's D and K.
            compiled: Whether to compile the forward pass on a CPU; None compiles if a run has so much work that compiling saves time.
            bar: Progress bar over the checkpoints of all runs; None shows a separate bar for each run.

        Raises:
            ConfigError: If a number of prompts is below 2, or a shift is unknown.
        """
        if num_prompts is not None:
            num_prompts = whole("num_prompts", num_prompts, 2)
        if num_ood_prompts is not None:
            num_ood_prompts = whole("num_ood_prompts", num_ood_prompts, 2)
        if isinstance(shifts, str):
            raise ConfigError(f"`shifts` must be a list of names, got the string {shifts!r}.")
        for name in shifts or ():
            require_shift(name)
        keep_freed_memory()
        self.num_prompts, self.num_ood_prompts, self.shifts, self.bar = num_prompts, num_ood_prompts, shifts, bar
        self.compiled, self._compiled = compiled, dict[ModelConfig, Predict]()
        self._set = lru_cache(maxsize=_SETS_KEPT)(partial(_make_set, torch_device()))

    def __call__(self, path: str | Path) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Evaluate one run or checkpoint. Return the same two tables as `evaluate_run`."""
        files = checkpoint_files(path)
        first = load_checkpoint_file(files[0])
        config = first.config
        num_prompts = config.evaluation.num_prompts if self.num_prompts is None else self.num_prompts
        others = list(set_names(config)[1:])
        if self.shifts is not None:
            others += self.shifts
        elif not config.model.is_language:
            others += available_shifts(config)
        settings = _EvaluationSettings(
            num_prompts=num_prompts,
            num_ood_prompts=num_prompts if self.num_ood_prompts is None else self.num_ood_prompts,
            distributions=tuple(others),
        )

        sets = self._sets(config, settings, first.step if config.task.has_moving_pool else None)
        predict = self._predictor(first, sets, num_checkpoints=len(files))

        def measure(members: Members) -> list[Measurement]:
            model = members.config.model
            nll = partial(target_losses, model) if model.has_density else None
            score = partial(evaluate, predict, nll=nll)
            if not config.task.has_moving_pool:
                return [Measurement(rows) for rows in score(members.params, sets)]
            measured = []
            for index, checkpoint in enumerate(members.checkpoints):
                params = {name: tensor[index : index + 1] for name, tensor in members.params.items()}
                measured += score(params, self._sets(config, settings, checkpoint.step))
            return list(map(Measurement, measured))

        entries, _ = over_checkpoints("evaluation", Path(path), settings, measure, version=VERSION, bar=self.bar)
        last = entries[-1].step if config.task.has_moving_pool else None
        numbers = pd.DataFrame(entry_rows(entries))
        references = pd.DataFrame(evaluate_baselines(self._sets(config, settings, last)))
        return numbers.assign(prompts=PROMPTS), references.assign(prompts=PROMPTS)

    def _predictor(self, first: Checkpoint, sets: Sequence[EvaluationSet], *, num_checkpoints: int) -> Predict:
        """Return the function that computes the predictions of a run's checkpoints, compiled if the user chose this or if it saves time."""
        model, compiled = first.config.model, self.compiled
        if compiled is None:
            num_params = sum(tensor.numel() for tensor in first.params.values())
            num_tokens = 2 * sum(each.prompts.ys.numel() for each in sets)
            compiled = compiling_pays(num_params=num_params, num_tokens=num_tokens, num_checkpoints=num_checkpoints)
        if model.is_language or not compiled:
            return predictor(model)
        if model not in self._compiled:
            self._compiled[model] = compiled_apply(model)
        return self._compiled[model]

    def _sets(self, config: RunConfig, settings: "_EvaluationSettings", step: int | None = None) -> list[EvaluationSet]:
        """Return all evaluation sets of a run. `step` is the step of the checkpoint if the run's pool of tasks changes, else None."""
        sets = [self._shared_set(config, set_names(config)[0], settings.num_prompts, step)]
        return sets + [
            self._shared_set(config, name, settings.num_ood_prompts, step) for name in settings.distributions
        ]

    def _shared_set(self, config: RunConfig, name: str, num_prompts: int, step: int | None) -> EvaluationSet:
        """Return an evaluation set, from memory if another run with the same settings has used it."""
        # Only settings that affect the set are passed on. So runs that differ in other settings share the set.
        seeds = SeedsConfig(tasks=config.seeds.tasks, evaluation=config.seeds.evaluation)
        if config.model.is_language:  # the size of the evaluation determines which rows of a text are held out
            text = RunConfig(model=config.model, language=config.language, evaluation=config.evaluation, seeds=seeds)
            return self._set(text, name, num_prompts, None)
        task = config.task
        if name in SHIFTS:  # a shift uses new tasks and no dMMSE, so neither M nor the pool matters
            task, step = dataclasses.replace(task, num_tasks=math.inf, pool="fixed", pool_steps=None), None
            if task.prior not in ("low_rank", "mixture"):  # these two priors depend on the seed
                seeds = dataclasses.replace(seeds, tasks=0)
        # Only a model with a predictive distribution needs the negative log-likelihoods of the baselines.
        model = ModelConfig(output="gaussian" if config.model.has_density else "token")
        return self._set(RunConfig(task=task, seeds=seeds, model=model), name, num_prompts, step)


def evaluate_run(
    path: str | Path,
    *,
    num_prompts: int | None = None,
    num_ood_prompts: int | None = None,
    shifts: Sequence[str] | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Evaluate every saved step of a run, or one checkpoint, in and out of distribution.

    Several checkpoints are evaluated at the same time, as a population. The results for a run are cached in its `results/evaluation/`.
    After an interruption, repeat the call to continue. After further training, a repeated call evaluates only the new steps. For several
    runs, use one `RunEvaluator`, which is faster because it shares prompts and baselines.

    Args:
        path: A run's folder or a checkpoint file.
        num_prompts: Number of prompts per set; None uses the run's `evaluation.num_prompts`.
        num_ood_prompts: Number of prompts in each set except `pretrain` (the training tasks); None uses `num_prompts`.
        shifts: Names from `icl.tasks.shifts.SHIFTS`; None uses every shift that is possible for the run's D and K.

    Returns:
        A table with one row per number (step, checkpoint_hash, distribution, quantity, position, value, stderr, prompts), and a
        table with the losses of the baselines in the same columns without `step` and `checkpoint_hash`. The column `prompts` is `report`:
        these prompts differ from the prompts that training uses for its evaluations and for early stopping.

    Raises:
        CheckpointError: If there is no usable checkpoint, or the checkpoints belong to different models.
        ConfigError: If a number of prompts is below 2, or a shift is unknown.
    """
    return RunEvaluator(num_prompts=num_prompts, num_ood_prompts=num_ood_prompts, shifts=shifts)(path)


def save_evaluation(
    path: str | Path, numbers: pd.DataFrame, baselines: pd.DataFrame, *, out: Path | None = None
) -> list[tuple[str, Path]]:
    """Write the tables from `evaluate_run`, and a figure.

    For a run, the tables go to `results/evaluation.csv` and `results/baselines.csv`, and the figure goes to
    `figures/evaluation.png`. For a single checkpoint only `out` is written.

    Args:
        path: The run or checkpoint that was evaluated.
        numbers: The first table from `evaluate_run`.
        baselines: The second table from `evaluate_run`.
        out: Additional file to write with `write_numbers`; None means no such file.

    Returns:
        The label and the path of every file written.

    Raises:
        StorageError: If `out` has a suffix other than .csv or .json, or a file cannot be written.
    """
    from icl.plotting.evaluation import plot_evaluation
    from icl.plotting.language import plot_language_evaluation
    from icl.plotting.style import save_figure

    written = [] if out is None else [("Output", write_numbers(Path(out), numbers, baselines))]
    if Path(path).is_dir():
        run = run_of(path)
        written.append(("Numbers", run.write_result("evaluation.csv", numbers.to_csv(index=False))))
        written.append(("Baselines", run.write_result("baselines.csv", baselines.to_csv(index=False))))
        is_language = TEST in set(numbers["distribution"])
        figure = (plot_language_evaluation if is_language else plot_evaluation)(numbers, baselines, title=run.path.name)
        written.append(("Figure", save_figure(figure, run.figures / "evaluation.png")))
    return written


def write_numbers(out: Path, numbers: pd.DataFrame, baselines: pd.DataFrame, seeds: pd.DataFrame | None = None) -> Path:
    """Write the first table from `evaluate_run` as .csv, or both tables as .json. The JSON file also contains `seeds`, if `seeds` has rows.

    Raises:
        StorageError: If `out` has a suffix other than .csv or .json, or cannot be written.
    """
    if table_format(out) == "csv":
        text = numbers.to_csv(index=False)
    else:
        tables = {"evaluation": plain_rows(numbers), "baselines": plain_rows(baselines)}
        tables |= {} if seeds is None or seeds.empty else {"seeds": plain_rows(seeds)}
        text = json.dumps(tables, indent=1, allow_nan=False) + "\n"
    write_atomically(out, text.encode())
    return out


def headline_table(table: pd.DataFrame, *, by: str) -> pd.DataFrame:
    """Return a table with one row per run: loss, excess and gaps at the run's last step, on the training tasks and on new tasks.

    The excess is the loss minus the loss of the Bayes predictor. A further column contains its standard error.

    Args:
        table: The first tables from `evaluate_run` of several runs, joined.
        by: Column that identifies the run.
    """
    last = table[table["step"] == table.groupby(by)["step"].transform("max")]
    headline = last[
        (last["position"] == "mean")
        & last["distribution"].isin(["pretrain", "true", TEST])
        & last["quantity"].isin(_HEADLINES)
    ]
    errors = headline[headline["quantity"] == "bayes_excess"].assign(quantity="bayes_excess ± s.e.")
    errors = errors.assign(value=errors["stderr"])
    means = pd.concat([headline, errors]).pivot(
        index=[by, "step"], columns=["distribution", "quantity"], values="value"
    )
    order_of_table = pd.MultiIndex.from_frame(headline[[by, "step"]].drop_duplicates())  # `pivot` sorts its rows
    return means.sort_index(axis=1).reindex(order_of_table)


def evaluation_over_seeds(
    numbers: pd.DataFrame, configs: Mapping[str, RunConfig], *, only_last: bool = False
) -> pd.DataFrame:
    """Pool every number of an evaluation over the runs that differ only in their seeds (`icl.analysis.seeds`).

    Args:
        numbers: The first tables from `evaluate_run` of several runs, joined, with a column `run`.
        configs: The settings of each run, keyed by the run's name in the column `run`.
        only_last: Whether to pool only the last step of each run. Runs that stopped early may have different last steps.

    Returns:
        A table with the columns `runs` (the settings in which the groups differ), step (unless `only_last`), distribution, quantity,
        position, value (the mean over seeds), stderr (an upper bound of the standard error over prompts), seed_stderr, num_seeds, low,
        high and prompts. The table is empty if no two runs differ only in their seeds.
    """
    keys = ["distribution", "quantity", "position"] if only_last else ["step", "distribution", "quantity", "position"]
    if only_last:
        numbers = numbers[numbers["step"] == numbers.groupby("run")["step"].transform("max")]
    return pool_runs(numbers, seed_groups(configs), by=keys).assign(prompts=PROMPTS)


def seeds_headline(pooled: pd.DataFrame) -> pd.DataFrame:
    """Return the main numbers as strings, with one row per group of runs. `pooled` is from `evaluation_over_seeds` with `only_last`."""
    rows = pooled[(pooled["position"] == "mean") & pooled["distribution"].isin(["pretrain", "true"])]
    rows = rows[rows["quantity"].isin(_HEADLINES)]
    texts = [pooled_text(row) for row in rows.to_dict("records")]
    counts = rows.groupby("runs")["num_seeds"].transform("max")
    return rows.assign(text=texts, num_seeds=counts).pivot_table(
        index=["runs", "num_seeds"], columns=["distribution", "quantity"], values="text", aggfunc="first", sort=False
    )


@dataclass(frozen=True, kw_only=True)
class _EvaluationSettings:
    """Settings of the evaluation on which the numbers of a checkpoint depend, in addition to the settings of the run."""

    num_prompts: int
    num_ood_prompts: int
    distributions: tuple[str, ...]


def _make_set(device: torch.device, config: RunConfig, name: str, num_prompts: int, step: int | None) -> EvaluationSet:
    return evaluation_set(config, name, num_prompts=num_prompts, model_step=step, with_bayes=True, device=device)
