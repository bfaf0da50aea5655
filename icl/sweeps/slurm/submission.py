"""Write the script of a job array, and submit it.

Every submission has its own folder, `$LOCAL_ROOT/.slurm/<name>/<time>/`, with the script, a copy of the sweep file, the
records of the jobs and their logs. So a sweep file can be edited while its jobs wait in the queue.
"""

import hashlib
import os
import re
import secrets
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from icl.config.validation import ConfigError, UserError
from icl.files.writing import StorageError, write_atomically
from icl.runs.environment import OWN_PROGRAM
from icl.runs.folder import local_root
from icl.sweeps.slurm.commands import SlurmError, largest_array, submit
from icl.sweeps.slurm.records import Submission, read_submission, write_submission

SCRIPT = "job.sh"
FOLDER = ".slurm"
WARNING_SECONDS = 90
"""Seconds before the time limit at which Slurm signals a job."""
_RESERVED = {
    **dict.fromkeys(("--array", "-a"), "use `--jobs N`"),
    **dict.fromkeys(("--signal",), "the jobs of `icl` watch their time limit themselves"),
    **dict.fromkeys(("--wrap", "--test-only", "--parsable", "--help", "-h", "--version", "-V"), "it has no use here"),
    **dict.fromkeys(("--wait", "-W"), "`--status` shows whether the jobs have ended"),
    **dict.fromkeys(("--export-file", "--input", "-i"), "it has no use here"),
}
"""Options of sbatch that the user cannot set, each with the reason or with advice."""
_LETTERS_WITHOUT_VALUE = "HkOQsv"
"""One-letter options of sbatch that take no value. Further options can follow such an option in the same word."""


