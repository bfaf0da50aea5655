"""Pool the findings and curves of an analysis over runs that differ only in their seeds.

The standard errors of one run do not say how much a finding differs between seeds. This module pools the same finding
of several runs. It gives the finding's mean, standard error and interval over seeds (`icl.analysis.seeds`). A finding
over seeds is `ok` if

- there are at least three seeds, so that there is an interval,
- every seed has the finding, with the verdict `ok` and the same text in the column `finding`,
- and, for a difference such as the rise of a loss, the interval does not contain zero.

Otherwise the finding is `suspect`, and the column `reasons` says why.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from icl.analysis.seeds import MIN_FOR_INTERVAL, POOLED, pool_runs, pooled_text, seed_groups
from icl.config import RunConfig

CURVES: dict[str, tuple[str, ...]] = {
    "behaviour": ("quantity", "distribution", "position", "scale"),
    "mixture": ("quantity", "mixture", "distribution", "position"),
}
"""Columns that identify a number measured at a saved step. The keys are the names of the analyses."""
_STEPS = (
    "crossing_step",
    "critical_step",
    "prior_zero_minimum_step",
    "prior_task_mean_minimum_step",
    "transition_step",
    "boundary",
)
"""Findings whose value is a training step."""
_DIFFERENCES = ("rise", "change")
"""Findings that state that a quantity differs from zero."""
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
    `num_runs`, `finding`, `verdict` and `reasons`. `number` is the index, from 1, of a finding among the findings of a
    run that have the same name and labels."""

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
    return PooledRuns(curves, pd.concat([part for part in parts if len(part)] or parts[:1], ignore_index=True))


def summary(findings: pd.DataFrame) -> Iterator[str]:
    """Yield a printed line for each pooled finding."""
    for row in findings.to_dict("records"):
        labels = f" ({row['labels']})" if row["labels"] else ""
        number = f" {row['number']}" if row["number"] > 1 else ""
        interval = f", 95 % {row['low']:.4g} to {row['high']:.4g}" if row["num_seeds"] >= MIN_FOR_INTERVAL else ""
        reasons = f": {row['reasons']}" if row["reasons"] else ""
        what = f" {row['finding']};" if row["finding"] else ""
        yield (
            f"{row['runs']}: {row['quantity'].replace('_', ' ')}{number}{labels}:{what} {pooled_text(row)}{interval} "
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
    rows = rows.sort_values("value") if quantity in _STEPS else rows
    rows = rows.assign(number=rows.groupby(["run", "labels"]).cumcount() + 1)
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


def _judge(row: Mapping[str, Any], *, num_not_ok: int, is_mixed: bool) -> dict[str, str]:
    """Return the verdict of a finding over seeds."""
    reasons = []
    if row["num_seeds"] < MIN_FOR_INTERVAL:
        reasons.append(f"{row['num_seeds']} seed(s) give no interval; at least {MIN_FOR_INTERVAL} are needed")
    elif row["quantity"] in _DIFFERENCES and row["low"] <= 0 <= row["high"]:
        reasons.append("the interval over seeds contains zero")
    if row["num_seeds"] < row["num_runs"]:
        reasons.append(f"only {row['num_seeds']} of {row['num_runs']} seeds have this finding")
    if is_mixed:
        reasons.append("the finding differs between seeds")
    if num_not_ok:
        reasons.append(f"the verdict of {num_not_ok} of the runs is not ok")
    return {"verdict": "suspect" if reasons else "ok", "reasons": "; ".join(reasons)}


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
