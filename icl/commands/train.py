"""`icl train`: train a run from its settings, or resume it; then its table and figure."""

import json
import os
import re
import sys
from typing import Any

from icl.config import RunConfig
from icl.presets import run_name
from icl.resolve import (
    POINT_VARIABLE,
    read_arguments,
    read_config_file,
    read_point,
    refuse_conflicts,
    resolve,
    settings_parser,
)
from icl.runs import RunFolder, is_child_rank, local_root
from icl.storage import write_atomically

HELP = "train a run, or resume it"

_USAGE = """\
usage: icl train [--preset NAME] [--config FILE] [--section.key VALUE ...]

Train a run; the same command resumes an unfinished one, or says that it is finished.
Without arguments: the preset `quickstart`, about two minutes on two CPU cores.

examples:
  icl train
  icl train --task.num_tasks 8 --run_name eight-tasks
  icl train --preset L2H4 --model.double_residual --trainer.max_steps 20000 --optim.schedule_steps 500000
  icl train --config my-run.yaml --seeds.model 1

settings (later wins: defaults < preset < --config file < command line):
"""


def run(words: list[str]) -> int:
    """Train to the end; 128 + the signal if one stopped it."""
    if "-h" in words or "--help" in words:
        settings = settings_parser(prog="icl train").format_help().partition("\n\n")[2]
        print(_USAGE + re.sub(r"  --\w+ CONFIG +Path to a configuration file\.\n", "", settings))
        return 0
    given = read_arguments(words, extra=("config",))
    file = given.pop("config", None)
    filed = read_config_file(file) if file is not None else {}
    if os.environ.get("WANDB_SWEEP_ID") and not is_child_rank():
        from icl.training.wandb_agent import in_sweep

        if in_sweep():
            return _train_point(filed, given)
    swept = read_point()
    config = resolve(filed, swept, given)
    refuse_conflicts(swept, given)
    return _train(config)


def _train_point(filed: dict[str, Any], given: dict[str, str]) -> int:
    """Train the point that `wandb agent` handed over; however it ends, W&B learns the exit status."""
    from icl.training.wandb_agent import describe_run, join_sweep, swept_settings
    from icl.training.wandb_log import WandbLog

    base = resolve(filed, given)
    wandb_run = join_sweep(base)
    try:
        swept = swept_settings(wandb_run, base)
        config = resolve(filed, swept, given)
        refuse_conflicts(swept, given)
        describe_run(wandb_run, config)
        point = local_root() / run_name(config) / "point.json"
        write_atomically(point, json.dumps(swept, indent=1).encode())
        os.environ[POINT_VARIABLE] = str(point)  # further ranks of this run read it
        return _train(config, wandb_run)
    except BaseException:
        WandbLog(wandb_run).finish(1)
        raise


def _train(config: RunConfig, wandb_run: Any = None) -> int:
    from icl.training.run import train

    result = train(config, wandb_run=wandb_run)
    if is_child_rank():
        return 0
    if result.received is not None:
        step = f"{result.status.step:,}"
        print(f"icl: stopped by {result.received.name} at step {step}; the same command resumes it.", file=sys.stderr)
        return 128 + result.received
    if result.was_done:
        reason = f" ({result.status.reason})" if result.status.reason else ""
        print(f"{result.folder.path} is finished: {result.status.step:,} steps{reason}.")
    elif result.status.state == "stopped_early":
        print(f"Stopped early at step {result.status.step:,}: {result.status.reason}.")
    _show_run(result.folder)
    return 0


def _show_run(folder: RunFolder) -> None:
    """The table per position, and the figure beside it."""
    from icl.plotting.training import draw_run

    table, figure = draw_run(folder)
    print("\nLoss per position (squared error per target) on fixed prompts of the training tasks:\n")
    print(table.to_string(float_format="{:.4f}".format))
    ratio = table.loc["mean", "model"] / table.loc["mean", "ridge"]
    print(f"\nThe model's mean loss is {ratio:.3f} times ridge's.")
    print(f"Figure  {figure}\nRun     {folder.path}")
