"""Typed settings of a run: the tree of settings, its validation, and the conversion of values from text."""

from icl.config.language import LanguageConfig
from icl.config.model import ModelConfig
from icl.config.sampler import ChainsConfig, SamplerConfig
from icl.config.sections import (
    CheckpointsConfig,
    EarlyStoppingConfig,
    EvaluationConfig,
    OptimConfig,
    PopulationConfig,
    SeedsConfig,
    TrainerConfig,
    is_free_on_resume,
)
from icl.config.task import TaskConfig
from icl.config.tree import (
    MEMBER_SETTINGS,
    RunConfig,
    config_differences,
    flatten,
)

__all__ = [
    "MEMBER_SETTINGS",
    "ChainsConfig",
    "CheckpointsConfig",
    "EarlyStoppingConfig",
    "EvaluationConfig",
    "LanguageConfig",
    "ModelConfig",
    "OptimConfig",
    "PopulationConfig",
    "RunConfig",
    "SamplerConfig",
    "SeedsConfig",
    "TaskConfig",
    "TrainerConfig",
    "config_differences",
    "flatten",
    "is_free_on_resume",
]
