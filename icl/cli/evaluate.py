"""`icl evaluate`: compare runs, or a task-diversity experiment, with the Bayes-optimal predictors, in and out of distribution."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from icl.cli.evaluate_ahead import work_ahead
from icl.cli.outputs import require_output_table
from icl.command_line import CommandParser
from icl.config.validation import ConfigError, UserError
from icl.diversity.runs import find_runs
from icl.files.writing import write_atomically
from icl.progress import progress_bar
from icl.runs.folder import RunFolder, place_of, require_place
from icl.runs.listing import named_runs, run_folders

if TYPE_CHECKING:
    import pandas as pd

HELP = "compare runs with the Bayes-optimal predictors, in and out of distribution"


def run(words: list[str]) -> int:
    """Evaluate, print the main numbers, and write the tables and the figures."""
    options = _parse(words)
    if options.checkpoint_base_dir is not None:
        return _evaluate_experiment(options)
    subjects = _subjects(options.paths)
    if len(subjects) > 1:
        return _evaluate_runs(subjects, options)
    (only,) = subjects.values()
    return _evaluate_run(only, options)


def _parse(words: list[str]) -> argparse.Namespace:
    parser = CommandParser(
        "evaluate",
        "Evaluate every saved step of a run: loss per position, gaps to ridge and dMMSE, ICL and prior-task scores, each with\n"
        "its standard error. The prompts come from the training tasks, from new tasks, and from every distribution\n"
        "shift. Results are stored step by step. After an interruption, run the same command again to continue. If the run has\n"
        "saved more steps in the meantime, only the new steps are evaluated.\n\n"
        "Several runs, or the runs in a folder, are evaluated on the same prompts. Each run gets its own tables and figure.\n"
        "For a task-diversity experiment (--checkpoint_base_dir), the last step of every run is evaluated. The numbers go into\n"
        "one table, as JSON and as CSV.",
        "icl evaluate runs/quickstart\n"
        "  icl evaluate runs/a runs/b --out both.csv\n"
        "  icl evaluate runs\n"
        "  icl evaluate --checkpoint_base_dir checkpoints --output_file diversity.json --n_prompts 4096 --n_ood_samples 4096",
    )
    paths = "a run's folder or name, a folder with runs below it, or one checkpoint file"
    parser.add("paths RUN|CHECKPOINT", paths, nargs="*", type=Path)
    text = "folder of an experiment of `icl diversity`; all its runs are evaluated. To also pool results over seeds, give several "
    parser.add(
        "--checkpoint_base_dir DIR[,DIR2,...]",
        text + "experiments that differ only in their seeds, separated by commas",
    )
    parser.add(
        "--out --output_file FILE",
        "also write the numbers to FILE (.csv or .json). Several runs share one table with a column `run`. "
        "For an experiment, both formats are written (default: DIR/evaluation.json)",
        type=Path,
    )
    number = "number of prompts per distribution (default: the run's `evaluation.num_prompts`)"
    parser.add("--num_prompts --n_prompts N", number, type=int)
    number = "number of prompts from new tasks, and from each distribution shift (default: the same as --num_prompts)"
    parser.add("--num_ood_prompts --n_ood_samples N", number, type=int)
    parser.add("--all_steps", "for an experiment: evaluate every saved step of every run")
    options = parser.parse_args(words)
    if bool(options.paths) == (options.checkpoint_base_dir is not None):
        raise ConfigError(
            "Give the paths of runs or checkpoints, or give --checkpoint_base_dir DIR. The command needs one of the two, not both."
        )
    if options.all_steps and options.checkpoint_base_dir is None:
        raise ConfigError("`--all_steps` needs --checkpoint_base_dir; for a run, every saved step is evaluated anyway.")
    for name in ("num_prompts", "num_ood_prompts"):
        number = getattr(options, name)
        if number is not None and number < 2:
            raise ConfigError(f"`--{name}` must be at least 2, got {number}.")
    if options.out is not None:
        both = (".json", ".csv") if options.checkpoint_base_dir is not None else ()
        require_output_table(options.out, *options.paths, suffixes=both)
    return options


def _subjects(paths: Sequence[Path]) -> dict[str, Path]:
    """Return the paths to evaluate, keyed by name. Runs come first, then other paths such as checkpoint files."""
    paths = [place_of(path) for path in paths]
    folders = [path for path in paths if path.is_dir() and run_folders(path)]
    runs = {name: run.path for name, run in named_runs(folders).items()}
    return runs | {str(path): path for path in paths if path not in folders}


def _evaluate_run(path: Path, options: argparse.Namespace) -> int:
    from icl.evaluation.scores import headlines
    from icl.whole_runs import evaluate_run

    numbers, baselines = evaluate_run(
        require_place(path), num_prompts=options.num_prompts, num_ood_prompts=options.num_ood_prompts
    )
    last = headlines(numbers[numbers["step"] == numbers["step"].max()])
    means = last.pivot(index="distribution", columns="quantity", values="value")
    print(
        f"Step {last['step'].iloc[0]:,}, the last of {numbers['step'].nunique()} steps. Values are means over positions; "
        "for shifts"
    )
    print("of the query, they are values at the query. Losses and squared distances are per target.\n")
    print(means.reindex(last["distribution"].unique()).to_string(float_format="{:.4g}".format, na_rep="-"))
    excess = last[last["quantity"] == "bayes_excess"].set_index("distribution")
    if len(excess):  # none for language runs, whose optimum is not known
        print(
            "\nLoss minus the Bayes predictor's loss, on the same prompts (± standard error of the paired difference):"
        )
    for distribution, row in excess.iterrows():
        print(f"{distribution:9s} {row['value']:.4g} ± {row['stderr']:.2g}")
    if losses := _predictor_losses(baselines):
        print(losses)
    for label, written in _deliver(path, numbers, baselines, options.out):
        print(f"{label:9s} {written}")
    return 0


def _predictor_losses(baselines: "pd.DataFrame") -> str:
    """Return a table of the losses of other predictors, as a string. The string is empty if ridge is the Bayes predictor for new tasks."""
    means = baselines[baselines["position"] == "mean"].pivot(index="distribution", columns="quantity", values="value")
    if "bayes" not in means:
        return ""
    order = (
        "bayes",
        "dmmse",
        "ridge",
        "zero",
        "bayes_variance",
        "bayes_nll",
        "dmmse_nll",
        "ridge_nll",
        "bayes_nll_variance",
    )
    names = [name for name in order if name in means]
    table = means.loc[["pretrain", "true"], names].to_string(float_format="{:.4g}".format, na_rep="-")
    nll = (
        "The negative log-likelihood of `bayes` is too large, and `nll_over_bayes` too small, by about half of `bayes_nll_variance`.\n"
        if "bayes_nll" in means
        else ""
    )
    return (
        "\nLosses of other predictors. `bayes` is the Bayes predictor for new tasks. Its loss, and `delta_bayes`, are too large by\n"
        f"`bayes_variance`, the mean squared standard error of the predictions of `bayes` (0 for exact predictions).\n{nll}\n{table}\n"
    )


def _evaluate_runs(subjects: dict[str, Path], options: argparse.Namespace) -> int:
    """Evaluate all runs. Return 1 if a run could not be evaluated, or if its results could not be saved. The other runs are still evaluated."""
    import pandas as pd

    from icl.diversity.threshold import ladder_table
    from icl.runs.checkpoints import read_config_of
    from icl.whole_runs import RunEvaluator, evaluation_over_seeds, headline_table, write_numbers

    tables: dict[str, tuple[pd.DataFrame, pd.DataFrame]] = {}
    problems: dict[str, UserError] = {}
    files = [_checkpoints(path) for path in subjects.values()]
    _tell_work(files, options)
    with progress_bar("evaluation", sum(map(len, files)), "checkpoint") as bar:
        evaluate = RunEvaluator(num_prompts=options.num_prompts, num_ood_prompts=options.num_ood_prompts, bar=bar)
        for name, path in subjects.items():
            bar.set_postfix_str(name)
            try:
                numbers, baselines = evaluate(require_place(path))
                is_wanted = (options.out is not None) | (numbers["step"] == numbers["step"].max())
                tables[name] = numbers[is_wanted], baselines
                with tqdm.external_write_mode():
                    _deliver(path, numbers, baselines)
            except UserError as error:
                problems[name] = error
    for name, problem in problems.items():
        print(f"icl: {name}: {problem}", file=sys.stderr)
    if not tables:
        return 1
    numbers, baselines = (
        pd.concat(dict(zip(tables, parts, strict=True)), names=["run"]).reset_index("run")
        for parts in zip(*tables.values(), strict=True)
    )
    print("Last step of each run: means over positions. Losses and squared distances are per target.\n")
    print(headline_table(numbers, by="run").to_string(float_format="{:.4g}".format, na_rep="-"))
    configs = {name: read_config_of(_checkpoints(subjects[name])[0]) for name in tables}
    _show_seeds(evaluation_over_seeds(numbers, configs, only_last=True))
    seeds = evaluation_over_seeds(numbers, configs)
    ladder = ladder_table(numbers, configs)
    found = None if ladder is None else _tell_thresholds(ladder)
    print("\nNumbers   results/evaluation.csv, results/baselines.csv and figures/evaluation.png of each run")
    if options.out is not None:
        print(f"Output    {write_numbers(options.out, numbers, baselines, seeds)}")
        if options.out.suffix == ".csv" and len(seeds):
            print(f"Seeds     {write_numbers(options.out.with_stem(f'{options.out.stem}-seeds'), seeds, baselines)}")
        if ladder is not None and found is not None:
            _save_thresholds(ladder, found, options.out)
    return 1 if problems else 0


def _show_seeds(seeds: "pd.DataFrame") -> None:
    """Print the means of the main numbers over seeds, if some runs differ only in their seeds."""
    from icl.whole_runs import seeds_headline

    if len(seeds):
        _announce_seeds()
        print(seeds_headline(seeds).to_string(na_rep="-"))


def _checkpoints(path: Path) -> list[Path]:
    from icl.runs.checkpoints import CheckpointError, checkpoint_files

    try:
        return checkpoint_files(path)
    except CheckpointError:  # the error is reported when the run is evaluated
        return []


def _tell_work(files: Sequence[Sequence[Path]], options: argparse.Namespace) -> None:
    ahead = work_ahead(files, num_prompts=options.num_prompts, num_ood_prompts=options.num_ood_prompts)
    print(ahead, file=sys.stderr, flush=True)


def _deliver(
    path: Path, numbers: "pd.DataFrame", baselines: "pd.DataFrame", out: Path | None = None
) -> list[tuple[str, Path]]:
    """Write the tables and the figure, and send them to the run's store. Return a label and the path of each file."""
    from icl.runs.delivery import send_results
    from icl.whole_runs import save_evaluation

    written = save_evaluation(path, numbers, baselines, out=out)
    if (path / "config.yaml").is_file():
        send_results(RunFolder(path))
    return written


