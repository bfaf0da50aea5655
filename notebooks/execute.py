"""Run notebooks from top to bottom, each in a new kernel, and write the page that shows their figures (`make figures`).

    python notebooks/execute.py [NAME ...] [--figures FOLDER]

Without names, all notebooks run. The notebook files stay as they are. Figures go to `figures/`, or to FOLDER.
"""

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from icl.plotting.gallery import FOLDER_VARIABLE, write_index

FOLDER = Path(__file__).resolve().parent
_CELL_SECONDS = 300


def notebooks(names: Sequence[str] = ()) -> list[Path]:
    """Return the files of the named notebooks; without names, of all notebooks."""
    return [FOLDER / f"{name}.ipynb" for name in names] or sorted(FOLDER.glob("*.ipynb"))


def execute(file: Path, figures: Path) -> nbformat.NotebookNode:
    """Run a notebook in a new kernel that starts in the notebook's folder, and return it with its outputs; the file stays as it is.

    Raises:
        nbclient.exceptions.CellExecutionError: If a cell fails; the error holds the traceback.
    """
    os.environ[FOLDER_VARIABLE] = str(figures.resolve())  # the kernel inherits it
    notebook = nbformat.read(file, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=_CELL_SECONDS,
        extra_arguments=["--IPKernelApp.log_level=40"],
        kernel_name="python3",
        resources={"metadata": {"path": str(file.parent)}},
    )
    return client.execute()


def main() -> None:
    """Run the notebooks, print how long each took, then write the page."""
    parser = argparse.ArgumentParser(prog="python notebooks/execute.py", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="notebooks without .ipynb (default: all)")
    parser.add_argument(
        "--figures", type=Path, default=FOLDER.parent / "figures", metavar="FOLDER", help="(default: figures)"
    )
    options = parser.parse_args()
    for file in notebooks(options.names):
        start = time.time()
        execute(file, options.figures)
        print(f"{file.name:28s} {time.time() - start:5.1f} s", flush=True)
    print(write_index(options.figures))


if __name__ == "__main__":
    main()
