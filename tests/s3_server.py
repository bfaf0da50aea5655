"""A local S3 server, and a proxy in front of it that fails, alters answers or disappears when a test asks it to."""

import contextlib
import http.client
import logging
import ssl
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import boto3
import pytest

SECRET = "wJalrXUtnFEMI-never-to-be-seen"
_numbers = count()


@cache
def _client(endpoint: str) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id="tests",
        aws_secret_access_key=SECRET,
    )


class S3Server:
    """A bucket for one test, and a client that accesses it directly."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.bucket = f"bucket-{next(_numbers)}"
        self.client = _client(endpoint)
        self.client.create_bucket(Bucket=self.bucket)

    @property
    def url(self) -> str:
        """URL of the store that uses the whole bucket."""
        return f"s3://{self.bucket}"

    def fill(self, keys: Iterable[str]) -> None:
        """Create empty objects without the network, so that a thousand objects take no time."""
        from moto.core import DEFAULT_ACCOUNT_ID
        from moto.s3.models import s3_backends

        for key in keys:
            s3_backends[DEFAULT_ACCOUNT_ID]["aws"].put_object(self.bucket, key, b"")

    def copy_of(self, bucket: str) -> None:
        """Copy all objects of another bucket with their metadata, without the network."""
        from moto.core import DEFAULT_ACCOUNT_ID
        from moto.s3.models import s3_backends

        backend = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
        for name, key in backend.buckets[bucket].keys.items():
            copy = backend.put_object(self.bucket, name, key.value)
            copy.set_metadata({name: value for name, value in key.metadata.items() if name.startswith("x-amz-meta-")})

    @contextlib.contextmanager
    def holding(self, key: str) -> Iterator[None]:
        """Create an empty object, and delete it when the context ends. Its name may be one that cannot be sent in a request."""
        from moto.core import DEFAULT_ACCOUNT_ID
        from moto.s3.models import s3_backends

        self.fill([key])
        yield
        s3_backends[DEFAULT_ACCOUNT_ID]["aws"].delete_object(self.bucket, key)

    def names(self) -> list[str]:
        """Return the keys of all objects in the bucket."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket)
        return [entry["Key"] for page in pages for entry in page.get("Contents", [])]

    def get(self, key: str) -> bytes:
        """Return the bytes of an object."""
        return self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read()

    def corrupt(self, key: str, change: Callable[[bytes], bytes]) -> None:
        """Change the bytes of an object but not its metadata, as a broken disk would."""
        stored = self.client.get_object(Bucket=self.bucket, Key=key)
        data = change(stored["Body"].read())
        self.client.put_object(Bucket=self.bucket, Key=key, Body=data, Metadata=stored["Metadata"])


class Request(NamedTuple):
    """A client's request. The names of its headers are in lower case."""

    method: str
    path: str
    headers: dict[str, str]
    data: bytes


class Proxy:
    """Proxy that forwards requests to a server.

    A test can set `answer(method, path)`. If it returns a status or bytes, the proxy answers with these. If it returns None, the
    request is forwarded.

    Args:
        endpoint: Address of the server.
        tls: If given, the proxy uses HTTPS.
    """

    def __init__(self, endpoint: str, tls: ssl.SSLContext | None = None) -> None:
        self.upstream = urlsplit(endpoint).netloc
        self.answer: Callable[[str, str], int | bytes | None] = lambda method, path: None
        self.refuse: Callable[[Request], tuple[int, str] | None] = lambda request: None
        """Function that returns a status and an error code of S3 for the answer, or None to forward the request."""
        self.region = ""
        """Region of the bucket, which the proxy's refusals name."""
        self.alter: Callable[[Request, dict[str, str], bytes], tuple[dict[str, str], bytes]] = (
            lambda request, headers, body: (headers, body)
        )
        """Function that changes the headers and the body of the server's answer."""
        self.requests: list[str] = []
        self.is_gone = False
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self.endpoint = f"http{'s' if tls else ''}://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the proxy at once, even in the middle of a request."""
        self.is_gone = True
        self._server.shutdown()
        self._server.server_close()

    def _handler(proxy) -> type[BaseHTTPRequestHandler]:  # noqa: N805
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _forward(self) -> None:
                if proxy.is_gone:
                    self.close_connection = True
                    return
                proxy.requests.append(f"{self.command} {self.path}")
                data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                answer = proxy.answer(self.command, self.path)
                if answer is not None:
                    body = answer if isinstance(answer, bytes) else b""
                    self._reply(200 if body else answer, {"Content-Length": str(len(body))}, body)
                    return
                request = Request(
                    self.command, self.path, {name.lower(): value for name, value in self.headers.items()}, data
                )
                refusal = proxy.refuse(request)
                if refusal is not None:
                    body = f"<Error><Code>{refusal[1]}</Code><Message>{SECRET}</Message></Error>".encode()
                    body = b"" if self.command == "HEAD" else body
                    about = {"x-amz-bucket-region": proxy.region} if proxy.region else {}
                    about |= {"Content-Length": str(len(body)), "Content-Type": "application/xml"}
                    self._reply(refusal[0], about, body)
                    return
                upstream = http.client.HTTPConnection(proxy.upstream)
                upstream.request(self.command, request.path, data, request.headers)
                response = upstream.getresponse()
                body = response.read()
                dropped = ("transfer-encoding", "connection", "content-length", "date", "server")
                headers = {name: value for name, value in response.getheaders() if name.lower() not in dropped}
                length = response.getheader("Content-Length") if self.command == "HEAD" else str(len(body))
                headers, body = proxy.alter(request, {**headers, "Content-Length": length or "0"}, body)
                self._reply(response.status, headers, body)
                upstream.close()

            def _reply(self, status: int, headers: dict[str, str], body: bytes) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _forward  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        return Handler


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """Return a new bucket, and set the environment so that `icl` uses its server and tries each request twice."""
    use_server(monkeypatch, s3_endpoint)
    return S3Server(s3_endpoint)


@pytest.fixture
def proxy(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Return a proxy between `icl` and the server."""
    proxy = Proxy(s3.endpoint)
    use_server(monkeypatch, proxy.endpoint)
    yield proxy
    proxy.close()


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `icl train` end without its table and figure, which take half of the time of a tiny run."""
    monkeypatch.setattr("icl.cli.train._show_run", lambda folder: None)


def use_server(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    for name, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "tests",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "2",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/nonexistent",
        "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
    }.items():
        monkeypatch.setenv(name, value)
