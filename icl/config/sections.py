"""The sections of a run's settings that describe training, evaluation and saving. Each section checks its values.

The sections `task`, `model`, `language` and `sampler` are in separate modules. The description of a setting gives the symbol that
the papers use for it (M, D, K, sigma^2).
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from icl.config.validation import (
    Bound,
    parse_num_tasks,
    plain_number,
    require,
    require_count,
    require_store,
    validate,
)

FREE_ON_RESUME = (
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "trainer.compile",
    "trainer.loggers",
    "checkpoints.resume_seconds",
    "checkpoints.store",
    "sampler",
)
"""Settings and sections that may change when an unfinished run is resumed. They are not part of a run's default name.

These settings determine the devices, whether training is compiled, how progress is saved and logged, and how LLCs are estimated later. They
do not change what training computes.
"""
OLDER_SOURCES = ("icr", "timaeus", "raventos", "timaeus-lm")
"""Older code bases whose checkpoints `icl import` reads."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Adam (Kingma and Ba 2015) and the schedule of its learning rate."""

    lr: float = 3e-3
    """Peak learning rate."""
    schedule: Literal["constant", "warmup", "triangle"] = "triangle"
    """Schedule of the learning rate: `constant`, `warmup` (a linear rise, then constant) or `triangle` (a linear rise, then a linear
    fall). The last update of a `triangle` has rate zero, so a `triangle` needs at least 2 steps."""
    warmup_steps: int | None = None
    """Number of steps over which the rate rises linearly. The default for `triangle` is half of `schedule_steps`. The schedule `warmup`
    has no default, and `constant` does not allow this setting."""
    schedule_steps: int | None = None
    """Length of the schedule in steps. The default is `trainer.max_steps`. To train only the first part of a schedule, set this to the full
    length of the schedule."""
    grad_clip: float | None = None
    """Largest norm of the gradient. A gradient with a larger norm is scaled down to this norm. In a population, the gradient of each run is
    clipped separately. By default gradients are not clipped."""
    beta1: float = 0.9
    """Decay of Adam's first moment."""
    beta2: float = 0.999
    """Decay of Adam's second moment."""
    eps: float = 1e-8
    """Small number (epsilon) that is added to the denominator of Adam's update."""
    weight_decay: float = 0.0
    """Weight decay of AdamW (Loshchilov and Hutter 2019). Each update also subtracts lr x `weight_decay` x w from every weight w."""

    def __post_init__(self) -> None:
        betas: dict[str, Bound] = {"beta1": "zero or positive", "beta2": "zero or positive"}
        numbers: dict[str, Bound] = {"lr": "positive", "grad_clip": "positive", "eps": "positive", **betas}
        numbers |= {"weight_decay": "zero or positive"}
        validate("optim", self, counts={"warmup_steps": 1, "schedule_steps": 1}, numbers=numbers)
        for name in betas:
            value = getattr(self, name)
            require(value < 1, f"`optim.{name}` must be in [0, 1), got {value!r}.")
        require(
            self.schedule != "constant" or self.warmup_steps is None,
            "`optim.warmup_steps` has no effect on a constant rate. Set `optim.schedule` to `warmup` or `triangle`.",
        )
        require(
            self.schedule == "triangle" or self.schedule_steps is None,
            f"`optim.schedule_steps` has no effect on the schedule `{self.schedule}`; only `triangle` uses this setting. Leave it out.",
        )
        require(
            self.schedule != "warmup" or self.warmup_steps is not None,
            "`optim.schedule` is `warmup`, but `optim.warmup_steps` is not set. Set it to a number of steps.",
        )


