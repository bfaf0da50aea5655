"""Folders, checkpoints and resume files of version 0.1.0 load, resume and pass verification (`fixtures/0.1.0/README.md`)."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from icl.api import load_model
from icl.cli import main
from icl.runs.checkpoints import list_steps, load_checkpoint_file, load_step
from icl.runs.folder import RunFolder, local_root
from icl.store.base import LocalStore
from icl.training.run import train, train_population

ARCHIVE = Path(__file__).parents[1] / "fixtures" / "0.1.0" / "runs.tar.xz"
DOUBLE, SINGLE = 1e-9, 5e-5
"""Largest differences that another processor's rounding causes; the fixtures' README derives them."""
_BASELINE_RTOL = 2e-6
"""The same for the baselines' columns, relative: they are computed in single precision, here to within 16 units."""


@pytest.fixture
def root() -> Path:
    shutil.unpack_archive(ARCHIVE, local_root())
    return local_root()


def assert_ends_as(folder: RunFolder, expected: RunFolder, atol: float) -> None:
    table, other = pd.read_csv(folder.metrics_file), pd.read_csv(expected.metrics_file)
    assert list(table.columns) == list(other.columns)
    other.loc[other["step"] == 0, "lr"] = np.nan  # 0.1.0 wrote the next update's rate, which is constant here
    is_baseline = table.columns.str.contains("/delta_")
    np.testing.assert_allclose(table.loc[:, is_baseline], other.loc[:, is_baseline], rtol=_BASELINE_RTOL, atol=atol)
    # The file has nine digits.
    np.testing.assert_allclose(table.loc[:, ~is_baseline], other.loc[:, ~is_baseline], rtol=1e-8, atol=atol)
    assert list_steps(folder.checkpoints) == [0, 100, 200]
    pairs = [(folder.checkpoints, expected.checkpoints)]
    pairs += [(folder.moments, expected.moments)] if expected.moments.root.exists() else []
    for store, whole in pairs:
        saved, right = load_step(store, 200).params, load_step(whole, 200).params
        assert saved.keys() == right.keys()
        for name, tensor in right.items():
            torch.testing.assert_close(saved[name], tensor, rtol=0, atol=atol)


@pytest.mark.parametrize(("name", "atol"), [("stopped", SINGLE), ("killed", DOUBLE)])
def test_an_unfinished_run_is_resumed_to_the_same_end(root, name, atol, capsys):
    folder = RunFolder(root / name)
    assert train(folder.read_config(), folder=folder.path).status.state == "finished"
    said = capsys.readouterr()
    assert f"Resuming {folder.path} from step 9" in said.out
    assert "icl:" not in said.err
    assert_ends_as(folder, RunFolder(root / "uninterrupted" / name), atol)


def test_an_unfinished_population_is_resumed_to_the_same_end(root):
    folders = [RunFolder(root / "population" / f"seed={seed}") for seed in (0, 1)]
    results = train_population([one.read_config() for one in folders], folders=[one.path for one in folders])
    assert [result.status.state for result in results] == ["finished", "finished"]
    for one in folders:
        assert_ends_as(one, RunFolder(root / "uninterrupted" / "population" / one.path.name), DOUBLE)


def test_a_finished_run_is_still_finished_and_whole(root, capsys):
    folder = RunFolder(root / "finished")
    before = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    assert train(folder.read_config(), folder=folder.path).was_done
    assert main(["checkpoints", "finished", "verify"]) == 0
    assert "There are no faults" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in before} == before


def test_a_run_that_is_whole_verifies_whatever_its_state(root):
    for name in ("stopped", "killed", "population/seed=0", "population/seed=1"):
        assert main(["checkpoints", name, "verify"]) == 0, name


def test_a_checkpoint_alone_has_its_weights_and_its_moments(root, tmp_path):
    file = tmp_path / "alone" / "step-000000200.safetensors"
    LocalStore(file.parent).write(file.name, (root / "finished" / "checkpoints" / file.name).read_bytes())
    model = load_model(file)
    assert torch.isfinite(model(torch.ones(1, 4, 2), torch.ones(1, 4))).all()
    weights = load_checkpoint_file(file)
    moments = load_checkpoint_file(root / "finished" / "checkpoints" / "moments" / file.name)
    assert (weights.step, moments.step) == (200, 200)
    kinds = {f"{kind}/{name}" for name in weights.params for kind in ("exp_avg", "exp_avg_sq")}
    assert moments.params.keys() == kinds
