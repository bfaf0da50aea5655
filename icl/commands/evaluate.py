"""`icl evaluate`: a run, or a task-diversity experiment, against the Bayes-optimal predictors, in and out of distribution."""

import argparse
import sys
from pathlib import Path

from icl.checks import ConfigError
from icl.commands import command_parser
from icl.storage import table_format

HELP = "losses against the Bayes-optimal predictors, in and out of distribution"


def run(words: list[str]) -> int:
    """Evaluate, print the headlines, write the tables and the figure."""
    options = _parse(words)
    return _evaluate_run(options) if options.checkpoint_base_dir is None else _evaluate_experiment(options)


def _parse(words: list[str]) -> argparse.Namespace:
    parser = command_parser(
        "evaluate",
        "Loss per position, gaps to ridge and dMMSE, ICL and prior-task scores of every saved step, on the training tasks, "
        "on new tasks and on every shift, each with its standard error. Steps that are done are kept: the same command goes on "
        "after an interruption, and evaluates what was trained since. Of a task-diversity experiment "
        "(--checkpoint_base_dir), the last step of every run, in one table as JSON and as CSV.",
        "icl evaluate runs/quickstart\n"
        "  icl evaluate --checkpoint_base_dir checkpoints --output_file diversity.json --n_prompts 4096 --n_ood_samples 4096",
    )
    parser.add_argument("path", metavar="RUN|CHECKPOINT", nargs="?", help="a run's folder, or one checkpoint file")
    parser.add_argument(
        "--checkpoint_base_dir", metavar="DIR", type=Path, help="the folder of `icl diversity`, all of it"
    )
    parser.add_argument(
        "--out",
        "--output_file",
        metavar="FILE",
        type=Path,
        help="also write the numbers to FILE (.csv or .json); of an experiment both are written (default: DIR/evaluation.json)",
    )
    parser.add_argument(
        "--num_prompts",
        "--n_prompts",
        metavar="N",
        type=int,
        help="prompts per set (default: the run's own), or on the training tasks alone if --n_ood_samples is given",
    )
    parser.add_argument(
        "--num_ood_prompts", "--n_ood_samples", metavar="N", type=int, help="prompts per set on new tasks and on shifts"
    )
    parser.add_argument("--all_steps", action="store_true", help="of an experiment, every saved step of every run")
    options = parser.parse_args(words)
    if (options.path is None) == (options.checkpoint_base_dir is None):
        raise ConfigError("Give one thing to evaluate: RUN, CHECKPOINT, or --checkpoint_base_dir DIR.")
    if options.all_steps and options.checkpoint_base_dir is None:
        raise ConfigError(
            "`--all_steps` belongs to --checkpoint_base_dir; of a run, every saved step is evaluated anyway."
        )
    for name in ("num_prompts", "num_ood_prompts"):
        number = getattr(options, name)
        if number is not None and number < 2:
            raise ConfigError(f"`--{name}` must be at least 2, got {number}.")
    if options.out is not None:
        table_format(options.out)
    return options


def _evaluate_run(options: argparse.Namespace) -> int:
    from icl.api import evaluate_run, save_evaluation
    from icl.delivery import send_results
    from icl.evaluation import headlines
    from icl.runs import RunFolder

    numbers, baselines = evaluate_run(
        options.path, num_prompts=options.num_prompts, num_ood_prompts=options.num_ood_prompts
    )
    last = headlines(numbers[numbers["step"] == numbers["step"].max()])
    means = last.pivot(index="distribution", columns="quantity", values="value")
    print(
        f"Step {last['step'].iloc[0]:,}, the last of {numbers['step'].nunique()}: means over positions, or the query alone"
    )
    print("where the shift is about the query. Losses and squared distances are per target.\n")
    print(means.reindex(last["distribution"].unique()).to_string(float_format="{:.4g}".format, na_rep="-"))
    for label, path in save_evaluation(options.path, numbers, baselines, out=options.out):
        print(f"{label:9s} {path}")
    if (Path(options.path) / "config.yaml").is_file():
        send_results(RunFolder(options.path))
    return 0


def _evaluate_experiment(options: argparse.Namespace) -> int:
    """1 if a run could not be evaluated; the others' numbers are written all the same."""
    from icl.diversity.runs import find_runs
    from icl.diversity.tables import evaluate_experiment, headline_table, save_tables
    from icl.runs import DONE

    base = options.checkpoint_base_dir
    runs = find_runs(base)
    table, problems = evaluate_experiment(
        runs,
        num_prompts=options.num_prompts,
        num_ood_prompts=options.num_ood_prompts,
        all_steps=options.all_steps,
    )
    for label, problem in problems.items():
        print(f"icl: M = {label} is left out: {problem}", file=sys.stderr)
    for label, folder in runs.items():
        status = folder.read_status()
        if label not in problems and (status is None or status.state not in DONE):
            state = "unfinished" if status is None else status.state
            print(f"icl: M = {label} is {state}; its last checkpoint was evaluated as it is.", file=sys.stderr)
    if table.empty:
        return 1
    print("The last step of each M, means over positions; losses and squared distances are per target.\n")
    print(headline_table(table).to_string(float_format="{:.4g}".format, na_rep="-"))
    for path in save_tables(table, options.out or base / "evaluation.json"):
        print(f"Numbers   {path}")
    return 1 if problems else 0
