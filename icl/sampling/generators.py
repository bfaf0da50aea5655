"""A caller's loss must not draw from torch's global generators: the seed would not fix the estimate.

Where it does, the generators are put back as they were, and it is refused.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from icl.validation import ConfigError


@contextmanager
def untouched_generators(refusal: str, device: torch.device | None = None) -> Iterator[None]:
    """Refuses, with this sentence, what draws from the CPU's generator, or from that of a CUDA device.

    Raises:
        ConfigError: If it does.
    """
    before = _states(device)
    try:
        yield
    finally:
        drew = not all(torch.equal(old, new) for old, new in zip(before, _states(device), strict=True))
        if drew:
            torch.set_rng_state(before[0])
            if device is not None and device.type == "cuda":
                torch.cuda.set_rng_state(before[1], device)
    if drew:
        raise ConfigError(refusal)


def _states(device: torch.device | None) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device is not None and device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states
