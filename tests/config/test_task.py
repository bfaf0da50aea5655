"""The section `task`: worlds that have no meaning are refused in one sentence, and older configurations mean what they meant."""

import dataclasses
import math
from pathlib import Path

import pytest

from icl.config import OptimConfig, PopulationConfig, RunConfig, TaskConfig, flatten
from icl.config.task import WORLD_SETTINGS
from icl.config.tree import LATER_SETTINGS, PRESETS_OF_WORLDS
from icl.config.validation import ConfigError
from icl.presets import PRESETS
from icl.resolve import resolve
from icl.run_names import run_name, varying_names
from icl.sweeps.points import sweep_points
from icl.sweeps.schema import read_sweep_file

LATER_OF_REGRESSION = {key: value for key, value in LATER_SETTINGS.items() if not key.startswith("language.")}
SWEEPS = Path(__file__).resolve().parents[2] / "sweeps"
WORLDS = (
    {"prior": "student_t", "prior_df": 3},
    {"prior": "laplace", "noise": "laplace"},
    {"prior": "sparse", "prior_density": 1, "noise": "student_t", "noise_df": 2.5},
    {"prior": "low_rank", "prior_rank": 2, "inputs": "student_t", "input_df": 5},
    {"prior": "mixture", "prior_components": 2, "prior_between": 0, "inputs": "ar1", "input_correlation": -0.5},
    {"pool": "resampled", "pool_steps": 1, "prior": "laplace"},
    {"pool": "walk", "pool_steps": 2**40},
)


@pytest.mark.parametrize("world", WORLDS, ids=str)
def test_a_world_survives_a_dict(world):
    config = RunConfig(task=TaskConfig(**world))
    assert RunConfig.from_dict(config.to_dict()) == config
    assert not config.task.is_usual


def test_the_defaults_are_the_usual_world():
    task = TaskConfig()
    assert task.is_usual
    assert not task.has_moving_pool
    assert dataclasses.asdict(task).items() >= WORLD_SETTINGS.items()


