"""The figure of moving pools has one panel for each pool, with the gaps of its own runs; the shipped runs show the known result."""

from pathlib import Path

import pandas as pd
import pytest

from icl.analysis.seeds import over_seeds
from icl.plotting.moving_pool import FIRST_STEP, plot_moving_pools

TABLE = Path(__file__).resolve().parents[2] / "data" / "small" / "moving-pool.csv"


def of_pool(table, num_tasks, steps):
    is_own = table["pool_steps"].eq(steps) if steps else table["pool_steps"].isna()
    return table[is_own & (table["num_tasks"] == num_tasks) & (table["distribution"] == "pretrain")]


def test_every_pool_has_its_panel_with_a_line_for_each_seed_and_their_mean():
    table = pd.read_csv(TABLE)
    panels = plot_moving_pools(table, title="").axes
    assert [axes.get_title() for axes in panels] == [
        "M = 8, fixed",
        "M = 64, fixed",
        "M = 8, walking, n = 1,000 steps",
        "M = 8, walking, n = 30 steps",
    ]
    for axes, pool in zip(panels, ((8, None), (64, None), (8, 1000), (8, 30)), strict=True):
        own = of_pool(table, *pool)
        own = own[own["step"] >= FIRST_STEP]
        num_seeds = own["seed"].nunique()
        lines = axes.get_lines()
        assert len(lines) == 2 * (num_seeds + 1)
        for first, quantity in ((0, "delta_ridge"), (num_seeds + 1, "delta_dmmse")):
            rows = own[own["quantity"] == quantity]
            *seeds, mean = lines[first : first + num_seeds + 1]
            curves = {tuple(curve["value"]) for _, curve in rows.groupby("seed")}
            assert {tuple(line.get_ydata()) for line in seeds} == curves
            expected = rows.groupby("step")["value"].mean()
            assert list(mean.get_xdata()) == list(expected.index)
            assert list(mean.get_ydata()) == pytest.approx(list(expected))


@pytest.mark.parametrize(("num_tasks", "steps", "nearer"), [(8, None, "dmmse"), (64, None, "ridge"), (8, 30, "ridge")])
def test_the_shipped_runs_show_the_known_result(num_tasks, steps, nearer):
    """At the last step all eight seeds, which have other tasks, are nearer to the same predictor, and the 95 % interval excludes zero."""
    table = pd.read_csv(TABLE)
    last = of_pool(table[table["step"] == table["step"].max()], num_tasks, steps)
    gaps = last.pivot(index="seed", columns="quantity", values="value")
    other = "ridge" if nearer == "dmmse" else "dmmse"
    found = over_seeds(gaps[f"delta_{other}"] - gaps[f"delta_{nearer}"])
    assert len(found.values) == 8
    assert min(found.values) > 0
    assert found.low > 0
