"""Train, load, evaluate and use models in a few lines of Python.

The settings in `ICRegConfig` have the names and the documented defaults of an older code base. The preset `icr` has the same values.

Examples:
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
from icl.config import CheckpointsConfig, EarlyStoppingConfig, EvaluationConfig, RunConfig, TaskConfig
from icl.config.validation import ConfigError, parse_num_tasks, plain_number, require, whole
from icl.evaluation.prediction import parameter_of, predict_from_prompt
from icl.evaluation.sets import REPORT
from icl.importing.run import SUFFIXES, load_older_file
from icl.model.transformer import Transformer
from icl.presets import preset
from icl.runs.checkpoints import Checkpoint, CheckpointError, checkpoint_files, checkpoint_name, load_checkpoint_file
from icl.runs.folder import RunError
from icl.runs.stored import load_stored_checkpoint
from icl.sampling.run import estimate_run
from icl.tasks.prompts import prompt_source
from icl.whole_runs import RunEvaluator, evaluate_run

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
"""Largest number of prompts in `evaluate_ood_score`. More prompts would take days."""


@dataclass
class ICRegConfig:
    """Settings of the task and the model, with the names of an older code base. Other settings are arguments of `train_ic_regression`."""

    D: int = 8
    """Input dimension."""
    K: int = 16
    """Number of examples per prompt."""
    sigma2: float = 0.125
    """Noise variance."""
    d_model: int = 512
    """Width of the residual stream."""
    d_mlp: int = 512
    """Hidden width of the MLP."""
    n_heads: int = 4
    """Number of attention heads per block."""
    n_layers: int = 3
    """Number of blocks."""
    use_prenorm: bool = True
    """Whether layer norm comes before each sublayer. Otherwise it comes after each residual sum."""
    M: int | float | str = 64
    """Number of training tasks; `"inf"` or `math.inf` means the Gaussian prior."""
    max_M: int = 32_768
    """Largest number of tasks in the older code. Here it has no effect. We accept it so that old scripts still work."""

    def to_run_config(self) -> RunConfig:
        """Return a configuration with these values. All other settings come from the preset `icr`.

        Raises:
            ConfigError: If a value cannot be used.
        """
        use_prenorm = plain_number(self.use_prenorm)
        require(isinstance(use_prenorm, bool), f"`use_prenorm` must be True or False, got {self.use_prenorm!r}.")
        base = preset("icr")
        model = dataclasses.replace(
            base.model,
            num_layers=self.n_layers,
            num_heads=self.n_heads,
            embed_size=self.d_model,
            mlp_size=self.d_mlp,
            layer_norm="pre" if use_prenorm else "post",
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
    """Train a model. If `checkpoint_dir` already contains the run, resume it, or load its model if training is finished.

    Args:
        cfg: Settings of the task and the model. The default is `ICRegConfig()`.
        M: Number of training tasks, `"inf"` or `math.inf`. The default is `cfg.M`.
        num_steps: Number of optimiser steps.
        batch_size: Number of prompts per step.
        learning_rate: Constant learning rate, or the peak of a triangular schedule if `warmup_steps` is given.
        warmup_steps: Number of steps over which the rate rises linearly. After them, the rate falls linearly to zero at `num_steps`.
        grad_clip: Largest norm of the gradient; larger gradients are scaled down. None means no clipping.
        checkpoint_dir: The run's folder. The default is `$LOCAL_ROOT/<run name>`.
        checkpoint_every: Number of steps between checkpoints. The first and the last step are always saved; None saves only these.
        eval_every: Number of steps between evaluations on `pretrain` and `true` tasks; None means no evaluation.
        print_every: Number of steps between rows of `metrics.csv`.
        early_stopping_patience: Number of evaluations without improvement after which training stops; None means never. If you set a
            patience, also set `eval_every`.
        early_stopping_min_delta: Smallest decrease of the evaluated loss that counts as improvement.

    Returns:
        The trained model, on the CPU.

    Raises:
        ConfigError: If an argument cannot be used, or the folder contains a run with other settings.
        RunError: If training failed or was interrupted.
    """
    from icl.training.run import train

    if checkpoint_dir is not None and not (isinstance(checkpoint_dir, (str, Path)) and str(checkpoint_dir).strip()):
        raise ConfigError(f"`checkpoint_dir` must be the path of a folder, got {checkpoint_dir!r}.")
    cfg = ICRegConfig() if cfg is None else cfg
    if not isinstance(cfg, ICRegConfig):
        raise ConfigError(
            f"`cfg` must be an ICRegConfig, got {type(cfg).__name__}. Train a RunConfig with `icl.training.run.train`."
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
    if not result.status.is_done:
        raise RunError(f"Training stopped ({result.status.reason}). Call the function again to resume it.")
    return load_model(result.folder.checkpoints.root / checkpoint_name(result.status.step))


def load_checkpoint(
    path: str | Path, cfg: ICRegConfig | RunConfig | None = None, *, step: int | None = None
) -> tuple[Any, dict[str, Any]]:
    """Load a trained model and the metadata of its checkpoint.

    Args:
        path: A checkpoint file, or a run's folder. The file may also be a `.pt` file of older code, such as
            `checkpoint_step_150000.pt` (`icl.importing`). Instead of a path, give the address of a run or a checkpoint in a store,
            such as `hf://USER/REPO`, `hf://USER/REPO@REVISION/RUN` or `s3://BUCKET/RUN`.
        cfg: The D, K and architecture that the checkpoint's model must have; other settings are not compared. By default, any model is
            accepted. If a `.pt` file contains no config, the number of heads is taken from `cfg`.
        step: The step to load from a folder or a store. The default is the last step.

    Returns:
        The model on the CPU (a `Transformer`, or the `LanguageModel` of a language run), and a dict with the keys `step`, `config` (a
        RunConfig), `digest` and `path`.

    Raises:
        CheckpointError: If there is no usable checkpoint, or the checkpoint's D, K or architecture differ from `cfg`.
        ConfigError: If `cfg` is neither an ICRegConfig nor a RunConfig.
        OlderFileError: If a `.pt` file cannot be read safely, or does not come from a known older code base.
    """
    shape = None if cfg is None else _as_run_config(cfg)
    checkpoint, place = _find_checkpoint(path, shape, step)
    if shape is not None:
        _require_shape(checkpoint.config, shape, place)
    info = {"step": checkpoint.step, "config": checkpoint.config, "digest": checkpoint.digest, "path": str(place)}
    return build_checkpoint_model(checkpoint), info


def load_model(path: str | Path, cfg: ICRegConfig | RunConfig | None = None, *, step: int | None = None) -> Any:
    """Load a trained model in evaluation mode. The arguments and errors are the same as in `load_checkpoint`."""
    return load_checkpoint(path, cfg, step=step)[0].eval()


def _find_checkpoint(path: str | Path, shape: RunConfig | None, step: int | None) -> tuple[Checkpoint, str | Path]:
    """Return the checkpoint at a path or address, and its location."""
    if isinstance(path, str) and "://" in path:
        return load_stored_checkpoint(path, step)
    if Path(path).is_dir():
        files = checkpoint_files(path)
        if step is not None:
            files = [file for file in files if file.name == checkpoint_name(step)]
        if not files:
            raise CheckpointError(
                f"{path} has no checkpoint of step {step:,}; `icl checkpoints RUN ls` lists the steps."
            )
        return load_checkpoint_file(files[-1]), files[-1]
    file = Path(path)
    is_older = file.suffix in SUFFIXES and file.is_file()
    checkpoint = load_older_file(file, shape) if is_older else load_checkpoint_file(file)
    if step not in (None, checkpoint.step):
        raise CheckpointError(
            f"{file} is the checkpoint of step {checkpoint.step:,}, not {step:,}; leave out the step, or give another file."
        )
    return checkpoint, file


def evaluate_ood_score(
    model: Transformer, cfg: ICRegConfig | RunConfig | None = None, n_samples: int = 10_000, *, batch_size: int = 1000
) -> float:
    """Return the mean squared error per target on new tasks, averaged over `n_samples` prompts and all K positions.

    New tasks are drawn from N(0, I), unless `cfg` is a RunConfig with another prior. Unlike the older code, this function does not divide
    the score by D.

    Args:
        model: A trained model. Predictions are computed in its dtype.
        cfg: Settings of the task. The default is `ICRegConfig()`.
        n_samples: Number of prompts.
        batch_size: Number of prompts in one forward pass.

    Raises:
        ConfigError: If `n_samples` or `batch_size` is not a positive whole number, `n_samples` is above 2^31, D or K of the model and `cfg`
            differ, or the mean squared error is not finite.
    """
    n_samples, batch_size = whole("n_samples", n_samples, 1, _MAX_PROMPTS), whole("batch_size", batch_size, 1)
    parameter = parameter_of(model)
    config = _as_run_config(ICRegConfig() if cfg is None else cfg)
    if (config.task.task_size, config.task.max_examples) != (model.task_size, model.max_examples):
        raise ConfigError(
            f"The model is for D = {model.task_size}, K = {model.max_examples}, "
            f"but `cfg` says D = {config.task.task_size}, K = {config.task.max_examples}. Pass the `cfg` of the model's own run."
        )
    source = prompt_source(config, stream="true")
    loss = metrics.PositionLoss(max_examples=model.max_examples)
    for start in range(0, n_samples, batch_size):
        prompts = source.sample(
            range(REPORT, REPORT + 1), range(start, min(start + batch_size, n_samples)), device=parameter.device
        )
        with torch.no_grad():
            loss.update(model(prompts.xs[0].to(parameter), prompts.ys[0].to(parameter)), prompts.ys[0].to(parameter))
    score = float(loss.compute().mean.value)
    if not math.isfinite(score):
        raise ConfigError(f"The mean squared error is {score}, so training diverged. Use an earlier checkpoint.")
    return score


def _as_run_config(cfg: Any) -> RunConfig:
    if not isinstance(cfg, (ICRegConfig, RunConfig)):
        raise ConfigError(f"`cfg` must be an ICRegConfig or a RunConfig, got {type(cfg).__name__}.")
    return cfg.to_run_config() if isinstance(cfg, ICRegConfig) else cfg


def _require_shape(saved: RunConfig, wanted: RunConfig, file: str | Path) -> None:
    settings, expected = (
        {
            "task_size": config.task.task_size,
            "max_examples": config.task.max_examples,
            **dataclasses.asdict(config.model),
        }
        for config in (saved, wanted)
    )
    differences = [
        f"{key} is {settings[key]}, not {expected[key]}" for key in settings if settings[key] != expected[key]
    ]
    if differences:
        raise CheckpointError(
            f"The model in {file} does not fit `cfg`: {'; '.join(differences)}. Correct `cfg`, or leave it out to accept any model."
        )
