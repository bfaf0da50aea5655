"""The gallery names the source of its figures, refuses data that are not shipped, and draws the same bytes twice."""

import json

import pandas as pd
import pytest
from matplotlib.figure import Figure

from icl.config.validation import ConfigError
from icl.plotting.gallery import FOLDER_VARIABLE, Gallery, write_index
from icl.plotting.style import label_plainly, new_figure, render_figure


@pytest.fixture
def gallery(tmp_path, monkeypatch):
    """Return the gallery of a folder with one table of two runs."""
    folder = tmp_path / "data" / "small"
    folder.mkdir(parents=True)
    pd.DataFrame({"run": ["a", "b"], "position": ["1", "mean"], "value": [1.0, 2.0]}).to_csv(
        folder / "losses.csv", index=False
    )
    about = {
        "date": ["2026-01-02"],
        "hardware": ["2 CPU cores"],
        "torch": ["2.13"],
        "commit": ["abc"],
        "commands": ["icl train"],
    }
    (folder / "provenance.json").write_text(json.dumps({"label": "reduced", "tables": {"losses": about}}))
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "figures"))
    return Gallery("tour", data=tmp_path / "data")


def drawing():
    figure, (axes,) = new_figure()
    axes.plot([0, 1], [0, 1], label="a line")
    figure.legend(loc="outside lower center")
    return figure


def test_a_caption_says_where_the_numbers_come_from(gallery, tmp_path):
    gallery.table("losses")
    saved = gallery.save(drawing(), "line", "A line\n   from corner to corner.")
    text = (tmp_path / "figures" / "line.txt").read_text()
    assert text.startswith("A line from corner to corner.\n\nData: losses.csv of data/small (reduced); 2026-01-02")
    assert all(word in text for word in ("2 CPU cores", "torch 2.13", "abc", "icl train", "notebooks/tour.ipynb"))
    assert text.endswith(f"Drawn by `{__name__}.drawing` in notebooks/tour.ipynb.\n")
    assert saved.png == (tmp_path / "figures" / "line.png").read_bytes()
    assert (tmp_path / "figures" / "line.pdf").read_bytes().startswith(b"%PDF")


def test_tables_count_for_the_next_figure_only(gallery, tmp_path):
    (tmp_path / "data" / "small" / "runs.csv").write_text("run\na\n")
    gallery.table("losses")
    gallery.save(drawing(), "first", "One.")
    gallery.table("runs")
    gallery.save(drawing(), "second", "Two.")
    text = (tmp_path / "figures" / "second.txt").read_text()
    assert "Data: runs.csv of data/small" in text
    assert "losses.csv" not in text


def test_a_figure_of_no_table_is_refused(gallery, tmp_path):
    """The second figure of a loop had an empty source, because its tables were read before the loop."""
    gallery.table("losses")
    gallery.save(drawing(), "first", "One.")
    with pytest.raises(ConfigError, match="The source of the figure second is unknown"):
        gallery.save(drawing(), "second", "Two.")
    assert not (tmp_path / "figures" / "second.txt").exists()


def test_a_run_or_table_that_does_not_ship_is_refused(gallery):
    assert gallery.table("losses", "b")["value"].tolist() == [2.0]
    with pytest.raises(ConfigError, match="no run `c`; its runs are a, b"):
        gallery.table("losses", "c")
    with pytest.raises(ConfigError, match=r"python -m tools\.data small"):
        gallery.table("llc")
    with pytest.raises(ConfigError, match="There is no model of `a`"):
        gallery.model("a", 3)


@pytest.mark.parametrize("kind", ["png", "pdf", "svg"])
def test_the_same_figure_gives_the_same_bytes(kind):
    first, second = (render_figure(drawing(), kind, origin="data/small") for _ in range(2))
    assert first == second
    assert b"20" + b"26-" not in first  # no date


def test_the_line_above_leaves_the_figure_as_it_was():
    figure = drawing()
    plain = render_figure(figure)
    marked = render_figure(figure, origin="data/small")
    assert render_figure(figure) == plain
    assert marked != plain
    assert isinstance(figure, Figure)
    assert not figure.texts


def test_the_page_shows_every_figure_by_notebook(gallery, tmp_path):
    for name in ("two", "one"):
        gallery.table("losses")
        gallery.save(drawing(), name, f"Caption of {name}.")
    page = write_index(tmp_path / "figures").read_text()
    assert page.index("### one") < page.index("### two")
    assert page.count("## notebooks/tour.ipynb") == 1
    assert "![one](one.png)\n\nCaption of one." in page
    assert page.count(f"drawn by `{__name__}.drawing`") == 2


@pytest.mark.parametrize(("top", "expected"), [(5.0, ["2", "3"]), (50.0, ["2", ""]), (5000.0, ["", ""])])
def test_short_logarithmic_axes_have_numbers_between_powers_of_ten(top, expected):
    _, (axes,) = new_figure()
    axes.set(yscale="log", ylim=(1.0, top))
    label_plainly(axes)
    assert [axes.yaxis.get_minor_formatter()(value) for value in (2.0, 3.0)] == expected
    assert axes.yaxis.get_major_formatter()(100.0) == "100"
