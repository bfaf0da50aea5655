"""The section `task` of a run's settings: the distributions from which prompts are drawn.

By default, tasks w, inputs x and noise are Gaussian, and the pool of M tasks never changes. Settings can change four parts: the prior of the
tasks, the noise, the inputs, and how the pool changes during training. Every distribution has the variance of the Gaussian that it replaces,
so the losses of runs with different distributions can be compared. The distributions are defined in `icl.tasks.laws`, and the
pools in `icl.tasks.pools`.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from icl.config.validation import Bound, is_table_name, parse_num_tasks, require, validate

MAX_POOL_STEPS = 2**40
"""Largest value of `pool_steps`. A walk is computed from a binary tree over the steps. With this limit, the tree has at most 46 levels."""


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """In-context linear regression: y_k = w . x_k + noise, where w is one of the M tasks of a pool, or a new task from the prior."""

    num_tasks: int | float = 64
    """Task diversity M, the number of tasks in the pool; `inf` means that every prompt has a new task from the prior."""
    task_size: int = 2
    """Input dimension D."""
    max_examples: int = 8
    """Number K of examples per prompt. The model reads 2K - 1 tokens x1, y1, ..., xK."""
    noise_variance: float = 0.25
    """Noise variance sigma^2 of the targets (not the standard deviation)."""
    imported_tasks: str | None = None
    """Only for imported runs, and set by `icl import`: the digest of the table of training tasks, or `unknown` if the run was imported
    without its tasks. In all other runs, the tasks are drawn with the seed `seeds.tasks`."""
    prior: Literal["gaussian", "student_t", "laplace", "sparse", "low_rank", "mixture"] = "gaussian"
    """Prior of the tasks, from which the pool is drawn. `gaussian`: N(0, I). `student_t` or `laplace`: heavy-tailed coordinates.
    `sparse`: each coordinate is zero with probability 1 - `prior_density`. `low_rank`: vectors in one random subspace. `mixture`: a
    mixture of Gaussians."""
    prior_df: float | None = None
    """Degrees of freedom of the prior `student_t`, above 2."""
    prior_density: float | None = None
    """Probability p (at most 1) that a coordinate of a `sparse` task is not zero."""
    prior_rank: int | None = None
    """Dimension of the subspace of `low_rank` tasks, at most D."""
    prior_components: int | None = None
    """Number of Gaussians of the prior `mixture`, at least 2."""
    prior_between: float | None = None
    """Fraction of the variance of the prior `mixture` that comes from the means of its Gaussians. It must be at least 0 and below 1."""
    noise: Literal["gaussian", "student_t", "laplace"] = "gaussian"
    """Distribution of the noise. Its variance is `noise_variance`."""
    noise_df: float | None = None
    """Degrees of freedom of the noise `student_t`, above 2."""
    inputs: Literal["gaussian", "student_t", "ar1"] = "gaussian"
    """Distribution of the inputs. `gaussian`: N(0, I). `student_t`: heavy-tailed coordinates. `ar1`: Gaussian inputs, each of which is
    correlated with the previous input."""
    input_df: float | None = None
    """Degrees of freedom of the inputs `student_t`, above 2."""
    input_correlation: float | None = None
    """Correlation between consecutive inputs of `ar1`, between -1 and 1."""
    pool: Literal["fixed", "resampled", "walk"] = "fixed"
    """How the pool changes during training. `fixed`: not at all. `resampled`: new tasks every `pool_steps` steps. `walk`: every task
    changes gradually and at random."""
    pool_steps: int | None = None
    """Speed at which the pool changes. `resampled`: number of steps after which the tasks are replaced. `walk`: number of steps after which
    the correlation between a task and its earlier value has fallen to 1 / e."""

    def __post_init__(self) -> None:
        counts = {"task_size": 1, "max_examples": 1, "prior_rank": 1, "prior_components": 2, "pool_steps": 1}
        numbers: dict[str, Bound] = {"noise_variance": "zero or positive", "prior_density": "positive"}
        numbers |= {"prior_between": "zero or positive", "input_correlation": "a number"}
        numbers |= dict.fromkeys(("prior_df", "noise_df", "input_df"), "positive")
        validate("task", self, counts=counts, numbers=numbers)
        pool = self.imported_tasks
        require(
            pool is None or is_table_name(pool),
            f"`task.imported_tasks` must be a digest that `icl import` wrote, `unknown` or none, got {pool!r}.",
        )
        object.__setattr__(self, "num_tasks", parse_num_tasks(self.num_tasks))
        self._check_parameters()
        self._check_bounds()
        self._check_world()

    @property
    def is_gaussian(self) -> bool:
        """Whether every training prompt has a new task (M = inf)."""
        return self.num_tasks == math.inf

    @property
    def has_moving_pool(self) -> bool:
        """Whether the tasks of the pool change during training."""
        return self.pool != "fixed"

    @property
    def is_usual(self) -> bool:
        """Whether tasks, noise and inputs are Gaussian and the pool is fixed. If so, ridge and dMMSE are the Bayes predictors."""
        return (self.prior, self.noise, self.inputs, self.pool) == ("gaussian", "gaussian", "gaussian", "fixed")

    @property
    def world(self) -> str:
        """The settings of prior, noise, inputs and pool that differ from the defaults, such as `prior laplace, pool walk, pool_steps 30`.

        The string is empty if none differ.
        """
        changed = {name: getattr(self, name) for name in WORLD_SETTINGS}
        changed = {name: value for name, value in changed.items() if value != WORLD_SETTINGS[name]}
        return ", ".join(f"{name} {value}" for name, value in changed.items())

    def _check_parameters(self) -> None:
        """Refuse a distribution without its parameter, and a parameter without its distribution."""
        for key, choices, parameter in _PARAMETERS:
            choice, value = getattr(self, key), getattr(self, parameter)
            if choice in choices:
                require(
                    value is not None,
                    f"`task.{key}` is {choice}, but `task.{parameter}` is not set. Set it to a number.",
                )
            else:
                require(
                    value is None,
                    f"`task.{parameter}` has no effect if `task.{key}` is {choice}. Set `task.{key}` to {' or '.join(choices)}.",
                )

    def _check_bounds(self) -> None:
        for name in ("prior_df", "noise_df", "input_df"):
            value = getattr(self, name)
            repair = "because otherwise Student's t has no finite variance"
            require(value is None or value > 2, f"`task.{name}` must be above 2, {repair}, got {value!r}.")
        require(
            self.pool_steps is None or self.pool_steps <= MAX_POOL_STEPS,
            f"`task.pool_steps` must be at most 2^40, got {self.pool_steps}. For tasks that never change, set `task.pool` to fixed.",
        )
        density, between, correlation = self.prior_density, self.prior_between, self.input_correlation
        require(density is None or density <= 1, f"`task.prior_density` must be at most 1, got {density!r}.")
        require(between is None or between < 1, f"`task.prior_between` must be below 1, got {between!r}.")
        require(
            correlation is None or abs(correlation) < 1,
            f"`task.input_correlation` must be between -1 and 1, got {correlation!r}.",
        )
        require(
            self.prior_rank is None or self.prior_rank <= self.task_size,
            f"`task.prior_rank` ({self.prior_rank}) must be at most `task.task_size` ({self.task_size}).",
        )

    def _check_world(self) -> None:
        """Refuse settings that contradict each other."""
        require(
            self.noise == "gaussian" or self.noise_variance > 0,
            f"`task.noise` is {self.noise}, but `task.noise_variance` is 0, so there is no noise. Set a positive variance, or set "
            "`task.noise` to gaussian.",
        )
        require(
            not self.has_moving_pool or not self.is_gaussian,
            f"`task.pool` is {self.pool}, but `task.num_tasks` is inf, so there is no pool. Set a finite number of tasks.",
        )
        require(
            self.pool != "walk" or self.prior == "gaussian",
            f"`task.pool` is walk, which works only with Gaussian tasks, but `task.prior` is {self.prior}. Set `task.pool` to resampled.",
        )
        require(
            self.imported_tasks is None or (self.prior == "gaussian" and not self.has_moving_pool),
            "The tasks of an imported run are fixed, so `task.prior` must be gaussian and `task.pool` must be fixed.",
        )


_PARAMETERS = (
    ("prior", ("student_t",), "prior_df"),
    ("prior", ("sparse",), "prior_density"),
    ("prior", ("low_rank",), "prior_rank"),
    ("prior", ("mixture",), "prior_components"),
    ("prior", ("mixture",), "prior_between"),
    ("noise", ("student_t",), "noise_df"),
    ("inputs", ("student_t",), "input_df"),
    ("inputs", ("ar1",), "input_correlation"),
    ("pool", ("resampled", "walk"), "pool_steps"),
)
"""Parameters of distributions and pools. Each entry is (setting, choices of this setting that need a parameter, name of the parameter)."""

WORLD_SETTINGS = {
    field.name: field.default
    for field in dataclasses.fields(TaskConfig)
    if field.name.startswith(("prior", "noise_df", "input", "pool")) or field.name == "noise"
}
"""Settings of prior, noise, inputs and pool, with their defaults. By default, all distributions are Gaussian and the pool is fixed."""
