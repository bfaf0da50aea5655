"""The task-diversity threshold: the number of tasks M above which models are closer to ridge than to dMMSE on new tasks.

For models that differ only in M and in seeds, let

    r(M) = ln(gap to ridge / gap to dMMSE)

A gap is the mean squared difference between the model's predictions and those of the baseline. Both gaps are measured on new tasks (`true`)
and averaged over positions. A model with r > 0 is closer to dMMSE, so it has learned its M tasks. A model with r < 0 is closer to ridge, so
it has learned the Gaussian prior. The threshold of a seed is the M at which r falls to zero, interpolated linearly in log2 M between two
trained M. The standard error of the threshold over prompts is propagated to first order from the standard errors of r. Both gaps are
measured on the same prompts, so their errors are correlated. We therefore use an upper bound on the standard error of r: the sum of the
relative standard errors of the two gaps.

The threshold depends on the length of training. At a later step, the threshold may be higher, because models with few tasks move away from
ridge again (`icl analyse --what behaviour`). Raventos et al. (2023, arXiv 2306.15063, section 3.1) define their threshold differently, by a
comparison of runs with different batch sizes. Models with M = inf are left out, because dMMSE is the same as ridge for M = inf.

A seed's threshold has the verdict `ok` if r is significantly positive at one or more M, and significantly negative at one or more M. Among
these M, r must change its sign only once. Significant means more than `SIGN_ERRORS` standard errors from zero. With at least three seeds,
we average the log2 of the threshold over seeds, and give its 95 % interval (`icl.analysis.seeds`). With fewer seeds there is no interval;
look at the thresholds of the single seeds.
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
        of log2 of the threshold. In a seed's row, this is the standard error over prompts, and `lower` and `upper` are the neighbouring
        trained M. In the row for all seeds, it is the standard error over seeds, and `lower` and `upper` are the limits of the 95 %
        interval, or NaN if fewer than three seeds have a threshold. The table is empty if there are fewer than `MIN_SIZES` finite M.
    """
    table = table.assign(num_tasks=table["num_tasks"].astype(str))
    table = table[(table["distribution"] == "true") & (table["position"] == "mean") & (table["num_tasks"] != "inf")]
    if table["num_tasks"].nunique() < MIN_SIZES:
        return pd.DataFrame(columns=list(COLUMNS))
    last = table[table["step"] == table.groupby(["run", "num_tasks"])["step"].transform("max")]
    rows = [{"run": run, "num_seeds": 1} | _of_seed(*_log_ratios(own)) for run, own in last.groupby("run", sort=False)]
    if len(rows) > 1:
        rows.append(_over_seeds(rows))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def ladder_table(numbers: pd.DataFrame, configs: Mapping[str, RunConfig]) -> pd.DataFrame | None:
    """Convert the measured values of runs into a table for `thresholds`, or return None.

    The result is None if the runs differ in more than M and seeds, or if they have fewer than `MIN_SIZES` different finite M.

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
    """Return the settings of a run without its name and with M = 1, so that these settings are equal for all runs of one seed.

    M = 1 can be used with every other setting. M = inf cannot, because it excludes pools that change.
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


def _of_seed(sizes: np.ndarray, ratios: np.ndarray, errors: np.ndarray) -> dict[str, Any]:
    """Return the threshold of one seed from its values of M, r(M) and the standard errors of r."""
    is_clear = np.abs(ratios) > SIGN_ERRORS * errors
    clear_signs = np.sign(ratios[is_clear])
    falls = [(a, b) for a, b in pairwise(range(len(sizes))) if ratios[a] > 0 >= ratios[b]]
    nothing = {
        "threshold": math.nan,
        "stderr_log2": math.nan,
        "lower": math.nan,
        "upper": math.nan,
        "verdict": "suspect",
    }
    if not (clear_signs > 0).any() or not (clear_signs < 0).any() or not falls:
        sides = " and ".join(
            f"no model is significantly closer to {name}"
            for name, sign in (("dMMSE", 1), ("ridge", -1))
            if not (clear_signs == sign).any()
        )
        return nothing | {"reasons": sides or "the models with more tasks are closer to dMMSE"}
    # If r falls through zero several times, we take the last fall before the first M at which the model is clearly closer to ridge.
    first_ridge = int(np.flatnonzero(is_clear & (ratios < 0))[0])
    below, above = next((pair for pair in reversed(falls) if pair[1] <= first_ridge), falls[0])
    num_changes = int((np.diff(clear_signs) != 0).sum())
    reasons = []
    if num_changes > 1:
        reasons.append(f"the models switch {num_changes} times between dMMSE and ridge as M grows")
    width, drop = math.log2(sizes[above] / sizes[below]), ratios[below] - ratios[above]
    where = math.log2(sizes[below]) + width * ratios[below] / drop
    stderr = width / drop**2 * math.hypot(ratios[above] * errors[below], ratios[below] * errors[above])
    return {
        "threshold": 2**where,
        "stderr_log2": stderr,
        "lower": sizes[below],
        "upper": sizes[above],
        "verdict": "suspect" if reasons else "ok",
        "reasons": "; ".join(reasons),
    }


def _over_seeds(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the row for all seeds together."""
    pooled = over_seeds(math.log2(row["threshold"]) for row in rows)
    num_seeds, num_not_ok = len(pooled.values), sum(row["verdict"] != "ok" for row in rows)
    reasons = []
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
