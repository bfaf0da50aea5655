"""From files and command lines to a config: order of the sources, spellings, nearest keys, one-sentence errors, and run names."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import TINY, change

from icl.cli import main
from icl.command_line import llc_parser, train_parser
from icl.config import EarlyStoppingConfig, OptimConfig, RunConfig, SeedsConfig, TaskConfig, TrainerConfig, flatten
from icl.config.validation import ConfigError
from icl.config.values import known_keys, parse_scalar
from icl.presets import PRESETS, preset
from icl.resolve import (
    POINT_VARIABLE,
    read_config_file,
    read_points,
    refuse_conflicts,
    refuse_overridden,
    resolve,
)
from icl.run_names import MAX_SLUG, run_name, varying_names


def read_arguments(words):
    return train_parser().parse_args(words).settings


def value_of(config, key):
    return flatten(config.to_dict())[key]


def refusal(call, *arguments):
    with pytest.raises(ConfigError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


# Layers


def test_no_source_gives_the_defaults():
    assert resolve() == RunConfig()


def test_later_source_wins():
    config = resolve({"optim.lr": 0.1, "task.task_size": 5}, {"optim.lr": 0.2}, {"optim.lr": 0.3})
    assert (config.optim.lr, config.task.task_size) == (0.3, 5)


def test_preset_lies_under_every_source_even_when_named_last():
    config = resolve({"task.num_tasks": 7}, {"preset": "L2H4"})
    assert config == dataclasses.replace(preset("L2H4"), task=dataclasses.replace(preset("L2H4").task, num_tasks=7))


def test_last_preset_wins():
    assert resolve({"preset": "icr"}, {"preset": "carroll"}) == preset("carroll")


def test_nested_and_dotted_keys_mean_the_same():
    assert resolve({"optim": {"lr": 0.5}, "trainer.max_steps": 9}) == resolve(
        {"optim.lr": 0.5, "trainer": {"max_steps": 9}}
    )


def test_dotted_source_overrides_one_key_of_a_nested_one():
    config = resolve({"task": {"task_size": 3, "max_examples": 4}}, {"task.task_size": 6})
    assert (config.task.task_size, config.task.max_examples) == (6, 4)


@pytest.mark.parametrize("name", PRESETS)
def test_saved_tree_resolves_to_itself(name):
    assert resolve(preset(name).to_dict()) == preset(name)


def test_every_setting_of_the_tree_is_a_known_key():
    assert set(known_keys()) == set(flatten(dataclasses.asdict(RunConfig())))


# What people write


@pytest.mark.parametrize(
    ("key", "written", "expected"),
    [
        ("task.num_tasks", "inf", "inf"),
        ("task.num_tasks", ".inf", "inf"),
        ("task.num_tasks", "Infinity", "inf"),
        ("task.num_tasks", math.inf, "inf"),
        ("task.num_tasks", "1_024", 1024),
        ("task.num_tasks", 64.0, 64),
        ("evaluation.every", "None", None),
        ("evaluation.every", "null", None),
        ("evaluation.every", None, None),
        ("evaluation.every", "250", 250),
        ("run_name", "none", None),
        ("run_name", 5, "5"),
        ("optim.lr", "1e-5", 1e-5),
        ("optim.lr", "3", 3.0),
        ("optim.grad_clip", "0.5", 0.5),
        ("trainer.max_steps", "10_000", 10_000),
        ("trainer.max_steps", "1e4", 10_000),
        ("trainer.max_steps", 300.0, 300),
        ("trainer.precision", 32, "32"),
        ("trainer.precision", "bf16-mixed", "bf16-mixed"),
        ("model.double_residual", "true", True),
        ("model.double_residual", "False", False),
        ("model.double_residual", "yes", True),
        ("model.double_residual", "Off", False),
        ("trainer.max_steps", "0x10", 16),
        ("trainer.max_steps", "0b1_01", 5),
        ("optim.lr", "0x10", 16.0),
        ("optim.grad_clip", 2, 2.0),
        ("model.layer_norm", "none", "none"),
    ],
)
def test_value_is_read_as_written(key, written, expected):
    value = value_of(resolve({key: written}), key)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1e-5", 1e-5),
        ("1E3", 1000.0),
        ("-2", -2),
        ("10_000", 10_000),
        ("inf", math.inf),
        ("-.inf", -math.inf),
        ("Infinity", math.inf),
        ("~", None),
        ("TRUE", True),
        ("hello", "hello"),
        ("", ""),
        ("1e400", "1e400"),  # no infinity
        ("-1_0.5E+999", "-1_0.5E+999"),
        ("1e-400", "1e-400"),  # no zero
        ("0e-400", 0.0),
    ],
)
def test_scalar_is_read_as_written(text, expected):
    assert parse_scalar(text) == expected
    assert type(parse_scalar(text)) is type(expected)


# The command line


def test_arguments_with_space_and_equals_mean_the_same():
    assert read_arguments(["--optim.lr", "1e-3"]) == read_arguments(["--optim.lr=1e-3"]) == {"optim.lr": "1e-3"}


def test_bare_boolean_flag_means_true():
    assert read_arguments(["--model.double_residual", "--seeds.model", "3"]) == {
        "model.double_residual": "true",
        "seeds.model": "3",
    }


def test_boolean_flag_takes_a_value():
    assert not resolve(read_arguments(["--model.mlp_bias", "false"])).model.mlp_bias


def test_bare_flag_of_another_type_wants_a_value():
    message = refusal(read_arguments, ["--optim.lr", "--seeds.model", "3"])
    assert message == "The option `--optim.lr` needs a value, a number."


def test_negative_number_is_a_value_not_an_option():
    assert read_arguments(["--optim.lr", "-1"]) == {"optim.lr": "-1"}


def test_repeated_option_keeps_the_last():
    assert read_arguments(["--seeds.model", "1", "--seeds.model=2"]) == {"seeds.model": "2"}


def test_an_option_of_the_command_itself_is_no_setting():
    options = llc_parser().parse_args(["--out", "x", "--seeds.model=1"])
    assert (options.out, options.settings) == ("x", {"seeds.model": "1"})


def test_an_option_and_its_older_name_together_are_refused(capsys):
    assert main(["evaluate", "run", "--num_prompts", "8", "--n_prompts", "9"]) == 2
    assert "`--num_prompts` is given twice: 8 and 9." in capsys.readouterr().err
    assert main(["analyse", "run", "--what", "hessian", "--output_file=a.csv", "--out=b.csv"]) == 2
    assert "`--out` is given twice: a.csv and b.csv." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--calibrat"], "There is no option `--calibrat`. Did you mean `--calibrate`?"),
        (["--confg", "x"], "There is no option `--confg`. Did you mean `--config`?"),
        (["--out"], "`--out` needs a value. `icl llc --help` has an example."),
        (["--"], "There is no setting ``."),
        (["run", "again"], "Expected `--section.key VALUE`, got `again`."),
    ],
)
def test_a_mistake_beside_the_settings_is_one_sentence(words, said):
    assert refusal(llc_parser().parse_args, words).startswith(said)


def test_stray_word_is_refused():
    assert refusal(read_arguments, ["quick"]) == "Expected `--section.key VALUE`, got `quick`."


# Unknown keys


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("optim.lrr", "optim.lr"),
        ("task.num_task", "task.num_tasks"),
        ("num_tasks", "task.num_tasks"),
        ("lr", "optim.lr"),
        ("trainer.steps", "trainer.max_steps"),
        ("model.n_layers", "model.num_layers"),
        ("task.noise_variance.x", "task.noise_variance"),
    ],
)
def test_unknown_key_names_the_nearest(key, nearest):
    assert refusal(resolve, {key: 1}) == f"There is no setting `{key}`. Did you mean `{nearest}`?"


def test_unknown_option_names_the_nearest():
    assert "Did you mean `optim.lr`?" in refusal(read_arguments, ["--optim.lrr", "1"])


def test_key_like_no_other_points_to_the_help():
    assert "`icl train --help`" in refusal(resolve, {"zzzzzzz": 1})


@pytest.mark.parametrize("key", [1, True, None, 2.5])
def test_key_that_is_no_text_is_an_unknown_setting(as_users_run, key):
    assert refusal(resolve, {key: 1}).startswith(f"There is no setting `{key}`.")


@pytest.mark.parametrize("value", [None, 3, "abc", [1]])
def test_value_in_place_of_a_section_says_how_to_write_it(value):
    assert refusal(resolve, {"task": value}) == "`task` is a section; write `task: {key: value}` or `--task.key VALUE`."


# Wrong values


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("optim.lr", "fast", "`optim.lr` must be a number, got 'fast'."),
        ("optim.lr", True, "`optim.lr` must be a number, got True."),
        ("optim.lr", "1e400", "`optim.lr` is too large or too small for a floating-point number, got 1e400."),
        (
            "task.noise_variance",
            "1e-400",
            "`task.noise_variance` is too large or too small for a floating-point number",
        ),
        ("trainer.max_steps", "1:30", "`trainer.max_steps` must be a whole number, got '1:30'."),
        ("population.seeds", "[0,1", "`population.seeds` must be a list such as 0,1,2, or none, got '[0,1'."),
        ("population.seeds", "1:30", "`population.seeds` must be a list such as 0,1,2, or none, got '1:30'."),
        (
            "sampler.steps",
            "foo",
            "`sampler.steps` must be all, last, a list such as 1,2,3, or a range such as 0:1000:100",
        ),
        ("sampler.steps", "5:1", "The range 5:1 of `sampler.steps` is reversed. Write 1:5."),
        ("sampler.steps", [0, "x"], "`sampler.steps` must be all, last, a list"),
        ("sampler.steps", None, "`sampler.steps` must be all, last, a list"),
        ("optim.lr", [1, 2], "`optim.lr` must be a number, got [1, 2]."),
        ("optim.lr", -1, "`optim.lr` must be positive and finite, got -1"),
        ("trainer.max_steps", 2.5, "`trainer.max_steps` must be a whole number, got 2.5."),
        ("trainer.max_steps", "ten", "`trainer.max_steps` must be a whole number, got 'ten'."),
        ("trainer.max_steps", True, "`trainer.max_steps` must be a whole number, got True."),
        ("evaluation.every", "often", "`evaluation.every` must be a whole number or none, got 'often'."),
        ("seeds.model", "inf", "`seeds.model` must be a whole number, got inf."),
        ("model.double_residual", 1, "`model.double_residual` must be true or false, got 1."),
        ("model.double_residual", "0x1", "`model.double_residual` must be true or false, got '0x1'."),
        ("trainer.max_steps", "0o17", "`trainer.max_steps` must be a whole number, got '0o17'."),
        ("population.seeds", [True, 1], "`population.seeds` must be a list such as 0,1,2, or none, got [True, 1]."),
        ("population.seeds", "1.0,2", "`population.seeds` must be a list such as 0,1,2, or none, got '1.0,2'."),
        ("model.layer_norm", "Pre", "`model.layer_norm` must be one of pre, post, none, got 'Pre'."),
        ("model.layer_norm", None, "`model.layer_norm` must be one of pre, post, none, got None."),
        ("model.double_residual", None, "`model.double_residual` must be true or false, got None."),
        ("trainer.strategy", None, "`trainer.strategy` must be text, got None."),
        ("run_name", True, "`run_name` must be text or none, got True."),
        ("preset", "L2H5", "There is no preset `L2H5`. Did you mean `L2H4`?"),
        ("task.num_tasks", "many", "The number of tasks M must be a whole number"),
    ],
)
def test_wrong_value_is_one_sentence(key, value, message):
    assert refusal(resolve, {key: value}).startswith(message)


@pytest.mark.parametrize(
    ("written", "steps"),
    [("0:8:2", "0:8:2"), (4, "4"), ([0, 4], "0,4"), (" all ", " all "), ("last", "last"), ("1,,2", "1,,2")],
)
def test_steps_are_text_a_number_or_a_list_of_numbers(written, steps):
    assert resolve({"sampler.steps": written}).sampler.steps == steps


def test_contradiction_between_sources_is_refused():
    message = refusal(resolve, {"early_stopping.patience": 3}, {"evaluation.every": None})
    assert "Early stopping needs evaluations" in message


@given(
    key=st.sampled_from(sorted(known_keys())) | st.text(max_size=20),
    value=st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
)
def test_anything_gives_a_config_or_one_sentence(key, value):
    sentence = ""
    try:
        resolve({key: value})
    except ConfigError as error:
        sentence = str(error)
    assert "\n" not in sentence


# Files


def test_file_gives_its_tree(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("preset: L2H4\ntask:\n  num_tasks: .inf\noptim: {lr: 1e-5}\n")
    assert read_config_file(path) == {"preset": "L2H4", "task": {"num_tasks": math.inf}, "optim": {"lr": "1e-5"}}


def test_json_file_is_read_too(tmp_path):
    (tmp_path / "config.json").write_text('{"task": {"num_tasks": "inf"}, "optim.lr": 0.25}')
    assert resolve(read_config_file(tmp_path / "config.json")) == resolve(
        {"task.num_tasks": math.inf, "optim.lr": 0.25}
    )


def test_empty_file_sets_nothing(tmp_path):
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert read_config_file(tmp_path / "empty.yaml") == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"task: [1, 2", "is not valid YAML"),
        (b"\xff\xfe\x00", "is not valid YAML"),
        (b"a: 1\na: {b\n: 2", "is not valid YAML"),
        (b"- 1\n- 2\n", "must contain `section: {key: value}`, got list"),
        (b"just words", "must contain `section: {key: value}`, got str"),
        (b"trainer: {max_steps: 2026-01-01}", "it contains the date 2026-01-01 in `trainer.max_steps`"),
        (b"run_name: 2026-01-01 10:00:00", "it contains the date 2026-01-01 10:00:00 in `run_name`"),
        (
            b"task: {num_tasks: 1.0e+400}",
            "it contains 1.0e+400, which is too large or too small for a floating-point number",
        ),
        (b"task: !!set {num_tasks}", "it contains YAML's type `!!set` in `task`"),
    ],
)
def test_bad_file_is_one_sentence_that_names_it(tmp_path, content, message):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    text = refusal(read_config_file, path)
    assert message in text
    assert str(path) in text


def test_missing_file_is_one_sentence_that_names_it(tmp_path):
    assert "nowhere.yaml cannot be read: No such file" in refusal(read_config_file, tmp_path / "nowhere.yaml")


def test_folder_in_place_of_a_file_is_one_sentence(tmp_path):
    assert "cannot be read" in refusal(read_config_file, tmp_path)


# Names of runs


@pytest.mark.parametrize("name", PRESETS)
def test_preset_run_is_called_like_the_preset(name):
    assert run_name(preset(name)) == name


def test_run_name_lists_what_differs():
    assert run_name(resolve({"preset": "L2H4", "task.num_tasks": 8, "optim.lr": 0.01})) == "L2H4,num_tasks=8,lr=0.01"


def test_run_name_writes_infinity_as_inf():
    assert run_name(RunConfig(task=TaskConfig(num_tasks=math.inf))) == "quickstart,num_tasks=inf"


def test_run_name_tells_equal_leaves_of_two_sections_apart():
    assert run_name(resolve({"checkpoints.every": 5, "evaluation.every": 6})) == (
        "quickstart,evaluation.every=6,checkpoints.every=5"
    )


@pytest.mark.parametrize("seed", ["model", "tasks", "data", "noise", "evaluation"])
def test_run_name_says_that_a_seed_is_a_seed(seed):
    assert run_name(RunConfig(seeds=SeedsConfig(**{seed: 1}))) == f"quickstart,seeds.{seed}=1"


def test_given_run_name_is_kept():
    assert run_name(resolve({"run_name": "group/mine", "task.num_tasks": 8})) == "group/mine"


def test_run_name_does_not_depend_on_the_device():
    assert run_name(RunConfig(trainer=TrainerConfig(accelerator="cpu", devices=2))) == "quickstart"


@given(
    max_steps=st.integers(1, 10**9),
    lr=st.floats(1e-9, 10),
    num_tasks=st.integers(1, 2**31 - 1) | st.just(math.inf),
    monitor=st.text(max_size=200),
)
def test_run_name_from_settings_is_a_name_that_may_be_given(max_steps, lr, num_tasks, monitor):
    config = RunConfig(
        trainer=TrainerConfig(max_steps=max_steps),
        optim=OptimConfig(lr=lr),
        task=TaskConfig(num_tasks=num_tasks),
        early_stopping=EarlyStoppingConfig(monitor=monitor),
    )
    name = run_name(config)
    assert len(name) <= MAX_SLUG
    assert "/" not in name
    assert RunConfig(run_name=name).run_name == name


def test_long_run_names_that_differ_at_the_end_stay_distinct():
    long = EarlyStoppingConfig(monitor="eval/" + "x" * 300)
    names = {run_name(RunConfig(early_stopping=long, seeds=SeedsConfig(evaluation=seed))) for seed in range(5)}
    assert len(names) == 5
    assert {len(name) for name in names} == {MAX_SLUG}


# A sweep's point


def test_a_point_is_read_from_the_file_that_the_environment_names(tmp_path):
    file = tmp_path / "point.json"
    file.write_text('{"optim.lr": 0.5, "task": {"num_tasks": Infinity}}')
    point = read_points({POINT_VARIABLE: str(file)})[0]
    config = resolve({"optim": {"lr": 0.1}}, point)
    assert config.optim.lr == 0.5
    assert config.task.is_gaussian
    assert read_points({}) == [{}]
    with pytest.raises(ConfigError, match="cannot be read"):
        read_points({POINT_VARIABLE: str(tmp_path / "gone.json")})


def test_a_swept_key_set_to_another_value_is_refused():
    refuse_conflicts({"optim.lr": 0.5, "task": {"num_tasks": "inf"}}, {"optim.lr": "5e-1", "task.num_tasks": ".inf"})
    with pytest.raises(ConfigError, match=r"`optim.lr` is swept \(0.5 at this point\)"):
        refuse_conflicts({"optim": {"lr": 0.5}}, {"optim.lr": "0.25"})


@pytest.mark.parametrize(
    "sources",
    [
        ({}, {"population.seeds": "0,1", "seeds.model": "3"}),
        ({"population": {"seeds": [0, 1]}}, {"seeds.noise": "0"}),
        ({"population": {"seeds": [0, 1]}, "seeds": {"data": 3}}, {}),
        ({"population": {"seeds": [0]}}, {"population.seeds": "0,1", "seeds.model": "0"}),
        ({}, {"population.num_tasks": "8,inf", "task.num_tasks": "9"}),
        ({}, {"task.num_tasks": 9}, {"population.num_tasks": "8", "task.num_tasks": "9"}),
    ],
)
def test_a_setting_beside_a_population_that_sets_it_is_refused(sources):
    resolve(*sources)
    assert "remove one of the two" in refusal(refuse_overridden, *sources)


@pytest.mark.parametrize(
    "sources",
    [
        (RunConfig(seeds=SeedsConfig(model=3)).to_dict(), {"population.seeds": "0,1", "population.num_tasks": "8,16"}),
        ({"preset": "L2H4", "seeds": {"tasks": 3, "evaluation": 4}}, {"population.seeds": "0,1"}),
        ({"population": {"seeds": [0, 1]}}, {"population.seeds": "none", "seeds.model": "3"}),
        ({"population": {"num_tasks": ["inf"]}}, {"task.num_tasks": ".inf"}),
        ({"seeds": {"model": 3}}, {}),
    ],
    ids=["a run's own settings", "shared seeds", "a population taken back", "the same", "no population"],
)
def test_what_a_population_does_not_set_or_set_later_is_no_conflict(sources):
    resolve(*sources)
    refuse_overridden(*sources)


def test_the_command_refuses_what_its_population_would_drop(capsys):
    assert main(["train", "--population.seeds", "0,1", "--seeds.model", "3"]) == 2
    assert capsys.readouterr().err == (
        "icl: `seeds.model` is set to '3', but `population.seeds` sets it for each member (0, 1); remove one of the two.\n"
    )


SEEDED = [change(TINY, seeds={"model": seed, "data": seed, "noise": seed}) for seed in (0, 1)]


@pytest.mark.parametrize(
    ("configs", "names"),
    [
        (SEEDED, ["seed=0", "seed=1"]),
        ([change(one, task={"num_tasks": 8}) for one in SEEDED], ["seed=0", "seed=1"]),  # M is common
        ([change(TINY, task={"num_tasks": m}) for m in (8, math.inf)], ["M=8", "M=inf"]),
        ([change(TINY, seeds={"tasks": seed}) for seed in (0, 1)], ["seeds.tasks=0", "seeds.tasks=1"]),
        ([change(TINY, seeds={"model": seed}) for seed in (0, 1)], ["seeds.model=0", "seeds.model=1"]),
        ([dataclasses.replace(change(TINY, optim={"lr": lr}), run_name=str(lr)) for lr in (0.1, 0.2)], ["lr=0.1", "lr=0.2"]),
        ([change(TINY, trainer={"batch_size": size}) for size in (8, 16)], ["batch_size=8", "batch_size=16"]),
        ([change(TINY, sampler={"seed": 1}), TINY], ["", ""]),  # nothing that training depends on
        ([TINY], [""]),
    ],
)  # fmt: skip
def test_names_say_what_varies_and_nothing_else(configs, names):
    assert varying_names(configs) == names
