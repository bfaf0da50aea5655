"""Copy a run's folder to the run's store in the background, so that training never waits for the network.

A thread checks the run's folder every few seconds and sends new files (`icl.training.sender`). If a file cannot be sent, we try
again at the next check. At the end of training we send the remaining files. If no file could be sent for some time, we give up and raise
an error. Even then the run is complete, because all files are in its folder.
"""

import contextlib
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator

from tqdm import tqdm

from icl.config import RunConfig
from icl.progress import progress_bar
from icl.run_names import run_name
from icl.runs.copied_files import is_checkpoint
from icl.runs.delivery import UploadError, describe_left, is_delivered, note_delivered, note_digests
from icl.runs.folder import RunFolder
from icl.runs.mirror import Mirror, open_mirror, read_config, saved_step, store_url, take_up
from icl.runs.transfer import same_file
from icl.signals import handling
from icl.store import waiting
from icl.training.sender import Sender

SECONDS = 2.0
"""Seconds between two checks of the folder."""
PATIENCE = 30.0
"""At the end of training, we give up if the store answers with errors and accepts no file for this number of seconds."""
STOPPED_SECONDS = 20.0
"""Time limit in seconds for the upload after a signal stopped training. Programs that send such signals do not wait longer."""


@contextlib.contextmanager
def upload_behind(config: RunConfig, run: RunFolder) -> Iterator[None]:
    """Keep the copy in the run's store up to date while the body of the `with` statement trains the run.

    Do nothing if the run has no store, or if the run has ended and its copy is complete.

    Raises:
        StorageError: Before the body, if the store cannot be used.
        RunError: Before the body, if another run uses this run's name in the store.
        UploadError: After the body, if a file could not be sent. If the body raises an error, that error is raised instead.
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
    """Send a run's files to its store in a separate thread.

    Args:
        mirror: The run and its copy in the store.
        config: Settings of the run.
        seconds: Seconds between two checks of the folder.
    """

    def __init__(self, mirror: Mirror, config: RunConfig, *, seconds: float = SECONDS) -> None:
        self.mirror, self.config, self.seconds = mirror, config, seconds
        self.sender = Sender(mirror, config)
        self._stop = threading.Event()
        self._is_given_up = threading.Event()
        self._thread = threading.Thread(target=self._work, name="icl-upload", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def abandon(self) -> None:
        """Stop sending, without waiting for the current file. The thread then ends by itself, so the process can train again."""
        self._is_given_up.set()
        self._stop.set()

    def finish(self, *, idle_seconds: float | None = None, seconds: float = math.inf) -> None:
        """Send all remaining files, with a progress bar. Give up if a signal arrives or sending takes too long.

        Args:
            idle_seconds: Seconds without progress after which to give up; None uses `waiting.SECONDS`.
            seconds: Seconds after which to give up in any case.

        Raises:
            UploadError: If a file could not be sent.
        """
        self._stop.set()
        if not self.mirror.run.config_file.exists():
            return  # the folder was removed
        names, give_up_at = self.sender.changed(), time.monotonic() + seconds
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
                self.sender.reason = (
                    f"stopped by {received[0].name}" if received else "the store did not answer in time"
                )
        left = self.sender.changed()
        if left:
            self.mirror.run.log(f"not uploaded to {self.mirror.there}: {', '.join(left)}. {self.sender.reason}")
            error = UploadError(describe_left(self.mirror.run, self.mirror.url, left, self.sender.reason))
            error.exit_status = 128 + received[0] if received else error.exit_status
            raise error
        # The digests are those of the bytes that were sent. Another program may have rewritten a file since then.
        small = {
            name: digest
            for name, digest in self.sender.digests.items()
            if not is_checkpoint(name) and name != "last.ckpt"
        }
        note_digests(self.mirror.run, self.config, small)
        print(f"Uploaded to {self.mirror.there}.")

    def _work(self) -> None:
        pause = self.seconds
        with waiting.silence():
            while not self._stop.wait(pause):
                pause = self.seconds if self.sender.send(self._stop.is_set) else 10 * self.seconds

    def _send_rest(self) -> None:
        """Wait for the file that is being sent, then send all remaining files."""
        self._thread.join()
        names = self.sender.changed()
        if names:
            with waiting.silence(), progress_bar(f"uploading to {self.mirror.there}", len(names), "file") as bar:
                self._send_all(bar)

    def _send_all(self, bar: tqdm) -> None:
        """Try to send all files, until all are sent or no file could be sent for `PATIENCE` seconds."""
        pause, give_up_at = 0.5, time.monotonic() + PATIENCE
        num_sent = bar.n
        while not self.sender.send(self._is_given_up.is_set, bar) and time.monotonic() + pause < give_up_at:
            if self._is_given_up.is_set():
                return
            print(f"icl: {self.sender.reason} Trying again in {pause:g} s.", file=sys.stderr)
            self._is_given_up.wait(pause)
            pause *= 2
            if bar.n > num_sent:
                num_sent, pause, give_up_at = bar.n, 0.5, time.monotonic() + PATIENCE


def _is_complete(mirror: Mirror) -> bool:
    """Return whether the run has ended and all of its files are in the store.

    Training sends the status last, and `icl checkpoints RUN push` sends `config.yaml` last. So it is enough to check these two files.
    """
    status = mirror.run.read_status()
    is_done = status is not None and status.is_done and same_file(mirror.here, mirror.there, "status.json")
    return is_done and read_config(mirror.there) is not None


def _finish(uploader: Uploader) -> None:
    """Send the remaining files after training has ended. If a signal stopped training, spend at most about `STOPPED_SECONDS` on this."""
    status = uploader.mirror.run.read_status()
    if status is None or status.state != "preempted":
        uploader.finish()
        return
    try:
        uploader.finish(seconds=max(2.0, status.updated + STOPPED_SECONDS - time.time()))
    except UploadError as error:
        name = (status.reason or "").partition(" ")[0]  # the reason is, for example, "SIGTERM at step 40"
        error.exit_status = 128 + signal.Signals[name] if name in signal.Signals.__members__ else error.exit_status
        raise


@contextlib.contextmanager
def _listening() -> Iterator[list[signal.Signals]]:
    """Yield a list. While the context is open, signals that ask the program to end are added to this list."""
    received: list[signal.Signals] = []

    def receive(number: int, frame: object) -> None:
        received.append(signal.Signals(number))

    with handling({signal.SIGINT: receive, signal.SIGTERM: receive}):
        yield received


def _finish_failed(uploader: Uploader, error: BaseException) -> None:
    """Send the remaining files after training has failed. After an interrupt that stopped training at once, send nothing more."""
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        uploader.abandon()
        return
    # This error is an UploadError if another run of the population has just waited for the store in vain. In this case, wait only
    # briefly.
    try:
        uploader.finish(idle_seconds=2.0 if isinstance(error, UploadError) else None)
    except UploadError as problem:
        print(f"icl: {problem}", file=sys.stderr)
