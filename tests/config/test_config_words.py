"""Several `--config` files, and tables for whole sections, on every command line that accepts settings."""

import json
import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from icl.cli import diversity, llc, main, train
from icl.command_line import llc_parser, train_parser
from icl.config.validation import ConfigError
from icl.config.values import read_table
from icl.resolve import read_config_file, resolve
from icl.sweeps.points import sweep_points
from icl.sweeps.schema import read_sweep_file

FIRST = {"preset": "L2H4", "optim": {"lr": 0.5, "grad_clip": 2.0}, "task.task_size": 3, "trainer": {"max_steps": 7}}
SECOND = {"optim.lr": 0.25, "task": {"task_size": 5}, "evaluation": {"every": 1}}
MERGED = {"preset": "L2H4", "optim.lr": 0.25, "optim.grad_clip": 2.0, "task.task_size": 5, "trainer.max_steps": 7}
MERGED |= {"evaluation.every": 1}


def read_arguments(words):
    return train_parser().parse_args(words).settings


@pytest.fixture
def files(tmp_path) -> list[str]:
    """Return the words that name two config files, in both spellings. One file is YAML and one is JSON."""
    (tmp_path / "first.yaml").write_text(yaml.safe_dump(FIRST))
    (tmp_path / "second.json").write_text(json.dumps(SECOND))
    return ["--config", str(tmp_path / "first.yaml"), f"--config={tmp_path / 'second.json'}"]


# Several files


def test_files_are_merged_in_order(files):
    for words in (files, [files[0], files[1], "--optim.lr", "0.25", files[2]]):
        assert resolve(*map(read_config_file, train_parser().parse_args(words).config)) == resolve(MERGED)
    reverse = train_parser().parse_args([files[2], *files[:2]]).config
    assert resolve(*map(read_config_file, reverse)) == resolve(MERGED | {"optim.lr": 0.5, "task.task_size": 3})


def test_train_takes_several(files, monkeypatch):
    trained = []
    monkeypatch.setattr(train, "_train", lambda configs: trained.extend(configs) or 0)
    assert main(["train", *files, "--optim.grad_clip", "9"]) == 0
    assert trained == [resolve(MERGED, {"optim.grad_clip": 9})]


def test_an_earlier_file_gives_way_to_the_population_of_a_later_one(tmp_path, monkeypatch):
    (tmp_path / "a.yaml").write_text("seeds: {model: 3}\n")
    (tmp_path / "b.yaml").write_text("population: {seeds: [0, 1]}\n")
    trained = []
    monkeypatch.setattr(train, "_train", lambda configs: trained.extend(configs) or 0)
    words = [word for name in "ab" for word in ("--config", str(tmp_path / f"{name}.yaml"))]
    assert main(["train", *words]) == 0
    assert [config.seeds.model for config in trained] == [0, 1]


def test_llc_takes_several(files, monkeypatch):
    options = llc_parser().parse_args([*files, "--steps", "last"])
    monkeypatch.setattr(llc, "_work", lambda job, flags: jobs.append(job) or 0)
    jobs: list = []
    assert (options.path, options.flags, options.config) == (None, [], [files[1], files[2].partition("=")[2]])
    assert main(["llc", *files, "--steps", "last"]) == 0
    assert jobs[0].config == resolve(MERGED, {"sampler.steps": "last"})


def test_diversity_takes_several(files):
    options = diversity._parser().parse_args([*files, "--max_power", "2"])
    assert diversity._read_config(options) == resolve(MERGED)


def test_a_sweeps_command_takes_several(files, tmp_path):
    tree = {"method": "grid", "command": ["icl", "train", *files], "parameters": {"optim.grad_clip": {"value": 3.0}}}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(tree))
    (point,) = sweep_points(read_sweep_file(tmp_path / "sweep.yaml"))
    assert point.config == resolve(MERGED, {"optim.grad_clip": 3.0})


@pytest.mark.parametrize("command", ["train", "llc", "diversity"])
def test_every_file_must_be_there(files, command, capsys):
    assert main([command, *files, "--config", "nowhere.yaml"]) == 2
    assert "nowhere.yaml cannot be read" in capsys.readouterr().err


# A table for a section


@pytest.mark.parametrize(
    "words",
    [
        ["--task={'num_tasks': 2, 'noise_variance': 0.5}"],
        ["--task", "{'num_tasks': 2, 'noise_variance': 0.5}"],
        ['--task={"num_tasks": 2, "noise_variance": 0.5}'],
        ["--task={num_tasks: 2, noise_variance: 0.5}"],
        ["--task={'num_tasks': 9}", "--task.num_tasks=2", "--task={'noise_variance': 0.5}"],
        ["--task.noise_variance", "0.5", "--task={'num_tasks': 2}"],
    ],
)
def test_a_section_takes_a_table(words):
    assert resolve(read_arguments(words)) == resolve({"task.num_tasks": 2, "task.noise_variance": 0.5})
    settings = llc_parser().parse_args(words).settings
    assert resolve(settings) == resolve({"task.num_tasks": 2, "task.noise_variance": 0.5})


def test_what_python_prints_has_names_for_infinity_none_and_truth():
    words = [
        "--task={'num_tasks': inf}",
        "--optim={'grad_clip': None, 'lr': 1e-05}",
        "--model={'double_residual': True}",
    ]
    config = resolve(read_arguments([*words, "--population={'seeds': [0, 1]}"]))
    assert config.task.num_tasks == math.inf
    assert (config.optim.grad_clip, config.optim.lr, config.model.double_residual) == (None, 1e-05, True)
    assert config.population.seeds == (0, 1)


POINT = {
    "task": {"num_tasks": math.inf, "noise_variance": 1e-05},
    "model": {"double_residual": True, "mlp_size": 16},
    "optim": {"grad_clip": None},
    "checkpoints": {"store": "/a b/it's\\'\"here"},
    "trainer.max_steps": 3,
}


@pytest.mark.parametrize("macro", ["args", "args_no_equals", "args_no_boolean_flags"])
def test_a_nested_point_arrives_as_the_wandb_client_spells_it(macro):
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    words = utils.create_sweep_command_args({"args": {key: {"value": value} for key, value in POINT.items()}})[macro]
    assert resolve(read_arguments(words)) == resolve(POINT)


LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
TABLES = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)


@given(st.dictionaries(st.text(), TABLES))
def test_tables_survive_being_printed(table):
    assert read_table(str(table)) == table
    assert read_table(json.dumps(table)) == table


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("--task={'num_taks':2}", "Did you mean `task.num_tasks`?"),
        ("--task={'num_tasks':{'x':2}}", "no setting `task.num_tasks.x`"),
        ("--tsak={'num_tasks':2}", "no setting `tsak`"),
        ("--task={'num_tasks':0}", "number of tasks M must be"),
        ("--task={'num_tasks':", "`task` is a section"),
        ("--task=3", "`task` is a section"),
        ("--task", "`task` is a section"),
        (f"--task={'{' * 3000}", "`task` is a section"),
        (f"--task={'[' * 3000}", "`task` is a section"),
        (f"--task={{'num_tasks':{'[' * 3000}", "`task` is a section"),
        ("--optim.lr={'value':1}", "`optim.lr` must be a number"),
    ],
)
def test_a_table_that_cannot_be_used_is_one_sentence(word, said):
    with pytest.raises(ConfigError) as error:
        resolve(read_arguments([word]))
    assert said in str(error.value)
    assert "\n" not in str(error.value)
