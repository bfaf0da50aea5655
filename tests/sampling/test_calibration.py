"""The search for the sampler's settings, on a quadratic whose answer is known, and of a tiny run."""

import dataclasses

import pandas as pd
import pytest
import torch
import yaml
from llc_runs import CONFIG, QUICK, make_run

from icl.cli import main
from icl.config import SamplerConfig
from icl.plotting.llc import plot_calibration
from icl.resolve import resolve
from icl.sampling import calibration, estimate_llc, known
from icl.sampling.calibration import RULE, Search, agree, burnin, calibrate, is_healthy, largest_curvature, search
from icl.sampling.gradients import vmapped_gradient

H = torch.logspace(-1, 1, 12)
BASE = SamplerConfig(num_chains=6, num_draws=60, num_burnin_steps=60)
START = {"w": torch.zeros(12)}


def quadratic(params, batch):
    return (H * params["w"].square()).sum() / 2


def estimate(corner, *, loss=quadratic, start=START):
    sampler = corner.sampler(BASE)
    names = ("lr", "nbeta", "localization", "num_chains", "num_draws", "num_burnin_steps", "seed")
    settings = {name: getattr(sampler, name) for name in names}
    return [estimate_llc(loss, start, (None,), trivial_loss=5.0, **settings)]


def test_the_largest_curvature_is_that_of_the_hessian():
    found = largest_curvature(vmapped_gradient(quadratic), START, [None])
    assert found == pytest.approx(10.0, rel=0.02)


@pytest.fixture(scope="module")
def found() -> Search:
    return search(estimate, height=5.0, curvature=10.0)


def test_the_chosen_corner_of_a_quadratic_has_the_known_answer(found):
    assert found.chosen is not None
    corner, result = found.chosen.corner, found.chosen.last
    truth = known.quadratic_llc(H, nbeta=corner.nbeta, localization=corner.localization, lr=corner.lr)
    assert is_healthy(result)
    assert result.llc == pytest.approx(truth, abs=4 * result.stderr)
    assert corner.ratio == min(one.corner.ratio for one in found.tried if is_healthy(one.last))


def test_the_search_shows_a_failed_corner_and_an_lr_plateau(found):
    rates = [one for one in found.tried if one.corner.stage == "lr"]
    assert rates[0].corner.lr == pytest.approx(10 * found.chosen.corner.lr, rel=0.1)
    assert not is_healthy(rates[0].last)
    assert agree(found.chosen.last, rates[-1].last)
    assert rates[-1].corner.lr < found.chosen.corner.lr
    assert 10 <= found.num_burnin_steps <= 120
    assert "Chosen" in found.reason


def test_nothing_is_chosen_where_nothing_is_healthy():
    """The checkpoint is a saddle: every chain finds lower loss."""

    def saddle(params, batch):
        return -(H * params["w"].square()).sum() / 2

    nothing = search(lambda corner: estimate(corner, loss=saddle), height=5.0, curvature=10.0)
    assert nothing.chosen is None
    assert "No choice" in nothing.reason


def test_burn_in_is_longer_where_chains_start_far_away(found):
    result = found.chosen.last
    far = dataclasses.replace(result, burnin_trace=result.burnin_trace + torch.linspace(5, 0, 60) ** 3)
    assert burnin(far) > burnin(result)
    assert burnin(far) >= 45


@pytest.fixture
def quick_search(monkeypatch):
    """Two nbetas and one ratio; every estimate is ok and within its error of every other."""
    true = calibration.estimate_checkpoints
    monkeypatch.setattr(calibration, "NBETAS", (300.0, 1000.0))
    monkeypatch.setattr(calibration, "RATIOS", (0.01,))

    def ok(*arguments, **keywords):
        found = true(*arguments, **keywords)
        return [dataclasses.replace(result, verdict="ok", stderr=1e6) for result in found]

    monkeypatch.setattr(calibration, "estimate_checkpoints", ok)
    monkeypatch.setattr(calibration, "is_healthy", lambda result: True)


@pytest.mark.slow
def test_a_runs_calibration_writes_table_figure_and_settings_that_the_command_takes(tmp_path, quick_search, capsys):
    folder = make_run(tmp_path / "tiny", steps=(0, 30))
    assert main(["llc", str(folder.path), "--calibrate", "--steps", "30", "--sampler.num_draws", "8"]) == 0
    told = capsys.readouterr().out
    assert told.startswith(RULE.splitlines()[0])
    table = pd.read_csv(folder.results / "llc-calibration.csv")
    assert table["chosen"].sum() == 1
    assert set(table["stage"]) == {"nbeta, localization", "lr", "confirmation"}
    assert set(table["step"]) == {30}
    assert (folder.figures / "llc-calibration.png").stat().st_size > 10_000
    file = folder.results / "llc-calibration.yaml"
    sampler = resolve(yaml.safe_load(file.read_text())).sampler
    row = table[table["chosen"]].iloc[0]
    assert (sampler.lr, sampler.nbeta, sampler.localization) == (row["lr"], row["nbeta"], row["localization"])
    assert sampler.num_burnin_steps == row["num_burnin_steps"]
    assert sampler.batch_size == QUICK.batch_size
    assert f"--config {file}" in told


def test_a_run_that_cannot_be_calibrated_exits_with_1_and_still_shows_what_was_tried(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(calibration, "NBETAS", (300.0,))
    monkeypatch.setattr(calibration, "RATIOS", (0.01,))
    folder = make_run(tmp_path / "tiny", steps=(0,))
    assert main(["llc", str(folder.path), "--calibrate"]) == 1
    assert "No choice" in capsys.readouterr().out
    assert (folder.results / "llc-calibration.csv").is_file()
    assert not (folder.results / "llc-calibration.yaml").exists()


@pytest.mark.slow
def test_the_checkpoints_are_spread_over_training(tmp_path, quick_search):
    folder = make_run(tmp_path / "tiny", steps=(0, 10, 20, 30, 60, 100))
    found = calibrate(folder.path, dataclasses.replace(CONFIG.sampler, num_draws=4))
    assert sorted(set(found.table["step"])) == [20, 60, 100]
    assert len(plot_calibration(found.table, found.traces, title="x").axes) >= 4
