"""The figure of predictions draws each predictor correctly: ridge without examples predicts 0, and the task's line is the true task."""

from pathlib import Path

import numpy as np
import pytest

from icl.plotting.predictions import plot_predictions

DATA = Path(__file__).resolve().parents[2] / "data"


def lines(axes):
    """Return x and y of every line, by its label."""
    return {line.get_label(): (line.get_xdata(), line.get_ydata()) for line in axes.lines}


@pytest.mark.parametrize(
    ("models", "has_pool"), [("small/models/quickstart", True), ("published-run/models/L2H4-seed=0", False)]
)
def test_predictions_along_the_task(models, has_pool):
    file = sorted((DATA / models).glob("*.safetensors"))[-1]
    first, second = plot_predictions(file, num_examples=(0, 3), title="t").axes
    drawn = lines(first)
    reach, task = drawn["task, w · x"]
    np.testing.assert_allclose(drawn["ridge (Bayes for M = ∞)"][1], 0, atol=1e-6)
    np.testing.assert_allclose(np.diff(task), np.diff(task)[0], rtol=1e-3)
    assert reach[0] == -reach[-1]
    assert ("dMMSE (Bayes for the M tasks)" in drawn) == has_pool
    assert len(lines(second)["examples, projected on w"][0]) == 3
    slope = np.polyfit(*lines(second)["ridge (Bayes for M = ∞)"], 1)
    assert abs(slope[1]) < 1e-5  # linear in the query, through 0
