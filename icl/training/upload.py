"""The copy of a run in a second store, made behind training: the step never waits for the network.

One thread looks at the run's folder every few seconds and sends what is new: checkpoints at once, `last.ckpt` with the
files beside it whenever there is a newer one (only the newest matters). `last.ckpt` and `status.json` vouch for the
other files: they are read first and sent last, and only if all the others arrived, so the copy can always be resumed.
A file that cannot be sent is tried again in every round. What is left in the end is sent then, as long as something moves.
What cannot be sent is an error; training has then ended as it would have without a store, and everything is in the folder.
"""

import contextlib
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

from tqdm import tqdm

from icl import waiting
from icl.checkpoints import checkpoint_name
from icl.config import RunConfig
from icl.delivery import UploadError, describe_left, is_delivered, note_delivered
from icl.mirror import (
    CHECKPOINT_FOLDERS,
    VOUCHERS,
    Mirror,
    copied_names,
    is_checkpoint,
    open_mirror,
    read_config,
    require_whole,
    same_file,
    saved_step,
    store_url,
    take_up,
)
from icl.presets import run_name
from icl.progress import progress_bar
from icl.runs import DONE, RunFolder
from icl.schedules import checkpoint_steps
from icl.signals import handling
from icl.storage import LocalStore, MissingKeyError, StorageError, sha256
from icl.validation import UserError

SECONDS = 2.0
"""Between two looks at the folder."""
MAX_FAILURES = 2
"""Files in a row that cannot be sent until a round is given up: the store is gone, for now."""
PATIENCE = 30.0
"""Seconds without a file sent after which, in the end, the rest is given up if the store answers with errors."""
STOPPED_SECONDS = 20.0
"""From the end of a training that a signal stopped; whoever sent it will not wait for longer."""

Signature = tuple[int, int, int]


class _File(NamedTuple):
    """A file of the run's folder at one moment."""

    name: str
    signature: Signature | None
    data: bytes


