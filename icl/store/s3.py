"""A store in a bucket of S3, or of a server with the same interface.

boto3 finds the credentials (environment, profile, role) and the server (`AWS_ENDPOINT_URL`). It also repeats requests that may
succeed later (adaptive mode; `AWS_MAX_ATTEMPTS`). Every object has the SHA-256 of its bytes as metadata. So if bytes are lost or
altered during a transfer or in the store, reading the object raises an error. A request ends with an error after a minute without
progress.
"""

import time
from collections.abc import Callable
from typing import TypeVar

from botocore.exceptions import BotoCoreError, ClientError
from botocore.parsers import ResponseParserError

from icl.files.writing import StorageError
from icl.store import waiting
from icl.store.base import DamagedError, MissingKeyError, OneByOne, require_key, sha256
from icl.store.s3_errors import describe_failure, describe_refusal, is_absent, server_name
from icl.store.s3_requests import Requests

PART_SIZE = 16 * 2**20
"""Largest number of bytes that are uploaded in one request. Larger values are uploaded in parts of this size."""
CHECK_SECONDS = 20.0
"""Seconds without an answer after which `check` gives up."""
SETTLE_SECONDS = 2.0
"""Seconds to wait after creating a key on a server without conditional writes. After that, we check whether another process also
created the key."""
_NUM_READS = 3

Result = TypeVar("Result")


