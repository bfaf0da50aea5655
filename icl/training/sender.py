"""Send new files of a run's folder to its store, in such an order that the run can be resumed from the store at any time.

Checkpoints are sent at once. The other files are sent when there is a newer `last.ckpt`, because only their newest versions matter.
We call `last.ckpt` and `status.json` vouchers, because each of them says up to which step the other files in the store are complete. So
the vouchers are read before the other files, and sent only after all other files have arrived. `status.json` is read before `last.ckpt`,
so that the status in the store never says that a run has ended while `last.ckpt` in the store is from an earlier step.

With early stopping, `last.ckpt` names the best checkpoint. The store has this checkpoint before it has `last.ckpt`. Earlier best checkpoints
are deleted from the store only after a `last.ckpt` that no longer names them has arrived.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from tqdm import tqdm

from icl.config import RunConfig
from icl.config.validation import UserError
from icl.files.reading import first_line
from icl.files.writing import StorageError
from icl.runs.checkpoints import checkpoint_name
from icl.runs.contents import expected_steps
from icl.runs.copied_files import CHECKPOINT_FOLDERS, VOUCHERS, copied_names, is_checkpoint, require_whole
from icl.runs.mirror import Mirror
from icl.runs.resume_file import parse_resume
from icl.store import waiting
from icl.store.base import MissingKeyError, read_or_none, sha256

MAX_FAILURES = 2
"""A round of sending ends after this number of consecutive failures, because the store probably cannot be reached at present."""

Signature = tuple[int, int, int]
_UNREADABLE: Signature = (-1, -1, -1)
"""Signature (see `_signature`) of a file about which the file system returns an error. No file that was sent has this signature, so the
next round tries the file again."""


class _File(NamedTuple):
    """Content of a file of the run's folder at one moment."""

    name: str
    signature: Signature | None
    data: bytes


class _Save(NamedTuple):
    """The vouchers at one moment, and the best checkpoint that `last.ckpt` names."""

    vouchers: list[_File]
    best: dict[str, _File]
    """Files of the best checkpoint that were not sent before, keyed by name."""
    named: list[str] | None
    """Names of all files of the best checkpoint; None if this is not known."""


