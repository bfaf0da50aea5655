"""Axes of training steps hide nothing: step 0 is shown, markers at the ends are not cut off, and a single estimate is readable."""

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from figure_faults import faults
from matplotlib.backends.backend_agg import FigureCanvasAgg

from icl.plotting import hessian
from icl.plotting.colours import ordered_colours
from icl.plotting.evaluation import plot_evaluation
from icl.plotting.llc import plot_llc
from icl.plotting.llc_estimate import plot_estimate
from icl.plotting.ood import plot_shifts_over_training
from icl.plotting.style import new_figure, scale_steps
from icl.plotting.training import plot_training
from icl.sampling.records import Record

TOLD = {"nbeta": 100.0, "localization": 10.0, "lr": 1e-5, "num_chains": 2, "num_burnin_steps": 5, "num_draws": 10, "batch_size": 4,
        "num_samples": 64, "trivial_loss": 2.25}  # fmt: skip


def estimates(*steps):
    return pd.DataFrame({"step": steps, "llc": 20.0, "stderr": 1.0, "init_loss": 0.8, "mean_loss": 0.9, "verdict": "ok"}).assign(
        **TOLD
    )  # fmt: skip


def numbers(*names, quantity="loss", value=2.0):
    """Return rows of `evaluation.csv` at steps 0, 10 and 100."""
    return pd.DataFrame(
        [(step, name, quantity, "mean", value, 0.1) for step in (0, 10, 100) for name in names],
        columns=["step", "distribution", "quantity", "position", "value", "stderr"],
    )


def places(line):
    """Return the positions of a line's points, in pixels."""
    return line.get_transform().transform(np.array(line.get_xydata(), dtype=float))


@pytest.mark.parametrize("steps", [(5000,), (0,), (0, 7, 5000), (3, 5000), (40_293,)])
def test_marks_are_whole_and_labels_apart(steps):
    figure = plot_llc(estimates(*steps), 2.25, title="x", stages=[138.0])
    FigureCanvasAgg(figure).draw()  # so that places are known
    for axes in figure.axes:
        frame = axes.get_window_extent()
        marked = [line for line in axes.lines if line.get_marker() in ("o", ".") and len(line.get_xdata())]
        assert len(marked) >= 1
        for line in marked:
            radius = line.get_markersize() / 2 * figure.dpi / 72
            assert np.all(places(line)[:, 0] - radius > frame.x0)
            assert np.all(places(line)[:, 0] + radius < frame.x1)
        low, high = axes.get_xlim()
        texts = [text for text in axes.get_xticklabels(which="both") if low <= text.get_position()[0] <= high]
        extents = sorted((box.x0, box.x1) for box in (text.get_window_extent() for text in texts if text.get_text()))
        assert len(extents) >= 2
        assert all(before[1] < after[0] for before, after in itertools.pairwise(extents))


def test_one_estimate_is_drawn_once_and_named():
    figure = plot_llc(estimates(5000), 2.25, title="x", stages=[138.0, 400.0])
    losses, below = figure.axes
    assert below.get_title() == "LLC 20 ± 1, ok"
    names = [text.get_text() for text in losses.get_legend().get_texts()]
    assert names.count("boundary between stages") == 1
    assert "predicting zero (2.25, above the axis limits)" in names
    assert len(plot_llc(estimates(10, 5000), 2.25, title="x").axes) == 4


def test_what_is_in_range_is_not_said_to_lie_beyond():
    legend = plot_llc(estimates(5, 10).assign(mean_loss=[2.3, 0.9]), 2.25, title="x").axes[1].get_legend()
    assert "predicting zero" in [text.get_text() for text in legend.get_texts()]


def test_evaluations_show_step_0():
    table = pd.concat(
        [
            numbers("pretrain", "true"),
            *(numbers("pretrain", "true", quantity=name) for name in ("delta_ridge", "prior_zero")),
        ]
    )
    baselines = numbers("pretrain", "true", quantity="ridge", value=1.0).query("step == 0").drop(columns="step")
    for axes in plot_evaluation(table, baselines, title="x").axes[:2]:
        assert [bars.lines[0].get_xdata().tolist() for bars in axes.containers] == [[0, 10, 100]] * 2
        assert axes.get_xlim()[0] < 0


