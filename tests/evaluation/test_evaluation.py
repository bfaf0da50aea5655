"""Evaluation compared with plain loops over prompts, and a population compared with its members one at a time."""

import statistics
from functools import partial

import pytest
import torch
from tiny_runs import TINY, change
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from icl import baselines
from icl.build import build_evaluation_sets, build_model
from icl.compute.devices import choose_device
from icl.config.validation import ConfigError
from icl.evaluation import predictors
from icl.evaluation.predictors import predict_prompts
from icl.evaluation.scores import EXCESS, evaluate, evaluate_baselines, evaluate_predictions, summarise, tabulate_losses
from icl.evaluation.sets import MONITOR, REPORT, evaluation_set
from icl.model.stacked import Params, apply, stack
from icl.tasks.priors import task_pool
from icl.tasks.prompts import Prompts, sample_prompts

PREDICT = partial(apply, TINY.model)


def members(num: int) -> list[Params]:
    return [
        {name: p.detach() for name, p in build_model(change(TINY, seeds={"model": seed})).named_parameters()}
        for seed in range(num)
    ]


def lookup(rows: list[dict], distribution: str, quantity: str, position: str) -> dict:
    found = [
        row
        for row in rows
        if (row["distribution"], row["quantity"], row["position"]) == (distribution, quantity, position)
    ]
    assert len(found) == 1
    return found[0]


def test_every_number_is_the_mean_over_prompts_with_its_standard_error():
    sets = build_evaluation_sets(TINY, num_prompts=50)
    rows = evaluate(PREDICT, stack(members(1)), sets)[0]
    for name in ("pretrain", "true"):
        xs, ys, _ = sample_prompts(TINY, stream=name, step=REPORT, batch_size=50)
        predictions = build_model(TINY)(xs, ys).detach()
        references = {
            "loss": ys,
            "delta_ridge": baselines.ridge(xs, ys, noise_variance=0.25),
            "delta_dmmse": baselines.dmmse(xs, ys, tasks=task_pool(16, 2, 0), noise_variance=0.25),
            "prior_zero": torch.zeros_like(ys),
            "prior_task_mean": xs @ task_pool(16, 2, 0).mean(0),
        }
        for quantity, reference in references.items():
            errors = (predictions - reference) ** 2
            for position, values in [*((str(k + 1), errors[:, k]) for k in range(4)), ("mean", errors.mean(1))]:
                row = lookup(rows, name, quantity, position)
                assert row["value"] == pytest.approx(statistics.mean(values.tolist()), rel=1e-4, abs=1e-9)
                assert row["stderr"] == pytest.approx(statistics.stdev(values.tolist()) / 50**0.5, rel=1e-3, abs=1e-9)


def test_icl_scores_are_differences_of_losses_and_negative_when_examples_help():
    one = evaluation_set(TINY, "true", num_prompts=4000)
    ridge = partial(lambda params, xs, ys: baselines.ridge(xs, ys, noise_variance=0.25).unsqueeze(0))
    rows = evaluate(ridge, {}, [one])[0]
    losses = {k: lookup(rows, "true", "loss", str(k))["value"] for k in range(1, 5)}
    for first, second in ((1, 2), (2, 4), (1, 4)):
        score = lookup(rows, "true", "icl_score", f"{first}:{second}")
        assert score["value"] == pytest.approx(losses[second] - losses[first], rel=1e-4)
        assert score["value"] < -5 * score["stderr"]
    assert lookup(rows, "true", "delta_ridge", "mean")["value"] == pytest.approx(0, abs=1e-12)


def test_a_population_is_evaluated_as_its_members_are():
    sets = build_evaluation_sets(TINY, num_prompts=300, shifts=("input_scale_3",))
    together = evaluate(PREDICT, stack(members(3)), sets)
    assert together == [evaluate(PREDICT, stack([member]), sets)[0] for member in members(3)]


@pytest.mark.parametrize("own_prompts", [False, True])
def test_predictions_are_the_models_whatever_the_batches_and_the_cores(own_prompts):
    prompts = sample_prompts(TINY, stream="true", step=0, batch_size=600)
    expected = torch.cat([functional_call(build_model(TINY), member, prompts[:2])[None] for member in members(3)])
    if own_prompts:
        prompts = Prompts(*(torch.stack([part, part.flip(0), part]) for part in prompts))
        expected[1] = expected[1].flip(0)
    predictions = predict_prompts(PREDICT, stack(members(3)), prompts)
    torch.testing.assert_close(predictions, expected)
    assert not predictions.requires_grad
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(predict_prompts(PREDICT, stack(members(3)), prompts), predictions)
    finally:
        torch.set_num_threads(num_threads)


