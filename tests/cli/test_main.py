"""`icl` imports nothing from the working folder, however it is started."""

import os
import shlex
import subprocess
import sys

import pytest
import yaml

from icl.cli import main
from icl.runs.environment import OWN_PROGRAM
from icl.runs.folder import local_root

PLANTED = (
    "random",
    "pandas",
    "torch",
    "numpy",
    "yaml",
    "difflib",
    "json",
    "tempfile",
    "validation",
    "dotenv",
    "icl/cli",
)
"""Modules that `icl` imports at its start or later, and its own."""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return a working folder with modules that leave a mark when they are imported."""
    (tmp_path / "icl").mkdir()
    for name in PLANTED:
        (tmp_path / f"{name}.py").write_text(
            f"open({str(tmp_path / 'imported')!r}, 'a').write({name!r})\nraise SystemExit(9)\n"
        )
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_a_process_that_icl_starts_imports_nothing_from_the_working_folder(folder):
    (local_root() / "r").mkdir()
    (local_root() / "r" / "status.json").write_text('{"state": "finished", "step": 1, "max_steps": 1, "updated": 1}')
    for program in (OWN_PROGRAM, (sys.executable, "-m", "icl")):
        (folder / "icl").rename(folder / "other")  # with -m, Python itself looks for `icl` here first
        ran = subprocess.run([*program, "runs"], capture_output=True, text=True)
        (folder / "other").rename(folder / "icl")
        assert ran.returncode == 0, ran.stderr
        assert "finished" in ran.stdout
    ran = subprocess.run(
        [*OWN_PROGRAM, "--version"], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""}
    )
    assert ran.stdout.startswith("icl ")
    assert not (folder / "imported").exists()


@pytest.mark.parametrize("program", [OWN_PROGRAM, (sys.executable, "-m", "icl")])
def test_a_working_folder_that_was_deleted_is_one_sentence(tmp_path, program):
    gone = tmp_path / "gone"
    gone.mkdir()
    line = f"cd {gone} && rmdir {gone} && exec {shlex.join([*program, 'runs'])}"
    ran = subprocess.run(["sh", "-c", line], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr.startswith("icl: The working folder no longer exists; change to another folder (cd)")
    assert ran.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_point_of_a_sweep_imports_nothing_from_the_working_folder(folder):
    sweep = {
        "command": ["${env}", "icl", "train"],
        "method": "grid",
        "parameters": {
            "trainer.max_steps": {"value": 2},
            "run_name": {"value": "r"},
            "optim.schedule_steps": {"value": 4},
        },
    }
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    assert main(["sweep", "sweep.yaml"]) == 0
    assert (local_root() / "r" / "last.ckpt").is_file()
    assert not (folder / "imported").exists()
