"""Sampling: the local learning coefficient with a verdict. `estimate_llc` serves any PyTorch loss."""

from icl.sampling.gradients import module_loss
from icl.sampling.llc import estimate_llc, estimate_llcs
from icl.sampling.result import Label, LLCResult

__all__ = ["LLCResult", "Label", "estimate_llc", "estimate_llcs", "module_loss"]
