"""The task-diversity threshold: number of tasks M above which models are closer to ridge than to dMMSE on new tasks.

For models that differ only in M and in seeds, let

    r(M) = ln(gap to ridge / gap to dMMSE)

A gap is the mean squared difference between the model's predictions and those of the baseline. Both gaps are measured
on new tasks (`true`) and averaged over positions. A model with r > 0 is closer to dMMSE, so it has learned its M tasks.
A model with r < 0 is closer to ridge, so it has learned the Gaussian prior. The threshold of a seed is the M at which r
falls to zero, interpolated linearly in log2 M between two trained M. The standard error of the threshold over prompts
is propagated to first order from the standard errors of r. Both gaps are measured on the same prompts, so their errors
are correlated. We therefore use an upper bound on the standard error of r: the sum of the relative standard errors of
the two gaps. The models share their prompts too, so the errors of r at the two trained M are correlated. The threshold
grows with both values of r. So the sum of the contributions of these two values is an upper bound on the threshold's
standard error.

The threshold depends on the length of training. At a later step, the threshold may be higher, because models with few
tasks move away from ridge again (`icl analyse --what behaviour`). If the last steps differ between the models of a
seed, or between seeds, the verdict is `suspect`. Raventos et al. (2023, arXiv 2306.15063, section 3.1) define their
threshold differently, by a comparison of runs with different batch sizes. Models with M = inf are left out, because
dMMSE is the same as ridge for M = inf.

We call r significant at an M if it is more than `SIGN_ERRORS` standard errors from zero. A seed has a threshold if r is
significantly positive at one M, and significantly negative at the next M at which r is significant. If r falls to zero
several times between these two M, we take the last fall. The threshold has the verdict `ok` if there is only one fall,
if the significant signs change only once, and if the standard error of log2 of the threshold is at most `MAX_STDERR`.
With at least three seeds, we average the log2 of the threshold over seeds, and give its 95 % interval
(`icl.analysis.seeds`). With fewer seeds there is no interval; look at the thresholds of the single seeds.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from icl.analysis.seeds import MIN_FOR_INTERVAL, over_seeds
from icl.config import RunConfig, SeedsConfig
from icl.diversity.runs import num_tasks_label
from icl.run_names import varying_names

SIGN_ERRORS = 2.0
MAX_STDERR = 0.5
"""Largest standard error of log2 of a seed's threshold with the verdict `ok`, in octaves (factors of 2 in M). With this
error, two standard errors are a factor of 2 (our choice)."""
MIN_SIZES = 3
"""Minimum number of different finite M. With fewer, no threshold is computed."""
COLUMNS = ("run", "threshold", "stderr_log2", "lower", "upper", "num_seeds", "verdict", "reasons")
"""Columns of the table that `thresholds` returns."""
ALL = "all seeds"
"""Value of the column `run` in the row for all seeds together."""


def thresholds(table: pd.DataFrame) -> pd.DataFrame:
    """Return a row with the threshold of each seed and, if there are several seeds, a row for all seeds together.

    Args:
        table: Numbers of the models, with the columns `run` (the seed's name), `num_tasks` (as a string), `step`, `distribution`,
            `quantity`, `position`, `value` and `stderr`. Only the last step of each model is used.

    Returns:
        A table with the columns `COLUMNS`. `threshold` is a number of tasks, or NaN if there is none. `stderr_log2` is the standard error
        of log2 of the threshold. In a seed's row, `stderr_log2` is over prompts, and `lower` and `upper` are the neighbouring trained M.
        In the row for all seeds, `stderr_log2` is over seeds, and `lower` and `upper` are the limits of the 95 % interval, or NaN if
        fewer than three seeds have a threshold. The table is empty if there are fewer than `MIN_SIZES` finite M.
    """
    table = table.assign(num_tasks=table["num_tasks"].astype(str))
    table = table[(table["distribution"] == "true") & (table["position"] == "mean") & (table["num_tasks"] != "inf")]
    if table["num_tasks"].nunique() < MIN_SIZES:
        return pd.DataFrame(columns=list(COLUMNS))
    last = table[table["step"] == table.groupby(["run", "num_tasks"])["step"].transform("max")]
    rows: list[dict[str, Any]] = [
        {"run": run, "num_seeds": 1} | _of_seed(*_log_ratios(own), doubts=_different_steps(own, "num_tasks"))
        for run, own in last.groupby("run", sort=False)
    ]
    if len(rows) > 1:
        rows.append(_over_seeds(rows, doubts=_different_steps(last, "run")))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def ladder_table(numbers: pd.DataFrame, configs: Mapping[str, RunConfig]) -> pd.DataFrame | None:
    """Convert the measured values of runs into a table for `thresholds`, or return None.

    The result is None if the runs differ in more than M and seeds, or if they have fewer than `MIN_SIZES` different
    finite M. If two runs have the same settings, M and seeds, they are the same experiment, and only the first counts.

    Args:
        numbers: Numbers of the runs, with the name of the run in the column `run`.
        configs: Settings of each run, keyed by the run's name.
    """
    plain = {dataclasses.replace(_without_tasks(config), seeds=SeedsConfig()) for config in configs.values()}
    sizes = {config.task.num_tasks for config in configs.values()} - {math.inf}
    if len(plain) != 1 or len(sizes) < MIN_SIZES:
        return None
    seeds = {name: _without_tasks(config) for name, config in configs.items()}
    order = list(dict.fromkeys(seeds.values()))
    names = [name or "one seed" for name in varying_names(order)]
    labels = {name: names[order.index(seed)] for name, seed in seeds.items()}
    num_tasks = {name: num_tasks_label(config.task.num_tasks) for name, config in configs.items()}
    first: dict[tuple[str, str], str] = {}
    for name in configs:
        first.setdefault((labels[name], num_tasks[name]), name)
    numbers = numbers[numbers["run"].isin(list(first.values()))]
    return numbers.assign(num_tasks=numbers["run"].map(num_tasks), run=numbers["run"].map(labels))


def sentences(table: pd.DataFrame) -> Iterator[str]:
    """Yield a line of text for each row of `thresholds`. If there is only one row, the line does not name the seed."""
    for row in table.to_dict("records"):
        name = "" if len(table) == 1 else f" ({row['run']})"
        reasons = f": {row['reasons']}" if row["reasons"] else ""
        if math.isnan(row["threshold"]):
            yield f"Task-diversity threshold{name}: none; {row['verdict']}{reasons}."
            continue
        what = f"M = {row['threshold']:.3g}"
        if row["run"] == ALL:
            has_interval = row["num_seeds"] >= MIN_FOR_INTERVAL
            what += (
                f" (95 % over {row['num_seeds']} seeds {row['lower']:.3g} to {row['upper']:.3g})"
                if has_interval
                else ""
            )
        else:
            factor = 2 ** row["stderr_log2"] - 1
            what += f" ± {factor:.0%} (between the trained M = {row['lower']:g} and {row['upper']:g})"
        yield f"Task-diversity threshold{name}: {what}; {row['verdict']}{reasons}."


def _without_tasks(config: RunConfig) -> RunConfig:
    """Return the settings of a run without its name and with M = 1. The result is equal for all runs of one seed.

    M = 1 can be used with every other setting. M = inf cannot be used with a pool that changes.
    """
    return dataclasses.replace(config, run_name=None, task=dataclasses.replace(config.task, num_tasks=1))


def _log_ratios(rows: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the values of M of one seed in ascending order, r(M), and upper bounds on the standard errors of r over prompts."""
    wide = rows[rows["quantity"].isin(["delta_ridge", "delta_dmmse"])].pivot(index="num_tasks", columns="quantity")
    wide = wide.reindex(sorted(wide.index, key=float))
    if not {("value", "delta_ridge"), ("value", "delta_dmmse")} <= set(wide.columns):
        return np.empty(0), np.empty(0), np.empty(0)
    ridge, dmmse = wide["value"]["delta_ridge"].to_numpy(), wide["value"]["delta_dmmse"].to_numpy()
    errors = wide["stderr"]["delta_ridge"].to_numpy() / ridge + wide["stderr"]["delta_dmmse"].to_numpy() / dmmse
    keep = (ridge > 0) & (dmmse > 0) & np.isfinite(errors)
    return wide.index.to_numpy(dtype=float)[keep], np.log(ridge[keep] / dmmse[keep]), errors[keep]


def _different_steps(last: pd.DataFrame, by: str) -> list[str]:
    """Return a reason for doubt if the last steps differ between the values of the column `by`; else an empty list."""
    steps = last.groupby(by, sort=False)["step"].max()
    if steps.nunique() <= 1:
        return []
    label = "M = " if by == "num_tasks" else ""
    parts = (f"{step:,.0f} ({label}{', '.join(own.index)})" for step, own in steps.groupby(steps))
    return [f"the threshold depends on the step, but the last steps differ: {', '.join(parts)}"]


def _of_seed(
    sizes: np.ndarray, ratios: np.ndarray, errors: np.ndarray, *, doubts: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the threshold of one seed from its values of M, r(M) and the standard errors of r.

    `doubts` are further reasons for the verdict `suspect`.
    """
    signs = np.where(np.abs(ratios) > SIGN_ERRORS * errors, np.sign(ratios), 0)
    switches = [(a, b) for a, b in pairwise(np.flatnonzero(signs).tolist()) if signs[a] != signs[b]]
    to_ridge = next(((a, b) for a, b in switches if signs[a] > 0), None)
    if to_ridge is None:
        sides = " and ".join(
            f"no model is significantly closer to {name}"
            for name, sign in (("dMMSE", 1), ("ridge", -1))
            if sign not in signs
        )
        reasons = [sides or "the models with more tasks are closer to dMMSE", *doubts]
        nothing = dict.fromkeys(("threshold", "stderr_log2", "lower", "upper"), math.nan)
        return nothing | {"verdict": "suspect", "reasons": "; ".join(reasons)}
    falls = [(a, b) for a, b in pairwise(range(to_ridge[0], to_ridge[1] + 1)) if ratios[a] > 0 >= ratios[b]]
    below, above = falls[-1]
    where, stderr = _zero(np.log2(sizes[[below, above]]), ratios[[below, above]], errors[[below, above]])
    reasons = list(doubts)
    if len(switches) > 1:
        reasons.append(f"the models switch {len(switches)} times between dMMSE and ridge as M grows")
    if len(falls) > 1:
        low, high = sizes[list(to_ridge)]
        reasons.append(f"between M = {low:g} and {high:g}, r falls to zero {len(falls)} times")
    if stderr > MAX_STDERR:
        reasons.append(
            f"the standard error of the threshold is {stderr:.2g} octaves (factors of 2 in M), more than {MAX_STDERR:g}"
        )
    return {
        "threshold": 2**where,
        "stderr_log2": stderr,
        "lower": sizes[below],
        "upper": sizes[above],
        "verdict": "suspect" if reasons else "ok",
        "reasons": "; ".join(reasons),
    }


def _zero(logs: np.ndarray, ratios: np.ndarray, errors: np.ndarray) -> tuple[float, float]:
    """Return the log2 M at which the line through two points of r is zero, and an upper bound on its standard error.

    The first value of r is positive, the second is negative or zero. So the derivatives of the zero with respect to
    both values are at least 0.
    """
    width, drop = logs[1] - logs[0], ratios[0] - ratios[1]
    derivatives = width / drop**2 * np.array([-ratios[1], ratios[0]])
    return float(logs[0] + width * ratios[0] / drop), float(derivatives @ errors)


def _over_seeds(rows: Sequence[Mapping[str, Any]], *, doubts: Sequence[str] = ()) -> dict[str, Any]:
    """Return the row for all seeds together. `doubts` are further reasons for the verdict `suspect`."""
    pooled = over_seeds(math.log2(row["threshold"]) for row in rows)
    num_seeds, num_not_ok = len(pooled.values), sum(row["verdict"] != "ok" for row in rows)
    reasons = list(doubts)
    if num_seeds < MIN_FOR_INTERVAL:
        reasons.append(
            f"an interval needs at least {MIN_FOR_INTERVAL} seeds with a threshold, but there are {num_seeds}"
        )
    if num_seeds < len(rows):
        reasons.append(f"only {num_seeds} of {len(rows)} seeds have a threshold")
    if num_not_ok:
        reasons.append(f"the verdict of {num_not_ok} seed(s) is not ok")
    return {
        "run": ALL,
        "threshold": 2**pooled.mean,
        "stderr_log2": pooled.stderr,
        "lower": 2**pooled.low,
        "upper": 2**pooled.high,
        "num_seeds": num_seeds,
        "verdict": "suspect" if reasons else "ok",
        "reasons": "; ".join(reasons),
    }
