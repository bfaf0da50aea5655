"""The signals that stages are looked for in: loss, ICL score and prior-task score, and the LLC, from whatever a run has.

Loss, the ICL score over the widest span and the prior-task score E yhat^2 (`prior_zero`), all on the run's own tasks, come from
`results/behaviour.csv`, else `results/evaluation.csv`, else the checkpoints (fixed prompts, kept in `results/stages/`), else
`metrics.csv`. They are of the same prompts at every step, so that their standard errors are of a common offset, not of the
curve's shape; there only the points' scatter counts as noise.

The LLC comes from `results/llc.csv`: estimates of one kind of settings, of weights as they are, whose verdict is no worse than
`worst_llc`. Their standard errors are taken as independent: every checkpoint's chains have noise of their own (under the original's fixed seed
they have not); that chains of all checkpoints meet the same minibatches makes differences between steps, if anything, less noisy.

The LLC is nbeta (E[L] - L(w0)). Where E[L] hardly moves while L(w0) does, it is the loss turned over and no signal of its own
(`mirrors_loss`; so is the published curve up to 46,000 steps, whose chains left the basin).
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool

from icl.analysis.run import Members, over_checkpoints
from icl.checkpoints import CheckpointError, checkpoint_files
from icl.evaluation import evaluate, evaluation_set
from icl.measure import Measurement, entry_rows
from icl.reading import ContentError
from icl.runs import RunError, RunFolder, run_of
from icl.stacked import apply
from icl.table_files import read_table
from icl.validation import ConfigError

MIN_POINTS = 8
MIRROR = 0.2
"""E[L] moves by less than this share of what L(w0) does."""
VERSION = 1
VERDICTS = ("ok", "suspect", "invalid")
_QUANTITIES = {"loss": "loss", "icl_score": "icl_score", "prior_zero": "prior_task_score"}
_POINT = ["step", "checkpoint_hash", "value", "stderr"]

Verdict = Literal["ok", "suspect", "invalid"]


class Signal(NamedTuple):
    """A number at many steps."""

    name: str
    """`loss`, `icl_score`, `prior_task_score` or `llc`."""
    source: str
    """Where it was read, and what was left out."""
    points: pd.DataFrame
    """Columns step, checkpoint_hash, value, stderr; of an LLC also verdict, init_loss and mean_loss."""

    @property
    def group(self) -> str:
        """Signals of one group are not independent: an ICL score is a difference of the loss's own terms."""
        return "loss" if self.name == "icl_score" else self.name


@dataclass(frozen=True, kw_only=True)
class SignalSettings:
    """Which signals."""

    num_prompts: int = field(
        default=1024, metadata={"help": "prompts for the loss, where no table has it and it is computed"}
    )

    def __post_init__(self) -> None:
        if self.num_prompts < 2:
            raise ConfigError(f"`num_prompts` must be at least 2, got {self.num_prompts}.")


def read_signals(
    path: Path, *, num_prompts: int, llc_settings: str | None, worst_llc: Verdict
) -> tuple[list[Signal], list[str]]:
    """The signals of a run with at least `MIN_POINTS` steps, and what is to be said of those that it has not.

    Raises:
        RunError: If there is none, or the path is not a run's.
        CheckpointError: If there is nothing there at all.
        ConfigError: If the run has no estimates under `llc_settings`.
    """
    if path.is_file():
        raise RunError(f"Stages are of a whole run, and {path} is one file; give the run's folder.")
    folder = run_of(path)
    signals, missing = _behaviour(path, folder, num_prompts)
    llc, why = _llc(folder, llc_settings, worst_llc)
    signals += [llc] if llc else []
    missing += [why] if why else []
    if not signals:
        if not folder.metrics_file.is_file() and not folder.results.is_dir():
            checkpoint_files(path)  # which says that there is nothing at all
        raise RunError(
            f"{folder.path} has no signal at {MIN_POINTS} steps or more to find stages in; train with more checkpoints "
            "(--checkpoints.num_log 60), or copy its results/evaluation.csv or results/llc.csv there."
        )
    return signals, missing


def mirrors_loss(signal: Signal, low: float, high: float) -> bool:
    """Whether an LLC between two log times is the loss turned over; never so of another signal."""
    if signal.name != "llc" or "mean_loss" not in signal.points:
        return False
    near = signal.points[_between(signal.points, low, high)]
    moves = near[["init_loss", "mean_loss"]].astype(float).std(ddof=0)
    return len(near) >= 4 and bool(moves["mean_loss"] < MIRROR * moves["init_loss"])


def _between(points: pd.DataFrame, low: float, high: float) -> Bool[np.ndarray, " S"]:
    times = np.log1p(points["step"].to_numpy(float))
    inside: Bool[np.ndarray, " S"] = (times >= low) & (times <= high)
    return inside


