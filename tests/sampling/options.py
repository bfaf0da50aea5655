"""Keywords of an estimate as the tests write them: the less common ones go into the options."""

import dataclasses

from icl.sampling import EstimateOptions

_NAMES = {field.name for field in dataclasses.fields(EstimateOptions)}


def keywords(**given):
    """Move the options among some keywords into one object."""
    options = EstimateOptions(**{name: given.pop(name) for name in _NAMES & set(given)})
    return {**given, "options": options}
