"""Fits of OOD error on tables that follow a known law, that are only noise, or that have too few values."""

import json

import numpy as np
import pandas as pd
import pytest

from icl.analysis.diversity_fit import FitError, Settings, analyse, fit, read_points
from icl.cli import main
from icl.config.validation import ConfigError

MODELS = ("linear", "ridge", "lasso")


def table(octaves, law, *, noise=0.02, seed=0, infinite=True):
    """Return a table as `icl evaluate --checkpoint_base_dir` writes it. `law(octave, loss, score)` gives the OOD loss."""
    generator = np.random.default_rng(seed)
    rows = []
    for octave in [*octaves, *([np.inf] if infinite else [])]:
        num_tasks = "inf" if np.isinf(octave) else str(2**octave)
        loss, score = generator.uniform(0.5, 1, size=2)
        ood = law(min(octave, 20), loss, -score) + noise * generator.normal()
        numbers = [
            ("pretrain", "loss", "mean", loss),
            ("pretrain", "loss", "1", 99.0),
            ("pretrain", "icl_score", "1:4", 99.0),
            ("pretrain", "icl_score", "1:8", -score),
            ("true", "loss", "mean", ood),
            ("true", "ridge", "mean", 99.0),
        ]
        for step, shift in ((10, 5.0), (20, 0.0)):  # only the last step is of the law
            rows += [
                dict(zip(COLUMNS, (num_tasks, step, f"{num_tasks}-{step}", *key, value + shift, 0.01), strict=True))
                for *key, value in numbers
            ]
    return pd.DataFrame(rows)


COLUMNS = ("num_tasks", "step", "checkpoint_hash", "distribution", "quantity", "position", "value", "stderr")


def law(octave, loss, score):
    return 2 - 0.05 * octave + 0.4 * loss + 0.2 * score


def save(frame, path):
    if path.suffix == ".csv":
        frame.to_csv(path, index=False)
    else:
        path.write_text(json.dumps(frame.to_dict("records")))
    return path


@pytest.mark.parametrize(("model_type", "suffix"), [("linear", ".csv"), ("ridge", ".json"), ("lasso", ".csv")])
def test_a_linear_law_is_found(model_type, suffix, tmp_path):
    path = save(table(range(1, 21), law), tmp_path / f"t{suffix}")
    features = "log2_num_tasks,loss,icl_score"
    found = analyse(path, Settings(model_type=model_type, features=features)).table.set_index(["quantity", "item"])
    points = read_points(path).query("num_tasks != 'inf'")
    assert set(found["verdict"].dropna()) == {"ok"}
    assert found.loc[("r2_cv", np.nan), "value"].item() > 0.97
    for name, slope in (("log2_num_tasks", -0.05), ("loss", 0.4), ("icl_score", 0.2)):
        row = found.loc[("coefficient", name)].squeeze()
        truth = slope * points[name].std(ddof=0)
        assert abs(row["value"] - truth) < 4 * row["stderr"] + (0 if model_type == "linear" else 0.01)
        assert row["stderr"] < 0.02


def test_linear_is_ordinary_least_squares_and_held_out_is_what_it_says():
    generator = np.random.default_rng(0)
    features, noise = generator.normal(size=(12, 2)) * [1, 50], generator.normal(size=12)
    targets = features @ [1.0, 0.02] + noise
    groups = np.arange(12).astype(str)
    found = fit(features, targets, groups, model_type="linear")
    design = np.column_stack([np.ones(12), features])
    slopes = np.linalg.lstsq(design, targets, rcond=None)[0]
    np.testing.assert_allclose(found.coefficients, slopes[1:] * features.std(0))
    leverage = np.diag(design @ np.linalg.pinv(design))
    residuals = (targets - design @ slopes) / (1 - leverage)  # the leave-one-out residuals of least squares
    np.testing.assert_allclose(targets - found.held_out, residuals)
    around = (targets - targets.mean()) * 12 / 11
    assert found.r2_cv == pytest.approx(1 - (residuals**2).sum() / (around**2).sum())