class S3Store(OneByOne):
    """The objects of a bucket whose keys begin with a prefix.

    Args:
        bucket: Name of the bucket. The bucket must exist.
        prefix: Folder within the bucket. If it is empty, the store is the whole bucket.
        part_size: Size in bytes above which a value is uploaded in parts.
    """

    def __init__(self, bucket: str, prefix: str = "", *, part_size: int = PART_SIZE) -> None:
        self.bucket, self.prefix = bucket, prefix.strip("/")
        self._requests = Requests(bucket, part_size=part_size)

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def read(self, key: str, *, limit: int | None = None) -> bytes:
        """Return the value of a key, after comparing the value with the digest that was saved with it.

        Raises:
            MissingKeyError: If the key has no value.
            StorageError: If the value is damaged or has more than `limit` bytes, or the store cannot be used.
        """
        return self._ask(key, lambda: self._read(key, limit))

    def digest(self, key: str) -> str:
        """Return the SHA-256 of the value that was written. If no digest was saved with it, compute the digest from the stored value.

        Raises:
            MissingKeyError: If the key has no value.
            StorageError: If the store cannot be used.
        """
        return self._ask(key, lambda: self._requests.about(self._full(key)).digest or sha256(self._get(key)[0]))

    def write(self, key: str, data: bytes) -> None:
        """Set the value of a key, and check that the store has the value.

        Raises:
            StorageError: If the store did not accept the value, or does not contain the value afterwards.
        """
        self._ask(key, lambda: self._write(key, data))

    def create(self, key: str, data: bytes) -> bool:
        """Set the value of a key only if the key has no value. Return whether the value was set.

        If several processes try this at once and the server supports conditional writes, only one succeeds.

        Raises:
            StorageError: If the store did not accept the value.
        """
        return self._ask(key, lambda: self._create(key, data))

    def keys(self, prefix: str = "") -> list[str]:
        """Return every key below the folder `prefix`, sorted.

        Raises:
            StorageError: If the store cannot be used.
        """
        root = f"{self.prefix}/" if self.prefix else ""
        folder = f"{root}{prefix.strip('/')}/" if prefix else root
        keys = self._ask(prefix, lambda: list(self._requests.keys(folder)))
        return sorted(key[len(root) :] for key in keys if key.startswith(root) and not key.endswith("/"))

    def delete(self, key: str) -> None:
        """Remove a key. A missing key is not an error.

        Raises:
            StorageError: If the store cannot be used.
        """
        self._ask(key, lambda: self._requests.delete(self._full(key)))

    def check(self) -> None:
        """Ask the bucket for one key, so that a wrong bucket, a wrong server or wrong credentials are noticed at once.

        Raises:
            StorageError: If the bucket does not answer. The message says what is wrong.
        """
        self._ask("", lambda: self._requests.check(self.prefix), seconds=CHECK_SECONDS)

    def _full(self, key: str) -> str:
        require_key(key, self)
        return f"{self.prefix}/{key}" if self.prefix else key

    def _read(self, key: str, limit: int | None = None) -> bytes:
        for _ in range(2):
            data, digest = self._get(key, limit)
            if not digest or sha256(data) == digest:
                return data  # otherwise read once more, because the bytes may have been damaged during the transfer
        raise DamagedError(f"{self}/{key} is damaged: its {len(data):,} bytes differ from the bytes that were saved.")

    def _get(self, key: str, limit: int | None = None) -> tuple[bytes, str | None]:
        """Return the bytes of a key and their saved digest, which is None if no digest was saved.

        Repeat a download that breaks off.
        """
        for attempt in range(_NUM_READS):
            try:
                data, digest = self._requests.get(self._full(key), limit)
            except BotoCoreError:
                if attempt == _NUM_READS - 1:
                    raise
                continue
            if limit is not None and len(data) > limit:
                raise StorageError(
                    f"{self}/{key} cannot be used: it has more than {limit:,} bytes, the limit for this kind of file."
                )
            if digest or not _is_error_page(data):
                return data, digest
        raise StorageError(
            f"{self}/{key} cannot be used: the server answers with an error instead of the file; run the same command again later."
        )

    def _write(self, key: str, data: bytes) -> None:
        """Write a value, and check that the server has it.

        The check compares the length, digest and tag (ETag) that the server gives. If these are not enough, the value is read
        back.
        """
        tag = self._requests.put(self._full(key), data)
        kept = _unless_absent(lambda: self._requests.about(self._full(key)))
        if kept is None or kept.length != len(data) or kept.digest not in (None, sha256(data)):
            raise self._lost(key)
        # If a server keeps no metadata, it gives no digest, so we read back every value. If a server's tags are not MD5 digests, the
        # tags always differ, so we read back only the first value.
        lack = "metadata" if kept.digest is None else "MD5 tags" if kept.tag not in (tag, "") else None
        if lack == "metadata" or (lack is not None and not self._requests.lacks(lack)):
            if self._get(key)[0] != data:
                raise self._lost(key)
            self._requests.note_lack(lack)

    def _create(self, key: str, data: bytes) -> bool:
        full = self._full(key)
        if _unless_absent(lambda: self._requests.about(full)) is not None:
            return False
        if self._requests.put_new(full, data) and not self._requests.knows_conditions(full, data):
            time.sleep(SETTLE_SECONDS)
        kept = _unless_absent(lambda: self._read(key))
        if kept is None:
            raise self._lost(key)
        # Compare the bytes even if the server says that the object existed: a retry may find the object that the first try wrote.
        return kept == data

    def _lost(self, key: str) -> StorageError:
        return StorageError(
            f"{self}/{key} is missing or differs from the bytes that were just written, although the server accepted the file. "
            "Run the same command again; if this happens again, choose another store."
        )

    def _ask(self, key: str, act: Callable[[], Result], *, seconds: float | None = None) -> Result:
        """Return the server's answer. Wait as long as there is progress, and explain an error of boto3 in one sentence."""
        address = f"{self}/{key}" if key else str(self)
        try:
            return waiting.await_result(act, seconds=seconds, awaited=f"an answer from {server_name()}")
        except ClientError as error:
            if key and is_absent(error):
                raise MissingKeyError(f"There is no {address}.") from None
            reason = describe_refusal(error)
        except waiting.StalledError:
            reason = f"no progress with {server_name()} for too long; check the network and AWS_ENDPOINT_URL"
        except (BotoCoreError, ResponseParserError, ValueError, RecursionError) as error:
            reason = describe_failure(error)
        raise StorageError(f"{address} cannot be used: {reason}.")


def _unless_absent(ask: Callable[[], Result]) -> Result | None:
    """Return an answer about an object, or None if the server says that there is no such object."""
    try:
        return ask()
    except ClientError as error:
        if is_absent(error):
            return None
        raise


def _is_error_page(data: bytes) -> bool:
    """Return whether the bytes are an error message that the server sent with a success status, as if it were the object."""
    start = data[:200].lstrip()
    return start.startswith((b"<?xml", b"<Error")) and b"<Error>" in start
