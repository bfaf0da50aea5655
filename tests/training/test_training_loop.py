"""Training compared with a plain loop in float64, with a second run of itself, and under failures."""

import contextlib
import itertools
import json
import math
import signal

import lightning.pytorch as pl
import pandas as pd
import pytest
import torch
from tiny_runs import TINY, change

from icl.build import build_model
from icl.config import RunConfig
from icl.config.schedules import rate_factor
from icl.config.validation import ConfigError
from icl.model.stacked import Params, stack, unstack
from icl.runs.checkpoints import list_steps, load_step
from icl.runs.folder import RunError, RunFolder, local_root
from icl.runs.metrics_file import MetricsFile
from icl.runs.resume_file import read_resume
from icl.tasks.prompts import sample_prompts
from icl.training import callbacks, saving
from icl.training.data import PromptDataModule
from icl.training.endings import recording_failure
from icl.training.members import Member
from icl.training.module import PopulationAdam, PopulationModule
from icl.training.run import NonFiniteLossError, train
from icl.training.trainer import make_trainer


def plain_loss(model: torch.nn.Module, xs: torch.Tensor, ys: torch.Tensor) -> torch.Tensor:
    """Return the mean squared error, or the mean negative log-likelihood of torch's own distributions."""
    if model.config.output == "token":
        return (model(xs, ys) - ys).square().mean()
    log_weights, means, log_variances = model.predictive(xs, ys)
    parts = torch.distributions.Normal(means, (log_variances / 2).exp())
    mixture = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(logits=log_weights), parts)
    return -mixture.log_prob(ys).mean()