@contextlib.contextmanager
def upload_behind(config: RunConfig, run: RunFolder) -> Iterator[None]:
    """Keep a copy of the run in its store, if it has one, while the body trains it.

    Raises:
        StorageError: Before the body, if the store cannot be used.
        RunError: Before the body, if another run has this one's place in the store.
        UploadError: After the body, if a file could not be sent. An error of the body itself goes first.
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
    """Sends a run's files to its store from a thread of its own.

    Args:
        mirror: The run and its place in the store.
        config: The run's settings.
        seconds: Between two looks at the folder.
    """

    def __init__(self, mirror: Mirror, config: RunConfig, *, seconds: float = SECONDS) -> None:
        self.mirror, self.config, self.seconds = mirror, config, seconds
        grid = config.checkpoints
        steps = checkpoint_steps(
            config.trainer.max_steps, every=grid.every, num_log=grid.num_log, num_linear=grid.num_linear
        )
        self.scheduled = frozenset(
            f"{folder}/{checkpoint_name(step)}" for folder in CHECKPOINT_FOLDERS for step in steps
        )
        self.reason = ""
        self._here = LocalStore(mirror.run.path)
        self._there: set[str] | None = None
        self._sent: dict[str, Signature | None] = {}
        self._stop = threading.Event()
        self._is_given_up = threading.Event()
        self._thread = threading.Thread(target=self._work, name="icl-upload", daemon=True)

    def start(self) -> None:
        """Begin to look and send."""
        self._thread.start()

    def abandon(self) -> None:
        """Send nothing more, and do not wait for what is on its way; this process may live on and train again."""
        self._is_given_up.set()
        self._stop.set()

    def finish(self, *, idle_seconds: float | None = None, seconds: float = math.inf) -> None:
        """Send all that is left, with progress, until a signal comes or it takes too long.

        Args:
            idle_seconds: Without progress after which the rest is given up; left out, `waiting.SECONDS`.
            seconds: After which it is given up in any case.

        Raises:
            UploadError: If something could not be sent.
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
        small = [name for name in copied_names(self._here) if not is_checkpoint(name) and name != "last.ckpt"]
        note_delivered(self.mirror.run, self.config, small)
        print(f"Uploaded to {self.mirror.there}.")

    def _work(self) -> None:
        pause = self.seconds
        with waiting.silence():
            while not self._stop.wait(pause):
                pause = self.seconds if self._round() else 10 * self.seconds

    def _send_rest(self) -> None:
        """Wait for the file in hand, and send the others."""
        self._thread.join()
        names = self._changed()
        if names:
            with waiting.silence(), progress_bar(f"uploading to {self.mirror.there}", len(names), "file") as bar:
                self._send_all(bar)

    def _send_all(self, bar: tqdm) -> None:
        """Try until all is sent, or nothing could be for a while."""
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
        """Send what is new; whether all of it was sent.

        The vouchers are sent as they were before the others were looked at. With a bar, every last file is sent.
        """
        if not self.mirror.run.config_file.exists():
            return True  # the folder was removed; what the store has stays there
        is_whole = bar is not None or "last.ckpt" in self._changed()
        vouchers = [self._take(name) for name in VOUCHERS if is_whole and name in self._changed()]
        others = [name for name in self._changed() if is_checkpoint(name) or (is_whole and name not in VOUCHERS)]
        num_failures = num_in_a_row = 0
        if not self._reach():
            return False
        for name in others:
            if num_in_a_row == MAX_FAILURES or self._is_over(bar):
                return False  # the store is gone for now, or `finish` sends the rest
            num_in_a_row = 0 if self._send(self._take(name), bar) else num_in_a_row + 1
            num_failures += num_in_a_row > 0
        return num_failures == 0 and all(self._send(voucher, bar) for voucher in vouchers)

    def _is_over(self, bar: tqdm | None) -> bool:
        """Whether to leave the other files: `finish` sends them, or has given them up."""
        return self._is_given_up.is_set() or (self._stop.is_set() and bar is None)

    def _reach(self) -> bool:
        """Learn what the store has, and remove the best checkpoints that better ones replaced; False if it is gone."""
        try:
            if self._there is None:
                self._there = set(self.mirror.there.keys())
            mine = {*self.scheduled, *self._here.keys("checkpoints"), *self._best()}
            for name in [name for name in self._there if is_checkpoint(name) and name not in mine]:
                self.mirror.there.delete(name)
                self._there.remove(name)
        except StorageError as error:
            self.reason = str(error)
            return False
        return True

    def _best(self) -> list[str]:
        """The names of the best checkpoint, which stays in the store if it is lost here."""
        status = self.mirror.run.read_status()
        step = status.best_step if status is not None else None
        return [] if step is None else [f"{folder}/{checkpoint_name(step)}" for folder in CHECKPOINT_FOLDERS]

    def _take(self, name: str) -> _File | None:
        """A file as it is now, or None if it is gone."""
        signature = self._signature(name)  # first: what is written after it differs from it
        try:
            return _File(name, signature, self._here.read(name))
        except MissingKeyError:
            return None

    def _send(self, file: _File | None, bar: tqdm | None) -> bool:
        """Whether the store now has this file, or must not have it: one that is damaged here never replaces a good copy."""
        if file is None or self._there is None:
            return True
        try:
            require_whole(file.name, file.data, f"{self._here}/{file.name}")
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
        """The files that are not in the store as they are here."""
        return [name for name in copied_names(self._here) if self._sent.get(name) != self._signature(name)]

    def _signature(self, name: str) -> Signature | None:
        """What differs when a file has been written again."""
        try:
            about = (self.mirror.run.path / name).stat()
        except FileNotFoundError:
            return None
        return about.st_mtime_ns, about.st_size, about.st_ino


def _is_complete(mirror: Mirror) -> bool:
    """Whether the run has ended and the store has all of it: the status goes last, or `config.yaml` with `push`."""
    status = mirror.run.read_status()
    is_done = status is not None and status.state in DONE and same_file(mirror.here, mirror.there, "status.json")
    return is_done and read_config(mirror.there) is not None


def _finish(uploader: Uploader) -> None:
    """After a training that ended, send what is left; one that a signal stopped has little time for it."""
    status = uploader.mirror.run.read_status()
    if status is None or status.state != "preempted":
        uploader.finish()
        return
    try:
        uploader.finish(seconds=max(2.0, status.updated + STOPPED_SECONDS - time.time()))
    except UploadError as error:
        word = (status.reason or "").partition(" ")[0]
        error.exit_status = 128 + signal.Signals[word] if word in signal.Signals.__members__ else error.exit_status
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
    """After a training that failed, send what there is; one that was interrupted twice does not wait for it."""
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        uploader.abandon()
        return
    is_gone = isinstance(error, UploadError)  # another run of this training has just waited for its store in vain
    try:
        uploader.finish(idle_seconds=2.0 if is_gone else None)
    except UploadError as problem:
        print(f"icl: {problem}", file=sys.stderr)
