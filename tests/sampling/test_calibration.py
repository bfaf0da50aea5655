"""Calibration of a tiny run's sampler: the settings it samples, the files it writes and the lines it prints."""

import contextlib
import dataclasses
import itertools
import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import yaml
from llc_runs import CONFIG, QUICK, make_run

from icl.cli import main
from icl.plotting.llc import plot_calibration
from icl.resolve import resolve
from icl.sampling import calibration, search
from icl.sampling.calibration import calibrate
from icl.sampling.run import estimate_run
from icl.sampling.search import CONFIRMATION, RATES, RULE, SURVEY
from icl.sampling.verdict import Judgement


def few_settings(patch):
    """Search only two values of nbeta and one ratio, for which chains have 20 moves of burn-in."""
    patch.setattr(search, "NBETAS", (300.0, 1000.0))
    patch.setattr(search, "RATIOS", (0.1,))


def always_ok(patch, seen):
    """Make every estimate `ok` and all estimates agree. Record the settings and the steps of each population."""
    true = calibration.estimate_grid

    def ok(checkpoints, samplers, *arguments, **keywords):
        seen.append((samplers, [checkpoint.step for checkpoint in checkpoints]))
        found = true(checkpoints, samplers, *arguments, **keywords)
        changed = [[dataclasses.replace(one, stderr=1e6, ess=1e6) for one in row] for row in found]
        for result in itertools.chain(*changed):
            vars(result)["judgement"] = Judgement("ok", (), ())  # where the property keeps it
        return changed

    patch.setattr(calibration, "estimate_grid", ok)
    for module in (calibration, search):
        patch.setattr(module, "is_healthy", lambda result, but=(): True)


def counting(patch, counted):
    """Count the gradients of chains, and record which minibatches were requested."""
    true = calibration.prompt_target

    def target_of(*arguments, **keywords):
        target = true(*arguments, **keywords)

        def gradient(layout, rows, fixed, batch):
            counted["chains"] += len(rows)
            return target.gradient(layout, rows, fixed, batch)

        def batches(chain, draw):
            counted["batches"] += 1
            return target.batches(chain, draw)

        return dataclasses.replace(target, gradient=gradient, batches=batches)

    patch.setattr(calibration, "prompt_target", target_of)


def noting_ends(patch, ends):
    """Record the number of moves at which each progress bar ended, and its expected number."""
    true = calibration.move_bar

    @contextlib.contextmanager
    def noting(*words):
        with true(*words) as bar:
            yield bar
            ends.append((bar.n, bar.total))

    patch.setattr(calibration, "move_bar", noting)


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """Return a calibration at two checkpoints, and a record of what it did."""
    folder = make_run(tmp_path_factory.mktemp("watched") / "tiny", steps=(0, 20, 30))
    seen = SimpleNamespace(populations=[], counted={"chains": 0, "batches": 0}, ends=[], told=[])
    with pytest.MonkeyPatch.context() as patch:
        few_settings(patch)
        always_ok(patch, seen.populations)
        counting(patch, seen.counted)
        noting_ends(patch, seen.ends)
        sampler = dataclasses.replace(QUICK, num_draws=4, steps="20,30")
        seen.folder, seen.found = folder, calibrate(folder.path, sampler, say=seen.told.append)
    return seen


@pytest.mark.slow
def test_the_survey_is_one_population_and_what_concerns_the_last_checkpoint_is_sampled_there_alone(watched):
    assert [(len(samplers), steps) for samplers, steps in watched.populations] == [
        (2, [20, 30]),  # how long a move takes
        (2, [20, 30]),  # the survey
        (1, [30]),  # a step size that fails
        (1, [30]),  # a third
        (1, [20, 30]),  # the choice at full length
    ]