def _announce_seeds() -> None:
    print("\nOver seeds: mean ± standard error over seeds, or the two values if there are only two seeds.\n")


def _evaluate_experiment(options: argparse.Namespace) -> int:
    """Evaluate the runs of task-diversity experiments. Return 1 if a run could not be evaluated. The other runs are still evaluated."""
    from icl.diversity.tables import COLUMNS, evaluate_seeds, require_same_experiment, save_tables
    from icl.whole_runs import RunEvaluator, headline_table

    words = options.checkpoint_base_dir
    # A folder may have a comma in its name.
    bases = [Path(words)] if Path(words).is_dir() else [Path(word.strip()) for word in words.split(",")]
    experiments = {str(base): find_runs(base) for base in bases}
    if len(experiments) > 1:
        require_same_experiment(experiments)
    files = [_checkpoints(run.path) for runs in experiments.values() for run in runs.values()]
    _tell_work(files if options.all_steps else [run_files[-1:] for run_files in files], options)
    evaluator = RunEvaluator(num_prompts=options.num_prompts, num_ood_prompts=options.num_ood_prompts)
    table, problems = evaluate_seeds(experiments, evaluator, all_steps=options.all_steps)
    _tell_missing(experiments, problems)
    if table.empty:
        return 1
    out = options.out or bases[0] / "evaluation.json"
    print("Last step of each M: means over positions. Losses and squared distances are per target.\n")
    if len(experiments) > 1:
        headline = headline_table(table.assign(run=table["run"] + ", M = " + table["num_tasks"]), by="run")
    else:
        table = table[list(COLUMNS)]
        headline = headline_table(table, by="num_tasks")
    print(headline.to_string(float_format="{:.4g}".format, na_rep="-"))
    found = _tell_thresholds(table if len(experiments) > 1 else table.assign(run=""))
    print()
    _save_thresholds(table, found, out)
    if len(experiments) > 1:
        _save_seeds(table, out)
    for path in save_tables(table, out):
        print(f"Numbers   {path}")
    return 1 if problems else 0


