"""`icl analyse FOLDER`: analyse every run in a folder, then pool the findings over the runs that differ only in their seeds."""

import argparse
import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from icl.analysis import NotApplicableError
from icl.config.validation import ConfigError, UserError
from icl.files.writing import write_atomically

if TYPE_CHECKING:
    import pandas as pd

    from icl.analysis.run import Result

POOLED = ("behaviour", "mixture", "stages")
"""Analyses whose findings are pooled over seeds."""


def analyse_runs(
    names: Sequence[str],
    folder: Path,
    runs: Mapping[str, Path],
    options: argparse.Namespace,
    analyse: Callable[[str, Path, argparse.Namespace], "Result"],
) -> int:
    """Run each analysis on each run, and write the pooled tables and figures. Return 1 if a run could not be analysed.

    Args:
        names: Names of the analyses.
        folder: The folder of the runs.
        runs: The runs by name.
        options: Options of the command.
        analyse: Function that analyses one run, prints the results and writes them into the run's folder.
    """
    for option in ("out", "output_plot", "jointly_with"):
        if getattr(options, option, None) is not None:
            raise ConfigError(
                f"`--{option}` is for one run, but {folder} has {len(runs)} runs below it; leave out `--{option}`."
            )
    told: set[str] = set()
    for name in names:
        tables = {}
        for run, path in runs.items():
            print(f"\n{run}: {name}")
            try:
                tables[run] = analyse(name, path, copy.copy(options)).table
            except NotApplicableError as error:
                print(f"icl: {run}: {name} is left out: {error}", file=sys.stderr)
                if options.what != "all":
                    told.add(str(error))
            except UserError as error:
                if str(error) not in told:  # a wrong setting causes the same error in every run
                    print(f"icl: {run}: {error}", file=sys.stderr)
                told.add(str(error))
        if name in POOLED and len(tables) > 1:
            _pool(name, folder, tables, {run: runs[run] for run in tables})
    return 1 if told else 0


def _pool(name: str, folder: Path, tables: "Mapping[str, pd.DataFrame]", runs: Mapping[str, Path]) -> None:
    """Pool the findings of an analysis over seeds, print them and write a table. For analyses in `CURVES`, also write a figure."""
    from icl.analysis.over_runs import CURVES, pool_analysis, summary
    from icl.plotting.over_runs import plot_over_runs
    from icl.plotting.style import save_figure
    from icl.runs.checkpoints import checkpoint_files, read_config_of

    configs = {run: read_config_of(checkpoint_files(path)[0]) for run, path in runs.items()}
    pooled = pool_analysis(name, tables, configs)
    if pooled.findings.empty and pooled.curves.empty:
        print("\nNo two runs differ only in their seeds, so nothing is pooled over seeds.")
        return
    print("\nOver seeds: mean ± standard error over seeds, or the two values if there are only two seeds:")
    print("\n".join(summary(pooled.findings)))
    file = folder / f"{name}-seeds.csv"
    write_atomically(file, pooled.table().to_csv(index=False).encode())
    print(f"Table   {file}")
    if name in CURVES:
        figure = plot_over_runs(name, tables, configs, title=folder.resolve().name)
        print(f"Figure  {save_figure(figure, folder / f'{name}-seeds.png')}")
