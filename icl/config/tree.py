"""Settings of a run: a tree of frozen dataclasses, documented and validated.

A run is a pure function of one `RunConfig`. The leaves of the tree are plain values, and the whole tree is saved with the run
and in every checkpoint. Names are the usual terms; the descriptions add the papers' symbols (M, D, K, sigma^2).
`icl.presets` has the published settings. `icl.resolve` reads files and command lines.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from icl.config.validation import (
    Bound,
    ConfigError,
    parse_num_tasks,
    plain_number,
    require,
    require_count,
    require_number,
    require_run_name,
    require_steps,
    require_store,
    validate,
)

LayerNormPlacement = Literal["pre", "post", "none"]
Activation = Literal["relu", "gelu", "gelu_tanh"]
Initialisation = Literal["pytorch", "gpt2"]
ModelOutput = Literal["scalar", "token"]
RateSchedule = Literal["constant", "warmup", "triangle"]
Compile = Literal["auto", "true", "false"]
Kernel = Literal["sgld", "rmsprop"]
Minibatches = Literal["fixed", "fresh"]
SampledLoss = Literal["mse", "subsequence"]
Accelerator = Literal["auto", "cpu", "cuda", "gpu", "tpu", "mps"]

FREE_ON_RESUME = (
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "trainer.compile",
    "checkpoints.resume_seconds",
    "checkpoints.store",
    "sampler",
)
"""Settings and sections that may change when an unfinished run is resumed, and are not in its name.

