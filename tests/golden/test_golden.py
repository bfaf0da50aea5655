"""The losses of every preset are those that were recorded."""

import json

import pytest
from record import FILE, golden_config, losses

from icl.presets import PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_first_losses_are_the_recorded_ones(name):
    """Within the rounding of float32 sums on another machine; any change of the maths is far larger."""
    assert losses(golden_config(PRESETS[name])) == pytest.approx(json.loads(FILE.read_text())[name], rel=2e-5)
