"""Functions that let tests pass all settings of an estimate as keywords. The less common settings become `EstimateOptions`."""

import dataclasses

from icl.config import ChainsConfig
from icl.sampling import EstimateOptions, estimate_llcs

_NAMES = {field.name for field in dataclasses.fields(EstimateOptions)}


_SETTINGS = {field.name for field in dataclasses.fields(ChainsConfig)}


def estimate_many(loss, checkpoints, batches, **given):
    """Estimate several checkpoints, with all settings as keywords."""
    settings = ChainsConfig(**{name: given.pop(name) for name in _SETTINGS & set(given)})
    return estimate_llcs(loss, checkpoints, batches, settings, **given)


def keywords(**given):
    """Return the keywords with the options among them moved into one `EstimateOptions`."""
    options = EstimateOptions(**{name: given.pop(name) for name in _NAMES & set(given)})
    return {**given, "options": options}
