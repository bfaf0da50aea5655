"""`icl report`: the page is well-formed, loads nothing from outside itself, and names the files that it could not read."""

import dataclasses
import html.parser
import io
import itertools
import json
import math
import os
import re
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.text import Text
from PIL import Image
from tiny_runs import TINY, change

from icl.cli import main
from icl.files.writing import StorageError
from icl.model import attention as tiny_attention
from icl.plotting.curves import plot_curves
from icl.report import page
from icl.report.page import write_report
from icl.report.pictures import PictureError, embed
from icl.report.tables import MAX_WHOLE, show, summarise, whole, with_error
from icl.runs.environment import describe_environment, environment_line, environments_of
from icl.runs.folder import RunFolder, local_root
from icl.runs.status import Status
from icl.training.run import train

TAGS = {
    *(
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "nav",
        "main",
        "section",
        "footer",
        "h1",
        "h2",
        "h3",
        "p",
        "a",
        "b",
    ),
    *(
        "ol",
        "ul",
        "li",
        "dl",
        "dt",
        "dd",
        "div",
        "span",
        "figure",
        "img",
        "figcaption",
        "code",
        "pre",
        "details",
        "summary",
    ),
    *("table", "caption", "thead", "tbody", "tr", "th", "td"),
}
VOID = {"meta", "img", "br", "hr", "link", "input"}
EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&"


class Page(html.parser.HTMLParser):
    """The parsed page. An element that is not closed, or is closed twice, is an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.headings: list[int] = []
        self.cells: list[list[str]] = []
        self.handle_starttag, self.handle_endtag, self.handle_data = self._begin, self._end, self._read
        self.feed(text)
        self.close()
        assert self.open == []

    def _begin(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")

    def _end(self, tag):
        assert self.open.pop() == tag

    def _read(self, data):
        self.texts.append(data)
        if {"td", "th"} & set(self.open):
            self.cells[-1][-1] += data

    @property
    def text(self):
        """Return all words of the page."""
        return " ".join(" ".join(self.texts).split())

    def all(self, tag):
        """Return the attributes of every element of a kind."""
        return [attrs for name, attrs in self.elements if name == tag]


def open_page(path: Path) -> Page:
    """Return a page after checking everything that holds for all pages."""
    text = path.read_text(encoding="utf-8")
    opened = Page(text)
    ids = [attrs["id"] for _, attrs in opened.elements if "id" in attrs]
    assert max(Counter(ids).values()) == 1
    assert not {"script", "link", "iframe", "object", "form", "svg"} & {tag for tag, _ in opened.elements}
    for tag, attrs in opened.elements:
        assert not [name for name in attrs if name.startswith("on") or name in ("srcset", "style", "action")]
        if "src" in attrs:
            assert attrs["src"].startswith("data:image/png;base64,")
        if "href" in attrs:
            assert attrs["href"].startswith("#")
            assert attrs["href"][1:] in ids
        if "aria-labelledby" in attrs:
            assert attrs["aria-labelledby"] in ids
        assert tag != "th" or attrs["scope"] in ("col", "row")
    for image in opened.all("img"):
        assert image["alt"]
        assert int(image["width"]) > 0
        assert int(image["height"]) > 0
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert opened.headings[0] == 1
    assert all(after <= before + 1 for before, after in zip(opened.headings, opened.headings[1:], strict=False))
    assert opened.headings.count(1) == 1
    assert "default-src 'none'" in opened.all("meta")[1]["content"]
    assert len(opened.all("caption")) == len(opened.all("table"))
    return opened


def png(width: int = 6, height: int = 4) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "white").save(buffer, format="PNG")
    return buffer.getvalue()


METRICS = """step,train/loss,eval/pretrain/loss,eval/true/loss
0,,3,3
30,2,2,2.5
60,1.25,1.6,1.7
"""
NO_METRICS = ""
LOSSES = """distribution,position,model,ridge,dmmse,ols,zero
pretrain,1,2.2,2.0,1.9,2.0,2.1
pretrain,2,1.1,1.0,0.9,7000,2.1
pretrain,mean,1.65,1.5,1.4,3501,2.1
true,1,2.2,2.0,1.9,2.0,2.1
true,2,1.4,1.0,0.9,7000,2.1
true,mean,1.8,1.5,1.4,3501,2.1
"""
LLC = """step,checkpoint_hash,llc,stderr,init_loss,mean_loss,rhat,ess,num_chains_used,nbeta,verdict,reasons
0,aa,1,0.5,2.0,2.1,1.0,300,4,1000,invalid,the chains left
30,bb,12.3,1.1,1.5,1.6,1.0,300,4,1000,ok,
60,cc,34.56,2.5,1.2,1.3,1.1,30,4,1000,suspect,too few draws
"""


def make_run(path: Path, *, config=TINY, state="finished", metrics=METRICS, **fields) -> RunFolder:
    """Write a run's folder by hand, with the files that training and two commands make. Drawing the curves would take a second or more."""
    run = RunFolder(path)
    run.write_config(config)
    step = fields.pop("step", 60)
    run.write_status(Status(state=state, step=step, max_steps=60, loss=1.25, **fields))
    run.metrics_file.write_text(metrics)
    run.log("starting")
    run.log(environment_line())
    run.write_result("losses.csv", LOSSES)
    run.write_result("llc.csv", LLC)
    run.figures.mkdir()
    (run.figures / "training.png").write_bytes(png())
    (run.figures / "llc.png").write_bytes(png(8, 3))
    return run


