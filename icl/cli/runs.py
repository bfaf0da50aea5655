"""`icl runs`: what there is, and how far it is."""

from collections import Counter
from pathlib import Path
from typing import Any

from icl.command_line import CommandParser
from icl.diversity.metadata import is_alive, read_metadata
from icl.diversity.runs import METADATA
from icl.runs.folder import local_root, require_place
from icl.runs.listing import describe_runs

HELP = "what there is, and how far it is"


def run(words: list[str]) -> int:
    """Print a line for every run, experiments with a line of their own above."""
    parser = CommandParser(
        "runs",
        "Every run below $LOCAL_ROOT (default: runs/): state, step, loss and age; then those of the task-diversity "
        "experiments in the working directory.",
        "icl runs\n  icl runs checkpoints",
    )
    parser.add("root FOLDER", "another folder of runs, and no other", nargs="?", type=Path)
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
    """Return lines on the progress of an experiment; none for a folder that is no experiment."""
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
        process = f"process {metadata.get('pid')} on {metadata.get('host')}, "
    elif state == "running":
        state = "killed; the same command continues"
    head = f"{folder}: task diversity, {state} ({process}updated {metadata.get('updated')})"
    return [f"{head}; {len(entries)} runs: {summary}", *failures]
