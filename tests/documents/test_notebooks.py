"""Every notebook runs from top to bottom in a clean kernel on the shipped tables, and draws the same bytes twice."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = {"quickstart", "main-figures", "essential-dynamics", "task-prior", "llcs", "task-diversity", "ood", "priors"}
MAX_LINES = 20
"""Of a code cell: a notebook loads tables and calls a function."""

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")


@pytest.fixture(scope="session")
def runner():
    """Return `notebooks/execute.py` as a module."""
    spec = importlib.util.spec_from_file_location("execute", ROOT / "notebooks" / "execute.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def quiet(monkeypatch):
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def drawn(folder):
    """Return the bytes of every figure and caption."""
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_the_notebooks_that_were_promised_are_there():
    assert {path.stem for path in NOTEBOOKS} == NAMES


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stripped_and_cells_thin(path):
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            assert not cell.outputs
            assert cell.execution_count is None
            assert len(cell.source.splitlines()) <= MAX_LINES


@pytest.mark.slow  # CI runs these: .ci/run
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_draws_what_ships(path, runner, quiet, tmp_path, monkeypatch):
    """A notebook writes each figure as PNG, PDF and caption, under the shipped names, and does not change itself.

    A second run of the fastest notebook draws the same bytes.
    """
    before = path.read_bytes()
    notebook = runner.execute(path, tmp_path / "first")
    assert path.read_bytes() == before
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    figures = drawn(tmp_path / "first")
    stems = {Path(name).stem for name in figures}
    assert figures.keys() == {f"{stem}.{kind}" for stem in stems for kind in ("png", "pdf", "txt")}
    assert stems <= {file.stem for file in (ROOT / "figures").glob("*.png")}, "Run `make figures`."
    for stem in stems:
        assert figures[f"{stem}.txt"].decode() == (ROOT / "figures" / f"{stem}.txt").read_text(encoding="utf-8")
    if path.stem == "task-prior":
        runner.execute(path, tmp_path / "second")
        assert drawn(tmp_path / "second") == figures


def test_every_figure_has_a_file_of_each_kind_and_a_place_on_the_page():
    page = (ROOT / "figures" / "README.md").read_text(encoding="utf-8")
    stems = {file.stem for file in (ROOT / "figures").glob("*.png")}
    assert stems
    for stem in stems:
        assert f"]({stem}.png)" in page
        assert (ROOT / "figures" / f"{stem}.pdf").is_file()
        text = (ROOT / "figures" / f"{stem}.txt").read_text(encoding="utf-8")
        assert re.search(
            r"^Data: [\w-]+\.csv(, [\w-]+\.csv)* of data/(small|published-run) .*, source \w", text, re.MULTILINE
        )


def test_the_page_is_made_of_the_captions(tmp_path):
    import shutil

    from icl.plotting.gallery import write_index

    for file in (ROOT / "figures").glob("*.txt"):
        shutil.copy(file, tmp_path)
    assert write_index(tmp_path).read_text(encoding="utf-8") == (ROOT / "figures" / "README.md").read_text(
        encoding="utf-8"
    )