@pytest.fixture
def run(tmp_path) -> RunFolder:
    return make_run(tmp_path / "tiny")


# One run


def test_the_page_of_a_run_says_what_there_is(run, capsys):
    assert main(["report", str(run.path)]) == 0
    assert f"Report  {run.path / 'report.html'}" in capsys.readouterr().out
    opened = open_page(run.path / "report.html")
    assert "Step 60 of 60, finished" in opened.text
    assert "Loss / ridge's loss, training tasks 1.100" in opened.text  # 1.65 / 1.5
    assert "Loss / ridge's loss, new tasks 1.200" in opened.text
    assert "LLC, last estimate 34.6 ± 2.5 suspect" in opened.text
    assert ["2", "1.100", "1", "0.9000", "7,000", "2.100", "1.100"] in opened.cells
    assert ["task.num_tasks", "16", "64"] in opened.cells  # what differs from the preset
    assert ["optim.beta1", "0.9"] in opened.cells  # and the rest of the settings
    versions = describe_environment()
    assert ["torch", versions["torch"]] in opened.cells
    (command,) = [row[1] for row in opened.cells if row[0] == "command"]
    assert command[:40] == versions["command"][:40]  # the page shortens long commands
    assert [int(image["width"]) for image in opened.all("img")] == [6, 8]


def test_verdicts_are_in_words_and_in_colours_and_counted(run):
    opened = open_page(write_report([run.path]).path)
    assert "1 ok, 1 suspect, 1 invalid" in opened.text
    row = next(row for row in opened.cells if row[:2] == ["60", "34.6 ± 2.5"])
    assert row[-2:] == ["suspect", "too few draws"]
    looks = Counter(attrs["class"] for attrs in opened.all("span") if "badge" in attrs.get("class", ""))
    # Of each verdict: the heading's count, a row of the summary and one of the table; doubtful rows once more.
    assert looks["badge suspect"] == 1 + 3 + 1  # and the tile
    assert looks["badge invalid"] == 1 + 3
    assert looks["badge ok"] == 1 + 2 + 1  # and the run's state


def test_the_tile_counts_the_verdicts_of_llcs_alone(run):
    run.write_result("mine.csv", "step,value,verdict\n0,1,ok\n60,2,suspect\n")
    text = open_page(write_report([run.path]).path).text
    assert "LLC, all estimates 1 ok, 1 suspect, 1 invalid" in text


