"""Evaluation in other worlds: the Bayes predictor beside ridge and dMMSE, and the pool of each step."""

import math
from functools import partial

import pandas as pd
import pytest
import torch
from tiny_runs import TINY, change

from icl import baselines
from icl.bayes import bayes
from icl.build import build_evaluation_sets
from icl.cli import main
from icl.config import RunConfig
from icl.config.validation import ConfigError
from icl.evaluation.scores import evaluate, evaluate_baselines, evaluate_predictions, tabulate_losses
from icl.evaluation.sets import MONITOR
from icl.model.stacked import apply, stack
from icl.runs.checkpoints import checkpoint_files, load_checkpoint_file
from icl.tasks.laws import Law
from icl.tasks.prompts import training_pool
from icl.training.data import PromptStream
from icl.training.run import train, train_population
from icl.training.trainer import evaluation_sets, sets_at
from icl.whole_runs import evaluate_run

LAPLACE = {"prior": "laplace", "noise": "student_t", "noise_df": 3.0}
QUICK = change(TINY, trainer={"max_steps": 20, "log_every": 10}, checkpoints={"every": 10, "num_log": 0})
WALK = change(QUICK, task={"num_tasks": 4, "pool": "walk", "pool_steps": 5})


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    """Return the folder of a run whose pool walks."""
    folder = tmp_path_factory.mktemp("runs") / "walk"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEVICE", "cpu")
        patch.setenv("WANDB_MODE", "disabled")
        patch.delenv("AWS_BUCKET_NAME", raising=False)
        assert train(WALK, folder=folder).status.state == "finished"
    return folder


# The Bayes predictor


def test_sets_of_another_world_have_its_predictors():
    config = change(TINY, task=LAPLACE)
    for one in build_evaluation_sets(config, num_prompts=20, with_bayes=True):
        xs, ys, _ = one.prompts
        estimate = bayes(config, xs, ys)
        assert torch.equal(one.baselines["bayes"], estimate.predictions)
        assert torch.equal(one.variances["bayes_variance"], estimate.stderrs.square())
        tasks = training_pool(config)
        expected = baselines.dmmse(xs, ys, tasks=tasks, noise_variance=0.25, noise=Law("student_t", 3.0))
        assert torch.equal(one.baselines["dmmse"], expected)
        assert torch.equal(one.baselines["ridge"], baselines.ridge(xs, ys, noise_variance=0.25))


def test_a_model_with_a_density_has_the_floors_of_its_world():
    config = change(TINY, task={"prior": "sparse", "prior_density": 0.3}, model={"output": "gaussian"})
    pretrain, true = build_evaluation_sets(config, num_prompts=400, with_bayes=True)
    for each in (pretrain, true):
        assert set(each.nll) == {"ridge", "dmmse", "bayes"}
        estimate = bayes(config, each.prompts.xs, each.prompts.ys)
        assert torch.equal(each.nll["bayes"], estimate.nll)
        assert not each.variances["bayes_nll_variance"].any()  # the predictor is exact
        (rows,) = evaluate_predictions(each, estimate.predictions[None], estimate.nll[None])
        excess = {row["quantity"]: (row["value"], row["stderr"]) for row in rows if row["position"] == "mean"}
        assert excess["nll_over_bayes"] == (0.0, 0.0)
    # Each floor is the smallest on the prompts of its own prior, by four standard errors.
    for each, floor, other in ((true, "bayes", "ridge"), (true, "bayes", "dmmse"), (pretrain, "dmmse", "bayes")):
        gain = (each.nll[other] - each.nll[floor]).double().mean(-1)
        assert gain.mean() > 4 * gain.std() / len(gain) ** 0.5
    table = pd.DataFrame(evaluate_baselines([true])).set_index(["quantity", "position"])["value"]
    assert table["bayes_nll", "mean"] == pytest.approx(true.nll["bayes"].mean().item())


def test_the_bayes_predictor_is_left_out_of_the_usual_world_and_if_not_asked_for():
    assert all("bayes" not in one.baselines for one in build_evaluation_sets(TINY, num_prompts=4, with_bayes=True))
    assert all("bayes" not in one.baselines for one in build_evaluation_sets(change(TINY, task=LAPLACE), num_prompts=4))


