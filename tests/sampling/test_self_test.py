"""The self-test: a row agrees if and only if its estimate is right."""

import dataclasses

import pandas as pd
import pytest

from icl.cli import main
from icl.sampling import self_test


def quick(problem, **changes):
    """Return a test problem with only a few draws."""
    sampler = {**problem.sampler, "num_draws": 300, "num_burnin_steps": 300}
    return dataclasses.replace(problem, **{"sampler": sampler, **changes})


@pytest.fixture
def problem():
    return quick(self_test.problems()[0])


@pytest.mark.slow
def test_a_true_answer_agrees_and_a_false_one_does_not(problem):
    (row,) = self_test.run_problem(problem)
    assert row.agrees
    assert abs(row.llc - row.finite) < row.allowed
    (row,) = self_test.run_problem(dataclasses.replace(problem, finite=lambda nbeta, lr: 1.2 * row.finite))
    assert not row.agrees


@pytest.mark.slow
def test_estimates_that_fall_with_nbeta_disagree(problem):
    rising = dataclasses.replace(problem, nbetas=[5.0, 100.0])
    assert all(row.agrees for row in self_test.run_problem(rising))
    assert not any(row.agrees for row in self_test.run_problem(dataclasses.replace(rising, nbetas=[100.0, 5.0])))


@pytest.mark.slow
def test_the_command_prints_the_table_and_fails_with_a_wrong_estimate(problem, monkeypatch, capsys):
    monkeypatch.setattr(self_test, "problems", lambda: [problem])
    assert main(["llc", "--self-test"]) == 0
    said = capsys.readouterr()
    assert "regular quadratic" in said.out
    assert "3 of 3 estimates agree" in said.out
    assert "1/1" in said.err
    monkeypatch.setattr(self_test, "problems", lambda: [dataclasses.replace(problem, finite=lambda nbeta, lr: 9.0)])
    assert main(["llc", "--self-test"]) == 1
    assert "NO" in capsys.readouterr().out


def test_the_command_has_help_with_an_example(capsys):
    with pytest.raises(SystemExit):
        main(["llc", "--help"])
    assert "example:\n  icl llc" in capsys.readouterr().out


def test_the_command_without_a_run_says_what_to_train(capsys):
    assert main(["llc"]) == 2
    assert "train it with `icl train`" in capsys.readouterr().err


@pytest.mark.slow
def test_every_problem_agrees():
    rows = self_test.self_test()
    assert [row.problem for row in rows if not row.agrees] == []
    assert {row.verdict for row in rows} == {"ok"}


@pytest.mark.slow
def test_the_command_writes_the_table(problem, monkeypatch, tmp_path):
    monkeypatch.setattr(self_test, "problems", lambda: [problem])
    assert main(["llc", "--self-test", "--out", str(tmp_path / "known.csv")]) == 0
    table = pd.read_csv(tmp_path / "known.csv")
    assert table["problem"].tolist() == 3 * [problem.name]
    assert table["kernel"].tolist() == ["sgld", "baoab", "rmsprop"]
    assert table["agrees"].all()
