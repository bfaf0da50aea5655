"""`icl train`: train or resume one run, or several runs at once, then print a table and draw figures."""

import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from icl.command_line import train_parser
from icl.config import RunConfig
from icl.config.validation import ConfigError, UserError
from icl.files.writing import write_atomically
from icl.progress import with_progress
from icl.resolve import POINT_VARIABLE, read_config_file, read_points, refuse_conflicts, refuse_overridden, resolve
from icl.run_names import run_name, varying_names
from icl.runs.folder import RunError, RunFolder, is_child_rank, local_root
from icl.training.wandb.agent import describe_run, in_sweep, work_at_point

if TYPE_CHECKING:
    import pandas as pd

    from icl.plotting.training import DrawnRun
    from icl.training.run import TrainResult

_EXCESS_NAMES = {"bayes_excess": "above optimum", "bayes_excess_stderr": "± s.e."}
"""Printed names of two columns: the excess loss over the Bayes predictor on the same prompts, and the standard error of the excess."""
HELP = "train a run, or resume it; without arguments, a small run of about two minutes"


def run(words: list[str]) -> int:
    """Train the runs that the command line describes. If a signal stopped training, return 128 + the number of the signal."""
    options = train_parser().parse_args(words)
    filed, given = [read_config_file(file) for file in options.config], options.settings
    if in_sweep() and not is_child_rank():
        return _train_point(filed, given)
    configs = []
    for swept in read_points():
        configs += resolve(*filed, swept, given).members()
        refuse_conflicts(swept, given)
        refuse_overridden(*filed, swept, given)
    return _train(configs)


def _train_point(filed: Sequence[dict[str, Any]], given: dict[str, Any]) -> int:
    """Train the sweep point that `wandb agent` assigned to this program."""

    def work(wandb_run: Any, swept: dict[str, Any]) -> int:
        config = resolve(*filed, swept, given)
        refuse_conflicts(swept, given)
        if config.population:
            raise ConfigError(
                "Under `wandb agent`, each sweep point must be a single run; remove `population`, or run the file with `icl sweep --pack`."
            )
        describe_run(wandb_run, config)
        point = local_root() / run_name(config) / "point.json"
        write_atomically(point, json.dumps(swept, indent=1).encode())
        os.environ[POINT_VARIABLE] = str(point)  # the other processes of this run read the point from this file
        return _train([config], wandb_run)

    return work_at_point(lambda: resolve(*filed, given), work)


def _train(configs: Sequence[RunConfig], wandb_run: Any = None) -> int:
    from icl.training.run import failure_of, train_population

    results = train_population(configs, wandb_run=wandb_run)
    if is_child_rank():
        return 0
    ended = [result for result in results if result.status.is_done]
    failed = [result for result in results if result.status.state == "failed"]
    stopped = [result for result in results if result.received is not None]
    if failed and len(results) == 1:
        raise failure_of(failed[0].status)
    for result in ended:
        _tell_end(result)
    for result in results:
        if result.lacking is not None:
            print(f"icl: {result.lacking}", file=sys.stderr)
    incomplete = [result.incomplete for result in results if result.incomplete is not None]
    if incomplete and len(results) == 1:
        raise RunError(incomplete[0])
    undrawn: list[str] = []
    if ended and not stopped:
        if len(results) == 1:
            _show_run(ended[0].folder)
        else:
            undrawn = _show_members(ended)
    for result in failed:  # printed last, because users and `icl sweep` look at the end of the output
        print(f"icl: {result.folder.path} failed: {result.status.reason}", file=sys.stderr)
    for sentence in [*(f"not shown: {reason}" for reason in undrawn), *incomplete]:
        print(f"icl: {sentence}", file=sys.stderr)
    if stopped:
        return _tell_stop(stopped)
    return 0 if len(ended) == len(results) and not undrawn and not incomplete else 1


def _tell_stop(stopped: "Sequence[TrainResult]") -> int:
    """Print which signal stopped the runs, and at which step. Return 128 + the number of the signal."""
    steps = sorted({result.status.step for result in stopped})
    where = f"step {steps[0]:,}" if len(steps) == 1 else f"steps {steps[0]:,} to {steps[-1]:,}"
    received = next(result.received for result in stopped if result.received is not None)
    print(f"icl: stopped by {received.name} at {where}; run the same command again to resume.", file=sys.stderr)
    return 128 + received


