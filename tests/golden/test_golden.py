"""The training losses of every preset equal the recorded losses."""

import json

import pytest
from record import FILE, NAMES, SAFETY, golden_config, losses

from icl.presets import PRESETS

RECORDED = json.loads(FILE.read_text())


@pytest.mark.parametrize("name", NAMES)
def test_first_losses_are_the_recorded_ones(name):
    """Within what neighbouring initial weights change (see record.py); any change of the maths is far larger."""
    recorded = RECORDED[name]
    assert losses(golden_config(PRESETS[name])) == pytest.approx(
        recorded["losses"], rel=SAFETY * recorded["sensitivity"]
    )


def test_the_recorded_losses_are_well_conditioned():
    """A loss that amplifies the rounding of the initial weights (6e-8) too much would tell processors apart."""
    assert {name: one["sensitivity"] for name, one in RECORDED.items() if one["sensitivity"] > 3e-6} == {}
