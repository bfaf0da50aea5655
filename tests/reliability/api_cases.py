"""Bad arguments for the Python functions, each with words that the error message must contain."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from icl import baselines
from icl.api import ICRegConfig, evaluate_ood_score, evaluate_run, load_model, predict_from_prompt, train_ic_regression
from icl.config import RunConfig, TaskConfig
from icl.sampling import estimate_llc
from icl.sampling.run import estimate_run
from icl.tasks.priors import task_pool
from icl.tasks.prompts import sample_prompts
from tests.reliability.case import Case

_BIG = 10**20
_TASK = RunConfig(task=TaskConfig(task_size=2, max_examples=4))


def api_cases() -> list[Case]:
    """Return all cases of bad arguments."""
    groups = (_configs, _training, _loading, _predicting, _scoring, _sampling, _prompts, _pools, _predictors)
    return [
        Case("api", f"{group.__name__.strip('_')} {number}: {mentions}", mentions, act)
        for group in groups
        for number, (act, *mentions) in enumerate(group(), start=1)
        for mentions in [tuple(mentions)]
    ]


Row = tuple[Any, ...]


def _configs() -> list[Row]:
    wrong: list[tuple[str, Any, str]] = [
        *(("D", value, "task_size") for value in (0, -1, 1.5, "8", None, True, _BIG, math.nan)),
        *(("K", value, "max_examples") for value in (0, -1, 2.5, "x", _BIG)),
        *(("sigma2", value, "noise_variance") for value in (-1, math.nan, math.inf, "x", None)),
        *(("d_model", value, "embed_size") for value in (0, 3, -4, 1.5, _BIG)),
        *(("n_layers", value, "num_layers") for value in (0, -1, 1.5, _BIG, "two")),
        *(("n_heads", value, "num_heads") for value in (0, 7, "x")),
        *(("d_mlp", value, "mlp_size") for value in (0, -1, None)),
        *(("M", value, "M must be") for value in (0, -1, 2.5, math.nan, "many", None, -math.inf, [8], _BIG)),
        *(("use_prenorm", value, "use_prenorm") for value in ("yes", 2, None)),
    ]
    rows: list[Row] = [
        (lambda name=name, value=value: ICRegConfig(**{name: value}).to_run_config(), word)
        for name, value, word in wrong
    ]
    return [*rows, (lambda: ICRegConfig(d=3), "d"), (lambda: ICRegConfig(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11), "11")]


def _small() -> ICRegConfig:
    return ICRegConfig(D=2, K=4, d_model=8, d_mlp=8, n_heads=2, n_layers=1, M=4)


def _training() -> list[Row]:
    def call(**changes: Any) -> Callable[[], Any]:
        given = {"num_steps": 2, "batch_size": 4, "checkpoint_dir": "api-run"} | changes
        return lambda: train_ic_regression(given.pop("cfg", None) or _small(), **given)

    return [
        (call(num_steps=0), "max_steps"),
        (call(num_steps="2"), "max_steps"),
        (call(num_steps=1.5), "max_steps"),
        (call(num_steps=_BIG), "max_steps"),
        (call(batch_size=0), "batch_size"),
        (call(batch_size=_BIG), "batch_size"),
        (call(batch_size=10**12), "batch_size"),
        (call(learning_rate=0), "lr"),
        (call(learning_rate=math.nan), "lr"),
        (call(learning_rate="fast"), "lr"),
        (call(warmup_steps=5), "warmup_steps"),
        (call(warmup_steps=-1), "warmup_steps"),
        (call(grad_clip=0), "grad_clip"),
        (call(checkpoint_every=0), "checkpoints.every"),
        (call(eval_every=0), "evaluation.every"),
        (call(print_every=0), "log_every"),
        (call(early_stopping_patience=2), "patience"),
        (call(early_stopping_min_delta=-1), "min_delta"),
        (call(M=0), "M must be"),
        (call(M=None), "M must be"),
        (call(checkpoint_dir="a-file"), "a-file"),
        (call(checkpoint_dir=""), "checkpoint_dir"),
        (call(checkpoint_dir="/proc/x"), "/proc/x"),
        (call(checkpoint_dir="runs/tiny"), "runs/tiny"),
        (call(checkpoint_dir="runs/tiny/inner"), "runs/tiny"),
        (call(checkpoint_dir=7), "checkpoint_dir"),
        (call(cfg="config"), "cfg"),
        (call(cfg=_TASK), "cfg"),
        (call(nonsense=1), "nonsense"),
    ]


def _loading() -> list[Row]:
    return [
        (lambda: load_model("nowhere"), "nowhere"),
        (lambda: load_model(""), "checkpoint"),
        (lambda: load_model("folder"), "folder"),
        (lambda: load_model("fifo"), "fifo"),
        (lambda: load_model("/dev/zero"), "/dev/zero"),
        (lambda: load_model("loop"), "loop"),
        (lambda: load_model("a\0b"), "no checkpoint"),
        (lambda: load_model("binary.bin"), "binary.bin"),
        (lambda: load_model("runs/empty"), "runs/empty"),
        (lambda: load_model("runs/broken"), "runs/broken"),
        (lambda: load_model(None), "path"),
        (lambda: load_model(7), "path"),
        (lambda: load_model("runs/tiny", ICRegConfig()), "task_size"),
        (lambda: load_model("runs/tiny", "config"), "cfg"),
        (lambda: evaluate_run("runs/tiny", num_prompts=1), "2"),
        (lambda: evaluate_run("runs/tiny", num_prompts=1.5), "num_prompts"),
        (lambda: evaluate_run("runs/tiny", num_prompts="16"), "num_prompts"),
        (lambda: evaluate_run("runs/tiny", num_prompts=_BIG), "num_prompts"),
        (lambda: evaluate_run("runs/tiny", num_ood_prompts=10**13), "10,000,000,000,000 prompts"),
        (lambda: evaluate_run("runs/tiny", num_prompts=16, shifts=["upside-down"]), "upside-down"),
        (lambda: evaluate_run("runs/tiny", num_prompts=16, shifts="scale"), "shifts"),
        (lambda: estimate_run("nowhere"), "nowhere"),
        (lambda: estimate_run("runs/tiny", rescale=0), "rescal"),
    ]


def _predicting() -> list[Row]:
    def call(x_context: Any = ((1, 0),), y_context: Any = (0.5,), x_query: Any = ((2, 0),)) -> Callable[[], Any]:
        return lambda: predict_from_prompt(load_model("runs/tiny"), x_context, y_context, x_query)

    return [
        (call(x_context=[[1, 0, 0]]), "x_context"),
        (call(x_query=[[1, 0, 0]]), "x_query"),
        (call(x_query=[1, 0]), "x_query"),
        (call(x_query=[]), "x_query"),
        (call(x_query=None), "x_query"),
        (call(x_query="ab"), "x_query"),
        (call(x_query=[["a", "b"]]), "x_query"),
        (call(x_query=[[math.nan, 0]]), "x_query"),
        (call(x_query=[[math.inf, 0]]), "x_query"),
        (call(x_query=[[10**400, 0]]), "x_query"),
        (call(x_query=np.array([[1j, 0]])), "x_query"),
        (call(x_query=torch.tensor([[1j, 0]])), "x_query"),
        (call(x_context=[[1, 0]] * 9, y_context=[1] * 9), "9"),
        (call(y_context=[1, 2]), "y_context"),
        (call(y_context=[[0.5]]), "y_context"),
        (call(y_context=0.5), "y_context"),
        (call(x_context=[[1, 0], [1]]), "x_context"),
        (call(x_query=[[3e38, 3e38]], x_context=[[3e38, 3e38]], y_context=[3e38]), "finite"),
        (call(x_query={"a": 1}), "x_query"),
        (lambda: predict_from_prompt("runs/tiny", [[1, 0]], [1], [[1, 0]]), "model"),
        (lambda: predict_from_prompt(None, [[1, 0]], [1], [[1, 0]]), "model"),
    ]


def _scoring() -> list[Row]:
    def call(cfg: Any = _TASK, n: Any = 8, **changes: Any) -> Callable[[], Any]:
        return lambda: evaluate_ood_score(load_model("runs/tiny"), cfg, n, **changes)

    return [
        *((call(n=value), "n_samples") for value in (0, -1, 1.5, "8", None, True, math.nan, math.inf, _BIG)),
        *((call(batch_size=value), "batch_size") for value in (0, -5, 1.5, "8", None, True, math.nan, _BIG)),
        (call(cfg=ICRegConfig()), "D = 2"),
        (call(cfg="config"), "cfg"),
        (call(cfg={"D": 2}), "cfg"),
        (lambda: evaluate_ood_score("runs/tiny", _TASK, 8), "model"),
        (lambda: evaluate_ood_score(None, _TASK, 8), "model"),
    ]


def _sampling() -> list[Row]:
    params = {"w": torch.zeros(2)}

    def loss(params: Any, batch: Any) -> torch.Tensor:
        return (params["w"] ** 2).sum() + 0 * batch.sum()

    def call(loss: Any = loss, params: Any = params, batches: Any = None, **changes: Any) -> Callable[[], Any]:
        given = {"lr": 1e-3, "nbeta": 10.0, "localization": 1.0, "num_chains": 2, "num_draws": 4}
        given |= {"num_burnin_steps": 2, "num_init_batches": 2, "seed": 0, "trivial_loss": 1.0}
        given |= changes
        return lambda: estimate_llc(loss, params, [torch.ones(2)] if batches is None else batches, **given)

    return [
        *((call(lr=value), "lr") for value in (0, -1, math.nan, math.inf, "x", None)),
        *((call(nbeta=value), "nbeta") for value in (0, -1, math.nan, "x")),
        (call(nbeta=None), "nbeta"),
        *((call(localization=value), "localization") for value in (-1, math.nan, None)),
        *((call(num_chains=value), "num_chains") for value in (0, 1.5, "2", None, _BIG)),
        *((call(num_draws=value), "num_draws") for value in (0, 1, "x", _BIG)),
        *((call(num_burnin_steps=value), "num_burnin_steps") for value in (-1, 1.5)),
        (call(num_init_batches=0), "num_init_batches"),
        (call(seed=-1), "seed"),
        (call(seed="x"), "seed"),
        (call(num_samples=1), "num_samples"),
        (call(kernel="nuts"), "nuts"),
        (call(thinning=0), "thinning"),
        (call(memory=-1), "memory"),
        (call(loss="loss"), "loss"),
        (call(loss=lambda params: 0), "loss"),
        (call(params=[1, 2]), "dict"),
        (call(params={}), "parameters"),
        (call(params={"w": [1.0]}), "tensors"),
        (call(params={"w": torch.zeros(2, dtype=torch.float16)}), "float32"),
        (call(params={"w": torch.zeros(2, dtype=torch.int64)}), "float"),
        (call(batches=[]), "batch"),
        (call(batches=7), "batches"),
        (call(nonsense=1), "nonsense"),
        (call(trivial_loss="x"), "trivial_loss"),
        (call(trivial_loss=math.nan), "trivial_loss"),
    ]


def _prompts() -> list[Row]:
    def call(config: Any = _TASK, **changes: Any) -> Callable[[], Any]:
        given = {"stream": "train", "step": 0, "batch_size": 2} | changes
        return lambda: sample_prompts(config, **given)

    return [
        *((call(step=value), "step") for value in (-1, 1.5, "0", None, True, 2**70)),
        *((call(batch_size=value), "batch_size") for value in (0, -1, 1.5, "2", None, True, _BIG, 10**13)),
        (call(distribution="uniform"), "uniform"),
        (call(distribution=3), "distribution"),
        (call(stream=None), "stream"),
        (call(stream=3), "stream"),
        (call(device="gpuu"), "gpuu"),
        (call(config=None), "config"),
        (call(config={"task": 3}), "config"),
    ]


def _pools() -> list[Row]:
    return [
        *((lambda value=value: task_pool(value, 2, 0), "M") for value in (0, -1, 1.5, "x", None, math.inf, _BIG)),
        *((lambda value=value: task_pool(4, value, 0), "task_size") for value in (0, -1, 1.5, "2", None, _BIG)),
        *((lambda value=value: task_pool(4, 2, value), "seed") for value in (-1, 1.5, "x", None, 2**70)),
        (lambda: task_pool(2**31 - 1, 1000, 0), "memory"),
    ]


def _predictors() -> list[Row]:
    xs, ys, tasks = torch.ones(2, 4, 2), torch.ones(2, 4), torch.ones(3, 2)
    rows: list[Row] = []
    for name, function in baselines.BASELINES.items():
        needs: dict[str, Any] = {"tasks": tasks} if "task_mean" in name or "dmmse" in name else {}
        needs |= {"noise_variance": 0.25} if "dmmse" in name or name == "ridge" else {}
        needs |= {"task_variance": 0.5} if name == "smoothed_dmmse" else {}
        needs |= {"alpha": 0.1} if name == "lasso" else {}
        for bad_xs, bad_ys, word in (
            (xs[0], ys[0], "xs"),
            (xs, ys[:, :3], "xs"),
            (xs * math.nan, ys, "NaN"),
            (xs, ys * math.inf, "infinity"),
            (xs.to(torch.complex64), ys, "xs"),
            (None, ys, "xs"),
        ):
            rows.append((lambda f=function, x=bad_xs, y=bad_ys, n=needs: f(x, y, **n), word))
        bad_tasks = (torch.ones(3, 3), torch.ones(0, 2), torch.ones(2), tasks * math.nan, None, [["a", "b"]])
        bad_noise = (-1.0, math.nan, math.inf, "x", None)
        for key, values in (
            ("tasks", bad_tasks),
            *((name, bad_noise) for name in ("noise_variance", "task_variance", "alpha")),
        ):
            bad = [needs | {key: value} for value in values] if key in needs else []
            rows += [(lambda f=function, n=changed: f(xs, ys, **n), key) for changed in bad]
    rows += [(lambda k=k: baselines.knn(xs, ys, k=k), "k") for k in (0, -1, 1.5, "x", None)]
    rows.append((lambda: baselines.ridge(xs, ys, noise_variance=0), "ols"))
    return rows
