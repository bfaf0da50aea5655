"""`icl runs`: list the runs and their progress."""

from collections import Counter
from pathlib import Path
from typing import Any

from icl.command_line import CommandParser
from icl.diversity.metadata import is_alive, read_metadata
from icl.diversity.runs import METADATA
from icl.runs.folder import local_root, require_place
from icl.runs.listing import describe_runs

HELP = "list the runs and their progress"


def run(words: list[str]) -> int:
    """Print a line for every run. A line about each task-diversity experiment comes before the lines of its runs."""
    parser = CommandParser(
        "runs",
        "List every run below $LOCAL_ROOT (default: runs/) with its state, step, loss and the time since its last update, and\n"
        "then the runs of the task-diversity experiments in the working directory.",
        "icl runs\n  icl runs checkpoints",
    )
    parser.add("root FOLDER", "list only the runs of this folder", nargs="?", type=Path)
    options = parser.parse_args(words)
    root = require_place(options.root) if options.root else local_root()
    experiments = [] if options.root else sorted(file.parent for file in Path().glob(f"*/{METADATA}"))
    lines = _experiment_lines(root) + describe_runs(root)
    for folder in experiments:
        if folder.resolve() != root.resolve():
            lines += ["", *_experiment_lines(folder), *describe_runs(folder)]
    print("\n".join(lines).lstrip("\n") if lines else f"There are no runs in {root}; `icl train` makes one.")
    return 0


def _experiment_lines(folder: Path) -> list[str]:
    """Return lines that describe the progress of an experiment, or no lines if the folder does not contain an experiment."""
    metadata = read_metadata(folder)
    if not metadata:
        return []
    entries: list[dict[str, Any]] = metadata.get("runs", [])
    counts = Counter(entry["state"] for entry in entries)
    summary = ", ".join(f"{count} {state.replace('_', ' ')}" for state, count in counts.items())
    failures = [
        f"  M = {entry['num_tasks']} failed: {entry.get('reason')}" for entry in entries if entry["state"] == "failed"
    ]
    state, process = metadata.get("state"), ""
    if state == "running" and is_alive(metadata):
        pid = metadata.get("pid")
        process = "jobs of Slurm, " if pid is None else f"process {pid} on {metadata.get('host')}, "
    elif state == "running":
        state = "killed; run the same command again to continue"
    head = f"{folder}: task diversity, {state} ({process}updated {metadata.get('updated')})"
    return [f"{head}; {len(entries)} runs: {summary}", *failures]
