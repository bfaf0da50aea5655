"""The shipped tables are small, match the schema of `tools/data/schema.py` and name their source, and their scripts use real `icl` commands."""

import fnmatch
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from tools.data.__main__ import read_phases
from tools.data.docs import PAGES, stale_pages
from tools.data.schema import LABELS, TABLES
from tools.data.tables import few_steps

DATA = Path(__file__).resolve().parents[2] / "data"
SIZES = [size for size in LABELS if (DATA / size).is_dir()]
SHIPPED = sorted(path for size in SIZES for path in (DATA / size).glob("*.csv"))
KINDS = {"integer": pd.api.types.is_integer_dtype, "number": pd.api.types.is_numeric_dtype, "text": None}
MAX_MEGABYTES = 8
NEEDED = ("runs", "checkpoints", "learning", "positions", "evaluation", "baselines", "llc", "phases")


def read(path):
    """Read a table. Whole numbers stay whole, even if some are missing."""
    kinds = {name: "Int64" for name, column in TABLES[path.stem].columns.items() if column.kind == "integer"}
    texts = {name: str for name, column in TABLES[path.stem].columns.items() if column.kind == "text"}
    return pd.read_csv(path, dtype=kinds | texts)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_table_is_what_the_schema_says(path):
    table, columns = read(path), TABLES[path.stem].columns
    assert list(table.columns) == list(columns)
    assert len(table)
    for name, column in columns.items():
        check = KINDS[column.kind]
        assert check is None or check(table[name]) or table[name].isna().all(), name
        assert column.may_miss or table[name].notna().all(), f"{name} has gaps"
    numbers = table.select_dtypes("number").astype("Float64")
    assert not (numbers.abs() == float("inf")).any().any()


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_table_says_where_it_comes_from(path):
    provenance = json.loads((path.parent / "provenance.json").read_text())
    about = provenance["tables"][path.stem]
    assert provenance["size"] == path.parent.name
    assert about["rows"] == len(read(path))
    assert all(about[key] and all(about[key]) for key in ("commands", "date", "torch", "hardware"))


def test_what_every_figure_needs_is_there():
    assert {path.stem for path in SHIPPED if path.parent.name == "small"} >= set(NEEDED)


@pytest.mark.parametrize("size", SIZES)
def test_rows_belong_to_shipped_runs_and_saved_steps(size):
    runs, saved = read(DATA / size / "runs.csv"), read(DATA / size / "checkpoints.csv")
    steps = set(zip(saved["run"], saved["step"], strict=True))
    assert runs["run"].is_unique
    for name in ("evaluation", "llc", "calibration", "attention"):
        path = DATA / size / f"{name}.csv"
        if path.is_file():
            table = read(path).dropna(subset="step")
            assert set(table["run"]) <= set(runs["run"])
            assert set(zip(table["run"], table["step"], strict=True)) <= steps


def test_the_calibration_took_one_corner_at_full_length_and_shows_how():
    table = read(DATA / "small" / "calibration.csv")
    assert set(table["stage"]) == {"nbeta, localization", "lr", "confirmation"}
    taken = table[table["chosen"] == "True"]
    assert set(taken["corner"]) == {table["corner"].max()}
    assert set(taken["stage"]) == {"confirmation"}
    assert taken.loc[taken["step"].idxmax(), "verdict"] == "ok"
    survey = table[(table["stage"] == "nbeta, localization") & (table["step"] == table["step"].max())]
    alike = survey.merge(taken[["nbeta", "ratio"]].drop_duplicates(), on=["nbeta", "ratio"])
    assert list(alike["healthy"] + alike["plateau_nbeta"]) == ["TrueTrue"]
    written = table.dropna(subset="llc")
    rounding = 1e-4 * written["nbeta"] * written["mean_loss"]  # two losses of five digits
    again = written["nbeta"] * (written["mean_loss"] - written["init_loss"])
    assert ((again - written["llc"]).abs() <= rounding).all()


@pytest.mark.parametrize("size", SIZES)
def test_the_stages_were_told_from_the_llcs_that_are_shipped(size):
    stages, llcs = read(DATA / size / "stages.csv"), read(DATA / size / "llc.csv")
    told = stages[(stages["quantity"] == "measured") & (stages["signal"] == "llc")].astype({"at": int})
    own = llcs[llcs["mode"].isna() & (llcs["rescale"] == 1)]
    own = own[own["settings"].isin(own["settings"].mode()[:1])]  # without controls at single steps
    both = told.merge(own, left_on=["run", "at"], right_on=["run", "step"], suffixes=("", "_llc"))
    assert len(both) == len(told) >= 8
    for stage, llc in (("value", "llc"), ("stderr", "stderr_llc"), ("verdict", "verdict_llc")):
        assert list(both[stage]) == list(both[llc])


def test_the_data_are_small():
    shipped = [path for path in DATA.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in shipped) < MAX_MEGABYTES * 1e6
    assert {path.suffix for path in shipped} <= {".py", ".sh", ".md", ".csv", ".json", ".png", ".safetensors"}


@pytest.mark.parametrize("size", SIZES)
def test_shipped_models_are_of_shipped_runs(size):
    from icl.runs.checkpoints import load_checkpoint_file

    saved = read(DATA / size / "checkpoints.csv").set_index("checkpoint_hash")
    files = list((DATA / size / "models").glob("*/*.safetensors"))
    assert files
    for file in files:
        checkpoint = load_checkpoint_file(file)
        assert (saved.loc[[checkpoint.digest], "step"] == checkpoint.step).all()