def plain_loop(config: RunConfig) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train by Adam (Kingma and Ba 2015, algorithm 1) with clipping, in float64. Return the losses of each step and the final weights."""
    model = build_model(config).double()
    optim = config.optim
    factor = rate_factor(optim.schedule, warmup_steps=optim.warmup_steps, schedule_steps=config.schedule_steps)
    params = dict(model.named_parameters())
    first = {name: torch.zeros_like(p) for name, p in params.items()}
    second = {name: torch.zeros_like(p) for name, p in params.items()}
    losses = []
    for step in range(config.trainer.max_steps):
        xs, ys, _ = sample_prompts(config, stream="train", step=step, batch_size=config.trainer.batch_size)
        loss = plain_loss(model, xs.double(), ys.double())
        grads = dict(zip(params, torch.autograd.grad(loss, list(params.values()), allow_unused=True), strict=True))
        grads = {name: torch.zeros_like(params[name]) if grad is None else grad for name, grad in grads.items()}
        norm = torch.sqrt(sum(grad.square().sum() for grad in grads.values()))
        scale = min(1.0, float(optim.grad_clip / (norm + 1e-6))) if optim.grad_clip else 1.0
        with torch.no_grad():
            for name, p in params.items():
                grad = scale * grads[name]
                first[name] = optim.beta1 * first[name] + (1 - optim.beta1) * grad
                second[name] = optim.beta2 * second[name] + (1 - optim.beta2) * grad**2
                mean = first[name] / (1 - optim.beta1 ** (step + 1))
                square = second[name] / (1 - optim.beta2 ** (step + 1))
                p -= optim.lr * factor(step) * mean / (square.sqrt() + optim.eps)
        losses.append(loss.item())
    return losses, {name: p.detach() for name, p in params.items()}


@pytest.mark.parametrize(("output", "column"), [("token", "train/loss"), ("mixture", "train/nll")])
def test_training_follows_a_plain_float64_loop(output, column):
    config = change(TINY, trainer={"max_steps": 30}, model={"output": output})
    losses, weights = plain_loop(config)
    result = train(config)
    logged = pd.read_csv(result.folder.metrics_file).dropna(subset=[column])
    expected = [sum(losses[step - 10 : step]) / 10 for step in logged["step"]]
    assert logged[column].tolist() == pytest.approx(expected, rel=1e-5)
    saved = load_step(result.folder.checkpoints, 30).params
    for name, weight in weights.items():
        torch.testing.assert_close(saved[name].double(), weight, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "schedule", [{"schedule": "constant"}, {"schedule": "warmup", "warmup_steps": 7}, {"schedule": "triangle"}]
)
def test_the_rate_in_a_row_is_the_one_that_its_update_used(schedule, monkeypatch):
    used = []
    step = PopulationAdam.step

    def noted(self, closure=None, *, prompts):
        info = step(self, prompts=prompts)
        used.append(self._rates.item())
        return info

    monkeypatch.setattr(PopulationAdam, "step", noted)
    config = change(TINY, optim=schedule, trainer={"max_steps": 10, "log_every": 1}, evaluation={"every": 5})
    table = pd.read_csv(train(config).folder.metrics_file).set_index("step")
    assert math.isnan(table.loc[0, "lr"])  # no update has led to the initial model
    assert table["lr"].tolist()[1:] == pytest.approx(used, rel=1e-6)


def test_a_triangle_is_zero_at_its_last_update_only():
    config = change(
        TINY, trainer={"max_steps": 3, "log_every": 1}, checkpoints={"every": 1}, evaluation={"every": None}
    )
    folder = train(config).folder
    assert (pd.read_csv(folder.metrics_file)["lr"] > 0).tolist() == [True, True, False]
    weights = [load_step(folder.checkpoints, step).params["token_embedding.weight"] for step in range(4)]
    assert [torch.equal(*pair) for pair in itertools.pairwise(weights)] == [False, False, True]


@pytest.mark.parametrize(
    ("optim", "trainer", "said"),
    [
        (
            {"schedule": "triangle"},
            {"max_steps": 1},
            "triangle of 1 step trains nothing. Set `optim.schedule constant`",
        ),
        ({"schedule": "triangle", "schedule_steps": 1}, {"max_steps": 1}, "triangle of 1 step"),
        ({"schedule": "constant", "lr": 1e-50}, {"max_steps": 3}, "1e-50.*zero in float32"),
        ({"schedule": "warmup", "warmup_steps": 10**9, "lr": 1e-40}, {"max_steps": 3}, "lower `optim.warmup_steps`"),
    ],
)
def test_settings_under_which_nothing_is_trained_are_refused(optim, trainer, said):
    with pytest.raises(ConfigError, match=said):
        train(change(TINY, optim=optim, trainer=trainer))
    assert not (local_root() / "tiny").exists()


@pytest.mark.parametrize(
    "optim",
    [
        {"schedule": "constant"},
        {"schedule": "warmup", "warmup_steps": 1000},
        {"schedule": "triangle", "schedule_steps": 2},
        {"schedule": "triangle", "schedule_steps": 1000, "warmup_steps": 999},
    ],
)
def test_one_step_is_enough_where_its_rate_is_not_zero(optim):
    config = change(TINY, optim=optim, trainer={"max_steps": 1})
    before, after = (load_step(train(config).folder.checkpoints, step).params for step in (0, 1))
    assert not all(torch.equal(before[name], after[name]) for name in before)


def test_resuming_corrects_the_rates_that_version_0_1_0_wrote(tmp_path):
    file = MetricsFile(tmp_path / "metrics.csv", ["step", "train/loss", "lr"])
    file.path.write_text("step,train/loss,lr\n0,,0.1\n10,2.5,0.2\n20,2.25,0.3\n")
    rates = {0: None, 10: 0.19, 20: 0.29}
    file.begin([0, 10], known={"lr": rates.get})
    assert file.path.read_text() == "step,train/loss,lr\n0,,\n10,2.5,0.19\n"


def fit_population(configs: list[RunConfig]) -> Params:
    """Return the final weights of members that are trained together."""
    params = stack([dict(build_model(config).named_parameters()) for config in configs])
    module = PopulationModule([Member(config, RunFolder("unused")) for config in configs], params)
    trainer = make_trainer(configs[0])
    trainer.fit(module, datamodule=PromptDataModule(configs))
    return {name: tensor.detach() for name, tensor in module.params.items()}


def test_members_trained_together_end_as_if_trained_alone():
    config = change(TINY, trainer={"max_steps": 20})
    configs = [change(config, seeds={"model": seed, "data": seed, "noise": seed}) for seed in range(3)]
    configs[2] = change(configs[2], task={"num_tasks": float("inf")})
    together = unstack(fit_population(configs))
    for config, member in zip(configs, together, strict=True):
        alone = unstack(fit_population([config]))[0]
        for name, weight in alone.items():
            torch.testing.assert_close(member[name], weight, rtol=0, atol=1e-5)


def test_a_run_leaves_the_files_it_promises():
    folder = train(TINY).folder
    assert folder.path == local_root() / "tiny"
    assert folder.read_config() == TINY
    assert list_steps(folder.checkpoints) == [0, 1, 3, 15, 30, 60]
    table = pd.read_csv(folder.metrics_file)
    assert list(table.columns[:3]) == ["step", "train/loss", "lr"]
    assert {"eval/pretrain/loss", "eval/true/loss", "clipped_fraction"} <= set(table.columns)
    assert table["step"].tolist() == [0, 10, 20, 30, 40, 50, 60]
    assert table.dropna(subset=["eval/pretrain/loss"])["step"].tolist() == [0, 20, 40, 60]
    status = json.loads(folder.status_file.read_text())
    assert (status["state"], status["step"], status["max_steps"]) == ("finished", 60, 60)


def test_training_neither_reads_nor_sets_the_global_generator():
    before = torch.get_rng_state()
    first = train(TINY).folder
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(123)
    second = train(TINY, folder=local_root() / "again").folder
    assert first.metrics_file.read_bytes() == second.metrics_file.read_bytes()


def test_the_first_checkpoint_is_the_initial_model():
    saved = load_step(train(TINY).folder.checkpoints, 0)
    for name, weight in build_model(TINY).named_parameters():
        assert torch.equal(saved.params[name], weight)
    assert saved.config == TINY


def test_patience_counts_evaluations_and_the_best_checkpoint_is_kept():
    config = change(
        TINY,
        optim={"lr": 1e-9, "schedule": "constant"},
        early_stopping={"patience": 2, "min_delta": 0.5},
    )
    result = train(config)
    assert result.status.state == "stopped_early"
    assert result.status.step == 40  # evaluated at 0 (best), 20 and 40: two checks without improvement
    assert result.status.best_step == 0
    assert "eval/pretrain/loss" in str(result.status.reason)
    assert list_steps(result.folder.checkpoints) == [0, 1, 3, 15, 30, 40]
    again = train(config)
    assert again.was_done
    assert again.status.state == "stopped_early"


def test_the_best_checkpoint_off_the_schedule_replaces_the_one_before():
    config = change(TINY, early_stopping={"patience": 50}, checkpoints={"every": None, "num_log": 0})
    result = train(config)
    assert list_steps(result.folder.checkpoints) == sorted({0, 60, result.status.best_step})


FALLING = change(
    TINY,
    trainer={"max_steps": 5, "log_every": 1},
    evaluation={"every": 1},
    early_stopping={"patience": 50},
    checkpoints={"every": 5, "num_log": 0},
)


@pytest.fixture
def falling_metric(monkeypatch):
    """Make the monitored metric fall at every evaluation."""
    summarise, values = callbacks.summarise, itertools.count(0, -1)

    def falling(*arguments, **options):
        return [row | {"eval/pretrain/loss": float(next(values))} for row in summarise(*arguments, **options)]

    monkeypatch.setattr(callbacks, "summarise", falling)


@pytest.mark.usefixtures("falling_metric")
@pytest.mark.parametrize("seconds", [0.0, 1000.0])
def test_a_best_checkpoint_on_the_schedule_replaces_the_one_before(seconds):
    result = train(change(FALLING, checkpoints={"resume_seconds": seconds, "moments": True}))
    assert result.status.best_step == 5
    assert list_steps(result.folder.checkpoints) == list_steps(result.folder.moments) == [0, 5]


@pytest.mark.usefixtures("falling_metric")
@pytest.mark.parametrize("seconds", [0.0, 1000.0])
def test_the_best_checkpoint_that_the_resume_file_names_is_never_deleted(seconds, monkeypatch):
    save, seen = pl.Trainer.save_checkpoint, []

    def look(folder):
        resume, _ = read_resume(folder)
        if resume is not None and resume.member["extra_step"] is not None:
            assert resume.member["extra_step"] in list_steps(folder.checkpoints)
        seen.append(len(list_steps(folder.checkpoints)))

    def looked(self, *arguments, **options):
        look(RunFolder(local_root() / "tiny"))
        save(self, *arguments, **options)
        look(RunFolder(local_root() / "tiny"))

    monkeypatch.setattr(pl.Trainer, "save_checkpoint", looked)
    train(change(FALLING, checkpoints={"resume_seconds": seconds}))
    assert seen
    assert max(seen) <= 4


@pytest.mark.usefixtures("falling_metric")
@pytest.mark.parametrize("moments", [False, True])
def test_a_best_checkpoint_that_a_killed_run_could_not_delete_is_deleted_on_resume(monkeypatch, moments):
    config = change(FALLING, checkpoints={"resume_seconds": 0.0, "moments": moments})

    def die(member, step):
        if step is not None:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(saving, "_delete_checkpoint", die)
        with contextlib.suppress(SystemExit, KeyboardInterrupt):
            train(config)
    folder = RunFolder(local_root() / "tiny")
    assert list_steps(folder.checkpoints) == [0, 1, 2]
    result = train(config)
    assert list_steps(result.folder.checkpoints) == [0, 5]
    assert list_steps(result.folder.moments) == ([0, 5] if moments else [])


def test_an_unknown_monitor_is_refused_with_the_metrics_that_exist():
    config = change(TINY, early_stopping={"monitor": "eval/loss", "patience": 2})
    with pytest.raises(ConfigError, match="eval/pretrain/loss"):
        train(config)


HUGE_RATE = {"lr": 1e30, "grad_clip": None, "schedule": "constant"}
DIVERGING = change(
    TINY,
    optim=HUGE_RATE,
    trainer={"max_steps": 20, "log_every": 100},
    evaluation={"every": 10},
)


def failed_run(config: RunConfig, match: str) -> RunFolder:
    """Train a run that must fail. Check that nothing that is not finite was saved."""
    with pytest.raises(NonFiniteLossError, match=match):
        train(config)
    folder = RunFolder(local_root() / "tiny")
    status = folder.read_status()
    assert status is not None
    assert status.state == "failed"
    for step in list_steps(folder.checkpoints):
        assert all(tensor.isfinite().all() for tensor in load_step(folder.checkpoints, step).params.values())
    resume, _ = read_resume(folder)
    assert resume is None
    return folder


def test_a_non_finite_loss_fails_the_run_and_names_the_step():
    failed_run(change(TINY, optim=HUGE_RATE), r"at step [23]\b")


def test_a_run_that_is_no_longer_finite_does_not_stop_early():
    folder = failed_run(change(DIVERGING, early_stopping={"patience": 1}), r"at step [123]\b")
    assert list_steps(folder.checkpoints)[-1] < 10


def test_a_monitored_metric_that_is_not_finite_fails_the_run(monkeypatch):
    summarise = callbacks.summarise

    def broken(*arguments, **options):
        return [row | {"eval/pretrain/loss": math.nan} for row in summarise(*arguments, **options)]

    monkeypatch.setattr(callbacks, "summarise", broken)
    failed_run(TINY, "`eval/pretrain/loss` became NaN or infinite at step 0")


@pytest.mark.parametrize(
    "changes",
    [
        {"trainer": {"max_steps": 1}, "optim": {"lr": 1e20}},
        {
            "checkpoints": {"every": 1, "resume_seconds": 0.0},
            "evaluation": {"every": None},
            "optim": {"weight_decay": 1e20},
        },
    ],
)
def test_weights_that_are_not_finite_are_never_saved(changes):
    folder = failed_run(change(DIVERGING, **changes), r"at step 1\b")
    assert list_steps(folder.checkpoints) == [0]


def test_a_gradient_whose_norm_overflows_fails_the_run_although_the_loss_is_finite(monkeypatch):
    step = PopulationAdam.step

    def overflowing(self, closure=None, *, prompts):
        info = step(self, prompts=prompts)
        return info._replace(norms=info.norms * math.inf) if self.param_groups[0]["lr"] == 0 else info

    monkeypatch.setattr(PopulationAdam, "step", overflowing)
    failed_run(change(TINY, trainer={"max_steps": 3}, evaluation={"every": None}), r"gradient .* at step 3\b")


@pytest.mark.parametrize("precision", ["64", "64-true"])
def test_both_names_of_float64_resume_without_rounding(precision, monkeypatch, tmp_path):
    config = change(TINY, trainer={"precision": precision, "max_steps": 12}, evaluation={"every": None})
    expected = train(config, folder=tmp_path / "whole").folder
    step = PopulationAdam.step

    def stopping(self, closure=None, *, prompts):
        if self.state[self.param_groups[0]["params"][0]]["step"].item() == 5:
            signal.raise_signal(signal.SIGTERM)
        return step(self, prompts=prompts)

    with monkeypatch.context() as patch:
        patch.setattr(PopulationAdam, "step", stopping)
        assert train(config).status.state == "preempted"
    resumed = train(config)
    assert resumed.status.state == "finished"
    weights, whole = (load_step(folder.checkpoints, 12).params for folder in (resumed.folder, expected))
    for name, weight in whole.items():
        assert weight.dtype == torch.float64
        assert torch.equal(weights[name], weight)


@pytest.mark.parametrize(
    ("text", "is_memory"),
    [
        ("CUDA error: an illegal memory access was encountered", False),
        ("CUDA error: out of memory", True),
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes", True),
    ],
)
def test_only_a_lack_of_memory_is_reported_as_one(text, is_memory):
    with (
        pytest.raises(RunError if is_memory else RuntimeError, match="not have enough memory" if is_memory else text),
        recording_failure([]),
    ):
        raise RuntimeError(text)


def test_a_finished_run_is_left_alone():
    folder = train(TINY).folder
    before = {path: path.stat().st_mtime_ns for path in folder.path.rglob("*") if path.name != ".lock"}
    assert train(TINY).was_done
    assert before == {path: path.stat().st_mtime_ns for path in folder.path.rglob("*") if path.name != ".lock"}


def test_a_run_is_not_resumed_under_other_settings():
    train(TINY)
    with pytest.raises(ConfigError, match=r"`optim.lr` was 0.01 and is now 0.02"):
        train(change(TINY, optim={"lr": 0.02}))


def test_two_processes_may_not_train_one_run():
    folder = RunFolder(local_root() / "tiny")
    with folder.lock(), pytest.raises(RunError, match="Another process"):
        train(TINY)


def test_lightnings_own_trainer_saves_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(TINY)
    assert {path.name for path in tmp_path.iterdir()} <= {"runs", local_root().name}


@pytest.mark.parametrize("bad", [{"precision": "17"}, {"strategy": "telepathy"}])
def test_what_lightning_refuses_is_one_sentence_and_leaves_no_folder(bad):
    with pytest.raises(ConfigError, match="Lightning refuses") as refusal:
        train(change(TINY, trainer=bad))
    assert "\n" not in str(refusal.value)
    assert not (local_root() / "tiny").exists()
