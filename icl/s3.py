"""Keyed bytes in a bucket of S3, or of a server that speaks its language.

boto3 finds the credentials (environment, profile, role) and the server (`AWS_ENDPOINT_URL`), and tries again what may
succeed (adaptive mode; `AWS_MAX_ATTEMPTS`). Every object carries the SHA-256 of the bytes it was made from, so bytes
that were lost, cut short or altered on the way or in the store are found when they are read. boto3 is imported when a
store is first used. No message holds anything that the server or boto3 said beyond an error's code: it could be secret.
"""

import base64
import contextlib
import hashlib
import io
import os
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from icl.storage import MissingKeyError, StorageError, require_key, sha256

NUM_ATTEMPTS = 8
"""Tries of one request, over some seconds; `AWS_MAX_ATTEMPTS` overrides it."""
PART_SIZE = 16 * 2**20
"""Bytes: what is larger goes up in parts of this size."""
_NUM_READS = 3
_DIGEST = "icl-sha256"
_ABSENT = ("404", "NoSuchKey", "NotFound")
_TAKEN = ("PreconditionFailed", "ConditionalRequestConflict", "412", "409")
_NO_CONDITIONS = ("NotImplemented", "501")
_REFUSALS = {
    "NoSuchBucket": "the bucket does not exist; make it, or mend AWS_BUCKET_NAME or checkpoints.store",
    "AccessDenied": "these credentials may not do this; allow them to list, read, write and delete below the prefix",
    "403": "these credentials may not do this, or are wrong; check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "InvalidAccessKeyId": "the server does not know this access key; check AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "the secret key does not fit the access key; check AWS_SECRET_ACCESS_KEY",
    "ExpiredToken": "the credentials have expired; renew them",
    "PermanentRedirect": "the bucket is in another region; set AWS_DEFAULT_REGION",
}
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError")


