"""The figures of mixtures over seeds and of implicit priors, drawn from the shipped tables, and what these tables show."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from icl.plotting import mixture, prior

DATA = Path(__file__).resolve().parents[2] / "data" / "small"


def test_a_ladder_with_seeds_leaves_out_what_no_mixture_explains():
    table = pd.read_csv(DATA / "prior-mixture.csv")
    axes = mixture.plot(table, title="").axes
    assert len(axes) == 8
    rows = table[(table["quantity"] == "weight") & (table["distribution"] == "pretrain") & (table["num_tasks"] == 2)]
    explained = rows[rows["verdict"] != "invalid"]
    assert len(explained) < len(rows)
    counts = explained.groupby("step")["value"].agg(["mean", "count"])
    expected = counts.loc[counts["count"] == 3, "mean"]
    mean = next(line for line in axes[0].get_lines() if line.get_label() == "2")
    assert list(mean.get_xdata()) == list(expected.index)
    assert list(mean.get_ydata()) == pytest.approx(list(expected))
    odds = [line for line in axes[2].get_lines() if line.get_label() in {"2", "4", "8", "16", "32"}]
    assert len(odds) == 5


def test_the_title_of_one_run_has_a_whole_step():
    """A table that is read from its file has steps such as 3000.0, because some of its rows belong to no step."""
    table = pd.read_csv(DATA / "prior-mixture.csv")
    figure = mixture.plot(table[table["run"] == "M=4,seed=0"], title="")
    assert figure.axes[-1].get_title() == "Prior odds by position at step 3,000 (lines: all positions)"


def test_the_shipped_ladder_goes_from_dmmse_to_ridge():
    """The mean weight of three seeds at the last step falls with M. The difference of M = 2 and M = 16 is three standard errors."""
    table = pd.read_csv(DATA / "prior-mixture.csv")
    last = table[(table["quantity"] == "weight") & (table["step"] == table["step"].max())]
    weights = last[last["distribution"] == "pretrain"].groupby("num_tasks")["value"].agg(["mean", "sem", "count"])
    assert (weights["count"] == 3).all()
    assert (np.diff(weights["mean"]) < 0).all()
    difference = weights.loc[2, "mean"] - weights.loc[16, "mean"]
    assert difference > 3 * np.hypot(weights.loc[2, "sem"], weights.loc[16, "sem"])


def test_the_shipped_models_have_their_training_tasks_as_their_prior():
    table = pd.read_csv(DATA / "implicit-prior.csv")
    for num_tasks, rows in table.groupby("num_tasks"):
        assert len(prior.plot(rows, title=f"M = {num_tasks}").axes) == 3
        last = rows[(rows["step"] == rows["step"].max()) & (rows["quantity"] == "preference")].iloc[0]
        assert (last["finding"], last["verdict"]) == ("pool", "ok")
        assert last["value"] > 4 * last["stderr"]
