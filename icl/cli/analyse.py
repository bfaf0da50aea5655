"""`icl analyse`: analyse a run's saved steps, or a table of numbers. The results are written as a table and a figure."""

import argparse
import dataclasses
import importlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from icl.analysis import ANALYSES, NotApplicableError, module_name, name_for
from icl.cli.analyse_runs import analyse_runs
from icl.cli.outputs import require_output, require_output_table
from icl.command_line import CommandParser, nearest
from icl.config.validation import ConfigError, UserError
from icl.files.writing import StorageError, plain_rows, table_format, write_atomically
from icl.runs.folder import place_of, require_place, run_of

if TYPE_CHECKING:
    from icl.analysis.run import Result

HELP = "measure how a run develops: " + ", ".join(ANALYSES)

_DESCRIPTION = """\
Analyse every saved step of a run, or analyse a table. Results are stored step by step. After an interruption, run the
same command again to continue with the next step. If the run has saved more steps in the meantime, only the new steps
are analysed.

If FOLDER contains runs, each run is analysed. The findings of `behaviour`, `mixture` and `stages` are then pooled over the runs that
differ only in their seeds. The table FOLDER/NAME-seeds.csv contains the means and their standard errors over seeds. For `behaviour`
and `mixture`, the figure FOLDER/NAME-seeds.png shows the curves of all runs.

analyses (`icl analyse --what NAME --help` lists the options of one analysis):
"""


def run(words: list[str]) -> int:
    """Analyse a run, a table or the runs in a folder, print the results, and write the tables and the figures."""
    chosen = list(dict.fromkeys(_served(name, words) for name in _what(words)))
    options = _parser(chosen).parse_args(words)
    paths = [path for path in (options.path, options.checkpoint_dir, options.input_file) if path is not None]
    if not paths:
        raise ConfigError("Give a run or a table to analyse: `icl analyse RUN --what NAME`.")
    if len(paths) > 1:
        raise ConfigError(f"The run or table is given twice: {' and '.join(map(str, paths))}. Give only one of them.")
    path = paths[0]
    if options.out is not None:
        require_output_table(options.out, path)
    if options.output_plot is not None:
        if options.output_plot.suffix.lower() not in (".png", ".pdf", ".svg"):
            raise StorageError(f"`--output_plot` must name a .png, .pdf or .svg file, got {options.output_plot}.")
        require_output(options.output_plot, path)
    path = require_place(path)
    if ANALYSES[chosen[0]].of == "run" and (runs := _runs_below(path)):
        return analyse_runs(chosen, path, runs, options, _analyse)
    if len(chosen) > 1:
        return _analyse_all(that_apply(chosen, path), path, options)
    _analyse(chosen[0], path, options)
    return 0


def _runs_below(path: Path) -> dict[str, Path]:
    """Return the runs below a folder, by name. Return an empty dict if the path is a run itself, or has no runs below it."""
    from icl.runs.folder import RunFolder
    from icl.runs.listing import named_runs, run_folders

    folder = RunFolder(path)
    is_run = folder.config_file.is_file() or folder.status_file.is_file() or folder.checkpoints.root.is_dir()
    if not path.is_dir() or is_run or path.name == "checkpoints" or not run_folders(path):
        return {}
    return {name: run.path for name, run in named_runs([path]).items()}


def that_apply(names: list[str], path: Path) -> list[str]:
    """Return the analyses that can be applied to the run. For a language run, print which analyses are left out."""
    from icl.analysis.run import family_of

    family = family_of(path) or "regression"
    others = [name for name in names if family not in ANALYSES[name].families]
    if family != "regression" and others:
        print(f"icl: {', '.join(others)} are left out, because they accept only regression runs.", file=sys.stderr)
    return [name for name in names if name not in others]


def _served(name: str, words: list[str]) -> str:
    """Return the full name of an analysis: for a language run, `behaviour` means `language-behaviour`."""
    from icl.analysis.run import family_of

    paths = [place_of(word) for word in words if word and not word.startswith("-")]
    families = {family_of(path) for path in paths if (path / "config.yaml").is_file() or path.suffix == ".safetensors"}
    return name_for(name, "language") if name == "behaviour" and families == {"language"} else name