def test_the_page_names_the_commands_for_what_is_missing(run):
    opened = open_page(write_report([run.path]).path)
    assert f"icl evaluate {run.path}" in opened.text
    assert f"icl analyse {run.path} --what hessian" in opened.text
    assert f"icl analyse {run.path} --what all" in opened.text
    assert f"icl llc {run.path}" not in opened.text
    run.write_result("hessian.csv", "step,quantity,value\n0,trace,1\n60,trace,2\n")
    assert "--what hessian" not in open_page(write_report([run.path]).path).text
    assert "--what mixture" in opened.text
    config = run.read_config()
    gaussian = dataclasses.replace(config, task=dataclasses.replace(config.task, num_tasks=float("inf")))
    run.config_file.unlink()
    run.write_config(gaussian)
    text = open_page(write_report([run.path]).path).text
    assert "--what mixture" not in text
    assert "--what prior" not in text
    run.config_file.unlink()
    run.write_config(dataclasses.replace(config, model=dataclasses.replace(config.model, output="gaussian")))
    assert "--what prior" in open_page(write_report([run.path]).path).text


def test_an_analysis_of_any_name_has_its_section(run):
    run.write_result("my-own.csv", "step,quantity,value\n0,heat,1.5\n60,heat,2.5\n")
    (run.figures / "my-own-detail.png").write_bytes(png())
    opened = open_page(write_report([run.path]).path)
    assert "My own" in opened.text
    assert ["heat", "1.500", "2.500"] in opened.cells
    assert any("my-own-detail" in image["alt"] for image in opened.all("img"))


def test_evaluation_is_summed_up_at_the_last_step_beside_ridge(run):
    rows = ["step,checkpoint_hash,distribution,quantity,position,value,stderr"]
    rows += [
        f"{step},aa,pretrain,{quantity},mean,{value},0.01"
        for step in (0, 60)
        for quantity, value in (("loss", 3 - step / 30), ("delta_ridge", 0.25))
    ]
    run.write_result("evaluation.csv", "\n".join(rows))
    run.write_result("baselines.csv", "distribution,quantity,position,value,stderr\npretrain,ridge,mean,0.8,0.1\n")
    opened = open_page(write_report([run.path]).path)
    assert ["pretrain", "1.000 ± 0.010", "1.25", "0.250 ± 0.010"] in opened.cells


def test_an_evaluation_without_steps_is_shown_as_it_is(run):
    header = "step,distribution,quantity,position,value,stderr"
    run.write_result("evaluation.csv", f"{header}\n,pretrain,loss,mean,0.75,0.01\n,true,loss,mean,0.5,0.01\n")
    opened = open_page(write_report([run.path]).path)
    assert ["pretrain", "loss", "0.750 ± 0.010"] in opened.cells


def test_a_run_in_progress_shows_its_curves_so_far(tmp_path):
    run = make_run(tmp_path / "young", state="running", step=30)
    for file in [*run.results.iterdir(), *run.figures.iterdir()]:
        file.unlink()
    opened = open_page(write_report([run.path]).path)
    assert "In progress. Step 30 of 60" in opened.text
    assert "may have been killed" not in opened.text
    assert [image["alt"] for image in opened.all("img")] == ["Loss curves of the run young"]
    assert "will be shown here when training has ended" in opened.text
    stale = dataclasses.asdict(run.read_status()) | {"updated": time.time() - 3600}
    run.status_file.write_text(json.dumps(stale))
    assert "may have been killed" in open_page(write_report([run.path]).path).text


def test_the_reason_of_a_failure_is_told(tmp_path):
    run = make_run(tmp_path / "sad", state="failed", step=17, reason="the loss became NaN at step 17")
    assert "failed Step 17 of 60, failed" in (text := open_page(write_report([run.path]).path).text)
    assert "the loss became NaN at step 17" in text


