"""Pool the findings and curves of an analysis over runs that differ only in their seeds.

The standard errors of one run do not say how much a finding differs between seeds. This module pools the same finding
of several runs. It gives the finding's mean, standard error and interval over seeds (`icl.analysis.seeds`). A finding
over seeds is `ok` if

- there are at least three seeds, so that there is an interval,
- every seed has the finding, with the verdict `ok` and the same text in the column `finding`,
- and, for the change of a signal over a stage, the interval does not contain zero.

Otherwise the finding is `suspect`, and the column `reasons` says why. For the rise of a loss, the interval is not a
condition. This rise is the last value of the loss minus its minimum, so it is never negative, and an interval above
zero would prove nothing. Instead, each run tests its own rise. The result of this test is in the column `finding`: it
is `none` if the loss does not rise.

A run can have several boundaries between stages, or several crossings in one direction. We match them between seeds by
their steps. Two steps t match if their difference in ln(t + 1) is at most ln `SAME_RATIO`, or at most `SAME_ERRORS`
standard errors. The nearest steps are joined first. A group of joined steps has at most one step of each seed, and each
of its steps matches all others in the group. Crossings are matched only if a seed has several of them. If each seed has
only one crossing, we treat all crossings as the same finding, however far apart they are. `invalid` boundaries are left
out. Changes over stages are pooled only if every boundary was found in all seeds. Otherwise the stages of the seeds are
not the same.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from icl.analysis.seeds import MIN_FOR_INTERVAL, POOLED, pool_runs, pooled_text, seed_groups
from icl.config import RunConfig

CURVES: dict[str, tuple[str, ...]] = {
    "behaviour": ("quantity", "distribution", "position", "scale"),
    "mixture": ("quantity", "mixture", "distribution", "position"),
}
"""Columns that identify a number measured at a saved step. The keys are the names of the analyses."""
SAME_RATIO = 2.0
"""Largest ratio of t + 1 between two steps t that can be the same boundary in two seeds (our choice)."""
SAME_ERRORS = 2.0
"""Largest difference in ln(t + 1), in standard errors, between two steps t that can be the same boundary in two
seeds."""
_STEPS = (
    "crossing_step",
    "critical_step",
    "prior_zero_minimum_step",
    "prior_task_mean_minimum_step",
    "transition_step",
    "boundary",
)
"""Findings whose value is a training step."""
_FINDINGS: dict[str, dict[str, tuple[str, ...]]] = {
    "behaviour": {
        "critical_step": ("distribution",),
        "rise": ("distribution",),
        "dip": ("distribution",),
        "crossing_step": ("distribution", "finding"),
        "prior_zero_minimum_step": ("distribution",),
        "prior_task_mean_minimum_step": ("distribution",),
    },
    "mixture": {"transition_step": ("mixture", "distribution", "finding")},
    "stages": {"boundary": (), "change": ("stage", "signal")},
}
"""The findings of each analysis, with the columns that distinguish several findings of the same name."""


class PooledRuns(NamedTuple):
    """Results of an analysis, pooled over seeds."""

    curves: pd.DataFrame
    """Pooled numbers at saved steps, with the columns `runs` and `step`, the columns listed in `CURVES`, and `icl.analysis.seeds.POOLED`.
    The table is empty for `stages`."""
    findings: pd.DataFrame
    """Pooled findings, with the columns `runs`, `quantity`, `labels`, `number`, `icl.analysis.seeds.POOLED`,
    `num_runs`, `finding`, `verdict` and `reasons`. If several findings have the same name and labels, `number` counts
    them from 1, in the order of their steps."""

    def table(self) -> pd.DataFrame:
        """Return findings and curves as one table. Only curves have a `step`."""
        parts = [part for part in (self.findings, self.curves) if len(part)]
        return pd.concat(parts, ignore_index=True) if parts else self.findings


def pool_analysis(name: str, tables: Mapping[str, pd.DataFrame], configs: Mapping[str, RunConfig]) -> PooledRuns:
    """Pool the tables of one analysis over the runs that differ only in their seeds.

    Args:
        name: `behaviour`, `mixture` or `stages`.
        tables: The table of each run.
        configs: The settings of each run.
    """
    groups = seed_groups(configs)
    table = pd.concat([part.assign(run=run) for run, part in tables.items()], ignore_index=True)
    if "predictor" in table:
        table = table[table["predictor"] == "model"]
    curves = pd.DataFrame()
    if name in CURVES:
        rows = table[table["step"].notna() & table["value"].notna()]
        curves = pool_runs(rows, groups, by=["step", *(key for key in CURVES[name] if key in rows)])
    sizes = {group: len(runs) for group, runs in groups.items()}
    parts = [_pool_finding(table, groups, sizes, *item) for item in _FINDINGS[name].items()]
    findings = pd.concat([part for part in parts if len(part)] or parts[:1], ignore_index=True)
    is_partial = (findings["quantity"] == "boundary") & (findings["num_seeds"] < findings["num_runs"])
    has_other_stages = findings["runs"].isin(findings.loc[is_partial, "runs"])
    return PooledRuns(curves, findings[(findings["quantity"] != "change") | ~has_other_stages].reset_index(drop=True))


def summary(findings: pd.DataFrame) -> Iterator[str]:
    """Yield a printed line for each pooled finding."""
    for row in findings.to_dict("records"):
        labels = f" ({row['labels']})" if row["labels"] else ""
        number = f" {row['number']}" if row["number"] > 1 else ""
        interval = f", 95 % {row['low']:.4g} to {row['high']:.4g}" if row["num_seeds"] >= MIN_FOR_INTERVAL else ""
        reasons = f": {row['reasons']}" if row["reasons"] else ""
        what = f" {row['finding']};" if row["finding"] else ""
        text = pooled_text(row, is_step=row["quantity"] in _STEPS)
        yield (
            f"{row['runs']}: {row['quantity'].replace('_', ' ')}{number}{labels}:{what} {text}{interval} "
            f"({row['num_seeds']} of {row['num_runs']} seeds); {row['verdict']}{reasons}."
        )


def _pool_finding(
    table: pd.DataFrame,
    groups: Mapping[str, Sequence[str]],
    sizes: Mapping[str, int],
    quantity: str,
    keys: Sequence[str],
) -> pd.DataFrame:
    """Return a row for each group of runs and each finding of the given name."""
    rows = table[(table["quantity"] == quantity) & table["value"].notna()]
    for column in ("finding", "verdict", *keys):
        rows = rows if column in rows else rows.assign(**{column: ""})
    rows = rows.assign(labels=[", ".join(_plain(value) for value in values) for values in rows[list(keys)].to_numpy()])
    if quantity == "boundary":
        rows = rows[rows["verdict"] != "invalid"]
    rows = rows.assign(number=_numbers(rows, groups)).sort_values("number", kind="stable")
    pooled = pool_runs(rows, groups, by=["labels", "number"], is_step=quantity in _STEPS)
    records = []
    for row in pooled.to_dict("records"):
        members = groups[row["runs"]]
        own = rows[rows["run"].isin(members) & (rows["labels"] == row["labels"]) & (rows["number"] == row["number"])]
        counts = own["finding"].replace("", pd.NA).dropna().value_counts()
        row |= {"quantity": quantity, "num_runs": sizes[row["runs"]]}
        row["finding"] = (
            ", ".join(f"{word} {count}" for word, count in counts.items()) if len(counts) > 1 else "".join(counts.index)
        )
        records.append(row | _judge(row, num_not_ok=int((own["verdict"] != "ok").sum()), is_mixed=len(counts) > 1))
    columns = ["runs", "quantity", "labels", "number", *POOLED, "num_runs", "finding", "verdict", "reasons"]
    return pd.DataFrame(records, columns=columns)


def _numbers(rows: pd.DataFrame, groups: Mapping[str, Sequence[str]]) -> pd.Series:
    """Return the number of each finding. The same finding has the same number in all runs of a group."""
    numbers = pd.Series(1, index=rows.index)
    for runs in groups.values():
        for _, same in rows[rows["run"].isin(runs)].groupby("labels"):
            if (same["quantity"] == "boundary").any() or same["run"].duplicated().any():
                for number, members in enumerate(_match(same), 1):
                    numbers[members] = number
    return numbers


def _match(rows: pd.DataFrame) -> list[pd.Index]:
    """Match the steps of several runs. Return the rows that belong together, ordered by their mean ln(step + 1)."""
    steps, runs = rows["value"].to_numpy(float), rows["run"].to_numpy()
    times = np.log1p(steps)
    errors = np.nan_to_num(rows["stderr"].to_numpy(float) / (1 + steps))
    distances = np.abs(times[:, None] - times)
    limits = np.maximum(math.log(SAME_RATIO), SAME_ERRORS * np.hypot(errors[:, None], errors))
    can_join = (distances <= limits) & (runs[:, None] != runs)
    clusters = {index: [index] for index in range(len(rows))}
    pairs = np.argwhere(np.triu(can_join))
    for first, second in pairs[np.argsort(distances[tuple(pairs.T)], kind="stable")].tolist():
        one, other = clusters[first], clusters[second]
        if can_join[np.ix_(one, other)].all():
            joined = one + other
            clusters |= dict.fromkeys(joined, joined)
    unique = {id(members): members for members in clusters.values()}.values()
    return [rows.index[members] for members in sorted(unique, key=lambda members: times[members].mean())]


def _judge(row: Mapping[str, Any], *, num_not_ok: int, is_mixed: bool) -> dict[str, str]:
    """Return the verdict of a finding over seeds."""
    reasons = []
    if row["num_seeds"] < MIN_FOR_INTERVAL:
        reasons.append(f"{row['num_seeds']} seed(s) give no interval; at least {MIN_FOR_INTERVAL} are needed")
    elif row["quantity"] == "change" and row["low"] <= 0 <= row["high"]:
        reasons.append("the interval over seeds contains zero")
    if row["num_seeds"] < row["num_runs"]:
        effect = ", so changes over stages are not pooled" if row["quantity"] == "boundary" else ""
        reasons.append(f"only {row['num_seeds']} of {row['num_runs']} seeds have this finding{effect}")
    if is_mixed:
        reasons.append("the finding differs between seeds")
    if num_not_ok:
        reasons.append(f"the verdict of {num_not_ok} of the runs is not ok")
    return {"verdict": "suspect" if reasons else "ok", "reasons": "; ".join(reasons)}


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
