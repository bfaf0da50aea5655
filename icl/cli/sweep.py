"""`icl sweep`: run a W&B sweep file on this machine, without W&B."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from icl.cli.slurm import (
    SLURM_EXAMPLE,
    Submittable,
    add_slurm_options,
    join_sbatch,
    print_jobs,
    require_slurm_option,
    submit_jobs,
)
from icl.command_line import CommandParser
from icl.config.validation import ConfigError
from icl.config.values import whole_number
from icl.runs.folder import local_root
from icl.sweeps.command import refuse_missing_program, require_packable
from icl.sweeps.engine import run_sweep
from icl.sweeps.points import InvalidPoint, Point, sweep_points
from icl.sweeps.schema import SweepFile, read_sweep_file
from icl.sweeps.slurm.job import SlurmJob
from icl.sweeps.slurm.submission import submissions_folder
from icl.sweeps.state import PointState, point_state

_COPY = "sweep.yaml"
HELP = "run a W&B sweep file, or continue it"


def run(words: list[str]) -> int:
    """Run a sweep, list its points, or show its progress. Return 0 after a dry run or a submission to Slurm, or if every point is done."""
    options = _parse(words)
    sweep = read_sweep_file(options.file)
    if options.pack > 1:
        require_packable(sweep.command)
    require_slurm_option(options)
    if options.seed is not None and sweep.method == "grid":
        raise ConfigError(
            "`--seed` has no effect on a grid, because only `method: random` draws points; leave out `--seed`."
        )
    for warning in sweep.warnings:
        print(f"icl: {options.file}: {warning}", file=sys.stderr)
    invalid: list[InvalidPoint] = []
    points = sweep_points(sweep, count=options.count, seed=options.seed or 0, invalid=invalid)
    if not options.status:
        refuse_missing_program(sweep.command, sweep.program, points[0].settings)
    if options.slurm and not options.status:
        return _submit(points, invalid, options)
    if options.status or options.dry_run:
        return _list(points, invalid, options)
    return _run(sweep, points, invalid, options)


def _submit(points: Sequence[Point], invalid: Sequence[InvalidPoint], options: argparse.Namespace) -> int:
    """Submit the jobs of a sweep to Slurm. Return 0 if they are submitted, or if there is nothing to do."""
    if options.dry_run:
        _list(points, invalid, options)
    for point in () if options.dry_run else invalid:
        print(f"failed   {point.name}: {point.reason}", flush=True)
    states = [point_state(point, local_root()) for point in points]
    num_left = sum(_is_next(state, options) or state.state == "running" for state in states)
    return submit_jobs(
        Submittable(
            name=options.file.stem,
            submissions=_submissions(options),
            words=lambda folder: _job_words(folder, options),
            num_programs=-(-num_left // min(options.workers * options.pack, max(1, num_left))),
            copy=(_COPY, options.file.read_bytes()),
        ),
        options,
    )


def _submissions(options: argparse.Namespace) -> Path:
    return submissions_folder(local_root(), options.file.stem, options.file)


def _job_words(folder: Path, options: argparse.Namespace) -> list[str]:
    """Return the arguments with which a Slurm job calls `icl`. The job reads the sweep from a copy of the sweep file."""
    words = ["sweep", str(folder / _COPY), "--in-job", str(folder), "--workers", str(options.workers)]
    words += ["--pack"] if options.pack == sys.maxsize else ["--pack", str(options.pack)] if options.pack > 1 else []
    words += [] if options.count is None else ["--count", str(options.count)]
    words += [] if options.seed is None else ["--seed", str(options.seed)]
    return words + ["--retry"] * options.retry


def _run(
    sweep: SweepFile, points: Sequence[Point], invalid: Sequence[InvalidPoint], options: argparse.Namespace
) -> int:
    """Run the missing points. Return 1 if a point has failed, or 128 + the number of the signal that stopped the sweep."""
    root, num_points = local_root(), len(points) + len(invalid)
    print(f"{options.file}: {num_points} points, {options.workers} at a time, runs in {root}.", flush=True)
    for point in invalid:
        print(f"failed   {point.name}: {point.reason}", flush=True)
    if sweep.stops_early:
        print("`early_terminate` works only in W&B; `icl sweep` runs every point to its end.")
    job = SlurmJob(options.in_job) if options.in_job else None
    result = run_sweep(
        sweep, points, root, num_workers=options.workers, pack=options.pack, retry=options.retry, job=job
    )
    print(_summary([state.state for state in result.states.values()] + ["failed"] * len(invalid)))
    if job is not None:
        return job.end(result)
    if result.is_done and not invalid:
        return 0
    if invalid:
        print(f"Correct the invalid settings ({len(invalid)} of {num_points} points) in {options.file}.")
    if any(state.state != "done" and not state.is_final for state in result.states.values()):
        print("Run the same command again for the missing points.")
    return 1 if result.received is None else 128 + result.received


def _parse(words: list[str]) -> argparse.Namespace:
    parser = CommandParser(
        "sweep",
        "Run a W&B sweep file (grid or random) without a W&B account or a network. A point is one combination of settings.\n"
        "After an interruption, run the same command again to continue. The command then also tries failed points again, except\n"
        "points whose loss became NaN. Several machines can run the command at the same time and divide the work. They need the\n"
        "same folder of runs ($LOCAL_ROOT, by default `runs`). The output of each run is in its sweep.log.\n"
        "With --slurm, the same work is done by jobs of a Slurm cluster, and the command returns at once.",
        "icl sweep sweeps/training-runs/quickstart.yaml --workers 2\n"
        f"icl sweep sweeps/training-runs/L2H4Minf.yaml {SLURM_EXAMPLE}",
    )
    parser.add("file FILE", "the sweep file", type=Path)
    text = "number of programs that run at the same time (default: 1)"
    parser.add("--workers N", text, type=whole_number(1, 1000), default=1)
    text = "train up to N points in one program if these points differ only in seeds and number of tasks (without N: all such points)"
    parser.add("--pack N", text, type=whole_number(1), nargs="?", const=sys.maxsize, default=1)
    parser.add("--count N", "use only the first N points", type=whole_number(1))
    parser.add("--seed S", "seed for the draws of a random sweep (default: 0)", type=whole_number(0, 2**63 - 1))
    text = "try every failed point again, even if it would fail again or has just failed on another machine"
    parser.add("--retry", text)
    add_slurm_options(parser)
    what = parser.add_mutually_exclusive_group()
    text = "list the runs, and show which of them would be started; with --slurm, also print the script; start nothing"
    what.add_argument("--dry-run", action="store_true", help=text)
    text = "list which points and jobs are done, running, failed or waiting, and why; start nothing"
    what.add_argument("--status", action="store_true", help=text)
    return parser.parse_args(join_sbatch(words))


def _list(points: Sequence[Point], invalid: Sequence[InvalidPoint], options: argparse.Namespace) -> int:
    """Print the state of every point. A dry run also shows which points would be run. With --status, return 1 unless all points are done."""
    states = {point.number: point_state(point, local_root()) for point in points}
    lines = {
        point.number: f"{_word(states[point.number], options):9s} {point.name}: {states[point.number].reason}"
        for point in points
    }
    for point in invalid:
        lines[point.number] = f"{'would fail' if options.dry_run else 'failed':9s} {point.name}: {point.reason}"
    print("\n".join(lines[number] for number in sorted(lines)))
    if options.status:
        print_jobs(_submissions(options))
    words = [state.state for state in states.values()] + ["failed"] * len(invalid)
    print(_summary(words))
    return 0 if options.dry_run or set(words) == {"done"} else 1


def _word(state: PointState, options: argparse.Namespace) -> str:
    """Return the state of a point. In a dry run, return `would run` if the command would run the point."""
    return "would run" if options.dry_run and _is_next(state, options) else state.state


def _is_next(state: PointState, options: argparse.Namespace) -> bool:
    """Return whether the command would run a point."""
    return state.state == "waiting" or (state.state == "failed" and (options.retry or not state.is_final))


def _summary(states: Sequence[str]) -> str:
    counts = {word: states.count(word) for word in ("done", "running", "failed", "waiting")}
    parts = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
    return f"{len(states)} points: {parts}."
