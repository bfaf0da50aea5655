"""LLCs of a run: finished estimates are stored by checkpoint and settings and never repeated, and progress is reported."""

import dataclasses
import json
import math

import pandas as pd
import pytest
import torch
from llc_runs import CONFIG, QUICK, STEPS, make_run

from icl.cli.llc_output import describe_rise
from icl.config.validation import ConfigError
from icl.runs.checkpoints import CheckpointError, checkpoint_files, save_checkpoint
from icl.sampling import run as runs
from icl.sampling.published import PUBLISHED, from_scales
from icl.sampling.records import COLUMNS, EstimateSettings, read_all
from icl.sampling.run import chosen_files, estimate_run


@pytest.fixture
def folder(tmp_path):
    return make_run(tmp_path / "tiny")


@pytest.fixture
def count(monkeypatch):
    """Record the step of every checkpoint whose LLC is estimated."""
    seen = []
    true = runs.estimate_grid

    def counted(checkpoints, *arguments, **keywords):
        seen.extend(checkpoint.step for checkpoint in checkpoints)
        return true(checkpoints, *arguments, **keywords)

    monkeypatch.setattr(runs, "estimate_grid", counted)
    return seen


def read(folder):
    return pd.read_csv(folder.results / "llc.csv")


def test_every_saved_step_has_a_row_with_the_promised_columns(folder):
    found = estimate_run(folder.path)
    table = read(folder)
    assert tuple(table.columns[: len(COLUMNS)]) == COLUMNS
    assert COLUMNS[:6] == ("step", "checkpoint_hash", "llc", "stderr", "init_loss", "mean_loss")
    assert table["step"].tolist() == list(STEPS)
    assert table["checkpoint_hash"].nunique() == len(STEPS)
    assert set(table["lr"]) == {QUICK.lr}
    assert set(table["num_chains_used"]) == {2}
    assert (table["trivial_loss"] == found.trivial_loss).all()
    torch.testing.assert_close(
        torch.tensor(table["llc"].to_numpy()),
        torch.tensor((table["nbeta"] * (table["mean_loss"] - table["init_loss"])).to_numpy()),
    )


def test_positions_have_estimates_whose_mean_is_the_estimate(folder):
    estimate_run(folder.path)
    positions = pd.read_csv(folder.results / "llc-positions.csv")
    assert positions["position"].tolist() == list(range(1, CONFIG.task.max_examples + 1)) * len(STEPS)
    means = positions.groupby("step")["llc"].mean()
    assert means.tolist() == pytest.approx(read(folder)["llc"].tolist(), rel=1e-4)


def test_what_is_done_is_not_redone(folder, count):
    first = estimate_run(folder.path, dataclasses.replace(QUICK, steps="last"))
    assert count == [60]
    whole = estimate_run(folder.path)
    assert count == [60, 0, 30]
    pd.testing.assert_frame_equal(whole.table.tail(1).reset_index(drop=True), first.table, check_dtype=False)
    estimate_run(folder.path)
    assert count == [60, 0, 30]
    assert read(folder)["step"].tolist() == list(STEPS)


def test_an_interrupted_run_goes_on_from_the_last_checkpoint(folder, count, monkeypatch):
    true = runs.make_record

    def stop_at_30(result, kind):
        record = true(result, kind)
        if record.row["step"] == 30:
            raise KeyboardInterrupt
        return record

    monkeypatch.setattr(runs, "make_record", stop_at_30)
    with pytest.raises(KeyboardInterrupt):
        estimate_run(folder.path)
    assert read(folder)["step"].tolist() == [0]
    monkeypatch.setattr(runs, "make_record", true)
    estimate_run(folder.path)
    assert count == [0, 30, 30, 60]


@pytest.mark.slow
def test_memory_and_steps_decide_no_chain_and_nothing_is_redone_for_them(folder, count):
    one = estimate_run(folder.path)
    estimate_run(folder.path, dataclasses.replace(QUICK, memory=0.5, steps="30"))
    assert len(count) == len(STEPS)
    alone = dataclasses.replace(QUICK, memory=1e-6, seed=0)
    other = make_run(folder.path.parent / "other")
    pd.testing.assert_frame_equal(estimate_run(other.path, alone).table, one.table, rtol=1e-3)