def test_the_zero_predictors_loss_is_d_plus_sigma2_within_its_error():
    rows = evaluate_baselines([evaluation_set(TINY, "true", num_prompts=20_000)])
    row = lookup(rows, "true", "zero", "mean")
    assert abs(row["value"] - 2.25) < 4 * row["stderr"]


def test_training_sees_a_few_numbers_per_member():
    sets = [build_evaluation_sets(TINY, num_prompts=20)] * 2
    first, second = summarise(PREDICT, stack(members(2)), sets)
    assert set(first) == {
        f"eval/{name}/{quantity}"
        for name in ("pretrain", "true")
        for quantity in ("loss", "delta_ridge", "delta_dmmse", "icl_score")
    }
    assert first != second


def test_members_of_different_tasks_are_summed_up_as_each_alone():
    """One member has 16 tasks. The other has infinitely many, and therefore no dMMSE."""
    configs = TINY, change(TINY, task={"num_tasks": float("inf")})
    sets = [build_evaluation_sets(config, num_prompts=20) for config in configs]
    together = summarise(PREDICT, stack(members(2)), sets)
    for member, own, found in zip(members(2), sets, together, strict=True):
        assert found == summarise(PREDICT, stack([member]), [own])[0]
    assert [f"eval/{name}/delta_dmmse" in one for name in ("pretrain", "true") for one in together] == [True, False] * 2


def test_no_number_is_waited_for_by_itself():
    """On a GPU, each such number would stop the program until the device has finished its work."""

    class Scalars(TorchDispatchMode):
        asked = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.asked += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    sets = build_evaluation_sets(TINY, num_prompts=20, shifts=("input_scale_3",))
    with Scalars() as scalars:
        float(sets[0].prompts.ys.sum())
        assert scalars.asked == 1
        evaluate(PREDICT, stack(members(3)), sets)
        summarise(PREDICT, stack(members(2)), [sets, sets])
    assert scalars.asked == 1


def test_infinitely_many_tasks_have_no_dmmse():
    config = change(TINY, task={"num_tasks": float("inf")})
    assert set(evaluation_set(config, "pretrain", num_prompts=5).baselines) == {"ridge", "ols", "zero"}


def test_without_noise_ridge_is_its_limit():
    config = change(TINY, task={"noise_variance": 0.0})
    one = evaluation_set(config, "true", num_prompts=5)
    assert torch.equal(one.baselines["ridge"], one.baselines["ols"])


def test_the_table_has_a_row_per_position_and_the_mean():
    one = evaluation_set(TINY, "pretrain", num_prompts=20)
    table = tabulate_losses(predict_prompts(PREDICT, stack(members(1)), one.prompts)[0], one)
    assert list(table.index) == ["1", "2", "3", "4", "mean"]
    assert list(table.columns) == ["model", "ridge", "dmmse", "ols", "zero", *EXCESS]
    assert table["bayes_excess"].to_numpy() == pytest.approx((table["model"] - table["dmmse"]).to_numpy(), abs=1e-5)
    assert table.loc["mean", "zero"] == pytest.approx(one.prompts.ys.square().mean().item(), rel=1e-5)


def test_an_absent_device_is_one_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("DEVICE", "cuda")
    with pytest.raises(ConfigError, match="DEVICE=cpu"):
        choose_device()
    with pytest.raises(ConfigError, match="no usable cuda"):
        choose_device("gpu")
    monkeypatch.setenv("DEVICE", "quantum")
    with pytest.raises(ConfigError, match="cpu, cuda, tpu, mps"):
        choose_device()
    monkeypatch.delenv("DEVICE")
    assert choose_device() in ("cpu", "mps")


