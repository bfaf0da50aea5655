"""`icl import`: convert checkpoints of older code bases into a run."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from icl.command_line import CommandParser
from icl.config.validation import ConfigError
from icl.config.values import whole_number
from icl.runs.folder import local_root

if TYPE_CHECKING:
    from icl.importing.run import ImportedRun

HELP = "convert checkpoints of older code into a run"
_HUB = "hf://"


def run(words: list[str]) -> int:
    """Import checkpoints, and print what is known about the run."""
    options = _parser().parse_args(words)
    from icl.importing.run import import_run

    result = import_run(
        _fetched(options.path, options.source),
        options.source,
        _folder(options.out, options.path),
        options=options.settings,
        tasks=options.tasks,
        step=options.step,
    )
    _print_result(result)
    return 0


def _parser() -> CommandParser:
    """Return the parser with all options of the command."""
    parser = CommandParser(
        "import",
        """\
Convert checkpoints of older code into a run's folder, without unpickling them. All other commands except
`icl train` then work on this run. --from names the code that saved the checkpoints:
  icr       ic_regression.py with ICRegConfig: checkpoint_step_N.pt, checkpoint_final.pt
  timaeus   timaeus-research/icl: N.pt, copied from the run's bucket or folder
  raventos  mansheej/icl-task-diversity: a folder with checkpoint_N and config.json
  timaeus-lm  language models of Timaeus: a folder with checkpoints/checkpoint_N.pth or model.safetensors, or hf://USER/NAME
If the files do not contain a setting, give it as an option, such as --task.noise_variance 0.125 --model.num_heads 4.""",
        """icl import checkpoints/checkpoints_M64 --from icr --out runs/M64
        icl import checkpoints/icl/M-inf-seed-1-task-1a2b3c-opt-4d5e6f-sched-7a8b9c --from timaeus --task.noise_variance 0.125 --model.num_heads 4
        icl import train_0123456789abcdef --from raventos --tasks tasks.npy
        icl import hf://georgeyw/L2W256-3m-rr --from timaeus-lm --language.source tokens.npy""",
        settings=True,
        usage="icl import FILE|FOLDER --from icr|timaeus|raventos|timaeus-lm [--out RUN] [--tasks FILE|recompute|unknown] [--section.key VALUE ...]",
    )
    parser.add(
        "path FILE|FOLDER",
        "a checkpoint, or a folder of the checkpoints of one run; for timaeus-lm also hf://USER/NAME",
    )
    parser.add(
        "--from NAME",
        "the code that saved the checkpoints: icr, timaeus, raventos or timaeus-lm",
        dest="source",
        required=True,
    )
    parser.add("--out RUN", "name or folder of the new run (default: the name of the given folder or file)")
    parser.add(
        "--tasks SOURCE",
        "the training tasks of a run with finite M: a file (.npy, .pt or .safetensors) with a table of shape (M, D); or "
        "`recompute` to draw the tasks again from the older code's seed (--seeds.tasks); or `unknown` to import without tasks "
        "(dMMSE is then not available)",
    )
    parser.add(
        "--step N",
        "the step of a single file, if neither its name nor its content contains the step",
        type=whole_number(0, 10**15),
    )
    return parser


def _fetched(path: str, code: str) -> Path:
    """Return the local path of the files to import. A repository of the Hugging Face Hub is fetched."""
    from icl.importing import timaeus_lm

    if not path.startswith(_HUB):
        return Path(path)
    if code != timaeus_lm.NAME:
        raise ConfigError(
            f"{path} is on the Hugging Face Hub, but only --from {timaeus_lm.NAME} reads from the Hub; for other code, copy the files to a "
            "folder, and import this folder."
        )
    return timaeus_lm.fetch(path)


def _print_result(result: "ImportedRun") -> None:
    """Print what is known about an imported run, and where it is."""
    from icl.importing.models import describe

    config, steps = result.settings.config, result.steps
    print(f"Model   {describe(config)}")
    print(f"Tasks   {result.tasks}")
    if result.settings.unknown:
        print(
            f"Unknown {', '.join(result.settings.unknown)}: for these settings, config.yaml has the values of the preset {config.preset}; "
            "an unknown trainer.max_steps is set to the last step. Predictions and analyses do not depend on these settings."
        )
    print(f"Steps   {len(steps):,}, from {steps[0]:,} to {steps[-1]:,}")
    print(f"Run     {result.folder.path}")


def _folder(out: str | None, path: str) -> Path:
    """Return the new run's folder.

    If `out` contains a slash, it is the path of the folder. Otherwise it is the name of a folder in `$LOCAL_ROOT`. Without `out`, the
    new folder is in `$LOCAL_ROOT` and has the name of the imported file, folder or repository.
    """
    if out is not None:
        if not out.strip():
            raise ConfigError("`--out` must name a run or a folder, got nothing.")
        return Path(out) if "/" in out else local_root() / out
    source = Path(path)
    if path.startswith(_HUB):
        name = source.name  # not the stem: the dot in hf://USER/model-0.5 begins no suffix
    else:
        name = source.resolve().name if source.is_dir() else source.stem
    slug = re.sub(r"[^\w.,=+-]", "-", name).lstrip("-.")
    if not slug:
        raise ConfigError(
            f"No run name can be made from the name {name!r} of {path}; give the new run a name with --out RUN."
        )
    return local_root() / slug
