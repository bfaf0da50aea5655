"""`icl diversity`: run the task-diversity experiment and draw its figure."""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from icl.cli.diversity_jobs import run_in_job, show_states, submit
from icl.cli.outputs import require_output
from icl.cli.slurm import (
    SLURM_EXAMPLE,
    add_slurm_options,
    join_sbatch,
    require_slurm_option,
)
from icl.command_line import CommandParser, add_config_option
from icl.config import RunConfig, flatten
from icl.config.language import require_regression
from icl.config.validation import ConfigError
from icl.config.values import parse_scalar
from icl.diversity.jobs import RESERVED
from icl.diversity.metadata import read_metadata
from icl.diversity.runs import (
    METADATA,
    experiment_runs,
    find_runs,
    lock_experiment,
)
from icl.resolve import read_config_file, resolve
from icl.runs.environment import OWN_PROGRAM
from icl.runs.folder import require_own_place

HELP = "run the task-diversity experiment (M = 2, 4, 8, ... and inf) and draw its figure"

_SETTINGS = {
    "num_steps N": ("trainer.max_steps", "number of optimiser steps of each run"),
    "batch_size B": ("trainer.batch_size", "number of prompts per step"),
    "learning_rate LR": ("optim.lr", "peak learning rate"),
    "warmup_steps N": (
        "optim.warmup_steps",
        "number of steps over which the learning rate rises linearly; the rate then falls linearly to zero at the last "
        "step",
    ),
    "checkpoint_every N": ("checkpoints.every", "number of steps between checkpoints"),
    "eval_every N": ("evaluation.every", "number of steps between evaluations"),
    "early_stopping_patience N": (
        "early_stopping.patience",
        "number of evaluations without improvement before a run stops early; `None` means never",
    ),
    "early_stopping_min_delta X": (
        "early_stopping.min_delta",
        "smallest decrease of the monitored metric that counts as improvement",
    ),
}
"""Options that are short names for settings of the runs. Each value is (setting, help text of the option)."""
_DEFAULT_STEPS = 500_000
_PATIENCE_SECONDS = 120.0

_DESCRIPTION = """\
Train the same model on M = 2, 4, 8, ..., 2^P tasks and with M = inf, one run after the other. Each run has its own
folder, such as checkpoints/checkpoints_M8/. Then draw the gaps to dMMSE and to ridge against M, in and out of
distribution.

After any interruption, run the same command again to continue. The command then skips finished runs, resumes an
unfinished run, and tries failed runs again. Runs whose loss became NaN are not tried again, because they would fail
again. Ctrl-C and SIGTERM stop the experiment after saving. checkpoints/experiment_metadata.json shows the progress.

If the terminal is lost, the experiment continues and writes to checkpoints/experiment.log. With --background, the
experiment needs no terminal and writes to this log from the start. `nohup icl diversity ... &` works too, but writes to
the log of nohup. With --slurm, jobs of a Slurm cluster divide the runs among themselves, and the command returns at
once.

The defaults of the options are the values in the first example below. If you change --num_steps, the defaults of --warmup_steps,
--checkpoint_every and --eval_every change in proportion. All settings of `icl train` are allowed too (`icl train --help` lists
them). The default preset is `icr`. If you choose a preset, on the command line or in a file, the defaults are the
settings of this preset."""
_EXAMPLES = f"""\
icl diversity --max_power 20 --num_steps {_DEFAULT_STEPS} --batch_size 2048 --learning_rate 1e-3 --warmup_steps 50000 \\
    --checkpoint_every 50000 --eval_every 10000 --early_stopping_patience 10 --early_stopping_min_delta 0.001
icl diversity --preset quickstart --max_power 3 --num_steps 600 --warmup_steps 300 --base_checkpoint_dir trial
icl diversity --background
icl diversity {SLURM_EXAMPLE}
icl runs checkpoints"""


