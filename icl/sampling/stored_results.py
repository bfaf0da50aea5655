"""Complete results of estimates, stored so that an interrupted calibration continues after its last finished settings.

The records of `icl.sampling.records` are made for users. A search needs more: all the evidence and the unthinned traces. Each result is an
entry (`icl.runs.measure`) in `results/llc-calibration/<settings>/`. Its key consists of the hash of the checkpoint, the settings, and the
versions of the estimation method and of the verdict's rules.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from icl.config import SamplerConfig
from icl.config.validation import has_type
from icl.runs.checkpoints import Checkpoint
from icl.runs.measure import Cache, Entry
from icl.sampling.records import EstimateSettings
from icl.sampling.result import LLCResult

_NOT_STORED = ("settings", "fluctuation", "observables")
"""Fields of an `LLCResult` that follow from the settings, or that a calibration does not compute."""
_NUMBERS = {
    field.name: field.type
    for field in dataclasses.fields(LLCResult)
    if field.name not in _NOT_STORED and not any(part in str(field.type) for part in ("Float", "Tensor"))
}


class StoredResults:
    """The results of a run's calibration.

    Args:
        folder: Folder that contains the results.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, checkpoint: Checkpoint, sampler: SamplerConfig) -> LLCResult | None:
        """Return the result of a checkpoint under some settings, or None if it is missing, damaged or of another version."""
        entry = self._cache(sampler).read(checkpoint.step, _key(checkpoint, sampler))
        if entry is None or len(entry.rows) != 1 or set(entry.rows[0]) != set(_NUMBERS):
            return None
        numbers: dict[str, Any] = entry.rows[0]
        if not all(has_type(numbers[name], kind) for name, kind in _NUMBERS.items()):
            return None
        arrays: dict[str, Any] = {name: torch.tensor(array) for name, array in entry.arrays.items()}
        missing = {field.name for field in dataclasses.fields(LLCResult)} - {*_NOT_STORED, *numbers, *arrays}
        if "loss_trace" not in arrays or not missing <= {"llc_per_component", "stderr_per_component"}:
            return None
        nbeta, num_draws = sampler.inverse_temperature, arrays["loss_trace"].shape[1]
        settings = dataclasses.replace(sampler, nbeta=nbeta, num_draws=num_draws)
        fields = numbers | arrays | dict.fromkeys(missing)
        return LLCResult(**fields, settings=settings, fluctuation=None, observables={})

    def write(self, checkpoint: Checkpoint, sampler: SamplerConfig, result: LLCResult) -> None:
        """Store a result.

        Raises:
            StorageError: If the result cannot be written.
        """
        fields = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
        arrays = {name: value.numpy() for name, value in fields.items() if isinstance(value, Tensor)}
        entry = Entry(checkpoint.step, checkpoint.digest, [{name: fields[name] for name in _NUMBERS}], arrays)
        self._cache(sampler).write(entry, _key(checkpoint, sampler))

    def _cache(self, sampler: SamplerConfig) -> Cache:
        return Cache(self.folder / EstimateSettings(sampler).digest)


def _key(checkpoint: Checkpoint, sampler: SamplerConfig) -> dict[str, Any]:
    return {"checkpoint_hash": checkpoint.digest, "settings": EstimateSettings(sampler).key}