def test_learning_curves_show_step_0_beside_the_batches():
    metrics = pd.DataFrame(
        {"step": [0, 50, 100], "train/loss": [np.nan, 2.0, 1.0], "eval/pretrain/loss": [3.0, np.nan, 1.0], "eval/true/loss": [4.0, np.nan, 2.0]}
    )  # fmt: skip
    losses = pd.DataFrame({"model": [1.0, 1.0], "ridge": [0.5, 0.5], "zero": [2.0, 2.0]}, index=["1", "mean"])
    figure = plot_training(metrics, {"pretrain": losses, "true": losses}, title="x")
    axes = figure.axes[0]
    points = [line.get_xydata().tolist() for line in axes.lines if line.get_marker() == "o"]
    assert points == [[[100, 1]], [[0, 3]], [[100, 2]], [[0, 4]]]
    assert axes.get_xlim()[0] < 0
    assert {"zero", "ridge (Bayes for M = ∞)"} <= {text.get_text() for text in figure.legends[0].get_texts()}


def test_shifts_over_training_are_at_step_plus_1_beside_ridge():
    names = ("pretrain", "input_scale_3", "task_scale_3")
    baselines = numbers(*names, quantity="ridge", value=1.0).query("step == 0").drop(columns="step")
    for axes in plot_shifts_over_training(numbers(*names), baselines, title="x").axes:
        (curve,) = (line for line in axes.lines if len(line.get_xdata()) == 3)
        np.testing.assert_allclose(curve.get_xydata(), [[1, 2], [11, 2], [101, 2]])
        assert "ridge" in [text.get_text() for text in axes.get_legend().get_texts()]
        assert axes.get_xlabel().startswith("step + 1")


def test_an_empty_panel_has_an_axis_too():
    _, (axes,) = new_figure()
    scale_steps(axes)
    assert axes.get_xlim() == (-0.1, 1.3)


def test_what_comes_later_is_lighter():
    red, green, blue, _ = np.array(ordered_colours(9)).T
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    assert np.all(np.diff(luminance) > 0)
    assert luminance[-1] < 0.8


def record(num_chains=3, num_draws=40, num_burnin=10, llc=20.0):
    """Return an estimate of one step. Apart from noise, its traces lie `llc` nats above the checkpoint."""
    noise = np.random.default_rng(0).normal(size=(num_chains, num_burnin + num_draws))
    row = estimates(5000).iloc[0].to_dict() | {"llc": llc, "num_burnin_steps": num_burnin, "step": 5000}
    return Record(row, [], 0.8 + (llc + 5 * noise) / row["nbeta"], 1, np.zeros(0), np.zeros(0))


@pytest.mark.parametrize("chains", [1, 3, 9])
def test_one_estimate_shows_its_chains_in_nats(chains):
    figure = plot_estimate(record(chains), 2.25, title="x")
    (axes,) = figure.axes
    assert axes.get_ylabel().endswith("nats")
    traces = [line for line in axes.lines if len(line.get_xdata()) == 50]
    means = [line for line in axes.lines if len(line.get_xdata()) == 40]
    assert len(traces) == len(means) == chains
    for trace, mean in zip(traces, means, strict=True):
        assert mean.get_ydata()[-1] == pytest.approx(trace.get_ydata()[10:].mean())
        assert mean.get_ydata()[-1] == pytest.approx(20, abs=4 * 5 / 40**0.5)
    assert axes.get_title() == "step 5,000: LLC 20 ± 1, ok"
    assert faults(figure) == []
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert "predicting zero (145 nats, above the axis limits)" in names


def test_chains_that_ended_leave_a_figure_of_the_others():
    one = record(3)
    one.traces[0, 20:] = np.nan
    one.traces[1] = np.inf
    assert faults(plot_estimate(one, 2.25, title="x")) == []


def test_the_largest_eigenvalue_is_inside_its_panel():
    """The limits were computed on the linear scale, where a margin of 5 % is nothing on the logarithmic part of the axis."""
    table = pd.read_csv(Path(__file__).resolve().parents[2] / "data" / "published-run" / "hessian.csv")
    axes = hessian.plot(table[table["run"] == "L2H4/seed=0"], title="t").axes[1]
    axes.figure.draw_without_rendering()
    highest = max(max(line.get_ydata()) for line in axes.lines if len(line.get_ydata()))
    assert axes.transAxes.inverted().transform(axes.transData.transform((1, highest)))[1] < 0.97
