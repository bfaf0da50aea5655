"""Stand-ins for S3-compatible servers. Each refuses, drops or changes one thing, as some real server does.

A stand-in is a proxy in front of moto's server. `refuse` gets the request and may answer it. `alter` gets the answer and may
change it.
"""

import datetime
import hashlib
import ipaddress
import re
import ssl
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import NamedTuple

from tests.s3_server import Proxy, Request

Refuse = Callable[[Request], tuple[int, str] | None]
Alter = Callable[[Request, dict[str, str], bytes], tuple[dict[str, str], bytes]]

_MARK = "x-amz-meta-"


class StandIn(NamedTuple):
    """A server that differs from S3 in one thing."""

    name: str
    refuse: Refuse | None = None
    alter: Alter | None = None
    over_tls: bool = False
    said: str = ""
    """Words in the message that `icl` prints once, if a store is less safe on such a server."""

    @property
    def is_about_large_files(self) -> bool:
        """Whether the difference affects uploads in parts."""
        return self.over_tls or self.name.startswith(("uploads", "metadata", "tags"))


def stand_ins() -> list[StandIn]:
    """Return all stand-ins, with new counters."""
    return [
        StandIn("names of metadata in capitals", alter=_renamed(str.upper)),
        StandIn("names of metadata with underscores", alter=_renamed(lambda name: name.replace("-", "_").title())),
        StandIn("metadata dropped", alter=_without_metadata, said="keeps no metadata"),
        StandIn("metadata refused, 400", _refuse(400, "InvalidRequest", header=_MARK), said="keeps no metadata"),
        StandIn("trailers refused, over TLS", _refuse_trailers, over_tls=True),
        StandIn("unsigned bodies refused, over TLS", _refuse_unsigned, over_tls=True),
        StandIn("checksum headers refused, 400", _refuse(400, "InvalidArgument", header=r"x-amz-(sdk-)?checksum")),
        StandIn(
            "checksum headers refused, 501, over TLS",
            _refuse(501, "NotImplemented", header=r"x-amz-(sdk-)?checksum"),
            over_tls=True,
        ),
        StandIn(
            "If-None-Match refused, 400", _refuse(400, "InvalidArgument", header="if-none-match"), said="conditional"
        ),
        StandIn(
            "If-None-Match refused, 501", _refuse(501, "NotImplemented", header="if-none-match"), said="conditional"
        ),
        StandIn("If-None-Match ignored", _ignore("if-none-match"), said="conditional"),
        StandIn(
            "ListObjectsV2 refused, 400", _refuse(400, "InvalidArgument", path="list-type=2"), said="ListObjectsV2"
        ),
        StandIn("ListObjectsV2 refused, 501", _refuse(501, "NotImplemented", path="list-type=2"), said="ListObjectsV2"),
        StandIn("ListObjectsV2 answered as the older one", alter=_without_token, said="ListObjectsV2"),
        StandIn("uploads in parts refused, 501", _refuse(501, "NotImplemented", path="uploads"), said="in parts"),
        StandIn("HEAD refused, 405", _refuse(405, "MethodNotAllowed", method="HEAD"), said="HEAD"),
        StandIn("Expect refused, 417", _refuse(417, "ExpectationFailed", header="expect")),
        StandIn("tags that are not MD5", alter=_tagged),
        StandIn("other error codes for missing objects", alter=_other_codes),
        StandIn("another region", _refuse_region),
        StandIn("503 SlowDown at first", _first(3, lambda request: (503, "SlowDown"))),
        StandIn("500 after every fifth request", _every(5, lambda request: (500, "InternalError"))),
        StandIn("errors with the status of success", alter=_error_pages()),
        StandIn("downloads cut short at first", alter=_cut_short()),
    ]


def start(stand_in: StandIn, endpoint: str, folder: Path) -> tuple[Proxy, dict[str, str]]:
    """Start a stand-in in front of a server. Return the proxy, and the environment with which `icl` uses it."""
    proxy = Proxy(endpoint, tls=_tls(folder) if stand_in.over_tls else None)
    proxy.refuse = stand_in.refuse or proxy.refuse
    proxy.alter = stand_in.alter or proxy.alter
    proxy.region = "eu-central-1"
    environment = {"AWS_ENDPOINT_URL": proxy.endpoint}
    if stand_in.over_tls:
        environment["AWS_CA_BUNDLE"] = str(folder / "certificate.pem")
    return proxy, environment


def _refuse(status: int, code: str, *, header: str = "", path: str = "", method: str = "") -> Refuse:
    """Return a function that refuses requests with this header, path and method. Empty ones match every request."""

    def refuse(request: Request) -> tuple[int, str] | None:
        has_header = any(re.match(header, name) for name in request.headers)
        fits = has_header and re.search(path, request.path) and method in ("", request.method)
        return (status, code) if fits else None

    return refuse


