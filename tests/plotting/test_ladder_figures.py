"""Figures of the M-ladder and of LLCs show everything in their tables: all runs, all verdicts and the true minima."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from icl.plotting import ladder, llc_studies, ood
from icl.plotting.development import draw_estimates
from icl.plotting.llc import draw_by_verdict, plot_calibration
from icl.plotting.style import new_figure
from icl.plotting.tidying import tidy

DATA = Path(__file__).resolve().parents[2] / "data" / "small"
STEPS = (0, 10, 100, 1000)
QUANTITIES = ("loss", "delta_ridge", "delta_dmmse", "prior_zero", "prior_task_mean")


@pytest.fixture
def runs():
    return pd.DataFrame({"run": ["m2", "m8", "minf"], "num_tasks": ["2", "8", "inf"]})


@pytest.fixture
def evaluation(runs):
    """Return a table in which losses on new tasks fall until step 100 and then rise by 0.25, except for M = inf, where they keep falling."""
    rows = []
    for run in runs["run"]:
        for place, step in enumerate(STEPS):
            loss = 2.0 - 0.5 * place + (0.75 if step == 1000 and run != "minf" else 0.0)
            for distribution in ("pretrain", "true"):
                rows += [(run, step, distribution, quantity, "mean", loss, 0.01) for quantity in QUANTITIES]
    return pd.DataFrame(rows, columns=["run", "step", "distribution", "quantity", "position", "value", "stderr"])


def drawn(axes):
    """Return the points of every plot with error bars."""
    return [np.array(container.lines[0].get_xydata(), dtype=float) for container in axes.containers]


def test_transience_finds_the_minimum_and_the_rise(evaluation, runs):
    when, rise = ladder.plot_transience(evaluation, runs, title="t").axes
    assert sorted(points[0, 1] for points in drawn(when)) == [101, 101, 1001]
    finite, beyond = drawn(rise)[:2]
    np.testing.assert_allclose(finite, [[1, 0.25], [3, 0.25]])
    np.testing.assert_allclose(beyond, [[5, 0.0]])


def test_the_rise_of_one_seed_has_no_error_bar(evaluation, runs):
    """Its error is unknown, and a bar of length zero would say that it is exact."""
    rise = ladder.plot_transience(evaluation, runs, title="t").axes[1]
    finite, _, gaps = rise.containers[:3]
    assert not any(len(segment) for segment in finite.lines[2][0].get_segments())
    assert all(len(segment) for segment in gaps.lines[2][0].get_segments())


def test_an_m_has_the_same_colour_in_every_panel(evaluation, runs):
    """A panel in which an M has no rows gave its colour to another M, while only one panel has the legend."""
    is_missing = (evaluation["run"] == "m2") & (evaluation["quantity"] == "delta_dmmse")
    ridge, dmmse, _ = ladder.plot_gaps(evaluation[~is_missing], runs, title="t").axes

    def colours(axes):
        return {line.get_label(): line.get_color() for line in axes.lines if not line.get_label().startswith("_")}

    assert colours(dmmse) == {label: colour for label, colour in colours(ridge).items() if label != "2"}


@pytest.mark.parametrize(
    "plot", [ladder.plot_task_prior, ladder.plot_gaps, ladder.plot_final_gaps, ladder.plot_transience]
)
def test_every_diversity_is_drawn(plot, evaluation, runs):
    figure = plot(evaluation, runs, title="a ladder")
    assert all(axes.lines for axes in figure.axes)
    assert figure.get_suptitle() == "a ladder"


def test_joint_trajectories_have_a_line_for_each_run_and_a_mark_for_each_reference():
    rows = [
        {"quantity": quantity, "member": member, "step": step, "item": item, "value": float(step or 1)}
        for quantity, members, steps in (
            ("score", ("num_tasks=2", "num_tasks=inf"), (0, 5, 9)),
            ("reference_score", ("dMMSE M=2", "ridge"), (None,)),
            ("explained_share", (None,), (None,)),
        )
        for member in members
        for step in steps
        for item in ("PC1", "PC2", "PC3")
    ]
    figure = ladder.plot_joint_trajectories(pd.DataFrame(rows), title="joint")
    lines = [line for line in figure.axes[1].lines if len(line.get_xdata()) == 3]
    marks = [line for line in figure.axes[1].lines if line.get_marker() in ("D", "*")]
    assert len(lines) == 2
    assert len(marks) == 2
    tidy(figure)
    keys = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert keys == ["last step", "dMMSE of this M", "ridge"]  # of marks in every colour, so drawn for the legend alone


def estimates(**columns):
    base = {
        "settings": "a", "mode": "", "rescale": 1.0, "step": [0, 10, 100], "llc": [-5.0, 20.0, 30.0], "stderr": [1.0, 2.0, 1.0],
        "init_loss": [4.1, 3.0, 2.0], "mean_loss": [4.0, 3.1, 2.2], "trivial_loss": 4.125, "lr": 1e-5, "nbeta": 100.0,
        "localization": 10.0, "num_chains": 2, "num_burnin_steps": 5, "num_draws": 10, "batch_size": 4, "num_samples": 64,
        "verdict": ["invalid", "suspect", "ok"], "reasons": "",
    }  # fmt: skip
    return pd.DataFrame(base | columns)


def test_no_verdict_hides():
    """Each verdict has its own marker, and estimates that are not `ok` are drawn too."""
    _, (axes,) = new_figure()
    draw_estimates(axes, estimates())
    marks = {line.get_marker(): line.get_ydata().tolist() for line in axes.lines if line.get_linestyle() == "None"}
    assert (marks["x"], marks["^"], marks["o"]) == ([-5.0], [20.0], [30.0])


def test_the_published_sampler_is_told_from_the_other():
    both = pd.concat([estimates(), estimates(settings="b", mode="published, num_chains=2", llc=[2.0, 80.0, 150.0])])
    figure = llc_studies.plot_what_is_measured(both, title="two samplers")
    labels = " ".join(figure.axes[0].get_legend_handles_labels()[1])
    assert "published sampler" in labels
    assert "stays in the basin" in labels


def test_the_correlation_with_the_loss_ends_where_it_is_asked_to():
    rows = pd.DataFrame(estimates(llc=[1.0, 5.0, 3.0], init_loss=[4.0, 3.0, 2.0]))
    late = pd.concat([rows, rows.assign(step=[200, 300, 400], llc=[-90.0, 7.0, -50.0])])
    figure = llc_studies.plot_what_is_measured(late, title="t", until=100)
    (label,) = figure.axes[0].get_legend_handles_labels()[1]
    assert label.endswith("(correlation with −loss up to step 100: 0.5000)")


def test_the_loss_of_the_checkpoint_is_that_of_the_sampler_in_the_basin():
    """E[L] of this sampler lies close above L(w0). L(w0) on the prompts of the other sampler can lie above E[L]."""
    published = estimates(settings="b", mode="published", init_loss=[4.5, 3.5, 2.5])
    both = pd.concat([published, estimates()])  # the rows of the published sampler come first in the shipped table
    sampled = llc_studies.plot_what_is_measured(both, title="t").axes[1]
    (line,) = (line for line in sampled.lines if line.get_label().startswith("L(w0)"))
    assert line.get_ydata().tolist() == [4.1, 3.0, 2.0]


def test_chains_that_fall_below_the_checkpoint_are_inside_the_panel_of_the_escape():
    escape = llc_studies.plot_what_is_measured(estimates(mean_loss=[4.0, 2.5, 1.9]), title="t").axes[2]
    (line,) = (line for line in escape.lines if line.get_label() == "sampler that stays in the basin")
    assert escape.get_ylim()[0] < min(line.get_ydata()) < 0
    table = pd.read_csv(DATA / "calibration.csv")
    table["mean_loss"] = table["init_loss"] - 0.1
    escape = plot_calibration(table, {}, title="t").axes[2]
    assert escape.get_ylim()[0] < min(min(line.get_ydata()) for line in escape.lines) < 0


def test_llcs_of_both_localizations_have_error_bars():
    norms = pd.DataFrame({"run": "r/seed=0", "step": [0, 10, 100], "weight_norm": [1.0, 2.0, 4.0]})
    falling = estimates(settings="b").assign(localization=[10.0, 10.0, 2.5]).iloc[2:]
    rows = pd.concat([estimates(), falling]).assign(run="r/seed=0")
    figure = llc_studies.plot_localization(rows, norms, reference_step=10, title="t", stages={})
    bars = [bar.lines[2][0].get_segments() for bar in figure.axes[0].containers]
    assert [[segment[:, 1].tolist() for segment in own] for own in bars] == [
        [[-7.0, -3.0], [16.0, 24.0], [28.0, 32.0]],
        [[16.0, 24.0], [28.0, 32.0]],
    ]


def test_the_legend_says_which_llcs_lie_outside_the_limits():
    _, (axes,) = new_figure()
    rows = estimates()
    draw_by_verdict(axes, rows["step"], rows, limits=(0.0, 40.0))
    assert axes.get_legend_handles_labels()[1] == ["ok", "suspect", "invalid (at the edge: outside the limits)"]
    _, (axes,) = new_figure()
    draw_by_verdict(axes, rows["step"], rows.assign(llc=[np.nan, 20.0, 30.0]), limits=(0.0, 40.0))
    assert axes.get_legend_handles_labels()[1] == ["ok", "suspect", "invalid (at the edge: no estimate)"]


def test_a_failed_setting_of_a_calibration_is_at_the_edge_of_the_panel():
    """This setting has no estimate. The limits grew after its mark was drawn, so the mark looked like an estimate of 28.8."""
    table = pd.read_csv(DATA / "calibration.csv")
    axes = plot_calibration(table, {}, title="t").axes[1]
    (cross,) = (line for line in axes.lines if line.get_marker() == "x")
    assert table.loc[table["lr"] == cross.get_xdata()[0], "llc"].isna().all()
    assert axes.transAxes.inverted().transform(axes.transData.transform(cross.get_xydata()))[0, 1] > 0.95
    ends = [segment[:, 1] for bar in axes.containers for segment in bar.lines[2][0].get_segments()]
    assert (np.concatenate(ends) <= axes.get_ylim()[1]).all()


def test_the_whole_run_shows_both_samplers_and_the_interval_that_contains_the_bias():
    drop = {"drop_at_mean": [60.0, 8.0, 0.1], "drop_at_mean_stderr": 1.0}
    kept = estimates(interval_low=[-20.0, 5.0, 22.0], interval_high=[-3.0, 24.0, 32.0], **drop)
    other = estimates(settings="b", mode="published", llc=[2.0, 80.0, 150.0], interval_low=np.nan, interval_high=np.nan)
    both = pd.concat([kept, other.assign(drop_at_mean=0.0, drop_at_mean_stderr=1.0)])
    norms = pd.DataFrame({"step": [0, 10, 100], "weight_norm": [25.0, 30.0, 60.0]})
    rows = [("LLC (published sampler)", 10, 70.0, 90.0), ("loss", 10, 1.0, 2.0)]
    published = pd.DataFrame(rows, columns=["quantity", "step", "low", "high"])
    stages = {"LR1": 10, "LR2": 100}
    in_basin, by_published, _, weights = llc_studies.plot_over_stages(
        both, norms, published, title="t", stages=stages
    ).axes

    def bars(axes):
        return [segment[:, 1].tolist() for bar in axes.containers for segment in bar.lines[2][0].get_segments()]

    assert bars(in_basin) == [[22.0, 32.0], [5.0, 24.0], [-7.0, -3.0]]  # in the order of verdicts; 2 stderr if invalid
    diamonds = [line.get_xydata().tolist() for line in in_basin.lines if line.get_marker() == "D"]
    assert diamonds == [[[10.0, 28.0]]]  # not where the drop is within its error, nor where the estimate is invalid
    assert bars(by_published) == [[148.0, 152.0], [76.0, 84.0], [0.0, 4.0], [70.0, 90.0]]
    assert [text.get_text() for text in weights.texts] == list(stages)


def test_ratios_are_to_ridge_on_the_same_prompts():
    columns = ["run", "step", "distribution", "quantity", "position", "value", "stderr"]
    model = pd.DataFrame(
        [("r", 5, "true", "loss", "mean", 3.0, 0.3), ("r", 5, "seen_query", "loss", "8", 1.0, 0.1)], columns=columns
    )
    ridge = pd.DataFrame(
        [("r", 5, "true", "ridge", "mean", 1.5, 0.1), ("r", 5, "seen_query", "ridge", "8", 2.0, 0.1)], columns=columns
    )
    axes = ood.plot_shifts(model, ridge, title="shifts").axes[0]
    np.testing.assert_allclose(drawn(axes)[0][:, 0], [2.0, 0.5])
