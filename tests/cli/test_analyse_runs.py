"""`icl analyse FOLDER` with stand-ins for the analyses."""

import argparse
from pathlib import Path

import pytest

from icl.analysis import NotApplicableError
from icl.cli.analyse_runs import analyse_runs
from icl.config.validation import ConfigError


@pytest.mark.parametrize(
    ("what", "error", "status"),
    [
        ("all", NotApplicableError("The run has M = inf."), 0),
        ("gradients", NotApplicableError("The run has M = inf."), 1),
        ("all", ConfigError("The run has M = inf."), 1),
    ],
)
def test_an_analysis_that_does_not_apply_is_left_out_of_all_as_for_a_single_run(capsys, what, error, status):
    def analyse(name: str, path: Path, options: argparse.Namespace) -> None:
        raise error

    runs = {"a": Path("a"), "b": Path("b")}
    assert analyse_runs(["gradients"], Path(), runs, argparse.Namespace(what=what), analyse) == status
    assert ("left out" in capsys.readouterr().err) == isinstance(error, NotApplicableError)