class S3Store:
    """The objects of a bucket whose keys begin with a prefix.

    Args:
        bucket: The bucket; it must exist.
        prefix: Folder within it; empty for all of it.
        part_size: Bytes above which a value goes up in parts.
    """

    def __init__(self, bucket: str, prefix: str = "", *, part_size: int = PART_SIZE) -> None:
        self.bucket, self.prefix, self.part_size = bucket, prefix.strip("/"), part_size
        self._session: Any = None
        self._made: Any = None
        self._making = threading.Lock()

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def read(self, key: str) -> bytes:
        """The value of a key, checked against the digest it was saved with.

        Raises:
            MissingKeyError: If there is none.
            StorageError: If it is damaged, or the store cannot be used.
        """
        data, digest = self._get(key)
        if digest and sha256(data) != digest:
            data, digest = self._get(key)  # damaged on the way, perhaps
            if digest and sha256(data) != digest:
                raise StorageError(f"{self}/{key} is damaged: its {len(data):,} bytes are not those that were saved.")
        return data

    def digest(self, key: str) -> str:
        """SHA-256 of the value that was written; of the value there is, if another program wrote it.

        Raises:
            MissingKeyError: If there is none.
            StorageError: If the store cannot be used.
        """
        with self._errors(key):
            digest: str | None = (
                self._client().head_object(Bucket=self.bucket, Key=self._full(key))["Metadata"].get(_DIGEST)
            )
        return digest or sha256(self._get(key)[0])

    def write(self, key: str, data: bytes) -> None:
        """Set the value of a key, and look that the store has it.

        Raises:
            StorageError: If the store did not take it.
        """
        with self._errors(key):
            if len(data) > self.part_size:
                self._upload_in_parts(key, data)
            else:
                self._client().put_object(**self._request(key, data))
        self._require_kept(key, data)

    def create(self, key: str, data: bytes) -> bool:
        """Set the value of a key that has none; of several who try at once, one succeeds if the server knows conditions.

        Raises:
            StorageError: If the store did not take it.
        """
        if self._has(key):
            return False
        with self._errors(key):
            try:
                self._client().put_object(**self._request(key, data), IfNoneMatch="*")
            except self._client().exceptions.ClientError as error:
                if _code(error) in _NO_CONDITIONS:
                    self._client().put_object(**self._request(key, data))
                elif _code(error) not in _TAKEN:
                    raise
        return self.read(key) == data

    def keys(self, prefix: str = "") -> list[str]:
        """Every key below the folder `prefix`, sorted.

        Raises:
            StorageError: If the store cannot be used.
        """
        root = f"{self.prefix}/" if self.prefix else ""
        folder = f"{root}{prefix.strip('/')}/" if prefix else root
        with self._errors(prefix):
            pages = self._client().get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=folder)
            found = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
        return sorted(key[len(root) :] for key in found if key.startswith(root) and not key.endswith("/"))

    def delete(self, key: str) -> None:
        """Remove a key; nothing happens if there is none.

        Raises:
            StorageError: If the store cannot be used.
        """
        with self._errors(key):
            self._client().delete_object(Bucket=self.bucket, Key=self._full(key))

    def check(self) -> None:
        """Ask the bucket for one key, so that wrong credentials, bucket or server are known at once.

        Raises:
            StorageError: Saying which of them is wrong.
        """
        with self._errors():
            client = self._make_client(num_attempts=2, connect_timeout=5.0, read_timeout=10.0)
            client.list_objects_v2(Bucket=self.bucket, Prefix=self.prefix, MaxKeys=1)

    def _full(self, key: str) -> str:
        require_key(key, self)
        return f"{self.prefix}/{key}" if self.prefix else key

    def _has(self, key: str) -> bool:
        try:
            self.digest(key)
        except MissingKeyError:
            return False
        return True

    def _request(self, key: str, data: bytes) -> dict[str, Any]:
        """A request that the server refuses if the bytes that arrive are not these."""
        checksum = base64.b64encode(hashlib.sha256(data).digest()).decode()
        about = {"Metadata": {_DIGEST: sha256(data)}, "ChecksumSHA256": checksum}
        return {"Bucket": self.bucket, "Key": self._full(key), "Body": data, **about}

    def _upload_in_parts(self, key: str, data: bytes) -> None:
        from boto3.s3.transfer import TransferConfig

        plan = TransferConfig(
            multipart_threshold=self.part_size,
            multipart_chunksize=self.part_size,
            use_threads=False,
            preferred_transfer_client="classic",
        )
        about = {"Metadata": {_DIGEST: sha256(data)}, "ChecksumAlgorithm": "SHA256"}
        self._client().upload_fileobj(io.BytesIO(data), self.bucket, self._full(key), ExtraArgs=about, Config=plan)

    def _require_kept(self, key: str, data: bytes) -> None:
        with self._errors(key):
            kept = self._client().head_object(Bucket=self.bucket, Key=self._full(key))
        if kept.get("ContentLength") != len(data) or kept["Metadata"].get(_DIGEST) != sha256(data):
            raise StorageError(f"{self}/{key} is not what was just written there: the server took it and lost it.")

    def _get(self, key: str) -> tuple[bytes, str | None]:
        """The bytes there are and the digest they should have; a connection lost on the way is tried again."""
        from botocore.exceptions import BotoCoreError, HTTPClientError

        with self._errors(key):
            for attempt in range(_NUM_READS):
                answer = self._client().get_object(Bucket=self.bucket, Key=self._full(key))
                try:
                    return answer["Body"].read(), answer["Metadata"].get(_DIGEST)
                except (BotoCoreError, HTTPClientError):
                    if attempt == _NUM_READS - 1:
                        raise
        raise AssertionError

    def _client(self) -> Any:
        """One client for all threads, made on first use."""
        with self._making:
            self._made = self._made or self._make_client()
        return self._made

    def _make_client(
        self, num_attempts: int = NUM_ATTEMPTS, *, connect_timeout: float = 10.0, read_timeout: float = 60.0
    ) -> Any:
        import boto3
        from botocore.config import Config

        retries: dict[str, Any] = {"mode": "adaptive"}
        if "AWS_MAX_ATTEMPTS" not in os.environ:
            retries["total_max_attempts"] = num_attempts
        settings = Config(
            retries=retries,
            connect_timeout=connect_timeout,
            read_timeout=read_timeout,
            request_checksum_calculation="when_required",  # ours is sent always; older servers refuse others
            response_checksum_validation="when_required",
        )
        self._session = self._session or boto3.session.Session()  # a second client of one session costs next to nothing
        client = self._session.client("s3", config=settings)
        client.meta.events.register_last("before-call.s3", _send_at_once)
        return client

    @contextlib.contextmanager
    def _errors(self, key: str = "") -> Iterator[None]:
        """What boto3 raises, said in one sentence."""
        from botocore.exceptions import BotoCoreError, ClientError
        from botocore.parsers import ResponseParserError

        place = f"{self}/{key}" if key else str(self)
        try:
            yield
        except ClientError as error:
            code = _code(error)
            if key and code in _ABSENT:
                raise MissingKeyError(f"There is no {place}.") from None
            reason = _REFUSALS.get(code if code != "404" else "NoSuchBucket", f"the server answered {code}; try again")
            raise StorageError(f"{place} cannot be used: {reason}.") from None
        except (BotoCoreError, ResponseParserError, ValueError) as error:
            raise StorageError(f"{place} cannot be used: {_reason(error)}.") from None


def _send_at_once(params: dict[str, Any], **_: Any) -> None:
    """Do not ask before each upload whether it is welcome: servers that never answer would cost a second each time."""
    params["headers"].pop("Expect", None)


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", "an error"))


def _reason(error: Exception) -> str:
    """What a failure of boto3 itself means, without its words."""
    name = type(error).__name__
    if name in _NO_CREDENTIALS:
        return "there are no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, in `.env` for instance"
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    server = urlsplit(endpoint).netloc.rpartition("@")[2] if endpoint else "AWS"
    return f"no answer from {server or 'the server'} ({name}); check the network and AWS_ENDPOINT_URL"
