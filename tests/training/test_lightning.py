"""Lightning sees the true state of training: its own callbacks work, and early stopping agrees with Lightning's."""

import types

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping as LightningEarlyStopping
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from tiny_runs import TINY, change

from icl.build import build_model
from icl.config import EarlyStoppingConfig
from icl.config.schedules import rate_factor
from icl.model.stacked import stack
from icl.runs.folder import RunFolder
from icl.training.callbacks import EarlyStopping, Ending, Evaluation, MetricsLog
from icl.training.data import PromptDataModule
from icl.training.members import Member
from icl.training.module import PopulationModule
from icl.training.saving import ResumeFiles
from icl.training.trainer import make_callbacks, require_order

CONFIG = change(TINY, optim={"schedule": "triangle"}, trainer={"max_steps": 12, "compile": "false"})


def fit(folder, max_steps, ckpt_path=None, callbacks=()):
    """Train a population of one with a Trainer that Lightning makes itself."""
    member = Member(CONFIG, RunFolder(folder / "run"))
    module = PopulationModule([member], stack([dict(build_model(CONFIG).named_parameters())]))
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        callbacks=[*callbacks, ModelCheckpoint(folder, filename=f"{max_steps}")],
        logger=CSVLogger(folder),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=PromptDataModule([CONFIG]), ckpt_path=ckpt_path, weights_only=True)
    return module, trainer


def test_lightnings_own_checkpoint_resumes_to_the_same_bits(tmp_path):
    whole, _ = fit(tmp_path / "whole", 12)
    fit(tmp_path / "parts", 5)
    resumed, trainer = fit(tmp_path / "parts", 12, ckpt_path=tmp_path / "parts" / "5.ckpt")
    assert trainer.global_step == 12
    assert torch.equal(whole.rows, resumed.rows)
    assert torch.equal(whole.exp_avg_sq, resumed.exp_avg_sq)


def test_the_optimiser_holds_the_real_rate_parameters_and_moments(tmp_path):
    module, trainer = fit(tmp_path, 5)
    (optimiser,) = trainer.optimizers
    (group,) = optimiser.param_groups
    factor = rate_factor("triangle", warmup_steps=0, schedule_steps=12)
    assert group["lr"] == pytest.approx(CONFIG.optim.lr * factor(5))  # the sixth update's
    assert (group["betas"], group["eps"]) == ((CONFIG.optim.beta1, CONFIG.optim.beta2), CONFIG.optim.eps)
    assert list(module.parameters()) == group["params"]
    state = optimiser.state[module.rows]
    assert state["step"].tolist() == [5]
    assert torch.equal(state["exp_avg"], module.exp_avg)
    assert state["exp_avg"].abs().max() > 0


def test_lightnings_learning_rate_monitor_logs_the_rates_that_are_used(tmp_path):
    monitor = LearningRateMonitor("step")
    _, trainer = fit(tmp_path, 12, callbacks=[monitor])
    trainer.logger.save()
    factor = rate_factor("triangle", warmup_steps=0, schedule_steps=12)
    (rates,) = (values for name, values in monitor.lrs.items() if name.startswith("lr-"))
    assert rates[0] == pytest.approx(CONFIG.optim.lr * factor(0))
    assert set(rates) <= {CONFIG.optim.lr * factor(update) for update in range(12)}


@pytest.mark.parametrize("patience", [1, 3])
@pytest.mark.parametrize("min_delta", [0.0, 0.05])
def test_early_stopping_stops_where_lightnings_would(tmp_path, patience, min_delta):
    generator = torch.Generator().manual_seed(0)
    values = (1 / (1 + torch.arange(60) / 5) + 0.05 * torch.randn(60, generator=generator)).tolist()
    theirs = LightningEarlyStopping("loss", patience=patience, min_delta=min_delta, mode="min", check_finite=False)
    stops = [theirs._evaluate_stopping_criteria(torch.tensor(value))[0] for value in values]
    settings = EarlyStoppingConfig(monitor="loss", patience=patience, min_delta=min_delta)
    member, evaluation = Member(CONFIG, RunFolder(tmp_path)), Evaluation(lambda step: [], None, 60)
    ours = EarlyStopping([member], settings, evaluation)
    finite = types.SimpleNamespace(check_weights=lambda: None, first_bad_step=torch.tensor([-1]))
    for step, value in enumerate(values):
        evaluation.step, evaluation.metrics = step, [{"loss": value}]
        ours._check(step, finite)
    assert member.end_step == (stops.index(True) if True in stops else None)
    if member.end_step is not None:
        assert member.best == pytest.approx(min(values[: member.end_step + 1]), abs=min_delta + 1e-12)


@pytest.mark.parametrize(
    "pair", [(Evaluation, EarlyStopping), (MetricsLog, ResumeFiles), (EarlyStopping, Ending), (Ending, MetricsLog)]
)
def test_callbacks_in_another_order_are_refused(tmp_path, pair):
    callbacks = make_callbacks([Member(CONFIG, RunFolder(tmp_path))], [[]])
    kinds = [type(callback) for callback in callbacks]
    earlier, later = (kinds.index(kind) for kind in pair)
    callbacks[earlier], callbacks[later] = callbacks[later], callbacks[earlier]
    with pytest.raises(RuntimeError, match=r"The callback .* must come before"):
        require_order(callbacks)
