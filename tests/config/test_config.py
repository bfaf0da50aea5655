"""The configuration tree: defaults, round trips, and one helpful sentence for each setting that cannot be used."""

import dataclasses
import math

import numpy as np
import pytest
import yaml

from icl.config import (
    CheckpointsConfig,
    EarlyStoppingConfig,
    EvaluationConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    SamplerConfig,
    SeedsConfig,
    TaskConfig,
    TrainerConfig,
    flatten,
)
from icl.config.validation import ConfigError, parse_num_tasks
from icl.presets import PRESETS, preset

NAMES = (
    "quickstart",
    "L2H4",
    "raventos-base",
    "raventos-small",
    "carroll",
    "icr",
    "L2W256",
    "language-quickstart",
    "prior-quickstart",
    "transience",
    "student-t-tasks",
    "laplace-tasks",
    "sparse-tasks",
    "low-rank-tasks",
    "mixture-tasks",
    "student-t-noise",
    "laplace-noise",
    "student-t-inputs",
    "ar1-inputs",
    "resampled-pool",
    "walking-pool",
)


def test_defaults_are_the_preset_quickstart():
    assert preset("quickstart") == RunConfig()


def test_the_presets_are_the_promised_ones():
    assert set(PRESETS) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_preset_carries_its_own_name(name):
    assert preset(name).preset == name


@pytest.mark.parametrize("name", NAMES)
def test_preset_survives_a_dict(name):
    assert RunConfig.from_dict(preset(name).to_dict()) == preset(name)


@pytest.mark.parametrize("name", NAMES)
def test_preset_survives_yaml(name):
    assert RunConfig.from_dict(yaml.safe_load(yaml.safe_dump(preset(name).to_dict()))) == preset(name)


@pytest.mark.parametrize("name", NAMES)
def test_saved_config_holds_plain_finite_values_only(name):
    for key, value in flatten(preset(name).to_dict()).items():
        assert value is None or type(value) in (int, float, bool, str), key
        assert not (isinstance(value, float) and math.isinf(value)), key


def test_infinity_is_written_inf():
    assert preset("L2H4").to_dict()["task"]["num_tasks"] == "inf"


def test_published_settings_of_l2h4():
    """The settings of Hoogland et al. (PAPERS.md, 1.1)."""
    config = preset("L2H4")
    assert config.task == TaskConfig(num_tasks=math.inf, task_size=4, max_examples=8, noise_variance=0.125)
    assert (config.model.num_layers, config.model.num_heads) == (2, 4)
    assert (config.model.embed_size, config.model.mlp_size) == (64, 64)
    assert (config.optim.lr, config.optim.schedule, config.optim.beta1, config.optim.beta2) == (
        3e-3,
        "triangle",
        0.9,
        0.999,
    )
    assert (config.trainer.max_steps, config.trainer.batch_size) == (500_000, 256)
    assert not config.model.double_residual


def test_published_settings_of_raventos():
    """The settings of Raventos et al. (PAPERS.md, 4)."""
    config = preset("raventos-base")
    assert (config.task.task_size, config.task.max_examples, config.task.noise_variance) == (8, 16, 0.25)
    assert (config.model.num_layers, config.model.num_heads, config.model.embed_size) == (8, 2, 128)
    assert config.model.mlp_size == 4 * config.model.embed_size
    assert (config.optim.schedule, config.trainer.batch_size, config.trainer.max_steps) == ("triangle", 256, 500_000)


def test_unknown_preset_names_the_nearest_and_lists_all():
    with pytest.raises(ConfigError, match="no preset `L2H5`") as error:
        preset("L2H5")
    assert "Did you mean `L2H4`?" in str(error.value)
    assert all(name in str(error.value) for name in NAMES)


def test_the_tree_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunConfig().task.task_size = 3  # type: ignore[misc]


def test_fields_are_keyword_only():
    with pytest.raises(TypeError):
        TaskConfig(64)  # type: ignore[misc]


