"""How a member's training ends, written down where it is looked for: its status, its log and its W&B run.

What goes wrong with one member of several is that member's: `isolate_failure` ends it with its reason, and the others go on. What
goes wrong with a lone run is raised, and so is what goes wrong between processes, which could not agree on who is left.
"""

import contextlib
import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace

from icl.contents import describe_missing, missing_steps
from icl.runs import DONE, RunError, State, Status, is_child_rank
from icl.training.members import Member
from icl.training.progress import member_status
from icl.training.wandb_log import exit_code_of
from icl.validation import UserError


def record_outcome(member: Member, step: int, received: signal.Signals | None) -> None:
    """Say how a member has ended, once it has."""
    if member.is_running and step == member.config.trainer.max_steps:
        member.end("finished", step)
    elif member.is_running and received is not None:
        member.end("preempted", step, f"{received.name} at step {step}")
    if member.is_running or member.is_settled or is_child_rank():
        return
    if member.folder.path.is_dir():  # else it was removed, and is not made anew
        _require_checkpoints(member)
        _write_end(member, step)
    member.is_settled = True
    if member.wandb is not None:
        code = 128 + received if member.state == "preempted" and received else int(member.state == "failed")
        member.wandb.finish(code)


def _require_checkpoints(member: Member) -> None:
    """Let a member fail whose checkpoints have been removed while it was trained."""
    end = member_status(member, member.state, member.end_step or 0)
    if end.state in DONE:
        lost = missing_steps(member.folder, member.config, end.step, end)
        if not member.lacking.issuperset(lost):
            member.end("failed", end.step, describe_missing(member.folder, lost))


def _write_end(member: Member, step: int) -> None:
    last = member.folder.read_status() or member_status(member, "running", step)
    step = last.step if member.state == "failed" else member.end_step or 0
    status = replace(member_status(member, member.state, step), steps_per_second=last.steps_per_second)
    member.folder.write_status(status)
    member.folder.log(f"{status.state} at step {status.step} after {member.seconds:.1f} s. {status.reason or ''}")


@contextlib.contextmanager
def isolate_failure(member: Member, *, is_alone: bool) -> Iterator[None]:
    """Let a refusal in the body end this member and nobody else; of one that is alone, raise it.

    Its folder is told only if it is known to be this run's (`Member.is_own`): it may be another's, or in other hands.
    """
    try:
        yield
    except UserError as error:
        if is_alone:
            raise
        if member.is_own:
            _record_failure([member], error)
        member.end("failed", member.end_step or 0, str(error))
        member.is_settled = member.is_refused = True


@contextlib.contextmanager
def recording_failure(members: Sequence[Member]) -> Iterator[None]:
    """Say in every unfinished member's status and W&B run that it failed, where the disk still allows it."""
    try:
        yield
    except SystemExit as stop:  # Lightning's answer to a second Ctrl-C
        _record_failure(members, KeyboardInterrupt())
        raise KeyboardInterrupt from stop
    except BaseException as error:
        _record_failure(members, error)
        if isinstance(error, RuntimeError) and "memory" in str(error).lower():
            sizes = "`population`, `model`, `trainer.batch_size` or `evaluation.num_prompts`"
            raise RunError(f"The device has not enough memory for this; make {sizes} smaller.") from None
        raise


def _record_failure(members: Sequence[Member], error: BaseException) -> None:
    was_interrupted = isinstance(error, KeyboardInterrupt)
    state: State = "preempted" if was_interrupted else "failed"
    reason = "interrupted" if was_interrupted else (str(error) or type(error).__name__).splitlines()[0]
    for member in members:
        if member.is_settled:
            continue
        last = member.folder.read_status() or member_status(member, state, 0)
        if member.folder.path.is_dir():
            _write_failure(member, replace(last, state=state, reason=reason))
        if member.wandb is not None:
            member.wandb.finish(exit_code_of(error))


def _write_failure(member: Member, status: Status) -> None:
    """Replace the status, or write over it where there is no room for a second file; and log it, if that can be done."""
    try:
        member.folder.write_status(status)
    except OSError:
        with contextlib.suppress(OSError):
            member.folder.overwrite_status(status)
    with contextlib.suppress(OSError):
        member.folder.log(f"{status.state}: {status.reason}")