They say where and how safely a run executes and how it is sampled later, not what training computes.
"""

MAX_CHECKPOINTS = 1_000_000
"""Largest number of checkpoints of a run. More files make a folder slow, and their steps are kept in memory."""
MEMBER_SETTINGS = ("run_name", "task.num_tasks", "seeds", "checkpoints.store")
"""Settings and sections in which the members of a population may differ."""


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """In-context linear regression: y_k = w . x_k + noise, with w from a pool of M tasks or from N(0, I)."""

    num_tasks: int | float = 64
    """Task diversity M, the number of tasks in the pool; `inf` stands for the Gaussian prior N(0, I)."""
    task_size: int = 2
    """Input dimension D."""
    max_examples: int = 8
    """Examples per prompt K. The model reads 2K - 1 tokens x1, y1, ..., xK."""
    noise_variance: float = 0.25
    """Noise variance sigma^2 of the targets (a variance, not a deviation)."""

    def __post_init__(self) -> None:
        counts = {"task_size": 1, "max_examples": 1}
        validate("task", self, counts=counts, numbers={"noise_variance": "zero or positive"})
        object.__setattr__(self, "num_tasks", parse_num_tasks(self.num_tasks))

    @property
    def is_gaussian(self) -> bool:
        """Whether the training tasks come from the Gaussian prior (M = inf)."""
        return self.num_tasks == math.inf


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Decoder-only transformer over vector tokens, defined in `icl/model/transformer.py`."""

    num_layers: int = 2
    """Number of blocks L, each with attention and MLP."""
    num_heads: int = 4
    """Attention heads H per block; H must divide `embed_size`."""
    embed_size: int = 32
    """Width C of the residual stream."""
    mlp_size: int = 64
    """Hidden width of the MLP."""
    layer_norm: LayerNormPlacement = "pre"
    """Layer norm before each sublayer (`pre`), after each residual sum (`post`), or nowhere (`none`)."""
    attention_output: bool = True
    """Whether attention has an output projection W_O."""
    activation: Activation = "relu"
    """MLP activation: ReLU, exact GELU, or GPT-2's tanh approximation of GELU."""
    embedding_bias: bool = False
    """Whether the token embedding has a bias."""
    attention_bias: bool = False
    """Whether query, key, value and output projections have biases."""
    mlp_bias: bool = True
    """Whether the MLP has biases."""
    unembedding_bias: bool = True
    """Whether the unembedding has a bias."""
    output: ModelOutput = "token"
    """Output of one number (`scalar`), or of D + 1 numbers (`token`), of which coordinate 0 is the prediction."""
    init: Initialisation = "pytorch"
    """Initial weights: nn.Linear's uniform (`pytorch`), or N(0, 0.02^2) with scaled residual projections (`gpt2`)."""
    double_residual: bool = False
    """Whether each block's input is added twice, as in the code of Hoogland et al.; for matching published numbers."""

    def __post_init__(self) -> None:
        validate("model", self, counts={"num_layers": 1, "num_heads": 1, "embed_size": 1, "mlp_size": 1}, numbers={})
        require(
            self.embed_size % self.num_heads == 0,
            f"`model.num_heads` must divide `model.embed_size`, got {self.num_heads} heads and width {self.embed_size}.",
        )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Adam (Kingma and Ba 2015) and the schedule of its learning rate."""

    lr: float = 3e-3
    """Peak learning rate."""
    schedule: RateSchedule = "triangle"
    """Schedule of the rate: `constant`, `warmup` (linear rise, then constant) or `triangle` (linear rise, then linear fall). The
    last update of a triangle has rate zero, so a run needs at least 2 steps of it."""
    warmup_steps: int | None = None
    """Steps of the linear rise. By default none for `constant`, and half of `schedule_steps` for `triangle`."""
    schedule_steps: int | None = None
    """Length of the schedule in steps. By default `trainer.max_steps`. Keep it if you only stop earlier."""
    grad_clip: float | None = None
    """Largest gradient norm of a member. By default gradients are not clipped."""
    beta1: float = 0.9
    """Decay of Adam's first moment."""
    beta2: float = 0.999
    """Decay of Adam's second moment."""
    eps: float = 1e-8
    """Epsilon in the denominator of Adam."""

    def __post_init__(self) -> None:
        betas: dict[str, Bound] = {"beta1": "zero or positive", "beta2": "zero or positive"}
        numbers: dict[str, Bound] = {"lr": "positive", "grad_clip": "positive", "eps": "positive", **betas}
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
            f"`optim.schedule_steps` has no effect on the schedule `{self.schedule}`; only `triangle` has an end.",
        )
        require(
            self.schedule != "warmup" or self.warmup_steps is not None,
            "`optim.schedule` is `warmup`, but `optim.warmup_steps` is not set. Set it to a number of steps.",
        )


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Length of training, batch size, logging and devices."""

    max_steps: int = 5000
    """Number of optimiser steps. Step s means after s updates, so step 0 is the initial model."""
    batch_size: int = 128
    """Prompts per step, over all devices together."""
    log_every: int = 100
    """Steps between rows of `metrics.csv`. The `train/loss` of a row is the mean since the row before."""
    accelerator: Accelerator = "auto"
    """Kind of device; `auto` uses $DEVICE, or else the best one of this machine."""
    devices: int = 1
    """Devices per machine."""
    num_nodes: int = 1
    """Machines that train this run together."""
    strategy: str = "auto"
    """Lightning's strategy, such as `ddp` for several processes."""
    precision: str = "32-true"
    """Lightning's precision, such as `32-true` or `bf16-mixed`."""
    compile: Compile = "auto"
    """Whether to compile the step with `torch.compile`, which takes 10 to 30 s; `auto` compiles if a run is long enough."""

    def __post_init__(self) -> None:
        names = ("max_steps", "batch_size", "log_every", "devices", "num_nodes")
        validate("trainer", self, counts=dict.fromkeys(names, 1), numbers={})
        num_processes = self.devices * self.num_nodes
        require(
            self.batch_size % num_processes == 0,
            "`trainer.batch_size` must be a multiple of the number of processes, got "
            f"{self.batch_size} for {num_processes}.",
        )


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Evaluation during training, on fixed prompts."""

    every: int | None = 500
    """Steps between evaluations; None means no evaluation during training."""
    num_prompts: int = 2048
    """Prompts in each evaluation set (`pretrain` and `true`)."""

    def __post_init__(self) -> None:
        validate("evaluation", self, counts={"every": 1, "num_prompts": 2}, numbers={})


@dataclass(frozen=True, kw_only=True)
class EarlyStoppingConfig:
    """Early stopping of training once a metric stops falling."""

    monitor: str = "eval/pretrain/loss"
    """Metric that must fall, an `eval/...` column of `metrics.csv`."""
    patience: int | None = None
    """Evaluations (not steps) without improvement before training stops; None means never."""
    min_delta: float = 0.0
    """Smallest decrease that counts as improvement."""

    def __post_init__(self) -> None:
        validate("early_stopping", self, counts={"patience": 1}, numbers={"min_delta": "zero or positive"})


@dataclass(frozen=True, kw_only=True)
class CheckpointsConfig:
    """Steps whose checkpoints are saved: step 0, the last step and three grids."""

    every: int | None = None
    """Distance of a grid of equally spaced steps. By default there is no such grid."""
    num_log: int = 20
    """Points of a log-spaced grid from 1 to `max_steps` (fewer after rounding)."""
    num_linear: int = 10
    """Points of a linear grid from 0 to `max_steps`."""
    moments: bool = False
    """Whether to save Adam's two moments at these steps too, in `checkpoints/moments/`; triples the space needed."""
    resume_seconds: float = 20.0
    """Seconds between saves of `last.ckpt`, the file from which an interrupted run resumes."""
    store: str | None = None
    """Second store for a copy of the run, a folder or a URL such as s3://bucket/prefix. By default s3://$AWS_BUCKET_NAME if
    that is set, else none."""

    def __post_init__(self) -> None:
        counts = {"every": 1, "num_log": 0, "num_linear": 0}
        validate("checkpoints", self, counts=counts, numbers={"resume_seconds": "zero or positive"})
        if self.store is not None:
            require_store(self.store)


