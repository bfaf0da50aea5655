"""`icl sweep`: run a W&B sweep file here, without W&B."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from icl.commands import command_parser

if TYPE_CHECKING:
    from icl.sweeps.points import Point
    from icl.sweeps.state import PointState

HELP = "run a sweep file, or what is missing of it"


def run(words: list[str]) -> int:
    """Run, or list, or tell how far it is; 0 only if every point is done (or listed)."""
    options = _parse(words)
    from icl.checks import ConfigError
    from icl.runs import local_root
    from icl.sweeps.command import require_packable
    from icl.sweeps.engine import run_sweep
    from icl.sweeps.points import sweep_points
    from icl.sweeps.schema import read_sweep_file
    from icl.sweeps.state import point_state

    sweep = read_sweep_file(options.file)
    if options.pack > 1:
        require_packable(sweep.command)
    if options.seed is not None and sweep.method == "grid":
        raise ConfigError("`--seed` has no meaning for a grid; only `method: random` draws its points.")
    points = sweep_points(sweep, count=options.count, seed=options.seed or 0)
    root = local_root()
    if options.status or options.dry_run:
        states = {point.number: point_state(point, root) for point in points}
        _list(points, states, dry_run=options.dry_run)
        is_done = all(state.state == "done" for state in states.values())
        return 0 if options.dry_run or is_done else 1
    print(f"{options.file}: {len(points)} points, {options.workers} at a time, runs in {root}.", flush=True)
    if sweep.stops_early:
        print("`early_terminate` is W&B's own; here every point runs to its end.")
    result = run_sweep(
        sweep,
        points,
        root,
        num_workers=options.workers,
        pack=options.pack,
        say=lambda line: print(line, flush=True),
    )
    print(_summary(result.states))
    if result.is_done:
        return 0
    print("The same command does what is missing.")
    return 1 if result.received is None else 128 + result.received


def _parse(words: list[str]) -> argparse.Namespace:
    parser = command_parser(
        "sweep",
        "Run a W&B sweep file (grid or random) with no account and no network. The same command goes on after an "
        "interruption and tries failed points again; on several machines that share $LOCAL_ROOT it shares the work. "
        "Each run's output is in its sweep.log.",
        "icl sweep sweeps/training-runs/quickstart.yaml --workers 2",
    )
    parser.add_argument("file", metavar="FILE", type=Path, help="the sweep file")
    parser.add_argument("--workers", metavar="N", type=_count, default=1, help="programs at a time (default: 1)")
    parser.add_argument(
        "--pack",
        metavar="N",
        type=_count,
        nargs="?",
        const=sys.maxsize,
        default=1,
        help="train up to N points (or all) that differ only in seeds and number of tasks in one program",
    )
    parser.add_argument("--count", metavar="N", type=_count, help="only the first N points")
    parser.add_argument("--seed", metavar="S", type=int, help="of a random sweep's draws (default: 0)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="list the runs, and which would be run; start nothing")
    what.add_argument("--status", action="store_true", help="list what is done, running, failed and waiting, and why")
    return parser.parse_args(words)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text}")
    return int(text)


def _list(points: "Sequence[Point]", states: "dict[int, PointState]", *, dry_run: bool) -> None:
    for point in points:
        state = states[point.number]
        would_run = dry_run and state.state in ("waiting", "failed")
        print(f"{'would run' if would_run else state.state:9s} {point.name}: {state.reason}")
    print(_summary(states))


def _summary(states: "dict[int, PointState]") -> str:
    counts = dict.fromkeys(("done", "running", "failed", "waiting"), 0)
    for state in states.values():
        counts[state.state] += 1
    told = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
    return f"{len(states)} points: {told}."
