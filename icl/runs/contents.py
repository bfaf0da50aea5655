"""The checkpoints that a run's folder must contain, given the run's settings and its latest step."""

from collections.abc import Sequence

from icl.config import RunConfig
from icl.config.schedules import checkpoint_steps
from icl.config.validation import UserError
from icl.files.reading import read_bytes
from icl.runs.checkpoints import list_steps
from icl.runs.folder import RunFolder
from icl.runs.metrics_file import are_rows_altered
from icl.runs.resume_file import NAMES, read_resume
from icl.runs.status import Status

_MAX_STEPS = 8
"""A message lists at most this many steps, and says how many more there are."""


def expected_steps(config: RunConfig, step: int, status: Status | None = None) -> list[int]:
    """Return the steps that must have a checkpoint.

    For an imported run, return an empty list, because the older code that trained the run chose the steps.

    Args:
        config: The run's settings.
        step: The run's latest step.
        status: The run's status. If the run has ended, the last step is also expected, and with early stopping the best step too.
            Without a status, only the scheduled steps are expected.
    """
    grid = config.checkpoints
    if grid.imported_from is not None:
        return []
    scheduled = checkpoint_steps(
        config.trainer.max_steps, every=grid.every, num_log=grid.num_log, num_linear=grid.num_linear
    )
    steps = {saved_step for saved_step in scheduled if saved_step <= step}
    if status is not None and status.is_done:
        has_best = config.early_stopping.patience is not None and status.best_step is not None
        steps |= {step, status.best_step or 0} if has_best else {step}
    return sorted(steps)


def missing_steps(run: RunFolder, config: RunConfig, step: int, status: Status | None = None) -> list[int]:
    """Return the steps whose checkpoint is missing in the run's folder.

    If the run saves Adam's moments, steps whose moments are missing are included.
    """
    there = set(list_steps(run.checkpoints))
    if config.checkpoints.moments:
        there &= set(list_steps(run.moments))
    return [expected for expected in expected_steps(config, step, status) if expected not in there]


def describe_altered_rows(run: RunFolder) -> str | None:
    """Return a warning if a run has ended and its `metrics.csv` has changed since the last save.

    Return None if the file has not changed, or if this cannot be determined.
    """
    status = run.read_status()
    if status is None or not status.is_done:
        return None
    try:
        resume, _ = read_resume(run)
        data = read_bytes(run.metrics_file, limit=None)
    except (UserError, OSError):  # the code that needs these files reports the error
        return None
    if resume is None or resume.step != status.step:
        return None
    if not are_rows_altered(data, resume.member.get("rows"), has_ended=True):
        return None
    return f"{run.metrics_file} has changed since step {resume.step:,} was saved; its rows are shown as they are now."


def describe_missing(run: RunFolder, steps: Sequence[int]) -> str:
    """Return the message that lists missing checkpoints and says how to get them back."""
    return (
        f"{run.path} lacks the {name_checkpoints(steps)}. If the run's store has them, `icl checkpoints {run.path} pull` fetches them. "
        f"To train again from step 0, delete {', '.join(NAMES)} and status.json in the run's folder and run the same command."
    )


def name_checkpoints(steps: Sequence[int]) -> str:
    """Return a phrase such as "checkpoints of steps 5, 10". If there are many steps, list only the first ones."""
    named = ", ".join(f"{step:,}" for step in steps[:_MAX_STEPS])
    more = f" and {len(steps) - _MAX_STEPS:,} more" if len(steps) > _MAX_STEPS else ""
    return f"checkpoints of steps {named}{more}" if len(steps) > 1 else f"checkpoint of step {named}"