@dataclass(frozen=True, kw_only=True)
class ChainsConfig:
    """Settings of the chains of an LLC estimate, for any loss."""

    lr: float = 2e-5
    """Step size epsilon."""
    nbeta: float | None = 1000.0
    """Effective inverse temperature n beta, the factor of the loss; None means n / ln n with n = `num_samples`."""
    localization: float = 1000.0
    """Strength gamma of the pull back to the checkpoint."""
    num_samples: int | None = None
    """Sample size n; None if it is not known."""
    batch_size: int | None = None
    """Size of a minibatch; None if whoever gives the minibatches decides it."""
    num_chains: int = 4
    """Independent chains for each checkpoint."""
    num_draws: int = 100
    """Draws of each chain, over which averages are taken."""
    num_burnin_steps: int = 150
    """Moves of each chain before its first draw. They are in no average."""
    seed: int = 0
    """Seed for the chains' noise and minibatches."""
    kernel: Kernel = "sgld"
    """Markov kernel: `sgld`, or SGLD preconditioned by RMSprop (`rmsprop`)."""
    thinning: int = 1
    """Moves from one draw to the next."""
    num_init_batches: int = 32
    """Minibatches over which the checkpoint's own loss L(w0) is averaged."""

    section: ClassVar[str] = ""
    """Name of the section in error messages."""

    @property
    def inverse_temperature(self) -> float:
        """The number `nbeta`, or n / ln n where it is None; no other place decides this."""
        if self.nbeta is not None:
            return self.nbeta
        assert self.num_samples is not None
        return self.num_samples / math.log(self.num_samples)

    @property
    def num_moves(self) -> int:
        """Gradients that a chain takes, not counting the diagnostic ones."""
        return self.num_burnin_steps + (self.num_draws - 1) * self.thinning + 1

    def __post_init__(self) -> None:
        sizes = {"num_samples": 2, "batch_size": 1, "num_chains": 1, "num_draws": 2, "num_burnin_steps": 0}
        numbers: dict[str, Bound] = {"lr": "positive", "localization": "zero or positive", "memory": "positive"}
        validate(
            self.section,
            self,
            counts={**sizes, "seed": 0, "thinning": 1, "num_init_batches": 1},
            numbers=numbers,
        )
        prefix = f"{self.section}." if self.section else ""
        require(
            self.nbeta is not None or self.num_samples is not None,
            "`nbeta` is None, which means n / ln n, but `num_samples` (n) is missing; give one of them.",
        )
        if self.nbeta is not None:
            repair = f". Write none for n / ln n with n = `{prefix}num_samples`"
            require_number(f"{prefix}nbeta", self.nbeta, "positive", repair=repair)
        for name in ("lr", "nbeta", "localization"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, float(value))
        require(
            self.kernel != "rmsprop" or self.num_burnin_steps > 0,
            f"The kernel `rmsprop` adapts only during burn-in. Set `{prefix}num_burnin_steps` above 0.",
        )


