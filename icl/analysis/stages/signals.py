"""Signals in which we look for stages: loss, scores and LLC, from the files in a run's folder.

The loss, the ICL score over the widest span and the prior-task score E yhat^2 (`prior_zero`) are measured on the run's training
tasks. Each signal comes from the first of these sources that contains it: `results/behaviour.csv`, `results/evaluation.csv`, the
checkpoints (evaluated on fixed prompts, cached in `results/stages/`), `metrics.csv`. All steps use the same prompts, so the standard
errors describe a common shift, not the shape of the curve. So for these signals only the scatter of the points counts as noise.

For a language run, the loss and the ICL score are measured on test rows. The table `results/language-behaviour.csv` takes precedence over
the sources above. This table also contains the bigram score, the previous-token scores and the prefix-matching scores. For each of the two
head scores, we use the head whose score is largest at the last step (Hoogland et al. 2024).

The LLC comes from `results/llc.csv`. We use estimates with the same settings and with a verdict no worse than
`worst_llc`. Unless `llc_settings` is given, we use only estimates for weights that were not rescaled. We treat their
standard errors as independent, because the chains of different checkpoints have different noise. (The code of Hoogland
et al. fixes the seed, so their chains have the same noise.) The chains of all checkpoints use the same minibatches.
Differences between steps may therefore be less noisy than we assume, but not noisier.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from icl.analysis.run import Members, family_of, over_checkpoints, setting
from icl.analysis.stages.points import (
    HEADS,
    MEASURED_SETS,
    MIN_POINTS,
    RISE,
    Signal,
    make_signal,
    select_signals,
    sparse_reason,
)
from icl.config.validation import require, require_count
from icl.evaluation.predictors import predictor
from icl.evaluation.scores import evaluate
from icl.evaluation.sets import evaluation_set, set_names
from icl.files.reading import ContentError
from icl.files.tables import read_table
from icl.runs.checkpoints import CheckpointError, checkpoint_files
from icl.runs.folder import RunError, RunFolder, run_of
from icl.runs.measure import Measurement, entry_rows

VERSION = 2
"""Version of the measurements. Results of older versions are computed again. Version 2 uses the fixed prompts for reports
(`icl.evaluation.sets.REPORT`); version 1 used other prompts."""
VERDICTS = ("ok", "suspect", "invalid")
_QUANTITIES = {
    "regression": {"loss": "loss", "icl_score": "icl_score", "prior_zero": "prior_task_score"},
    "language": {name: name for name in ("loss", "icl_score", "bigram_score", *HEADS)},
}
"""Names of the signals of each family of runs. The keys of the inner mappings are values of the column `quantity`."""
_TABLES = ("language-behaviour.csv", "behaviour.csv", "evaluation.csv")
Verdict = Literal["ok", "suspect", "invalid"]


@dataclass(frozen=True, kw_only=True)
class SignalSettings:
    """Settings of signals that are computed from checkpoints."""

    num_prompts: int = setting(
        1024, "number of prompts for the loss; used only if no table of the run contains the loss"
    )

    def __post_init__(self) -> None:
        require_count("num_prompts", self.num_prompts, 2)


def read_signals(
    path: Path, *, num_prompts: int, llc_settings: str | None, worst_llc: Verdict, longest: float
) -> tuple[list[Signal], list[str]]:
    """Return the signals of a run that have enough steps, and a message for each missing signal.

    Args:
        path: The run's folder.
        num_prompts: Number of prompts for signals that are computed from checkpoints.
        llc_settings: Settings of the LLC estimates to use; None uses the settings with the most usable estimates.
        worst_llc: Worst verdict with which an LLC estimate is used.
        longest: Maximum length of the smoothing kernel, in ln(step + 1).

    Raises:
        RunError: If there is no signal, or the path is a file.
        CheckpointError: If there is no run at the path.
        ConfigError: If the run has no estimates under `llc_settings`.
    """
    if path.is_file():
        raise RunError(f"Stages need a whole run, but {path} is a single file; give the run's folder.")
    folder = run_of(path)
    is_language = family_of(path) == "language"
    signals, missing = _behaviour(path, folder, num_prompts, longest)
    llc = _llc(folder, llc_settings, worst_llc, longest)
    if isinstance(llc, Signal):
        signals.append(llc)
    else:
        missing.append(llc)
    if not signals:
        if not folder.metrics_file.is_file() and not folder.results.is_dir():
            checkpoint_files(path)  # raises an error if there is no checkpoint at all
        raise RunError(
            f"Stages need a signal with at least {MIN_POINTS} steps that are close enough in log time, and "
            f"{folder.path} has none. {missing[0]} Train with more checkpoints (--checkpoints.num_log 60), or copy "
            "the run's results/evaluation.csv or results/llc.csv into its folder."
        )
    return [signal._replace(has_onsets=is_language) for signal in signals], missing


def _behaviour(path: Path, folder: RunFolder, num_prompts: int, longest: float) -> tuple[list[Signal], list[str]]:
    """Return loss and scores, each from the first source with enough steps, and a message for each missing signal."""
    signals: dict[str, Signal] = {}
    sparse: dict[str, str] = {}

    def add(found: Mapping[str, Signal]) -> None:
        """Add each signal that has enough steps, unless an earlier source has it."""
        for name, signal in found.items():
            reason = sparse_reason(signal, longest)
            if reason:
                sparse.setdefault(name, reason)
            else:
                signals.setdefault(name, signal)

    quantities = _QUANTITIES[family_of(path) or "regression"]
    for name in _TABLES:
        add(select_signals(_read(folder.results / name), f"results/{name}", quantities))
    if "loss" not in signals:
        add(select_signals(_computed(path, num_prompts), "checkpoints", quantities))
    if "loss" not in signals:
        metrics = _read(folder.metrics_file)
        for column in (f"eval/{name}/loss" for name in MEASURED_SETS if f"eval/{name}/loss" in metrics):
            points = metrics.rename(columns={column: "value"}).assign(checkpoint_hash=None, stderr=np.nan)
            add(make_signal("loss", "metrics.csv", points))
    names = list(quantities.values())
    missing = [sparse.get(name) or _missing(name, folder) for name in names if name not in signals]
    return [signals[name] for name in names if name in signals], missing


def _missing(name: str, folder: RunFolder) -> str:
    """Return the message for a signal that no source contains."""
    text = f"There is no {name} with at least {MIN_POINTS} steps"
    if name in HEADS and (folder.results / _TABLES[0]).is_file():
        return f"{text} that rises by {RISE:g} standard errors over the run."
    if name in ("bigram_score", *HEADS):
        return f"{text}; measure it with `icl analyse {folder.path} --what behaviour`."
    return f"{text}."


def _read(file: Path) -> pd.DataFrame:
    try:
        return read_table(file)
    except (OSError, ContentError):
        return pd.DataFrame()


def _computed(path: Path, num_prompts: int) -> pd.DataFrame:
    """Evaluate every checkpoint, and return the results as a table; it is empty if there is no checkpoint."""
    try:
        measure = partial(_measure, num_prompts=num_prompts)
        entries, _ = over_checkpoints("stages", path, SignalSettings(num_prompts=num_prompts), measure, version=VERSION)
    except CheckpointError:
        return pd.DataFrame()
    return pd.DataFrame(entry_rows(entries))


def _measure(members: Members, *, num_prompts: int) -> list[Measurement]:
    device = next(iter(members.params.values())).device
    prompts = evaluation_set(members.config, set_names(members.config)[0], num_prompts=num_prompts, device=device)
    by_member = evaluate(predictor(members.config.model), members.params, [prompts])
    quantities = _QUANTITIES[members.config.model.family]
    return [Measurement([row for row in rows if row["quantity"] in quantities]) for rows in by_member]


def _llc(folder: RunFolder, settings: str | None, worst: Verdict, longest: float) -> Signal | str:
    """Return the usable estimates with the same settings, or a message that says why there are too few."""
    table = _read(folder.results / "llc.csv")
    if not {"step", "llc", "stderr", "verdict"} <= set(table.columns):
        return f"There is no LLC, so stages have no type; estimate it with `icl llc {folder.path}`."
    table = table[table["step"].notna()]
    kinds = _column(table, "settings", "").astype(str)
    if settings is None:
        chosen = _column(table, "rescale", 1.0) == 1
    else:
        chosen = (kinds == settings) | (_column(table, "mode", "").astype(str) == settings)
        available = ", ".join(sorted(set(kinds)))
        require(
            bool(chosen.any()), f"results/llc.csv has no estimates under `{settings}`; its settings are {available}."
        )
    is_good = table["verdict"].isin(VERDICTS[: VERDICTS.index(worst) + 1])
    usable = chosen & is_good & np.isfinite(table["llc"].astype(float))
    kind = next(iter(kinds[usable].value_counts().index), "")  # the settings with the most usable estimates
    rows = table[usable & (kinds == kind)].rename(columns={"llc": "value"})
    num_chosen = int((chosen & (kinds == kind)).sum())
    num_suspect = int((rows["verdict"] == "suspect").sum())
    source = f"results/llc.csv (settings {kind or 'of the table'}; {len(rows)} of {num_chosen} estimates, {num_suspect} suspect)"
    rows = rows.assign(checkpoint_hash=_column(rows, "checkpoint_hash", None))
    signal = make_signal("llc", source, rows).get("llc")
    if signal is not None:
        return sparse_reason(signal, longest) or signal
    reasons = _column(table, "reasons", "")[chosen & ~usable]
    example = next((f" (for example: {reason.split('; ')[0]})" for reason in reasons if reason), "")
    return (
        f"The LLC is left out: {usable.sum()} of {chosen.sum()} estimates have a verdict no worse than `{worst}`, and "
        f"at least {MIN_POINTS} steps with the same settings are needed{example}."
    )


def _column(table: pd.DataFrame, name: str, default: Any) -> pd.Series:
    """Return a column with its empty cells filled, or the default if the table lacks it."""
    if name not in table:
        return pd.Series(default, index=table.index)
    return table[name] if default is None else table[name].fillna(default)
