"""Explain errors of the Hugging Face Hub in sentences, and decide how long to wait before a request is repeated."""

import os
from typing import Any

from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from icl.files.reading import first_line
from icl.files.redaction import redact
from icl.files.writing import StorageError

MAX_PAUSE = 90.0
"""Longest wait in seconds before a request is repeated. If the Hub asks for a longer wait, the command ends with a message."""
_MAX_CAUSES = 8
_BUSY = (408, 429, 500, 502, 503, 504)
_TOKEN = "Set HF_TOKEN to a token with write access, or log in with `hf auth login`"


def server() -> str:
    """Return the address of the Hub: $HF_ENDPOINT, or huggingface.co."""
    return os.environ.get("HF_ENDPOINT", "").strip().rstrip("/") or "https://huggingface.co"


def is_conflict(error: BaseException) -> bool:
    """Return whether a commit was refused because its parent is no longer the newest commit."""
    return _status(error) in (409, 412)


def is_missing_repository(error: BaseException) -> bool:
    """Return whether the repository does not exist, or this user is not allowed to see it."""
    return isinstance(error, RepositoryNotFoundError) and _status(error) in (401, 404, None)


def pause_before_retry(error: BaseException, attempt: int) -> float | None:
    """Return the seconds to wait before the request is repeated, or None if the request should not be repeated."""
    status = _status(error)
    if isinstance(error, (LocalTokenNotFoundError, OfflineModeIsEnabled)):
        return None
    if status is None:
        return min(2.0**attempt * 0.5, 20.0) if _is_network(error) else None
    if status not in _BUSY:
        return None
    asked = _asked_pause(error)
    if asked is not None:
        return asked if asked <= MAX_PAUSE else None
    return min(2.0**attempt * 0.5, 20.0)


def describe(error: BaseException, place: str, verb: str, key: str, endpoint: str) -> StorageError:
    """Return the error for a request that has failed and is not repeated. The message contains no token."""
    status, what = _status(error), f"{place}/{key}".rstrip("/")
    if isinstance(error, OfflineModeIsEnabled):
        return StorageError(f"Cannot {verb} {what}: HF_HUB_OFFLINE is set. Unset it to use the Hub.")
    if isinstance(error, UnicodeEncodeError):  # from the header with the token
        return StorageError(
            f"Cannot {verb} {what}: the token contains a character that tokens never contain. Correct HF_TOKEN."
        )
    if isinstance(error, HFValidationError):
        return StorageError(
            f"{place} cannot be the name of a repository: {first_line(error).rstrip('.')}. Correct the address."
        )
    if isinstance(error, LocalTokenNotFoundError):
        return StorageError(
            f"Cannot {verb} {what}: the repository does not exist, or is private and no token is set. {_TOKEN}."
        )
    if status in (401, 403) or isinstance(error, RepositoryNotFoundError):
        return StorageError(
            f"Cannot {verb} {what}: the Hub refuses access ({status or 404}). {_TOKEN}, and check the name of the repository."
        )
    if status == 404:
        return StorageError(f"Cannot {verb} {what}: the Hub has no such revision or file (404). Check the address.")
    if status == 429:
        asked = _asked_pause(error)
        wait = f" for {asked / 60:.0f} minutes" if asked is not None and asked > MAX_PAUSE else ""
        return StorageError(
            f"Cannot {verb} {what}: the Hub accepts no more requests from this user{wait} (429). Files that have arrived stay; run the same "
            "command again later to send the rest."
        )
    if status is not None:
        return StorageError(
            f"Cannot {verb} {what}: {endpoint} answered with an error ({status}). Run the same command again later."
        )
    reason = redact(" ".join(str(error).split()))[:200] or type(error).__name__
    return StorageError(
        f"Cannot {verb} {what}: {endpoint} cannot be reached, or the connection broke off ({reason.rstrip('.')}). Check the network and run "
        "the same command again."
    )


def _status(error: BaseException) -> int | None:
    return getattr(_response(error), "status_code", None)


def _response(error: BaseException | None) -> Any:
    """Return the server's answer that caused an error, or None if no answer caused it.

    In uploads and downloads, the client wraps the original error in other errors, so we follow their causes.
    """
    for _ in range(_MAX_CAUSES):
        if error is None or getattr(error, "response", None) is not None:
            break
        error = error.__cause__
    return getattr(error, "response", None)


def _is_network(error: BaseException) -> bool:
    """Return whether an error comes from the connection. The client may use any of several HTTP libraries."""
    modules = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return isinstance(error, (OSError, HfHubHTTPError)) or bool(
        modules & {"httpx", "httpx2", "httpcore", "httpcore2", "requests"}
    )


def _asked_pause(error: BaseException) -> float | None:
    """Return the seconds that the Hub asks us to wait, from the header Retry-After or RateLimit."""
    headers: Any = getattr(_response(error), "headers", {}) or {}
    text = str(headers.get("retry-after", ""))
    if not text:
        parts = (part.strip() for part in str(headers.get("ratelimit", "")).split(";"))
        text = next((part.removeprefix("t=") for part in parts if part.startswith("t=")), "")
    return float(text) if text.isdecimal() else None