def _tell_end(result: "TrainResult") -> None:
    """Print a line for a run that was already finished, or that stopped early."""
    status, path = result.status, result.folder.path
    if result.was_done:
        print(f"{path} is finished: {status.step:,} steps{f' ({status.reason})' if status.reason else ''}.")
    elif status.state == "stopped_early":
        print(f"{path} stopped early at step {status.step:,}: {status.reason}.")


def _show_run(folder: RunFolder) -> None:
    """Print the table of losses per position, and draw the figure of the run."""
    from icl.plotting.training import draw_run
    from icl.runs.delivery import send_results

    drawn = draw_run(folder)
    table = drawn.losses
    if drawn.optimum == "bigram":
        print("\nLoss per token (nats) on test rows, at some positions:\n")
        table = table.iloc[[*range(0, len(table) - 1, max(1, (len(table) - 1) // 8)), len(table) - 1]]
    else:
        print("\nLoss per position (squared error per target) on fixed prompts of the training tasks:\n")
    print(table.rename(columns=_EXCESS_NAMES).to_string(float_format="{:.4f}".format))
    print(f"\n{_headline(table.loc['mean'], drawn)}")
    print(f"Figure  {drawn.figure}\nRun     {folder.path}")
    send_results(folder)


def _headline(means: "pd.Series", drawn: "DrawnRun") -> str:
    """Return sentences that compare the model's mean loss with the losses of predictors, and with the optimum if the optimum is known."""
    if drawn.optimum == "bigram":
        excess = means["model"] - means["bigram"]
        side = "below" if excess < 0 else "above"
        return f"The model's mean loss is {abs(excess):.4f} {side} the loss of the bigram frequencies, which use only the last token."
    ratios = " and ".join(
        f"{means['model'] / means[name]:.3f} times {label}"
        for name, label in (("bayes", "the Bayes predictor's"), ("ridge", "ridge's"), ("dmmse", "dMMSE's"))
        if name in means and means[name] > 0
    )
    if not drawn.optimum:
        return f"The model's mean loss is {ratios}." if ratios else ""
    optimum = {
        "ridge": "ridge's, the optimum for M = ∞",
        "bayes": "the Bayes predictor's, the optimum for M = ∞",
        "dmmse": "dMMSE's, the optimum for these M tasks",
    }[drawn.optimum]
    first = f"The model's mean loss is {ratios}.\nIt is" if ratios else "The model's mean loss is"
    excess, stderr = means[list(_EXCESS_NAMES)]
    return f"{first} {excess:.4f} ± {stderr:.4f} (standard error) above {optimum}."


def _show_members(results: "Sequence[TrainResult]") -> list[str]:
    """Print a row for each run of a population, and draw the run's figure. If the run was already done, keep its figure.

    Returns:
        The reason for each run whose figure could not be drawn. The list is empty if there is no such run.
    """
    import pandas as pd

    from icl.plotting.training import draw_run, drawn_losses
    from icl.runs.delivery import send_results

    rows: dict[str, pd.Series] = {}
    shown: list[RunFolder] = []
    undrawn: list[str] = []
    sets: dict[Any, Any] = {}
    for result in with_progress(results, "drawing", "run"):
        drawn = drawn_losses(result.folder) if result.was_done else None
        try:
            table = draw_run(result.folder, sets)[0] if drawn is None else drawn
            rows[result.folder.path.as_posix()] = table.loc["mean"]
            shown.append(result.folder)
        except UserError as error:
            undrawn.append(str(error))
    if not rows:
        return undrawn
    table = pd.DataFrame(rows).T
    table = table[
        [
            name
            for name in ("model", "ridge", "dmmse", "ols", "zero", "unigram", "bigram", *_EXCESS_NAMES)
            if name in table
        ]
    ]
    if "ridge" in table:
        table["model / ridge"] = table["model"] / table["ridge"]
    if "dmmse" in table:
        table["model / dmmse"] = table["model"] / table["dmmse"]
    names = varying_names([folder.read_config() for folder in shown])
    if len(set(names)) == len(names) and all(names):
        table = table.assign(folder=table.index).set_axis(names, axis="index")
    is_text = "bigram" in table
    what = (
        "nats per token) on each run's test rows"
        if is_text
        else "squared error per target) on fixed prompts of each run's training tasks"
    )
    print(f"\nMean loss ({what}:\n")
    print(table.rename(columns=_EXCESS_NAMES).to_string(float_format="{:.4f}".format, na_rep="-"))
    print("\nEach run's folder has its figure, figures/training.png.")
    for result in results:
        send_results(result.folder)
    return undrawn
