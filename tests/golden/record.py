"""Records the golden losses: the first training losses of every preset, by the real training code.

    python tests/golden/record.py

A change that is not meant to alter results leaves `losses.json` untouched; one that is records it anew and says why.
"""

import dataclasses
import json
import tempfile
from pathlib import Path

import pandas as pd

from icl.config import EvaluationConfig, RunConfig
from icl.presets import PRESETS
from icl.training.run import train

FILE = Path(__file__).with_name("losses.json")


def golden_config(preset: RunConfig) -> RunConfig:
    """The preset, cut to four steps of eight prompts, with its rate's curve."""
    steps = preset.schedule_steps if preset.optim.schedule == "triangle" else None
    return dataclasses.replace(
        preset,
        optim=dataclasses.replace(preset.optim, schedule_steps=steps, warmup_steps=2 if steps else None),
        trainer=dataclasses.replace(preset.trainer, max_steps=4, batch_size=8, log_every=1),
        evaluation=EvaluationConfig(every=None),
    )


def losses(config: RunConfig) -> list[float]:
    """The training loss of every step."""
    with tempfile.TemporaryDirectory() as folder:
        table = pd.read_csv(train(config, folder=folder).folder.metrics_file)
    return table["train/loss"].dropna().tolist()


if __name__ == "__main__":
    recorded = {name: losses(golden_config(preset)) for name, preset in PRESETS.items()}
    FILE.write_text(json.dumps(recorded, indent=1) + "\n")
    print(f"Recorded {FILE}.")
