"""A stand-in for the Hugging Face Hub on loopback, with the requests that the real client makes. It can refuse, throttle and break off."""

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

TOKEN = "hf_never_to_be_seen_in_any_output"
PAGE = 50
"""Number of files in one page of a listing."""


class Commit(NamedTuple):
    """One commit: the whole tree, and the paths that it changed."""

    oid: str
    files: dict[str, bytes]
    changed: list[str]
    message: str


class HubServer:
    """Repositories in memory.

    A test can set `refuse(method, path) -> (status, headers) | None`, and `breaks`, the number of uploads that break off.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, list[Commit]]] = {}
        self.private: dict[str, bool] = {}
        self.blobs: dict[str, bytes] = {}
        self.refuse: Callable[[str, str], tuple[int, dict[str, str]] | None] = lambda method, path: None
        self.before_commit: Callable[[], None] = lambda: None
        self.breaks = 0
        self.requests: list[tuple[str, str]] = []
        self.uploads: list[str] = []
        self.lock = threading.RLock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.endpoint = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def commits(self, name: str, branch: str = "main") -> list[Commit]:
        """Commits of a branch, without the first, empty one."""
        return self.repositories[name][branch][1:]

    def files(self, name: str, branch: str = "main") -> dict[str, bytes]:
        """Files at the newest commit."""
        return self.repositories[name][branch][-1].files

    def commit(self, name: str, changes: dict[str, bytes | None], message: str, branch: str = "main") -> str:
        """Add a commit, as another program would."""
        with self.lock:
            history = self.repositories[name][branch]
            files = {path: data for path, data in {**history[-1].files, **changes}.items() if data is not None}
            oid = hashlib.sha1(f"{name}{len(history)}{sorted(files)}".encode(), usedforsecurity=False).hexdigest()
            history.append(Commit(oid, files, sorted(changes), message))
            return oid

    def create(self, name: str, private: bool) -> bool:
        """Make a repository. Return False if it exists."""
        with self.lock:
            if name in self.repositories:
                return False
            self.repositories[name] = {"main": [Commit("0" * 40, {}, [], "initial commit")]}
            self.private[name] = private
            return True

    def find(self, name: str, revision: str) -> Commit | None:
        """The commit of a branch or of a hash."""
        branches = self.repositories[name]
        if revision in branches:
            return branches[revision][-1]
        return next((each for history in branches.values() for each in history if each.oid == revision), None)


def is_large(path: str) -> bool:
    """Whether the Hub keeps a file as LFS."""
    return path.endswith((".safetensors", ".ckpt", ".png", ".npy"))


def _about(path: str, data: bytes) -> dict[str, Any]:
    git = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    about: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": git}
    if is_large(path):
        about["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return about


class _Answer(Exception):
    def __init__(self, status: int, body: Any = None, headers: dict[str, str] | None = None) -> None:
        self.status, self.body, self.headers = status, body, headers or {}


def _missing(kind: str) -> _Answer:
    return _Answer(404, {"error": kind}, {"X-Error-Code": kind, "X-Error-Message": kind})


def _handler(server: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: Any) -> None:
            pass

        def handle_any(self) -> None:
            address = urlsplit(self.path)
            path, self.query = unquote(address.path), parse_qs(address.query)
            server.requests.append((self.command, path))
            length = int(self.headers.get("Content-Length") or 0)
            if self.command == "PUT" and server.breaks > 0:
                server.breaks -= 1
                self.rfile.read(length // 2)
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            self.body = self.rfile.read(length)
            try:
                refusal = server.refuse(self.command, path)
                if refusal is not None:
                    raise _Answer(refusal[0], {"error": "refused"}, refusal[1])
                self.answer(urlsplit(self.path).path)
            except _Answer as answer:
                self.reply(answer)

        do_GET = do_HEAD = do_POST = do_PUT = handle_any  # noqa: N815

        def reply(self, answer: _Answer) -> None:
            body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body or {}).encode()
            self.send_response(answer.status)
            for name, value in {"Content-Length": str(len(body)), **answer.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def require_token(self) -> None:
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                raise _Answer(401, {"error": "Invalid username or password."})

        def commit_of(self, name: str, revision: str) -> Commit:
            hidden = server.private.get(name) and self.headers.get("Authorization") != f"Bearer {TOKEN}"
            if name not in server.repositories or hidden:
                raise _missing("RepoNotFound")
            found = server.find(name, revision)
            if found is None:
                raise _missing("RevisionNotFound")
            return found

        def answer(self, path: str) -> None:
            for pattern, act in _ROUTES:
                match = re.fullmatch(pattern, path)
                if match:
                    act(self, *(unquote(part) for part in match.groups()))
            raise _Answer(404, {"error": f"no route {path}"})

        def whoami(self) -> None:
            self.require_token()
            raise _Answer(200, {"type": "user", "name": "user", "auth": {"type": "access_token"}})

        def validate(self) -> None:
            raise _Answer(200, {"errors": [], "warnings": []})

        def create(self) -> None:
            self.require_token()
            about = json.loads(self.body)
            name = f"{about.get('organization') or 'user'}/{about['name']}"
            private = about.get("private", about.get("visibility") == "private")
            is_new = server.create(name, bool(private))
            raise _Answer(200 if is_new else 409, {"url": f"{server.endpoint}/{name}", "name": name, "id": name})

        def info(self, name: str, revision: str = "main") -> None:
            found = self.commit_of(name, revision)
            raise _Answer(200, {"id": name, "modelId": name, "sha": found.oid, "private": server.private[name]})

        def tree(self, name: str, revision: str, folder: str = "") -> None:
            found = self.commit_of(name, revision)
            entries = [_about(path, data) for path, data in sorted(found.files.items()) if path.startswith(folder)]
            start = int(self.query.get("cursor", ["0"])[0])
            headers = {}
            if start + PAGE < len(entries):
                url = f"{server.endpoint}{urlsplit(self.path).path}?recursive=true&cursor={start + PAGE}"
                headers["Link"] = f'<{url}>; rel="next"'
            raise _Answer(200, json.dumps(entries[start : start + PAGE]).encode(), headers)

        def preupload(self, name: str, revision: str) -> None:
            self.require_token()
            files = json.loads(self.body)["files"]
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if is_large(file["path"]) else "regular",
                    "shouldIgnore": False,
                }
                for file in files
            ]
            raise _Answer(200, {"files": modes})

        def batch(self, name: str) -> None:
            self.require_token()
            objects = [
                each
                if each["oid"] in server.blobs
                else {**each, "actions": {"upload": {"href": f"{server.endpoint}/lfs/{each['oid']}"}}}
                for each in json.loads(self.body)["objects"]
            ]
            raise _Answer(200, {"transfer": "basic", "objects": objects})

        def upload(self, oid: str) -> None:
            if hashlib.sha256(self.body).hexdigest() != oid:
                raise _Answer(400, {"error": "wrong digest"})
            server.blobs[oid] = self.body
            server.uploads.append(oid)
            raise _Answer(200)

        def commit(self, name: str, revision: str) -> None:
            self.require_token()
            server.before_commit()
            lines = [json.loads(line) for line in self.body.splitlines()]
            header = next(line["value"] for line in lines if line["key"] == "header")
            with server.lock:
                if revision not in server.repositories[name]:
                    raise _missing("RevisionNotFound")
                parent = header.get("parentCommit")
                if parent not in (None, server.repositories[name][revision][-1].oid):
                    raise _Answer(412, {"error": "A commit has happened since. Please refresh and try again."})
                changes: dict[str, bytes | None] = {}
                for line in lines:
                    value = line["value"]
                    if line["key"] == "file":
                        changes[value["path"]] = base64.b64decode(value["content"])
                    elif line["key"] == "lfsFile":
                        changes[value["path"]] = server.blobs[value["oid"]]
                    elif line["key"] == "deletedFile":
                        changes[value["path"]] = None
                oid = server.commit(name, changes, header["summary"], revision)
            raise _Answer(
                200, {"commitUrl": f"{server.endpoint}/{name}/commit/{oid}", "commitOid": oid, "success": True}
            )

        def resolve(self, name: str, revision: str, path: str) -> None:
            found = self.commit_of(name, revision)
            if path not in found.files:
                raise _missing("EntryNotFound")
            data = found.files[path]
            about = _about(path, data)
            etag = about["lfs"]["oid"] if "lfs" in about else about["oid"]
            headers = {"X-Repo-Commit": found.oid, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
            match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
            if match:
                start = int(match[1])
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
                raise _Answer(206, data[start:], headers)
            raise _Answer(200, data, headers)

    return Handler


_NAME, _REST = r"([^/]+/[^/]+)", r"([^/]+)"
_ROUTES: list[tuple[str, Callable[..., None]]] = [
    (r"/api/whoami-v2", lambda handler: handler.whoami()),
    (r"/api/validate-yaml", lambda handler: handler.validate()),
    (r"/api/repos/create", lambda handler: handler.create()),
    (rf"/api/models/{_NAME}", lambda handler, *parts: handler.info(*parts)),
    (rf"/api/models/{_NAME}/revision/{_REST}", lambda handler, *parts: handler.info(*parts)),
    (rf"/api/models/{_NAME}/tree/{_REST}", lambda handler, *parts: handler.tree(*parts)),
    (rf"/api/models/{_NAME}/tree/{_REST}/(.*)", lambda handler, *parts: handler.tree(*parts)),
    (rf"/api/models/{_NAME}/preupload/{_REST}", lambda handler, *parts: handler.preupload(*parts)),
    (rf"/api/models/{_NAME}/commit/{_REST}", lambda handler, *parts: handler.commit(*parts)),
    (rf"/{_NAME}\.git/info/lfs/objects/batch", lambda handler, *parts: handler.batch(*parts)),
    (r"/lfs/([0-9a-f]+)", lambda handler, *parts: handler.upload(*parts)),
    (rf"/{_NAME}/resolve/{_REST}/(.*)", lambda handler, *parts: handler.resolve(*parts)),
]


@contextlib.contextmanager
def running() -> Iterator[HubServer]:
    """Run a stand-in for a while."""
    server = HubServer()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[HubServer]:
    """A stand-in, a token, and no files of the client outside of the test's folder."""
    pytest.importorskip("huggingface_hub")
    from icl.store import hub as module

    with running() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
        yield server
        module._REPOSITORIES.clear()
