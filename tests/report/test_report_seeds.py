"""A page of several runs shows the spread over seeds, and a page of a run the excess over the Bayes predictor."""

import pandas as pd
import pytest
from test_report import make_run, open_page
from tiny_runs import TINY, change

from icl.analysis.seeds import over_seeds
from icl.report.page import write_report

EXCESSES = (0.2, 0.3, 0.5)


def with_excess(run, value):
    table = pd.read_csv(run.results / "losses.csv").assign(bayes_excess=value, bayes_excess_stderr=0.012)
    table.to_csv(run.results / "losses.csv", index=False)


def test_a_page_shows_the_paired_excess_with_its_error(tmp_path):
    run = make_run(tmp_path / "run")
    with_excess(run, 0.25)
    opened = open_page(write_report([run.path]).path)
    assert ["2", "1.100", "1", "0.9000", "7,000", "2.100", "1.100", "0.250 ± 0.012"] in opened.cells
    assert "above the Bayes predictor" in opened.text


@pytest.fixture
def page(tmp_path):
    """Return the page of three seeds with M = 16 and two seeds with M = 8."""
    for num_tasks, count in ((16, 3), (8, 2)):
        for seed in range(count):
            seeds = {"model": seed, "data": seed, "noise": seed}
            config = change(TINY, task={"num_tasks": num_tasks}, seeds=seeds)
            with_excess(make_run(tmp_path / f"M={num_tasks}" / f"seed={seed}", config=config), EXCESSES[seed])
    return open_page(write_report([tmp_path], out=tmp_path / "page.html").path)


def test_runs_that_differ_in_seeds_have_a_row_with_the_error_over_seeds(page):
    header = next(row for row in page.cells if row[:2] == ["settings", "seeds"])
    column = header.index("above Bayes, training tasks")
    three, two = (next(row for row in page.cells if row[0] == name) for name in ("M=16", "M=8"))
    known = over_seeds(EXCESSES)
    assert (three[1], three[column]) == ("3", f"{known.mean:.4g} ± {known.stderr:.2g}")
    assert (two[1], two[column]) == ("2", "0.2, 0.3")
    assert three[header.index("loss, training tasks")] == "1.65 ± 0"
    assert "0.200 ± 0.012" in page.text  # the run's own error over prompts, in the comparison


def test_the_curves_of_a_page_are_means_over_seeds(page):
    assert "means over seeds (thick) and single seeds (thin)" in page.text


def test_runs_of_one_seed_have_no_table_over_seeds(tmp_path):
    for num_tasks in (16, 8):
        make_run(tmp_path / f"M={num_tasks}", config=change(TINY, task={"num_tasks": num_tasks}))
    assert "Over seeds" not in open_page(write_report([tmp_path], out=tmp_path / "page.html").path).text
