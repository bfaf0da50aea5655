"""Every sweep file in the repository is valid, and its points have different configurations."""

import itertools
import math
from functools import cache
from pathlib import Path

import pytest
import yaml

from icl.config import flatten
from icl.presets import preset
from icl.sweeps.points import sweep_points
from icl.sweeps.schema import read_sweep_file

ROOT = Path(__file__).parents[2] / "sweeps"
FILES = sorted(ROOT.rglob("*.yaml"))
TRAINING = {path.stem: path for path in (ROOT / "training-runs").glob("*.yaml")}
NUM_POINTS = {
    "L2H4Minf": 5,
    "L2H4Mfin": 21,
    "raventos-base": 21,
    "raventos-small": 21,
    "carroll": 30,
    "icr-diversity": 21,
    "quickstart": 4,
    "implicit-prior": 8,
    "moving-pool": 32,
    "prior-ladder": 15,
    "transience": 4,
    "worlds": 27,
}


def num_values(tree) -> int:
    """Return the number of points of W&B's `parameters`, counted without our reader."""
    entries = tree.values()
    return math.prod(
        num_values(entry["parameters"]) if "parameters" in entry else len(entry.get("values", [None]))
        for entry in entries
    )


@cache
def points_of(path):
    return sweep_points(read_sweep_file(path))


def configs(name):
    return [point.config for point in points_of(TRAINING[name])]


def diversities(name):
    return [config.task.num_tasks for config in configs(name)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_grid_has_as_many_points_as_the_product_of_its_values(path):
    tree = yaml.safe_load(path.read_text())
    points = points_of(path)
    assert tree["method"] == "grid"
    assert len(points) == num_values(tree["parameters"]) == len({point.name for point in points})


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_a_point_sets_arrives_in_its_configuration(path):
    for point in points_of(path):
        resolved = flatten(point.config.to_dict())
        assert {key: resolved[key] for key in flatten(point.settings)} == flatten(point.settings)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_says_what_it_is_and_starts_our_own_program(path):
    text = path.read_text()
    tree = yaml.safe_load(text)
    assert tree["command"][:2] == ["${env}", "icl"]
    assert text.startswith("# ")
    assert "# Cost: " in text
    assert tree["name"] == path.stem


def test_there_are_the_files_that_the_readme_promises():
    assert {name: len(configs(name)) for name in TRAINING} == NUM_POINTS


def test_the_five_seeds_of_l2h4_differ_in_model_data_and_noise_only():
    seeds = [config.seeds for config in configs("L2H4Minf")]
    assert [(seed.model, seed.data, seed.noise) for seed in seeds] == [(k, k, k) for k in range(5)]
    assert {(seed.tasks, seed.evaluation) for seed in seeds} == {(0, 0)}


@pytest.mark.parametrize("name", ["L2H4Minf", "L2H4Mfin"])
def test_l2h4_has_the_published_settings(name):
    for config in configs(name):
        assert config.model.double_residual
        assert config.task.max_examples == 8
        assert (config.optim.lr, config.optim.schedule) == (3e-3, "triangle")
        assert (config.trainer.max_steps, config.trainer.batch_size) == (500_000, 256)


def test_the_ladders_of_task_diversity():
    assert set(diversities("L2H4Minf")) == {math.inf}
    assert diversities("L2H4Mfin") == [2**k for k in range(21)]
    for name in ("raventos-base", "raventos-small", "icr-diversity"):
        assert diversities(name) == [*(2**k for k in range(1, 21)), math.inf]


def test_carrolls_ladder_climbs_in_about_half_octaves_and_holds_the_papers_values():
    *finite, last = diversities("carroll")
    assert last == math.inf
    assert (finite[0], finite[-1]) == (1, 2**15)
    assert {6, 8, 16, 24, 128, 182, 256, 362} <= set(finite)
    assert set(finite) >= {2**k for k in range(16)}
    ratios = [after / before for before, after in itertools.pairwise(finite[2:])]
    assert all(1.3 <= ratio <= 1.51 or (ratio == 2) for ratio in ratios)
    assert ratios.count(2) == 1  # the paper's text goes from 8 to 16


def test_the_diversity_experiment_has_the_settings_of_its_command():
    for config in configs("icr-diversity"):
        assert (config.trainer.max_steps, config.trainer.batch_size) == (500_000, 2048)
        assert (config.optim.schedule, config.optim.warmup_steps, config.optim.lr) == ("triangle", 50_000, 1e-3)
        assert (config.early_stopping.patience, config.early_stopping.min_delta) == (10, 0.001)
        assert (config.checkpoints.every, config.evaluation.every) == (50_000, 10_000)
        assert config.model == preset("icr").model


def test_quickstart_is_tiny():
    assert all(config.trainer.max_steps <= 500 for config in configs("quickstart"))
