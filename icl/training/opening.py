"""Open a run's folder for training.

We lock the folder. If the run's store has a later step, we fetch the run from the store. Then we find the step from which training
continues.
"""

import contextlib

import torch

from icl.files.writing import remove_temporaries
from icl.model import attention as tiny_attention
from icl.runs.contents import describe_altered_rows, describe_missing, missing_steps
from icl.runs.environment import environment_line
from icl.runs.folder import leaving_nothing, require_same_config
from icl.runs.metrics_file import MetricsFile, are_rows_altered, logged_steps, lost_rows, metric_columns
from icl.training.members import Member
from icl.training.progress import member_status
from icl.training.saving import delete_former_best, read_resume_file
from icl.training.upload import upload_behind


def has_ended(member: Member) -> bool:
    """Return whether the run has already ended successfully. A run that failed or was pre-empted is trained further.

    Raises:
        ConfigError: If the member's folder contains a run with other settings.
    """
    if not member.folder.config_file.exists():
        return False
    require_same_config(member.folder.read_config(), member.config, member.folder)
    status = member.folder.read_status()
    return status is not None and status.is_done


def open_run(member: Member, resources: contextlib.ExitStack) -> int | None:
    """Lock a run's folder and start its upload. The lock and the upload end when `resources` is closed.

    Returns:
        The step from which the run continues, or None if the run has already ended.
    """
    with contextlib.ExitStack() as opened:
        opened.enter_context(leaving_nothing(member.folder))
        opened.enter_context(upload_behind(member.config, member.folder))
        is_done = has_ended(member)
        member.is_own = member.folder.config_file.exists()
        step = None if is_done else read_resume_file(member)
        _note_missing(member, step)
        resources.push(opened.pop_all())  # last, so that an error above releases the lock and ends the upload
    return step


def _note_missing(member: Member, step: int | None) -> None:
    """Record in the member which files of the run are missing. `step` is the step from which the run continues; None if the run has ended.

    A missing scheduled checkpoint is not a failure. A run that has ended is incomplete if its last checkpoint or some rows of its
    `metrics.csv` are missing.
    """
    run, config = member.folder, member.config
    last = run.read_status()
    end = last if step is None else None
    reached = end.step if end is not None else step or 0
    if reached == 0:
        return
    missing = missing_steps(run, config, reached, end)
    sentence = describe_missing(run, missing) if missing else None
    if end is not None:
        member.incomplete = sentence if reached in missing else lost_rows(run, config, reached)
        sentences = (None if reached in missing else sentence, describe_altered_rows(run))
        member.told_lacking = " ".join(filter(None, sentences)) or None
    elif (
        missing and member.is_running and (reached < config.trainer.max_steps or last is None or last.state != "failed")
    ):
        member.lacking = frozenset(missing)
        member.notes.append(f"{sentence} Training continues without them.")


def begin_run(member: Member, step: int) -> None:
    """Check and prepare the folder of a member that starts or resumes at `step`."""
    run = member.folder
    member.is_own = True
    MetricsFile(run.metrics_file, metric_columns(member.config)).require_rows(logged_steps(member.config, step))
    if step > 0 and are_rows_altered(run.metrics_file.read_bytes(), member.rows):
        member.notes.append(
            f"{run.metrics_file} has been altered since step {step:,} was saved; its rows are kept as they are."
        )
    run.write_config(member.config)
    for folder in (run.path, run.checkpoints.root, run.moments.root, run.results, run.figures):
        remove_temporaries(folder)
    if step > 0:
        delete_former_best(member)
    run.log(f"resuming from step {step}" if step else "starting")
    for note in member.notes:
        run.log(note)
    threads = str(torch.get_num_threads())
    run.log(environment_line({"attention on CPUs": tiny_attention.ON_CPUS, "threads": threads}))
    run.write_status(member_status(member, "waiting", step))
