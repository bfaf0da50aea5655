"""`icl train`: train a run from its settings, or resume it; then its table and figure."""

import re
import sys

from icl.runs import RunFolder

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
    from icl.resolve import (
        read_arguments,
        read_config_file,
        read_point,
        refuse_conflicts,
        resolve,
        settings_parser,
    )

    if "-h" in words or "--help" in words:
        settings = settings_parser(prog="icl train").format_help().partition("\n\n")[2]
        print(_USAGE + re.sub(r"  --\w+ CONFIG +Path to a configuration file\.\n", "", settings))
        return 0
    given = read_arguments(words, extra=("config",))
    file = given.pop("config", None)
    swept = read_point()
    config = resolve(read_config_file(file) if file else {}, swept, given)
    refuse_conflicts(swept, given)

    from icl.training.run import is_child_rank, train

    result = train(config)
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
