"""Runs with a predictive distribution: their negative log-likelihood and its floors, the names of metrics, and all commands."""

import math

import pandas as pd
import pytest
import torch
from tiny_runs import TINY, as_arguments, change

from icl import evidence
from icl.build import build_evaluation_sets, build_model
from icl.cli import main
from icl.evaluation.scores import evaluate, evaluate_baselines, summarise
from icl.model.stacked import apply, stack, target_losses
from icl.runs.folder import RunFolder, local_root
from icl.runs.metrics_file import metric_columns
from icl.tasks.priors import task_pool

GAUSSIAN = change(TINY, model={"output": "gaussian"})
MIXTURE = change(TINY, model={"output": "mixture", "num_components": 2})


def functions(config):
    model = config.model
    return (lambda *args: apply(model, *args)), (lambda *args: target_losses(model, *args))


def params_of(config):
    return stack([{name: tensor.detach() for name, tensor in build_model(config).named_parameters()}])


def value(rows, distribution, quantity, position="mean"):
    wanted = (distribution, quantity, position)
    (row,) = [row for row in rows if (row["distribution"], row["quantity"], row["position"]) == wanted]
    return row["value"], row["stderr"]


@pytest.mark.parametrize("config", [GAUSSIAN, MIXTURE], ids=["gaussian", "mixture"])
def test_the_likelihood_and_its_excess_over_the_floors(config):
    sets = build_evaluation_sets(config, num_prompts=40)
    predict, nll = functions(config)
    rows = evaluate(predict, params_of(config), sets, nll=nll)[0]
    floors = evaluate_baselines(sets)
    tasks = task_pool(16, 2, 0)
    for each in sets:
        xs, ys, _ = each.prompts
        losses = build_model(config).losses(xs, ys).detach()
        known = {
            "ridge": evidence.ridge_nll(xs, ys, noise_variance=0.25),
            "dmmse": evidence.dmmse_nll(xs, ys, tasks=tasks, noise_variance=0.25),
        }
        assert value(rows, each.name, "nll", "3")[0] == pytest.approx(losses[:, 2].mean().item(), rel=1e-5)
        for name, floor in known.items():
            difference = (losses - floor).mean(-1)
            found, stderr = value(rows, each.name, f"nll_over_{name}")
            assert found == pytest.approx(difference.mean().item(), rel=1e-4, abs=1e-5)
            assert stderr == pytest.approx(difference.std().item() / math.sqrt(40), rel=1e-4)
            assert value(floors, each.name, f"{name}_nll")[0] == pytest.approx(floor.mean().item(), rel=1e-5)
        assert value(rows, each.name, "loss")[0] > 0  # the squared error of the mean


def test_a_run_without_a_density_has_none_of_these_numbers():
    predict, _ = functions(TINY)
    sets = build_evaluation_sets(TINY, num_prompts=8)
    rows = [*evaluate(predict, params_of(TINY), sets)[0], *evaluate_baselines(sets)]
    assert not [row for row in rows if "nll" in row["quantity"]]
    noiseless = build_evaluation_sets(change(GAUSSIAN, task={"noise_variance": 0.0}), num_prompts=8)
    assert all(not each.nll for each in noiseless)  # without noise, the floors are minus infinity


def test_metrics_say_which_loss_they_are():
    columns = metric_columns(GAUSSIAN)
    assert columns[:3] == ["step", "train/nll", "lr"]
    assert {"eval/pretrain/loss", "eval/pretrain/nll", "eval/true/nll"} <= set(columns)
    assert not [column for column in metric_columns(TINY) if "nll" in column]
    predict, nll = functions(GAUSSIAN)
    other = change(GAUSSIAN, task={"num_tasks": math.inf})
    sets = [build_evaluation_sets(config, num_prompts=8) for config in (GAUSSIAN, other)]
    params = {name: torch.cat([tensor, tensor]) for name, tensor in params_of(GAUSSIAN).items()}
    both = summarise(predict, params, sets, nll=nll)
    for own, found in zip(sets, both, strict=True):
        rows = evaluate(predict, params_of(GAUSSIAN), own, nll=nll)[0]
        assert found["eval/true/nll"] == pytest.approx(value(rows, "true", "nll")[0], rel=1e-6)
        assert not [name for name in found if "nll_over" in name]


@pytest.mark.slow
def test_every_command_takes_such_a_run(tmp_path, capsys):
    config = change(MIXTURE, early_stopping={"monitor": "eval/pretrain/nll", "patience": 50})
    assert main(["train", *as_arguments(config)]) == 0
    run = RunFolder(local_root() / "tiny")
    table = pd.read_csv(run.metrics_file)
    assert table["train/nll"].notna().sum() == 6
    assert table["eval/pretrain/nll"].iloc[-1] < table["eval/pretrain/nll"].iloc[0]
    assert (run.figures / "training.png").is_file()
    capsys.readouterr()
    assert main(["evaluate", str(run.path), "--num_prompts", "32"]) == 0
    said = capsys.readouterr().out
    assert "nll_over_dmmse" in said
    assert {"ridge_nll", "dmmse_nll"} <= set(pd.read_csv(run.results / "baselines.csv")["quantity"])
    prompt = tmp_path / "prompt.json"
    prompt.write_text('{"x_context": [[1.0, 0.0]], "y_context": [0.5], "x_query": [[1.0, 1.0]]}')
    assert main(["predict", str(run.path), "--prompt", str(prompt)]) == 0
    sampler = ["--sampler.num_samples", "64", "--sampler.batch_size", "16", "--sampler.num_draws", "4"]
    sampler += ["--sampler.num_burnin_steps", "2", "--sampler.num_init_batches", "2", "--sampler.num_chains", "2"]
    assert main(["llc", str(run.path), "--steps", "last", *sampler]) in (0, 1)
    assert "The loss L is the negative log-likelihood in nats" in capsys.readouterr().out
    assert pd.read_csv(run.results / "llc.csv")["loss_name"].tolist() == ["nll"]
    assert main(["report", str(run.path)]) == 0
