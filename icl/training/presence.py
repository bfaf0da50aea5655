"""A run's files while it trains: what was removed is written again where that can be, and else ends the run.

A removed folder means that somebody wants the run gone, or lost it; nothing of ours may make it anew. Rows and settings are in
memory. Checkpoints of earlier steps are not: their loss is told when it is noticed, and the run does not end as finished.
"""

import sys
import time
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl

from icl.contents import describe_missing, missing_steps
from icl.training.members import Member

_SECONDS = 20.0
"""Between two looks at the checkpoints."""


class FilesGuard(pl.Callback):
    """Ends a member whose folder is gone, and nobody else."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = members
        self._told: set[Member] = set()
        self._looked_at = time.monotonic()

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        """Look before anything is written."""
        if not trainer.is_global_zero:
            return
        self.check(trainer.global_step)
        if time.monotonic() - self._looked_at > _SECONDS:
            self._looked_at = time.monotonic()
            for member in self.members:
                if member.is_running and member not in self._told:
                    self._tell_lost(member, trainer.global_step)

    def check(self, step: int) -> None:
        """Look at the folders of those that are not yet past their end."""
        for member in self.members:
            if member.is_running:
                self._check(member, step)

    def _check(self, member: Member, step: int) -> None:
        if member.folder.config_file.exists():
            return
        if member.folder.metrics_file.exists():
            member.folder.write_config(member.config)
            return
        member.end(
            "failed",
            step,
            f"The folder {member.folder.path} was moved or removed while the run was trained, so it ended at step {step:,}; "
            "put the folder back to resume it, or run the same command to begin anew.",
        )

    def _tell_lost(self, member: Member, step: int) -> None:
        """Say at once that checkpoints are gone: a person may be able to put them back before the run ends."""
        lost = [one for one in missing_steps(member.folder, member.config, step - 1) if one not in member.lacking]
        if lost:
            self._told.add(member)
            sentence = describe_missing(member.folder, lost)
            print(f"icl: {sentence}", file=sys.stderr)
            member.folder.log(sentence)
