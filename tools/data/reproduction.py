"""Comparison of our numbers with published numbers: the tables of `docs/reproduction.md`, made from the shipped tables.

A published number is a range over the five released seeds (`published.csv`). The published step t is our step t + 1. If our tables do not
contain this step, losses, norms and the Hessian are interpolated between the saved steps before and after it, linearly in log(step + 1).
The LLC was estimated only at a few steps, so we take the nearest estimate and name its step. Before the comparison, the published range is
widened by half a unit of its last printed digit. Our number agrees if its range of two standard errors overlaps this range.
"""

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

MODEL = "L2H4/"
SIZES = ("published-run", "small")
"""Sizes that contain runs of this model. A seed that is in several sizes is read from the first of them."""
STAGE_STARTS = {"LR1": 0.0, "LR2": 1466.0, "LR3": 40_293.0, "LR4": 126_263.0, "LR5": 318_182.0}
"""Step at which each published stage starts."""
_NEAR = 0.1
"""Largest distance between the step of an estimate and the published step, in ln(step + 1)."""

_MIN_ESS = 20
"""Smallest effective sample size of chains for a comparison. With this size, the 95 % interval of an estimate is about nine standard errors
wide."""
_OF_WEIGHTS = {
    "share of small effective unembedding weights": ("share_small", "effective_unembedding"),
    "norm of γ, final layer norm": ("norm", "final_norm.weight"),
    "norm of γ, layer norm before attention 1": ("norm", "blocks.0.attention_norm.weight"),
    "norm of γ, layer norm before MLP 2": ("norm", "blocks.1.mlp_norm.weight"),
}
"""Values of the columns `quantity` and `part` in `embeddings.csv` for each published quantity."""
_SHARES = {
    "smallest squared singular value of the token embedding, share": ("token_embedding", True),
    "largest squared singular value of the position embedding, share": ("position_embedding", False),
}
"""For each published share: the name of the embedding, and whether the share is its smallest (True) or its largest (False)."""


class Measurement(NamedTuple):
    """One of our numbers."""

    value: float
    stderr: float = 0.0
    step: float | None = None
    """Step at which the number was measured; None if this is the published step."""
    spacing: float = 0.0
    """Distance from a step to the next step in the tables, if the number is a step."""
    is_resolved: bool = True
    """Whether the standard error can be trusted; False if the effective sample size is below `_MIN_ESS`."""


class Tables(NamedTuple):
    """The shipped tables of one size."""

    folder: Path

    def read(self, name: str, run: str | None = None) -> pd.DataFrame:
        """Return a table, or only the rows of one run. If there is no such table, return an empty one."""
        file = self.folder / f"{name}.csv"
        if not file.is_file():
            return pd.DataFrame({"run": []})
        table = pd.read_csv(file, dtype={"position": str, "num_tasks": str, "settings": str, "mode": str})
        return table if run is None else table[table["run"] == run]


def compare(data: Path) -> str:
    """Return a Markdown table with a row for each published number and a column for each of our seeds."""
    published = pd.read_csv(data / "published.csv", dtype={"low": str, "high": str})
    sources = {
        run: tables
        for tables in (Tables(data / size) for size in reversed(SIZES))
        for run in tables.read("runs")["run"]
    }
    seeds = sorted(run for run in sources if str(run).startswith(MODEL))
    lines = [
        f"| Quantity | Published | {' | '.join(run.removeprefix(MODEL).replace('=', ' ') for run in seeds)} | Agreement |",
        "|---|---|" + "---|" * (len(seeds) + 1),
    ]
    for row in published.itertuples():
        ours = [measure(sources[run], run, row.quantity, row.step) for run in seeds]
        if any(ours):
            at_step = "" if math.isnan(row.step) else f", step {row.step + 1 if row.step > 0 else 0:,.0f}"
            low, high, cells = float(row.low), float(row.high), " | ".join(map(_as_text, ours))
            spread = f"{low:,g}" if low == high else f"{low:,g} to {high:,g}"
            agreement = _judge(ours, low, high, rounding=max(_half_unit(row.low), _half_unit(row.high)))
            lines.append(f"| {row.quantity}{at_step} | {spread} | {cells} | {agreement} |")
    return "\n".join(lines)