def _behaviour(path: Path, folder: RunFolder, num_prompts: int) -> tuple[list[Signal], list[str]]:
    """Loss and scores, each from the first source that has enough of it."""
    found: dict[str, Signal] = {}
    for name in ("behaviour.csv", "evaluation.csv"):
        found = _pick(_read(folder.results / name), f"results/{name}") | found
    if "loss" not in found:
        found = _pick(_computed(path, num_prompts), "checkpoints") | found
    if "loss" not in found:
        metrics = _read(folder.metrics_file)
        if "eval/pretrain/loss" in metrics:
            points = metrics.rename(columns={"eval/pretrain/loss": "value"}).assign(checkpoint_hash=None, stderr=np.nan)
            found = _signal("loss", "metrics.csv", points) | found
    missing = [f"There is no {name} at {MIN_POINTS} steps." for name in _QUANTITIES.values() if name not in found]
    return [found[name] for name in _QUANTITIES.values() if name in found], missing


def _read(file: Path) -> pd.DataFrame:
    try:
        return read_table(file)
    except (OSError, ContentError):
        return pd.DataFrame()


def _pick(table: pd.DataFrame, source: str) -> dict[str, Signal]:
    """The signals of a table with distribution, quantity and position."""
    found: dict[str, Signal] = {}
    if not {"distribution", "quantity", "position", *_POINT} <= set(table.columns):
        return found
    table = table[table["distribution"] == "pretrain"]
    if "predictor" in table:
        table = table[table["predictor"] == "model"]
    for quantity, name in _QUANTITIES.items():
        rows = table[table["quantity"] == quantity]
        if quantity == "icl_score":
            ends = rows["position"].str.extract(r"^1:(\d+)$")[0].astype(float)
            rows = rows[ends == ends.max()]
        else:
            rows = rows[rows["position"] == "mean"]
        found |= _signal(name, source, rows)
    return found


def _signal(name: str, source: str, points: pd.DataFrame) -> dict[str, Signal]:
    points = points[[column for column in (*_POINT, "verdict", "init_loss", "mean_loss") if column in points]]
    points = points[np.isfinite(points["value"].astype(float)) & points["step"].notna()]
    points = points.astype({"step": int}).sort_values("step").drop_duplicates("step", keep="last")
    return {name: Signal(name, source, points.reset_index(drop=True))} if len(points) >= MIN_POINTS else {}


def _computed(path: Path, num_prompts: int) -> pd.DataFrame:
    """The evaluation of every checkpoint, or nothing if there is none."""
    try:
        measure = partial(_measure, num_prompts=num_prompts)
        entries, _ = over_checkpoints("stages", path, SignalSettings(num_prompts=num_prompts), measure, version=VERSION)
    except CheckpointError:
        return pd.DataFrame()
    return pd.DataFrame(entry_rows(entries))


def _measure(members: Members, *, num_prompts: int) -> list[Measurement]:
    device = next(iter(members.params.values())).device
    prompts = evaluation_set(members.config, "pretrain", num_prompts=num_prompts, device=device)
    found = evaluate(partial(apply, members.config.model), members.params, [prompts])
    return [Measurement([row for row in rows if row["quantity"] in _QUANTITIES]) for rows in found]


def _llc(folder: RunFolder, settings: str | None, worst: Verdict) -> tuple[Signal | None, str]:
    """The estimates of one kind that are good enough, or a sentence that says why there are none."""
    table = _read(folder.results / "llc.csv")
    if not {"step", "llc", "stderr", "verdict"} <= set(table.columns):
        return None, f"There is no LLC, so stages have no type: run `icl llc {folder.path}` for it."
    table = table[table["step"].notna()]
    kinds = table.get("settings", pd.Series("", index=table.index)).fillna("").astype(str)
    if settings is not None:
        labels = table.get("mode", pd.Series("", index=table.index)).fillna("").astype(str)
        chosen = (kinds == settings) | (labels == settings)
        if not chosen.any():
            raise ConfigError(
                f"results/llc.csv has no estimates under `{settings}`; its settings are {', '.join(sorted(set(kinds)))}."
            )
    else:
        chosen = table.get("rescale", pd.Series(1.0, index=table.index)).fillna(1.0) == 1
    usable = (
        chosen & table["verdict"].isin(VERDICTS[: VERDICTS.index(worst) + 1]) & np.isfinite(table["llc"].astype(float))
    )
    counts = kinds[usable].value_counts()
    if counts.empty or counts.max() < MIN_POINTS:
        reasons = table.loc[chosen & ~usable, "reasons"].dropna() if "reasons" in table else pd.Series(dtype=str)
        why = f" (such as: {reasons.iloc[0]})" if len(reasons) else ""
        return None, (
            f"The LLC is left out: of {chosen.sum()} estimates {usable.sum()} have a verdict no worse than {worst}, and "
            f"{MIN_POINTS} of the same settings are needed{why}."
        )
    kind = counts.index[0]
    own = table[usable & (kinds == kind)].rename(columns={"llc": "value"})
    asked = int((chosen & (kinds == kind)).sum())
    doubtful = int((own["verdict"] == "suspect").sum())
    source = f"results/llc.csv, settings {kind or 'of the table'}, {len(own)} of {asked} estimates, {doubtful} of them suspect"
    own = own if "checkpoint_hash" in own else own.assign(checkpoint_hash=None)
    return _signal("llc", source, own).get("llc"), ""
