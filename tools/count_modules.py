"""Count the modules of `icl` whose functions run on two walks through the program.

- `llc`: from a saved checkpoint to the row of its LLC (`icl.sampling.estimate_run` on one checkpoint file).
- `loss`: from a random stream to the loss of a model on a batch of prompts.

A walk that passes through many modules is hard to follow. Run it with `python -m tools.count_modules`; it prints each walk's
modules in the order in which they are first entered.
"""

import sys
import types
from collections.abc import Callable
from typing import Any

from icl.config import SamplerConfig

_SAMPLER = SamplerConfig(
    num_chains=2, num_draws=4, num_burnin_steps=2, num_samples=64, batch_size=16, nbeta=5.0, minibatches="fixed"
)


def modules_of(walk: Callable[[], Any]) -> list[str]:
    """Return the modules of `icl` whose functions run in a call, in the order in which they are first entered."""
    names: dict[str, None] = {}

    def note(frame: types.FrameType, event: str, arg: Any) -> None:
        name = frame.f_globals.get("__name__", "")
        if event == "call" and name.startswith("icl.") and frame.f_code.co_name != "<module>":
            names.setdefault(name)

    sys.setprofile(note)
    try:
        walk()
    finally:
        sys.setprofile(None)
    return list(names)
