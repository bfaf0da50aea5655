"""All public functions accept the same kinds of numbers, and refuse the same kinds in one sentence."""

import dataclasses
import math
from decimal import Decimal

import numpy as np
import pandas as pd
import pytest
import torch

from icl import ICRegConfig, baselines, evaluate_ood_score, predict_from_prompt, train_ic_regression
from icl.api import RunEvaluator, estimate_run
from icl.arrays import real_tensor
from icl.build import build_model
from icl.config import OptimConfig, PopulationConfig, TaskConfig, TrainerConfig
from icl.config.validation import ConfigError, UserError, real, whole
from icl.evaluation.sets import REPORT
from icl.metrics import icl_score
from icl.sampling import estimate_llc
from icl.tasks.priors import task_pool
from icl.tasks.prompts import sample_prompts
from icl.tasks.shifts import sample_shifted_prompts

pytestmark = pytest.mark.usefixtures("as_users_run")

VALUES = np.array([[1.0, -2.0], [0.5, 3.0], [-1.0, 0.25]])  # exact in float16
CFG = ICRegConfig(D=2, K=4, d_model=8, d_mlp=8, n_heads=2, n_layers=1, M=8)
MODEL = build_model(CFG.to_run_config())

SAME_NUMBERS = {
    "tensor": torch.tensor(VALUES),
    "float16 tensor": torch.tensor(VALUES).half(),
    "strided tensor": torch.tensor(VALUES).T.contiguous().T,
    "tensor with a graph": torch.tensor(VALUES, requires_grad=True) * 1,
    "array": VALUES,
    "reversed": VALUES[::-1].copy()[::-1],
    "every other": np.repeat(VALUES, 2, axis=0)[::2],
    "Fortran order": np.asfortranarray(VALUES),
    "big-endian": VALUES.astype(">f8"),
    "big-endian float32": VALUES.astype(">f4"),
    "float16": VALUES.astype(np.float16),
    "long double": VALUES.astype(np.longdouble),
    "objects": VALUES.astype(object),
    "lists": VALUES.tolist(),
    "tuples": tuple(map(tuple, VALUES)),
    "list of arrays": list(VALUES),
    "list of tensors": list(torch.tensor(VALUES)),
    "numpy scalars": [[np.float32(x) for x in row] for row in VALUES],
    "pandas": pd.DataFrame(VALUES),
    "pandas, nullable": pd.DataFrame(VALUES).astype("Float64"),
    "masked nowhere": np.ma.masked_array(VALUES, mask=False),
}
REFUSED = {
    "complex": (VALUES + 0j, "real numbers, got complex"),
    "complex tensor": (torch.tensor(VALUES) + 1j, "real numbers, got complex"),
    "complex list": ((VALUES + 1j).tolist(), "real numbers, got complex"),
    "NaN": (np.where(VALUES == 3, np.nan, VALUES), "NaN or infinity"),
    "infinity": (np.where(VALUES == 3, np.inf, VALUES), "NaN or infinity"),
    "masked": (np.ma.masked_equal(VALUES, 3.0), "masked"),
    "list of masked rows": ([np.ma.masked_equal(VALUES[1], 3.0)], "masked"),
    "ragged": ([[1.0, 2.0], [3.0]], "rows of equal length"),
    "text": ([["1.0", "2.0"]], "must be numbers"),
    "text as objects": (np.array([["1.0", "2.0"]], dtype=object), "must be numbers"),
    "None": ([[1.0, None]], "must be numbers"),
    "pandas.NA": (pd.DataFrame([[1.0, pd.NA]]), "must be numbers"),
    "truth values": (VALUES > 0, "must be numbers"),
    "truth tensor": (torch.tensor(VALUES) > 0, "must be numbers"),
    "dates": (np.array([["2020-01-01", "2020-01-02"]], dtype="datetime64[D]"), "must be numbers"),
    "structured": (np.zeros(2, dtype=[("a", float)]), "must be numbers"),
    "decimal": ([[Decimal("1.5"), Decimal("2")]], "must be numbers"),
    "a word": ("1, 2", "must be numbers"),
    "nothing": (None, "must be numbers"),
    "a set": ({1.0, 2.0}, "must be numbers"),
    "a dict": ({"a": 1.0}, "must be numbers"),
    "a huge whole number": ([[10**400, 1]], "must be numbers"),
    "sparse": (torch.tensor(VALUES).to_sparse(), "sparse"),
}


