"""The Python functions of the older code base work as DESIGN.md shows them."""

import math

import pytest
import torch

from icl import ICRegConfig, evaluate_ood_score, load_checkpoint, load_model, train_ic_regression
from icl.build import build_model
from icl.config.validation import ConfigError
from icl.evaluation.sets import REPORT
from icl.presets import preset
from icl.runs.checkpoints import CheckpointError
from icl.tasks.prompts import sample_prompts

SMALL = ICRegConfig(D=2, K=4, d_model=8, d_mlp=8, n_heads=2, n_layers=1)
FEW = {"num_steps": 20, "batch_size": 8, "learning_rate": 1e-2}


@pytest.fixture
def run(tmp_path):
    train_ic_regression(SMALL, M=8, checkpoint_dir=tmp_path / "run", checkpoint_every=10, **FEW)
    return tmp_path / "run"


def test_the_defaults_are_the_documented_ones():
    documented = {
        "D": 8,
        "K": 16,
        "sigma2": 0.125,
        "d_model": 512,
        "d_mlp": 512,
        "n_heads": 4,
        "n_layers": 3,
        "use_prenorm": True,
        "M": 64,
        "max_M": 32_768,
    }
    assert vars(ICRegConfig()) == documented


def test_the_defaults_are_the_preset_icr():
    assert ICRegConfig().to_run_config() == preset("icr")


def test_a_run_made_with_earlier_defaults_keeps_its_own_settings(tmp_path):
    """The preset `icr` once had 8 layers and a noise variance of 0.25. Runs of that time contain these settings."""
    earlier = ICRegConfig(**{**vars(SMALL), "n_layers": 8, "sigma2": 0.25})
    train_ic_regression(earlier, M=8, num_steps=2, batch_size=4, checkpoint_dir=tmp_path / "run")
    model, info = load_checkpoint(tmp_path / "run")
    assert (len(model.blocks), info["config"].task.noise_variance) == (8, 0.25)
    with pytest.raises(CheckpointError, match=r"num_layers is 8, not 3"):
        load_checkpoint(tmp_path / "run", ICRegConfig(**{**vars(SMALL), "n_layers": 3}))


def test_training_returns_the_model_that_loading_gives_back(tmp_path):
    model = train_ic_regression(cfg=SMALL, M=8, checkpoint_dir=tmp_path / "run", **FEW)
    loaded = load_model(tmp_path / "run", SMALL)
    xs, ys, _ = sample_prompts(SMALL.to_run_config(), stream="true", step=0, batch_size=3)
    assert torch.equal(model(xs, ys), loaded(xs, ys))
    assert (tmp_path / "run" / "config.yaml").is_file()


def test_a_checkpoint_says_where_it_comes_from(run):
    model, info = load_checkpoint(run / "checkpoints" / "step-000000010.safetensors")
    assert info["step"] == 10
    assert info["config"].task.num_tasks == 8
    assert model.max_examples == 4
    assert load_checkpoint(run)[1]["step"] == 20


def test_the_arguments_reach_the_configuration(tmp_path):
    train_ic_regression(
        SMALL,
        M="inf",
        checkpoint_dir=tmp_path / "run",
        warmup_steps=5,
        grad_clip=None,
        eval_every=10,
        early_stopping_patience=3,
        **FEW,
    )
    config = load_checkpoint(tmp_path / "run")[1]["config"]
    assert config.task.num_tasks == math.inf
    assert (config.optim.schedule, config.optim.warmup_steps, config.optim.grad_clip) == ("triangle", 5, None)
    assert (config.evaluation.every, config.early_stopping.patience) == (10, 3)
    assert config.early_stopping.min_delta == 1e-6


@pytest.mark.parametrize("bad", [0, 64.5, None, "many", -3, True])
def test_m_refuses_what_is_no_number_of_tasks(bad, tmp_path, as_users_run):
    with pytest.raises(ConfigError, match="number of tasks M"):
        train_ic_regression(SMALL, M=bad, checkpoint_dir=tmp_path, **FEW)


def test_m_left_out_is_that_of_the_config(tmp_path):
    train_ic_regression(ICRegConfig(**{**vars(SMALL), "M": 3}), checkpoint_dir=tmp_path / "run", **FEW)
    assert load_checkpoint(tmp_path / "run")[1]["config"].task.num_tasks == 3


def test_max_m_limits_nothing():
    assert ICRegConfig(M=2**20, max_M=1).to_run_config().task.num_tasks == 2**20


def test_patience_without_evaluations_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"evaluation\.every"):
        train_ic_regression(SMALL, M=2, early_stopping_patience=2, checkpoint_dir=tmp_path, **FEW)


def test_another_models_checkpoint_is_refused(run):
    with pytest.raises(CheckpointError, match="num_layers is 1, not 2"):
        load_model(run, ICRegConfig(**{**vars(SMALL), "n_layers": 2}))


def test_the_ood_score_is_the_mean_squared_error_per_target():
    config = SMALL.to_run_config()
    model = build_model(config)
    xs, ys, _ = sample_prompts(config, stream="true", step=REPORT, batch_size=2500)
    expected = (model(xs, ys) - ys).square().mean().item()
    score = evaluate_ood_score(model, SMALL, n_samples=2500)
    assert isinstance(score, float)
    assert score == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_the_ood_score_is_accumulated_in_double_precision():
    """In float32, 500 batches of one prompt gave an error of 1e-7, and more than 2^24 prompts were not counted."""
    model = build_model(SMALL.to_run_config())
    xs, ys, _ = sample_prompts(SMALL.to_run_config(), stream="true", step=REPORT, batch_size=500)
    with torch.no_grad():
        errors = [(model(x[None], y[None]) - y).square().mean().double() for x, y in zip(xs, ys, strict=True)]
    expected = torch.stack(errors).mean().item()
    assert evaluate_ood_score(model, SMALL, n_samples=500, batch_size=1) == pytest.approx(expected, rel=1e-12)


def test_the_ood_score_refuses_a_model_of_another_shape(as_users_run):
    with pytest.raises(ConfigError, match="D = 2, K = 4"):
        evaluate_ood_score(build_model(SMALL.to_run_config()), ICRegConfig(), n_samples=10)
    with pytest.raises(ConfigError, match="n_samples"):
        evaluate_ood_score(build_model(SMALL.to_run_config()), SMALL, n_samples=0)


def test_importing_icl_loads_nothing_heavy():
    import subprocess
    import sys

    script = (
        "import sys, icl, icl.cli; print([m for m in ('torch', 'lightning', 'wandb', 'pandas') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.strip() == "[]"