@pytest.mark.parametrize(("num_tasks", "optimum"), [(4, "dmmse"), (1, "dmmse"), (float("inf"), "ridge")])
@pytest.mark.parametrize("name", ["pretrain", "true"])
def test_the_excess_over_the_bayes_predictor_is_paired(num_tasks, optimum, name):
    one = evaluation_set(change(TINY, task={"num_tasks": num_tasks}), name, num_prompts=400)
    best, targets = one.baselines[optimum if name == "pretrain" else "ridge"], one.prompts.ys
    nothing, excess = evaluate_predictions(one, torch.stack((best, best + 0.5)))
    assert {(row["value"], row["stderr"]) for row in nothing if row["quantity"] == "bayes_excess"} == {(0.0, 0.0)}
    differences = ((best + 0.5 - targets).square() - (best - targets).square()).double()
    for position, values in [*((str(k + 1), differences[:, k]) for k in range(4)), ("mean", differences.mean(1))]:
        row = lookup(excess, name, "bayes_excess", position)
        assert row["value"] == pytest.approx(values.mean().item(), rel=1e-4)
        assert row["stderr"] == pytest.approx(values.std().item() / 400**0.5, rel=1e-4)
        # E (e + 1/2)^2 - e^2 = 1/4, because the error e of the Bayes predictor has mean zero
        assert row["value"] == pytest.approx(0.25, abs=4 * row["stderr"])
    row, loss = (lookup(excess, name, quantity, "mean") for quantity in ("bayes_excess", "loss"))
    assert row["stderr"] < loss["stderr"]


def test_the_excess_has_the_expectation_of_the_gap_to_the_bayes_predictor():
    """The Bayes predictor's error is uncorrelated with every function of the context, such as a wrong prediction."""
    one = evaluation_set(change(TINY, task={"num_tasks": 4}), "pretrain", num_prompts=4000)
    rows = evaluate_predictions(one, one.baselines["ridge"].unsqueeze(0))[0]
    excess, gap = (lookup(rows, "pretrain", quantity, "mean") for quantity in ("bayes_excess", "delta_dmmse"))
    assert excess["value"] == pytest.approx(gap["value"], abs=4 * (excess["stderr"] ** 2 + gap["stderr"] ** 2) ** 0.5)
    assert gap["value"] > 0.1


def test_shifts_have_no_excess_because_their_bayes_predictor_is_not_among_the_baselines():
    one = evaluation_set(TINY, "task_scale_3", num_prompts=5)
    assert one.bayes is None
    rows = evaluate_predictions(one, one.baselines["ridge"].unsqueeze(0))[0]
    assert "bayes_excess" not in {row["quantity"] for row in rows}
    assert "bayes_excess" not in tabulate_losses(one.baselines["ridge"], one)


@pytest.mark.parametrize("name", ["pretrain", "true", "task_scale_3", "seen_query"])
def test_reports_and_training_have_different_fixed_prompts_of_the_same_distribution(name):
    report, again = (evaluation_set(TINY, name, num_prompts=4000).prompts for _ in range(2))
    monitor = evaluation_set(TINY, name, num_prompts=4000, step=MONITOR).prompts
    assert torch.equal(report.xs, again.xs)
    assert not (report.xs == monitor.xs).any()
    assert abs(torch.corrcoef(torch.stack((report.xs.flatten(), monitor.xs.flatten())))[0, 1]) < 4 / 4000**0.5
    for numbers in ((report.ys, monitor.ys), (report.xs[..., 0], monitor.xs[..., 0])):
        (first, second) = (part.square().mean(1).double() for part in numbers)
        spread = ((first.var() + second.var()) / 4000).sqrt()
        assert abs(first.mean() - second.mean()) < 4 * spread


def test_a_compiled_predictor_takes_only_full_batches(monkeypatch):
    calls = []

    def recorded(function, **options):
        return lambda *inputs: calls.append(tuple(inputs[1].shape)) or function(*inputs)

    monkeypatch.setattr(predictors, "one_graph", recorded)
    predict = predictors.compiled_apply(TINY.model)
    prompts = sample_prompts(TINY, stream="true", step=0, batch_size=600)
    torch.testing.assert_close(
        predict_prompts(predict, stack(members(2)), prompts), predict_prompts(PREDICT, stack(members(2)), prompts)
    )
    assert calls == [(256, 4, 2)] * 4


def test_only_much_work_is_compiled():
    sizes = {"num_params": 51_717, "num_tokens": 2 * 8 * 16 * 1024}
    assert predictors.compiling_pays(**sizes, num_checkpoints=190)
    assert not predictors.compiling_pays(**sizes, num_checkpoints=20)


@pytest.mark.slow
def test_a_compiled_predictor_gives_the_numbers_of_the_eager_one():
    prompts = sample_prompts(TINY, stream="true", step=0, batch_size=600)
    compiled = predict_prompts(predictors.compiled_apply(TINY.model), stack(members(2)), prompts)
    torch.testing.assert_close(compiled, predict_prompts(PREDICT, stack(members(2)), prompts), rtol=1e-4, atol=1e-5)
