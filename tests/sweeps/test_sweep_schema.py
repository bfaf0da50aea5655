"""Sweep files: everything that W&B's schema allows is read, and every mistake gets a one-sentence error."""

import pytest
import yaml

from icl.cli import main
from icl.config.validation import ConfigError
from icl.sweeps.distributions import DISTRIBUTIONS
from icl.sweeps.schema import SweepFileError, read_sweep_file

COMMAND = ["${env}", "icl", "train"]


def write(tmp_path, tree=None, **keys):
    path = tmp_path / "sweep.yaml"
    given = {"method": "grid", "command": COMMAND, "parameters": {"task.num_tasks": {"values": [1, 2]}}}
    path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(given | keys))
    return path


def parameters(tmp_path, method="random", **entries):
    return read_sweep_file(write(tmp_path, method=method, parameters=entries)).parameters


def refusal(tmp_path, tree=None, **keys) -> str:
    with pytest.raises(SweepFileError) as error:
        read_sweep_file(write(tmp_path, tree, **keys))
    assert isinstance(error.value, ConfigError)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_yaml_as_people_write_it(tmp_path):
    text = """
        method: random
        run_cap: 1_000
        program: train.py
        metric: {name: eval/true/loss, goal: minimize}
        parameters:
          task.num_tasks: {values: [1, 10_000, 'inf', .inf]}
          optim:
            parameters:
              lr: {min: 1.0e-5, max: 1.0e-2, distribution: log_uniform_values}
              grad_clip: {value: null}
    """
    sweep = read_sweep_file(write(tmp_path, text))
    assert sweep.run_cap == 1000
    assert sweep.program == "train.py"
    assert sweep.command == ("${env}", "${interpreter}", "${program}", "${args}")
    assert [parameter.path for parameter in sweep.parameters] == [
        ("optim", "grad_clip"),
        ("optim", "lr"),
        ("task.num_tasks",),
    ]
    assert sweep.parameters[0].options == {"value": None}
    assert sweep.parameters[2].options == {"values": [1, 10_000, "inf", float("inf")]}


@pytest.mark.parametrize(
    ("entry", "kind"),
    [
        ({"value": 3}, "constant"),
        ({"values": [3]}, "categorical"),
        ({"values": [3, 4], "probabilities": [0.25, 0.75]}, "categorical_w_probabilities"),
        ({"min": 1, "max": 3}, "int_uniform"),
        ({"min": 1.0, "max": 3.0}, "uniform"),
        ({"min": 1, "max": 3.5, "distribution": "uniform"}, "uniform"),
        ({"distribution": "normal"}, "normal"),
        ({"distribution": "beta", "a": 2}, "beta"),
    ],
)
def test_the_distribution_is_the_one_that_wandb_infers(tmp_path, entry, kind):
    assert parameters(tmp_path, key=entry)[0].distribution == kind


def test_defaults_are_those_of_wandb(tmp_path):
    (first,) = parameters(tmp_path, key={"distribution": "q_normal", "sigma": 2})
    assert first.options == {"mu": 0.0, "sigma": 2, "q": 1.0}


@pytest.mark.parametrize(
    ("kind", "values"),
    [("log_uniform", "0.1353 to 7.389"), ("q_log_uniform", "0 to 7"), ("inv_log_uniform", "0.1353 to 7.389")],
)
def test_bounds_that_are_exponents_are_warned_of_as_by_wandb(tmp_path, kind, values, capsys):
    entry = {"distribution": kind, "min": -2, "max": 2}
    nested = {"optim": {"parameters": {"lr": entry}}}
    path = write(tmp_path, method="random", run_cap=1, parameters=nested)
    assert read_sweep_file(path).warnings == (
        f"`optim.lr` uses {kind}, where min/max specify base-e exponents. Use {kind}_values to specify limit values. "
        f"As written, values go from {values}.",
    )
    main(["sweep", str(path), "--status"])
    assert capsys.readouterr().err.count("where min/max specify base-e exponents") == 1


@pytest.mark.parametrize("kind", ["log_uniform_values", "q_log_uniform_values", "inv_log_uniform_values", "uniform"])
def test_bounds_that_are_values_are_not_warned_of(tmp_path, kind):
    path = write(tmp_path, method="random", parameters={"optim.lr": {"distribution": kind, "min": 0.1, "max": 2.0}})
    assert read_sweep_file(path).warnings == ()


@pytest.mark.parametrize(
    "entry",
    [
        {"distribution": "log_uniform", "min": 1, "max": 1000},
        {"distribution": "q_log_uniform", "min": 1, "max": 1000},
        {"distribution": "inv_log_uniform", "min": -1000, "max": 1},
        {"distribution": "log_normal", "mu": 1000},
        {"distribution": "normal", "sigma": 1e308},
        {"distribution": "uniform", "min": -1e308, "max": 1e308},
    ],
)
def test_values_that_no_number_can_hold_are_refused(tmp_path, entry):
    message = refusal(tmp_path, method="random", parameters={"optim.lr": entry})
    assert "too large for a number" in message
    assert ("exponents of e" in message) == ("log_uniform" in entry["distribution"])


def test_every_distribution_of_wandb_is_known():
    """The list comes from the schema in W&B's own package `sweeps`."""
    quantised = ["uniform", "log_uniform", "log_uniform_values", "normal", "log_normal", "beta"]
    others = ["constant", "categorical", "categorical_w_probabilities", "int_uniform", "inv_log_uniform"]
    expected = {*quantised, *(f"q_{name}" for name in quantised), *others, "inv_log_uniform_values"}
    assert set(DISTRIBUTIONS) == expected


