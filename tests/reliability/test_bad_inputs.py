"""Bad inputs are refused in a few short lines that name the bad input, and no file is left on the disk."""

import pytest

from tests.reliability.bad_inputs import all_cases, attempt, bench

_EVERY = 60
"""By default, every 60th case and the cases below are tried. The slow test tries all cases."""
_T = "train --config tiny.yaml"
_ALWAYS = (
    f"{_T} --run_name n --trainer.batch_size 100000000000000000000",
    f"{_T} --run_name n --trainer.batch_size 1000000000000",
    f"{_T} --run_name -",
    f"{_T} --run_name tiny/inner",
    "train --config deep.yaml",
    "train --config deep-map.yaml",
    "train --config deep.json",
    "sweep deep.yaml",
    "predict tiny --prompt deep.json",
    "predict tiny --prompt prompt-deep.json",
    "evaluate tiny --num_prompts 10000000000000",
    "llc tiny --sampler.steps foo",
    f"{_T} --run_name n --sampler.steps foo",
    f"{_T} --run_name n --task.num_tasks 1e400",
    "train --config date-name.yaml",
    "predict tiny --prompt prompt.json --out prompt.json",
    "evaluate tiny --num_prompts 16 --out runs/tiny/status.json",
    "sweep sweep-distribution-list.yaml --dry-run",
    "sweep sweep-cap-20.yaml --dry-run",
    "in a deleted folder: train",
    "runs a-file",
    "evaluate tiny --num_prompts 16 --out a-file/x.csv",
)
"""Inputs for which version 0.1.0 printed a traceback, a wrong sentence or nothing."""


def test_the_table_is_long_and_has_every_command():
    """No case is counted twice."""
    labels = [case.label for case in all_cases()]
    assert set(_ALWAYS) <= set(labels)
    assert len(labels) == len(set(labels)) > 1000
    commands = {"train", "sweep", "diversity", "evaluate", "llc", "analyse", "report", "predict", "runs", "checkpoints"}
    assert commands | {"api"} <= {case.group for case in all_cases()}


@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize("every", [_EVERY, pytest.param(1, marks=pytest.mark.slow)])
def test_bad_inputs_are_clear(every):
    with bench() as folder:
        cases = all_cases()
        chosen = [case for index, case in enumerate(cases) if index % every == 0 or case.label in _ALWAYS]
        outcomes = [(case.label, attempt(case, folder)) for case in chosen]
    assert [(label, outcome.problem, outcome.said) for label, outcome in outcomes if outcome.problem] == []
