"""Figures of runs with a predictive distribution: losses in nats, and the implicit prior."""

import numpy as np
import pandas as pd
import pytest
from figure_faults import faults

from icl.plotting.curves import plot_curves
from icl.plotting.prior import plot
from icl.plotting.training import plot_training

STEPS = np.array([0, 1, 10, 100, 1000])


def metrics(*, sign=1.0):
    curve = sign * (0.3 + 1 / (1 + STEPS / 10))
    losses = {
        "eval/pretrain/nll": curve,
        "eval/true/nll": curve + 0.1,
        "eval/pretrain/loss": 2.0,
        "eval/true/loss": 2.0,
    }
    return pd.DataFrame({"step": STEPS, "train/nll": np.where(STEPS > 0, curve - 0.05, np.nan), **losses})


def test_learning_curves_are_in_nats_with_the_floors():
    positions = pd.DataFrame({"model": [2.0, 1.0, 1.5], "ridge": [1.9, 0.9, 1.4]}, index=["1", "2", "mean"])
    losses = {"pretrain": positions, "true": positions + 0.1}
    figure = plot_training(metrics(), losses, title="r", levels={"ridge": 0.27, "dmmse": 0.25})
    assert faults(figure) == []
    curves = figure.axes[0]
    assert curves.get_ylabel() == "negative log-likelihood (nats per target)"
    assert curves.get_yscale() == "linear"
    levels = [
        line.get_ydata()[0]
        for line in curves.get_lines()
        if len(set(line.get_ydata())) == 1 and len(line.get_ydata()) == 2
    ]
    assert {0.27, 0.25} <= set(levels)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_negative_log_likelihood_may_be_negative(sign):
    figure = plot_curves({"r": metrics(sign=sign)}, title="one run")
    assert len(figure.axes) == 3  # its squared errors are not shown
    assert figure.axes[0].get_ylabel() == "negative log-likelihood (nats per target)"
    shown = [line for line in figure.axes[0].get_lines() if len(line.get_ydata()) > 1]
    assert len(shown[0].get_ydata()) == 4


def test_runs_of_both_kinds_have_panels_of_their_own():
    squared = pd.DataFrame({"step": STEPS, "train/loss": np.where(STEPS > 0, 2.0 - STEPS / 1000, np.nan)})
    figure = plot_curves({"a": squared, "b": metrics()}, title="both")
    labels = [axes.get_ylabel() for axes in figure.axes]
    assert labels[:2] == ["loss (squared error per target)", "negative log-likelihood (nats per target)"]


def prior_table(*, has_pool):
    rows = []
    for step in STEPS:
        for candidate, far in (("pool", 1.0), ("gaussian", 0.4)):
            if has_pool or candidate == "gaussian":
                value = far / (1 + step / 50) + (0.01 if candidate == "gaussian" else 0.12)
                rows.append((step, "energy_distance", candidate, value, 0.02, "ok"))
        if has_pool:
            rows.append((step, "preference", "", -0.1 - 0.5 / (1 + step / 50), 0.03, "ok" if step > 1 else "invalid"))
        rows.append((step, "mean_square", "model", 0.2 + 0.001 * step, 0.02, "ok"))
    rows += [(np.nan, "separation", "", 0.11, 0.01, "ok")] if has_pool else []
    rows += [(np.nan, "mean_square", "pool", 0.8, 0.02, "ok")] if has_pool else []
    rows.append((np.nan, "mean_square", "gaussian", 0.9, 0.02, "ok"))
    return pd.DataFrame(rows, columns=["step", "quantity", "candidate", "value", "stderr", "verdict"])


@pytest.mark.parametrize("has_pool", [True, False], ids=["finite M", "infinite M"])
def test_the_figure_of_the_implicit_prior_has_no_faults(has_pool):
    figure = plot(prior_table(has_pool=has_pool), title="r")
    assert faults(figure) == []
    drawn = [line for line in figure.axes[0].get_lines() if line.get_linestyle() == "-" and len(line.get_xdata()) == 5]
    assert len(drawn) == (2 if has_pool else 1)
    open_marks = [line for line in figure.axes[1].get_lines() if line.get_markerfacecolor() == "white"]
    assert sum(len(line.get_xdata()) for line in open_marks) == (2 if has_pool else 0)