def run(words: list[str]) -> int:
    """Train the missing runs, and draw the figure.

    Return 0 if all runs are done, or if they will continue in Slurm jobs or in the background. If a signal stopped training, return 128 +
    the number of the signal. Otherwise return 1.
    """
    options = _parser().parse_args(join_sbatch(words))
    require_slurm_option(options)
    if options.dry_run and not options.slurm:
        raise ConfigError("`--dry-run` works only with `--slurm`. Add `--slurm`, or leave out `--dry-run`.")
    if options.background and (options.slurm or options.in_job):
        raise ConfigError(
            "`--background` cannot be given with `--slurm`, because jobs of Slurm need no terminal; leave out `--background`."
        )
    config, base = _read_config(options), options.base_checkpoint_dir
    require_regression(config.model.family, "`icl diversity`")
    for file in ("diversity.png", "diversity.csv"):
        require_output(base / file)
        require_output(options.plots_dir / file)
    from icl.compute.devices import choose_device
    from icl.training.capacity import require_room

    runs = experiment_runs(
        config, max_power=options.max_power, base=base
    )  # unusable settings are refused before anything is started
    require_own_place(runs[0].folder)
    if options.status:
        return show_states(runs, base)
    if options.slurm:
        return submit(runs, options)
    # Only the machine that trains must have the device. The login node of a cluster often has no GPU.
    require_room(config, choose_device(config.trainer.accelerator))
    if options.in_job is not None:
        return run_in_job(runs, options, lambda done: _draw(config, done, len(runs), options))
    if options.background:
        return _detach([word for word in words if word != "--background"], base)
    return _run(config, options)


def _run(config: RunConfig, options: argparse.Namespace) -> int:
    from icl.diversity.experiment import run_experiment

    base = options.base_checkpoint_dir
    result = run_experiment(config, max_power=options.max_power, base=base, retry=options.retry)
    if result.received is not None:
        print(
            f"icl: stopped by {result.received.name} with {len(result.done)} of {len(result.entries)} runs done; "
            "run the same command again to continue.",
            file=sys.stderr,
        )
        return 128 + result.received
    print(
        f"\n{len(result.entries)} runs: {len(result.done)} done. {base / 'experiment_metadata.json'} has the details."
    )
    for entry in result.entries:
        if entry["num_tasks"] not in result.done:
            print(f"icl: M = {entry['num_tasks']} {entry['state']}: {entry['reason']}", file=sys.stderr)
    _draw(config, result.done, len(result.entries), options)
    return 0 if result.is_done else 1


def _draw(config: RunConfig, done: Sequence[str], num_runs: int, options: argparse.Namespace) -> None:
    """Draw the figure of the runs that are done. `done` contains the M of each of these runs, as a string."""
    if not done:
        return
    from icl.diversity.tables import draw_experiment

    runs = {label: folder for label, folder in find_runs(options.base_checkpoint_dir).items() if label in done}
    title = _title(config, len(runs), num_runs)
    for label, path in zip(("Figure", "Numbers"), draw_experiment(runs, options.plots_dir, title=title), strict=True):
        print(f"{label:9s} {path}")


def _parser() -> CommandParser:
    parser = CommandParser(
        "diversity",
        _DESCRIPTION,
        _EXAMPLES,
        settings=True,
        usage="icl diversity [--max_power P] [--num_steps N] ... [--preset NAME] [--config FILE] [--section.key VALUE ...]",
    )
    parser.add("--max_power P", "the largest finite M is 2^P (default: 20)", type=int, default=20)
    for option, (_, text) in _SETTINGS.items():
        parser.add(f"--{option}", text)
    parser.add(
        "--base_checkpoint_dir DIR",
        "folder of the experiment (default: checkpoints)",
        type=Path,
        default=Path("checkpoints"),
    )
    parser.add("--plots_dir DIR", "folder of the figure (default: plots)", type=Path, default=Path("plots"))
    parser.add("--retry", "also retry the runs whose loss became NaN")
    add_slurm_options(parser)
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--dry-run", action="store_true", help="with --slurm: print the script of the jobs; start nothing"
    )
    text = "list which runs and jobs are done, running, failed or waiting, and why; start nothing"
    what.add_argument("--status", action="store_true", help=text)
    parser.add(
        "--background",
        "start the experiment in the background, print its process id and the path of its log file, and return",
    )
    add_config_option(parser)
    return parser