def parse_sbatch(text: str) -> list[str]:
    """Return the words of `--sbatch`.

    Raises:
        ConfigError: If the words are not options of sbatch, or `icl` itself sets one of these options.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"`--sbatch` cannot be read: {error}, got {text!r}.") from None
    if words and not words[0].startswith("-"):
        raise ConfigError(f'`--sbatch` takes options of sbatch, such as "--time=4:00:00 --gpus=1"; got {text!r}.')
    for word in words:
        name = _option_name(word)
        if name in _RESERVED:
            raise ConfigError(f"`--sbatch` cannot contain `{name}`: {_RESERVED[name]}.")
        if "\n" in word:
            raise ConfigError(f"`--sbatch` must be one line, got {text!r}.")
    return words


def submissions_folder(root: Path, name: str, identity: Path) -> Path:
    """Return the folder of all submissions of a sweep.

    Args:
        root: Folder of all runs of the sweep.
        name: Readable name of the sweep.
        identity: Path of the sweep's file or folder, which distinguishes this sweep from others of the same name.
    """
    digest = hashlib.blake2b(str(identity.resolve()).encode(), digest_size=4).hexdigest()
    return root.resolve() / FOLDER / f"{_plain(name)}-{digest}"


def submissions(folder: Path) -> list[Path]:
    """Return the folders of all submissions of a sweep, oldest first."""
    return sorted(path for path in folder.glob("*") if read_submission(path) is not None)


def new_submission(folder: Path) -> Path:
    """Return the path of a new submission, named after the current time. Two submissions in the same second have different paths."""
    return folder / f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(2)}"


def job_script(
    folder: Path, words: Sequence[str], *, name: str, num_jobs: int, options: Sequence[str], said: str
) -> str:
    """Return the script of a job array.

    Args:
        folder: Folder of the submission.
        words: Arguments of `icl` in each job.
        name: Name of the jobs.
        num_jobs: Number of jobs.
        options: The user's further options for sbatch.
        said: The command that the user typed.
    """
    directives = [
        f"--job-name=icl-{_plain(name)}",
        f"--array=0-{num_jobs - 1}",
        f"--output={_escape(folder)}/%A_%a.log",
        "--open-mode=append",
        f"--signal=B:USR1@{WARNING_SECONDS}",
    ]
    own = [f"#SBATCH {_quote(directive)}" for directive in directives]
    given = [f"#SBATCH {' '.join(_quote(option) for option in options)}"] if options else []
    return "\n".join(
        [
            "#!/bin/bash",
            *own,
            *given,
            f"# Written by: {' '.join(said.splitlines())}",
            "# Each job of the array works on points that no other job works on, until none is left.",
            f"cd {shlex.quote(os.getcwd())} || exit",  # noqa: PTH109 (a link in the path stays)
            f"export LOCAL_ROOT={shlex.quote(str(local_root().resolve()))}",
            "trap '' USR1  # Slurm's warning of the time limit; icl handles it as soon as it has started",
            f"exec {shlex.join([*OWN_PROGRAM, *words])}",
            "",
        ]
    )


def limited_jobs(num_jobs: int | None, num_programs: int) -> tuple[int, str]:
    """Return the number of jobs to submit, and a sentence for the user.

    The sentence says why fewer jobs than requested are submitted. It is empty if there is nothing to explain.

    Args:
        num_jobs: Number of jobs that the user requests. None requests as many jobs as there is work for.
        num_programs: Number of jobs for which there is work.
    """
    limit = largest_array()
    number = min(num_programs, num_jobs or num_programs, limit or sys.maxsize)
    if limit is not None and number == limit < min(num_programs, num_jobs or num_programs):
        return (
            number,
            f"There is work for {num_programs:,} jobs, but this site allows only {limit:,} in an array, so fewer jobs share the points.",
        )
    if num_jobs is not None and number < num_jobs:
        return number, f"Only {number:,} of {num_jobs:,} jobs are submitted, because there is no work for more jobs."
    return number, ""


def submit_array(folder: Path, script: str, *, num_jobs: int, copy: tuple[str, bytes] | None = None) -> str:
    """Write the files of a submission, and submit its script. Return Slurm's ID of the array.

    Args:
        folder: Folder of the submission, which must not exist.
        script: The script.
        num_jobs: Number of jobs.
        copy: Name and content of one more file to write, such as the copy of the sweep file. None writes no such file.

    Raises:
        SlurmError: If Slurm refuses the script.
        StorageError: If the files cannot be written.

    After either error, the folder of the submission is removed.
    """
    submission = Submission(submitted=round(time.time(), 3), num_jobs=num_jobs)
    try:
        if copy is not None:
            write_atomically(folder / copy[0], copy[1])
        write_atomically(folder / SCRIPT, script.encode())
        write_submission(folder, submission)
        array = submit(folder / SCRIPT)
    except (UserError, KeyboardInterrupt) as error:
        # If Slurm has accepted the jobs after all, they end at once, because this folder is missing.
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, SlurmError) and num_jobs > 1 and "Limit" in str(error):
            raise SlurmError(
                f"{str(error).rstrip('.')}. If your account is allowed fewer jobs at a time, give a smaller `--jobs`."
            ) from None
        raise
    try:
        write_submission(folder, replace(submission, array=array))
    except StorageError as error:  # the jobs run nevertheless
        print(
            f"icl: `--status` will show the jobs of array {array} only after they have started. {error}",
            file=sys.stderr,
        )
    return array


def _option_name(word: str) -> str:
    """Return the name of an option of sbatch, such as `--array` or `-a`.

    Like sbatch, this function completes an abbreviation (`--arr=0-3` is `--array`) and skips leading letters that take no value (`-Qa0-3`
    sets `-a`).
    """
    if not word.startswith("--"):
        return f"-{word[1:].lstrip(_LETTERS_WITHOUT_VALUE)[:1]}" if word.startswith("-") else word
    name = word.partition("=")[0]
    is_whole = name in (
        *_RESERVED,
        "--",
        "--export",
    )  # `--export` is an option, and also the beginning of `--export-file`
    return name if is_whole else next((full for full in _RESERVED if full.startswith(name)), name)


def _quote(word: str) -> str:
    r"""Quote a word for a line that begins with #SBATCH. Unlike a shell, Slurm replaces `\\` between single quotes by `\`."""
    return shlex.quote(word).replace("\\", "\\\\")


def _plain(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name)[:60] or "sweep"


def _escape(path: Path) -> str:
    return str(path).replace("%", "%%")
