"""`icl evaluate`: every saved step of a run against the Bayes-optimal predictors, in and out of distribution."""

from pathlib import Path

from icl.commands import command_parser
from icl.config import ConfigError
from icl.storage import table_format

HELP = "losses against the Bayes-optimal predictors, in and out of distribution"


def run(words: list[str]) -> int:
    """Evaluate, print the last step, write the tables and the figure."""
    parser = command_parser(
        "evaluate",
        "Loss per position, gaps to ridge and dMMSE, ICL and prior-task scores of every saved step, on the training tasks, "
        "on new tasks and on every shift, each with its standard error.",
        "icl evaluate runs/quickstart",
    )
    parser.add_argument("path", metavar="RUN|CHECKPOINT", help="a run's folder, or one checkpoint file")
    parser.add_argument("--out", metavar="FILE", type=Path, help="also write the numbers to FILE (.csv or .json)")
    parser.add_argument("--num_prompts", metavar="N", type=int, help="prompts per set (default: the run's own)")
    options = parser.parse_args(words)
    if options.num_prompts is not None and options.num_prompts < 2:
        raise ConfigError(f"`--num_prompts` must be at least 2, got {options.num_prompts}.")
    if options.out is not None:
        table_format(options.out)
    from icl.api import evaluate_run, save_evaluation
    from icl.evaluation import headlines

    numbers, baselines = evaluate_run(options.path, num_prompts=options.num_prompts)
    last = headlines(numbers[numbers["step"] == numbers["step"].max()])
    means = last.pivot(index="distribution", columns="quantity", values="value")
    print(
        f"Step {last['step'].iloc[0]:,}, the last of {numbers['step'].nunique()}: means over positions, or the query alone"
    )
    print("where the shift is about the query. Losses and squared distances are per target.\n")
    print(means.reindex(last["distribution"].unique()).to_string(float_format="{:.4g}".format, na_rep="-"))
    for label, path in save_evaluation(options.path, numbers, baselines, out=options.out):
        print(f"{label:9s} {path}")
    return 0
