"""Rows of LLC estimates for people, files and W&B."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from icl.storage import plain_rows, table_format, write_atomically

if TYPE_CHECKING:
    import pandas as pd


def shown(table: "pd.DataFrame") -> str:
    """What people want to see of the rows, at most 40 of them."""
    names = [
        "step",
        "llc",
        "stderr",
        "bias_bound",
        "drop_at_mean",
        "init_loss",
        "mean_loss",
        "trivial_loss",
        "rhat",
        "ess",
        "num_chains_used",
        "verdict",
    ]
    rows = table[names].rename(columns={"init_loss": "L(w0)", "mean_loss": "E[L]", "trivial_loss": "zero's loss"})
    return rows.to_string(index=False, float_format="{:.4g}".format, max_rows=40, na_rep="-")


def verdicts(table: "pd.DataFrame") -> str:
    """How many of each verdict, and the commonest reason for those that are not ok."""
    counts = table["verdict"].value_counts()
    told = ", ".join(f"{counts[name]} {name}" for name in ("ok", "suspect", "invalid") if name in counts)
    lines = [f"Verdicts: {told}."]
    for verdict in ("suspect", "invalid"):
        first = table.loc[table["verdict"] == verdict]
        if len(first):
            step, reasons = first["step"].iloc[-1], first["reasons"].iloc[-1]
            where = "" if step is None or len(table) == 1 else f" at step {step:,}"
            lines.append(f"  {verdict}{where}: {reasons}.")
    return "\n".join(lines)


def write_rows(out: Path, table: "pd.DataFrame") -> Path:
    """As CSV or JSON, as the name ends.

    Raises:
        StorageError: If it cannot be written.
    """
    if table_format(out) == "csv":
        text = table.to_csv(index=False)
    else:
        import json

        text = json.dumps(plain_rows(table), indent=1, allow_nan=False) + "\n"
    write_atomically(out, text.encode())
    return out


def log_rows(wandb_run: Any, table: "pd.DataFrame") -> None:
    """A row of W&B for each step, except those that it has."""
    from icl.training.wandb_log import sent_step

    sent = sent_step(wandb_run)
    for row in table.to_dict("records"):
        if row["step"] > sent:
            numbers = (
                "llc",
                "stderr",
                "bias_bound",
                "drop_at_mean",
                "init_loss",
                "mean_loss",
                "rhat",
                "ess",
                "num_chains_used",
            )
            wandb_run.log(
                {"step": row["step"], **{f"llc/{name}": row[name] for name in numbers}, "llc/verdict": row["verdict"]}
            )
