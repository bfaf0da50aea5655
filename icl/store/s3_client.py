"""Make clients for S3 and for servers with the same interface. Set time limits and retries, and count sent bytes as progress.

Checksum headers and trailers are not sent, because older servers refuse them (`icl.store.s3_requests`).
"""

import io
import os
from functools import cache
from typing import Any

import botocore.loaders
import botocore.session
from botocore.config import Config

from icl.store import waiting

NUM_ATTEMPTS = 8
"""Largest number of attempts of one request, unless `AWS_MAX_ATTEMPTS` is set."""
CONNECT_SECONDS, ANSWER_SECONDS = 10.0, 25.0
"""Time limits in seconds of each attempt of a request: to connect, and to receive the answer."""
_CHUNK = 2**16
"""If the body of a request has more than this number of bytes, the bytes count as progress while they are sent."""


def make_session() -> Any:
    """Return a session of botocore, which finds the credentials. The first call takes a third of a second."""
    session = botocore.session.get_session()
    session.register_component("data_loader", _loader())
    return session


def make_client(
    session: Any,
    num_attempts: int = NUM_ATTEMPTS,
    *,
    connect_seconds: float = CONNECT_SECONDS,
    answer_seconds: float = ANSWER_SECONDS,
) -> Any:
    """Return a client of S3.

    Args:
        session: A session of botocore.
        num_attempts: Largest number of attempts of one request, unless `AWS_MAX_ATTEMPTS` is set.
        connect_seconds: Time limit of each attempt to connect.
        answer_seconds: Time limit of each attempt to receive the answer.
    """
    retries: dict[str, Any] = {"mode": "adaptive"}
    if "AWS_MAX_ATTEMPTS" not in os.environ:
        retries["total_max_attempts"] = num_attempts
    settings = Config(
        retries=retries,
        connect_timeout=connect_seconds,
        read_timeout=answer_seconds,
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        s3={"payload_signing_enabled": True},
    )
    client = session.create_client("s3", config=settings)
    client.meta.events.register_last("before-call.s3", _send_at_once)
    client.meta.events.register_last("before-send.s3", _count_what_is_sent)
    return client


@cache
def _loader() -> Any:
    """Return the object with which botocore loads its description of the S3 interface.

    Making the object takes a third of a second, so it is made once.
    """
    return botocore.loaders.create_loader()


class _Counted(io.BytesIO):
    """A request's body whose bytes count as progress when they are sent for the first time."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.size = len(data)

    def __len__(self) -> int:
        return self.size

    def read(self, size: int | None = -1) -> bytes:
        """Return the next bytes."""
        data = super().read(size)
        waiting.moved(len(data))
        return data


def _send_at_once(params: dict[str, Any], **_: Any) -> None:
    """Remove the header `Expect`, which makes each upload wait until the server agrees to receive the body.

    With a server that ignores this header, each upload would take a second longer.
    """
    params["headers"].pop("Expect", None)


def _count_what_is_sent(request: Any, **_: Any) -> None:
    """Count the bytes of a large body as progress while they are sent, but only at the first try of a request.

    If we gave up on the call, nothing more is sent, except requests that delete the parts of an unfinished upload.
    """
    if request.method != "DELETE":
        waiting.require_awaited()
    is_first = "attempt=1" in str(request.headers.get("amz-sdk-request", "attempt=1"))
    if is_first and isinstance(request.body, bytes) and len(request.body) > _CHUNK:
        request.body = _Counted(request.body)