class Sender:
    """Object that sends the files of a run's folder to the run's store.

    Args:
        mirror: The run and its copy in the store.
        config: Settings of the run.
    """

    def __init__(self, mirror: Mirror, config: RunConfig) -> None:
        self.mirror = mirror
        self.reason = ""
        """Reason why a file could not be sent. If several files failed, this is the reason for the last one."""
        self.digests: dict[str, str] = {}
        """SHA-256 of the content of each file in the store, keyed by the file's name."""
        self._scheduled = _checkpoint_files(expected_steps(config, config.trainer.max_steps))
        self._has_best = config.early_stopping.patience is not None
        self._num_folders = len(CHECKPOINT_FOLDERS) if config.checkpoints.moments else 1
        self._there: set[str] | None = None
        self._has_unread = False  # whether a file could not be read in this round
        self._sent: dict[str, Signature | None] = {}
        self._named: list[str] | None = None
        """Files of the best checkpoint that the store's `last.ckpt` names; None until this process has sent a voucher."""

    def changed(self) -> list[str]:
        """Return the names of the files that are new or have changed since they were sent."""
        return [name for name in copied_names(self.mirror.here) if self._sent.get(name) != self._signature(name)]

    def send(self, is_over: Callable[[], bool], bar: tqdm | None = None) -> bool:
        """Send new files, in one round.

        Return False if not all files could be read and sent. `reason` says why, unless `is_over` ended the round.

        If there is nothing to send, or if the files must wait because the store limits the number of writes, return True. The vouchers
        (`last.ckpt` and `status.json`) are read before the other files, and sent after them.

        Args:
            is_over: Function that is called before each file. If it returns True, no more files are sent.
            bar: Progress bar, given only at the end of training. All remaining files are then sent, whether or not `last.ckpt` is new.
        """
        try:
            return self._send_round(is_over, bar)
        except Exception as error:  # the sending thread must not end, because later rounds may succeed
            self.reason = _sentence(error)
            return False

    def _send_round(self, is_over: Callable[[], bool], bar: tqdm | None) -> bool:
        """Send new files once, as `send` describes."""
        if not self.mirror.run.config_file.exists():
            return True  # if the folder was removed, we do not change its copy in the store
        if bar is None and self.mirror.there.is_resting():
            return True  # the store limits the number of writes, so we send the files in a later round
        self._has_unread = False
        changed = self.changed()
        is_whole = bar is not None or "last.ckpt" in changed
        save = self._read_save(changed) if is_whole else _Save([], {}, None)
        others = [name for name in self.changed() if is_checkpoint(name) or (is_whole and name not in VOUCHERS)]
        others = list(dict.fromkeys([*save.best, *others]))
        if (others or save.vouchers) and not self._is_ready():
            return False
        vouchers, num_failures, num_in_a_row = save.vouchers, 0, 0
        size = self.mirror.there.files_per_write
        batches = [others[start : start + size] for start in range(0, len(others), size)]
        for number, names in enumerate(batches):
            if is_over() or num_in_a_row == MAX_FAILURES:
                return False
            files = [save.best.get(name) or self._read(name) for name in names]
            if size > 1 and num_failures == 0 and not self._has_unread and number == len(batches) - 1:
                # This store writes all files of a batch or none, so the vouchers can be in the last batch.
                files, vouchers = [*files, *vouchers], []
            num_in_a_row = 0 if self._send(files, bar) else num_in_a_row + 1
            num_failures += num_in_a_row > 0
        is_complete = num_failures == 0 and not self._has_unread
        if not is_complete or not all(self._send([voucher], bar) for voucher in vouchers):
            return False
        self._named = self._named if save.named is None else save.named
        return self._delete_obsolete()

    def _read_save(self, changed: Sequence[str]) -> _Save:
        """Read the vouchers that have changed. If the best checkpoint that `last.ckpt` names was not sent before, read it too.

        If training has deleted this checkpoint and replaced `last.ckpt` in the meantime, return an empty `_Save`. The vouchers are then
        sent in the next round.
        """
        read = {name: self._read(name) for name in reversed(VOUCHERS) if name in changed}
        last = read.get("last.ckpt")
        named = None if last is None else self._best_files(last)
        best: dict[str, _File] = {}
        for name in named or []:
            file = None if name in self._sent else self._read(name)
            if file is not None:
                best[name] = file
            elif name not in self._sent and last is not None and self._signature("last.ckpt") != last.signature:
                return _Save([], {}, None)
        return _Save([file for name in VOUCHERS if (file := read.get(name)) is not None], best, named)

    def _best_files(self, last: _File) -> list[str] | None:
        """Return the names of the files of the best checkpoint that `last.ckpt` names, or None if `last.ckpt` is damaged.

        The list contains only files that may be deleted later. A scheduled checkpoint is never deleted, so the list is empty if the best
        step is a scheduled step.
        """
        if not self._has_best:
            return []
        try:
            step = parse_resume(last.data, last.name).member.get("extra_step")
        except UserError:  # `_send` reports the damage
            return None
        return _checkpoint_files([step])[: self._num_folders] if isinstance(step, int) else []

    def _is_ready(self) -> bool:
        """List the store's files in the first round, and check that the copy still belongs to this run.

        Return False if the copy cannot be used.
        """
        try:
            self._there = set(self.mirror.there.keys()) if self._there is None else self._there
            owner = read_or_none(self.mirror.here, "run-id")
            if owner is not None and read_or_none(self.mirror.there, "run-id") != owner:
                raise StorageError(
                    f"{self.mirror.there} no longer contains the `run-id` of this run, so nothing more was sent to it. Perhaps the store was "
                    "unmounted, or the copy was removed."
                )
        except StorageError as error:
            self.reason = str(error)
            return False
        return True

    def _delete_obsolete(self) -> bool:
        """Delete former best checkpoints in the store. Return False if they could not be deleted.

        The checkpoint that the store's own `last.ckpt` names is not deleted. The best checkpoint stays in the store even if it is missing
        in the run's folder.
        """
        if self._named is None or self._there is None:
            return True
        status = self.mirror.run.read_status()
        best_step = None if status is None else status.best_step
        best = _checkpoint_files([] if best_step is None else [best_step])
        wanted = {*self._scheduled, *self._named, *best, *self.mirror.here.keys("checkpoints")}
        obsolete = [name for name in self._there if is_checkpoint(name) and name not in wanted]
        try:
            if obsolete:
                self.mirror.there.write_many({}, delete=obsolete)
        except StorageError as error:
            self.reason = str(error)
            return False
        self._there -= set(obsolete)
        return True

    def _read(self, name: str) -> _File | None:
        """Return the present content of a file; None if the file does not exist or cannot be read at present."""
        signature = self._signature(name)  # read before the content, so that a later write is noticed as a change
        try:
            return _File(name, signature, self.mirror.here.read(name))
        except MissingKeyError:
            return None
        except OSError as error:
            self.reason, self._has_unread = _sentence(error), True
            return None

    def _send(self, files: Sequence[_File | None], bar: tqdm | None) -> bool:
        """Send the files that the store does not have yet, in one write. Return False if the store failed.

        A damaged file in the run's folder is not sent, so that it never replaces an intact copy.
        """
        there = self._there
        if there is None:
            return True
        whole = [file for file in files if file is not None and self._is_whole(file)]
        try:
            new = {file.name: file.data for file in whole if not (file.name in there and self._is_same_there(file))}
            if new:
                self.mirror.there.write_many(new)
        except StorageError as error:
            self.reason = str(error)
            return False
        for file in whole:
            waiting.moved()
            there.add(file.name)
            self._sent[file.name], self.digests[file.name] = file.signature, sha256(file.data)
            if bar is not None:
                bar.update()
        return True

    def _is_same_there(self, file: _File) -> bool:
        """Return whether the store has this content of a file. Another program may have deleted the file in the store."""
        try:
            return self.mirror.there.digest(file.name) == sha256(file.data)
        except MissingKeyError:
            return False

    def _is_whole(self, file: _File) -> bool:
        """Return whether a file is undamaged. If it is damaged, store the reason in `self.reason`."""
        try:
            require_whole(file.name, file.data, f"{self.mirror.here}/{file.name}")
        except UserError as error:
            self.reason = str(error)
            return False
        return True

    def _signature(self, name: str) -> Signature | None:
        """Return modification time, size and inode of a file. These values change when the file is written again."""
        try:
            stat = (self.mirror.run.path / name).stat()
        except FileNotFoundError:
            return None
        except OSError:
            return _UNREADABLE
        return stat.st_mtime_ns, stat.st_size, stat.st_ino


def _sentence(error: Exception) -> str:
    """Return the message of an error as a sentence."""
    if isinstance(error, UserError):
        return str(error)
    return f"{type(error).__name__}: {first_line(error).rstrip('.')}."


def _checkpoint_files(steps: Sequence[int]) -> list[str]:
    """Return the names of the files with the weights and with Adam's moments at these steps."""
    return [f"{folder}/{checkpoint_name(step)}" for folder in CHECKPOINT_FOLDERS for step in steps]
