"""No figure hides a curve, lists an invisible curve in its legend, covers data with its legend, or has overlapping labels.

The checks of `figure_faults` run on every figure function. The inputs are the shipped tables, the same tables reduced to one or two
steps, and the same tables with missing numbers. All combinations together are `slow`; the figures that every run draws are always
checked.
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from figure_faults import faults
from tiny_runs import TINY, change

from icl.evaluation.scores import tabulate_losses
from icl.evaluation.sets import evaluation_set
from icl.plotting import gallery
from icl.plotting.curves import plot_curves
from icl.plotting.evaluation import plot_evaluation
from icl.plotting.style import new_figure, render_figure
from icl.plotting.tidying import KEY, tidy
from icl.plotting.training import plot_training

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("*.ipynb"))
MEASURED = ("value", "stderr", "llc", "mean_loss", "model", "train/loss")


# The checker finds what it is for


def _broken(kind):
    figure, (axes,) = new_figure()
    x = np.linspace(0, 1, 50)
    axes.plot(x, x, label="a line", marker="o" if kind == "whole" else None)
    if kind == "lost curve":
        axes.plot(x, x + 9, label="above")
        axes.set_ylim(0, 1)
    elif kind == "empty entry":
        axes.plot([], [], label="nothing")
        axes.legend()
    elif kind == "one point":
        axes.plot([0.5], [0.5], label="a point")
        axes.legend(loc="upper left")
    elif kind == "covered":
        axes.legend(loc="center", fontsize=30)
    elif kind == "labels":
        axes.set_xticks(np.linspace(0, 1, 40), [f"{value:.6f}" for value in np.linspace(0, 1, 40)])
    elif kind == "text":
        axes.set_title("a title " * 40)
    return figure


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("lost curve", "outside the axes"),
        ("empty entry", "'nothing' has nothing to show"),
        ("one point", "'a point' has nothing to show"),
        ("covered", "the legend covers"),
        ("labels", "overlap"),
        ("text", "leaves the figure"),
    ],
)
def test_the_checker_sees_each_fault(kind, said):
    assert any(said in fault for fault in faults(_broken(kind), tidied=False))


@pytest.mark.parametrize("kind", ["empty entry", "one point", "covered", "labels", "whole"])
def test_tidying_mends_what_depends_on_the_data(kind):
    assert faults(_broken(kind)) == []


def test_tidying_twice_changes_nothing_more():
    for kind in ("empty entry", "covered"):
        figure = _broken(kind)
        first = render_figure(figure)
        assert render_figure(figure) == first


def test_a_legend_that_fits_nowhere_goes_below_the_axes():
    figure, (axes,) = new_figure()
    for shift in np.linspace(0, 1, 8):
        axes.plot(np.linspace(0, 1, 50), np.linspace(0, 1, 50) * 0.02 + shift, label=f"line {shift:.2f}")
    axes.legend(fontsize=14)
    tidy(figure)
    figure.draw_without_rendering()
    assert axes.get_legend().get_window_extent().y1 < axes.bbox.y0
    assert faults(figure) == []


def test_a_legend_that_moves_keeps_its_columns():
    """A legend of two columns was measured, and then redrawn in one column, twice as high."""
    figure, (axes,) = new_figure()
    x = np.linspace(0, 1, 50)
    for number in range(8):
        heights = np.where(x < 0.4, 0.95, 0.3) if number == 0 else np.full(50, 0.3 + 0.02 * number)
        axes.plot(x, heights, label=f"line {number}")
    axes.set_ylim(0, 1)
    axes.legend(ncols=2, loc="upper left")
    figure.draw_without_rendering()
    before = axes.get_legend().get_window_extent()
    tidy(figure)
    figure.draw_without_rendering()
    after = axes.get_legend().get_window_extent()
    assert after.x0 > before.x0 + 100
    assert (after.width, after.height) == pytest.approx((before.width, before.height), rel=0.05)


def test_a_key_to_line_styles_keeps_its_entry():
    figure, (axes,) = new_figure()
    axes.plot([0, 1], [0, 1], label="line")
    axes.plot([], [], linestyle="--", label="ridge's", gid=KEY)
    axes.legend()
    tidy(figure)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["line", "ridge's"]


def test_a_logarithmic_axis_without_positive_numbers_is_made_linear():
    figure, (axes,) = new_figure()
    axes.plot([1, 2], [np.nan, np.nan], label="a")
    axes.set(yscale="log", xscale="log")
    assert faults(figure) == []


# training.png


def learning(steps, *, evaluated, diverged=False):
    """Return a run's `metrics.csv`, with evaluations in some of its rows."""
    losses = np.geomspace(3, 0.5, len(steps)) if not diverged else np.geomspace(3, 1e7, len(steps))
    table = pd.DataFrame({"step": steps, "train/loss": losses})
    table.loc[table["step"] == 0, "train/loss"] = np.nan
    for name, factor in (("pretrain", 1.0), ("true", 1.3)):
        table[f"eval/{name}/loss"] = np.where(table["step"].isin(evaluated), factor * losses, np.nan)
    return table


def losses_of(config, predict):
    """Return the tables that `draw_run` needs, with a predictor in place of the model."""
    sets = [evaluation_set(config, name, num_prompts=64) for name in ("pretrain", "true")]
    return {one.name: tabulate_losses(predict(one), one) for one in sets}


def best(one):
    return one.baselines.get("dmmse", one.baselines["ridge"])