LOGGERS = ("csv", "tensorboard", "wandb")
"""Names of loggers that `trainer.loggers` accepts."""


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Length of training, batch size, logging and devices."""

    max_steps: int = 5000
    """Number of optimiser steps. Step s is the state after s updates, so step 0 is the initial model."""
    batch_size: int = 128
    """Number of prompts per step, over all devices together."""
    log_every: int = 100
    """Number of steps between rows of `metrics.csv`. The `train/loss` of a row is the mean over the steps since the previous row. (The
    column is called `train/nll` if `model.output` is `gaussian` or `mixture`.)"""
    accelerator: Literal["auto", "cpu", "cuda", "gpu", "tpu", "mps"] = "auto"
    """Kind of device. `auto` uses the kind in $DEVICE if this variable is set, otherwise the best device of this machine."""
    devices: int = 1
    """Number of devices per machine."""
    num_nodes: int = 1
    """Number of machines that train this run together."""
    strategy: str = "auto"
    """Lightning's strategy, such as `ddp` for several processes."""
    precision: str = "32-true"
    """Lightning's precision, such as `32-true` or `bf16-mixed`."""
    loggers: str = "auto"
    """Names of loggers, separated by commas: `csv`, `tensorboard`, `wandb`. `auto` uses W&B if it is set up. `metrics.csv` is always
    written."""
    compile: Literal["auto", "true", "false"] = "auto"
    """Whether to compile the training step with `torch.compile`, which takes 10 to 30 s. `auto` compiles if the run is long enough. A
    language run must also be on a CPU, and its model must compute each batch as a whole, not in several parts."""

    def __post_init__(self) -> None:
        names = ("max_steps", "batch_size", "log_every", "devices", "num_nodes")
        validate("trainer", self, counts=dict.fromkeys(names, 1), numbers={})
        unknown = [name for name in self.logger_names if name not in LOGGERS]
        require(
            self.loggers == "auto" or (len(self.logger_names) > 0 and not unknown),
            f"`trainer.loggers` must be auto, or some of {', '.join(LOGGERS)} separated by commas, got {self.loggers!r}.",
        )
        require(
            self.batch_size % self.num_processes == 0,
            "`trainer.batch_size` must be a multiple of the number of processes, got "
            f"{self.batch_size} for {self.num_processes} processes.",
        )

    @property
    def logger_names(self) -> list[str]:
        """Names of the chosen loggers; empty for `auto`."""
        return (
            [] if self.loggers == "auto" else [name.strip().lower() for name in self.loggers.split(",") if name.strip()]
        )

    @property
    def num_processes(self) -> int:
        """Number of processes that train a run together, one for each device."""
        return self.devices * self.num_nodes


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Evaluation during training, on fixed prompts. Tables that are made after training use another set of fixed prompts, of the same size."""

    every: int | None = 500
    """Number of steps between evaluations; None means no evaluation during training."""
    num_prompts: int = 2048
    """Number of prompts in each evaluation set (`pretrain` and `true`)."""

    def __post_init__(self) -> None:
        validate("evaluation", self, counts={"every": 1, "num_prompts": 2}, numbers={})


@dataclass(frozen=True, kw_only=True)
class EarlyStoppingConfig:
    """Early stopping of training when a metric no longer falls."""

    monitor: str = "eval/pretrain/loss"
    """Metric that must keep falling: an `eval/...` column of `metrics.csv`. The column `eval/pretrain/nll` exists only if `model.output`
    is `gaussian` or `mixture`."""
    patience: int | None = None
    """Training stops after this number of evaluations (not steps) without improvement. None means that training never stops early."""
    min_delta: float = 0.0
    """Smallest decrease of the metric `monitor` that counts as improvement."""

    def __post_init__(self) -> None:
        validate("early_stopping", self, counts={"patience": 1}, numbers={"min_delta": "zero or positive"})


@dataclass(frozen=True, kw_only=True)
class CheckpointsConfig:
    """Steps whose checkpoints are saved: step 0, the last step and three grids."""

    every: int | None = None
    """Number of steps between the points of an equally spaced grid. By default there is no such grid."""
    num_log: int = 20
    """Number of points of a log-spaced grid from 1 to `max_steps`. Points that are equal after rounding are saved once."""
    num_linear: int = 10
    """Number of points of a linear grid from 0 to `max_steps`."""
    moments: bool = False
    """Whether to save Adam's two moments with each checkpoint, in `checkpoints/moments/`. The checkpoints of a run then need three
    times the disk space."""
    resume_seconds: float = 20.0
    """Seconds between saves of `last.ckpt`, the file from which an interrupted run resumes."""
    store: str | None = None
    """Store for a second copy of the run: a folder, or a URL such as s3://bucket/prefix or hf://USER/REPO. The default is
    s3://$AWS_BUCKET_NAME if that variable is set, otherwise no store."""
    imported_from: str | None = None
    """Older code base that trained the run, if `icl import` made the run's folder. `icl train` does not continue such a run."""

    def __post_init__(self) -> None:
        counts = {"every": 1, "num_log": 0, "num_linear": 0}
        validate("checkpoints", self, counts=counts, numbers={"resume_seconds": "zero or positive"})
        if self.store is not None:
            require_store(self.store)
        require(
            self.imported_from in (None, *OLDER_SOURCES),
            f"`checkpoints.imported_from` must be one of {', '.join(OLDER_SOURCES)}, or none, got {self.imported_from!r}.",
        )


@dataclass(frozen=True, kw_only=True)
class SeedsConfig:
    """Seeds, one for each source of randomness. Changing one seed does not change the draws of the other sources."""

    model: int = 0
    """Seed for the initial weights."""
    tasks: int = 0
    """Seed for the sequence of tasks. The first M tasks of this sequence are the pool."""
    data: int = 0
    """Seed for the training inputs and the choice of each prompt's task."""
    noise: int = 0
    """Seed for the noise in the targets of training prompts."""
    evaluation: int = 0
    """Seed for all evaluation sets."""

    def __post_init__(self) -> None:
        validate("seeds", self, counts={field.name: 0 for field in dataclasses.fields(self)}, numbers={})


@dataclass(frozen=True, kw_only=True)
class PopulationConfig:
    """Several runs that one process trains together, one run for each combination of a seed and a number of tasks."""

    seeds: tuple[int, ...] | None = None
    """Seeds, such as 0,1,2. A run uses its seed as `seeds.model`, `seeds.data` and `seeds.noise`. All runs have the same `seeds.tasks` and
    `seeds.evaluation`."""
    num_tasks: tuple[int | float, ...] | None = None
    """Task diversities M, such as 1,8,64,inf."""

    def __post_init__(self) -> None:
        for name in ("seeds", "num_tasks"):
            values = getattr(self, name)
            if values is None:
                continue
            is_list = isinstance(values, (list, tuple, range)) or getattr(values, "ndim", None) == 1
            require(is_list and len(values) > 0, f"`population.{name}` must be a list such as 0,1,2, got {values!r}.")
            parse = parse_num_tasks if name == "num_tasks" else plain_number
            parsed = tuple(parse(value) for value in values)
            require(len(set(parsed)) == len(parsed), f"`population.{name}` contains the same value twice: {values!r}.")
            object.__setattr__(self, name, parsed)
        for seed in self.seeds or ():
            require_count("population.seeds", seed, 0)

    def __bool__(self) -> bool:
        return self.seeds is not None or self.num_tasks is not None


def is_free_on_resume(key: str) -> bool:
    """Return whether a dotted key, or its section, is in `FREE_ON_RESUME`."""
    return key in FREE_ON_RESUME or key.partition(".")[0] in FREE_ON_RESUME