CONTRADICTIONS = {
    "steps that are none": (lambda: SamplerConfig(steps="foo"), "`sampler.steps` must be all, last, a list"),
    "steps that are no text": (lambda: SamplerConfig(steps=[1, 2]), "`sampler.steps` must be"),
    "patience without evaluation": (
        lambda: RunConfig(early_stopping=EarlyStoppingConfig(patience=3), evaluation=EvaluationConfig(every=None)),
        "`early_stopping.patience` .* `evaluation.every`",
    ),
    "triangle ends before training": (
        lambda: RunConfig(trainer=TrainerConfig(max_steps=200), optim=OptimConfig(schedule_steps=100)),
        r"`trainer.max_steps` \(200\) .* `optim.schedule_steps` \(100\)",
    ),
    "triangle never falls": (
        lambda: RunConfig(trainer=TrainerConfig(max_steps=100), optim=OptimConfig(warmup_steps=100)),
        r"`optim.warmup_steps` \(100\) must be below the schedule's 100 steps",
    ),
    "warmup of a constant rate": (
        lambda: OptimConfig(schedule="constant", warmup_steps=10),
        "`optim.warmup_steps` has no effect on a constant rate",
    ),
    "warmup without its length": (lambda: OptimConfig(schedule="warmup"), "`optim.warmup_steps` is not set"),
    "heads that do not divide the width": (
        lambda: ModelConfig(num_heads=3, embed_size=64),
        "`model.num_heads` must divide `model.embed_size`, got 3 heads and width 64",
    ),
    "batch that ranks cannot share": (
        lambda: TrainerConfig(batch_size=100, devices=4, num_nodes=2),
        "`trainer.batch_size` must be a multiple of the number of processes, got 100 for 8",
    ),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradiction_is_refused_and_named(case):
    make, message = CONTRADICTIONS[case]
    with pytest.raises(ConfigError, match=message):
        make()


IMPOSSIBLE = [
    (TaskConfig, "task", "task_size", (0, -1, 2.0, True, None, "4")),
    (TaskConfig, "task", "max_examples", (0, 1.5, None)),
    (TaskConfig, "task", "noise_variance", (-0.1, math.inf, math.nan, None, True, "0.1")),
    (ModelConfig, "model", "num_layers", (0, -2, None)),
    (ModelConfig, "model", "num_heads", (0,)),
    (ModelConfig, "model", "embed_size", (0,)),
    (ModelConfig, "model", "mlp_size", (0, 1.0)),
    (ModelConfig, "model", "layer_norm", (None, "Pre", True)),
    (ModelConfig, "model", "activation", ("tanh", None)),
    (ModelConfig, "model", "output", ("vector",)),
    (ModelConfig, "model", "init", ("xavier",)),
    (ModelConfig, "model", "double_residual", (None, 1, "yes")),
    (ModelConfig, "model", "attention_bias", (None, "false")),
    (OptimConfig, "optim", "lr", (0, 0.0, -1e-3, math.inf, math.nan, None)),
    (OptimConfig, "optim", "schedule", ("cosine", None)),
    (OptimConfig, "optim", "eps", (0.0,)),
    (OptimConfig, "optim", "warmup_steps", (0, 0.5)),
    (OptimConfig, "optim", "schedule_steps", (0, -5)),
    (OptimConfig, "optim", "grad_clip", (0, -1.0)),
    (OptimConfig, "optim", "beta1", (1.0, -0.1, math.nan, "a", None)),
    (OptimConfig, "optim", "beta2", (1.0, 2)),
    (TrainerConfig, "trainer", "max_steps", (0, 1e4, None)),
    (TrainerConfig, "trainer", "batch_size", (0,)),
    (TrainerConfig, "trainer", "log_every", (0,)),
    (TrainerConfig, "trainer", "devices", (0, "auto")),
    (TrainerConfig, "trainer", "num_nodes", (0,)),
    (TrainerConfig, "trainer", "accelerator", ("abacus", None)),
    (TrainerConfig, "trainer", "precision", (32, None)),
    (TrainerConfig, "trainer", "strategy", (None,)),
    (EvaluationConfig, "evaluation", "every", (0, -1, 1.5)),
    (EvaluationConfig, "evaluation", "num_prompts", (0, 1)),
    (EarlyStoppingConfig, "early_stopping", "patience", (0, 1.5)),
    (EarlyStoppingConfig, "early_stopping", "min_delta", (-1e-6, math.nan)),
    (EarlyStoppingConfig, "early_stopping", "monitor", (None, 3)),
    (CheckpointsConfig, "checkpoints", "every", (0,)),
    (CheckpointsConfig, "checkpoints", "num_log", (-1, None)),
    (CheckpointsConfig, "checkpoints", "num_linear", (-1, 2.5)),
    (SeedsConfig, "seeds", "model", (-1, 1.5, None)),
    (SeedsConfig, "seeds", "data", (2**63,)),
]


@pytest.mark.parametrize(
    ("section", "prefix", "name", "value"),
    [(section, prefix, name, value) for section, prefix, name, values in IMPOSSIBLE for value in values],
)
def test_impossible_value_is_refused_by_its_full_name_and_shown(section, prefix, name, value):
    with pytest.raises(ConfigError) as error:
        section(**{name: value})
    assert f"`{prefix}.{name}`" in str(error.value)
    assert str(value) in str(error.value)


@pytest.mark.parametrize("name", ["a", "sweep/seed=0", "L2H4,num_tasks=8", "x.y+z-1_2"])
def test_run_name_below_the_root_is_accepted(name):
    assert RunConfig(run_name=name).run_name == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "/abs", "a//b", "a/", "a b", "a\nb", "a\n", "x;rm", "$HOME", "a/./b"]
)
def test_run_name_that_leaves_the_root_or_needs_quoting_is_refused(name):
    with pytest.raises(ConfigError, match="`run_name` must be a folder below"):
        RunConfig(run_name=name)