@dataclass(frozen=True, kw_only=True)
class SamplerConfig(ChainsConfig):
    """Estimation of local learning coefficients by `icl llc`; it has no effect on training."""

    num_samples: int = 2**20
    """Sample size n: the number of prompts in the `fixed` set, and the n of n / ln n."""
    num_init_batches: int = 256
    """Minibatches over which the checkpoint's own loss L(w0) is averaged."""
    batch_size: int = 256
    """Prompts in each chain's minibatch."""
    minibatches: Minibatches = "fixed"
    """Minibatches of one set of `num_samples` prompts (`fixed`), or of new prompts every time (`fresh`)."""
    loss: SampledLoss = "mse"
    """Squared error per target over all positions (`mse`), or over the first K', with K' uniform on 1..K (`subsequence`)."""
    steps: str = "all"
    """Saved steps to estimate at: `all`, `last`, a list such as 1,2,3, or a range 0:1000:100, which includes its end."""
    memory: float | None = None
    """GiB of memory for the chains that run at the same time. By default 2, or on CUDA half of the free memory."""

    section: ClassVar[str] = "sampler"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_steps(self.steps)
        require(
            self.minibatches == "fresh" or self.num_samples % self.batch_size == 0,
            f"`sampler.num_samples` must be a multiple of `sampler.batch_size` for `fixed` minibatches, got "
            f"{self.num_samples} and {self.batch_size}.",
        )


