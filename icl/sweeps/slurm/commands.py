"""Call Slurm's commands sbatch, squeue and scontrol. If a command fails, a `SlurmError` says why in one sentence."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from icl.config.validation import UserError

_TIMEOUT_SECONDS = 60.0
_JOB_TIMEOUT_SECONDS = 10.0
"""Time limit in seconds when a job asks Slurm about itself. It is short, because the job still has to save before its own time limit."""
_OVERRIDES = tuple(f"SBATCH_{name}" for name in ("ARRAY_INX", "JOB_NAME", "OPEN_MODE", "OUTPUT", "SIGNAL", "WAIT"))
"""Environment variables that would override options of our script."""


class SlurmError(UserError):
    """Raised if a command of Slurm is missing or fails. The message contains Slurm's error message."""


class QueuedJob(NamedTuple):
    """A job in Slurm's queue."""

    id: str
    """Slurm's identifier of the job, such as `12_0`."""
    state: str
    """Slurm's word for the job's state, in lower case: `pending`, `running`, `completing` and so on."""
    place: str
    """The nodes of a running job, or the reason why a job waits. Slurm writes the reason in parentheses."""
    elapsed: str
    """Time since the job started."""


def submit(script: Path, *options: str) -> str:
    """Submit a script, and return Slurm's ID of the job. The ID is a number without `_0`.

    Raises:
        SlurmError: If Slurm refuses the script. The message says why.
    """
    environment = {key: value for key, value in os.environ.items() if key not in _OVERRIDES}
    answer = _run("sbatch", "--parsable", *options, str(script), environment=environment)
    # The answer is the number of the job, perhaps followed by a semicolon and the name of the cluster. Other lines are notices of the
    # site, for example about maintenance.
    numbers = re.findall(r"^\s*(\d+)\s*(?:;.*)?$", answer, re.MULTILINE)
    if not numbers:
        raise SlurmError(
            f"`sbatch` did not print the number of the job, but {answer.strip()!r}. Use `squeue` to see whether the job is queued."
        )
    return numbers[-1]


def requeue(job: str) -> None:
    """Put a running job back in the queue. Slurm then ends this process with SIGTERM.

    Args:
        job: Identifier of a job, such as `12_0`. (A number without `_0` may name a whole array.)

    Raises:
        SlurmError: If the cluster's settings or the job's settings forbid requeueing.
    """
    _run("scontrol", "requeue", job)


def seconds_left(job: str) -> float | None:
    """Return the seconds until a running job reaches its time limit, or None if it has no limit or Slurm does not answer."""
    try:
        answer = _run("squeue", "--noheader", f"--jobs={job}", "--format=%L", timeout=_JOB_TIMEOUT_SECONDS)
    except SlurmError:
        return None
    # Lines that are not a duration are notices of the site.
    durations = [parse_duration(line.strip()) for line in answer.splitlines()]
    return next((duration for duration in durations if duration is not None), None)


def is_preempted(job: str) -> bool:
    """Return whether Slurm is preempting a job whose programs still run: Slurm has announced the preemption, or has just sent SIGTERM."""
    try:
        text = _run("scontrol", "show", "job", job, timeout=_JOB_TIMEOUT_SECONDS)
    except SlurmError:
        return False
    return (
        re.search(r"JobState=(RUNNING|COMPLETING)", text) is not None and re.search(r"PreemptTime=\d", text) is not None
    )


def queued_jobs(arrays: Iterable[str]) -> dict[str, QueuedJob] | None:
    """Return the waiting and running jobs of some arrays, keyed by identifier, or None if Slurm does not answer."""
    jobs = {}
    for array in arrays:  # one call for each array, because one unknown array would make a call for all arrays fail
        try:
            text = _run("squeue", "--noheader", "--array", f"--jobs={array}", "--format=%i|%T|%R|%M")
        except SlurmError as error:
            if "Invalid job id" in str(error):
                continue
            return None
        for line in text.splitlines():
            match = re.fullmatch(r"(\d+_\d+)\|(\w+)\|(.*)\|([^|]*)", line.strip())
            if match is not None:  # other lines are notices of the site
                id, state, place, elapsed = (part.strip() for part in match.groups())
                jobs[id] = QueuedJob(id, state.lower(), place, elapsed)
    return jobs


def largest_array() -> int | None:
    """Return the largest number of jobs that the site allows in one array, or None if Slurm does not say."""
    try:
        text = _run("scontrol", "show", "config")
    except SlurmError:
        return None
    match = re.search(r"^MaxArraySize\s*=\s*(\d+)", text, re.MULTILINE)
    return int(match[1]) if match else None


def parse_duration(text: str) -> float | None:
    """Return the seconds of a duration in Slurm's format: `1-02:03:04`, `02:03:04` or `3:04`. Return None for any other text."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def _run(*words: str, environment: dict[str, str] | None = None, timeout: float = _TIMEOUT_SECONDS) -> str:
    """Run a command of Slurm, and return its output."""
    if shutil.which(words[0]) is None:
        raise SlurmError(
            f"There is no program `{words[0]}` here; `--slurm` works only on a machine of a Slurm cluster."
        )
    try:
        done = subprocess.run(
            words,
            check=False,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            env=environment,
            timeout=timeout,
        )
    except OSError as error:
        raise SlurmError(f"`{words[0]}` cannot be started: {error.strerror or error}.") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"`{words[0]}` has not answered for {timeout:.0f} s; try again later.") from None
    if done.returncode != 0:
        reason = "; ".join(line.strip() for line in done.stderr.splitlines() if line.strip())
        raise SlurmError(f"`{words[0]}` failed: {reason or f'exit status {done.returncode}'}")
    return done.stdout
