"""Damaged files are refused in one sentence or computed again. A sample of the mutations runs by default; a slow test runs all 3,000."""

import shutil

import pytest

from tests.reliability import fuzz, readers


@pytest.mark.slow
def test_a_sample_of_damaged_files_leads_to_no_uncaught_error(tmp_path, as_users_run):
    trials = fuzz.fuzz(tmp_path, len(readers.READERS), seed=1, rendered=0.0)
    assert [trial for trial in trials if trial.outcome in fuzz.FAULTS] == []
    assert {trial.outcome for trial in trials} == {"refused", "mended", "whole"}


@pytest.mark.slow
def test_no_damaged_file_leads_to_an_uncaught_error(tmp_path, as_users_run):
    trials = fuzz.fuzz(tmp_path, 3000)
    assert [trial for trial in trials if trial.outcome in fuzz.FAULTS] == []


@pytest.mark.slow
def test_every_reader_accepts_its_file_undamaged(tmp_path, as_users_run, monkeypatch):
    pristine, work = tmp_path / "pristine", tmp_path / "work"
    monkeypatch.setenv("LOCAL_ROOT", str(work / "runs"))
    readers.make_files(pristine)
    for reader in readers.READERS:
        for use in reader.uses:
            shutil.rmtree(work, ignore_errors=True)
            shutil.copytree(pristine, work)
            file = sorted(work.glob(reader.file))[0]
            outcome = fuzz.outcome_of(lambda use=use, file=file: use(work, file))
            assert outcome in (("whole", ""), ("mended", "")), reader.name  # done, and no sentence of `icl`