# What cannot be read


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("results/llc.csv", b"", "results/llc.csv is damaged or empty"),
        ("results/llc.csv", b"\xff\xfe\x00\x01", "results/llc.csv is damaged or empty"),
        ("results/llc.csv", b'step,llc\n1,"2', "results/llc.csv is damaged or empty"),
        ("results/llc.csv", b"step,llc,stderr,verdict\n", "results/llc.csv has no rows yet"),
        ("metrics.csv", b"", "metrics.csv is damaged or empty"),
        ("figures/llc.png", png(90, 90)[:-40], "figures/llc.png is left out"),
        ("figures/llc.png", b"no picture", "figures/llc.png is left out"),
        ("status.json", b"{", "status.json is missing or damaged"),
        ("config.yaml", b"task: [", "config.yaml cannot be read"),
        ("config.yaml", b"task: {colour: red}", "config.yaml cannot be read"),
    ],
)
def test_what_is_damaged_is_told_in_a_sentence_and_the_rest_is_there(run, name, content, sentence, capsys):
    (run.path / name).write_bytes(content)
    assert main(["report", str(run.path)]) == 0
    assert sentence in capsys.readouterr().out
    opened = open_page(run.path / "report.html")
    assert sentence in opened.text
    assert ["2", "1.100", "1", "0.9000", "7,000", "2.100", "1.100"] in opened.cells


def test_pipes_in_place_of_files_are_not_waited_for(run):
    """Opening a pipe without a writer would block the program, and a page that is being watched, for ever."""
    for file in (run.metrics_file, run.log_file, run.results / "llc.csv", run.figures / "llc.png", run.config_file):
        file.unlink(missing_ok=True)
        os.mkfifo(file)
        assert write_report([run.path]).size > 0


@pytest.mark.parametrize("name", ["losses", "llc", "evaluation", "baselines", "hessian"])
def test_a_table_of_other_columns_than_expected_is_shown_as_it_is(run, name):
    run.write_result(f"{name}.csv", "colour,verdict\nred,fine\n7,\n")
    opened = open_page(write_report([run.path]).path)
    assert ["red", "fine"] in opened.cells


