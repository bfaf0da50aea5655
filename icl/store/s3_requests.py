"""Requests to a bucket, with a replacement for each feature that a server may lack.

Requests avoid features that older servers refuse, such as checksum headers and trailers. Instead, each request is signed with the
SHA-256 of its body, even over TLS. Every server that supports S3's current signature must check this hash. So the checksums of boto3
would not detect more errors. For an upload in parts, they are not even a digest of the whole file.

Some servers also refuse conditional writes, metadata, uploads in parts, the newer listing request, or HEAD. After a server's first
refusal we print a notice, and no longer use the feature with this server.
"""

import contextlib
import hashlib
import sys
import threading
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any, NamedTuple, TypeVar

from botocore.exceptions import ClientError
from botocore.parsers import ResponseParserError

from icl.store import waiting
from icl.store.base import sha256
from icl.store.s3_client import make_client, make_session
from icl.store.s3_errors import is_refused_feature, is_taken, server_name

MAX_PAGES = 10_000
"""Largest number of pages of a listing. A page has a thousand keys."""
_DIGEST = "icl-sha256"
_CHUNK = 2**16
_LACKS = {
    "conditions": "does not support conditional writes (If-None-Match); do not start one run on two machines at the same moment",
    "metadata": "keeps no metadata of objects, so no digests either; every file is read back after it is written",
    "parts": "does not accept uploads in parts; large files are uploaded in one request",
    "ListObjectsV2": "does not support ListObjectsV2; the older listing is used",
    "HEAD": "does not answer HEAD; whole files are read to compare them",
    "MD5 tags": "",
}
_lacking: dict[str, set[str]] = {}
"""Features that each server lacks, as far as this process has noticed. Each key has the form `server/bucket`."""

Result = TypeVar("Result")


class About(NamedTuple):
    """A server's description of an object."""

    length: int
    digest: str | None
    tag: str


class _UnusableAnswerError(Exception):
    """Raised if an answer shows that the server did not understand the request."""