@dataclass(frozen=True, kw_only=True)
class SeedsConfig:
    """Seeds, one for each source of randomness. Changing one leaves the draws of the others as they are."""

    model: int = 0
    """Seed for the initial weights."""
    tasks: int = 0
    """Seed for the sequence of tasks, whose first M are the pool."""
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
    """Several runs trained in one process as stacked parameters, one for each combination of the lists."""

    seeds: tuple[int, ...] | None = None
    """Seeds, such as 0,1,2. Each sets `seeds.model`, `seeds.data` and `seeds.noise` of a member; other seeds are shared."""
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
            require(len(set(parsed)) == len(parsed), f"`population.{name}` has a value twice: {values!r}.")
            object.__setattr__(self, name, parsed)
        for seed in self.seeds or ():
            require_count("population.seeds", seed, 0)

    def __bool__(self) -> bool:
        return self.seeds is not None or self.num_tasks is not None


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All settings of a run, or of several runs (`population`). The defaults are the preset `quickstart`."""

    preset: str = "quickstart"
    """Name of the preset that this configuration started from; see `icl.presets`."""
    run_name: str | None = None
    """Folder of the run below $LOCAL_ROOT. By default its name is the preset with the settings that differ from it."""
    task: TaskConfig = TaskConfig()
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    trainer: TrainerConfig = TrainerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    early_stopping: EarlyStoppingConfig = EarlyStoppingConfig()
    checkpoints: CheckpointsConfig = CheckpointsConfig()
    seeds: SeedsConfig = SeedsConfig()
    population: PopulationConfig = PopulationConfig()
    sampler: SamplerConfig = SamplerConfig()

    def __post_init__(self) -> None:
        require(isinstance(self.preset, str), f"`preset` must be text, got {self.preset!r}.")
        if self.run_name is not None:
            require_run_name(str(self.run_name))
        self._check_schedule()
        grid = self.checkpoints
        num_saved = grid.num_log + grid.num_linear + (self.trainer.max_steps // grid.every if grid.every else 0)
        require(
            num_saved <= MAX_CHECKPOINTS,
            "`checkpoints.every`, `checkpoints.num_log` and `checkpoints.num_linear` ask for about "
            f"{num_saved:,} checkpoints in {self.trainer.max_steps:,} steps. At most {MAX_CHECKPOINTS:,} can be saved.",
        )
        require(
            self.early_stopping.patience is None or self.evaluation.every is not None,
            "`early_stopping.patience` is set, but `evaluation.every` is not. Early stopping needs evaluations.",
        )

    def _check_schedule(self) -> None:
        steps = self.schedule_steps
        require(
            self.optim.schedule != "triangle" or self.trainer.max_steps <= steps,
            f"`trainer.max_steps` ({self.trainer.max_steps}) must not exceed `optim.schedule_steps` ({steps}), because the "
            "learning rate is zero after it.",
        )
        warmup = self.optim.warmup_steps
        require(
            self.optim.schedule != "triangle" or warmup is None or warmup < steps,
            f"`optim.warmup_steps` ({warmup}) must be below the schedule's {steps} steps. Lower it or raise "
            "`optim.schedule_steps`.",
        )

    @property
    def schedule_steps(self) -> int:
        """Length of the learning rate's schedule in steps."""
        return self.optim.schedule_steps or self.trainer.max_steps

    def members(self) -> list["RunConfig"]:
        """Return the configurations of the population's runs, each as it would be for that run alone.

        A run without a population is its own only member. If the population has a `run_name`, its runs lie in that folder.
        """
        if not self.population:
            return [self]
        seeds, diversities = self.population.seeds or (None,), self.population.num_tasks or (None,)
        return [self._member(seed, num_tasks) for num_tasks in diversities for seed in seeds]

    def _member(self, seed: int | None, num_tasks: int | float | None) -> "RunConfig":
        settings = {"num_tasks": num_tasks, "seed": seed}
        name = ",".join(f"{key}={value}" for key, value in settings.items() if value is not None)
        return dataclasses.replace(
            self,
            run_name=None if self.run_name is None else f"{self.run_name}/{name}",
            task=self.task if num_tasks is None else dataclasses.replace(self.task, num_tasks=num_tasks),
            seeds=self.seeds if seed is None else dataclasses.replace(self.seeds, model=seed, data=seed, noise=seed),
            population=PopulationConfig(),
        )

    def shared_settings(self) -> dict[str, Any]:
        """Return the settings, by dotted key, that runs must share to be trained as one population."""
        return {
            key: value
            for key, value in flatten(self.to_dict()).items()
            if key not in MEMBER_SETTINGS and key.partition(".")[0] not in MEMBER_SETTINGS
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the tree as nested dicts of plain values. Infinity becomes the text `inf`."""
        return _plain(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> "RunConfig":
        """Return the configuration of a tree that `to_dict` made.

        Raises:
            ConfigError: If a key is unknown or a value cannot be used.
        """
        sections = {field.name: field.type for field in dataclasses.fields(cls)}
        values: dict[str, Any] = {}
        for name, value in tree.items():
            kind = sections.get(name)
            if dataclasses.is_dataclass(kind) and not isinstance(value, dict):
                raise ConfigError(f"The section `{name}` must hold settings by name, got {value!r}.")
            if name == "sampler":
                value = _with_usable_steps(value)
            try:
                values[name] = kind(**value) if dataclasses.is_dataclass(kind) and isinstance(kind, type) else value
            except TypeError as error:
                raise ConfigError(
                    f"The section `{name}` has a key or value that this version does not know: {error}."
                ) from None
        try:
            return cls(**values)
        except TypeError as error:
            raise ConfigError(f"The configuration has a key that this version does not know: {error}.") from None


def _with_usable_steps(sampler: dict[str, Any]) -> dict[str, Any]:
    """Return a run's sampler settings with its `steps`, or with `all`: 0.1.0 trained with any text there."""
    try:
        require_steps(sampler.get("steps", "all"))
    except ConfigError:
        return {**sampler, "steps": "all"} if isinstance(sampler["steps"], str) else sampler
    return sampler


def _plain(value: Any) -> Any:
    """Convert to values that YAML and JSON can hold."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, tuple):
        return [_plain(inner) for inner in value]
    return "inf" if value == math.inf else value


def is_free_on_resume(key: str) -> bool:
    """Return whether a dotted key, or its section, is in `FREE_ON_RESUME`."""
    return key in FREE_ON_RESUME or key.partition(".")[0] in FREE_ON_RESUME


def flatten(tree: dict[str, Any]) -> dict[str, Any]:
    """Flatten a nested dict to dotted keys: `{"task": {"num_tasks": 1}}` becomes `{"task.num_tasks": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{inner}": leaf for inner, leaf in flatten(value).items()}
        else:
            flat[key] = value
    return flat
