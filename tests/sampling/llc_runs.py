"""A tiny run with a few checkpoints, made without training, and settings of a fast sampler."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import torch
from tiny_runs import TINY

from icl.build import build_model
from icl.config import SamplerConfig
from icl.runs.checkpoints import save_checkpoint
from icl.runs.folder import RunFolder
from icl.sampling.records import Record

QUICK = SamplerConfig(
    kernel="sgld",
    lr=1e-5,
    nbeta=100.0,
    localization=100.0,
    num_samples=1024,
    batch_size=16,
    num_chains=2,
    num_draws=6,
    num_burnin_steps=4,
    num_init_batches=4,
)
CONFIG = dataclasses.replace(TINY, sampler=QUICK)
STEPS = (0, 30, 60)


def make_run(path, *, steps=STEPS, config=CONFIG):
    """Make a run. Its step s is the initial model with noise that grows with s."""
    folder = RunFolder(path)
    folder.write_config(config)
    params = {name: tensor.detach() for name, tensor in build_model(config).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    noise = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in params.items()}
    for step in steps:
        moved = {name: params[name] + 1e-3 * step * noise[name] for name in params}
        save_checkpoint(folder.checkpoints, step, config, moved)
    return folder


def write_older_estimate(run: RunFolder, record: Record) -> Path:
    """Store an estimate in the run's folder in the format of version 0.1.0. Return the file."""
    about = {"settings": {}, "rules": 1, "row": record.row, "positions": record.positions, "stride": record.stride}
    folder = run.results / "llc" / record.row["settings"]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"step-{record.row['step']:09d}.npz"
    np.savez_compressed(file, about=np.array(json.dumps(about)), traces=record.traces)
    return file