@pytest.mark.parametrize("page", PAGES)
def test_pages_are_made_of_the_tables(page):
    assert page not in stale_pages(), f"{page} is older than the tables: run `python -m tools.data.docs`."


def test_thinning_keeps_ends_and_spacing():
    kept = few_steps([*range(0, 1000, 7), 1000])
    assert kept[0] == 0
    assert kept[-1] == 1000
    assert all(later >= 1.2 * earlier for earlier, later in itertools.pairwise(kept[1:-1]))


# The scripts


@pytest.fixture
def typed(tmp_path):
    """Run a script's phases with an `icl` that only records its root and its words. Return them for every call."""
    log = tmp_path / "calls"
    fake = tmp_path / "icl"
    fake.write_text(f'#!/bin/sh\nprintf "%s\\n" "$LOCAL_ROOT $*" >> {log}\n')
    fake.chmod(0o755)

    def run(size):
        for phase in read_phases(size):
            environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "LOCAL_ROOT": "R"}
            subprocess.run(["bash", "-c", f"{phase.beginning}\n{phase.body}"], env=environment, check=True)
        return [line.split(" ") for line in log.read_text().splitlines()]

    return run


@pytest.mark.parametrize("size", LABELS)
def test_every_command_is_one_that_icl_takes(typed, size):
    from icl.analysis import ANALYSES
    from icl.command_line import llc_parser, train_parser
    from icl.resolve import resolve
    from icl.run_names import run_name
    from icl.sweeps.points import sweep_points
    from icl.sweeps.schema import read_sweep_file

    calls = typed(size)
    trained = set()
    for root, command, *words in calls:
        if command == "train":
            members = resolve(train_parser().parse_args(words).settings).members()
            trained |= {run_name(member) for member in members}
        elif command == "llc":
            llc_parser().parse_args(words)
        elif command == "sweep":
            points = sweep_points(read_sweep_file(DATA.parent / words[0]))
            trained |= {f"{root}/{point.name}".removeprefix("R/") for point in points}
        elif command == "analyse":
            assert words[words.index("--what") + 1] in ANALYSES
        else:
            assert command == "evaluate"
    words = [word for _, *call in calls for words in call for word in re.split(",(?=R/)", words)]
    used = {word.removeprefix("R/") for word in words if word.startswith("R/") and "." not in word}
    assert used
    folders = trained | {name.rpartition("/")[0] for name in trained}  # a folder of several runs
    assert not [pattern for pattern in used if not fnmatch.filter(folders, pattern)]


def test_a_script_by_hand_does_what_the_phases_do(typed, tmp_path):
    by_phase = typed("small")
    (tmp_path / "calls").unlink()
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "LOCAL_ROOT": "R"}
    subprocess.run(["bash", str(DATA.parent / "tools" / "data" / "small.sh")], env=environment, check=True)
    assert [line.split(" ") for line in (tmp_path / "calls").read_text().splitlines()] == by_phase


@pytest.mark.slow
def test_phases_are_timed_kept_and_not_begun_again(tmp_path):
    """The `icl` of this test fails at the second phase, and then works. The first phase runs only once."""
    log, fake = tmp_path / "calls", tmp_path / "bin" / "python"
    fake.parent.mkdir()
    (fake.parent / "icl").write_text(
        f'#!/bin/sh\necho "$*" >> {log}\n[ -e {tmp_path}/ok ] || case "$*" in *ladder*) exit 3;; esac\n'
    )
    (fake.parent / "icl").chmod(0o755)
    code = f"""
        import sys; sys.executable = {str(fake)!r}; sys.argv = ["data", "small", "--only", "train"]
        import tools.data.tables; tools.data.tables.write_tables = lambda *words: []
        import tools.data.__main__ as driver; driver.environment = dict; sys.exit(driver.main())
    """
    command = [sys.executable, "-c", re.sub(r"^ +", "", code, flags=re.M)]
    environment = {**os.environ, "LOCAL_ROOT": str(tmp_path / "runs")}
    first = subprocess.run(command, cwd=DATA.parent, env=environment, capture_output=True, text=True)
    assert first.returncode == 3
    (tmp_path / "ok").touch()
    second = subprocess.run(command, cwd=DATA.parent, env=environment, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    calls = log.read_text().splitlines()
    assert calls.count("train --preset quickstart") == 1
    record = json.loads((tmp_path / "runs" / "phases.json").read_text())
    assert all(one["is_done"] and one["seconds"] >= 0 for one in record.values())
    assert set(record) == {phase.name for phase in read_phases("small") if "train" in phase.name}
    assert all(
        record[phase.name]["commands"] == phase.commands for phase in read_phases("small") if "train" in phase.name
    )


@pytest.mark.slow
def test_the_shipped_stages_are_those_of_the_shipped_signals():
    """The analysis of the shipped signals gives the shipped boundaries, within a twentieth of their standard errors."""
    from tools.data.stages import recompute

    shipped, new = read(DATA / "small/stages.csv"), recompute("small")
    boundaries = [table[table["quantity"] == "boundary"].reset_index(drop=True) for table in (shipped, new)]
    assert len(boundaries[0]) == len(boundaries[1]) > 0
    assert boundaries[0]["verdict"].tolist() == boundaries[1]["verdict"].tolist()
    differences = (boundaries[0]["value"] - boundaries[1]["value"]).abs()
    assert (differences < 0.05 * boundaries[0]["stderr"]).all()