CONTRADICTIONS = {
    "law without its parameter": ({"prior": "student_t"}, "`task.prior` is student_t, but `task.prior_df` is not set"),
    "noise without its parameter": ({"noise": "student_t"}, "`task.noise_df` is not set"),
    "inputs without their parameter": ({"inputs": "ar1"}, "`task.input_correlation` is not set"),
    "pool without its time scale": ({"pool": "walk"}, "`task.pool_steps` is not set"),
    "mixture without a share": ({"prior": "mixture", "prior_components": 3}, "`task.prior_between` is not set"),
    "parameter without its law": ({"prior_df": 3}, "`task.prior_df` has no effect if `task.prior` is gaussian"),
    "time scale of a fixed pool": ({"pool_steps": 3}, "Set `task.pool` to resampled or walk"),
    "infinite variance": ({"noise": "student_t", "noise_df": 2}, "`task.noise_df` must be above 2, .* got 2"),
    "density above one": ({"prior": "sparse", "prior_density": 1.5}, "`task.prior_density` must be at most 1, got 1.5"),
    "no density": ({"prior": "sparse", "prior_density": 0}, "`task.prior_density` must be positive"),
    "rank above D": ({"prior": "low_rank", "prior_rank": 3}, r"`task.prior_rank` \(3\) must be at most"),
    "one component": (
        {"prior": "mixture", "prior_components": 1, "prior_between": 0.5},
        "`task.prior_components` must be a whole number of at least 2",
    ),
    "all variance between": (
        {"prior": "mixture", "prior_components": 2, "prior_between": 1},
        "`task.prior_between` must be below 1, got 1",
    ),
    "correlation of one": (
        {"inputs": "ar1", "input_correlation": 1},
        "`task.input_correlation` must be between -1 and 1, got 1",
    ),
    "law of no noise": ({"noise": "laplace", "noise_variance": 0}, "`task.noise_variance` is 0, so there is no noise"),
    "pool of infinitely many": (
        {"pool": "walk", "pool_steps": 9, "num_tasks": math.inf},
        "`task.num_tasks` is inf, so there is no pool",
    ),
    "walk of other tasks": ({"pool": "walk", "pool_steps": 9, "prior": "laplace"}, "Set `task.pool` to resampled"),
    "too slow a walk": ({"pool": "walk", "pool_steps": 2**40 + 1}, "set `task.pool` to fixed"),
    "imported tasks that move": (
        {"pool": "walk", "pool_steps": 9, "imported_tasks": "unknown"},
        "The tasks of an imported run are fixed",
    ),
    "unknown law": ({"prior": "cauchy"}, "`task.prior` must be one of gaussian, student_t"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradiction_is_refused_and_named(case, as_users_run):
    settings, message = CONTRADICTIONS[case]
    with pytest.raises(ConfigError, match=message) as error:
        TaskConfig(**settings)
    assert "\n" not in str(error.value)


def test_a_population_with_a_member_without_a_pool_is_refused():
    with pytest.raises(ConfigError, match=r"`population\.num_tasks` contains inf, for which there is no pool"):
        RunConfig(task=TaskConfig(pool="walk", pool_steps=9), population=PopulationConfig(num_tasks=(8, math.inf)))


# Older configurations


def test_settings_that_came_later_are_saved_only_if_they_were_changed():
    """The tree of a default run is that of version 0.1.0, so saved settings, names and hashes are those of 0.1.0."""
    tree = RunConfig().to_dict()
    assert set(tree["task"]) == {"num_tasks", "task_size", "max_examples", "noise_variance", "imported_tasks"}
    assert not set(flatten(tree)) & set(LATER_SETTINGS)
    assert RunConfig.from_dict(tree) == RunConfig()
    every = RunConfig().all_settings()
    assert every.items() >= LATER_OF_REGRESSION.items()
    assert flatten(tree).items() <= every.items()
    changed = RunConfig(task=TaskConfig(pool="walk", pool_steps=9), optim=OptimConfig(weight_decay=0.1))
    added = set(flatten(changed.to_dict())) - set(flatten(tree))
    assert added == {"task.pool", "task.pool_steps", "optim.weight_decay"}


def test_presets_of_regression_runs_do_not_change_later_settings():
    """Otherwise a saved run that has the default would get the preset's value when its settings are resolved again."""
    for config in PRESETS.values():
        if not config.model.is_language and config.preset not in PRESETS_OF_WORLDS:
            assert config.all_settings().items() >= LATER_OF_REGRESSION.items()


def test_presets_of_other_worlds_save_all_settings_of_the_task():
    """So a setting that was changed back to its default stays the default when the saved settings are resolved again."""
    assert {name for name, config in PRESETS.items() if not config.task.is_usual} == PRESETS_OF_WORLDS
    for name in PRESETS_OF_WORLDS:
        usual = TaskConfig(num_tasks=8)
        config = dataclasses.replace(PRESETS[name], task=usual)
        assert resolve(config.to_dict()) == config


def test_a_name_says_how_runs_differ_in_a_setting_that_one_of_them_leaves_out():
    walk = RunConfig(task=TaskConfig(pool="walk", pool_steps=9))
    assert varying_names([RunConfig(), walk]) == ["pool=fixed, pool_steps=None", "pool=walk, pool_steps=9"]


def test_names_of_runs_are_as_before():
    assert run_name(RunConfig()) == "quickstart"
    assert run_name(RunConfig(task=TaskConfig(pool="walk", pool_steps=9))) == "quickstart,pool=walk,pool_steps=9"


@pytest.mark.parametrize(
    ("file", "job"),
    [
        ("training-runs/quickstart", "c6f6d82d6e2761b8"),
        ("analysis/quickstart-llcs", "908af95317aa1d03"),
        ("training-runs/implicit-prior", "30058ec1e7464829"),
    ],
)
def test_jobs_of_older_sweeps_keep_their_hashes(file, job):
    """The hashes are those of the versions in which the sweeps came. With other hashes, failures and results of a sweep would be forgotten."""
    assert sweep_points(read_sweep_file(SWEEPS / f"{file}.yaml"))[0].job == job


def test_jobs_of_other_worlds_have_other_hashes():
    points = sweep_points(read_sweep_file(SWEEPS / "training-runs" / "moving-pool.yaml"))
    assert len({point.job for point in points}) == len(points) == 32
