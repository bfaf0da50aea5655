"""The main facts of a run, in a few words and numbers: its state, its changes from the preset, its losses and its LLC."""

import math
import time
from collections.abc import Mapping

import pandas as pd

from icl.config import flatten
from icl.config.validation import ConfigError
from icl.evaluation.scores import EXCESS
from icl.plotting.style import select
from icl.presets import preset
from icl.report.facts import RunFacts
from icl.report.tables import Cell, count_verdicts, with_error

STALE_SECONDS = 600.0
"""Age of the last status, in seconds, after which the page says that a run in progress may have been killed."""
PREDICTORS = {
    "model": "transformer",
    "bayes": "Bayes",
    "ridge": "ridge",
    "dmmse": "dMMSE",
    "ols": "OLS",
    "zero": "zero",
}
PREDICTORS |= {"unigram": "unigrams", "bigram": "bigrams"}
"""The columns of `losses.csv`, and their names on the page."""
LOSS_SETS = {"pretrain": "training tasks", "true": "new tasks", "test": "test rows"}
"""The distributions of `losses.csv`, and their names on the page."""


def state_of(facts: RunFacts) -> str:
    """Return the state of a run in one or two words."""
    return "unknown" if facts.status is None else facts.status.state.replace("_", " ")


def state_sentence(facts: RunFacts) -> str:
    """Return sentences about the progress of a run and the time of its last status."""
    status = facts.status
    if status is None:
        return "The state of this run is unknown."
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(status.updated))
    progress = f"Step {status.step:,} of {status.max_steps:,}"
    if status.state in ("running", "waiting"):
        text = f"In progress. {progress} at {when}. This page shows the run at that time."
        if time.time() - status.updated > STALE_SECONDS:
            text += " The run has not reported since then, so it may have been killed. To resume it, run icl train with the same settings."
        return text
    reason = f": {status.reason}" if status.reason else ""
    return f"{progress}, {state_of(facts)} at {when}{reason}."


def final_losses(facts: RunFacts) -> dict[str, dict[str, float]]:
    """Return the mean losses of the transformer (`model`) and the predictors at the last step, for each distribution.

    Before the end of training, only the transformer's losses are known. These losses are from its last evaluation.
    """
    table = facts.tables.get("losses")
    if table is not None and {"distribution", "position", "model"} <= set(table):
        rows = table[table["position"].astype(str) == "mean"].set_index("distribution")
        names = [name for name in PREDICTORS if name in rows and pd.api.types.is_numeric_dtype(rows[name])]
        return {str(name): {key: float(row[key]) for key in names} for name, row in rows.iterrows()}
    if facts.metrics is None:
        return {}
    curves = {name: _numbers(facts.metrics, f"eval/{name}/loss") for name in LOSS_SETS}
    return {name: {"model": float(curve.iloc[-1])} for name, curve in curves.items() if len(curve)}


def final_excess(facts: RunFacts) -> dict[str, tuple[float, float]]:
    """Return the transformer's excess loss over the Bayes predictor at the last step, with its standard error over prompts.

    The result is empty before the end of training, and for tables of version 0.1.0.
    """
    table = facts.tables.get("losses")
    if table is None or not {"distribution", "position", *EXCESS} <= set(table):
        return {}
    rows = table[table["position"].astype(str) == "mean"]
    numbers = rows[list(EXCESS)].apply(pd.to_numeric, errors="coerce")
    return dict(zip(rows["distribution"].astype(str), numbers.itertuples(index=False, name=None), strict=True))


def training_loss(facts: RunFacts) -> float | None:
    """Return the mean loss of the last training batches, or None if no loss is known.

    The loss is the squared error, or the negative log-likelihood if training minimised it.
    """
    if facts.status is not None and facts.status.loss is not None:
        return facts.status.loss
    for column in () if facts.metrics is None else ("train/loss", "train/nll"):
        losses = _numbers(facts.metrics, column)
        if len(losses):
            return float(losses.iloc[-1])
    return None


def loss_ratios(losses: Mapping[str, float], distribution: str) -> dict[str, float]:
    """Return the transformer's loss divided by the loss of each optimal predictor. The keys are names such as "ridge's".

    The optimal predictor for new tasks is ridge, or `bayes` if the prior or the noise is not Gaussian. For the training tasks of a finite
    M, dMMSE is optimal. For `pretrain`, the result contains the ratios to both predictors.
    """
    for_new_tasks = "bayes" if losses.get("bayes", math.nan) > 0 else "ridge"
    names = (for_new_tasks, "dmmse") if distribution == "pretrain" else (for_new_tasks,)
    return {
        f"{PREDICTORS[name]}'s": losses["model"] / losses[name]
        for name in names
        if "model" in losses and losses.get(name, math.nan) > 0
    }


def last_llc(facts: RunFacts) -> Cell | None:
    """Return the LLC estimate at the last step, or None if there is no estimate. Estimates for rescaled weights are left out."""
    table = facts.tables.get("llc")
    if table is None or not {"step", "llc", "stderr", "verdict"} <= set(table):
        return None
    if "rescale" in table:
        table = select(table, rescale=1)
    if table.empty:
        return None
    row = table.sort_values("step", kind="stable").iloc[-1]
    return Cell(text=with_error(row["llc"], row["stderr"]), badge=str(row["verdict"]), is_number=True)


def llc_verdicts(facts: RunFacts) -> str:
    """Return how many LLC estimates have each verdict, such as "3 ok, 1 suspect"; empty if there are none."""
    counts = count_verdicts(facts.tables["llc"]) if "llc" in facts.tables else {}
    return ", ".join(f"{count:,} {verdict}" for verdict, count in counts.items())


def describe_run(facts: RunFacts) -> str:
    """Return the preset, the task and the model of a run in one line."""
    if facts.config is None:
        return ""
    task, model = facts.config.task, facts.config.model
    if model.is_language:
        text = facts.config.language
        return (
            f"Preset {facts.config.preset}. Text: {text.source}, V = {text.vocab_size:,}, rows of {text.context_size:,} tokens. "
            f"Model: L = {model.num_layers}, H = {model.num_heads}, width {model.embed_size}"
        )
    num_tasks = "∞" if task.is_gaussian else f"{task.num_tasks:,}"
    return (
        f"Preset {facts.config.preset}. Task: M = {num_tasks}, D = {task.task_size}, K = {task.max_examples}, "
        f"σ² = {task.noise_variance:g}{', ' * bool(task.world)}{task.world}. Model: L = {model.num_layers}, H = {model.num_heads}, width {model.embed_size}"
    )


def changed_settings(facts: RunFacts) -> dict[str, tuple[object, object]]:
    """Return the settings that differ from the preset, as pairs of the run's value and the preset's value.

    The result is empty if the settings or the preset are unknown.
    """
    if facts.config is None:
        return {}
    try:
        defaults = flatten(preset(facts.config.preset).to_dict())
    except ConfigError:
        return {}
    settings = flatten(facts.config.to_dict())
    return {
        key: (value, defaults.get(key))
        for key, value in settings.items()
        if value != defaults.get(key) and key not in ("preset", "run_name")
    }


def show_setting(value: object) -> str:
    """Return a setting as it is written on the command line: `none` for None, and `true` or `false` for a bool."""
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _numbers(table: pd.DataFrame, column: str) -> pd.Series:
    return pd.to_numeric(table[column], errors="coerce").dropna() if column in table else pd.Series(dtype=float)
