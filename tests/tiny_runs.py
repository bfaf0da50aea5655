"""Settings of a run that a test can train in a second or two, and functions that change them."""

import dataclasses
from typing import Any

from icl.config import (
    CheckpointsConfig,
    EvaluationConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TaskConfig,
    TrainerConfig,
)

TINY = RunConfig(
    run_name="tiny",
    task=TaskConfig(num_tasks=16, task_size=2, max_examples=4, noise_variance=0.25),
    model=ModelConfig(num_layers=1, num_heads=2, embed_size=8, mlp_size=8),
    optim=OptimConfig(lr=1e-2, grad_clip=0.5),
    trainer=TrainerConfig(max_steps=60, batch_size=8, log_every=10),
    evaluation=EvaluationConfig(every=20, num_prompts=16),
    checkpoints=CheckpointsConfig(every=30, num_log=4, num_linear=0),
)


def change(config: RunConfig, **sections: dict[str, Any]) -> RunConfig:
    """Return the config with some settings of some sections replaced."""
    parts = {name: dataclasses.replace(getattr(config, name), **leaves) for name, leaves in sections.items()}
    return dataclasses.replace(config, **parts)


def as_arguments(config: RunConfig) -> list[str]:
    """Return the words of a command line that give this config. They name every setting, so the preset has no effect."""
    from icl.config import flatten

    settings = flatten(config.to_dict())
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


def as_population(config: RunConfig) -> list[str]:
    """Return the same words without `population` and without the settings that differ between members."""
    words = as_arguments(config)
    pairs = zip(words[::2], words[1::2], strict=True)
    own = ("--seeds.", "--task.num_tasks", "--population.")
    return [word for pair in pairs if not pair[0].startswith(own) for word in pair]
