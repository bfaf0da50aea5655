"""Settings of a run: a tree of frozen dataclasses, documented and validated.

A run is a pure function of one `RunConfig`. The leaves of the tree are plain values, and the whole tree is saved with the run
and in every checkpoint. `icl.presets` has the published settings. `icl.resolve` reads files and command lines.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from icl.config.sampler import SamplerConfig
from icl.config.sections import (
    CheckpointsConfig,
    EarlyStoppingConfig,
    EvaluationConfig,
    ModelConfig,
    OptimConfig,
    PopulationConfig,
    SeedsConfig,
    TaskConfig,
    TrainerConfig,
)
from icl.config.validation import ConfigError, require, require_run_name, require_steps

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
