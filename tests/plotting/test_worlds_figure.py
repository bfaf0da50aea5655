"""The figure of other worlds has a panel for each preset; the shipped runs show which predictor the models learned."""

from pathlib import Path

import pandas as pd
import pytest

from icl.analysis.seeds import over_seeds
from icl.plotting.worlds import plot_worlds

TABLE = Path(__file__).resolve().parents[2] / "data" / "small" / "worlds.csv"
GAUSSIAN = ("student-t-inputs", "ar1-inputs")
"""The presets in which ridge is the Bayes predictor."""


def test_every_preset_has_its_panel_with_one_or_two_gaps():
    table = pd.read_csv(TABLE)
    panels = plot_worlds(table, title="").axes
    presets = list(dict.fromkeys(table["preset"]))
    assert [axes.get_title().split(" ")[0] for axes in panels] == presets
    for axes, preset in zip(panels, presets, strict=True):
        own = table[table["preset"] == preset]
        assert own["seed"].nunique() == 3
        num_gaps = 1 if preset in GAUSSIAN else 2
        assert len(axes.get_lines()) == num_gaps * 4 + (
            num_gaps == 2
        )  # three seeds and their mean for each gap, and the distance
        expected = own[(own["quantity"] == "delta_ridge") & (own["step"] >= 100)].groupby("step")["value"].mean()
        assert list(axes.get_lines()[3].get_ydata()) == pytest.approx(list(expected))


@pytest.mark.parametrize("preset", ["low-rank-tasks", "mixture-tasks", "laplace-noise"])
def test_the_shipped_models_of_these_presets_end_nearer_to_the_bayes_predictor_than_to_ridge(preset):
    table = pd.read_csv(TABLE)
    own = table[(table["preset"] == preset) & (table["step"] == table["step"].max())]
    gaps = own.pivot(index="seed", columns="quantity", values="value")
    found = over_seeds(gaps["delta_ridge"] - gaps["delta_bayes"])
    assert len(found.values) == 3
    assert found.low > 0
