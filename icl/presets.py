"""The papers' settings by name: `preset("L2H4")` is a complete `RunConfig`.

Every preset names its source. Where a paper leaves a setting open, the choice is ours and the comment says so.
Parameter counts are exact and under test: `L2H4` 51,717, `raventos-base` 1,591,808, `raventos-small` 202,752,
`carroll` 2,654,217.
"""

import dataclasses
import difflib
import hashlib
import math
import re

from icl.config import (
    FREE_ON_RESUME,
    CheckpointsConfig,
    ConfigError,
    EvaluationConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TaskConfig,
    TrainerConfig,
    flatten,
)

MAX_SLUG = 120
"""Longest run name that is made from settings; a longer one ends in a hash instead."""

# Hoogland et al. 2024 (arXiv 2402.02364), linear-regression transformer; hyperparameters from the authors' sweep file
# L2H4Minf.yaml (January 2024) and their config.py: K = 8, Adam, batch 256, 500,000 steps, a triangle to 3e-3.
# 100 log-spaced and 100 linear checkpoints. The published models add each residual twice: `model.double_residual`.
L2H4 = RunConfig(
    preset="L2H4",
    task=TaskConfig(num_tasks=math.inf, task_size=4, max_examples=8, noise_variance=0.125),
    model=ModelConfig(num_layers=2, num_heads=4, embed_size=64, mlp_size=64),
    optim=OptimConfig(lr=3e-3, schedule="triangle"),
    trainer=TrainerConfig(max_steps=500_000, batch_size=256),
    evaluation=EvaluationConfig(every=1000, num_prompts=1024),
    checkpoints=CheckpointsConfig(num_log=100, num_linear=100),
)

# Raventos et al. 2023 (arXiv 2306.15063), section 2 and the authors' configs/example.py: GPT-2 blocks, D = 8, K = 16,
# sigma^2 = 0.25, triangle to 1e-3 (their example's rate; the paper swept it), batch 256, 500,000 steps, evaluation
# every 1,000. The paper's M runs from 2 to 2^20 and infinity; 2^20 here.
_GPT2 = ModelConfig(
    num_layers=8,
    num_heads=2,
    embed_size=128,
    mlp_size=512,
    activation="gelu_tanh",
    attention_bias=True,
    unembedding_bias=False,
    output="scalar",
    init="gpt2",
)
RAVENTOS_BASE = RunConfig(
    preset="raventos-base",
    task=TaskConfig(num_tasks=2**20, task_size=8, max_examples=16, noise_variance=0.25),
    model=_GPT2,
    optim=OptimConfig(lr=1e-3, schedule="triangle"),
    trainer=TrainerConfig(max_steps=500_000, batch_size=256),
    evaluation=EvaluationConfig(every=1000, num_prompts=1024),
    checkpoints=CheckpointsConfig(num_log=100, num_linear=100),
)
RAVENTOS_SMALL = dataclasses.replace(
    RAVENTOS_BASE,
    preset="raventos-small",
    model=dataclasses.replace(_GPT2, num_layers=4, embed_size=64, mlp_size=256),
)

# Carroll et al. 2025 (arXiv 2501.17745), sections 3.1 and 4.1: D = 8, K = 16, sigma^2 = 0.125, 2 layers, 2.65M
# parameters, 150,000 steps, 2,203 checkpoints. Heads, rate, schedule and batch are not in the main text: ours.
CARROLL = RunConfig(
    preset="carroll",
    task=TaskConfig(num_tasks=64, task_size=8, max_examples=16, noise_variance=0.125),
    model=ModelConfig(num_layers=2, num_heads=4, embed_size=512, mlp_size=512, attention_output=False),
    optim=OptimConfig(lr=1e-3, schedule="constant"),
    trainer=TrainerConfig(max_steps=150_000, batch_size=1024),
    evaluation=EvaluationConfig(every=1000, num_prompts=1024),
    checkpoints=CheckpointsConfig(every=100, num_log=1000, num_linear=0),
)

# The defaults of the older `ICRegConfig` code base: D = 8, K = 16, sigma^2 = 0.25, 8 pre-norm layers of width 512 with
# biases and GELU, M = 64, a constant 1e-3 with the gradient clipped at 1, 150,000 steps of 2,048 prompts.
ICR = RunConfig(
    preset="icr",
    task=TaskConfig(num_tasks=64, task_size=8, max_examples=16, noise_variance=0.25),
    model=ModelConfig(
        num_layers=8,
        num_heads=4,
        embed_size=512,
        mlp_size=512,
        activation="gelu",
        embedding_bias=True,
        attention_bias=True,
        init="gpt2",
    ),
    optim=OptimConfig(lr=1e-3, schedule="constant", grad_clip=1.0),
    trainer=TrainerConfig(max_steps=150_000, batch_size=2048),
    evaluation=EvaluationConfig(every=1000, num_prompts=1024),
    checkpoints=CheckpointsConfig(every=10_000, num_log=0, num_linear=0),
)

PRESETS: dict[str, RunConfig] = {
    config.preset: config for config in (RunConfig(), L2H4, RAVENTOS_BASE, RAVENTOS_SMALL, CARROLL, ICR)
}


def preset(name: str) -> RunConfig:
    """The named settings.

    Raises:
        ConfigError: If there is no such preset; the message names the nearest and lists all.

    Example:
        >>> preset("L2H4").task.max_examples
        8
    """
    if name in PRESETS:
        return PRESETS[name]
    name = " ".join(str(name).split())
    nearest = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.4)
    hint = f" Did you mean `{nearest[0]}`?" if nearest else ""
    raise ConfigError(f"There is no preset `{name}`.{hint} The presets are {', '.join(PRESETS)}.")


def run_name(config: RunConfig) -> str:
    """The run's own name, or else a readable slug: the preset and every setting that differs from it.

    Example:
        >>> run_name(RunConfig(task=TaskConfig(num_tasks=8)))
        'quickstart,num_tasks=8'
    """
    if config.run_name is not None:
        return config.run_name
    settings = {key: value for key, value in flatten(config.to_dict()).items() if not key.startswith("population.")}
    base = flatten(preset(config.preset).to_dict())
    leaves = [key.rpartition(".")[2] for key in settings]
    words = [config.preset]
    for key, value in settings.items():
        if value != base[key] and key not in FREE_ON_RESUME:
            section, _, leaf = key.rpartition(".")
            words.append(f"{leaf if leaves.count(leaf) == 1 and section != 'seeds' else key}={value}")
    slug = re.sub(r"[^\w.,=+-]", "-", ",".join(words))
    if len(slug) <= MAX_SLUG:
        return slug
    return f"{slug[: MAX_SLUG - 9]}-{hashlib.sha256(slug.encode()).hexdigest()[:8]}"
