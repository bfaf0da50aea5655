"""`icl diversity`: the task-diversity experiment, from its settings to its figure."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from icl.cli.outputs import require_output
from icl.config import RunConfig, flatten
from icl.config.validation import ConfigError
from icl.resolve import parse_scalar, read_arguments, read_config_files, resolve
from icl.runs.environment import OWN_PROGRAM
from icl.runs.folder import require_own_place

HELP = "the task-diversity experiment: M = 2, 4, 8, ... and inf, and its figure"

_SETTINGS = {
    "num_steps": "trainer.max_steps",
    "batch_size": "trainer.batch_size",
    "learning_rate": "optim.lr",
    "warmup_steps": "optim.warmup_steps",
    "checkpoint_every": "checkpoints.every",
    "eval_every": "evaluation.every",
    "early_stopping_patience": "early_stopping.patience",
    "early_stopping_min_delta": "early_stopping.min_delta",
}
"""The experiment's own words for settings of its runs."""
_OPTIONS = ("max_power", "base_checkpoint_dir", "plots_dir", "config")
_DEFAULT_STEPS = 500_000
_RESERVED = ("task.num_tasks", "run_name", "population.seeds", "population.num_tasks")
_PATIENCE_SECONDS = 120.0

_USAGE = f"""\
usage: icl diversity [--max_power P] [--num_steps N] ... [--preset NAME] [--config FILE] [--section.key VALUE ...]

Train the same run at M = 2^1 .. 2^P tasks and at M = inf, one after the other, each into its own folder
checkpoints/checkpoints_M8/ and so on; then draw the gaps to dMMSE and to ridge, in and out of distribution, against M.
The same command goes on after any interruption: finished runs are skipped, an unfinished one resumes, failed ones are
tried again, except those whose loss became NaN, which would fail again (--retry tries these, too). Ctrl-C and SIGTERM save first. checkpoints/experiment_metadata.json tells how far it is.

options (what is left out is as in the first example; num_steps scales warm-up and intervals):
  --max_power P                 the largest finite M is 2^P (default: 20)
  --num_steps N                 optimiser steps of each run
  --batch_size B                prompts per step
  --learning_rate LR            peak rate
  --warmup_steps N              steps of the linear rise; the rate then falls to zero at the last step
  --checkpoint_every N          steps between checkpoints
  --eval_every N                steps between evaluations
  --early_stopping_patience N   evaluations without improvement before a run stops early; `None`: never
  --early_stopping_min_delta X  the least improvement that counts
  --base_checkpoint_dir DIR     folder of the experiment (default: checkpoints)
  --plots_dir DIR               folder of the figure (default: plots)
  --retry                       also try runs again whose loss became NaN
  --background                  go on without this terminal: print the process and its log, and return
  --preset NAME, --config FILE, --section.key VALUE
                                as for `icl train` (`icl train --help` lists them); a preset of your own choice, here or
                                in FILE, brings its own settings in place of the example's (the default is `icr`)

If the terminal is lost, a run in the foreground goes on and writes to checkpoints/experiment.log; `nohup icl diversity
... &` does the same with a log of its own, and --background from the start.

examples:
  icl diversity --max_power 20 --num_steps {_DEFAULT_STEPS} --batch_size 2048 --learning_rate 1e-3 --warmup_steps 50000 \\
      --checkpoint_every 50000 --eval_every 10000 --early_stopping_patience 10 --early_stopping_min_delta 0.001
  icl diversity --preset quickstart --max_power 3 --num_steps 600 --warmup_steps 300 --base_checkpoint_dir trial
  icl diversity --background
  icl runs checkpoints
"""


def run(words: list[str]) -> int:
    """Train what is missing, and draw; 0 only if every run is done, 128 + the signal if one stopped it."""
    if "-h" in words or "--help" in words:
        print(_USAGE, end="")
        return 0
    in_background, retry = "--background" in words, "--retry" in words
    words = [word for word in words if word != "--background"]
    config, options = _parse([word for word in words if word != "--retry"])
    base, plots = _folder(options, "base_checkpoint_dir", "checkpoints"), _folder(options, "plots_dir", "plots")
    from icl.build import choose_device
    from icl.diversity.runs import experiment_runs
    from icl.training.capacity import require_room

    max_power = _whole_number(options.get("max_power", "20"))
    runs = experiment_runs(config, max_power=max_power, base=base)  # refuses at once, in front of who typed it
    require_own_place(runs[0].folder)
    require_room(config, choose_device(config.trainer.accelerator))
    if in_background:
        return _detach(words, base)
    return _run(config, max_power, base, plots, retry=retry)


