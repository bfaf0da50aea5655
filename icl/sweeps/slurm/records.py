"""Records that jobs write about themselves, and the list of all jobs of a sweep.

Slurm forgets a job some minutes after its end, and many small clusters have no accounting. So each job writes one small file
that says where the job runs and how it ended. `squeue` adds what only Slurm knows: whether a job waits, and why.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from icl.config.validation import typed_record
from icl.files.reading import ContentError, parse_json, read_bytes
from icl.files.redaction import redact
from icl.files.writing import write_atomically
from icl.sweeps.slurm.commands import QueuedJob, queued_jobs

SUBMISSION = "submission.json"
"""File in a submission's folder that records the ID of its Slurm job array."""


@dataclass(frozen=True, kw_only=True)
class Submission:
    """The content of `submission.json`."""

    submitted: float
    """Unix time of the submission. The jobs do not retry points (combinations of settings) that have failed since this time."""
    num_jobs: int
    array: str = ""
    """Slurm's ID of the job array. It is empty until Slurm has accepted the array."""


@dataclass(frozen=True, kw_only=True)
class JobRecord:
    """The facts that a Slurm job has recorded about itself. A job that continues after its time limit keeps its record."""

    task: int
    """The job's index in the job array."""
    job: str
    """Slurm's identifier of the job, such as `12_0`, or of its successor if it has submitted one."""
    state: Literal["running", "ended", "waiting", "failed"]
    """State of the job. `waiting` means that the job is in the queue again."""
    reason: str = ""
    host: str = ""
    num_starts: int = 0
    num_idle: int = 0
    """Number of successive starts after which the job reached its time limit without progress."""
    updated: float = 0.0


def write_submission(folder: Path, submission: Submission) -> None:
    """Replace `submission.json`."""
    write_atomically(folder / SUBMISSION, _encode(submission))


def read_submission(folder: Path) -> Submission | None:
    """Return the content of `submission.json`, or None if it cannot be read."""
    try:
        return typed_record(Submission, parse_json(read_bytes(folder / SUBMISSION)))
    except (ContentError, OSError):
        return None


def write_record(folder: Path, record: JobRecord) -> None:
    """Replace the record of a job."""
    write_atomically(_record_file(folder, record.task), _encode(record))


def read_record(folder: Path, task: int) -> JobRecord | None:
    """Return the record of a job, or None if the job has not started or the record cannot be read."""
    try:
        return typed_record(JobRecord, parse_json(read_bytes(_record_file(folder, task))))
    except (ContentError, OSError):
        return None


def describe_jobs(submissions: Sequence[Path]) -> list[str]:
    """Return a line for each job of some submissions.

    The line has the job's state and identifier, and the place where the job runs or the reason why it does not run.

    Jobs of older submissions are left out once they have ended.
    """
    known = [(folder, submission) for folder in submissions if (submission := read_submission(folder)) is not None]
    records = {
        folder: [read_record(folder, task) for task in range(submission.num_jobs)] for folder, submission in known
    }
    arrays = {submission.array for _, submission in known}
    arrays |= {record.job.partition("_")[0] for each in records.values() for record in each if record is not None}
    queue = queued_jobs(sorted(arrays - {""}))
    lines = (
        [] if queue is not None else ["squeue does not answer here, so each job is shown with its last recorded state."]
    )
    for folder, submission in known:
        for task, record in enumerate(records[folder]):
            if record is None and not submission.array:
                continue  # the ID of the array is not known
            id = record.job if record is not None else f"{submission.array}_{task}"
            state, text = _describe_job(record, queue, id, folder / f"{id}.log")
            if folder == known[-1][0] or state in ("waiting", "running"):
                lines.append(f"{state:9s} job {id}: {text}")
    return lines


def _describe_job(record: JobRecord | None, queue: dict[str, QueuedJob] | None, id: str, log: Path) -> tuple[str, str]:
    """Return the state of a job and the reason for it."""
    queued = None if queue is None else queue.get(id)
    again = "" if record is None or record.num_starts < 2 else f", start {record.num_starts}"
    if queued is not None and queued.state == "running":
        return "running", f"on {queued.place} for {queued.elapsed}{again}"
    if queued is not None and queued.state == "pending":
        said = f"; {record.reason}" if record is not None and record.state == "waiting" else ""
        return "waiting", f"in the queue {queued.place}{said}"
    if queued is not None:
        return "running", f"{queued.state} on {queued.place}"
    if record is None:
        said = _last_line(log)
        if said:
            return "failed", f"ended before `icl` could work; the last line of {log} is: {said}"
        return ("waiting", "submitted") if queue is None else ("ended", "never started: cancelled, or refused by Slurm")
    if record.state == "ended" or record.state == "failed" or queue is None:
        where = f"on {record.host}, " if record.state == "failed" and record.host else ""
        return record.state, f"{record.reason or f'on {record.host}'} ({where}{_age(record)} ago)"
    died = "left the queue without recording why: cancelled, killed at its time limit, or its node died"
    return "failed", f"{died} (on {record.host}, {_age(record)} ago)"


def _last_line(log: Path) -> str:
    """Return the last line of a job's log, or an empty string if the job has no log or has written nothing."""
    try:
        lines = read_bytes(log).decode(errors="replace").split("\n")
    except (ContentError, OSError):
        return ""
    return next((redact(line.strip()[-300:]) for line in reversed(lines) if line.strip()), "")


def _age(record: JobRecord) -> str:
    seconds = max(0.0, time.time() - record.updated)
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"


def _record_file(folder: Path, task: int) -> Path:
    return folder / "jobs" / f"{task}.json"


def _encode(record: Submission | JobRecord) -> bytes:
    return (redact(json.dumps(asdict(record), indent=1)) + "\n").encode()