@pytest.mark.parametrize("kind", SAME_NUMBERS)
def test_the_same_numbers_give_the_same_tensor(kind, recwarn):
    tensor = real_tensor(SAME_NUMBERS[kind], "x", dtype=torch.float64)
    assert torch.equal(tensor, torch.tensor(VALUES))
    assert not recwarn.list


@pytest.mark.parametrize("kind", REFUSED)
def test_what_would_change_silently_is_refused_in_one_sentence(kind):
    value, said = REFUSED[kind]
    with pytest.raises(ConfigError, match=f"`x` .*{said}") as refusal:
        real_tensor(value, "x")
    assert "\n" not in str(refusal.value)


def test_arrays_are_copied_and_fitting_tensors_are_not():
    array, tensor = VALUES.copy(), torch.tensor(VALUES)
    array.setflags(write=False)
    real_tensor(array, "x").zero_()
    assert array.any()
    assert real_tensor(tensor, "x") is tensor


def test_numbers_keep_their_precision():
    assert real_tensor([1 / 3], "x").item() == 1 / 3
    assert real_tensor(np.array([2**53 - 1]), "x").item() == 2**53 - 1
    assert real_tensor(np.array([0.5], dtype=np.float16), "x").dtype == torch.float16
    with pytest.raises(ConfigError, match="too large for float32"):
        real_tensor([1e300], "x", dtype=torch.float32)


@pytest.mark.parametrize("kind", SAME_NUMBERS)
def test_predictions_are_the_same_for_the_same_numbers(kind):
    expected = predict_from_prompt(MODEL, VALUES, VALUES[:, 0].copy(), VALUES)
    numbers = SAME_NUMBERS[kind]
    assert torch.equal(predict_from_prompt(MODEL, numbers, VALUES[:, 0], numbers), expected)


@pytest.mark.parametrize("kind", [kind for kind in REFUSED if kind not in ("a set",)])
def test_predictions_refuse_the_same(kind):
    value, said = REFUSED[kind]
    with pytest.raises(UserError, match=said):
        predict_from_prompt(MODEL, value, [0.0, 1.0, 2.0], VALUES)
    with pytest.raises(UserError, match=said):
        predict_from_prompt(MODEL, VALUES, [0.0, 1.0, 2.0], value)


def test_a_model_in_float64_sees_prompts_in_float64():
    double = build_model(CFG.to_run_config()).double()
    third = np.full((1, 2), 1 / 3)
    prediction = predict_from_prompt(double, [], [], third)
    xs = torch.tensor(third)[None]
    assert prediction.dtype == torch.float64
    assert prediction.item() == double(xs, torch.zeros(1, 1, dtype=torch.float64)).item()
    assert prediction.item() != double(xs.float().double(), torch.zeros(1, 1, dtype=torch.float64)).item()


def _zeroed(dtype=torch.float32):
    """Return a model that predicts 0 everywhere."""
    model = build_model(CFG.to_run_config()).to(dtype)
    for parameter in model.unembedding.parameters():
        torch.nn.init.zeros_(parameter)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_score_of_predicting_zero_is_the_mean_square_of_the_targets(dtype):
    ys = sample_prompts(CFG.to_run_config(), stream="true", step=REPORT, batch_size=300).ys
    expected = ys.to(dtype).double().square().mean().item()  # D + sigma^2, up to sampling
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 1e-2}[dtype]
    for batch_size in (np.int64(71), torch.tensor(300), 10**9):
        score = evaluate_ood_score(_zeroed(dtype), CFG, n_samples=np.int32(300), batch_size=batch_size)
        assert score == pytest.approx(expected, rel=tolerance)


