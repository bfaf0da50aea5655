"""Record the golden losses: the first training losses of every preset, by the real training code.

    python tests/golden/record.py

A change that is not meant to alter results leaves `losses.json` untouched. A change that alters results records the file again, and
its commit says why.

The losses must not depend on the processor, the vector width, the number of threads or the compiler. So training runs in
float64, where rounding is about 1e-16. One difference between machines remains: PyTorch draws the initial weights in
float32, and without AVX2 it rounds some of them to a neighbouring number. The tolerance is therefore measured, not
chosen: `sensitivity` in `losses.json` is the largest relative change of any loss when every initial weight moves to a
random neighbour in float32 (up, down or not at all), over `NUM_TRIALS` trials. The test allows `SAFETY` times that.
"""

import dataclasses
import json
import tempfile
from pathlib import Path
from unittest import mock

import pandas as pd
import torch
from torch import nn

from icl.build import build_model
from icl.config import EvaluationConfig, RunConfig
from icl.presets import PRESETS
from icl.training.run import train

NAMES = [name for name, config in PRESETS.items() if not config.language.source.startswith("hf://")]
"""The presets with golden losses: all whose data need no network."""
FILE = Path(__file__).with_name("losses.json")

NUM_TRIALS = 4
"""Number of random changes of the initial weights over which the sensitivity is measured."""
SAFETY = 10
"""Largest difference of a loss from the recorded one, as a multiple of the measured sensitivity."""


def golden_config(preset: RunConfig) -> RunConfig:
    """Return the preset in float64 with its learning-rate schedule, but with only four steps of eight prompts."""
    steps = preset.schedule_steps if preset.optim.schedule == "triangle" else None
    return dataclasses.replace(
        preset,
        optim=dataclasses.replace(preset.optim, schedule_steps=steps, warmup_steps=2 if steps else None),
        trainer=dataclasses.replace(preset.trainer, max_steps=4, batch_size=8, log_every=1, precision="64-true"),
        evaluation=EvaluationConfig(every=None),
    )


def losses(config: RunConfig) -> list[float]:
    """Return the training loss of every step: a squared error, a cross-entropy or a negative log-likelihood."""
    with tempfile.TemporaryDirectory() as folder:
        table = pd.read_csv(train(config, folder=folder).folder.metrics_file)
    return table["train/nll" if "train/nll" in table else "train/loss"].dropna().tolist()


def sensitivity(config: RunConfig, expected: list[float]) -> float:
    """Return the largest relative change of a loss when initial weights move to neighbouring float32 numbers."""
    largest = 0.0
    for seed in range(NUM_TRIALS):
        generator = torch.Generator().manual_seed(seed)

        def build_neighbour(config: RunConfig, generator: torch.Generator = generator) -> nn.Module:
            return _moved(build_model(config), generator)

        with mock.patch("icl.training.run.build_model", build_neighbour):
            moved = losses(config)
        largest = max(largest, *(abs(ours / theirs - 1) for ours, theirs in zip(moved, expected, strict=True)))
    return largest


def _moved(model: nn.Module, generator: torch.Generator) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            direction = torch.randint(-1, 2, parameter.shape, generator=generator)
            target = torch.where(direction == 0, parameter, direction * torch.inf)
            parameter.copy_(torch.nextafter(parameter, target))
    return model


def record() -> dict[str, dict[str, object]]:
    """Return the losses and their sensitivity, for every preset."""
    recorded: dict[str, dict[str, object]] = {}
    for name in NAMES:
        preset = PRESETS[name]
        config = golden_config(preset)
        expected = losses(config)
        recorded[name] = {"losses": expected, "sensitivity": float(f"{sensitivity(config, expected):.1e}")}
    return recorded


if __name__ == "__main__":
    FILE.write_text(json.dumps(record(), indent=1) + "\n")
    print(f"Recorded {FILE}.")
