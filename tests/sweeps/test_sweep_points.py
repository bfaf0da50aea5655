"""The points of a sweep file: their order, names and purity, and errors before any point runs."""

import json

import pytest
import yaml

from icl.config import flatten
from icl.resolve import read_points, resolve
from icl.run_names import run_name
from icl.sweeps.points import sweep_points
from icl.sweeps.schema import SweepFileError, read_sweep_file

RATES = {"optim.lr": {"min": 1e-4, "max": 1e-2, "distribution": "log_uniform_values"}}


def points(tmp_path, parameters, *, count=None, seed=0, **keys):
    path = tmp_path / "sweep.yaml"
    path.write_text(
        yaml.safe_dump({"method": "grid", "command": ["${env}", "icl", "train"], "parameters": parameters} | keys)
    )
    return sweep_points(read_sweep_file(path), count=count, seed=seed)


def refusal(*arguments, **keywords) -> str:
    with pytest.raises(SweepFileError) as error:
        points(*arguments, **keywords)
    return str(error.value)


def test_a_grid_comes_in_the_order_of_the_names_with_the_last_fastest(tmp_path):
    found = points(
        tmp_path,
        {
            "task.num_tasks": {"values": [4, 2]},
            "model": {"parameters": {"num_layers": {"values": [1, 2]}, "embed_size": {"value": 8}}},
            "optim.lr": {"value": 0.01},
        },
    )
    assert [(point.config.model.num_layers, point.config.task.num_tasks) for point in found] == [
        (1, 4),
        (1, 2),
        (2, 4),
        (2, 2),
    ]
    assert [point.number for point in found] == [1, 2, 3, 4]
    assert found[0].settings == {
        "model": {"embed_size": 8, "num_layers": 1},
        "optim.lr": 0.01,
        "task.num_tasks": 4,
    }


def test_a_name_is_that_of_the_resolved_configuration(tmp_path):
    (point,) = points(tmp_path, {"preset": {"value": "L2H4"}, "optim.lr": {"value": "1e-4"}})
    assert point.name == run_name(resolve({"preset": "L2H4", "optim": {"lr": 1e-4}}))


def test_what_people_write_for_infinity_none_and_big_numbers_arrives(tmp_path):
    found = points(
        tmp_path,
        {
            "task.num_tasks": {"values": ["inf", "10_000"]},
            "optim.grad_clip": {"value": None},
            "evaluation.every": {"value": "none"},
        },
    )
    assert [point.config.task.num_tasks for point in found] == [float("inf"), 10_000]
    assert found[0].config.optim.grad_clip is found[0].config.evaluation.every is None


def test_a_point_survives_its_json_file(tmp_path):
    (point,) = points(tmp_path, {"task.num_tasks": {"value": float("inf")}, "optim.lr": {"value": 1e-5}})
    path = tmp_path / "point.json"
    path.write_text(json.dumps(point.settings))
    assert resolve(read_points({"ICL_SWEEP_POINT": str(path)})[0]) == point.config


def test_the_commands_own_words_count_as_they_will_for_the_program(tmp_path):
    (point,) = points(
        tmp_path,
        {"task.num_tasks": {"value": 8}},
        command=["${env}", "icl", "train", "--preset", "L2H4", "--trainer.max_steps=7", "${args}"],
    )
    assert point.config == resolve({"preset": "L2H4", "trainer.max_steps": 7, "task.num_tasks": 8})
    assert point.trains


@pytest.mark.parametrize("macro", ["${args_json_file}", "--preset=L2H4"])
def test_a_config_file_in_the_command_is_read(tmp_path, macro):
    (tmp_path / "base.yaml").write_text("preset: L2H4\n")
    words = ["--config", macro] if macro.startswith("$") else ["--config", str(tmp_path / "base.yaml")]
    (point,) = points(tmp_path, {"task.num_tasks": {"value": 8}}, command=["icl", "train", *words])
    assert point.config.preset == ("quickstart" if macro.startswith("$") else "L2H4")
    assert point.config.task.num_tasks == 8


