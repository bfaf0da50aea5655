"""Bad inputs are refused in a few short lines that name what is wrong; nothing is left on the disk."""

import pytest

from tests.reliability.bad_inputs import all_cases, attempt, bench

_EVERY = 8
"""By default one case in so many is tried; the slow test tries them all."""


def test_the_table_is_long_and_has_every_command():
    """No case is counted twice."""
    labels = [case.label for case in all_cases()]
    assert len(labels) == len(set(labels)) > 1000
    commands = {"train", "sweep", "diversity", "evaluate", "llc", "analyse", "report", "predict", "runs", "checkpoints"}
    assert commands | {"api"} <= {case.group for case in all_cases()}


@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize("every", [_EVERY, pytest.param(1, marks=pytest.mark.slow)])
def test_bad_inputs_are_clear(every):
    with bench() as folder:
        outcomes = [(case.label, attempt(case, folder)) for case in all_cases()[::every]]
    assert [(label, outcome.problem, outcome.said) for label, outcome in outcomes if outcome.problem] == []