def measure(tables: Tables, run: str, quantity: str, step: float) -> Measurement | None:
    """Return our number for a published quantity, or None if the tables do not contain it.

    Args:
        tables: The shipped tables.
        run: One of our runs.
        quantity: Name of the quantity in `published.csv`.
        step: The published step t, which is our step t + 1 (step 0 is our step 0).
    """
    ours = step + 1 if step > 0 else step
    if quantity == "parameters":
        return Measurement(float(tables.read("runs", run)["num_parameters"].iloc[0]))
    if quantity.endswith("weight norm"):
        return _interpolate(tables.read("checkpoints", run).rename(columns={"weight_norm": "value"}), ours)
    if "(published sampler)" in quantity:
        return _published_llc(tables.read("llc", run), quantity, ours)
    if quantity == "Hessian trace":
        return _interpolate(_where(tables.read("hessian", run), quantity="trace"), ours)
    if quantity == "largest Hessian eigenvalue":
        return _interpolate(_where(tables.read("hessian", run), quantity="eigenvalue", part="top 1"), ours)
    if quantity in _SHARES:
        part, ascending = _SHARES[quantity]
        shares = _where(tables.read("embeddings", run), quantity="spectrum_share", part=part)
        shares = shares.sort_values("value", ascending=ascending)
        return _interpolate(shares.drop_duplicates("step"), ours)
    if quantity in _OF_WEIGHTS:
        kind, part = _OF_WEIGHTS[quantity]
        return _interpolate(_where(tables.read("embeddings", run), quantity=kind, part=part), ours)
    return _from_evaluation(tables.read("evaluation", run), quantity, ours)


def _from_evaluation(rows: pd.DataFrame, quantity: str, step: float) -> Measurement | None:
    loss = _where(rows, distribution="pretrain", quantity="loss", position="mean")
    size = _where(rows, distribution="pretrain", quantity="prior_zero", position="mean")
    if loss.empty:
        return None
    if quantity == "loss":
        return _interpolate(loss, step)
    excess = _where(rows, distribution="pretrain", quantity="bayes_excess", position="mean")
    if quantity == "loss minus ridge's loss":
        return _interpolate(excess, step)
    if quantity.startswith("ICL score"):
        return _interpolate(_where(rows, distribution="pretrain", quantity="icl_score", position="1:8"), step)
    if quantity.endswith("smallest predictions"):
        lowest_step = float(size.loc[size["value"].idxmin(), "step"])
        later = size.loc[size["step"] > lowest_step, "step"]
        return Measurement(lowest_step, spacing=0.0 if later.empty else float(later.min()) - lowest_step)
    if quantity.startswith("smallest mean square"):
        lowest = size.loc[size["value"].idxmin()]
        return Measurement(lowest["value"], lowest["stderr"], lowest["step"])
    if quantity == "loss, inputs times 5":
        return _interpolate(_where(rows, distribution="input_scale_5", quantity="loss", position="mean"), step)
    if quantity.startswith("change of loss"):
        # The loss minus ridge's loss on the same prompts changes by the same amount, and its standard error is smaller.
        begin, end = _interpolate(excess, STAGE_STARTS[quantity[-3:]]), _interpolate(excess, step)
        return begin and end and Measurement(end.value - begin.value, math.hypot(begin.stderr, end.stderr))
    return None


def _published_llc(rows: pd.DataFrame, quantity: str, step: float) -> Measurement | None:
    """Return our number with the published sampler at the step nearest to `step`: an LLC, a mean sampled loss, or a change of the LLC."""
    if rows.empty:
        return None
    published = rows[rows["mode"].fillna("").str.startswith("published")].sort_values("step")
    if published.empty:
        return None
    nearest = published.iloc[(np.log(published["step"] + 1) - math.log(step + 1)).abs().argmin()]
    if abs(math.log((nearest["step"] + 1) / (step + 1))) > _NEAR:
        return None
    llc = Measurement(nearest["llc"], nearest["stderr"], nearest["step"], is_resolved=bool(nearest["ess"] >= _MIN_ESS))
    if quantity.startswith("LLC"):
        return llc
    if quantity.startswith("sampled loss"):
        return llc._replace(value=nearest["mean_loss"], stderr=nearest["stderr"] / nearest["nbeta"])
    stage = re.search("LR[1-5]", quantity)
    start = STAGE_STARTS[stage[0] if stage else "LR1"]
    first = published.iloc[(published["step"] - start).abs().argmin()]
    if abs(math.log((first["step"] + 1) / (start + 1))) > _NEAR:
        return None
    change, stderr = nearest["llc"] - first["llc"], math.hypot(nearest["stderr"], first["stderr"])
    return llc._replace(value=change, stderr=stderr, is_resolved=bool(min(nearest["ess"], first["ess"]) >= _MIN_ESS))


