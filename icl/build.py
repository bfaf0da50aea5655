"""The one place where configuration becomes objects; everything else takes plain arguments."""

import torch

from icl.config import RunConfig
from icl.transformer import Transformer, initialise


def build_model(config: RunConfig) -> Transformer:
    """The run's model with its initial weights, on the CPU in float32.

    The weights depend on `seeds.model` and the model's shape only; the global generator is neither read nor set.

    Example:
        >>> from icl.presets import preset
        >>> sum(p.numel() for p in build_model(preset("L2H4")).parameters())
        51717
    """
    model = build_architecture(config)
    initialise(model, config.model, torch.Generator().manual_seed(config.seeds.model))
    return model


def build_architecture(config: RunConfig) -> Transformer:
    """The run's model with unset weights, for `population.apply` or for loading into."""
    return Transformer(config.model, task_size=config.task.task_size, max_examples=config.task.max_examples)
