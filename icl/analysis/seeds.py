"""Standard errors and intervals over seeds, for a number measured in several runs with the same settings and different seeds.

The standard error over prompts says how precisely we know a number of one trained model. It says nothing about models
that are trained with the same settings and other seeds. So a claim about the effect of a setting, such as the task
diversity M, needs the standard error over seeds. A claim about the step at which something happens needs it too. For
the values v_1 .. v_n of n seeds we give

- the mean and, for at least two seeds, its standard error s / sqrt(n), where s is the sample standard deviation;
- for at least three seeds, the 95 % interval: mean +- t s / sqrt(n), with Student's t for n - 1 degrees of freedom. For
  two seeds t is 12.7, so the interval would be too wide to be useful. With one or two seeds we therefore show the
  values themselves.

Runs that differ only in seeds have the same fixed prompts, unless `seeds.evaluation` differs. With the same prompts,
the errors over prompts are correlated between runs. For the mean over runs, the error over prompts is then at most the
mean of the runs' errors. We give this upper bound in addition to the error over seeds. Neither error includes the
other.

Training steps are averaged as ln(step + 1), because they are spread over orders of magnitude. The interval is computed
in ln(step + 1) too, and its limits are converted back to steps. No step is negative, so the lower limit is at least 0.
For steps, the mean of the runs' errors over prompts is not an upper bound on the error of the mean step.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from icl.config import RunConfig, SeedsConfig
from icl.run_names import varying_names

MIN_FOR_INTERVAL = 3
"""Smallest number of seeds for which we give an interval."""
POOLED = ("value", "stderr", "seed_stderr", "num_seeds", "low", "high")
"""Columns of `pool`: the mean over seeds (`value`), the mean of the standard errors over prompts (`stderr`), the
standard error of the mean over seeds (`seed_stderr`), the number of seeds, and the limits of the 95 % interval."""
_ALL = "all runs"


class OverSeeds(NamedTuple):
    """Mean, standard error and 95 % interval of a number over seeds."""

    values: tuple[float, ...]
    """The finite values, one for each seed."""
    mean: float
    stderr: float
    """Standard error of the mean over seeds; NaN for one seed."""
    low: float
    """Lower limit of the 95 % interval; NaN for fewer than three seeds."""
    high: float
    """Upper limit of the 95 % interval; NaN for fewer than three seeds."""

    @property
    def text(self) -> str:
        """The mean with its error over seeds as a string; for one or two seeds, the values themselves; "-" for none."""
        if len(self.values) < MIN_FOR_INTERVAL:
            return ", ".join(f"{value:.4g}" for value in self.values) or "-"
        return f"{self.mean:.4g} ± {self.stderr:.2g}"


def over_seeds(values: Iterable[float], *, is_step: bool = False) -> OverSeeds:
    """Return the mean over seeds, with its standard error and 95 % interval. Values that are not finite are left out.

    Args:
        values: One value for each seed.
        is_step: Whether the values are training steps, which are averaged as ln(step + 1). The error of the mean step
            is then propagated to first order. The limits of the interval are exact, and at least 0.
    """
    finite = [float(value) for value in values if math.isfinite(value)]
    table = pool(pd.DataFrame({"value": finite, "all": 0}), by=["all"], is_step=is_step)
    if not finite:
        return OverSeeds((), math.nan, math.nan, math.nan, math.nan)
    row = table.iloc[0]
    return OverSeeds(tuple(finite), *(float(row[name]) for name in ("value", "seed_stderr", "low", "high")))


def pool(table: pd.DataFrame, *, by: Sequence[str], is_step: bool = False) -> pd.DataFrame:
    """Pool a table over seeds, separately for each combination of values in the columns `by`.

    The result has a row for each combination, and the columns `by` and `POOLED`.

    Args:
        table: A row for each seed and combination, with the columns `by`, `value` and, if errors over prompts are known, `stderr`.
        by: Columns that identify a number, such as the group of runs, the step and the quantity.
        is_step: See `over_seeds`.
    """
    values = table["value"].astype(float).replace([np.inf, -np.inf], np.nan)
    errors = table["stderr"].astype(float) if "stderr" in table else pd.Series(np.nan, index=table.index)
    numbers = table[list(by)].assign(value=np.log1p(values) if is_step else values, stderr=errors.where(values.notna()))
    groups = numbers.groupby(list(by), sort=False, dropna=False)
    pooled = groups.agg(
        value=("value", "mean"), stderr=("stderr", "mean"), spread=("value", "std"), num_seeds=("value", "count")
    ).reset_index()
    error = pooled["spread"] / np.sqrt(pooled["num_seeds"])
    freedom = (pooled["num_seeds"] - 1).where(pooled["num_seeds"] >= MIN_FOR_INTERVAL)
    half = error * stdtrit(freedom, 0.975)
    low, high = pooled["value"] - half, pooled["value"] + half
    if is_step:
        low, high, error = np.expm1(low.clip(lower=0.0)), np.expm1(high), error * np.exp(pooled["value"])
        pooled["value"] = np.expm1(pooled["value"])
    return pooled.assign(seed_stderr=error, low=low, high=high)[[*by, *POOLED]]


def pooled_text(row: Mapping[str, Any], *, is_step: bool = False) -> str:
    """Return the number in a row of `pool` as a string, in the format of `OverSeeds.text`.

    For two seeds, the mean plus and minus its standard error gives the two values. For steps, mean and error are first
    converted to ln(step + 1), in which `pool` computed them.

    Args:
        row: The row.
        is_step: The value that was given to `pool`.
    """
    value, error = row["value"], row["seed_stderr"]
    values = (value - error, value + error) if row["num_seeds"] == 2 else (value,) * int(row["num_seeds"])
    if is_step and row["num_seeds"] == 2:
        mean, log_error = math.log1p(value), error / (1 + value)
        # Without rounding, a step of 0 would be printed as a number such as 2e-16.
        values = tuple(max(0.0, round(math.expm1(log), 6)) for log in (mean - log_error, mean + log_error))
    return OverSeeds(values, value, error, row["low"], row["high"]).text


def seed_groups(configs: Mapping[str, RunConfig]) -> dict[str, list[str]]:
    """Group the runs that differ only in their seeds.

    The keys of the result are the names of the groups, and the values are the names of the runs in each group. The name of a group shows
    the settings in which the groups differ, such as `M=8`. If two runs also have the same seeds, they are the same experiment, and only
    the first one counts.
    """
    plain = {name: dataclasses.replace(config, seeds=SeedsConfig()) for name, config in configs.items()}
    groups: dict[str, list[str]] = {}
    seen = set()
    for (name, config), label in zip(
        configs.items(), varying_names(list(plain.values())) if plain else [], strict=True
    ):
        if (label, config.seeds) not in seen:
            seen.add((label, config.seeds))
            groups.setdefault(label or _ALL, []).append(name)
    return groups


def pool_runs(
    table: pd.DataFrame, groups: Mapping[str, Sequence[str]], *, by: Sequence[str], is_step: bool = False
) -> pd.DataFrame:
    """Pool a table with a column `run` over each group of at least two runs.

    The first column of the result, `runs`, is the name of the group.
    """
    label = {run: name for name, runs in groups.items() if len(runs) > 1 for run in runs}
    inside = table[table["run"].isin(list(label))]
    return pool(inside.assign(runs=inside["run"].map(label)), by=["runs", *by], is_step=is_step)
