"""A gallery: figures drawn from shipped tables, each saved as PNG and PDF with its caption beside it, and a page that shows them all.

A notebook opens one, takes tables from it and hands figures back:

    gallery = Gallery("llcs")                       # ../data/small, ../figures
    gallery.save(llc.plot_known_answers(gallery.table("known-answers")), "known-answers", "Estimates beside the truth.")

Every figure says in a line above it, and every caption in full, which data it is of: their size, date, versions and hardware. The same tables give the
same bytes.
"""

import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.figure import Figure

from icl.plotting.style import render_figure
from icl.storage import write_atomically
from icl.validation import ConfigError

FOLDER_VARIABLE = "ICL_FIGURES"
"""The environment variable that sends figures elsewhere."""
_TEXT = {"num_tasks": str, "position": str, "settings": str}


class Saved(NamedTuple):
    """A figure that was saved; notebooks show it."""

    png: bytes
    caption: str

    def _repr_png_(self) -> bytes:
        return self.png


class Gallery:
    """The shipped tables of one size, and the folder that figures go to."""

    def __init__(self, notebook: str, *, size: str = "small", data: str | Path = "../data") -> None:
        self.notebook = notebook
        self.data = Path(data) / size
        self.figures = Path(os.environ.get(FOLDER_VARIABLE) or "../figures")
        self.provenance: dict[str, Any] = json.loads((self.data / "provenance.json").read_text(encoding="utf-8"))
        self._used: list[str] = []

    def table(self, name: str, run: str | None = None) -> pd.DataFrame:
        """A shipped table, all of it or a run's rows; the next figure saved counts as drawn from it.

        Raises:
            ConfigError: If there is no such table or run.
        """
        file = self.data / f"{name}.csv"
        if not file.is_file():
            raise ConfigError(
                f"There is no table {file}; `python -m data {self.data.name}` makes it, if its runs are there."
            )
        table = pd.read_csv(file, dtype=_TEXT)
        self._used.append(name)
        if run is None:
            return table
        if run not in set(table["run"]):
            raise ConfigError(f"{file} has no run `{run}`; it has {', '.join(table['run'].unique())}.")
        return table[table["run"] == run].reset_index(drop=True)

    def model(self, run: str, step: int) -> Path:
        """The file of a shipped model, at the saved step nearest to this one.

        Raises:
            ConfigError: If no model of this run ships.
        """
        files = sorted((self.data / "models" / run.replace("/", "-")).glob("step-*.safetensors"))
        if not files:
            raise ConfigError(f"No model of `{run}` ships in {self.data / 'models'}.")
        self._used.append("checkpoints")
        return min(files, key=lambda file: abs(int(file.stem.partition("-")[2]) - step))

    def save(self, figure: Figure, name: str, caption: str) -> Saved:
        """Write `<name>.png`, `.pdf` and `.txt` (its caption and where the data come from)."""
        origin, source = self._source()
        self.figures.mkdir(parents=True, exist_ok=True)
        png = render_figure(figure, "png", origin=origin)
        write_atomically(self.figures / f"{name}.png", png)
        write_atomically(self.figures / f"{name}.pdf", render_figure(figure, "pdf", origin=origin))
        text = f"{' '.join(caption.split())}\n\n{source}\nDrawn by notebooks/{self.notebook}.ipynb.\n"
        write_atomically(self.figures / f"{name}.txt", text.encode())
        return Saved(png, text)

    def _source(self) -> tuple[str, str]:
        """The line above the figure, and the caption's account of the tables used since the last figure."""
        used, self._used = list(dict.fromkeys(self._used)), []
        told = {name: self.provenance["tables"].get(name, {}) for name in used}
        about = {
            key: ", ".join(sorted({value for one in told.values() for value in one.get(key, [])}))
            for key in ("date", "hardware", "torch", "commit")
        }
        versions = f"{about['date']}, {about['hardware']}, torch {about['torch']}"
        tables = ", ".join(f"{name}.csv" for name in used)
        origin = f"data/{self.data.name}: {self.provenance['label']} · {about['date']}"
        commands = dict.fromkeys(text for one in told.values() for text in one.get("commands", []))
        lines = [f"    {line}" for text in commands for line in text.splitlines()]
        source = f"Data: {tables} of data/{self.data.name} ({self.provenance['label']}); {versions}, source {about['commit']}."
        return origin, "\n".join([source, f"Commands, from data/{self.data.name}.sh:", *lines])


def write_index(figures: str | Path) -> Path:
    """`README.md` of the folder of figures: every figure with its caption, by notebook."""
    folder = Path(figures)
    by_notebook: dict[str, list[str]] = {}
    for file in sorted(folder.glob("*.txt")):
        caption, _, rest = file.read_text(encoding="utf-8").partition("\n\n")
        match = re.search(r"^Drawn by (.*)\.$", rest, re.MULTILINE)
        data = rest.partition("\n")[0]
        name = file.stem
        links = f"[PDF]({name}.pdf) · [caption and commands]({name}.txt)"
        entry = f"### {name}\n\n![{name}]({name}.png)\n\n{caption}\n\n{links}  \n<sub>{data}</sub>\n"
        by_notebook.setdefault(match[1] if match else "", []).append(entry)
    parts = [f"## {notebook}\n\n" + "\n".join(entries) for notebook, entries in sorted(by_notebook.items())]
    head = (
        "# Figures\n\nDrawn from the tables in `data/` by the notebooks; `make figures` draws them again and writes this page. "
        "Bands and bars are two standard errors. Losses are squared errors per target, not divided by D.\n\n"
    )
    path = folder / "README.md"
    write_atomically(path, (head + "\n".join(parts)).encode())
    return path