@pytest.mark.parametrize(
    "change",
    [
        {"lr": 2e-5},
        {"minibatches": "fresh"},
        *(
            pytest.param(change, marks=pytest.mark.slow)
            for change in ({"seed": 1}, {"num_draws": 7}, {"loss": "subsequence"})
        ),
    ],
)
def test_other_settings_are_other_rows(folder, count, change):
    last = dataclasses.replace(QUICK, steps="last")
    first = estimate_run(folder.path, last).table
    second = estimate_run(folder.path, dataclasses.replace(last, **change)).table
    assert count == [60, 60]
    table = read(folder)
    assert len(table) == 2
    assert table["settings"].nunique() == 2
    assert first["llc"].item() != second["llc"].item()


def test_another_checkpoint_at_the_same_step_is_estimated_anew(folder, count):
    last = dataclasses.replace(QUICK, steps="last")
    before = estimate_run(folder.path, last).table["checkpoint_hash"].item()
    make_run(
        folder.path, steps=(60,), config=dataclasses.replace(CONFIG, seeds=dataclasses.replace(CONFIG.seeds, model=1))
    )
    for step in (0, 30):
        (folder.path / "checkpoints" / f"step-{step:09d}.safetensors").unlink()
    after = estimate_run(folder.path, last).table["checkpoint_hash"].item()
    assert count == [60, 60]
    assert before != after
    assert read(folder)["checkpoint_hash"].tolist() == [after]


def test_a_damaged_record_is_made_again(folder, count):
    estimate_run(folder.path, dataclasses.replace(QUICK, steps="last"))
    (file,) = (folder.results / "llc").glob("*/step-*.json")
    file.write_bytes(file.read_bytes()[:100])
    assert read_all(folder) == []
    estimate_run(folder.path, dataclasses.replace(QUICK, steps="last"))
    assert count == [60, 60]
    assert len(read_all(folder)) == 1


def test_one_checkpoint_file_leaves_nothing_behind(folder):
    file = checkpoint_files(folder.path)[-1]
    found = estimate_run(file)
    assert found.table["step"].tolist() == [60]
    assert not folder.results.exists()


def test_n_over_log_n_is_the_same_settings_as_its_value(folder, count):
    plain = dataclasses.replace(QUICK, nbeta=None, steps="last")
    value = 1024 / math.log(1024)
    assert plain.inverse_temperature == pytest.approx(value)
    estimate_run(folder.path, plain)
    estimate_run(folder.path, dataclasses.replace(plain, nbeta=value))
    assert count == [60]


def test_a_checkpoint_of_another_run_is_refused(folder):
    other = dataclasses.replace(CONFIG, optim=dataclasses.replace(CONFIG.optim, lr=0.5))
    params = runs.load_checkpoint_file(checkpoint_files(folder.path)[0]).params
    save_checkpoint(folder.checkpoints, 45, other, params)
    with pytest.raises(CheckpointError, match="different runs"):
        estimate_run(folder.path)


@pytest.mark.slow
def test_other_sampler_settings_in_a_checkpoint_are_the_same_run(folder):
    other = dataclasses.replace(CONFIG, sampler=dataclasses.replace(QUICK, lr=0.5))
    params = runs.load_checkpoint_file(checkpoint_files(folder.path)[0]).params
    save_checkpoint(folder.checkpoints, 45, other, params)
    assert len(estimate_run(folder.path).records) == 4


def test_the_traces_are_kept_with_their_burn_in(folder):
    (record,) = estimate_run(folder.path, dataclasses.replace(QUICK, steps="last", thinning=2)).records
    assert record.traces.shape == (2, 2 + 6)
    assert record.stride == 2


@pytest.mark.slow
def test_an_untrained_model_is_never_ok(tmp_path):
    folder = make_run(tmp_path / "tiny", steps=(0,))
    for lr, nbeta, localization in ((1e-5, 100.0, 1000.0), (1e-4, 300.0, 30.0)):
        sampler = dataclasses.replace(
            QUICK, lr=lr, nbeta=nbeta, localization=localization, num_draws=30, num_burnin_steps=10, num_init_batches=16
        )
        (record,) = estimate_run(folder.path, sampler).records
        assert record.row["verdict"] != "ok"


