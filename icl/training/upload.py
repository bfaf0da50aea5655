"""Copy a run to a second store in the background, so that training never waits for the network.

A thread checks the run's folder every few seconds and sends new files. Checkpoints are sent at once. `last.ckpt` and the files
beside it are sent when there is a newer `last.ckpt`; only the newest matters. `last.ckpt` and `status.json` vouch for the other
files: they are read first, and sent last if all others have arrived. So the copy can always be resumed.

A file that cannot be sent is tried again in every round. At the end of training the remaining files are sent, as long as there is
progress. Files that cannot be sent are an error. Training has then ended as it would have without a store, and all files are in
the folder.
"""

import contextlib
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tqdm import tqdm

from icl.config import RunConfig
from icl.config.validation import UserError
from icl.files.writing import StorageError
from icl.presets import run_name
from icl.progress import progress_bar
from icl.runs.checkpoints import checkpoint_name
from icl.runs.contents import expected_steps
from icl.runs.copied_files import CHECKPOINT_FOLDERS, VOUCHERS, copied_names, is_checkpoint, require_whole
from icl.runs.delivery import UploadError, describe_left, is_delivered, note_delivered
from icl.runs.folder import RunFolder
from icl.runs.mirror import Mirror, open_mirror, read_config, same_file, saved_step, store_url, take_up
from icl.signals import handling
from icl.store import waiting
from icl.store.base import MissingKeyError, sha256

SECONDS = 2.0
"""Seconds between two checks of the folder."""
MAX_FAILURES = 2
"""Number of consecutive files that cannot be sent after which a round ends; the store cannot be reached at present."""
PATIENCE = 30.0
"""Seconds without a sent file after which, at the end of training, we give up if the store answers with errors."""
STOPPED_SECONDS = 20.0
"""Seconds for the upload after a signal stopped training. Programs that send such signals do not wait longer."""

Signature = tuple[int, int, int]


class _File(NamedTuple):
    """Content of a file of the run's folder at one moment."""

    name: str
    signature: Signature | None
    data: bytes


@contextlib.contextmanager
def upload_behind(config: RunConfig, run: RunFolder) -> Iterator[None]:
    """Keep a copy of the run in its store, if it has one, while the body trains it.

    Raises:
        StorageError: Before the body, if the store cannot be used.
        RunError: Before the body, if another run uses this run's name in the store.
        UploadError: After the body, if a file could not be sent. An error of the body takes precedence.
    """
    url = store_url(config)
    if url is None or is_delivered(run, config):
        yield
        return
    mirror = open_mirror(run, url, run_name(config))
    if take_up(mirror, config):
        print(f"Fetched step {max(0, saved_step(mirror.here)):,} of the run from {mirror.there}.")
    if _is_complete(mirror):
        note_delivered(run, config, ["status.json"])
        yield
        return
    uploader = Uploader(mirror, config)
    uploader.start()
    try:
        yield
    except BaseException as error:
        _finish_failed(uploader, error)
        raise
    _finish(uploader)


