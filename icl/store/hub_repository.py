"""One revision of a repository on the Hugging Face Hub: its listing, its commits, and the repetition of failed requests.

All stores of a process that use the same revision share one `Repository`. So these stores share the listing, and commit one after another.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from huggingface_hub import HfApi
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import disable_progress_bars

from icl.files.writing import StorageError
from icl.store import waiting
from icl.store.hub_errors import describe, is_conflict, is_missing_repository, pause_before_retry

COMMIT_SECONDS = 600.0
"""Minimum number of seconds between two commits while a run trains. The Hub accepts 128 commits an hour for all runs of a user."""
LISTING_SECONDS = 2.0
"""Seconds for which a listing of the repository is reused. A commit of this process makes the listing invalid at once."""
CALL_SECONDS = 120.0
"""Seconds without progress after which we give up on a request. Without this limit, the client would wait for as long as the Hub tells it
to wait."""
_MAX_RETRIES = 6
_NO_NEWS = ("not supported by Xet", "thrown while requesting", "Retrying in", "Error while downloading from")

Result = TypeVar("Result")


class Listing(NamedTuple):
    """The files of a repository at one commit."""

    commit: str | None
    """The commit, or None if the repository does not exist."""
    files: dict[str, RepoFile]
    at: float
    """Time of the listing, from `time.monotonic`."""


class Repository:
    """One revision of a repository. All stores of this process that use this revision share one object."""

    def __init__(self, name: str, revision: str, endpoint: str) -> None:
        self.name, self.revision, self.endpoint = name, revision, endpoint
        self.api = HfApi(endpoint=endpoint)
        self.lock = threading.RLock()
        self.committed_at = -COMMIT_SECONDS
        """Time of this process's last commit, from `time.monotonic`."""
        self._listing: Listing | None = None
        disable_progress_bars()
        for module in ("_commit_api", "utils._http", "file_download"):
            logging.getLogger(f"huggingface_hub.{module}").addFilter(_is_news)

    def listing(self, *, is_new: bool = False) -> Listing:
        """Return the files at the revision's newest commit. A listing made in the last two seconds is reused, unless `is_new` is true."""
        with self.lock:
            old = self._listing
            if is_new or old is None or time.monotonic() - old.at > LISTING_SECONDS:
                self._listing = self.ask("list", self._list)
            assert self._listing is not None
            return self._listing

    def files_at(self, commit: str | None) -> dict[str, RepoFile]:
        """Return the files at a commit, keyed by path."""
        if commit is None:
            return {}
        tree = self.api.list_repo_tree(self.name, recursive=True, revision=commit)
        return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}

    def commit(self, operations: Sequence[Any], message: str, parent: str | None) -> None:
        """Make a commit whose parent is `parent`. If `parent` is None, first make a private repository.

        Raises:
            Exception: Any error of the client, for example because `parent` is no longer the newest commit.
        """
        if parent is None:
            self.api.create_repo(self.name, exist_ok=True, private=True)
            parent = self._head()
        self.api.create_commit(
            self.name, operations=operations, commit_message=message, revision=self.revision, parent_commit=parent
        )
        self.committed_at, self._listing = time.monotonic(), None

    def ask(self, verb: str, act: Callable[[], Result], *, key: str = "") -> Result:
        """Return the result of a call. Repeat the call a few times if the server is busy or the network fails.

        Args:
            verb: Verb for messages that says what the call does, such as `read`.
            act: The call.
            key: The file that the call is about, for messages.

        Raises:
            StorageError: If the call fails and is not repeated. The message says what to do.
        """
        for attempt in range(_MAX_RETRIES):
            result, error = _attempt(act, self.endpoint)
            if error is None:
                return result  # type: ignore[return-value]
            if isinstance(error, StorageError) or (verb == "write" and is_conflict(error)):
                raise error
            pause = pause_before_retry(error, attempt)
            if pause is None or attempt == _MAX_RETRIES - 1:
                revision = "" if self.revision == "main" else f"@{self.revision}"
                raise describe(error, f"hf://{self.name}{revision}", verb, key, self.endpoint) from None
            time.sleep(pause)
        raise AssertionError

    def _list(self) -> Listing:
        try:
            commit = self._head()
        except Exception as error:
            if not is_missing_repository(error):
                raise
            commit = None
        return Listing(commit, self.files_at(commit), time.monotonic())

    def _head(self) -> str | None:
        return self.api.repo_info(self.name, revision=self.revision).sha


def _attempt(act: Callable[[], Result], endpoint: str) -> tuple[Result | None, Exception | None]:
    """Make a call. If it succeeds, return its result and None. If it fails, return None and the error."""
    try:
        return waiting.await_result(act, seconds=CALL_SECONDS, awaited=endpoint), None
    except waiting.StalledError:
        return None, StorageError(
            f"{endpoint} is busy: there was no progress for {CALL_SECONDS:.0f} s. Files that have arrived stay; run the same command again "
            "later."
        )
    except Exception as error:  # the client and its libraries raise a dozen kinds of errors
        return None, error


def _is_news(record: logging.LogRecord) -> bool:
    """Return whether to show a log message of the client. Hide warnings about uploads by HTTP and about retries, which need no action."""
    text = record.getMessage()
    return not any(words in text for words in _NO_NEWS)
