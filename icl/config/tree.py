"""Settings of a run: a tree of frozen dataclasses, documented and validated.

The result of a run depends only on its `RunConfig`. The leaves of the tree are plain values, and the whole tree is saved with the run
and in every checkpoint. `icl.presets` has the settings of the papers. `icl.resolve` reads settings from files and command lines.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from icl.config.language import LanguageConfig
from icl.config.model import ModelConfig
from icl.config.sampler import SamplerConfig
from icl.config.sections import (
    CheckpointsConfig,
    EarlyStoppingConfig,
    EvaluationConfig,
    OptimConfig,
    PopulationConfig,
    SeedsConfig,
    TrainerConfig,
    is_free_on_resume,
)
from icl.config.task import WORLD_SETTINGS, TaskConfig
from icl.config.validation import ConfigError, require, require_run_name, require_steps

MAX_CHECKPOINTS = 1_000_000
"""Largest number of checkpoints of a run. A folder with more files is slow, and the list of the steps needs much memory."""
MEMBER_SETTINGS = ("run_name", "task.num_tasks", "task.pool", "task.pool_steps", "seeds", "checkpoints.store")
"""Settings and sections in which the members of a population may differ."""
_LANGUAGE_SETTINGS: dict[str, Any] = {
    "model.family": ModelConfig.family,
    "model.head_size": ModelConfig.head_size,
    "model.positions": ModelConfig.positions,
    "optim.weight_decay": OptimConfig.weight_decay,
}
"""Settings that were added with language models. The saved settings of a language run always include them."""
PRESETS_OF_WORLDS = frozenset(
    (
        *("student-t-tasks", "laplace-tasks", "sparse-tasks", "low-rank-tasks", "mixture-tasks", "student-t-noise"),
        *("laplace-noise", "student-t-inputs", "ar1-inputs", "resampled-pool", "walking-pool"),
    )
)
"""Presets with another prior, noise, distribution of inputs or pool than the defaults. A run with such a preset saves all settings of `task`,
including those that have their defaults. A setting that was left out would get the preset's value when the saved settings are read again."""
LATER_SETTINGS: dict[str, Any] = {
    **{f"task.{name}": default for name, default in WORLD_SETTINGS.items()},
    "model.num_components": ModelConfig.num_components,
    **_LANGUAGE_SETTINGS,
    "language.next_source": LanguageConfig.next_source,
    "language.change_step": LanguageConfig.change_step,
}
"""Settings that the first versions did not have: their dotted keys and defaults. With these defaults, `icl` does what the first versions did.
`to_dict` leaves out each of these settings if it has its default (the docstring of `to_dict` gives two exceptions). Saved settings, run names
and the hashes of sweeps are computed from `to_dict`. If you add a setting to `icl`, enter it in this table. The saved settings, names and
hashes of existing runs then stay the same."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All settings of a run, or of several runs (`population`). The defaults are the preset `quickstart`."""

    preset: str = "quickstart"
    """Name of the preset whose settings are the starting point, such as `L2H4`. README.md lists the presets."""
    run_name: str | None = None
    """Folder of the run below $LOCAL_ROOT. The default name consists of the preset's name and the settings that differ from the preset."""
    task: TaskConfig = TaskConfig()
    language: LanguageConfig = LanguageConfig()
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
        self._check_family()
        self._check_schedule()
        self._check_members()
        grid = self.checkpoints
        num_saved = grid.num_log + grid.num_linear + (self.trainer.max_steps // grid.every if grid.every else 0)
        require(
            num_saved <= MAX_CHECKPOINTS,
            "`checkpoints.every`, `checkpoints.num_log` and `checkpoints.num_linear` ask for about "
            f"{num_saved:,} checkpoints in {self.trainer.max_steps:,} steps. At most {MAX_CHECKPOINTS:,} can be saved.",
        )
        require(
            self.early_stopping.patience is None or self.evaluation.every is not None,
            "`early_stopping.patience` is set, but `evaluation.every` is not. Early stopping needs evaluations; set `evaluation.every` to a number of steps.",
        )

    def _check_members(self) -> None:
        require(
            not self.task.has_moving_pool or math.inf not in (self.population.num_tasks or ()),
            f"`task.pool` is {self.task.pool}, but `population.num_tasks` contains inf, for which there is no pool. Remove inf, or "
            "set `task.pool` to fixed.",
        )

    def _check_family(self) -> None:
        """Refuse settings of the other family of models, because they would have no effect."""
        unused, other = ("task", RunConfig.task) if self.model.is_language else ("language", RunConfig.language)
        for field in dataclasses.fields(other):
            value = getattr(getattr(self, unused), field.name)
            require(
                value == getattr(other, field.name),
                f"`{unused}.{field.name}` ({value!r}) has no effect on a {self.model.family} run. Leave it out, or change `model.family`.",
            )
        require(
            not self.model.is_language or self.population.num_tasks is None,
            "`population.num_tasks` has no effect on a language run; use `population.seeds`.",
        )

    def _check_schedule(self) -> None:
        steps = self.schedule_steps
        require(
            self.optim.schedule != "triangle" or self.trainer.max_steps <= steps,
            f"`trainer.max_steps` ({self.trainer.max_steps}) must not exceed `optim.schedule_steps` ({steps}), because the "
            "learning rate is zero after the end of the schedule.",
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
        """Return the configuration of each run in the population. Each configuration is the same as if the run were trained alone.

        Without a population, the list contains only this configuration. If the population has a `run_name`, its runs are in subfolders of
        the folder of that name.
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
        """Return the settings that runs must share to be trained as one population. The keys are dotted names, such as `optim.lr`."""
        return {
            key: value
            for key, value in flatten(_plain(dataclasses.asdict(self))).items()
            if key not in MEMBER_SETTINGS and key.partition(".")[0] not in MEMBER_SETTINGS
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the tree as nested dicts of plain values. Infinity becomes the string `inf`.

        Settings of `LATER_SETTINGS` are left out if they have their defaults. There are two exceptions. A language run includes all
        settings of `_LANGUAGE_SETTINGS`. A run with a preset of `PRESETS_OF_WORLDS` includes all settings of `task`. A regression run has no
        section `language`.
        """
        tree = self._tree()
        for key, default in LATER_SETTINGS.items():
            section, _, name = key.partition(".")
            is_needed = self.model.is_language and key in _LANGUAGE_SETTINGS
            is_needed |= section == "task" and self.preset in PRESETS_OF_WORLDS
            if section in tree and tree[section][name] == default and not is_needed:
                del tree[section][name]
        return tree

    def all_settings(self) -> dict[str, Any]:
        """Return all settings as plain values, including those that `to_dict` leaves out. The keys are dotted names, such as `optim.lr`.

        For a regression run, the section `language` is left out.
        """
        return flatten(self._tree())

    def _tree(self) -> dict[str, Any]:
        tree: dict[str, Any] = _plain(dataclasses.asdict(self))
        if not self.model.is_language:
            del tree["language"]
        return tree

    @property
    def num_positions(self) -> int:
        """Number of positions at which a model of this run predicts: K, or `context_size` - 1 for a row of text."""
        return self.language.num_predictions if self.model.is_language else self.task.max_examples

    @property
    def num_tokens(self) -> int:
        """Number of tokens of one prompt, 2K with the last target; or number of predicted tokens of one row of text, `context_size` - 1."""
        return self.language.num_predictions if self.model.is_language else 2 * self.task.max_examples

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> "RunConfig":
        """Build a configuration from a tree that `to_dict` returned.

        Raises:
            ConfigError: If a key is unknown or a value cannot be used.
        """
        sections = {field.name: field.type for field in dataclasses.fields(cls)}
        values: dict[str, Any] = {}
        for name, value in tree.items():
            kind = sections.get(name)
            if dataclasses.is_dataclass(kind) and not isinstance(value, dict):
                raise ConfigError(
                    f"The section `{name}` must be a table of names and values of settings, got {value!r}."
                )
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
    """Return sampler settings in which unusable `steps` are replaced by `all`. Version 0.1.0 accepted any text as `steps`."""
    try:
        require_steps(sampler.get("steps", "all"))
    except ConfigError:
        return {**sampler, "steps": "all"} if isinstance(sampler["steps"], str) else sampler
    return sampler


def _plain(value: Any) -> Any:
    """Convert a value to dicts, lists, numbers and text, which YAML and JSON can represent."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, tuple):
        return [_plain(inner) for inner in value]
    return "inf" if value == math.inf else value


def flatten(tree: dict[str, Any]) -> dict[str, Any]:
    """Flatten a nested dict to dotted keys: `{"task": {"num_tasks": 1}}` becomes `{"task.num_tasks": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{inner}": leaf for inner, leaf in flatten(value).items()}
        else:
            flat[key] = value
    return flat


def config_differences(old: RunConfig, new: RunConfig) -> list[str]:
    """Return a phrase for each setting that affects training and differs between the two configurations. `run_name` and `preset` are not compared."""
    before, after = (flatten(dataclasses.asdict(config)) for config in (old, new))
    return [
        f"`{key}` was {_plain(before[key])!r} and is now {_plain(after[key])!r}"
        for key in after
        if key not in ("run_name", "preset") and not is_free_on_resume(key) and before[key] != after[key]
    ]
