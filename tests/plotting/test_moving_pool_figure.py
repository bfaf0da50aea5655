"""The figure of moving pools has one panel for each pool, with the gaps of its own runs."""

from pathlib import Path

import pandas as pd

from icl.plotting.moving_pool import FIRST_STEP, plot_moving_pools

TABLE = Path(__file__).resolve().parents[2] / "data" / "small" / "moving-pool.csv"


def test_every_pool_has_its_panel_and_its_curves():
    table = pd.read_csv(TABLE)
    panels = plot_moving_pools(table, title="").axes
    assert [axes.get_title() for axes in panels] == [
        "M = 8, fixed",
        "M = 64, fixed",
        "M = 8, walking, n = 1,000 steps",
        "M = 8, walking, n = 30 steps",
    ]
    for axes, (num_tasks, steps) in zip(panels, ((8, None), (64, None), (8, 1000), (8, 30)), strict=True):
        is_own = (
            (table["num_tasks"] == num_tasks) & table["pool_steps"].eq(steps) if steps else table["pool_steps"].isna()
        )
        own = table[is_own & (table["num_tasks"] == num_tasks) & (table["distribution"] == "pretrain")]
        for line, quantity in zip(axes.get_lines(), ("delta_ridge", "delta_dmmse"), strict=True):
            expected = own[(own["quantity"] == quantity) & (own["step"] >= FIRST_STEP)]
            assert list(line.get_ydata()) == list(expected["value"])
            assert list(line.get_xdata()) == list(expected["step"])


def test_the_shipped_runs_show_the_known_result():
    """M = 8 fixed tasks end nearer to dMMSE; M = 64 tasks, and 8 tasks that walk fast, end nearer to ridge, by two standard errors."""
    table = pd.read_csv(TABLE)
    last = table[(table["step"] == table["step"].max()) & (table["distribution"] == "pretrain")]
    for num_tasks, steps, nearer in ((8, None, "dmmse"), (64, None, "ridge"), (8, 30, "ridge")):
        is_own = last["pool_steps"].eq(steps) if steps else last["pool_steps"].isna()
        own = last[is_own & (last["num_tasks"] == num_tasks)].set_index("quantity")
        other = "ridge" if nearer == "dmmse" else "dmmse"
        distance = own.loc[f"delta_{other}", "value"] - own.loc[f"delta_{nearer}", "value"]
        error = (own.loc["delta_ridge", "stderr"] ** 2 + own.loc["delta_dmmse", "stderr"] ** 2) ** 0.5
        assert distance > 2 * error
