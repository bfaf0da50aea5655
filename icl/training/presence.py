"""Check that a run's files still exist while it trains.

Somebody may remove the folder of a run, intentionally or by accident. We must never create the folder again, so the run ends. The
settings and the rows of metrics are also in memory, so their files are written again if they were removed. Checkpoints of earlier
steps cannot be restored. If such checkpoints are missing, we report this as soon as we notice it, and training continues. If they are
still missing when training ends, the run counts as failed.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from icl.runs.contents import describe_missing, missing_steps
from icl.runs.status import WAS_REMOVED
from icl.training.callbacks import any_rank
from icl.training.members import Member

_SECONDS = 20.0
"""Seconds between two checks for missing checkpoints."""


class FilesGuard(pl.Callback):
    """End a member whose folder was removed. The other members continue."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = members
        self._reported: set[Member] = set()
        self._checked_at = time.monotonic()
        self._has_news = False
        """Whether a member has ended and the other processes have not been told yet."""

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        """Check the files before anything is written. Only rank 0 checks. It tells the other processes which members have ended."""
        if trainer.is_global_zero:
            self._check_all(trainer)
        if any_rank(trainer, self._has_news):
            ends = [(member.state, member.end_step, member.reason) for member in self.members]
            for member, (state, step, reason) in zip(self.members, trainer.strategy.broadcast(ends), strict=True):
                if member.is_running and state != "running":
                    member.end(state, step or 0, reason)
        self._has_news = False

    def _check_all(self, trainer: pl.Trainer) -> None:
        """Check the folders, and once in `_SECONDS` seconds the checkpoints of all members."""
        self.check(trainer.global_step)
        if time.monotonic() - self._checked_at > _SECONDS:
            self._checked_at = time.monotonic()
            for member in self.members:
                if member.is_running and member not in self._reported:
                    self._report_lost(member, trainer.global_step)

    def check(self, step: int) -> None:
        """Check the folders of the members that are still training."""
        for member in self.members:
            folder = member.folder
            if not member.is_running or _may_exist(folder.config_file):
                continue
            if _may_exist(folder.metrics_file):
                folder.write_config(member.config)
                continue
            reason = (
                f"The folder {folder.path} {WAS_REMOVED}, so the run ended at step {step:,}. "
                "Put the folder back to resume the run, or run the same command to start a new run."
            )
            member.end("failed", step, reason)
            self._has_news = True

    def _report_lost(self, member: Member, step: int) -> None:
        """Report missing checkpoints at once, so that they can be put back before the run ends."""
        missing = missing_steps(member.folder, member.config, step - 1)
        lost = [missing_step for missing_step in missing if missing_step not in member.lacking]
        if lost:
            self._reported.add(member)
            sentence = describe_missing(member.folder, lost)
            print(f"icl: {sentence}", file=sys.stderr)
            member.folder.log(sentence)


def _may_exist(path: Path) -> bool:
    """Return whether a file exists. Return True also if the file system cannot tell, for example because of a stale file handle."""
    try:
        return path.exists()
    except OSError:
        return True