@pytest.mark.parametrize("method", ["bayes", "custom"])
def test_searches_that_need_the_server_are_sent_to_wandb_agent(tmp_path, method):
    assert "`wandb agent`" in refusal(tmp_path, method=method)


def test_a_command_that_is_text_is_refused_because_wandb_ignores_it(tmp_path):
    message = refusal(tmp_path, command="icl train")
    assert "silently ignores" in message
    assert '["${env}", icl, train]' in message


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"methd": "grid"}, ["no key `methd`", "`method`"]),
        ({"method": None}, ["`method` must be grid or random"]),
        ({"method": ["grid"]}, ["`method` must be grid or random"]),
        ({"parameters": {}}, ["`parameters` must be a table"]),
        ({"parameters": [1]}, ["`parameters` must be a table"]),
        ({"parameters": {3: {"value": 1}}}, ["`3` is not a valid name"]),
        ({"run_cap": 0}, ["`run_cap` must be a whole number"]),
        ({"run_cap": True}, ["`run_cap` must be a whole number"]),
        ({"run_cap": 10**20}, ["`run_cap` must be a whole number from 1 to 2^63 - 1"]),
        ({"command": [["icl", "train"]]}, ["`command` must be a list of words", "['icl', 'train']"]),
        ({"command": ["icl", None]}, ["`command` must be a list of words", "None"]),
        ({"program": " "}, ["`program` must be a file name"]),
        ({"command": {"a": 1}}, ["`command` must be a list"]),
        ({"command": ["${env}", "${arg}"]}, ["no macro `${arg}`", "`${args}`"]),
        ({"command": None}, ["`program` is missing"]),
        ({"program": 3}, ["`program` must be a file name"]),
    ],
)
def test_mistakes_at_the_top(tmp_path, keys, words):
    message = refusal(tmp_path, **keys)
    assert all(word in message for word in words), message
    assert "sweep.yaml" in message


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (3, ["must be a table such as", "got 3"]),
        ([1, 2], ["must be a table such as"]),
        ({}, ["needs one of these: `value`, `values`"]),
        ({"valeus": [1]}, ["no key `valeus`", "`values`"]),
        ({"values": 3}, ["`key.values` must be a list"]),
        ({"values": []}, ["`key.values` must be a list"]),
        ({"value": 1, "values": [1]}, ["(constant) has no key `values`"]),
        ({"min": 1}, ["needs one of these: `value`, `values`, both `min` and `max`"]),
        ({"min": 1, "max": 2.5}, ["only one of them is an integer", "`distribution: uniform`"]),
        ({"min": "1e-5", "max": 1.0}, ["`key.min` must be a finite number, got '1e-5'", "write 1.0e-5"]),
        ({"min": float("nan"), "max": 1.0}, ["`key.min` must be a finite number"]),
        ({"min": 2, "max": 2}, ["`key.min` must be below"]),
        ({"min": 0.0, "max": 1.0, "distribution": "log_uniform_values"}, ["must be positive"]),
        ({"min": 0.5, "max": 1.5, "distribution": "int_uniform"}, ["must be whole numbers"]),
        ({"min": 0, "max": 1, "distribution": "unifrom"}, ["no distribution 'unifrom'", "`uniform`"]),
        ({"min": 0, "max": 1, "distribution": ["uniform"]}, ["no distribution ['uniform']"]),
        ({"min": 0, "max": 1, "distribution": {"a": 1}}, ["no distribution {'a': 1}"]),
        ({"distribution": "normal", "q": 2}, ["(normal) has no key `q`"]),
        ({"distribution": "normal", "sigma": -1}, ["`key.sigma`"]),
        ({"distribution": "q_normal", "q": 0}, ["`key.q` must be positive"]),
        ({"distribution": "uniform", "min": 1.0}, ["needs `max`"]),
        ({"values": [1, 2], "probabilities": [0.5, 0.6]}, ["sum to 1"]),
        ({"values": [1, 2], "probabilities": [1.0]}, ["sum to 1"]),
        ({"parameters": {"x": {"value": 1}}, "value": 2}, ["the group `key` can have only `parameters`, not `value`"]),
        ({"parameters": {}}, ["`key.parameters` must be a table"]),
        ({"parameters": {"x": 3}}, ["`key.x` must be a table such as"]),
    ],
)
def test_mistakes_in_a_parameter(tmp_path, entry, words):
    message = refusal(tmp_path, method="random", parameters={"key": entry}).lower()
    assert all(word.lower() in message for word in words), message


@pytest.mark.parametrize("entry", [{"min": 1.0, "max": 2.0}, {"distribution": "normal"}])
def test_a_grid_has_no_continuous_parameter(tmp_path, entry):
    assert "has no grid" in refusal(tmp_path, parameters={"optim.lr": entry})


@pytest.mark.parametrize(
    "entry", [{"min": 0, "max": 10**18}, {"distribution": "q_uniform", "min": 0, "max": 1e300, "q": 1e-5}]
)
def test_a_grid_without_an_end_in_sight_is_refused(tmp_path, entry):
    assert "more than 100,000 values" in refusal(tmp_path, parameters={"optim.lr": entry})


def test_unreadable_files(tmp_path):
    assert "not valid YAML" in refusal(tmp_path, "method: [")
    assert "is not a sweep file" in refusal(tmp_path, "- 1")
    with pytest.raises(SweepFileError, match="cannot be read"):
        read_sweep_file(tmp_path / "absent.yaml")
