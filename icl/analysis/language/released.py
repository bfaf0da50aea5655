"""The released numbers of the two-layer language model of Hoogland et al. (2024), for comparison with a run.

`icl analyse RUN --what behaviour` prints these numbers for a run with the preset L2W256, trained here or imported. A released step is
compared with the nearest saved step if that step is at most `NEAR` steps away. The authors saved every 100 steps.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from icl.runs.measure import Entry

PRESET = "L2W256"
NEAR = 100
"""Largest distance, in steps, between a released step and the saved step that is compared with it."""
STEPS = (0, 900, 6500, 8500, 17_500, 50_000)
"""Step 0, and the ends of the published stages."""
RELEASED: Mapping[tuple[str, str, str], tuple[float, ...]] = {
    ("loss", "", "mean"): (7.943, 4.348, 3.631, 3.560, 3.294, 3.215),
    ("bigram_score", "", ""): (7.947, 4.633, 5.316, 5.398, 5.761, 5.918),
    ("icl_score", "", "49:499"): (-0.122, -0.058, -0.049, -0.062, -0.211, -0.218),
    ("previous_token", "0.1", ""): (0.030, 0.026, 0.039, 0.063, 0.291, 0.289),
    ("prefix_matching", "1.7", ""): (0.011, 0.010, 0.008, 0.010, 0.078, 0.079),
}
"""Released numbers at `STEPS`. Each key gives the values of the columns `quantity`, `part` (such as the head 0.1) and `position` in the table of
`--what behaviour`."""
LLCS = (123.6, 149.9, 172.4, 170.9, 179.5, 181.3)
"""Released LLCs at `STEPS`, except that the last one is from step 49,900. They are affected by the bug that
`icl.sampling.published.llc_with_initial_loss_bug` reproduces."""
LLC_COLUMN = "llc_with_initial_loss_bug"
_HEADER = ("step", "test loss", "bigram score", "ICL score", "previous 0.1", "prefix 1.7", "LLC, with bug")


def beside_released(entries: Sequence[Entry], llcs: pd.DataFrame) -> list[str]:
    """Return the printed lines of a table: for each released step, a line with the released numbers and a line with the run's numbers.

    Args:
        entries: The behaviours of a run.
        llcs: The run's `llc.csv`, or an empty table. Only its rows of the mode `published` are comparable with the released LLCs.
    """
    lines = []
    for index, released_step in enumerate(STEPS):
        entry = min(entries, key=lambda entry: abs(entry.step - released_step))
        if abs(entry.step - released_step) > NEAR:
            continue
        rows = {(row["quantity"], row["part"], row["position"]): row for row in entry.rows}
        theirs = [f"{numbers[index]:.3f}" for numbers in RELEASED.values()]
        ours = [_shown(rows.get(key)) for key in RELEASED]
        lines += [
            _line((f"{released_step:,}", *theirs, f"{LLCS[index]:.1f}", "released")),
            _line(
                ("" if entry.step == released_step else f"{entry.step:,}", *ours, _llc(llcs, entry.step), "this run")
            ),
        ]
    if not lines:
        return []
    return [
        "",
        "Comparison with the released numbers of the two-layer model (Hoogland et al. 2024):",
        _line((*_HEADER, "")),
        *lines,
    ]


def _line(cells: Sequence[str]) -> str:
    return "".join(f"{cell:>16s}" if number else f"{cell:>8s}" for number, cell in enumerate(cells)).rstrip()


def _shown(row: Mapping[str, Any] | None) -> str:
    return "-" if row is None else f"{row['value']:.3f} ± {row['stderr']:.3f}"


def _llc(llcs: pd.DataFrame, step: int) -> str:
    """Return the LLC of the mode `published` at a step as a string, or "-" if there is none."""
    if LLC_COLUMN not in llcs:
        return "-"
    values = llcs.loc[llcs["step"] == step, LLC_COLUMN].dropna()
    return f"{values.iloc[-1]:.1f}" if len(values) and math.isfinite(values.iloc[-1]) else "-"