def _run(config: RunConfig, max_power: int, base: Path, plots: Path, *, retry: bool) -> int:
    from icl.diversity.experiment import run_experiment
    from icl.diversity.runs import find_runs

    result = run_experiment(
        config, max_power=max_power, base=base, retry=retry, say=lambda line: print(line, flush=True)
    )
    if result.received is not None:
        print(
            f"icl: stopped by {result.received.name} with {len(result.done)} of {len(result.entries)} runs done; "
            "the same command continues.",
            file=sys.stderr,
        )
        return 128 + result.received
    print(
        f"\n{len(result.entries)} runs: {len(result.done)} done. {base / 'experiment_metadata.json'} has the details."
    )
    for entry in result.entries:
        if entry["num_tasks"] not in result.done:
            print(f"icl: M = {entry['num_tasks']} {entry['state']}: {entry['reason']}", file=sys.stderr)
    if result.done:
        from icl.diversity.tables import draw_experiment

        runs = {label: folder for label, folder in find_runs(base).items() if label in result.done}
        title = _title(config, len(runs), len(result.entries))
        for label, path in zip(("Figure", "Numbers"), draw_experiment(runs, plots, title=title), strict=True):
            print(f"{label:9s} {path}")
    return 0 if result.is_done else 1


def _parse(words: list[str]) -> tuple[RunConfig, dict[str, Any]]:
    """The configuration of every run but for M, and the options of the experiment itself."""
    given = read_arguments(words, extra=(*_SETTINGS, *_OPTIONS))
    options = {key: given.pop(key) for key in _OPTIONS if key in given}
    aliases = {key: given.pop(key) for key in _SETTINGS if key in given}
    filed = {key: value for layer in read_config_files(options) for key, value in flatten(layer).items()}
    for key in _RESERVED:
        if key in given or key in filed:
            raise ConfigError(f"`{key}` is set by the experiment itself; leave it out (--max_power chooses the M).")
    for alias in aliases:
        if _SETTINGS[alias] in given:
            raise ConfigError(f"`--{alias}` and `--{_SETTINGS[alias]}` are the same setting; give one of the two.")
    settings: dict[str, Any] = {_SETTINGS[alias]: value for alias, value in aliases.items()}
    if parse_scalar(aliases.get("warmup_steps", "None")) is not None:
        settings["optim.schedule"] = "triangle"
    ground: dict[str, Any] = {}
    if "preset" not in given and "preset" not in filed:
        chosen = filed | settings | given
        ground = _documented(parse_scalar(str(chosen.get("trainer.max_steps", _DEFAULT_STEPS))))
        if str(chosen.get("optim.schedule", "triangle")) == "constant":
            del ground["optim.warmup_steps"]
    return resolve(ground, filed, settings, given), options


def _documented(num_steps: Any) -> dict[str, Any]:
    """The settings of the documented command; for fewer steps, warm-up and intervals shrink along."""
    steps = (
        num_steps if isinstance(num_steps, int) and num_steps < 2**63 else _DEFAULT_STEPS
    )  # `resolve` will refuse it
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


def _whole_number(text: str) -> int:
    if not text.isdecimal() or len(text) > 9:
        raise ConfigError(f"`--max_power` must be a whole number, got {text}.")
    return int(text)


def _folder(options: dict[str, Any], name: str, default: str) -> Path:
    """Return the folder that an option names, which can be written."""
    text = options.get(name, default)
    if not text.strip():
        raise ConfigError(f"`--{name}` must name a folder, got nothing.")
    for file in ("diversity.png", "diversity.csv"):
        require_output(Path(text) / file)
    return Path(text)


def _title(config: RunConfig, num_drawn: int, num_all: int) -> str:
    task = config.task
    missing = "" if num_drawn == num_all else f", {num_drawn} of {num_all} runs"
    return (
        f"{config.preset}   (D = {task.task_size}, K = {task.max_examples}, σ² = {task.noise_variance:g}, "
        f"last step of at most {config.trainer.max_steps:,}{missing})"
    )


def _detach(words: list[str], base: Path) -> int:
    """Start the same command without this terminal, and wait until it holds the experiment or has given up."""
    from icl.diversity.metadata import read_metadata
    from icl.diversity.runs import METADATA, lock_experiment

    with lock_experiment(base):
        pass  # refuses in front of who typed it; the process that is started holds it for good
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
        print(said or f"icl: it ended at once, with status {status}.", file=sys.stderr if status else sys.stdout)
        return status if status >= 0 else 128 - status
    print(f"The experiment runs in the background, process {process.pid}.")
    print(f"Log       {log}\nState     {base / METADATA}")
    print(
        f"Follow    icl runs {base}   or   tail -f {log}\nStop      kill {process.pid}   (it saves; the same command continues)"
    )
    return 0