NO_COUNTS = [0, -5, True, 1.5, 4.0, np.float64(4), np.bool_(True), torch.tensor(True), "4", None, [4], np.array([4, 5]),
             math.inf, math.nan, 4 + 0j, np.ma.masked]  # fmt: skip


@pytest.mark.parametrize("bad", NO_COUNTS, ids=repr)
def test_what_is_no_count_is_refused_everywhere(bad, tmp_path):
    config = CFG.to_run_config()
    calls = {
        "n_samples": lambda: evaluate_ood_score(MODEL, CFG, n_samples=bad),
        "batch_size": lambda: evaluate_ood_score(MODEL, CFG, n_samples=4, batch_size=bad),
        "`batch_size`": lambda: sample_prompts(config, stream="true", step=0, batch_size=bad),
        "`batch_size` ": lambda: sample_shifted_prompts(config, "seen_query", batch_size=bad),
        "task_size": lambda: task_pool(3, bad, seed=0),
        "`k`": lambda: baselines.knn(torch.ones(1, 2, 2), torch.ones(1, 2), k=bad),
        "num_draws": lambda: _llc(num_draws=bad),
        "num_chains": lambda: _llc(num_chains=bad),
        "max_steps": lambda: train_ic_regression(CFG, num_steps=bad, checkpoint_dir=tmp_path),
        "trainer.batch_size": lambda: train_ic_regression(CFG, batch_size=bad, checkpoint_dir=tmp_path),
        "log_every": lambda: train_ic_regression(CFG, print_every=bad, checkpoint_dir=tmp_path),
        "task.task_size": lambda: dataclasses.replace(CFG, D=bad).to_run_config(),
        "num_heads": lambda: dataclasses.replace(CFG, n_heads=bad).to_run_config(),
        "first": lambda: icl_score(torch.zeros(2, 3), bad, 2),
    }
    if bad is not None:
        calls["num_prompts"] = lambda: RunEvaluator(num_prompts=bad)
    for name, call in calls.items():
        with pytest.raises(ConfigError, match=name.strip()):
            call()
    assert not list(tmp_path.iterdir())


def _llc(**changed):
    settings = {"lr": 1e-4, "nbeta": 10.0, "localization": 1.0, "num_chains": 1, "num_draws": 2, "num_burnin_steps": 0}
    params = changed.pop("params", {"w": torch.zeros(2)})
    batches = lambda chain, draw: torch.zeros(1)  # noqa: E731
    return estimate_llc(lambda p, _: p["w"].square().sum(), params, batches, seed=0, **settings | changed)


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf, True, "fast", 1j, [1.0], np.ma.masked], ids=repr)
def test_what_is_no_number_is_refused_everywhere(bad, tmp_path):
    xs, ys = torch.ones(1, 2, 2), torch.ones(1, 2)
    calls = {
        "noise_variance": lambda: baselines.ridge(xs, ys, noise_variance=bad),
        "`noise_variance`": lambda: baselines.dmmse(xs, ys, tasks=torch.ones(1, 2), noise_variance=bad),
        "task.noise_variance": lambda: dataclasses.replace(CFG, sigma2=bad).to_run_config(),
        "optim.lr": lambda: train_ic_regression(CFG, learning_rate=bad, checkpoint_dir=tmp_path),
        "optim.grad_clip": lambda: train_ic_regression(CFG, grad_clip=bad, checkpoint_dir=tmp_path),
        "nbeta": lambda: _llc(nbeta=bad),
        "localization": lambda: _llc(localization=bad),
        "`lr`": lambda: _llc(lr=bad),
        "rescale": lambda: estimate_run(tmp_path, rescale=bad),
    }
    for name, call in calls.items():
        with pytest.raises(ConfigError, match=name):
            call()