@pytest.mark.parametrize(
    "model_type", [pytest.param(m, marks=[pytest.mark.slow] if m == "lasso" else []) for m in MODELS]
)
def test_pure_noise_is_never_claimed(model_type):
    """Of 20 tables of noise, at most one is `ok`, and most are `invalid`."""
    generator = np.random.default_rng(1)
    verdicts = []
    for _ in range(20 if model_type == "linear" else 3):
        features, targets = generator.normal(size=(20, 3)), generator.normal(size=20)
        verdicts.append(fit(features, targets, np.arange(20).astype(str), model_type=model_type).verdict)
    assert verdicts.count("ok") <= 1
    assert verdicts.count("invalid") > len(verdicts) / 2


def test_steps_of_one_run_are_left_out_together():
    """Points of a group that are copies of each other say nothing about other groups. Leaving out single points would hide this."""
    generator = np.random.default_rng(2)
    features, targets = (np.repeat(generator.normal(size=size), 5, axis=0) for size in ((12, 6), 12))
    assert fit(features, targets, np.repeat(np.arange(12), 5).astype(str), model_type="linear").r2_cv <= 0


@pytest.mark.parametrize("octaves", [[1], [1, 2], [1, 2, 3]])
def test_too_few_points_are_refused(octaves, tmp_path, capsys):
    path = save(table(octaves, law), tmp_path / "t.csv")
    with pytest.raises(FitError, match=f"at least 4 finite values of M, got {len(octaves)}"):
        analyse(path, Settings())
    words = ["analyse", "--what", "diversity", "--input_file", str(path), "--output_plot", str(tmp_path / "p.png")]
    assert main(words) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "p.png").exists()


def test_few_points_are_suspect_and_get_few_features(tmp_path):
    path = save(table(range(1, 7), lambda octave, loss, score: 2 - 0.1 * octave), tmp_path / "t.csv")
    found = analyse(path, Settings())
    assert list(found.table["item"].dropna()) == ["log2_num_tasks"]
    assert "suspect (there are only 6 values of M" in found.summary[0]
    with pytest.raises(FitError, match="at least 6 finite values"):
        analyse(save(table(range(1, 6), law), path), Settings(features="log2_num_tasks,loss,icl_score"))


def test_infinitely_many_tasks_are_outside_the_fit_or_an_octave_further(tmp_path):
    path = save(table(range(1, 13), law), tmp_path / "t.csv")
    points = read_points(path).set_index("num_tasks")
    assert not points.loc["inf", "is_inside"]
    assert points["is_inside"].sum() == 12
    points = read_points(path, infinite="next").set_index("num_tasks")
    assert points["is_inside"].all()
    assert points.loc["inf", "log2_num_tasks"] == 13


def test_settings_and_tables_that_cannot_be_used_are_sentences(tmp_path):
    path = save(table(range(1, 13), law), tmp_path / "t.csv")
    with pytest.raises(ConfigError, match="features"):
        Settings(features="colour")
    with pytest.raises(FitError, match="no loss on `label_noise`; its distributions are pretrain, true"):
        analyse(path, Settings(target="label_noise"))
    with pytest.raises(FitError, match="delta_dmmse"):
        analyse(path, Settings(features="delta_dmmse"))
    path.write_text("a,b\n1,2\n")
    with pytest.raises(FitError, match="no column num_tasks"):
        analyse(path, Settings())
    with pytest.raises(FitError, match="Cannot read"):
        analyse(tmp_path / "missing.csv", Settings())


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MODELS)
def test_the_older_command_draws_and_says_what_it_found(model_type, tmp_path, capsys):
    path, plot, out = save(table(range(1, 13), law), tmp_path / "t.json"), tmp_path / "p.png", tmp_path / "o.json"
    words = ["--input_file", str(path), "--output_plot", str(plot), "--model_type", model_type, "--out", str(out)]
    assert main(["analyse", "--what", "diversity", *words]) == 0
    said = capsys.readouterr().out
    assert "Verdict: ok" in said
    assert str(plot) in said
    assert plot.read_bytes().startswith(b"\x89PNG")
    held = json.loads(out.read_text())
    assert {"r2_cv", "coefficient", "held_out", "measured"} <= {row["quantity"] for row in held["rows"]}