class Requests:
    """The requests of one bucket.

    Args:
        bucket: Name of the bucket.
        part_size: Size in bytes above which a value is uploaded in parts.
    """

    def __init__(self, bucket: str, *, part_size: int) -> None:
        self.bucket, self.part_size = bucket, part_size
        self._made: Any = None
        self._making = threading.Lock()

    def get(self, key: str, limit: int | None = None) -> tuple[bytes, str | None]:
        """Return an object's bytes and the digest that was saved with them (None if there is no digest). Stop soon after `limit` bytes.

        Raises:
            ClientError, BotoCoreError: If there is no such object, or the connection breaks off.
        """
        answer = self._client().get_object(Bucket=self.bucket, Key=key)
        chunks, size = [], 0
        for chunk in answer["Body"].iter_chunks(_CHUNK):
            chunks.append(chunk)
            waiting.moved(len(chunk))
            size += len(chunk)
            if limit is not None and size > limit:
                answer["Body"].close()
                break
        return b"".join(chunks), _digest_in(answer)

    def about(self, key: str) -> About:
        """Return the server's description of an object.

        Raises:
            ClientError, BotoCoreError: If there is no such object, or the request fails.
        """

        def ask() -> About:
            answer = self._client().head_object(Bucket=self.bucket, Key=key)
            return About(answer.get("ContentLength", -1), _digest_in(answer), answer.get("ETag", ""))

        def read() -> About:
            data, digest = self.get(key)
            return About(len(data), digest or sha256(data), "")

        return self._with_or_without("HEAD", ask, read)

    def put(self, key: str, data: bytes) -> str:
        """Write an object. Return the tag (ETag) that the object gets from a server whose tags are MD5 digests.

        Raises:
            ClientError, BotoCoreError: If the server did not accept the object.
        """
        if len(data) <= self.part_size:
            return self._put(key, data)
        return self._with_or_without("parts", lambda: self._put_in_parts(key, data), lambda: self._put(key, data))

    def put_new(self, key: str, data: bytes) -> bool:
        """Write an object that does not exist yet. Return False if the server says that the object exists.

        Raises:
            ClientError, BotoCoreError: If the server did not accept the object.
        """
        try:
            new_only = {"IfNoneMatch": "*"}
            self._with_or_without("conditions", lambda: self._put(key, data, **new_only), lambda: self._put(key, data))
        except ClientError as error:
            if not is_taken(error):
                raise
            return False
        return True

    def knows_conditions(self, key: str, data: bytes) -> bool:
        """Return whether the server supports conditional writes. `key` must exist and have the value `data`.

        Some servers ignore the condition. So we write the object again under the condition that it does not exist. A server that
        supports conditions refuses this write.
        """
        if not self.lacks("conditions") and self.put_new(key, data):
            self.note_lack("conditions")
        return not self.lacks("conditions")

    def keys(self, folder: str) -> Iterator[str]:
        """Yield every key that begins with `folder`.

        Raises:
            ClientError, BotoCoreError: If the request fails.
        """
        pages = self._with_or_without(
            "ListObjectsV2",
            lambda: list(self._pages("list_objects_v2", folder)),
            lambda: list(self._pages("list_objects", folder)),
        )
        return (entry["Key"] for page in pages for entry in page.get("Contents", []))

    def delete(self, key: str) -> None:
        """Remove an object, if there is one.

        Raises:
            ClientError, BotoCoreError: If the request fails.
        """
        self._client().delete_object(Bucket=self.bucket, Key=key)

    def check(self, folder: str) -> None:
        """Ask for one key of the bucket, with fewer tries and shorter time limits than usual.

        Raises:
            ClientError, BotoCoreError: If the request fails.
        """
        client = make_client(self._session, num_attempts=4, connect_seconds=5.0, answer_seconds=10.0)
        first_key = {"Bucket": self.bucket, "Prefix": folder, "MaxKeys": 1}
        answer = self._with_or_without(
            "ListObjectsV2", lambda: client.list_objects_v2(**first_key), lambda: client.list_objects(**first_key)
        )
        _require_listing(answer)

    def lacks(self, feature: str) -> bool:
        """Return whether the server lacks a feature."""
        return feature in _lacking.get(self._server(), ())

    def note_lack(self, feature: str) -> None:
        """Record that the server lacks a feature, and print a notice the first time."""
        known = _lacking.setdefault(self._server(), set())
        if feature not in known and _LACKS[feature]:
            print(f"icl: the store's server {server_name()} {_LACKS[feature]}.", file=sys.stderr)
        known.add(feature)

    def _server(self) -> str:
        """Return a name for the server and the bucket. The bucket is included because servers may treat buckets differently."""
        return f"{server_name()}/{self.bucket}"

    def _with_or_without(self, feature: str, act: Callable[[], Result], instead: Callable[[], Result]) -> Result:
        """Call `act`, which needs a feature of the server. If the server lacks the feature, call `instead`.

        If the server refuses `act`, the reason may also be a different one. So we record that the server lacks the feature only after
        `instead` has succeeded.
        """
        if not self.lacks(feature):
            try:
                return act()
            except _UnusableAnswerError:
                pass
            except ClientError as error:
                if not is_refused_feature(error):
                    raise
        result = instead()
        self.note_lack(feature)
        return result

    def _pages(self, operation: str, folder: str) -> Iterator[dict[str, Any]]:
        """Yield every page of a listing. Refuse a listing that repeats itself, because it would never end."""
        seen: set[str] = set()
        pages = self._client().get_paginator(operation).paginate(Bucket=self.bucket, Prefix=folder)
        for number, page in enumerate(pages, 1):
            _require_listing(page)
            if operation == "list_objects_v2" and page.get("IsTruncated") and not page.get("NextContinuationToken"):
                # The server answered in the format of the older listing request. botocore would stop after this page.
                raise _UnusableAnswerError
            keys = {entry["Key"] for entry in page.get("Contents", [])}
            if number > MAX_PAGES or (keys and keys <= seen):
                raise ResponseParserError("the listing does not end")
            seen |= keys
            waiting.moved()
            yield page

    def _put(self, key: str, data: bytes, **condition: str) -> str:
        """Write an object in one request. Return the tag that `put` describes."""
        put = partial(self._client().put_object, Bucket=self.bucket, Key=key, Body=data, **condition)
        self._with_or_without("metadata", lambda: put(Metadata={_DIGEST: sha256(data)}), put)
        return f'"{_md5(data).hex()}"'

    def _put_in_parts(self, key: str, data: bytes) -> str:
        """Write an object in parts, one after the other. Return the tag that `put` describes: the MD5 of the MD5s of the parts."""
        client = self._client()
        about = {"Bucket": self.bucket, "Key": key}
        create = partial(client.create_multipart_upload, **about)
        upload = self._with_or_without("metadata", lambda: create(Metadata={_DIGEST: sha256(data)}), create)
        about["UploadId"] = upload["UploadId"]
        pieces = [data[start : start + self.part_size] for start in range(0, len(data), self.part_size)]
        try:
            parts = []
            for number, piece in enumerate(pieces, 1):
                answer = client.upload_part(**about, PartNumber=number, Body=piece)
                parts.append({"PartNumber": number, "ETag": answer.get("ETag", "")})
                waiting.moved()
            client.complete_multipart_upload(**about, MultipartUpload={"Parts": parts})
        except Exception:
            with contextlib.suppress(Exception):  # let the server delete the parts, if it still answers
                client.abort_multipart_upload(**about)
            raise
        return f'"{_md5(b"".join(map(_md5, pieces))).hex()}-{len(pieces)}"'

    @cached_property
    def _session(self) -> Any:
        return make_session()

    def _client(self) -> Any:
        """Return the client that all threads share. The first call makes it."""
        with self._making:
            self._made = self._made or make_client(self._session)
        return self._made


def _require_listing(answer: dict[str, Any]) -> None:
    """Refuse an answer that is not a listing, such as a login page. botocore would read it as an empty listing.

    Raises:
        ResponseParserError: If the answer has none of the fields of a listing.
    """
    if not {"IsTruncated", "Name", "KeyCount", "Contents"} & set(answer):
        raise ResponseParserError("no listing")


def _digest_in(answer: dict[str, Any]) -> str | None:
    """Return the digest that we saved in the metadata of an object, or None if there is none. Servers spell the names of metadata differently."""
    for name, value in answer.get("Metadata", {}).items():
        if name.lower().replace("_", "-") == _DIGEST:
            return str(value).strip().lower() or None
    return None


def _md5(data: bytes) -> bytes:
    return hashlib.md5(data, usedforsecurity=False).digest()