def _read_config(options: argparse.Namespace) -> RunConfig:
    """Return the configuration that all runs share; only M differs among the runs."""
    given = options.settings
    filed = {key: value for file in options.config for key, value in flatten(read_config_file(file)).items()}
    for key in RESERVED:
        if key in given or key in filed:
            raise ConfigError(
                f"`{key}` is set by the experiment itself; leave out `{key}` (--max_power sets the values of M)."
            )
    settings: dict[str, Any] = {}
    for option, (key, _) in _SETTINGS.items():
        name = option.split()[0]
        value = getattr(options, name)
        if value is not None and key in given:
            raise ConfigError(f"`--{name}` and `--{key}` are the same setting; give only one of them.")
        if value is not None:
            settings[key] = value
    if parse_scalar(settings.get("optim.warmup_steps", "None")) is not None:
        settings["optim.schedule"] = "triangle"
    ground: dict[str, Any] = {}
    if "preset" not in given and "preset" not in filed:
        chosen = filed | settings | given
        ground = _documented(parse_scalar(str(chosen.get("trainer.max_steps", _DEFAULT_STEPS))))
        if str(chosen.get("optim.schedule", "triangle")) == "constant":
            del ground["optim.warmup_steps"]
    return resolve(ground, filed, settings, given)


def _documented(num_steps: Any) -> dict[str, Any]:
    """Return the settings of the first example in `_EXAMPLES`, with warm-up and intervals in proportion to `num_steps`."""
    steps = (
        num_steps if isinstance(num_steps, int) and num_steps < 2**63 else _DEFAULT_STEPS
    )  # `resolve` refuses an invalid number of steps later
    return {
        "preset": "icr",
        "optim.schedule": "triangle",
        "optim.warmup_steps": max(1, steps // 10),
        "trainer.max_steps": steps,
        "trainer.batch_size": 2048,
        "checkpoints.every": max(1, steps // 10),
        "evaluation.every": max(1, steps // 50),
        "early_stopping.patience": 10,
        "early_stopping.min_delta": 0.001,
    }


def _title(config: RunConfig, num_drawn: int, num_all: int) -> str:
    task = config.task
    missing = "" if num_drawn == num_all else f", {num_drawn} of {num_all} runs"
    return (
        f"{config.preset}   (D = {task.task_size}, K = {task.max_examples}, σ² = {task.noise_variance:g}, "
        f"last step of at most {config.trainer.max_steps:,}{missing})"
    )


def _detach(words: list[str], base: Path) -> int:
    """Start the same command in the background, and wait until it has locked the experiment or has ended."""
    # If the experiment cannot be locked, this shows the error on the terminal. The background process locks the experiment again.
    with lock_experiment(base):
        pass
    log = base / "experiment.log"
    with log.open("ab") as output:
        begin = output.tell()
        process = subprocess.Popen(
            [*OWN_PROGRAM, "diversity", *words],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    print("Starting ...", flush=True)
    give_up = time.monotonic() + _PATIENCE_SECONDS
    while process.poll() is None and read_metadata(base).get("pid") != process.pid and time.monotonic() < give_up:
        time.sleep(0.1)
    status = process.poll()
    if status is not None:
        said = log.read_bytes()[begin:].decode(errors="replace").strip()
        print(
            said or f"icl: the process ended at once, with exit status {status}.",
            file=sys.stderr if status else sys.stdout,
        )
        return status if status >= 0 else 128 - status
    print(f"The experiment runs in the background, process {process.pid}.")
    print(f"Log       {log}\nState     {base / METADATA}")
    print(
        f"Follow    icl runs {base}   or   tail -f {log}\nStop      kill {process.pid}   (it saves first; run the same command again to continue)"
    )
    return 0