class Uploader:
    """Send a run's files to its store from a thread of its own.

    Args:
        mirror: The run and its copy in the store.
        config: Settings of the run.
        seconds: Seconds between two checks of the folder.
    """

    def __init__(self, mirror: Mirror, config: RunConfig, *, seconds: float = SECONDS) -> None:
        self.mirror, self.config, self.seconds = mirror, config, seconds
        self.scheduled = _checkpoint_files(expected_steps(config, config.trainer.max_steps))
        self.reason = ""
        self._there: set[str] | None = None
        self._sent: dict[str, Signature | None] = {}
        self._stop = threading.Event()
        self._is_given_up = threading.Event()
        self._thread = threading.Thread(target=self._work, name="icl-upload", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def abandon(self) -> None:
        """Send nothing more, and do not wait for the current file. The process may live on and train again."""
        self._is_given_up.set()
        self._stop.set()

    def finish(self, *, idle_seconds: float | None = None, seconds: float = math.inf) -> None:
        """Send all remaining files, with a progress bar, until a signal arrives or it takes too long.

        Args:
            idle_seconds: Seconds without progress after which to give up; None uses `waiting.SECONDS`.
            seconds: Seconds after which to give up in any case.

        Raises:
            UploadError: If a file could not be sent.
        """
        self._stop.set()
        if not self.mirror.run.config_file.exists():
            return  # the folder was removed
        names, give_up_at = self._changed(), time.monotonic() + seconds
        if names:
            print(f"Uploading the last {len(names):,} files to {self.mirror.there} ...", flush=True)
        with _listening() as received:
            try:
                waiting.await_result(
                    self._send_rest,
                    seconds=min(seconds, waiting.SECONDS if idle_seconds is None else idle_seconds),
                    awaited=str(self.mirror.there),
                    is_stopped=lambda: bool(received) or time.monotonic() >= give_up_at,
                )
            except waiting.StalledError:
                self._is_given_up.set()
                self.reason = f"stopped by {received[0].name}" if received else "the store did not answer in time"
        left = self._changed()
        if left:
            self.mirror.run.log(f"not uploaded to {self.mirror.there}: {', '.join(left)}. {self.reason}")
            error = UploadError(describe_left(self.mirror.run, self.mirror.url, left, self.reason))
            error.exit_status = 128 + received[0] if received else error.exit_status
            raise error
        small = [name for name in copied_names(self.mirror.here) if not is_checkpoint(name) and name != "last.ckpt"]
        note_delivered(self.mirror.run, self.config, small)
        print(f"Uploaded to {self.mirror.there}.")

    def _work(self) -> None:
        pause = self.seconds
        with waiting.silence():
            while not self._stop.wait(pause):
                pause = self.seconds if self._round() else 10 * self.seconds

    def _send_rest(self) -> None:
        """Wait for the file that is being sent, and send the others."""
        self._thread.join()
        names = self._changed()
        if names:
            with waiting.silence(), progress_bar(f"uploading to {self.mirror.there}", len(names), "file") as bar:
                self._send_all(bar)

    def _send_all(self, bar: tqdm) -> None:
        """Try until all files are sent, or no file could be sent for `PATIENCE` seconds."""
        pause, give_up_at = 0.5, time.monotonic() + PATIENCE
        num_sent = bar.n
        while not self._round(bar) and time.monotonic() + pause < give_up_at:
            if self._is_given_up.is_set():
                return
            print(f"icl: {self.reason} Trying again in {pause:g} s.", file=sys.stderr)
            self._is_given_up.wait(pause)
            pause *= 2
            if bar.n > num_sent:
                num_sent, pause, give_up_at = bar.n, 0.5, time.monotonic() + PATIENCE

    def _round(self, bar: tqdm | None = None) -> bool:
        """Send new files. Return whether all of them were sent.

        Vouchers are read before the other files, and sent after them. With a bar, this is the end of training: every remaining
        file is sent.
        """
        if not self.mirror.run.config_file.exists():
            return True  # the folder was removed; its copy in the store remains
        is_whole = bar is not None or "last.ckpt" in self._changed()
        vouchers = [self._read(name) for name in VOUCHERS if is_whole and name in self._changed()]
        others = [name for name in self._changed() if is_checkpoint(name) or (is_whole and name not in VOUCHERS)]
        num_failures = num_in_a_row = 0
        if not self._tidy_store():
            return False
        for name in others:
            is_over = self._is_given_up.is_set() or (self._stop.is_set() and bar is None)
            if is_over or num_in_a_row == MAX_FAILURES:
                return False  # `finish` sends the remaining files or has given up, or the store cannot be reached
            num_in_a_row = 0 if self._send(self._read(name), bar) else num_in_a_row + 1
            num_failures += num_in_a_row > 0
        return num_failures == 0 and all(self._send(voucher, bar) for voucher in vouchers)

    def _tidy_store(self) -> bool:
        """List the store's files and delete best checkpoints that were replaced. Return False if it cannot be reached."""
        try:
            if self._there is None:
                self._there = set(self.mirror.there.keys())
            status = self.mirror.run.read_status()
            best_step = None if status is None else status.best_step
            # The best checkpoint stays in the store even if it is lost here.
            best = _checkpoint_files([] if best_step is None else [best_step])
            wanted = {*self.scheduled, *self.mirror.here.keys("checkpoints"), *best}
            for name in [name for name in self._there if is_checkpoint(name) and name not in wanted]:
                self.mirror.there.delete(name)
                self._there.remove(name)
        except StorageError as error:
            self.reason = str(error)
            return False
        return True

    def _read(self, name: str) -> _File | None:
        """Read a file as it is now; None if it does not exist."""
        signature = self._signature(name)  # taken first, so that a later write is noticed as a change
        try:
            return _File(name, signature, self.mirror.here.read(name))
        except MissingKeyError:
            return None

    def _send(self, file: _File | None, bar: tqdm | None) -> bool:
        """Send a file unless the store has it. Return False if the store failed.

        A file that is damaged here is not sent, so that it never replaces an intact copy.
        """
        if file is None or self._there is None:
            return True
        try:
            require_whole(file.name, file.data, f"{self.mirror.here}/{file.name}")
        except UserError as error:
            self.reason = str(error)
            return True
        try:
            is_there = file.name in self._there and self.mirror.there.digest(file.name) == sha256(file.data)
            if not is_there:
                self.mirror.there.write(file.name, file.data)
        except StorageError as error:
            self.reason = str(error)
            return False
        waiting.moved()
        self._there.add(file.name)
        self._sent[file.name] = file.signature
        if bar is not None:
            bar.update()
        return True

    def _changed(self) -> list[str]:
        """Return the names of files that have changed since they were sent."""
        return [name for name in copied_names(self.mirror.here) if self._sent.get(name) != self._signature(name)]

    def _signature(self, name: str) -> Signature | None:
        """Return modification time, size and inode of a file, which change when it is written again."""
        try:
            stat = (self.mirror.run.path / name).stat()
        except FileNotFoundError:
            return None
        return stat.st_mtime_ns, stat.st_size, stat.st_ino


def _checkpoint_files(steps: Sequence[int]) -> list[str]:
    """Return the names of checkpoints and moments at these steps."""
    return [f"{folder}/{checkpoint_name(step)}" for folder in CHECKPOINT_FOLDERS for step in steps]


def _is_complete(mirror: Mirror) -> bool:
    """Return whether the run has ended and the store has all its files.

    The last file to be sent is the status, or `config.yaml` with `push`, so it is enough to check these two.
    """
    status = mirror.run.read_status()
    is_done = status is not None and status.is_done and same_file(mirror.here, mirror.there, "status.json")
    return is_done and read_config(mirror.there) is not None


def _finish(uploader: Uploader) -> None:
    """Send the remaining files after training has ended. After a signal there is little time for it."""
    status = uploader.mirror.run.read_status()
    if status is None or status.state != "preempted":
        uploader.finish()
        return
    try:
        uploader.finish(seconds=max(2.0, status.updated + STOPPED_SECONDS - time.time()))
    except UploadError as error:
        name = (status.reason or "").partition(" ")[0]  # "SIGTERM at step 40"
        error.exit_status = 128 + signal.Signals[name] if name in signal.Signals.__members__ else error.exit_status
        raise


@contextlib.contextmanager
def _listening() -> Iterator[list[signal.Signals]]:
    """Collect the signals that ask the program to end."""
    received: list[signal.Signals] = []

    def receive(number: int, frame: object) -> None:
        received.append(signal.Signals(number))

    with handling({signal.SIGINT: receive, signal.SIGTERM: receive}):
        yield received


def _finish_failed(uploader: Uploader, error: BaseException) -> None:
    """Send the remaining files after training has failed. After a second interrupt, send nothing more."""
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        uploader.abandon()
        return
    # After an UploadError, another run of the population has just waited for its store in vain.
    try:
        uploader.finish(idle_seconds=2.0 if isinstance(error, UploadError) else None)
    except UploadError as problem:
        print(f"icl: {problem}", file=sys.stderr)
