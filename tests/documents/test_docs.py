"""The tutorial works word for word, and other pages name only commands, options and files that exist."""

import doctest
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from icl.analysis import ANALYSES
from icl.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page):
    """Return (language, text) of every code block of a page, in order."""
    return BLOCK.findall(page.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_the_tutorial_can_be_followed_word_for_word(tmp_path):
    """The blocks run in order in an empty folder. Python blocks share their names, as in a notebook."""
    kept = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY")
    environment = {
        **{name: os.environ[name] for name in kept if name in os.environ},
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "WANDB_MODE": "disabled",
        "MPLBACKEND": "agg",
    }
    python = []
    for language, text in blocks(ROOT / "docs" / "tutorial.md"):
        if language == "sh":
            done = subprocess.run(
                ["bash", "-euc", text], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        else:
            compile(text, "tutorial", "exec")
            python.append(text)
    (tmp_path / "tutorial.py").write_text("\n".join(python), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "tutorial.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Empty DataFrame" not in done.stdout
    numbers = dict(re.findall(r"^(model|ridge|lasso) ([\d.]+)$", done.stdout, re.MULTILINE))
    assert float(numbers["lasso"]) < float(numbers["ridge"]), "sparse tasks are the lasso's"
    llc, stderr, verdict = re.search(r"^([\d.]+) \+- ([\d.]+) (\w+)", done.stdout, re.MULTILINE).groups()
    assert abs(float(llc) - 2.5) < 5 * float(stderr) + 0.1
    assert verdict == "ok"


def test_the_tutorials_table_has_the_rows_that_it_asks_for(tmp_path, monkeypatch, capsys):
    """The table is the shipped evaluation of the run that the tutorial trains."""
    (block,) = [text for _, text in blocks(ROOT / "docs" / "tutorial.md") if "pd.read_csv" in text]
    shipped = pd.read_csv(ROOT / "data" / "small" / "evaluation.csv")
    path = tmp_path / "runs" / "quickstart" / "results" / "evaluation.csv"
    path.parent.mkdir(parents=True)
    shipped[shipped["run"] == "quickstart"].drop(columns="run").to_csv(path, index=False)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(block, "tutorial", "exec"), names)
    assert set(names["gaps"]["quantity"]) == {"delta_ridge"}
    assert len(names["gaps"]) >= 5
    assert "Empty" not in capsys.readouterr().out


def test_the_notebook_and_the_readme_name_the_same_optimum_for_new_tasks():
    for page in ("README.md", "notebooks/quickstart.ipynb"):
        text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
        sentences = [sentence for sentence in re.split(r"(?<=[.!?]) ", text) if "n new tasks (right)" in sentence]
        assert len(sentences) == 1
        assert "ridge is optimal" in sentences[0]


def test_the_tutorials_python_can_be_compiled():
    found = [text for language, text in blocks(ROOT / "docs" / "tutorial.md") if language == "python"]
    assert len(found) >= 4
    for text in found:
        compile(text, "tutorial", "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_and_analysis_that_a_page_names_exists(page):
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"(?<![\w./-])icl ([a-z]+)(?= |`|$)", text, re.MULTILINE)) - {"import"}
    assert named <= set(COMMANDS)
    assert set(re.findall(r"--what ([a-z-]+)", text)) <= {*ANALYSES, "all"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_file_that_a_page_links_to_exists(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def examples():
    """Return every example in a docstring: its place, its heading and its lines."""
    for path in sorted((ROOT / "icl").rglob("*.py")):
        for match in re.finditer(
            r"^( *)(Examples?):\n((?:\1    .*\n|\n)+)", path.read_text(encoding="utf-8"), re.MULTILINE
        ):
            yield f"{path.name}: {match[3].strip()[:60]}", match[2], match[3].strip()


def test_examples_are_code_on_the_reference_page():
    """Below `Examples:`, mkdocstrings reads `>>>`. Below `Example:`, it reads Markdown, in which `>>>` is a quotation."""
    found = list(examples())
    assert len(found) >= 12
    for where, heading, text in found:
        assert text.startswith(">>>" if heading == "Examples" else "```python"), where


def modules_with_answers():
    """Return the modules whose examples have answers. The example of `metrics` is in a class that is made on first use."""
    paths = (path for path in sorted((ROOT / "icl").rglob("*.py")) if ">>>" in path.read_text(encoding="utf-8"))
    return [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths if path.name != "metrics.py"]


@pytest.mark.parametrize("name", modules_with_answers())
def test_examples_give_their_answers(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted
    assert not result.failed
