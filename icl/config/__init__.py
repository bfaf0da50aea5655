"""Typed settings of a run: their tree, their validation, and the reading of values as people write them."""

from icl.config.sections import (
    CheckpointsConfig,
    EarlyStoppingConfig,
    EvaluationConfig,
    ModelConfig,
    OptimConfig,
    PopulationConfig,
    SeedsConfig,
    TaskConfig,
    TrainerConfig,
)
from icl.config.tree import MEMBER_SETTINGS, ChainsConfig, RunConfig, SamplerConfig, flatten, is_free_on_resume

__all__ = [
    "MEMBER_SETTINGS",
    "ChainsConfig",
    "CheckpointsConfig",
    "EarlyStoppingConfig",
    "EvaluationConfig",
    "ModelConfig",
    "OptimConfig",
    "PopulationConfig",
    "RunConfig",
    "SamplerConfig",
    "SeedsConfig",
    "TaskConfig",
    "TrainerConfig",
    "flatten",
    "is_free_on_resume",
]