def test_schedule_length_is_the_training_length_unless_given():
    assert RunConfig(trainer=TrainerConfig(max_steps=777)).schedule_steps == 777


def test_schedule_length_may_exceed_the_training_length():
    config = RunConfig(trainer=TrainerConfig(max_steps=100), optim=OptimConfig(schedule_steps=1000))
    assert config.schedule_steps == 1000


@pytest.mark.parametrize("value", ["inf", "Inf", " inf ", ".inf", "+inf", "+.inf", "infinity", "Infinity", math.inf])
def test_infinite_number_of_tasks_is_read_from_every_spelling(value):
    assert parse_num_tasks(value) == math.inf


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1, 1),
        (64, 64),
        (64.0, 64),
        ("64", 64),
        (" 64 ", 64),
        ("64.0", 64),
        ("1e3", 1000),
        (np.int64(64), 64),
        ("1_048_576", 2**20),
        (2**31 - 1, 2**31 - 1),
    ],
)
def test_finite_number_of_tasks_becomes_an_int(value, expected):
    assert parse_num_tasks(value) == expected
    assert type(parse_num_tasks(value)) is int


@pytest.mark.parametrize(
    "value",
    [
        0,
        -1,
        64.5,
        "64.5",
        None,
        True,
        False,
        "abc",
        "",
        "_",
        ".5",
        "-inf",
        -math.inf,
        math.nan,
        "nan",
        2**31,
        [64],
    ],
)
def test_other_number_of_tasks_is_refused_and_shown(value):
    with pytest.raises(ConfigError, match=r"whole number from 1 to 2\^31 - 1, or `inf`") as error:
        parse_num_tasks(value)
    assert repr(value) in str(error.value)


def test_number_of_tasks_is_normalised_in_the_tree():
    assert TaskConfig(num_tasks=64.0) == TaskConfig(num_tasks=64)


@pytest.mark.parametrize(("num_tasks", "expected"), [(math.inf, True), ("inf", True), (1, False)])
def test_gaussian_means_infinitely_many_tasks(num_tasks, expected):
    assert TaskConfig(num_tasks=num_tasks).is_gaussian is expected


@pytest.mark.parametrize(
    "tree",
    [{"task": {"num_taks": 3}}, {"tusk": {}}, {"task": None}, {"task": "abc"}, {"optim": {"lr": "fast"}}],
)
def test_saved_config_that_does_not_fit_is_one_sentence(tree):
    with pytest.raises(ConfigError) as error:
        RunConfig.from_dict(tree)
    assert "\n" not in str(error.value)


def test_saved_config_may_leave_settings_out():
    assert RunConfig.from_dict({"task": {"num_tasks": 8}}) == RunConfig(task=TaskConfig(num_tasks=8))


def test_a_run_of_0_1_0_with_steps_that_cannot_be_used_is_still_a_run():
    """Version 0.1.0 accepted any text as `steps`."""
    assert RunConfig.from_dict({"sampler": {"steps": "foo", "lr": 1e-5}}).sampler == SamplerConfig(lr=1e-5)


def test_config_error_is_a_value_error():
    assert issubclass(ConfigError, ValueError)


def test_flatten_joins_sections_with_dots():
    assert flatten({"a": {"b": {"c": 1}, "d": None}, "e": [2]}) == {"a.b.c": 1, "a.d": None, "e": [2]}
