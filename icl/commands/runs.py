"""`icl runs`: what there is, and how far it is."""

from pathlib import Path

from icl.commands import command_parser

HELP = "what there is, and how far it is"


def run(words: list[str]) -> int:
    """Print a line for every run."""
    parser = command_parser(
        "runs", "Every run below $LOCAL_ROOT (default: runs/): state, step, loss and age.", "icl runs"
    )
    parser.add_argument("root", metavar="FOLDER", nargs="?", type=Path, help="another folder of runs")
    options = parser.parse_args(words)
    from icl.runs import describe_runs, local_root

    root = options.root or local_root()
    lines = describe_runs(root)
    print("\n".join(lines) if lines else f"There are no runs in {root}; `icl train` makes one.")
    return 0
