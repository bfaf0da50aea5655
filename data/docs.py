"""The pages made of the shipped tables: `python -m data.docs` writes them anew, and a test says when they are stale.

`data/README.md` is made whole; of `docs/reproduction.md` the parts between `<!-- made: NAME -->` and `<!-- end -->`.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from data.reproduction import BLOCKS
from data.schema import TABLES, Column
from icl.files.writing import write_atomically

ROOT = Path(__file__).resolve().parents[1]
_HEAD = """\
# Data

Small tables that the figures are drawn from, and what makes them. `make data` trains, evaluates, estimates and analyses everything in
`small.sh` (two CPU cores, an evening), then writes `small/`; `make data SIZE=full` does the published sizes of `full.sh`, which
{full}. Both go on where they were stopped. `python -m data small --list` shows how far they are.

{about}

Conventions: a row is one number, or one estimate with its diagnostics; step s means after s updates; losses and squared distances are per
target, not divided by D; `stderr` is a standard error; numbers have five significant digits, and one that is not finite is left out. `schema.py` has the types, `provenance.json` the
commands, dates, versions and hardware of every table, `phases.csv` what each phase cost. `published.csv` holds the released numbers that
ours are compared with (`docs/reproduction.md`). `models/` has a few weights (safetensors), so that notebooks can show predictions.
`benchmarks/` is `make bench`'s. `verdict-rates.csv` says how often verdicts of turning points and stages are right on simulated curves
(`python -m tools.verdict_rates --runs 200`).
"""


def make_readme(_: str) -> str:
    """`data/README.md`."""
    sizes = [size for size in ("small", "full") if (ROOT / "data" / size / "provenance.json").is_file()]
    lines = []
    for size in sizes:
        provenance = json.loads((ROOT / "data" / size / "provenance.json").read_text(encoding="utf-8"))
        lines.append(f"`{size}/` is {provenance['label']}.")
    full = "are in `full/`" if "full" in sizes else "have not been run yet, for want of a GPU"
    parts = [_HEAD.format(full=full, about=" ".join(lines))]
    for name, about in TABLES.items():
        rows = ", ".join(f"{size}: {_num_rows(size, name):,} rows" for size in sizes if _num_rows(size, name))
        columns = "; ".join(f"`{key}` {_describe(column)}" for key, column in about.columns.items())
        thinned = f" Thinned: {about.thinned}." if about.thinned else ""
        parts.append(f"**`{name}.csv`** ({rows or 'not there yet'}): {about.about}.{thinned} Columns: {columns}.\n")
    return "\n".join(parts)


def make_reproduction(old: str) -> str:
    """`docs/reproduction.md` with its tables made anew."""

    def replace(match: re.Match[str]) -> str:
        return f"<!-- made: {match[1]} -->\n{BLOCKS[match[1]](ROOT / 'data')}\n<!-- end -->"

    return re.sub(r"<!-- made: (\w+) -->\n.*?<!-- end -->", replace, old, flags=re.DOTALL)


PAGES: dict[str, Callable[[str], str]] = {"data/README.md": make_readme, "docs/reproduction.md": make_reproduction}
"""By path from the root, what makes a page of its old text."""


def stale_pages() -> list[str]:
    """The pages that are not what the tables make of them."""
    return [page for page, make in PAGES.items() if make(_read(page)) != _read(page)]


def write_pages() -> list[Path]:
    """Write them all."""
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