def _tell_missing(experiments: Mapping[str, Mapping[str, RunFolder]], problems: Mapping[tuple[str, str], str]) -> None:
    """Print which runs are left out, and which have not ended."""
    for (_, label), problem in problems.items():
        print(f"icl: M = {label} is left out: {problem}", file=sys.stderr)
    for name, runs in experiments.items():
        for label, folder in runs.items():
            status = folder.read_status()
            if (name, label) not in problems and (status is None or not status.is_done):
                state = "unfinished" if status is None else status.state
                print(f"icl: M = {label} is {state}; its last checkpoint so far was evaluated.", file=sys.stderr)


def _tell_thresholds(table: "pd.DataFrame") -> "pd.DataFrame":
    """Print the task-diversity thresholds, and return their table."""
    from icl.diversity.threshold import sentences, thresholds

    found = thresholds(table)
    if len(found):
        print("", *sentences(found), sep="\n")
    return found


def _save_thresholds(table: "pd.DataFrame", thresholds: "pd.DataFrame", out: Path) -> None:
    """Write the thresholds, if there are any, and draw them with the gaps to ridge and dMMSE."""
    from icl.plotting.diversity import plot_diversity
    from icl.plotting.style import save_figure

    if len(thresholds):
        file = out.with_name(f"{out.stem}-threshold.csv")
        write_atomically(file, thresholds.to_csv(index=False).encode())
        print(f"Threshold {file}")
    num_seeds = table["run"].nunique() if "run" in table else 1
    if num_seeds == 1 and not len(thresholds):
        return
    title = f"{num_seeds} seeds" if num_seeds > 1 else out.stem
    figure = plot_diversity(table, title=title, thresholds=thresholds)
    drawn = out.with_name(f"{out.stem}-{'seeds' if num_seeds > 1 else 'threshold'}.png")
    print(f"Figure    {save_figure(figure, drawn)}")


def _save_seeds(table: "pd.DataFrame", out: Path) -> None:
    """Print the means of the main numbers over seeds, and write the means of all numbers over seeds."""
    from icl.diversity.tables import pool_seeds, save_tables
    from icl.whole_runs import seeds_headline

    pooled = pool_seeds(table)
    _announce_seeds()
    print(seeds_headline(pooled.assign(runs="M = " + pooled["num_tasks"])).to_string(na_rep="-"), end="\n\n")
    for path in save_tables(pooled, out.with_stem(f"{out.stem}-seeds")):
        print(f"Seeds     {path}")
