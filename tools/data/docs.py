"""Pages that are generated from the shipped tables. `python -m tools.data.docs` writes them, and a test fails if they are out of date.

All of `data/README.md` is generated. In `docs/reproduction.md`, only the parts between `<!-- made: NAME -->` and
`<!-- end -->` are generated.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from icl.files.writing import write_atomically
from tools.data.reproduction import BLOCKS
from tools.data.schema import LABELS, TABLES, Column

ROOT = Path(__file__).resolve().parents[2]
_HEAD = """\
# Data

This folder contains the tables from which the figures are drawn. `make data` runs the training, evaluations, LLC estimates and analyses
of `tools/data/small.sh` (an evening on two CPU cores), then writes the tables to `small/`. `make data SIZE=published-run` does the same
for the whole published run of `L2H4` (a day on two cores), and `make data SIZE=full` for the published sizes of `tools/data/full.sh`. {full}
If one of these commands was interrupted, run it again to continue. `python -m tools.data small --list` shows which phases are done.

{about}

Conventions:

- A row of a table is one number, or one estimate with its diagnostics. `stderr` is a standard error.
- Step s is the state after s updates. Losses and squared distances are per target, not divided by D.
- Numbers are rounded to five significant digits. Numbers of at least 100,000 are rounded to whole
  numbers. Infinite values and NaN are left empty.

Other files:

- `tools/data/schema.py` defines the columns and their types.
- `provenance.json` has the commands, dates, versions and hardware of every table. `phases.csv` has the time of every phase.
- `published.csv` has the released numbers with which ours are compared (`docs/reproduction.md`).
- `models/` has the weights of a few models (safetensors). The notebooks draw the predictions of these models.
- `benchmarks/` has the results of `make bench`.
- `verdict-rates.csv` shows, for simulated curves, how often the verdicts of turning points and stages are right
  (`python -m tools.verdict_rates --runs 200`).
- `coverage.csv` shows how often the intervals of LLC estimates contain the true LLC, for losses whose LLC is known (`python -m tools.coverage`).

Tables:
"""


def make_readme(_: str) -> str:
    """Return the text of `data/README.md`. The argument, its old text, is not used."""
    sizes = [size for size in LABELS if (ROOT / "data" / size / "provenance.json").is_file()]
    lines = []
    for size in sizes:
        provenance = json.loads((ROOT / "data" / size / "provenance.json").read_text(encoding="utf-8"))
        lines.append(f"`{size}/` is {provenance['label']}.")
    full = (
        "The tables of the published sizes are in `full/`."
        if "full" in sizes
        else "`make data SIZE=full` has not been run yet, because it needs a GPU."
    )
    parts = [_HEAD.format(full=full, about=" ".join(lines))]
    for name, about in TABLES.items():
        rows = ", ".join(f"{size}: {_num_rows(size, name):,} rows" for size in sizes if _num_rows(size, name))
        columns = "; ".join(f"`{key}` {_describe(column)}" for key, column in about.columns.items())
        thinned = f" Thinned: {about.thinned}." if about.thinned else ""
        parts.append(f"**`{name}.csv`** ({rows or 'not made yet'}): {about.about}.{thinned} Columns: {columns}.\n")
    return "\n".join(parts)


def make_reproduction(old: str) -> str:
    """Return `docs/reproduction.md` with its tables made again."""

    def replace(match: re.Match[str]) -> str:
        return f"<!-- made: {match[1]} -->\n{BLOCKS[match[1]](ROOT / 'data')}\n<!-- end -->"

    return re.sub(r"<!-- made: (\w+) -->\n.*?<!-- end -->", replace, old, flags=re.DOTALL)


PAGES: dict[str, Callable[[str], str]] = {"data/README.md": make_readme, "docs/reproduction.md": make_reproduction}
"""Functions that make a page from its old text. The keys are the paths of the pages, relative to the root of the repository."""


def stale_pages() -> list[str]:
    """Return the pages that are out of date."""
    return [page for page, make in PAGES.items() if make(_read(page)) != _read(page)]


def write_pages() -> list[Path]:
    """Write all pages, and return their paths."""
    for page, make in PAGES.items():
        write_atomically(ROOT / page, make(_read(page)).encode())
    return [ROOT / page for page in PAGES]


def _read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8") if (ROOT / page).is_file() else ""


def _num_rows(size: str, name: str) -> int:
    file = ROOT / "data" / size / f"{name}.csv"
    return len(pd.read_csv(file)) if file.is_file() else 0


def _describe(column: Column) -> str:
    return f"({column.kind}{', may be empty' if column.may_miss else ''}): {column.meaning}"


if __name__ == "__main__":
    for written in write_pages():
        print(written)