def test_a_model_that_predicts_as_bayes_has_no_gap_to_it():
    config = change(TINY, task=LAPLACE | {"num_tasks": math.inf})
    pretrain, true = build_evaluation_sets(config, num_prompts=50, with_bayes=True)
    (rows,) = evaluate(lambda params, xs, ys: pretrain.baselines["bayes"].unsqueeze(0), {}, [pretrain])
    gaps = {row["quantity"]: row["value"] for row in rows if row["position"] == "mean"}
    assert gaps["delta_bayes"] == 0
    assert gaps["delta_ridge"] > 0
    assert (pretrain.bayes, true.bayes) == ("bayes", "bayes")
    assert (tabulate_losses(pretrain.baselines["bayes"], pretrain)["bayes_excess"] == 0).all()
    columns = ["model", "bayes", "ridge", "ols", "zero", "bayes_excess", "bayes_excess_stderr"]
    assert list(tabulate_losses(true.baselines["ridge"], true).columns) == columns


def test_the_table_of_baselines_gives_the_error_of_the_estimate():
    sets = build_evaluation_sets(change(TINY, task=LAPLACE), num_prompts=20, with_bayes=True)
    table = pd.DataFrame(evaluate_baselines(sets))
    for one in sets:
        own = table[(table["distribution"] == one.name) & (table["quantity"] == "bayes_variance")]
        assert own.set_index("position")["value"]["mean"] == pytest.approx(
            one.variances["bayes_variance"].mean().item()
        )
        assert len(own) == one.variances["bayes_variance"].shape[1] + 1


def test_members_with_and_without_the_same_pool_are_told_apart():
    sets = evaluation_sets([WALK, change(WALK, task={"pool": "fixed", "pool_steps": None})])
    assert torch.equal(sets[0][0].prompts.ws, sets[1][0].prompts.ws)  # at step 0 the pools are the same
    later = sets_at([WALK, change(WALK, task={"pool": "fixed", "pool_steps": None})], sets, 30)
    assert later[1] is sets[1]
    assert not torch.equal(later[0][0].prompts.ws, sets[0][0].prompts.ws)
    assert torch.equal(later[0][1].prompts.ys, sets[0][1].prompts.ys)  # new tasks are the same


# Pools that change


@pytest.mark.parametrize("step", [0, 1, 20])
def test_sets_of_a_step_have_the_pool_of_the_last_update(step):
    pretrain, true = build_evaluation_sets(WALK, num_prompts=40, model_step=step)
    pool = training_pool(WALK, step=max(step - 1, 0))
    assert {tuple(task) for task in pretrain.prompts.ws.tolist()} == {tuple(task) for task in pool.tolist()}
    for one in (pretrain, true):
        expected = baselines.dmmse(one.prompts.xs, one.prompts.ys, tasks=pool, noise_variance=0.25)
        assert torch.equal(one.baselines["dmmse"], expected)


def test_without_a_step_there_is_no_pool_to_evaluate_on():
    with pytest.raises(ConfigError, match="The run's pool of tasks changes"):
        build_evaluation_sets(WALK, num_prompts=4)


def test_every_checkpoint_is_evaluated_with_its_own_pool(walk):
    numbers, references = (
        table.drop(columns="prompts") for table in evaluate_run(walk, num_prompts=16, shifts=["task_scale_3"])
    )
    assert sorted(numbers["step"].unique()) == [0, 10, 20]
    for file in checkpoint_files(walk):
        checkpoint = load_checkpoint_file(file)
        sets = build_evaluation_sets(WALK, num_prompts=16, shifts=("task_scale_3",), model_step=checkpoint.step)
        own = numbers[numbers["step"] == checkpoint.step].drop(columns=["step", "checkpoint_hash"])
        expected = evaluate(lambda params, xs, ys: apply(WALK.model, params, xs, ys), stack([checkpoint.params]), sets)
        assert own.to_dict("records") == expected[0]
    assert references.to_dict("records") == evaluate_baselines(sets)  # those of the last step