def _refuse_trailers(request: Request) -> tuple[int, str] | None:
    """Refuse uploads in chunks or with trailers, as Cloudflare R2 does."""
    is_chunked = "aws-chunked" in request.headers.get("content-encoding", "") or "x-amz-trailer" in request.headers
    return (501, "NotImplemented") if is_chunked else None


def _refuse_unsigned(request: Request) -> tuple[int, str] | None:
    """Refuse a body that is sent without its digest or with a wrong one."""
    if request.headers.get("x-amz-content-sha256") != hashlib.sha256(request.data).hexdigest():
        return 400, "XAmzContentSHA256Mismatch"
    return None


def _refuse_region(request: Request) -> tuple[int, str] | None:
    """Refuse requests that are signed for another region than the bucket's."""
    return None if "/eu-" in request.headers.get("authorization", "") else (301, "PermanentRedirect")


def _ignore(header: str) -> Refuse:
    def refuse(request: Request) -> None:
        request.headers.pop(header, None)

    return refuse


def _first(number: int, answer: Refuse) -> Refuse:
    numbers = count()
    return lambda request: answer(request) if next(numbers) < number else None


def _every(number: int, answer: Refuse) -> Refuse:
    numbers = count(1)
    return lambda request: answer(request) if next(numbers) % number == 0 else None


def _renamed(rename: Callable[[str], str]) -> Alter:
    def alter(request: Request, headers: dict[str, str], body: bytes) -> tuple[dict[str, str], bytes]:
        renamed = {
            (_MARK + rename(name[len(_MARK) :]) if name.lower().startswith(_MARK) else name): value
            for name, value in headers.items()
        }
        return renamed, body

    return alter


def _without_metadata(request: Request, headers: dict[str, str], body: bytes) -> tuple[dict[str, str], bytes]:
    return {name: value for name, value in headers.items() if not name.lower().startswith(_MARK)}, body


def _without_token(request: Request, headers: dict[str, str], body: bytes) -> tuple[dict[str, str], bytes]:
    """Answer ListObjectsV2 as the older ListObjects does: without a continuation token, and truncated after two keys."""
    if "list-type=2" not in request.path:
        return headers, body
    body = re.sub(rb"<NextContinuationToken>.*?</NextContinuationToken>|<KeyCount>.*?</KeyCount>", b"", body)
    entries = re.findall(rb"<Contents>.*?</Contents>", body, flags=re.DOTALL)
    for entry in entries[2:]:
        body = body.replace(entry, b"")
    if len(entries) > 2:
        body = re.sub(rb"<IsTruncated>.*?</IsTruncated>", b"<IsTruncated>true</IsTruncated>", body)
    return {**headers, "Content-Length": str(len(body))}, body


def _other_codes(request: Request, headers: dict[str, str], body: bytes) -> tuple[dict[str, str], bytes]:
    body = body.replace(b"NoSuchKey", b"ObjectNotFound")
    return ({**headers, "Content-Length": str(len(body))} if request.method == "GET" else headers), body


def _tagged(request: Request, headers: dict[str, str], body: bytes) -> tuple[dict[str, str], bytes]:
    if "partNumber" in request.path:
        return headers, body
    return {name: '"a-tag"' if name.lower() == "etag" else value for name, value in headers.items()}, body


def _error_pages() -> Alter:
    """Return a function that answers the first upload and the first download of a file with an error of status 200."""
    left = {"PUT", "GET"}
    page = b'<?xml version="1.0"?>\n<Error><Code>InternalError</Code></Error>'

    def alter(request: Request, headers: dict[str, str], body: bytes) -> tuple[dict[str, str], bytes]:
        is_listing = "list-type" in request.path
        if request.method not in left or is_listing or b"<Error>" in body or (request.method == "GET" and not body):
            return headers, body
        left.remove(request.method)
        return {"Content-Length": str(len(page)), "Content-Type": "application/xml"}, page

    return alter


def _cut_short() -> Alter:
    """Return a function that cuts the connection in the middle of the first two downloads."""
    numbers = count()

    def alter(request: Request, headers: dict[str, str], body: bytes) -> tuple[dict[str, str], bytes]:
        is_file = request.method == "GET" and "list-type" not in request.path and len(body) > 1
        if not is_file or next(numbers) >= 2:
            return headers, body
        return {**headers, "Connection": "close"}, body[: len(body) // 2]

    return alter


def _tls(folder: Path) -> ssl.SSLContext:
    """Return a TLS context with a self-signed certificate for this machine. The certificate is written to the folder."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "icl tests")])
    now = datetime.datetime.now(datetime.timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "certificate.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    secret = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    (folder / "key.pem").write_bytes(secret)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "certificate.pem", folder / "key.pem")
    return context
