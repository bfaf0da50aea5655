"""Sampling: the local learning coefficient with a verdict. `estimate_llc` serves any PyTorch loss."""

from icl.sampling.gradients import module_loss
from icl.sampling.llc import EstimateOptions, estimate_llc, estimate_llcs
from icl.sampling.result import CheckpointId, LLCResult

__all__ = ["CheckpointId", "EstimateOptions", "LLCResult", "estimate_llc", "estimate_llcs", "module_loss"]
