"""`icl train`: train a run from its settings, or several at once, or resume them; then the table and the figures."""

import json
import os
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from icl.checks import ConfigError
from icl.config import RunConfig
from icl.presets import run_name
from icl.resolve import (
    POINT_VARIABLE,
    read_arguments,
    read_config_file,
    read_points,
    refuse_conflicts,
    resolve,
    settings_parser,
)
from icl.runs import DONE, RunFolder, is_child_rank, local_root
from icl.storage import write_atomically

if TYPE_CHECKING:
    from icl.training.run import TrainResult

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
  icl train --population.seeds 0,1,2,3,4 --population.num_tasks 8,64,inf

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
    configs = []
    for swept in read_points():
        configs += resolve(filed, swept, given).members()
        refuse_conflicts(swept, given)
    return _train(configs)


def _train_point(filed: dict[str, Any], given: dict[str, str]) -> int:
    """Train the point that `wandb agent` handed over; however it ends, W&B learns the exit status."""
    from icl.training.wandb_agent import describe_run, join_sweep, swept_settings
    from icl.training.wandb_log import end_run, exit_code_of

    base = resolve(filed, given)
    wandb_run = join_sweep(base)
    try:
        swept = swept_settings(wandb_run, base)
        config = resolve(filed, swept, given)
        refuse_conflicts(swept, given)
        if config.population:
            raise ConfigError(
                "A point under `wandb agent` is one run; take `population` out of it, or run the file by `icl sweep --pack`."
            )
        describe_run(wandb_run, config)
        point = local_root() / run_name(config) / "point.json"
        write_atomically(point, json.dumps(swept, indent=1).encode())
        os.environ[POINT_VARIABLE] = str(point)  # further ranks of this run read it
        status = _train([config], wandb_run)
    except BaseException as error:
        end_run(wandb_run, exit_code_of(error))
        raise
    end_run(wandb_run, status)  # last: W&B may hand a pre-empted point to the next agent at once
    return status


def _train(configs: Sequence[RunConfig], wandb_run: Any = None) -> int:
    from icl.training.run import NonFiniteLossError, train_population

    results = train_population(configs, wandb_run=wandb_run)
    if is_child_rank():
        return 0
    received = next((result.received for result in results if result.received is not None), None)
    if received is not None:
        step = f"{results[0].status.step:,}"
        print(f"icl: stopped by {received.name} at step {step}; the same command resumes it.", file=sys.stderr)
        return 128 + received
    for result in results:
        _tell_end(result)
    ended = [result for result in results if result.status.state in DONE]
    if not ended:
        raise NonFiniteLossError(results[0].status.reason)
    if len(results) == 1:
        _show_run(ended[0].folder)
    else:
        _show_members([result.folder for result in ended])
    return 0 if len(ended) == len(results) else 1


def _tell_end(result: "TrainResult") -> None:
    """A line for a run that ended otherwise than at its last step just now."""
    status, place = result.status, result.folder.path
    if result.was_done:
        print(f"{place} is finished: {status.step:,} steps{f' ({status.reason})' if status.reason else ''}.")
    elif status.state == "stopped_early":
        print(f"{place} stopped early at step {status.step:,}: {status.reason}.")
    elif status.state == "failed":
        print(f"icl: {place} failed: {status.reason}", file=sys.stderr)


def _show_run(folder: RunFolder) -> None:
    """The table per position, and the figure beside it."""
    from icl.delivery import send_results
    from icl.plotting.training import draw_run

    table, figure = draw_run(folder)
    print("\nLoss per position (squared error per target) on fixed prompts of the training tasks:\n")
    print(table.to_string(float_format="{:.4f}".format))
    ratio = table.loc["mean", "model"] / table.loc["mean", "ridge"]
    print(f"\nThe model's mean loss is {ratio:.3f} times ridge's.")
    print(f"Figure  {figure}\nRun     {folder.path}")
    send_results(folder)


def _show_members(folders: Sequence[RunFolder]) -> None:
    """A row for each run of a population, and the figure in each one's folder."""
    import pandas as pd

    from icl.delivery import send_results
    from icl.plotting.training import draw_run

    rows = {}
    for folder in folders:
        rows[folder.path.as_posix()] = draw_run(folder)[0].loc["mean"]
    table = pd.DataFrame(rows).T
    table = table[[name for name in ("model", "ridge", "dmmse", "ols", "zero") if name in table]]
    table["model / ridge"] = table["model"] / table["ridge"]
    print("\nMean loss (squared error per target) on fixed prompts of each run's training tasks:\n")
    print(table.to_string(float_format="{:.4f}".format, na_rep="-"))
    print("\nEach run's folder has its figure, figures/training.png.")
    for folder in folders:
        send_results(folder)
