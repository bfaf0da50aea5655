"""Save checkpoints for analysis, and the files from which runs resume.

Each member's `last.ckpt` (`icl.runs.resume_file`) is a Lightning checkpoint of that member alone. It contains the member's slice of
the stacked parameters and of Adam's moments. So a member of a population can be resumed alone, and runs at the same step can be
joined into a population.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from icl.config import EarlyStoppingConfig
from icl.config.validation import UserError, is_count
from icl.files.reading import ContentError, read_bytes
from icl.files.system import sync_file, sync_folder
from icl.files.writing import StorageError, repair, temporary_path, write_atomically
from icl.model.stacked import Params, unstack
from icl.runs.checkpoints import MOMENTS, checkpoint_name, save_checkpoint
from icl.runs.contents import expected_steps
from icl.runs.folder import RunFolder, is_child_rank, require_same_config
from icl.runs.resume_file import MAX_FILE, pack, parse_resume, read_resume, unpack
from icl.training.callbacks import MetricsLog, NonFiniteGuard, any_rank
from icl.training.members import Member
from icl.training.module import PopulationModule
from icl.training.presence import FilesGuard


class ScheduledCheckpoints(pl.Callback):
    """Save the weights at the scheduled steps, at a member's last step and, with early stopping, at its best step."""

    def __init__(
        self, members: Sequence[Member], steps: Sequence[int], guard: NonFiniteGuard, stopping: EarlyStoppingConfig
    ) -> None:
        self.members, self.steps, self.guard, self.stopping = members, frozenset(steps), guard, stopping

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Save the initial model."""
        if trainer.global_step == 0:
            self._save(trainer, module, self.members)

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        """Save if a checkpoint is scheduled for this step, or if it is a member's last or best step."""
        step = trainer.global_step
        due = [member for member in self.members if step in self.steps or member.is_last(step)]
        best = [
            member
            for member in self.members
            if self.stopping.patience is not None and member.best_step == step and member not in due
        ]
        if due or best:
            self._save(trainer, module, [*due, *best])
        for member in self.members:
            if member in best or (member in due and member.best_step == step):
                # `ResumeFiles` deletes the checkpoint of the previous best step.
                member.extra_step = step if member in best else None

    def _save(self, trainer: pl.Trainer, module: PopulationModule, members: Sequence[Member]) -> None:
        self.guard.check(module)
        if not trainer.is_global_zero:
            return
        step, weights = trainer.global_step, unstack(module.params)
        moments = unstack(_moments(module)) if module.config.checkpoints.moments else None
        for index, member in enumerate(self.members):
            if member in members and member.records(step):
                if moments is not None:  # the moments are saved first, so that no weights exist without their moments
                    save_checkpoint(member.folder.moments, step, member.config, moments[index])
                save_checkpoint(member.folder.checkpoints, step, member.config, weights[index])


class ResumeFiles(pl.Callback):
    """Save every member's `last.ckpt` about every `seconds` seconds, and at the member's last step.

    An extra checkpoint is one that was saved only because its step was a member's best so far. Early stopping makes such checkpoints, and
    `last.ckpt` names the present one. When a later step becomes the best, this callback deletes the old extra checkpoint. But a checkpoint
    that `last.ckpt` names is kept until a new `last.ckpt` has been saved. So a killed run never resumes without its best checkpoint.
    """

    def __init__(
        self,
        members: Sequence[Member],
        metrics_log: MetricsLog,
        guard: NonFiniteGuard,
        files: FilesGuard,
        *,
        seconds: float = 20.0,
    ) -> None:
        self.members, self.metrics_log, self.seconds = members, metrics_log, seconds
        self.guard, self.files = guard, files
        self._saved_at = time.monotonic()
        self._extra_steps: dict[Member, int | None] = {}
        """Value of each member's `extra_step` at the end of the previous training step."""
        self._saved_extra_steps: dict[Member, int | None] = {}
        """Value of `extra_step` in each member's `last.ckpt`."""

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Record which extra checkpoint each member's `last.ckpt` names."""
        self._extra_steps = {member: member.extra_step for member in self.members}
        self._saved_extra_steps = dict(self._extra_steps)

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        """Save if the last save was more than `seconds` seconds ago, or if training stops for one or all members."""
        step = trainer.global_step
        self._note_extras(trainer)
        is_last = trainer.should_stop or step == trainer.max_steps or any(m.end_step == step for m in self.members)
        if is_last or any_rank(trainer, time.monotonic() - self._saved_at > self.seconds):
            self.guard.check(module)
            if trainer.is_global_zero:
                self.files.check(step)
                for member, file in zip(self.members, self.metrics_log.files, strict=True):
                    if member.records(step):
                        file.sync()
                        member.rows = file.digest()
            trainer.save_checkpoint("last.ckpt")  # `MemberFiles` writes a `last.ckpt` in each member's folder
            self._saved_at = time.monotonic()
            self._note_saved(trainer)

    def _note_extras(self, trainer: pl.Trainer) -> None:
        """Delete the extra checkpoints that were replaced at this step, except those that `last.ckpt` names."""
        for member, old in self._extra_steps.items():
            if old != member.extra_step:
                self._extra_steps[member] = member.extra_step
                if old != self._saved_extra_steps[member] and trainer.is_global_zero:
                    _delete_checkpoint(member, old)

    def _note_saved(self, trainer: pl.Trainer) -> None:
        """Delete the extra checkpoints that the previous `last.ckpt` named, and that the new one does not name."""
        for member, old in self._saved_extra_steps.items():
            if old != member.extra_step and member.records(trainer.global_step):
                self._saved_extra_steps[member] = member.extra_step
                if trainer.is_global_zero:
                    _delete_checkpoint(member, old)


