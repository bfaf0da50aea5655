"""Every sweep file in the repository through the real `wandb sweep`: W&B's agents would get the same points as `icl sweep`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from icl.config import flatten
from icl.resolve import resolve
from icl.run_names import run_name
from icl.sweeps.points import sweep_points
from icl.sweeps.schema import read_sweep_file

FILES = sorted((Path(__file__).parents[2] / "sweeps").rglob("*.yaml"))
CREATE = """
import sys
from wandb.cli.cli import cli
for path in sys.argv[1:]:
    cli(["sweep", path], standalone_mode=False)
"""


@pytest.mark.slow
def test_the_client_takes_every_file_and_both_engines_have_the_same_runs(wandb_server, tmp_path):
    environment = os.environ | wandb_server.environment() | {"WANDB_DIR": str(tmp_path)}
    command = [sys.executable, "-c", CREATE, *map(str, FILES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert wandb_server.refused == []
    assert "WARNING" not in done.stderr
    for path, sweep in zip(FILES, wandb_server.sweeps.values(), strict=True):
        assert sweep.config["command"][:2] == ["${env}", "icl"]
        assert sweep.config["project"] == "icl"
        if sweep.config["command"][2] != "train":
            continue
        expected = {point.name: point.config for point in sweep_points(read_sweep_file(path))}
        configs = [resolve({}, run.point) for run in sweep.queue]
        assert {run_name(config): config for config in configs} == expected, path.name
        for run, config in zip(sweep.queue, configs, strict=True):
            assert run_name(config) in expected
            assert set(flatten(run.point)) <= set(flatten(config.to_dict()))