# Steps


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ("all", [0, 5, 10, 15, 20]),
        ("last", [20]),
        ("5,15", [5, 15]),
        ("15, 5,5", [5, 15]),
        ("0:20:10", [0, 10, 20]),
        ("5:15", [5, 10, 15]),
        (":5,20", [0, 5, 20]),
        ("15:", [15, 20]),
    ],
)
def test_steps_are_chosen(tmp_path, steps, expected):
    files = [tmp_path / f"step-{step:09d}.safetensors" for step in range(0, 21, 5)]
    assert [int(file.stem[5:]) for file in chosen_files(files, steps)] == expected


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ("7", "nearest is 5"),
        ("first", "must be all, last"),
        ("1:2:0", "must be all"),
        ("", "names no step"),
        ("15:5", "is reversed. Write 5:15"),
    ],
)
def test_steps_that_are_not_there_are_refused(tmp_path, steps, words):
    files = [tmp_path / f"step-{step:09d}.safetensors" for step in range(0, 21, 5)]
    with pytest.raises(ConfigError, match=words):
        chosen_files(files, steps)


def test_another_step_than_the_only_one_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no saved step 3; the nearest is 60"):
        chosen_files([tmp_path / "step-000000060.safetensors"], "3")


# What is measured


def test_the_published_settings_are_those_of_the_papers_scales():
    scales = from_scales(gradient_scale=0.01, localization_scale=0.001, noise_scale=3e-4)
    assert scales == pytest.approx({"lr": 3e-4, "nbeta": 66.667, "localization": 6.667}, rel=1e-4)
    assert scales == {name: getattr(PUBLISHED, name) for name in scales}
    assert (PUBLISHED.num_chains, PUBLISHED.num_draws, PUBLISHED.num_burnin_steps) == (10, 5000, 0)
    assert (PUBLISHED.num_samples, PUBLISHED.batch_size, PUBLISHED.minibatches) == (2**20, 1024, "fixed")


def test_the_importer_gives_the_authors_own_move():
    """On a quadratic, the authors' move, written out, equals our move with the converted settings."""
    from icl.sampling.kernels import init_sgld, sgld_step

    w, h, noise = torch.tensor([[0.7]]), 2.0, torch.tensor([[0.3]])
    theirs = w - 0.01 * h * w - 0.001 * (w - 0.5) + 3e-4**0.5 * noise
    state = init_sgld(torch.tensor([[0.5]]))._replace(position=w)
    settings = from_scales(gradient_scale=0.01, localization_scale=0.001, noise_scale=3e-4)
    torch.testing.assert_close(sgld_step(state, h * w, noise, **settings).position, theirs)


@pytest.mark.parametrize("scales", [(0.01, 0.001, 0.0), (0.0, 0.001, 1e-3), (0.01, -1.0, 1e-3), (0.01, 0.0, math.inf)])
def test_scales_that_are_no_sampler_are_refused(scales):
    with pytest.raises(ConfigError, match=r"must be (zero or )?positive"):
        from_scales(**dict(zip(("gradient_scale", "localization_scale", "noise_scale"), scales, strict=True)))


def test_a_curve_that_is_the_loss_upside_down_is_told():
    init = pd.Series([4.1, 3.0, 2.0])
    table = pd.DataFrame({"init_loss": init, "mean_loss": 4.43, "llc": 66.67 * (4.43 - init), "stderr": 1.0})
    sentence = describe_rise(table, 4.125)
    assert "At 3 of 3 checkpoints" in sentence
    assert "Correlation of the LLC with -L(w0): 1.0000" in sentence
    assert "not a learning coefficient" in sentence
    stayed = describe_rise(table.assign(mean_loss=init + 0.01, llc=0.667), 4.5)
    assert "no sign that chains left a checkpoint's basin" in stayed
    assert "At 3 of 3 checkpoints the chains found a lower loss" in describe_rise(
        table.assign(llc=-10.0, mean_loss=init - 0.1), 4.5
    )
    assert "there is no estimate" in describe_rise(table.assign(mean_loss=math.nan), 4.5)


def test_the_settings_of_an_estimate_survive_json():
    settings = EstimateSettings(QUICK, "published", 2.0)
    assert json.loads(json.dumps(settings.values)) == settings.values
    assert settings.digest == EstimateSettings(dataclasses.replace(QUICK, steps="last"), "published", 2.0).digest
    assert settings.digest != EstimateSettings(QUICK, "", 2.0).digest


# Devices


def test_a_tpu_is_refused_in_one_sentence(folder, monkeypatch):
    monkeypatch.setattr(runs, "choose_device", lambda: "tpu")
    with pytest.raises(ConfigError, match="does not run on a TPU"):
        estimate_run(folder.path)