def test_numbers_of_numpy_and_torch_serve_as_numbers_and_are_saved_as_pythons():
    plain = TaskConfig(num_tasks=8, task_size=4, max_examples=8, noise_variance=0.5)
    ours = TaskConfig(
        num_tasks=np.int64(8), task_size=np.int32(4), max_examples=torch.tensor(8), noise_variance=np.float32(0.5)
    )
    assert ours == plain
    assert {type(value) for value in vars(ours).values()} == {int, float, str, type(None)}
    assert type(OptimConfig(lr=np.float64(0.25)).lr) is float
    assert type(TrainerConfig(max_steps=np.uint8(5)).max_steps) is int
    assert PopulationConfig(seeds=np.arange(3)).seeds == PopulationConfig(seeds=range(3)).seeds == (0, 1, 2)
    assert [type(seed) for seed in PopulationConfig(seeds=[np.int64(1)]).seeds] == [int]
    assert (
        ICRegConfig(M=np.array(8), D=np.int64(4), use_prenorm=np.True_).to_run_config()
        == ICRegConfig(M=8, D=4).to_run_config()
    )
    assert whole("n", np.uint64(3), 1) == 3
    assert real("x", np.array(2), "positive") == 2.0
    assert torch.equal(task_pool(np.int64(3), np.int64(2), seed=np.int64(0)), task_pool(3, 2, seed=0))
    config = CFG.to_run_config()
    first = sample_prompts(config, stream="true", step=np.int64(1), batch_size=torch.tensor(2))
    assert torch.equal(first.xs, sample_prompts(config, stream="true", step=1, batch_size=2).xs)


@pytest.mark.parametrize("seed", [-1, True, 0.0, "0", None, 2**63])
def test_a_seed_that_would_name_another_sequence_is_refused(seed):
    with pytest.raises(ConfigError, match="seed"):
        task_pool(3, 2, seed=seed)


@pytest.mark.parametrize("step", [-1, True, 1.0, None, 2**63])
def test_a_step_is_a_whole_number_from_zero(step):
    for sample in (
        lambda: sample_prompts(CFG.to_run_config(), stream="true", step=step, batch_size=1),
        lambda: sample_shifted_prompts(CFG.to_run_config(), "seen_query", step=step, batch_size=1),
    ):
        with pytest.raises(ConfigError, match="`step`"):
            sample()


@pytest.mark.parametrize("stream", [None, 3, ""])
def test_a_stream_has_a_name(stream):
    with pytest.raises(ConfigError, match="`stream`"):
        sample_prompts(CFG.to_run_config(), stream=stream, step=0, batch_size=1)


XS, TASKS = torch.tensor(VALUES)[None], VALUES[:2]
YS = (XS * torch.tensor([2.0, 1.0])).sum(-1)
ARGUMENTS = {
    "zero": {},
    "task_mean": {"tasks": TASKS},
    "averaging": {},
    "knn": {"k": np.int64(2)},
    "ols": {},
    "ridge": {"noise_variance": np.float32(0.25)},
    "dmmse": {"tasks": TASKS, "noise_variance": torch.tensor(0.25)},
    "smoothed_dmmse": {"tasks": TASKS, "noise_variance": 0.25, "task_variance": np.float64(0.5)},
    "lasso": {"alpha": np.float32(0.1)},
}


@pytest.mark.parametrize("name", baselines.BASELINES)
def test_baselines_take_the_same_numbers_in_any_form(name):
    """All predictions are equal bit for bit, except those of `ols`.

    LAPACK's solver (MKL, on processors with AVX2) solves the same system with other rounding errors in about one call of seven,
    even for the same tensors, because its code depends on where its memory lies. The condition number of the system below is 3, and
    errors of 4e-16 were seen.
    """
    baseline, keywords = baselines.BASELINES[name], ARGUMENTS[name]
    expected = baseline(XS, YS, **keywords)
    tolerance = 1e-14 if name == "ols" else 0.0
    forms = [XS.numpy(), XS.numpy().astype(">f8"), XS.numpy()[:, ::-1].copy()[:, ::-1], XS.tolist()]
    for xs in forms:
        torch.testing.assert_close(baseline(xs, YS.numpy(), **keywords), expected, rtol=0, atol=tolerance)
    if "tasks" in keywords:
        for tasks in (TASKS.astype(">f8"), TASKS[::-1].copy()[::-1], pd.DataFrame(TASKS), TASKS.tolist()):
            assert torch.equal(baseline(XS, YS, **keywords | {"tasks": tasks}), expected)


