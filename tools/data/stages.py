"""Compute the shipped `stages.csv` again from shipped tables: `python -m tools.data.stages small published-run`.

The analysis `stages` needs only the signals at the saved steps, which `stages.csv` contains (the rows `measured`), and the losses of the
LLC chains, which `llc.csv` contains. So after a change of the analysis, its table can be computed again without the checkpoints of the
runs. The shipped numbers are rounded to five digits; this rounding changes boundaries by less than 0.02 standard errors.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd

from icl.analysis import stages
from icl.files.writing import write_atomically
from icl.runs.folder import RunFolder
from tools.data.schema import LABELS, TABLES
from tools.data.tables import FOLDER, conform, shipped_text

_QUANTITIES = {"loss": ("loss", "mean"), "icl_score": ("icl_score", "1:8"), "prior_task_score": ("prior_zero", "mean")}
"""Quantity and position of each signal in `evaluation.csv`."""


def recompute(size: str) -> pd.DataFrame:
    """Return the table `stages` of a size, computed from the shipped tables."""
    shipped, llcs = (pd.read_csv(FOLDER / size / f"{name}.csv") for name in ("stages", "llc"))
    parts = []
    for run, rows in shipped.groupby("run", sort=False):
        measured = rows[rows["quantity"] == "measured"].rename(columns={"at": "step"}).astype({"step": int})
        with TemporaryDirectory() as folder:
            write_signals(RunFolder(Path(folder) / "run"), measured, llcs[llcs["run"] == run].drop(columns="run"))
            parts.append(stages.analyse(Path(folder) / "run", stages.Settings()).table.assign(run=run))
    return conform(pd.concat(parts, ignore_index=True), TABLES["stages"])


def write_signals(run: RunFolder, measured: pd.DataFrame, llcs: pd.DataFrame) -> None:
    """Write the tables of a run from which `stages` reads the signals."""
    plain = measured[measured["signal"] != "llc"]
    quantities, positions = zip(*plain["signal"].map(_QUANTITIES), strict=True)
    table = plain[["step", "value", "stderr"]].assign(
        checkpoint_hash="", distribution="pretrain", quantity=quantities, position=positions
    )
    run.write_result("evaluation.csv", table.to_csv(index=False))
    used = measured.loc[measured["signal"] == "llc", ["step", "value", "stderr"]].rename(columns={"value": "llc"})
    if len(used):
        chains = used.merge(llcs, on=["step", "llc", "stderr"]).assign(settings="shipped", checkpoint_hash="")
        run.write_result("llc.csv", chains.to_csv(index=False))


def main(words: Sequence[str] | None = None) -> None:
    """Write the tables."""
    parser = argparse.ArgumentParser(prog="python -m tools.data.stages", description=__doc__.partition("\n")[0])
    shipped = [size for size in LABELS if (FOLDER / size / "stages.csv").is_file()]
    parser.add_argument(
        "sizes", nargs="+", choices=shipped, metavar="SIZE", help=f"one or more of {', '.join(shipped)}"
    )
    for size in parser.parse_args(words).sizes:
        table = recompute(size)
        write_atomically(FOLDER / size / "stages.csv", shipped_text(table).encode())
        print(f"{size}: {len(table):,} rows")


if __name__ == "__main__":
    main()