class MemberFiles(CheckpointIO):
    """Write Lightning's checkpoint of a population as one file per member, and join these files when training resumes."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = members

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write the files of the members that are still training.

        Raises:
            StorageError: If a file cannot be written.
        """
        population = move_data_to_device(checkpoint, torch.device("cpu"))
        indices = [index for index, member in enumerate(self.members) if member.records(population["global_step"])]
        runs = [self.members[index].folder for index in indices]
        _replace_all(runs, (_select_member(population, index) for index in indices))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        """Return the checkpoint of the population, joined from the members' files. All files must contain the same step."""
        files = [member.folder.resume_file for member in self.members]
        return _join([unpack(file.read_bytes(), str(file)) for file in files])

    def remove_checkpoint(self, path: Any) -> None:
        """Do nothing, because Lightning itself has written no file."""


def read_resume_file(member: Member) -> int:
    """Restore a member's state from its resume file. Return the step from which the member continues, or 0 if there is no file.

    If `last.ckpt` is damaged or missing, the previous save is used, and a message about this is added to `member.notes`.

    Raises:
        ConfigError: If the file belongs to a run with other settings.
        ResumeFileError: If no resume file is intact.
    """
    run = member.folder
    resume, note = read_resume(run)
    if resume is None:
        return 0
    require_same_config(resume.config, member.config, run)
    member.load_state_dict(resume.member)
    if note is not None and not is_child_rank():
        member.notes.append(note)
        write_atomically(run.resume_file, resume.data)
    return resume.step


def delete_former_best(member: Member) -> None:
    """Delete the extra checkpoint that `previous.ckpt` names, unless the member still needs this checkpoint.

    Training itself deletes such checkpoints after every save. But if it is killed after a save and before the deletion, the checkpoint
    stays in the folder.
    """
    if member.config.early_stopping.patience is None:
        return
    try:
        previous = parse_resume(read_bytes(member.folder.previous_file, limit=MAX_FILE), "")
    except (OSError, UserError, ContentError):  # there is no such file, or `verify` reports that it is damaged
        return
    former, config = previous.member.get("extra_step"), member.config
    kept = {member.extra_step, member.best_step, *expected_steps(config, config.trainer.max_steps)}
    if is_count(former) and former not in kept:
        _delete_checkpoint(member, former)


def _delete_checkpoint(member: Member, step: int | None) -> None:
    """Delete a member's checkpoint of a step, with its moments. Do nothing if the step is None."""
    if step is not None:
        member.folder.checkpoints.delete(checkpoint_name(step))
        member.folder.moments.delete(checkpoint_name(step))


def _moments(module: PopulationModule) -> Params:
    """Return Adam's moments, with names such as `exp_avg/blocks.0.attention.qkv.weight`."""
    return {
        f"{kind}/{name}": tensor
        for kind in MOMENTS
        for name, tensor in module.layout.to_params(getattr(module, kind)).items()
    }


def _select_member(checkpoint: dict[str, Any], index: int) -> dict[str, Any]:
    """Return one member's part of a population's checkpoint."""
    part = _map_stacked(lambda tensors: tensors[0][index : index + 1].clone(), [checkpoint])
    return part | {name: [checkpoint[name][index]] for name in ("configs", "members")}


def _join(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the checkpoint of a population, joined from checkpoints of its members at the same step."""
    return _map_stacked(lambda tensors: torch.cat(list(tensors)), parts) | {
        name: [part[name][0] for part in parts] for name in ("configs", "members")
    }


def _map_stacked(function: Callable[[Sequence[Tensor]], Tensor], trees: Sequence[Any]) -> Any:
    """Combine trees of the same structure: apply `function` to the stacked tensors at each position, and copy the rest from the first tree.

    A stacked tensor is a tensor with at least one axis. Its first axis is that of the members. The parameters, Adam's moments and the
    module's records are such tensors.
    """
    if isinstance(trees[0], dict):
        return {key: _map_stacked(function, [tree[key] for tree in trees]) for key in trees[0]}
    if isinstance(trees[0], list):
        return [_map_stacked(function, parts) for parts in zip(*trees, strict=True)]
    return function(trees) if isinstance(trees[0], Tensor) and trees[0].ndim > 0 else trees[0]


def _replace_all(runs: Sequence[RunFolder], contents: Iterable[dict[str, Any]]) -> None:
    """Write every run's `last.ckpt`, and keep the previous `last.ckpt` as `previous.ckpt`.

    The contents are built one after the other, to save memory. All new files are on the disk before the first old file is replaced. So if
    the process is killed, every run still has an intact resume file.

    Raises:
        StorageError: If a file cannot be written.
    """
    written = {run: temporary_path(run.resume_file) for run in runs}
    try:
        for (run, temporary), content in zip(written.items(), contents, strict=True):
            with temporary.open("wb") as file:
                file.write(pack(content))
                file.flush()
                sync_file(file.fileno(), run.path)
        for run, temporary in written.items():
            if run.resume_file.exists():
                run.resume_file.replace(run.previous_file)
            temporary.replace(run.resume_file)
            sync_folder(run.path)
    except OSError as error:
        raise StorageError(
            f"Cannot write {error.filename or runs[0].resume_file}: {error.strerror or error}. Earlier saves are "
            f"intact; {repair(error)}, then run the same command again."
        ) from None
    finally:
        for temporary in written.values():
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
