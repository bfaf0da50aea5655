"""The figures of transient ridge and of the threshold show the shipped tables, which support what the pages claim."""

from pathlib import Path

import pandas as pd

from icl.analysis.seeds import over_seeds
from icl.diversity.threshold import ALL, thresholds
from icl.plotting.diversity import plot_diversity
from icl.plotting.transience import plot_transience

DATA = Path(__file__).resolve().parents[2] / "data" / "small"


def test_the_curves_are_the_losses_of_four_seeds_and_their_mean():
    table = pd.read_csv(DATA / "transience.csv")
    panels = plot_transience(table, title="").axes
    for axes, distribution in zip(panels, ("pretrain", "true"), strict=True):
        rows = table[(table["quantity"] == "loss") & (table["distribution"] == distribution)]
        model = rows[rows["predictor"] == "model"]
        *seeds, mean = axes.get_lines()[:5]
        assert {tuple(line.get_ydata()) for line in seeds} == {tuple(own["value"]) for _, own in model.groupby("seed")}
        assert list(mean.get_ydata()) == list(model.groupby("step")["value"].mean())
        levels = {line.get_label(): line.get_ydata()[0] for line in axes.get_lines()[5:]}
        for name, label in (("zero", "zero"), ("ridge", "ridge"), ("dmmse", "dMMSE")):
            assert levels[label] == rows.loc[rows["predictor"] == name, "value"].item()


def test_ridge_comes_and_goes_in_the_shipped_runs():
    """The interval over seeds of the rise is computed again from the losses, with the minimum of each seed."""
    table = pd.read_csv(DATA / "transience.csv")
    losses = table[(table["predictor"] == "model") & (table["distribution"] == "true") & (table["quantity"] == "loss")]
    rises = [own.sort_values("step")["value"].iloc[-1] - own["value"].min() for _, own in losses.groupby("seed")]
    found = table[table["quantity"] == "rise"].iloc[0]
    again = over_seeds(rises)
    assert abs(again.mean - found["value"]) < 1e-4
    assert again.low > 0.5
    assert (found["finding"], found["verdict"]) == ("transient ridge", "ok")


def test_the_shipped_ladder_has_the_threshold_of_the_page():
    table = pd.read_csv(DATA / "threshold.csv", dtype={"num_tasks": str})
    found = thresholds(table)
    last = found.iloc[-1]
    assert (last["run"], last["num_seeds"], last["verdict"]) == (ALL, 4, "ok")
    assert 12.2 < last["lower"] < 12.3 < 12.8 < last["threshold"] < 12.9 < 13.4 < last["upper"] < 13.5
    (line, *_) = [line for line in plot_diversity(table, title="", thresholds=found).axes[-1].get_lines() if "threshold" in str(line.get_label())]  # fmt: skip
    assert 2 ** line.get_xdata()[0] == last["threshold"]