def ladder(data: Path) -> str:
    """Return a Markdown table of the ladder: the gaps on new tasks at the last step, and the nearer predictor."""
    tables = Tables(data / "small")
    runs = tables.read("runs")
    lines = [
        "| M | gap to ridge | gap to dMMSE | nearer to | step of the smallest loss on new tasks |",
        "|---|---|---|---|---|",
    ]
    for run in runs.loc[runs["run"].str.startswith("ladder/"), "run"]:
        rows = tables.read("evaluation", run)
        gaps = [
            _last(_where(rows, distribution="true", quantity=name, position="mean"))
            for name in ("delta_ridge", "delta_dmmse")
        ]
        loss = _where(rows, distribution="true", quantity="loss", position="mean")
        if gaps[0] is None:
            continue
        best = int(loss.loc[loss["value"].idxmin(), "step"])
        m = run.partition("num_tasks=")[2].replace("inf", "∞")
        lines.append(
            f"| {m} | {_as_text(gaps[0])} | {_as_text(gaps[1])} | {_nearer(*gaps)} | {best:,}{' (the last)' if best == loss['step'].max() else ''} |"
        )
    return "\n".join(lines) if len(lines) > 2 else "The ladder has not been run yet."


def costs(data: Path) -> str:
    """Return a Markdown table with the time of every phase."""
    table = pd.concat([Tables(data / size).read("phases") for size in reversed(SIZES)], ignore_index=True)
    lines = ["| Phase | Wall-clock time, min | CPU time, min |", "|---|---|---|"]
    for row in table.itertuples():
        cpu = "-" if math.isnan(row.cpu_seconds) else f"{row.cpu_seconds / 60:.1f}"
        lines.append(f"| {row.phase} | {row.seconds / 60:.1f} | {cpu} |")
    return "\n".join(lines)


BLOCKS: dict[str, Callable[[Path], str]] = {"comparison": compare, "ladder": ladder, "costs": costs}
"""Functions that make the tables of the page. The keys are the names of the tables."""


def _where(rows: pd.DataFrame, **values: str) -> pd.DataFrame:
    for column, value in values.items():
        rows = rows[rows[column] == value] if column in rows else rows.iloc[:0]
    return rows


def _interpolate(rows: pd.DataFrame, step: float) -> Measurement | None:
    """Return the number at a step, interpolated in log(step + 1) between saved steps, or None after the last saved step."""
    if rows.empty or step > rows["step"].max():
        return None
    rows = rows.sort_values("step")
    places = np.log(rows["step"].to_numpy(float) + 1)
    value, stderr = (
        float(np.interp(math.log(step + 1), places, rows[name].to_numpy(float))) if name in rows else 0.0
        for name in ("value", "stderr")
    )
    return Measurement(value, stderr)


def _last(rows: pd.DataFrame) -> Measurement | None:
    if rows.empty:
        return None
    last = rows.loc[rows["step"].idxmax()]
    return Measurement(last["value"], last["stderr"])


def _nearer(ridge: Measurement | None, dmmse: Measurement | None) -> str:
    if ridge is None or dmmse is None:
        return "-"
    if abs(ridge.value - dmmse.value) <= 2 * math.hypot(ridge.stderr, dmmse.stderr):
        return "neither, within 2 standard errors"
    return "ridge" if ridge.value < dmmse.value else "dMMSE"


def _as_text(measurement: Measurement | None) -> str:
    if measurement is None:
        return "-"
    digits = 4 if measurement.value < 1e4 else 6
    error = f" ± {measurement.stderr:.2g}" if measurement.stderr else ""
    step = f" (step {measurement.step:,.0f})" if measurement.step is not None else ""
    return f"{measurement.value:,.{digits}g}{error}{step}"


def _half_unit(number: str) -> float:
    """Return half a unit of the last digit of a printed number, for example 0.0005 for 0.007."""
    return 0.5 * 10.0 ** -len(number.partition(".")[2])


def _judge(ours: list[Measurement | None], low: float, high: float, *, rounding: float) -> str:
    """Return the judgements of all seeds without duplicates, joined by semicolons."""
    return "; ".join(dict.fromkeys(_judgements(ours, low, high, rounding))) or "-"


def _judgements(ours: list[Measurement | None], low: float, high: float, rounding: float) -> Iterator[str]:
    """Yield for each seed "yes" if its range of two standard errors overlaps the published range, widened by its rounding.

    Yield "not resolved" if the standard error cannot be trusted.

    Otherwise, yield the distance from our number to the nearer end of the published range.
    """
    for measurement in ours:
        if measurement is not None:
            tolerance = 2 * measurement.stderr + measurement.spacing + rounding * (1 + 1e-9)
            below, above = low - measurement.value, measurement.value - high
            if not measurement.is_resolved:
                yield "not resolved"
            elif max(below, above) <= tolerance:
                yield "yes"
            else:
                yield f"{max(below, above):.2g} {'below' if below > above else 'above'}"
