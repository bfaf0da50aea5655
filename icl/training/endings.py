"""Record how a member's training ends, in its status, its log and its W&B run.

A member is one of the runs that train together as a population. If one member of several fails, `isolate_failure` ends that
member with the reason, and the others continue. The failure of a single run is raised as an error. With several processes, any
failure is raised, because the processes could not agree on which members remain.
"""

import contextlib
import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from icl.config.validation import UserError
from icl.files.reading import first_line
from icl.runs.contents import describe_missing, missing_steps
from icl.runs.folder import RunError, is_child_rank
from icl.runs.status import State, Status
from icl.training.members import Member
from icl.training.progress import member_status
from icl.training.wandb.log import exit_code_of


def record_outcome(member: Member, step: int, received: signal.Signals | None) -> None:
    """Record the outcome of a member that has ended. Do nothing if the member is still running, or its outcome is already recorded."""
    if member.is_running and step == member.config.trainer.max_steps:
        member.end("finished", step)
    elif member.is_running and received is not None:
        member.end("preempted", step, f"{received.name} at step {step}")
    if member.is_running or member.is_recorded or is_child_rank():
        return
    if member.folder.path.is_dir():  # a person may have removed the folder, and we must not create it again
        _require_checkpoints(member)
        _write_end(member, step)
    member.is_recorded = True
    code = 128 + received if member.state == "preempted" and received else int(member.state == "failed")
    for logger in member.loggers:
        logger.finish(code)


def _require_checkpoints(member: Member) -> None:
    """Mark a member as failed if some of its checkpoints were removed during training."""
    status = member_status(member, member.state, member.end_step or 0)
    if status.is_done:
        lost = missing_steps(member.folder, member.config, status.step, status)
        if not member.lacking.issuperset(lost):
            member.end("failed", status.step, describe_missing(member.folder, lost))


def _write_end(member: Member, step: int) -> None:
    last = member.folder.read_status() or member_status(member, "running", step)
    step = last.step if member.state == "failed" else member.end_step or 0
    status = replace(member_status(member, member.state, step), steps_per_second=last.steps_per_second)
    member.folder.write_status(status)
    member.folder.log(f"{status.state} at step {status.step} after {member.seconds:.1f} s. {status.reason or ''}")


@contextlib.contextmanager
def isolate_failure(member: Member, *, is_alone: bool) -> Iterator[None]:
    """Catch a `UserError` in the body of the `with` statement, and end only this member.

    If `is_alone` is true, raise the error instead.

    The failure is written to the folder only if the folder is known to belong to this run (`Member.is_own`). Otherwise the folder may
    belong to another run, or another process may be training in it.
    """
    try:
        yield
    except UserError as error:
        if is_alone:
            raise
        if member.is_own:
            _record_failure([member], error)
        member.end("failed", member.end_step or 0, str(error))
        member.is_recorded = member.is_refused = True


@contextlib.contextmanager
def recording_failure(members: Sequence[Member]) -> Iterator[None]:
    """If the body of the `with` statement raises an exception, record it in the status and the W&B run of every unfinished member.

    If the status cannot be written, only the exception of the body is raised.
    """
    try:
        yield
    except SystemExit as stop:  # Lightning raises SystemExit after a second Ctrl-C
        _record_failure(members, KeyboardInterrupt())
        raise KeyboardInterrupt from stop
    except BaseException as error:
        _record_failure(members, error)
        if _is_out_of_memory(error):
            sizes = "`population`, `model`, `trainer.batch_size` or `evaluation.num_prompts`"
            raise RunError(f"The device does not have enough memory; make {sizes} smaller.") from None
        raise


def _is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that PyTorch could not allocate memory.

    Other errors that mention memory do not count, such as an illegal memory access on a GPU.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return True
    phrases = ("out of memory", "can't allocate memory")  # on a GPU (cuBLAS, NCCL, ...) and on a CPU
    return isinstance(error, RuntimeError) and any(phrase in str(error).lower() for phrase in phrases)


def _record_failure(members: Sequence[Member], error: BaseException) -> None:
    was_interrupted = isinstance(error, KeyboardInterrupt)
    state: State = "preempted" if was_interrupted else "failed"
    reason = "interrupted" if was_interrupted else first_line(error)
    for member in members:
        if member.is_recorded:
            continue
        last = member.folder.read_status() or member_status(member, state, 0)
        if member.folder.path.is_dir():
            _write_failure(member, replace(last, state=state, reason=reason))
        for logger in member.loggers:
            logger.finish(exit_code_of(error))


def _write_failure(member: Member, status: Status) -> None:
    """Replace the status and log it.

    If this fails because the disk is full, overwrite the status in place. Ignore an error of the log.
    """
    try:
        member.folder.write_status(status)
    except OSError:
        with contextlib.suppress(OSError):
            member.folder.overwrite_status(status)
    with contextlib.suppress(OSError):
        member.folder.log(f"{status.state}: {status.reason}")
