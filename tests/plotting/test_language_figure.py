"""The figure of a language run's behaviours names the heads with the largest values at the last step."""

import numpy as np
import pandas as pd

from icl.plotting.language import _draw_curves_of
from icl.plotting.style import new_figure


def test_a_head_without_a_last_value_is_not_among_the_largest():
    """NaN was sorted as if it were the largest value."""
    last = {"b1h1": np.nan, "b1h2": 0.1, "b1h3": 0.2, "b1h4": 0.3, "b2h1": 0.4, "b2h2": 0.05}
    rows = pd.DataFrame(
        [
            {"step": step, "part": part, "position": "", "value": value if step else 0.0, "stderr": 0.01}
            for part, value in last.items()
            for step in (0, 10)
        ]
    )
    _, (axes,) = new_figure()
    _draw_curves_of(axes, rows, prefix="")
    assert sorted(axes.get_legend_handles_labels()[1]) == ["b1h2", "b1h3", "b1h4", "b2h1"]