def test_training_logs_the_numbers_of_its_own_prompts_with_the_pool_of_each_step(walk):
    logged = pd.read_csv(walk / "metrics.csv").set_index("step")
    for file in (checkpoint_files(walk)[0], checkpoint_files(walk)[-1]):
        checkpoint = load_checkpoint_file(file)
        sets = build_evaluation_sets(WALK, num_prompts=16, step=MONITOR, model_step=checkpoint.step)
        rows = evaluate(partial(apply, WALK.model), stack([checkpoint.params]), sets)[0]
        means = {(row["distribution"], row["quantity"]): row["value"] for row in rows if row["position"] == "mean"}
        for name in ("pretrain", "true"):
            for quantity in ("loss", "delta_ridge", "delta_dmmse"):
                expected = pytest.approx(means[name, quantity], rel=1e-5)
                assert logged.loc[checkpoint.step, f"eval/{name}/{quantity}"] == expected


def test_an_analysis_that_needs_fixed_tasks_says_why_it_has_none(walk, capsys):
    assert main(["analyse", str(walk), "--what", "attention"]) == 2
    assert "The run's pool of tasks changes" in capsys.readouterr().err
    assert main(["analyse", str(walk), "--what", "mixture"]) == 2
    assert "needs a pool of tasks that stays the same during training" in capsys.readouterr().err


def test_the_command_shows_the_losses_of_the_bayes_predictor(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DEVICE", "cpu")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    config = change(QUICK, task=LAPLACE | {"num_tasks": math.inf}, checkpoints={"every": None, "num_log": 0})
    monkeypatch.setattr("icl.cli.evaluate._deliver", lambda *parts: [])  # drawing the figure takes seconds
    train(config, folder=tmp_path / "run")
    assert main(["evaluate", str(tmp_path / "run"), "--num_prompts", "16"]) == 0
    told = capsys.readouterr().out
    assert "delta_bayes" in told
    assert "bayes_variance" in told
    assert "dmmse" not in told


# Resuming and packing


@pytest.mark.parametrize(
    "world",
    [
        {"pool": "walk", "pool_steps": 3},
        {"pool": "resampled", "pool_steps": 3, "prior": "sparse", "prior_density": 0.5},
        LAPLACE | {"inputs": "ar1", "input_correlation": 0.5},
    ],
)
def test_the_stream_of_prompts_can_start_at_any_step_and_with_any_members(world):
    first = change(TINY, task=world)
    still = change(first, task={"pool": "fixed", "pool_steps": None})
    configs: list[RunConfig] = [still, first, change(first, task={"num_tasks": 3}, seeds={"data": 4})]
    stream = iter(PromptStream(configs, lambda: 0))
    prompts = [next(stream) for _ in range(70)]
    for start in (1, 65):
        resumed = next(iter(PromptStream(configs, lambda start=start: start)))
        alone = next(iter(PromptStream(configs[1:], lambda start=start: start, rank=1, num_ranks=2)))
        for part, again, own in zip(prompts[start], resumed, alone, strict=True):
            assert torch.equal(part, again)
            assert torch.equal(part[1:, 4:], own)


def test_runs_on_other_pools_are_trained_together_as_each_alone(walk, tmp_path, monkeypatch):
    """The walking member of a population has the checkpoints of the run that was trained alone, bit for bit."""
    monkeypatch.setenv("DEVICE", "cpu")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    still = change(WALK, task={"pool": "fixed", "pool_steps": None})
    train_population([still, WALK], folders=[tmp_path / "still", tmp_path / "walk"])
    for file in checkpoint_files(walk):
        alone, packed = (load_checkpoint_file(path) for path in (file, tmp_path / "walk" / "checkpoints" / file.name))
        assert all(torch.equal(tensor, packed.params[name]) for name, tensor in alone.params.items())
        other = load_checkpoint_file(tmp_path / "still" / "checkpoints" / file.name)
        assert (other.digest == alone.digest) is (alone.step == 0)