def _what(words: list[str]) -> list[str]:
    """Return the analyses that `--what` names. If the user only asks for the help, return an empty list."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--what", nargs="?")
    name = early.parse_known_args(words)[0].what
    if name is None and {"-h", "--help"} & set(words):
        return []
    runs = [known for known, about in ANALYSES.items() if about.of == "run"]
    if name not in (*ANALYSES, "all"):
        got = "nothing" if name is None else f"`{name}`"
        hint = "" if name is None else nearest(name, [*ANALYSES, "all"])
        raise ConfigError(f"`--what` must be one of {', '.join(ANALYSES)} or all, got {got}.{hint}")
    if name == "all" and {word.partition("=")[0] for word in words} & {"--out", "--output_file", "--output_plot"}:
        raise ConfigError(
            "`--what all` writes each analysis to the run's results/ and figures/; leave out --out and --output_plot."
        )
    return runs if name == "all" else [name]


def _parser(chosen: list[str]) -> argparse.ArgumentParser:
    names = "\n".join(f"  {name:20s} {about.help}" for name, about in ANALYSES.items())
    parser = CommandParser(
        "analyse",
        _DESCRIPTION + names + f"\n  {'all':20s} every analysis of a run; if one fails, the other analyses still run",
        "icl analyse runs/quickstart --what gradients\n"
        "  icl analyse runs/quickstart --what gradients --out gradient_results.json\n"
        "  icl analyse --what diversity --input_file results.csv --output_plot diversity.png --model_type ridge",
    )
    text = "a run's folder or name, a checkpoint, a table, or a folder whose runs are all analysed"
    parser.add("path RUN|FILE|FOLDER", text, nargs="?", type=Path)
    parser.add("--checkpoint_dir DIR", "the same as RUN, for older scripts", type=Path)
    parser.add("--input_file FILE", "the table to analyse, for `--what diversity`", type=Path)
    parser.add("--what NAME", "name of the analysis", required=True)
    parser.add("--out --output_file FILE", "also write the numbers to FILE (.csv or .json)", type=Path)
    parser.add("--output_plot FILE", "also draw the figure to FILE (.png, .pdf or .svg)", type=Path)
    if len(chosen) == 1:
        _add_settings(parser, chosen[0])
    return parser


def _add_settings(parser: argparse.ArgumentParser, name: str) -> None:
    """Add an option for every field of the class `Settings` of an analysis."""
    from icl.analysis.run import find

    group = parser.add_argument_group(f"settings of {name}")
    for field in dataclasses.fields(find(name).Settings):
        choices = get_args(field.type) if get_origin(field.type) is Literal else None
        text = field.metadata["help"] + ("" if field.default is None else f" (default: {field.default})")
        kind: Any = int if field.type is int else float if field.type is float else str
        metavar = "|".join(choices) if choices else "N" if kind is int else "VALUE"
        group.add_argument(f"--{field.name}", metavar=metavar, type=kind, choices=choices, help=text)


def _analyse_all(names: list[str], path: Path, options: argparse.Namespace) -> int:
    """Run every analysis, even if some fail, and print a message for each failure. Return 1 if any analysis failed."""
    refused: dict[str, str] = {}
    for name in names:
        try:
            _analyse(name, path, options)
        except NotApplicableError as error:  # noqa: PERF203 (an analysis takes seconds)
            print(f"icl: {name} is left out: {error}", file=sys.stderr)
        except UserError as error:
            if str(error) not in refused.values():
                print(f"icl: {name} failed: {error}", file=sys.stderr)
            refused[name] = str(error)
    if not refused:
        return 0
    done = len(names) - len(refused)
    print(f"icl: {done} of {len(names)} analyses are done; failed: {', '.join(refused)}.", file=sys.stderr)
    return 1


def _analyse(name: str, path: Path, options: argparse.Namespace) -> "Result":
    from icl.analysis.run import analyse, find
    from icl.plotting.style import save_figure
    from icl.runs.delivery import send_results

    if path.is_file() and options.out is None and options.output_plot is None:
        raise ConfigError(
            f"{path} is a file, so name a file for the results: --out FILE (.csv or .json) or --output_plot FILE."
        )
    fields = [field.name for field in dataclasses.fields(find(name).Settings)]
    settings = {key: getattr(options, key) for key in fields if getattr(options, key, None) is not None}
    result = analyse(name, path, **settings)
    heading = ["", name] if options.what == "all" else []
    print("\n".join([*heading, *result.summary]))
    plot = importlib.import_module(f"icl.plotting.{module_name(name)}").plot
    folder = None if path.is_file() else run_of(path)
    if options.out is not None:
        _save(name, result, options.out)
        print(f"Output  {options.out}")
    if folder is not None:
        print(f"Table   {folder.write_result(f'{name}.csv', result.table.to_csv(index=False))}")
    figures = [options.output_plot] if options.output_plot else []
    figures += [folder.figures / f"{name}.png"] if folder else []
    for file in figures:
        title = path.stem if folder is None else folder.path.name
        print(f"Figure  {save_figure(plot(result.table, title=title), file)}")
    if folder is not None and folder.config_file.is_file():
        send_results(folder)
    return result


def _save(name: str, result: "Result", out: Path) -> None:
    """Write the numbers to a file that the user chose."""
    if table_format(out) == "csv":
        text = result.table.to_csv(index=False)
    else:
        rows = plain_rows(result.table.astype(object).where(result.table.notna(), None))
        text = json.dumps({"analysis": name, "summary": result.summary, "rows": rows}, indent=1, allow_nan=False) + "\n"
    write_atomically(out, text.encode())