@pytest.mark.parametrize("name", baselines.BASELINES)
def test_baselines_of_whole_numbers_are_not_cut_to_whole_numbers(name):
    xs, ys = torch.tensor([[[1, 2], [3, -1], [2, 2]]]), torch.tensor([[3, 1, 4]])
    expected = baselines.BASELINES[name](xs.float(), ys.float(), **ARGUMENTS[name])
    assert torch.equal(baselines.BASELINES[name](xs, ys, **ARGUMENTS[name]), expected)


@pytest.mark.parametrize("kind", ["complex", "NaN", "infinity", "masked", "truth values", "complex tensor"])
@pytest.mark.parametrize("name", baselines.BASELINES)
def test_baselines_refuse_what_would_give_nan_or_lose_a_part(name, kind):
    value, said = REFUSED[kind]
    with pytest.raises(ConfigError, match=f"`xs` .*{said}"):
        baselines.BASELINES[name](value[None], YS, **ARGUMENTS[name])
    if "tasks" in ARGUMENTS[name]:
        with pytest.raises(ConfigError, match=f"`tasks` .*{said}"):
            baselines.BASELINES[name](XS, YS, **ARGUMENTS[name] | {"tasks": value})


@pytest.mark.parametrize("name", baselines.BASELINES)
def test_prompts_without_examples_or_inputs_are_refused(name):
    for shape in ((1, 0, 2), (1, 3, 0)):
        with pytest.raises(ConfigError, match="Prompts need at least one example and one input dimension"):
            baselines.BASELINES[name](torch.zeros(shape), torch.zeros(shape[:2]), **ARGUMENTS[name])


def test_one_task_is_known_for_certain():
    """With M = 1, dMMSE predicts w . x, whatever type w has."""
    w = np.array([[2.0, -1.0]])
    for tasks in (w, w.astype(">f4"), w.tolist(), pd.DataFrame(w), torch.tensor(w)):
        predictions = baselines.dmmse(XS, YS, tasks=tasks, noise_variance=0.25)
        torch.testing.assert_close(predictions[0], XS[0] @ torch.tensor(w[0]))


@pytest.mark.parametrize("model", [None, "model.ckpt", torch.nn.Linear(2, 1)], ids=["None", "text", "another module"])
def test_what_is_no_model_is_refused(model):
    with pytest.raises(ConfigError, match="`model` must come from"):
        evaluate_ood_score(model, CFG)
    with pytest.raises(ConfigError, match="`model` must come from"):
        predict_from_prompt(model, [], [], [[0.0, 0.0]])


def test_a_config_of_another_kind_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="`cfg` must be an ICRegConfig or a RunConfig, got dict"):
        evaluate_ood_score(MODEL, {"D": 2})
    with pytest.raises(ConfigError, match="`cfg` must be an ICRegConfig, got RunConfig"):
        train_ic_regression(CFG.to_run_config(), checkpoint_dir=tmp_path)
    with pytest.raises(ConfigError, match="`use_prenorm` must be True or False, got 'no'"):
        dataclasses.replace(CFG, use_prenorm="no").to_run_config()


def test_the_score_of_a_diverged_model_is_refused():
    model = build_model(CFG.to_run_config())
    torch.nn.init.constant_(model.unembedding.bias, math.nan)
    with pytest.raises(ConfigError, match="training diverged"):
        evaluate_ood_score(model, CFG, n_samples=4)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.bool])
def test_parameters_of_a_chain_are_real(dtype):
    with pytest.raises(ConfigError, match="must be float32 or float64"):
        _llc(params={"w": torch.zeros(2, dtype=dtype)})
