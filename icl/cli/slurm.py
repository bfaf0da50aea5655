"""Options and output that `icl sweep --slurm` and `icl diversity --slurm` share."""

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from icl.command_line import CommandParser
from icl.config.validation import ConfigError
from icl.config.values import whole_number
from icl.sweeps.slurm.records import describe_jobs
from icl.sweeps.slurm.submission import (
    SCRIPT,
    job_script,
    limited_jobs,
    new_submission,
    parse_sbatch,
    submissions,
    submit_array,
)

SLURM_EXAMPLE = '--slurm --jobs 8 --sbatch "--time=4:00:00 --gpus=1"'
_MAX_JOBS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Submittable:
    """Work that the jobs of a Slurm job array divide among themselves."""

    name: str
    submissions: Path
    """Folder of all submissions of the work."""
    words: Callable[[Path], Sequence[str]]
    """Function that takes the submission's folder, and returns the arguments of `icl` in each job."""
    num_programs: int
    """Number of jobs for which there is work; 0 if there is nothing to do."""
    copy: tuple[str, bytes] | None = None
    """Name and content of a file that the jobs read from the submission's folder; None if they need no such file."""


def add_slurm_options(parser: CommandParser) -> None:
    """Add `--slurm`, `--jobs`, `--sbatch` and `--in-job`."""
    parser.add(
        "--slurm",
        "submit the work to Slurm, as an array of jobs that divide the work among themselves, and return at once",
    )
    text = "with --slurm: number of jobs (default: one for each program that is left to run)"
    parser.add("--jobs N", text, type=whole_number(1, _MAX_JOBS))
    text = 'with --slurm: further options of sbatch, all in one pair of quotes, such as "--time=4:00:00 --gpus=1 --partition=long"'
    parser.add("--sbatch OPTIONS", text)
    text = "used only by the script that --slurm submits: run as one of the jobs of the submission in FOLDER"
    parser.add("--in-job FOLDER", text, type=Path)


def join_sbatch(words: Sequence[str]) -> list[str]:
    """Join `--sbatch` and its value into one word, because argparse would take a value that begins with `-` for an option."""
    joined: list[str] = []
    for word in words:
        if joined[-1:] == ["--sbatch"]:
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def require_slurm_option(options: argparse.Namespace) -> None:
    """Check that `--jobs` and `--sbatch` are given only with `--slurm`, and `--in-job` only without `--slurm`.

    Raises:
        ConfigError: If `--jobs` or `--sbatch` is given without `--slurm`, `--in-job` is given with `--slurm`, or
            `--sbatch` contains an option that `icl` sets.
    """
    parse_sbatch(options.sbatch or "")
    for name, value in (("--jobs", options.jobs), ("--sbatch", options.sbatch)):
        if value is not None and not options.slurm:
            raise ConfigError(f"`{name}` works only with `--slurm`. Add `--slurm`, or leave out `{name}`.")
    if options.in_job and options.slurm:
        raise ConfigError("`--in-job` and `--slurm` cannot be given together; leave out `--in-job`.")


def submit_jobs(work: Submittable, options: argparse.Namespace) -> int:
    """Submit the jobs to Slurm. In a dry run, only print the script that would be submitted. Return the exit status."""
    if work.num_programs == 0:
        print("Nothing is left to do, so no job is submitted.")
        return 0
    folder = new_submission(work.submissions)
    num_jobs, sentence = limited_jobs(options.jobs, work.num_programs)
    script = job_script(
        folder,
        work.words(folder),
        name=work.name,
        num_jobs=num_jobs,
        options=parse_sbatch(options.sbatch or ""),
        said=shlex.join(["icl", *sys.argv[1:]]),
    )
    if options.dry_run:
        print(f"\nThis script would be submitted, as {folder / SCRIPT}:\n\n{script}", end="")
    if sentence:
        print(sentence)
    if options.dry_run:
        return 0
    others = [line for line in describe_jobs(submissions(work.submissions)) if line.startswith(("waiting", "running"))]
    array = submit_array(folder, script, num_jobs=num_jobs, copy=work.copy)
    print(f"Submitted job {array}, an array of {num_jobs} {'job' if num_jobs == 1 else 'jobs'}.")
    if others:
        print(
            f"Earlier jobs of the same work ({len(others)}) are still in the queue; all jobs divide the work among themselves."
        )
    print(f"Script    {folder / SCRIPT}\nLogs      {folder}/{array}_*.log")
    print(f"Stop      scancel {array}   (the jobs save first; run the same command again to continue)")
    return 0


def print_jobs(folder: Path) -> None:
    """Print a line for each submitted job of a sweep or an experiment.

    `folder` contains all submissions of this sweep or experiment.
    """
    lines = describe_jobs(submissions(folder))
    if lines:
        print("\n".join(["", *lines, ""]))
