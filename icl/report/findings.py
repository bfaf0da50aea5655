"""What a run came to, in a few words and numbers: its state, its settings beside the preset's, losses, LLC, verdicts."""

import math
import time
from collections.abc import Mapping

import pandas as pd

from icl.config import flatten
from icl.presets import preset
from icl.report.facts import RunFacts
from icl.report.tables import Cell, count_verdicts, with_error
from icl.validation import ConfigError

STALE_SECONDS = 600.0
"""Without a sign of life for so long, a run that says it runs may have been killed."""
PREDICTORS = {"model": "transformer", "ridge": "ridge", "dmmse": "dMMSE", "ols": "OLS", "zero": "zero"}
"""The columns of `losses.csv`, and their names."""


def state_of(facts: RunFacts) -> str:
    """The run's state in a word or two."""
    return "unknown" if facts.status is None else facts.status.state.replace("_", " ")


def state_sentence(facts: RunFacts) -> str:
    """Where the run stands, and what to make of the page if it has not ended."""
    status = facts.status
    if status is None:
        return "Where it stands is not known."
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(status.updated))
    reached = f"Step {status.step:,} of {status.max_steps:,}"
    reason = f": {status.reason}" if status.reason else ""
    if status.state in ("running", "waiting"):
        silent = time.time() - status.updated > STALE_SECONDS
        doubt = (
            " Nothing was heard of it since, so it may have been killed; icl train with the same settings goes on."
            if silent
            else ""
        )
        return f"In progress. {reached} at {when}; what follows is as of then.{doubt}"
    return f"{reached}, {status.state.replace('_', ' ')} at {when}{reason}."


def final_losses(facts: RunFacts) -> dict[str, dict[str, float]]:
    """Mean losses of the transformer (`model`) and the predictors after the last step, by `pretrain` and `true`."""
    table = facts.tables.get("losses")
    if table is not None and {"distribution", "position", "model"} <= set(table):
        rows = table[table["position"].astype(str) == "mean"].set_index("distribution")
        names = [name for name in PREDICTORS if name in rows and pd.api.types.is_numeric_dtype(rows[name])]
        return {str(name): {key: float(row[key]) for key in names} for name, row in rows.iterrows()}
    if facts.metrics is None:
        return {}
    columns = {"pretrain": "eval/pretrain/loss", "true": "eval/true/loss"}
    curves = {name: _numbers(facts.metrics, column) for name, column in columns.items()}
    return {name: {"model": float(curve.iloc[-1])} for name, curve in curves.items() if len(curve)}


def training_loss(facts: RunFacts) -> float | None:
    """The mean loss of the last batches."""
    if facts.status is not None and facts.status.loss is not None:
        return facts.status.loss
    losses = pd.Series(dtype=float) if facts.metrics is None else _numbers(facts.metrics, "train/loss")
    return float(losses.iloc[-1]) if len(losses) else None


def ratios(losses: Mapping[str, float]) -> dict[str, float]:
    """The transformer's loss over that of each Bayes predictor, ridge and dMMSE, by the name to show; those that are known."""
    if "model" not in losses:
        return {}
    known = {name: losses.get(name, math.nan) for name in ("ridge", "dmmse")}
    return {f"{PREDICTORS[name]}'s": losses["model"] / loss for name, loss in known.items() if loss > 0}


def last_llc(facts: RunFacts) -> Cell | None:
    """The estimate at the last step that has one, of the weights as they are."""
    table = facts.tables.get("llc")
    if table is None or not {"step", "llc", "stderr", "verdict"} <= set(table):
        return None
    if "rescale" in table:
        table = table[table["rescale"] == 1]
    if table.empty:
        return None
    row = table.sort_values("step", kind="stable").iloc[-1]
    return Cell(text=with_error(row["llc"], row["stderr"]), badge=str(row["verdict"]), is_number=True)


def llc_verdicts(facts: RunFacts) -> str:
    """How many estimates of the LLC have each verdict, in words; empty if there are none."""
    counts = count_verdicts(facts.tables["llc"]) if "llc" in facts.tables else {}
    return ", ".join(f"{count:,} {word}" for word, count in counts.items())


def what_it_is(facts: RunFacts) -> str:
    """The run in a line: task, model, preset."""
    if facts.config is None:
        return ""
    task, model = facts.config.task, facts.config.model
    tasks = "∞" if task.is_gaussian else f"{task.num_tasks:,}"
    return (
        f"Preset {facts.config.preset}. Task: M = {tasks}, D = {task.task_size}, K = {task.max_examples}, "
        f"σ² = {task.noise_variance:g}. Model: L = {model.num_layers}, H = {model.num_heads}, width {model.embed_size}"
    )


def changed_settings(facts: RunFacts) -> dict[str, tuple[object, object]]:
    """The settings that differ from the preset's, each beside the preset's."""
    if facts.config is None:
        return {}
    own = flatten(facts.config.to_dict())
    try:
        base = flatten(preset(facts.config.preset).to_dict())
    except ConfigError:
        return {}
    return {
        key: (value, base[key])
        for key, value in own.items()
        if value != base[key] and key not in ("preset", "run_name")
    }


def show_setting(value: object) -> str:
    """A setting as it is written in `config.yaml`."""
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _numbers(table: pd.DataFrame, column: str) -> pd.Series:
    return pd.to_numeric(table[column], errors="coerce").dropna() if column in table else pd.Series(dtype=float)