def test_a_run_with_nothing_but_its_settings_has_a_page(tmp_path):
    run = RunFolder(tmp_path / "bare")
    run.write_config(TINY)
    opened = open_page(write_report([run.path]).path)
    assert "There is no metrics.csv." in opened.text
    assert "there are none in the folder" in opened.text
    assert "run.log does not contain" in opened.text


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.write_text("a file")])
def test_what_is_no_run_is_one_sentence(tmp_path, capsys, make):
    make(tmp_path / "nothing")
    assert main(["report", str(tmp_path / "nothing")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "nothing is not a" in error
    assert not list(tmp_path.glob("**/report.html"))


def test_a_page_is_html(run, tmp_path):
    with pytest.raises(StorageError, match=r"must end in \.html or \.htm, got .*page\.csv"):
        write_report([run.path], out=tmp_path / "page.csv")
    assert write_report([run.path], out=tmp_path / "new" / "page.htm").path.is_file()


def test_an_old_page_stays_if_the_new_one_cannot_be_made(run, monkeypatch):
    file = write_report([run.path]).path
    before = file.read_bytes()
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(StorageError, match="No space left"):
        write_report([run.path])
    assert file.read_bytes() == before
    assert not list(run.path.glob(".tmp-*"))


# Hostile files


def test_nothing_from_a_file_becomes_markup(tmp_path):
    name = EVIL.replace("/", "")
    run = make_run(tmp_path / name, state="failed", reason=EVIL, metrics=NO_METRICS)
    run.log(EVIL)
    run.write_result("llc.csv", LLC + f'90,dd,1,1,1,1,1,1,1,1000,ok,"{EVIL.replace(chr(34), chr(34) * 2)}"\n')
    pd.DataFrame({EVIL: [EVIL, "b"], "verdict": [EVIL, "ok"]}).to_csv(run.results / f"{name}.csv", index=False)
    (run.figures / f"{name}.png").write_bytes(png())
    make_run(tmp_path / "other", metrics=NO_METRICS)
    for opened in (open_page(write_report([run.path]).path), open_page(write_report([tmp_path]).path)):
        assert EVIL in "".join(opened.texts)
        assert name in "".join(opened.texts)
        assert {tag for tag, _ in opened.elements} <= TAGS


def test_names_that_are_no_unicode_are_written_as_something(tmp_path):
    run = make_run(tmp_path / "odd")
    odd = run.path.rename(tmp_path / "odd\udcff")
    assert open_page(write_report([odd], out=tmp_path / "page.html").path).all("h1")


def test_many_curves_have_a_legend_and_very_many_none():
    table = pd.DataFrame({"step": [0, 10, 20], "train/loss": [None, 2.0, 1.0]})
    few, more, many = ({f"M={2**number}": table for number in range(count)} for count in (12, 13, 17))
    assert [len(axes.texts) for axes in plot_curves(few, title="t").axes] == [12]
    (legend,) = plot_curves(more, title="t").legends
    assert [text.get_text() for text in legend.get_texts()] == list(more)
    assert not plot_curves(many, title="t").legends


def test_names_at_the_ends_of_lines_are_in_order_and_apart():
    curves = {
        f"seed={seed}": pd.DataFrame({"step": [10, 20], "train/loss": [2.0, 1.0 + 0.001 * seed]}) for seed in range(12)
    }
    figure = plot_curves(curves, title="t")
    figure.draw_without_rendering()
    (axes,) = figure.axes
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # without the lines that join them
    assert [text.get_text() for text in axes.texts] == list(curves)  # from the lowest up
    assert all(below.y1 < above.y0 + 1 for below, above in itertools.pairwise(boxes))
    assert all(figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1 for box in boxes)
    assert all(axes.bbox.x1 < box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)


def test_tiles_stand_in_two_columns_on_a_phone():
    """At a width of 390 px, 358 px are left for the tiles: two columns and a gap of 12 px."""
    style = (Path(page.__file__).parent / "page.css").read_text()
    least, share, gap = map(float, re.search(r"min\(([\d.]+)rem, calc\((\d+)% - ([\d.]+)rem\)\)", style).groups())
    width = min(16 * least, share / 100 * (390 - 32) - 16 * gap)
    assert 2 * width + 12 <= 390 - 32 < 3 * width + 2 * 12


def test_a_page_gives_the_ratio_to_both_bayes_predictors(tmp_path):
    run = make_run(tmp_path / "run")
    table = pd.read_csv(run.results / "losses.csv").assign(dmmse=0.5)
    table.to_csv(run.results / "losses.csv", index=False)
    text = open_page(write_report([run.path]).path).text
    ratio = table[(table["distribution"] == "pretrain") & (table["position"] == "mean")]["model"].item() / 0.5
    assert f"Loss / dMMSE's loss, training tasks {ratio:.3f}" in text
    assert "Loss / dMMSE's loss, new tasks" not in text


# Several runs


def test_the_comparison_has_the_ratio_to_the_bayes_predictor_of_other_worlds(tmp_path):
    """The ratio was on the tiles of each run, but not in the comparison."""
    for number in (1, 2):
        run = make_run(tmp_path / f"seed={number}", config=change(TINY, seeds={"model": number}), metrics=NO_METRICS)
        table = pd.read_csv(run.results / "losses.csv").assign(bayes=0.5)
        table.to_csv(run.results / "losses.csv", index=False)
    opened = open_page(write_report([tmp_path], out=tmp_path / "page.html").path)
    header, first = opened.cells[:2]
    assert first[header.index("/ Bayes's, new tasks")] == "3.600"  # 1.8 / 0.5
    assert "/ ridge's, new tasks" not in header


@pytest.fixture
def sweep(tmp_path) -> Path:
    for num_tasks in (16, 8, math.inf):
        make_run(tmp_path / "sweep" / f"M={num_tasks}", config=change(TINY, task={"num_tasks": num_tasks}))
    (tmp_path / "sweep" / "M=8" / "results" / "losses.csv").unlink()
    return tmp_path / "sweep"


def test_a_folder_of_runs_has_a_comparison_first(sweep, capsys):
    assert main(["report", str(sweep)]) == 0
    assert "(3 runs, " in capsys.readouterr().out
    opened = open_page(sweep / "report.html")
    tables = opened.cells[:4]
    assert tables[0] == [
        *(
            "run",
            "state",
            "step",
            "task.num_tasks",
            "training loss",
            "loss, training tasks",
            "/ ridge's, training tasks",
            "/ dMMSE's, training tasks",
        ),
        *("loss, new tasks", "/ ridge's, new tasks", "LLC, last", "LLC, all"),
    ]
    reached = ["1.250", "1.650", "1.100", "1.179", "1.800", "1.200", "34.6 ± 2.5 suspect", "1 ok, 1 suspect, 1 invalid"]
    assert tables[1][:4] == ["M=8", "finished", "60 / 60", "8"]
    assert tables[1][4:10] == ["1.250", "1.600", "–", "–", "1.700", "–"]  # its last evaluation while training
    assert tables[2] == ["M=16", "finished", "60 / 60", "16", *reached]
    assert tables[3] == ["M=inf", "finished", "60 / 60", "inf", *reached]
    assert opened.headings.count(2) == 1 + 3
    assert opened.all("img")[0]["alt"] == "Loss curves of 3 runs"
    assert opened.text.startswith(f"3 runs in {sweep.name}/")


def test_several_runs_go_to_one_page_in_the_working_directory_once_each(sweep, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for metrics in sweep.glob("*/metrics.csv"):
        metrics.unlink()
    words = [str(sweep / "M=8"), "sweep/M=16", str(sweep / "M=8")]
    assert main(["report", *words]) == 0
    opened = open_page(tmp_path / "report.html")
    assert [row[0] for row in opened.cells[1:3]] == ["M=8", "M=16"]
    assert not (sweep / "M=8" / "report.html").exists()


def test_runs_of_one_name_are_told_apart_by_their_places(tmp_path):
    for place in ("a", "b"):
        make_run(tmp_path / place / "same", metrics=NO_METRICS)
    opened = open_page(
        write_report([tmp_path / "a" / "same", tmp_path / "b" / "same"], out=tmp_path / "page.html").path
    )
    assert [row[0] for row in opened.cells[1:3]] == [str(tmp_path / place / "same") for place in ("a", "b")]


def test_many_runs_show_fewer_rows_of_each_table(sweep):
    text = "step,quantity,value\n" + "".join(f"{step},heat,{step}\n" for step in range(1000))
    for run in sweep.iterdir():
        RunFolder(run).write_result("heat.csv", text)
        (run / "metrics.csv").unlink()
    opened = open_page(write_report([sweep]).path)
    half = MAX_WHOLE // 3 // 2
    assert opened.text.count(f"The first and the last {half} of 1,000 rows") == 3


# The store


def test_a_runs_own_page_goes_to_its_store_and_another_does_not(tmp_path, capsys):
    from icl.runs.mirror import open_mirror, push

    store = tmp_path / "store"
    run = make_run(local_root() / "tiny", config=change(TINY, checkpoints={"store": str(store)}))
    push(open_mirror(run, str(store), "tiny"))
    assert main(["report", str(run.path), "--out", str(tmp_path / "page.html")]) == 0
    assert not (store / "tiny" / "report.html").exists()
    assert main(["report", str(run.path)]) == 0
    assert "Uploaded report.html" in capsys.readouterr().out
    assert (store / "tiny" / "report.html").read_bytes() == (run.path / "report.html").read_bytes()


# Tables


def test_steps_stand_side_by_side_with_errors_and_verdicts():
    table = pd.DataFrame(
        [
            {
                "step": step,
                "quantity": quantity,
                "part": "b1",
                "value": step + shift,
                "stderr": 0.25,
                "verdict": verdict,
            }
            for step in range(0, 70, 10)
            for quantity, shift, verdict in (("norm", 0.0, "ok"), ("noise", 0.5, "suspect"))
        ]
    )
    (shown,) = summarise(table, caption="tidy")
    assert shown.header == ["quantity", "step 0", "step 20", "step 40", "step 60"]
    assert [cell.text for cell in shown.rows[1]] == [
        "noise",
        "0.50 ± 0.25",
        "20.50 ± 0.25",
        "40.50 ± 0.25",
        "60.50 ± 0.25",
    ]
    assert [cell.badge for cell in shown.rows[0]] == [""] * 5
    assert [cell.badge for cell in shown.rows[1]] == ["", *["suspect"] * 4]
    assert shown.note == "4 of 7 steps. Values ± one standard error. The same in every row: part = b1."


def test_rows_of_no_step_have_a_table_of_their_own():
    table = pd.DataFrame(
        {
            "step": [0, 10, None],
            "quantity": ["score", "score", "share"],
            "value": [1.0, 2.0, 0.75],
            "stderr": [None] * 3,
        }
    )
    of_run, by_step = summarise(table.astype({"step": "Int64"}), caption="both")
    assert [cell.text for cell in of_run.rows[0]] == ["share", "0.7500"]
    assert by_step.header == ["quantity", "step 0", "step 10"]


def test_a_table_without_one_known_value_is_shown():
    rows = [{"step": step, "quantity": name, "value": np.nan} for step in (0, 10) for name in ("norm", "noise")]
    (shown,) = summarise(pd.DataFrame(rows), caption="nothing known")
    assert (shown.rows, shown.note) == ([], "No value is known.")


def test_every_kind_of_quantity_is_in_a_summary():
    names = [f"many{i}" for i in range(100)]
    table = pd.DataFrame(
        [
            {"step": step, "quantity": quantity, "item": item, "value": 1.0}
            for step in (0, 1)
            for quantity, items in (("common", names), ("rare", ["one"]))
            for item in items
        ]
    )
    (shown,) = summarise(table, caption="wide")
    assert {row[0].text for row in shown.rows} == {"common", "rare"}
    assert f"{len(shown.rows)} of 101 quantities" in shown.note


def test_a_table_called_whole_says_how_much_is_left_out():
    table = pd.DataFrame({"step": range(1000), "value": np.arange(1000) / 8})
    shown = whole(table, caption="all", file="results/all.csv")
    assert [row[0].text for row in shown.rows[99:101]] == ["99", "900"]
    assert shown.note == "The first and the last 100 of 1,000 rows; all are in results/all.csv."
    assert whole(table[:1], caption="one", file="x.csv").note == "All 1 row of x.csv."


@pytest.mark.parametrize(
    ("value", "stderr", "text"),
    [
        (49.63, 4.2, "49.6 ± 4.2"),
        (0.123456, 0.00123, "0.1235 ± 0.0012"),
        (19352.4, 503.0, "19,352 ± 503"),
        (2.0, 0.0, "2"),
        (1.5, math.nan, "1.500"),
        (math.nan, 1.0, "–"),
        (1e-12, 1e-13, "1e-12 ± 1e-13"),
        ("seven", 1.0, "seven"),
    ],
)
def test_a_value_is_rounded_to_its_errors_second_digit(value, stderr, text):
    assert with_error(value, stderr) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((1234567, "1,234,567"), (3551.69, "3,552"), (0.12345678, "0.1235"), (3e-05, "3e-05"), (math.inf, "∞")),
        *(
            (-math.inf, "-∞"),
            (None, "–"),
            (pd.NA, "–"),
            (True, "true"),
            (2.5e12, "2.5e+12"),
            ("word", "word"),
            (0.0, "0"),
        ),
    ],
)
def test_values_are_shown_as_people_read_them(value, text):
    assert show(value) == text


# Pictures, style, environment


def test_a_picture_holds_the_file_and_its_size_or_is_refused():
    picture = embed(png(7, 5), alt="a", caption="b")
    assert (picture.width, picture.height) == (7, 5)
    whole_file = png(200, 200)
    for broken in (b"", b"GIF89a", whole_file[:40], whole_file[: len(whole_file) // 2]):
        with pytest.raises(PictureError):
            embed(broken, alt="a", caption="b")


def test_a_picture_of_absurd_size_is_refused_before_it_is_decoded():
    data = bytearray(png())
    data[16:24] = (2**20).to_bytes(4, "big") * 2
    with pytest.raises(PictureError):
        embed(bytes(data), alt="a", caption="b")


def luminance(colour: str) -> float:
    """Return the relative luminance of a color (WCAG 2.2)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def contrast(one: str, other: str) -> float:
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def test_text_has_enough_contrast_in_light_and_in_dark():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    style = Path(page.__file__).with_name("page.css").read_text()
    light, dark = (dict(re.findall(r"--([\w-]+): (#\w{6})", block)) for block in style.split("@media (prefers")[:2])
    for colours in (light, dark):
        pairs = [(ink, paper) for ink in ("ink", "soft", "link") for paper in ("paper", "card")]
        pairs += [(word, f"{word}-paper") for word in ("ok", "suspect", "invalid", "plain")]
        assert min(contrast(colours[ink], colours[paper]) for ink, paper in pairs) >= 4.5  # WCAG 2.2, level AA


def test_the_environment_is_read_back_from_the_log():
    about = describe_environment()
    line = environment_line()
    log = f"2026-01-01 00:00:00 starting\n2026-01-01 00:00:01 {line}\n2026-01-01 00:00:02 environment {{broken\n"
    assert environments_of(log) == [("2026-01-01 00:00:01", about)]
    assert environments_of("") == []
    assert {"icl", "torch", "python", "command", "machine"} <= set(about)


def test_training_logs_its_environment_at_every_start():
    folder = train(change(TINY, trainer={"max_steps": 2}, evaluation={"every": None})).folder
    ((_, about),) = environments_of(folder.log_file.read_text())
    assert about == describe_environment() | {
        "attention on CPUs": tiny_attention.ON_CPUS,
        "threads": str(torch.get_num_threads()),
    }


def test_curves_have_a_line_for_each_run_and_a_panel_for_each_loss():
    table = pd.DataFrame({"step": [0, 10, 20], "train/loss": [None, 2.0, 1.0]})
    evaluated = table.assign(**{"eval/true/loss": [3.0, 2.0, None]})
    figure = plot_curves({"a": table, "b": evaluated}, title="t")
    training, new_tasks = figure.axes
    assert [line.get_label() for line in training.lines if len(line.get_xdata())] == ["a", "b"]
    np.testing.assert_array_equal(training.lines[0].get_xydata(), [[10, 2], [20, 1]])
    np.testing.assert_array_equal(new_tasks.lines[0].get_xydata(), [[10, 2]])
    np.testing.assert_array_equal(new_tasks.lines[1].get_xydata(), [[0, 3]])  # step 0 has a place of its own
    low, high = new_tasks.get_xlim()
    assert low < 0 < 10 < high
    assert [[text.get_text() for text in axes.texts] for axes in figure.axes] == [["a", "b"], ["b"]]
    assert not figure.legends
    assert plot_curves({"empty": pd.DataFrame({"other": ["x"]})}, title="t").axes


def test_runs_are_named_by_what_varies_among_them(tmp_path):
    for seed in (0, 1):
        for num_tasks in (8, math.inf):
            seeds = {"model": seed, "data": seed, "noise": seed}
            config = change(TINY, seeds=seeds, task={"num_tasks": num_tasks}, optim={"lr": 0.02})
            name = f"tiny,lr=0.02,num_tasks={num_tasks},seeds.data={seed},seeds.model={seed},seeds.noise={seed}"
            make_run(tmp_path / "sweep" / name, config=config)
    opened = open_page(write_report([tmp_path / "sweep"], out=tmp_path / "page.html").path)
    assert [row[0] for row in opened.cells[1:5]] == ["M=8, seed=0", "M=8, seed=1", "M=inf, seed=0", "M=inf, seed=1"]
    assert opened.cells[0][:5] == ["run", "state", "step", "task.num_tasks", "seed"]
    assert "Run tiny,lr=0.02,num_tasks=8,seeds.data=0,seeds.model=0,seeds.noise=0. Preset" in opened.text  # its folder


def test_a_run_whose_settings_are_unknown_keeps_its_folders_name(tmp_path):
    for num_tasks in (8, 16):
        make_run(tmp_path / "sweep" / f"run-{num_tasks}", config=change(TINY, task={"num_tasks": num_tasks}))
    (tmp_path / "sweep" / "run-8" / "config.yaml").write_text("{")
    opened = open_page(write_report([tmp_path / "sweep"], out=tmp_path / "page.html").path)
    assert [row[0] for row in opened.cells[1:3]] == ["run-8", "run-16"]