def test_a_nested_point_may_come_by_the_commands_words(tmp_path):
    nested = {"task": {"parameters": {"num_tasks": {"values": [2, float("inf")]}, "noise_variance": {"value": 1e-05}}}}
    for macro in ("${args}", "${args_no_equals}", "${args_no_boolean_flags}"):
        found = points(tmp_path, nested | {"optim.lr": {"value": 0.5}}, command=["${env}", "icl", "train", macro])
        assert [point.config.task.num_tasks for point in found] == [2, float("inf")]
        assert {(point.config.task.noise_variance, point.config.optim.lr) for point in found} == {(1e-05, 0.5)}


def test_an_unknown_key_is_an_error_that_names_the_nearest_and_the_point(tmp_path):
    message = refusal(tmp_path, {"task.num_taks": {"values": [1, 2]}})
    assert "point 1 (task.num_taks=1)" in message
    assert "Did you mean `task.num_tasks`?" in message


def test_a_contradiction_in_one_point_is_found_before_any_runs(tmp_path):
    message = refusal(tmp_path, {"model.embed_size": {"values": [32, 30]}})
    assert "point 2 (model.embed_size=30)" in message
    assert "must divide" in message


def test_a_command_that_sets_a_swept_key_is_refused(tmp_path):
    command = ["icl", "train", "--task.num_tasks", "3"]
    assert "is swept" in refusal(tmp_path, {"task.num_tasks": {"values": [3, 4]}}, command=command)


def test_a_key_set_by_a_dotted_and_a_nested_name_is_refused(tmp_path):
    twice = {"optim.lr": {"value": 0.1}, "optim": {"parameters": {"lr": {"value": 0.2}}}}
    assert "`optim.lr` is set twice" in refusal(tmp_path, twice)


@pytest.mark.parametrize(
    "parameters",
    [
        {"task.num_tasks": {"values": [8, 4, "8"]}},
        {"task.num_tasks": {"values": [8, 4, 16]}, "run_name": {"value": "one"}},
        {"checkpoints.resume_seconds": {"values": [1, 2, 1]}},
    ],
)
def test_two_points_of_a_grid_that_would_be_one_run_are_refused(tmp_path, parameters):
    assert "would both be the run" in refusal(tmp_path, parameters)


def test_draws_that_repeat_an_earlier_one_are_left_out(tmp_path):
    found = points(tmp_path, {"task.num_tasks": {"values": [1, 2]}}, method="random", count=20)
    assert len(found) == 2
    assert found[0].number == 1


def test_the_draws_of_a_random_sweep_are_a_prefix_of_a_longer_one(tmp_path):
    short, long = (points(tmp_path, RATES, method="random", count=count) for count in (3, 5))
    assert short == long[:3]
    assert {point.name for point in points(tmp_path, RATES, method="random", count=3, seed=1)}.isdisjoint(
        point.name for point in long
    )
    assert all(1e-4 <= flatten(point.config.to_dict())["optim.lr"] <= 1e-2 for point in long)


def test_the_number_of_points_is_capped_by_the_file_and_by_the_command_line(tmp_path):
    assert len(points(tmp_path, RATES, method="random", run_cap=4)) == 4
    assert len(points(tmp_path, RATES, method="random", run_cap=4, count=2)) == 2
    assert len(points(tmp_path, {"task.num_tasks": {"min": 1, "max": 9}}, run_cap=4)) == 4
    assert "has no end" in refusal(tmp_path, RATES, method="random")
    assert "1,000,000,000 points, but at most 100,000" in refusal(tmp_path, RATES, method="random", run_cap=10**9)
    many = {f"seeds.{name}": {"min": 1, "max": 1000} for name in ("model", "data")}
    assert "1,000,000 points" in refusal(tmp_path, many)
    assert len(points(tmp_path, many, count=3)) == 3


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"trainer.max_steps": {"value": 1}}, "trains nothing"),
        ({"optim.lr": {"value": 1e-50}}, "nothing would be trained"),
        ({"early_stopping.patience": {"value": 1}, "early_stopping.monitor": {"value": "loss"}}, "the metrics are"),
        ({"run_name": {"values": ["a", "a/b"]}}, "the run `a/b` of point 2 would lie inside the run `a` of point 1"),
    ],
)
def test_what_training_would_refuse_is_refused_before_it(tmp_path, parameters, said):
    assert said in refusal(tmp_path, parameters)
