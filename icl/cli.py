"""The door for people: `icl COMMAND`. Each command parses its words, calls one function and says where its output is.

A user's mistake is one sentence on standard error and exit status 2; a run that failed exits with 1, one stopped by a
signal with 128 + its number. Heavy imports wait for the command that needs them.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from icl.config import ConfigError, UserError
from icl.storage import table_format

_TRAIN_HELP = """\
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0 only when its work is done."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    commands: dict[str, tuple[Callable[[list[str]], int], str]] = {
        "train": (_train, "train a run, or resume it"),
        "evaluate": (_evaluate, "losses against the Bayes-optimal predictors, in and out of distribution"),
        "predict": (_predict, "predictions for prompts in a file"),
        "runs": (_runs, "what there is, and how far it is"),
    }
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview({name: text for name, (_, text) in commands.items()}))
        return 0
    if words[0] == "--version":
        from icl import __version__

        print(f"icl {__version__}")
        return 0
    if words[0] not in commands:
        import difflib

        nearest = difflib.get_close_matches(words[0], commands, n=1)
        hint = f" Did you mean `icl {nearest[0]}`?" if nearest else ""
        return _complain(f"There is no command `{words[0]}`.{hint} `icl --help` lists them.", 2)
    try:
        _load_environment()
        return commands[words[0]][0](words[1:])
    except ConfigError as error:
        return _complain(str(error), 2)
    except UserError as error:
        return _complain(str(error), 1)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _complain(f"{error.strerror or error}: {error.filename or 'a file'}.", 1)
    except KeyboardInterrupt:
        return _complain("interrupted; the same command goes on from the last save.", 130)


def _overview(commands: dict[str, str]) -> str:
    lines = [f"  icl {name:10s} {text}" for name, text in commands.items()]
    return "\n".join(
        [
            "usage: icl COMMAND [options]",
            "",
            "Train small transformers on in-context linear regression and study how they develop.",
            "",
            *lines,
            "",
            "`icl COMMAND --help` has options and examples. Start with: icl train",
        ]
    )


def _train(words: list[str]) -> int:
    from icl.resolve import read_arguments, read_config_file, resolve, settings_parser

    if "-h" in words or "--help" in words:
        settings = settings_parser(prog="icl train").format_help().partition("\n\n")[2]
        print(_TRAIN_HELP + re.sub(r"  --\w+ CONFIG +Path to a configuration file\.\n", "", settings))
        return 0
    given = read_arguments(words, extra=("config",))
    file = given.pop("config", None)
    config = resolve(read_config_file(file) if file else {}, given)

    from icl.training.run import is_child_rank, train

    result = train(config)
    if is_child_rank():
        return 0
    if result.received is not None:
        step = f"{result.status.step:,}"
        return _complain(
            f"stopped by {result.received.name} at step {step}; the same command resumes it.", 128 + result.received
        )
    if result.was_done:
        reason = f" ({result.status.reason})" if result.status.reason else ""
        print(f"{result.folder.path} is finished: {result.status.step:,} steps{reason}.")
    elif result.status.state == "stopped_early":
        print(f"Stopped early at step {result.status.step:,}: {result.status.reason}.")
    _show_run(result.folder)
    return 0


def _show_run(folder: Any) -> None:
    """The table per position, and the figure beside it."""
    from icl.plotting.training import draw_run

    table, figure = draw_run(folder)
    print("\nLoss per position (squared error per target) on fixed prompts of the training tasks:\n")
    print(table.to_string(float_format="{:.4f}".format))
    ratio = table.loc["mean", "model"] / table.loc["mean", "ridge"]
    print(f"\nThe model's mean loss is {ratio:.3f} times ridge's.")
    print(f"Figure  {figure}\nRun     {folder.path}")


def _evaluate(words: list[str]) -> int:
    parser = _parser(
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


def _predict(words: list[str]) -> int:
    parser = _parser(
        "predict",
        "Predict y for queries after a context. FILE is JSON with x_context, y_context and x_query, or CSV with columns "
        "x1..xD,y in which an empty y marks a query.",
        "icl predict runs/quickstart --prompt prompt.json",
    )
    parser.add_argument("path", metavar="CHECKPOINT", help="a checkpoint file, or a run's folder for its last step")
    parser.add_argument("--prompt", metavar="FILE", required=True, help="the prompts")
    parser.add_argument("--out", metavar="FILE", type=Path, help="write the predictions to FILE (.csv or .json)")
    options = parser.parse_args(words)
    from icl.api import load_checkpoint
    from icl.prediction import predict_from_prompt, read_prompt_file, write_predictions

    if options.out is not None:
        table_format(options.out)
    prompt = read_prompt_file(options.prompt)
    model, info = load_checkpoint(options.path)
    predictions = predict_from_prompt(model, *prompt)
    print(f"{info['path']} (step {info['step']:,}), {len(prompt.x_context)} context examples")
    for query, prediction in zip(prompt.x_query.tolist(), predictions.tolist(), strict=True):
        print(f"  x = ({', '.join(f'{x:g}' for x in query)})  ->  y = {prediction:.6g}")
    if options.out is not None:
        print(f"Predictions  {write_predictions(options.out, prompt, predictions)}")
    return 0


def _runs(words: list[str]) -> int:
    parser = _parser("runs", "Every run below $LOCAL_ROOT (default: runs/): state, step, loss and age.", "icl runs")
    parser.add_argument("root", metavar="FOLDER", nargs="?", type=Path, help="another folder of runs")
    options = parser.parse_args(words)
    from icl.runs import describe_runs, local_root

    root = options.root or local_root()
    lines = describe_runs(root)
    print("\n".join(lines) if lines else f"There are no runs in {root}; `icl train` makes one.")
    return 0


def _parser(command: str, description: str, example: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"icl {command}",
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _load_environment() -> None:
    """Read `.env` of the working directory; what is already set stays."""
    if Path(".env").is_file():
        from dotenv import load_dotenv

        load_dotenv(".env")


def _complain(message: str, status: int) -> int:
    print(f"icl: {message}", file=sys.stderr)
    return status
