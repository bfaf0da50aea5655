"""Figures of several seeds show every seed, and the interval over seeds from three seeds on."""

import numpy as np
import pandas as pd
import pytest

from icl.analysis.seeds import over_seeds
from icl.plotting import ladder
from icl.plotting.diversity import plot_diversity
from icl.plotting.seeds import draw_curves, draw_points
from icl.plotting.style import new_figure

VALUES = {1: [2.0], 2: [1.0, 3.0], 3: [1.0, 2.0, 4.0]}


def bars(axes):
    """Return the ends of each vertical bar, by x."""
    segments = axes.containers[0].lines[2][0].get_segments()
    return {segment[0][0]: tuple(segment[:, 1]) for segment in segments if len(segment)}


def test_one_seed_has_its_error_over_prompts_two_have_points_and_three_an_interval():
    _, (axes,) = new_figure()
    rows = [{"x": x, "value": value, "stderr": 0.1} for x, values in VALUES.items() for value in values]
    draw_points(axes, pd.DataFrame(rows), color="k", fmt="o")
    found = bars(axes)
    assert found[1] == pytest.approx((1.8, 2.2))
    assert 2 not in found or np.isnan(found[2]).any()
    three = over_seeds(VALUES[3])
    assert found[3] == pytest.approx((three.low, three.high))
    np.testing.assert_allclose(axes.collections[-1].get_offsets(), [[x, v] for x in (2, 3) for v in VALUES[x]])


def test_curves_have_a_thin_line_per_seed_and_a_band_over_seeds():
    _, (axes,) = new_figure()
    rows = [
        {"run": run, "x": x, "value": value * x, "stderr": 0.1}
        for x in (1.0, 2.0)
        for run, value in enumerate(VALUES[3])
    ]
    draw_curves(axes, pd.DataFrame(rows), color="k", linewidth=2.0)
    assert [line.get_linewidth() for line in axes.lines] == [0.6, 0.6, 0.6, 2.0]
    np.testing.assert_allclose(axes.lines[-1].get_ydata(), [7 / 3, 14 / 3])
    edge = axes.collections[0].get_paths()[0].vertices
    three = over_seeds(VALUES[3])
    assert edge[edge[:, 0] == 1, 1].min() == pytest.approx(three.low)
    assert edge[edge[:, 0] == 1, 1].max() == pytest.approx(three.high)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_band_of_negative_values_is_drawn(sign):
    """Without a floor, the lower limit of the band was -inf times the mean, which is inf for a negative mean."""
    _, (axes,) = new_figure()
    rows = pd.DataFrame({"run": "a", "x": [1.0, 2.0], "value": [sign, 2 * sign], "stderr": 0.1})
    draw_curves(axes, rows, color="k")
    edge = axes.collections[0].get_paths()[0].vertices
    assert sorted(set(edge[edge[:, 0] == 1, 1])) == pytest.approx([sign - 0.2, sign + 0.2])


def evaluation(num_seeds):
    rows = []
    for m in ("2", "8", "inf"):
        for seed in range(num_seeds):
            for step, loss in ((0, 2.0), (10, 1.0), (100, 1.5 + 0.1 * seed)):
                rows += [
                    (f"m{m}-{seed}", step, distribution, quantity, "mean", loss, 0.01)
                    for distribution in ("pretrain", "true")
                    for quantity in ("loss", "delta_ridge", "delta_dmmse", "prior_zero", "prior_task_mean")
                ]
    table = pd.DataFrame(rows, columns=["run", "step", "distribution", "quantity", "position", "value", "stderr"])
    runs = pd.DataFrame({"run": [f"m{m}-{seed}" for m in ("2", "8", "inf") for seed in range(num_seeds)]})
    return table, runs.assign(num_tasks=runs["run"].str.extract(r"m(\w+)-")[0])


def test_the_rise_of_a_ladder_has_the_interval_over_seeds():
    table, runs = evaluation(3)
    when, rise = ladder.plot_transience(table, runs, title="t").axes
    assert len(when.containers) == 9
    three = over_seeds([0.5, 0.6, 0.7])
    assert bars(rise)[1.0] == pytest.approx((three.low, three.high))


@pytest.mark.parametrize("num_seeds", [1, 2, 3])
def test_every_ladder_figure_takes_several_seeds(num_seeds):
    table, runs = evaluation(num_seeds)
    for plot in (ladder.plot_task_prior, ladder.plot_gaps, ladder.plot_final_gaps):
        assert all(axes.lines for axes in plot(table, runs, title="t").axes)
    figure = plot_diversity(table.merge(runs, on="run"), title="t")
    assert ("over seeds" in figure.axes[0].get_ylabel()) == (num_seeds > 1)
