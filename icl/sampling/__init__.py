"""Estimates of the local learning coefficient (LLC), each with a verdict. `estimate_llc` takes any PyTorch loss."""

from icl.sampling.llc import EstimateOptions, estimate_llc, estimate_llcs
from icl.sampling.modules import module_loss
from icl.sampling.result import CheckpointId, LLCResult
from icl.sampling.susceptibility import susceptibility_of

__all__ = [
    "CheckpointId",
    "EstimateOptions",
    "LLCResult",
    "estimate_llc",
    "estimate_llcs",
    "module_loss",
    "susceptibility_of",
]