TASKS = {
    "usual": {},
    "M = 1": {"num_tasks": 1},
    "M = inf": {"num_tasks": float("inf")},
    "D = 1": {"task_size": 1},
    "K = 1": {"max_examples": 1},
    "K = 1, M = 1": {"max_examples": 1, "num_tasks": 1},
    "no noise": {"noise_variance": 0.0},
    "no noise, M = 1": {"noise_variance": 0.0, "num_tasks": 1},
    "much noise": {"noise_variance": 100.0},
    "little noise": {"noise_variance": 1e-6, "num_tasks": 1},
    "D = 12, K = 32": {"task_size": 12, "max_examples": 32},
}
CURVES = {
    "usual": learning([0, *range(100, 5001, 100)], evaluated=range(0, 5001, 500)),
    "one evaluation": learning([10, 20, 30], evaluated=[30]),
    "first and last": learning([0, 10, 20, 30], evaluated=[0, 30]),
    "step 0 only": learning([0], evaluated=[0]),
    "one row": learning([5], evaluated=[]),
    "no evaluation": learning([10, 20, 30], evaluated=[]).drop(columns=["eval/pretrain/loss", "eval/true/loss"]),
    "diverged": learning([0, *range(10, 200, 10)], evaluated=[0, 100], diverged=True),
    "three million steps": learning([0, *np.unique(np.geomspace(100, 3e6, 60).astype(int))], evaluated=[0, 100]),
}


ALWAYS = ("M = inf", "K = 1, M = 1", "little noise", "one evaluation", "step 0 only", "diverged")
"""The inputs of every run of the tests; the others are `slow`."""


def _cases(names):
    return [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", _cases(TASKS))
def test_training_figure_of_every_task(name):
    config = change(TINY, task=TASKS[name])
    figure = plot_training(CURVES["usual"], losses_of(config, best), title=name)
    assert faults(figure) == []
    _, pretrain, true = figure.axes
    assert pretrain.get_ylim() == true.get_ylim()
    for axes in (pretrain, true):
        (line,) = (line for line in axes.lines if line.get_label() == "transformer")
        low, high = axes.get_ylim()
        assert ((line.get_ydata() >= low) & (line.get_ydata() <= high)).all()


@pytest.mark.parametrize("name", _cases(CURVES))
def test_training_figure_of_every_length(name):
    assert faults(plot_training(CURVES[name], losses_of(TINY, best), title=name)) == []


@pytest.mark.parametrize("value", [np.inf, 1e8])
def test_training_figure_of_a_model_that_diverged(value):
    losses = losses_of(TINY, best)
    losses["true"]["model"] = value
    assert faults(plot_training(CURVES["usual"], losses, title="diverged")) == []


# The curves of several runs, and evaluations


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("usual", 5),
        ("first and last", 17),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("usual", 1), ("step 0 only", 2), ("one row", 1))),
    ],
)
def test_curves_of_runs(name, count):
    runs = {f"num_tasks={2**number},seed=0": CURVES[name] * (1 + 0.05 * number) for number in range(count)}
    for number, table in enumerate(runs.values()):
        table["step"] = CURVES[name]["step"]
        table["eval/true/loss"] *= 1 + number
    assert faults(plot_curves(runs, title="a sweep")) == []


def numbers(steps, value=1.0):
    rows = [
        (step, name, quantity, "mean", value / (1 + place), 0.1)
        for place, step in enumerate(steps)
        for name in ("pretrain", "true", "input_scale_3", "half_subspace")
        for quantity in ("loss", "delta_ridge", "delta_dmmse", "prior_zero")
    ]
    return pd.DataFrame(rows, columns=["step", "distribution", "quantity", "position", "value", "stderr"])


@pytest.mark.parametrize(
    ("steps", "value"),
    [
        ([0, 60], np.nan),
        ([0, 1, 10, 100, 100_000], 1.0),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (([0], 1.0), ([0, 60], 1e-12))),
    ],
)
def test_evaluation_figure(steps, value):
    baselines = numbers([0]).query("quantity == 'loss'").assign(quantity="ridge")
    assert faults(plot_evaluation(numbers(steps, value), baselines, title="an evaluation")) == []


# The gallery


def _steps(choose):
    """Keep some of each run's steps, and the rows that belong to no step."""

    def reduced(table):
        if "step" not in table:
            return table
        runs = table["run"] if "run" in table else pd.Series("", index=table.index)
        kept = [
            own[own["step"].isna() | own["step"].isin(choose(sorted(own["step"].dropna().unique())))]
            for _, own in table.groupby(runs, sort=False)
        ]
        return pd.concat(kept).reset_index(drop=True)

    return reduced


def _with_gaps(table):
    """Remove every third measured number."""
    table = table.copy()
    for column in MEASURED:
        if column in table:
            table.loc[table.index[::3], column] = np.nan
    return table


VARIANTS = {
    "as shipped": lambda table: table,
    "last step": _steps(lambda steps: steps[-1:]),
    "two steps": _steps(lambda steps: [steps[0], steps[-1]]),
    "step 0": _steps(lambda steps: steps[:1]),
    "gaps": _with_gaps,
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_gallery(path, variant, monkeypatch, as_users_run):
    table, found = gallery.Gallery.table, []
    monkeypatch.chdir(path.parent)
    monkeypatch.setattr(gallery.Gallery, "table", lambda self, *names: VARIANTS[variant](table(self, *names)))
    monkeypatch.setattr(
        gallery.Gallery, "save", lambda self, figure, name, _: found.extend((name, one) for one in faults(figure))
    )
    names = {}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(line for line in cell["source"] if not line.startswith("%")), names)
    assert found == []