@pytest.mark.slow
def test_no_gradient_and_no_minibatch_is_made_twice(watched):
    """The expected count: each move needs a gradient, and up to 16 draws need one more (MALA).

    All settings and checkpoints share their minibatches.
    """
    chosen = watched.found.chosen
    moves = (20 + 4, 20 + 4, 60 + 12, chosen.num_burnin_steps + chosen.num_draws)
    acceptances = (4, 4, 12, -(-chosen.num_draws // -(-chosen.num_draws // 16)))
    members = (2 * 2, 1, 1, 2)  # settings x checkpoints
    of_chains = sum(m * (n + a) for m, n, a in zip(members, moves, acceptances, strict=True))
    of_curvature = 4 * (1 + 10)  # batches x (here, ten products)
    to_see_how_long = QUICK.num_chains * 4 * (12 + 2) + 2 * 2  # the survey's first population, with its slopes
    of_slopes = (
        (2 + 1 + 1 + 2) * 2 * QUICK.num_init_batches // 2
    )  # at each population's checkpoints, whatever its settings
    of_failure = (
        2 * QUICK.num_chains
    )  # where chains diverged, the checkpoint's gradients say whether the data are to blame
    expected = of_curvature + to_see_how_long + of_slopes + QUICK.num_chains * of_chains + of_failure
    assert watched.counted["chains"] == expected
    of_losses = 4 * QUICK.num_init_batches  # in each population
    assert watched.counted["batches"] == 4 + 2 + of_losses + QUICK.num_chains * (12 + sum(moves)) + of_failure


@pytest.mark.slow
def test_it_says_beforehand_how_long_it_takes_and_its_bar_ends_full(watched):
    assert watched.told[0].startswith(RULE)
    assert re.match(r"About \d+ minutes?: \d+ moves", watched.told[2])  # how many depends on the machine
    assert "after an interruption" in watched.told[2]
    ((done, total),) = watched.ends
    assert done == total > 0


@pytest.mark.slow
def test_the_rows_say_where_each_setting_was_tried(watched):
    table = watched.found.table
    assert set(table[table["stage"] == SURVEY]["step"]) == {20, 30}
    assert set(table[table["stage"] == RATES]["step"]) == {30}
    assert set(table[table["chosen"]]["stage"]) == {CONFIRMATION}
    assert set(table[table["chosen"]]["step"]) == {20, 30}
    assert (table["localization"] / table["nbeta"]).tolist() == pytest.approx(table["ratio"].tolist(), rel=0.05)


@pytest.mark.slow
@pytest.mark.slow
def test_the_choice_is_confirmed_by_chains_that_it_was_not_chosen_by(watched):
    table = watched.found.table
    assert set(table[table["chosen"]]["seed"]) == {QUICK.seed + 1}
    assert set(table[~table["chosen"]]["seed"]) == {QUICK.seed}
    assert watched.found.chosen.seed == QUICK.seed
    confirmed, again = table[table["chosen"]]["llc"], calibrated_again(watched)
    assert not np.isclose(confirmed, again, rtol=1e-4).any()


def calibrated_again(watched):
    """Return the estimate under the chosen settings with the search's own seed."""
    return [row["llc"] for row in estimate_run(watched.folder.path, watched.found.chosen).table.to_dict("records")[1:]]


@pytest.mark.slow
def test_an_interrupted_calibration_continues_after_the_last_finished_settings(tmp_path, monkeypatch):
    """The resumed calibration makes the same table as an uninterrupted one, and repeats no finished estimate."""
    few_settings(monkeypatch)
    for module in (calibration, search):
        monkeypatch.setattr(module, "is_healthy", lambda result, but=(): True)
    monkeypatch.setattr(search, "_has_plateau", lambda trial, trials: True)
    sampler = dataclasses.replace(QUICK, num_draws=4, steps="20,30")
    whole = make_run(tmp_path / "whole", steps=(0, 20, 30))
    expected = calibrate(whole.path, sampler).table
    halted = make_run(tmp_path / "halted", steps=(0, 20, 30))
    true, populations = calibration.estimate_grid, []

    def estimate_grid(checkpoints, samplers, *arguments, **keywords):
        if len(populations) == num_before:
            raise KeyboardInterrupt
        populations.append(len(samplers))
        return true(checkpoints, samplers, *arguments, **keywords)

    monkeypatch.setattr(calibration, "estimate_grid", estimate_grid)
    for num_before in (2, 3, 1):  # noqa: B007 (the first population of each call measures how long a move takes)
        populations.clear()
        with pytest.raises(KeyboardInterrupt):
            calibrate(halted.path, sampler)
    num_before = 100
    populations.clear()
    pd.testing.assert_frame_equal(calibrate(halted.path, sampler).table, expected)
    num_left = len(populations)
    populations.clear()
    pd.testing.assert_frame_equal(calibrate(halted.path, sampler).table, expected)
    assert (num_left, len(populations)) == (2, 1)  # the confirmation was left


@pytest.mark.slow
def test_a_damaged_stored_result_is_made_again(tmp_path, monkeypatch):
    few_settings(monkeypatch)
    run = make_run(tmp_path / "tiny", steps=(0, 20, 30))
    sampler = dataclasses.replace(QUICK, num_draws=4, steps="20,30")
    expected = calibrate(run.path, sampler).table
    files = sorted((run.results / "llc-calibration").rglob("*.json"))
    assert len(files) >= 4
    for file in files:
        file.write_text(file.read_text().replace("0", "1", 3))
    pd.testing.assert_frame_equal(calibrate(run.path, sampler).table, expected)


def test_a_step_that_is_not_saved_is_refused_before_anything_is_told(tmp_path, capsys):
    folder = make_run(tmp_path / "tiny", steps=(0, 30))
    assert main(["llc", str(folder.path), "--calibrate", "--steps", "7"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert "no saved step 7" in told.err


@pytest.fixture
def quick_search(monkeypatch):
    few_settings(monkeypatch)
    always_ok(monkeypatch, [])


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


@pytest.mark.slow
def test_a_run_that_cannot_be_calibrated_exits_with_1_and_still_shows_what_was_tried(tmp_path, monkeypatch, capsys):
    few_settings(monkeypatch)
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
