"""The gallery of figures. They are drawn from the shipped tables, saved as PNG and PDF with captions, and shown on one page.

A notebook opens a gallery, reads tables from it, and saves figures to it:

    gallery = Gallery("llcs")                       # tables of ../data/small, figures to ../figures
    table = gallery.table("known-answers")
    gallery.save(llc_studies.plot_known_answers(table, title="Known answers"), "known-answers", "Estimates and exact values.")

A line above every figure names the source of its data and their date. The caption adds the tables, versions, hardware and commands.
Drawing a figure again from the same tables gives identical files.
"""

import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.figure import Figure

from icl.config.validation import ConfigError
from icl.files.writing import write_atomically
from icl.plotting.style import render_figure

FOLDER_VARIABLE = "ICL_FIGURES"
"""Environment variable with the folder for the figures; if it is not set, figures go to `../figures`."""
_TEXT_COLUMNS = {"num_tasks": str, "position": str, "settings": str}
_PAGE_HEAD = (
    "# Figures\n\nThe notebooks draw these figures from the tables in `data/`. `make figures` draws them again and writes this page. "
    "Each figure names the function that draws it. Unless a caption says otherwise, bands and bars are two standard errors. Losses are "
    "squared errors per target, not divided by D.\n\n"
)


class Saved(NamedTuple):
    """A saved figure, which a notebook displays."""

    png: bytes
    caption: str

    def _repr_png_(self) -> bytes:
        return self.png


class Gallery:
    """The shipped tables of one size, and the folder of the figures drawn from them.

    Args:
        notebook: Name of the notebook that draws the figures, for their captions.
        size: Folder of the tables within `data`, such as `small`.
        data: Folder of all shipped data.
    """

    def __init__(self, notebook: str, *, size: str = "small", data: str | Path = "../data") -> None:
        self.notebook = notebook
        self.data = Path(data) / size
        self.figures = Path(os.environ.get(FOLDER_VARIABLE) or "../figures")
        self.provenance: dict[str, Any] = json.loads((self.data / "provenance.json").read_text(encoding="utf-8"))
        self._used: list[str] = []  # names of the tables that were read since the last figure was saved

    def table(self, name: str, run: str | None = None) -> pd.DataFrame:
        """Return a shipped table, or only its rows of one run. The caption of the next figure that is saved names this table.

        Raises:
            ConfigError: If there is no such table or run.
        """
        file = self.data / f"{name}.csv"
        if not file.is_file():
            raise ConfigError(
                f"There is no table {file}. If the runs exist, make it with `python -m tools.data {self.data.name}`."
            )
        table = pd.read_csv(file, dtype=_TEXT_COLUMNS)
        self._used.append(name)
        if run is None:
            return table
        if run not in set(table["run"]):
            raise ConfigError(f"{file} has no run `{run}`; its runs are {', '.join(table['run'].unique())}.")
        return table[table["run"] == run].reset_index(drop=True)

    def model(self, run: str, step: int) -> Path:
        """Return the file of the run's shipped model that is nearest to `step`.

        Raises:
            ConfigError: If no model of this run is shipped.
        """
        files = sorted((self.data / "models" / run.replace("/", "-")).glob("step-*.safetensors"))
        if not files:
            raise ConfigError(
                f"There is no model of `{run}` in {self.data / 'models'}; only models of some runs are shipped."
            )
        self._used.append("checkpoints")
        return min(files, key=lambda file: abs(int(file.stem.partition("-")[2]) - step))

    def save(self, figure: Figure, name: str, caption: str) -> Saved:
        """Write `<name>.png`, `<name>.pdf`, and `<name>.txt` with the caption and the source of the data.

        Raises:
            ConfigError: If no table was read since the previous figure was saved. The source of the data would be unknown.
        """
        if not self._used:
            raise ConfigError(
                f"The source of the figure {name} is unknown. Read the figure's tables after saving the previous figure."
            )
        origin, source = self._describe_source()
        self.figures.mkdir(parents=True, exist_ok=True)
        png = render_figure(figure, "png", origin=origin)
        write_atomically(self.figures / f"{name}.png", png)
        write_atomically(self.figures / f"{name}.pdf", render_figure(figure, "pdf", origin=origin))
        drawn = f"Drawn by `{figure.get_label()}` in notebooks/{self.notebook}.ipynb."
        text = f"{' '.join(caption.split())}\n\n{source}\n{drawn}\n"
        write_atomically(self.figures / f"{name}.txt", text.encode())
        return Saved(png, text)

    def _describe_source(self) -> tuple[str, str]:
        """Return the line above a figure, and the source for its caption.

        Both name the tables that were read since the last figure was saved.
        """
        used, self._used = list(dict.fromkeys(self._used)), []
        sources = [self.provenance["tables"].get(name, {}) for name in used]
        values = {
            key: ", ".join(sorted({value for source in sources for value in source.get(key, [])}))
            for key in ("date", "hardware", "torch", "commit")
        }
        label = self.provenance["label"]
        tables = ", ".join(f"{name}.csv" for name in used)
        summary = (
            f"Data: {tables} of data/{self.data.name} ({label}); {values['date']}, {values['hardware']}, "
            f"torch {values['torch']}, source {values['commit']}."
        )
        commands = dict.fromkeys(command for source in sources for command in source.get("commands", []))
        lines = [f"    {line}" for command in commands for line in command.splitlines()]
        text = "\n".join([summary, f"Commands, from tools/data/{self.data.name}.sh:", *lines])
        return f"data/{self.data.name}: {label} · {values['date']}", text


def write_index(figures: str | Path) -> Path:
    """Write the `README.md` of a folder of figures. This page shows every figure with its caption, ordered by notebook."""
    folder = Path(figures)
    by_notebook: dict[str, list[str]] = {}
    for file in sorted(folder.glob("*.txt")):
        name = file.stem
        caption, _, source = file.read_text(encoding="utf-8").partition("\n\n")
        drawn = re.search(r"^Drawn by `(.*)` in (.*)\.$", source, re.MULTILINE)
        function, notebook = drawn.groups() if drawn else ("", "")
        links = f"drawn by `{function}` · [PDF]({name}.pdf) · [caption and commands]({name}.txt)"
        summary = source.partition("\n")[0]
        entry = f"### {name}\n\n![{name}]({name}.png)\n\n{caption}\n\n{links}  \n<sub>{summary}</sub>\n"
        by_notebook.setdefault(notebook, []).append(entry)
    parts = [f"## {notebook}\n\n" + "\n".join(entries) for notebook, entries in sorted(by_notebook.items())]
    path = folder / "README.md"
    write_atomically(path, (_PAGE_HEAD + "\n".join(parts)).encode())
    return path
