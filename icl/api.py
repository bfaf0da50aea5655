"""The door for programs: train, load, predict and score in a few lines of Python.

`ICRegConfig` keeps the names and the documented defaults of the older code base; it stands for the preset `icr`.

Example:
    >>> cfg = ICRegConfig(D=4, K=8, d_model=64, d_mlp=64, n_layers=2, M="inf")
    >>> cfg.to_run_config().task.task_size
    4
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from icl import metrics
from icl.build import build_checkpoint_model
from icl.checkpoints import CheckpointError, checkpoint_files, checkpoint_name, load_checkpoint_file
from icl.config import CheckpointsConfig, EarlyStoppingConfig, EvaluationConfig, RunConfig, TaskConfig
from icl.prediction import parameter_of, predict_from_prompt
from icl.presets import preset
from icl.run_evaluation import RunEvaluator, evaluate_run
from icl.runs import DONE, RunError
from icl.sampling.run import estimate_run
from icl.tasks.prompts import prompt_source
from icl.transformer import Transformer
from icl.validation import ConfigError, parse_num_tasks, plain_number, whole

__all__ = [
    "ICRegConfig",
    "RunEvaluator",
    "estimate_run",
    "evaluate_ood_score",
    "evaluate_run",
    "load_checkpoint",
    "load_model",
    "predict_from_prompt",
    "train_ic_regression",
]

_LEFT_OUT: Any = object()
_MAX_PROMPTS = 2**31
"""Above this a score would take days."""


@dataclass
class ICRegConfig:
    """Task and model under the older names; everything else is an argument of `train_ic_regression`."""

    D: int = 8
    """Input dimension."""
    K: int = 16
    """Examples per prompt."""
    sigma2: float = 0.125
    """Noise variance."""
    d_model: int = 512
    d_mlp: int = 512
    n_heads: int = 4
    n_layers: int = 3
    use_prenorm: bool = True
    """Layer norm before each sublayer; False puts it after each residual sum."""
    M: int | float | str = 64
    """Number of training tasks, `"inf"` or `math.inf` for the Gaussian prior."""
    max_M: int = 32_768
    """Accepted for old scripts; limits nothing, because no table of tasks is stored."""

    def to_run_config(self) -> RunConfig:
        """The preset `icr` with these values.

        Raises:
            ConfigError: If a value cannot be used.
        """
        base = preset("icr")
        model = dataclasses.replace(
            base.model,
            num_layers=self.n_layers,
            num_heads=self.n_heads,
            embed_size=self.d_model,
            mlp_size=self.d_mlp,
            layer_norm="pre" if _flag("use_prenorm", self.use_prenorm) else "post",
        )
        task = TaskConfig(
            num_tasks=parse_num_tasks(self.M), task_size=self.D, max_examples=self.K, noise_variance=self.sigma2
        )
        return dataclasses.replace(base, task=task, model=model)


def train_ic_regression(
    cfg: ICRegConfig | None = None,
    M: int | float | str = _LEFT_OUT,
    *,
    num_steps: int = 150_000,
    batch_size: int = 2048,
    learning_rate: float = 1e-3,
    warmup_steps: int | None = None,
    grad_clip: float | None = 1.0,
    checkpoint_dir: str | Path | None = None,
    checkpoint_every: int | None = None,
    eval_every: int | None = None,
    print_every: int = 1000,
    early_stopping_patience: int | None = None,
    early_stopping_min_delta: float = 1e-6,
) -> Transformer:
    """Train a model, or resume or load it if `checkpoint_dir` already holds this run.

    Args:
        cfg: Task and model; left out, the defaults.
        M: Number of training tasks, `"inf"` or `math.inf`; left out, `cfg.M`.
        num_steps: Optimiser steps.
        batch_size: Prompts per step.
        learning_rate: Constant, or the peak of a triangle if `warmup_steps` is given.
        warmup_steps: Steps of the linear rise; the rate then falls to zero at `num_steps`.
        grad_clip: Largest gradient norm, or None.
        checkpoint_dir: The run's folder; left out, `$LOCAL_ROOT/<run name>`.
        checkpoint_every: Steps between checkpoints, beside the first and the last.
        eval_every: Steps between evaluations, in and out of distribution.
        print_every: Steps between rows of `metrics.csv`.
        early_stopping_patience: Evaluations without improvement before stopping; needs `eval_every`.
        early_stopping_min_delta: The least improvement that counts.

    Returns:
        The trained model, on the CPU.

    Raises:
        ConfigError: If an argument cannot be used, or the folder holds a run with other settings.
        RunError: If training failed or was interrupted.
    """
    from icl.training.run import train

    if checkpoint_dir is not None and not (isinstance(checkpoint_dir, (str, Path)) and str(checkpoint_dir).strip()):
        raise ConfigError(f"`checkpoint_dir` must be the path of a folder, got {checkpoint_dir!r}.")
    cfg = ICRegConfig() if cfg is None else cfg
    if not isinstance(cfg, ICRegConfig):
        raise ConfigError(
            f"`cfg` must be an ICRegConfig, got {type(cfg).__name__}; a RunConfig is trained by `icl.training.run.train`."
        )
    base = (cfg if M is _LEFT_OUT else dataclasses.replace(cfg, M=parse_num_tasks(M))).to_run_config()
    optim = dataclasses.replace(
        base.optim,
        lr=learning_rate,
        grad_clip=grad_clip,
        schedule="constant" if warmup_steps is None else "triangle",
        warmup_steps=warmup_steps,
    )
    config = dataclasses.replace(
        base,
        optim=optim,
        trainer=dataclasses.replace(base.trainer, max_steps=num_steps, batch_size=batch_size, log_every=print_every),
        evaluation=EvaluationConfig(every=eval_every),
        early_stopping=EarlyStoppingConfig(patience=early_stopping_patience, min_delta=early_stopping_min_delta),
        checkpoints=CheckpointsConfig(every=checkpoint_every, num_log=0, num_linear=0),
    )
    result = train(config, folder=checkpoint_dir)
    if result.status.state not in DONE:
        raise RunError(f"Training stopped ({result.status.reason}); the same call resumes it.")
    return load_model(result.folder.checkpoints.root / checkpoint_name(result.status.step))


def load_checkpoint(path: str | Path, cfg: ICRegConfig | RunConfig | None = None) -> tuple[Transformer, dict[str, Any]]:
    """A trained model, and what its checkpoint says of it.

    Args:
        path: A checkpoint file, or a run's folder for its last step.
        cfg: If given, the task and model it must have been made for.

    Returns:
        The model on the CPU, and `step`, `config` (a RunConfig), `digest` and `path`.

    Raises:
        CheckpointError: If there is no usable checkpoint, or it is of another shape than `cfg`.
    """
    file = checkpoint_files(path)[-1] if Path(path).is_dir() else Path(path)
    checkpoint = load_checkpoint_file(file)
    if cfg is not None:
        _require_shape(checkpoint.config, _as_run_config(cfg), file)
    info = {"step": checkpoint.step, "config": checkpoint.config, "digest": checkpoint.digest, "path": str(file)}
    return build_checkpoint_model(checkpoint), info


def load_model(path: str | Path, cfg: ICRegConfig | RunConfig | None = None) -> Transformer:
    """The model of `load_checkpoint`, ready to predict."""
    return load_checkpoint(path, cfg)[0].eval()


def evaluate_ood_score(
    model: Transformer, cfg: ICRegConfig | RunConfig | None = None, n_samples: int = 10_000, *, batch_size: int = 1000
) -> float:
    """Mean squared error per target on tasks from N(0, I), over `n_samples` prompts and all K positions.

    It is not divided by D (the older code divided).

    Args:
        model: A trained model; its dtype is that of the computation.
        cfg: The task; left out, the defaults of `ICRegConfig`.
        n_samples: Prompts.
        batch_size: Prompts that the model sees at a time.

    Raises:
        ConfigError: If a number is not a positive whole number, the model does not fit `cfg`, or its predictions are not
            finite.
    """
    n_samples, batch_size = whole("n_samples", n_samples, 1, _MAX_PROMPTS), whole("batch_size", batch_size, 1)
    parameter = parameter_of(model)
    config = _as_run_config(ICRegConfig() if cfg is None else cfg)
    if (config.task.task_size, config.task.max_examples) != (model.task_size, model.max_examples):
        raise ConfigError(
            f"The model is for D = {model.task_size}, K = {model.max_examples}, "
            f"but `cfg` says D = {config.task.task_size}, K = {config.task.max_examples}."
        )
    source = prompt_source(config, stream="true")
    loss = metrics.PositionLoss(max_examples=model.max_examples)
    loss.set_dtype(torch.promote_types(parameter.dtype, torch.float32))
    for start in range(0, n_samples, batch_size):
        prompts = source.sample(range(1), range(start, min(start + batch_size, n_samples)), device=parameter.device)
        with torch.no_grad():
            loss.update(model(prompts.xs[0].to(parameter), prompts.ys[0].to(parameter)), prompts.ys[0].to(parameter))
    score = float(loss.compute().mean.value)
    if not math.isfinite(score):
        raise ConfigError(f"The model's mean squared error is {score}: training diverged; take an earlier checkpoint.")
    return score


def _as_run_config(cfg: Any) -> RunConfig:
    if not isinstance(cfg, (ICRegConfig, RunConfig)):
        raise ConfigError(f"`cfg` must be an ICRegConfig or a RunConfig, got {type(cfg).__name__}.")
    return cfg.to_run_config() if isinstance(cfg, ICRegConfig) else cfg


def _flag(name: str, value: Any) -> bool:
    flag = plain_number(value)
    if not isinstance(flag, bool):
        raise ConfigError(f"`{name}` must be True or False, got {value!r}.")
    return flag


def _require_shape(saved: RunConfig, wanted: RunConfig, file: Path) -> None:
    keys = ("task_size", "max_examples")
    differences = [
        f"{key} is {getattr(saved.task, key)}, not {getattr(wanted.task, key)}"
        for key in keys
        if getattr(saved.task, key) != getattr(wanted.task, key)
    ]
    differences += [
        f"{field.name} is {getattr(saved.model, field.name)}, not {getattr(wanted.model, field.name)}"
        for field in dataclasses.fields(saved.model)
        if getattr(saved.model, field.name) != getattr(wanted.model, field.name)
    ]
    if differences:
        raise CheckpointError(f"{file} is of another model than `cfg`: {'; '.join(differences)}.")
