"""Servers that refuse, drop or change parts of S3: `icl` works without these parts, and says once what is less safe."""

import os

import pytest
from s3_server import SECRET, use_server

from icl.files.writing import StorageError
from icl.store import s3, s3_requests, waiting
from icl.store.base import MissingKeyError
from icl.store.s3 import S3Store
from tests.reliability.stand_ins import stand_ins, start

NAMES = [stand_in.name for stand_in in stand_ins()]
ALIKE = {
    "names of metadata with underscores",
    "metadata refused, 400",
    "checksum headers refused, 501, over TLS",
    "If-None-Match refused, 501",
    "ListObjectsV2 refused, 501",
    "Expect refused, 417",
    "500 after every fifth request",
    "503 SlowDown at first",
}
"""Tried by the slow tests and by `tests.reliability.refusals` only: others are much like them."""
PART = 5 * 2**20


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setattr(s3_requests, "_lacking", {})
    monkeypatch.setattr(s3, "SETTLE_SECONDS", 0.01)
    monkeypatch.setattr(waiting, "NOTICE_SECONDS", 30.0)  # other programs may keep this machine busy


@pytest.fixture
def server(request, s3, monkeypatch, tmp_path):
    """Return a stand-in, by its name, and its proxy. The environment makes `icl` use the proxy."""
    stand_in = next(found for found in stand_ins() if found.name == request.param)
    proxy, environment = start(stand_in, s3.endpoint, tmp_path)
    use_server(monkeypatch, proxy.endpoint)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "4")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    yield stand_in, proxy
    proxy.close()


@pytest.mark.parametrize(
    "server", [pytest.param(name, marks=pytest.mark.slow if name in ALIKE else ()) for name in NAMES], indirect=True
)
def test_every_server_keeps_files_whole_and_is_spoken_of_once(s3, server, capsys):
    stand_in, _ = server
    values = {
        "a/1": b"one",
        "a/2": b"",
        "a/3": os.urandom(300),
        "b": os.urandom(PART + 1 if stand_in.is_about_large_files else 3),
    }
    for store in (S3Store(s3.bucket, "runs", part_size=PART) for _ in range(2)):
        store.check()
        assert store.create("id", b"mine") == (store.keys("a") == [])
        assert not store.create("id", b"other")
        for key, value in values.items():
            store.write(key, value)
        assert store.keys() == sorted([*values, "id"])
        assert {key: store.read(key) for key in values} == values
        assert [store.digest(key) for key in values] == [s3_requests.sha256(value) for value in values.values()]
        with pytest.raises(MissingKeyError):
            store.read("absent")
        with pytest.raises(MissingKeyError):
            store.digest("absent")
        store.delete("absent")
    said = capsys.readouterr().err
    assert SECRET not in said
    assert said.count("\n") == (1 if stand_in.said else 0), said
    assert stand_in.said in said


@pytest.mark.parametrize("server", ["unsigned bodies refused, over TLS"], indirect=True)
def test_every_request_is_signed_with_its_body_and_asks_for_nothing_new(s3, server):
    _, proxy = server
    seen = []
    plain = proxy.refuse
    proxy.refuse = lambda request: seen.append(request) or plain(request)
    store = S3Store(s3.bucket, part_size=PART)
    store.write("a", os.urandom(PART + 1))
    store.read("a")
    names = {name for request in seen for name in request.headers}
    assert not [name for name in names if "checksum" in name or "trailer" in name or name == "expect"]
    assert not [
        name for request in seen for name in ("content-encoding",) if "chunked" in request.headers.get(name, "")
    ]


@pytest.mark.parametrize("server", ["metadata dropped"], indirect=True)
def test_where_metadata_is_dropped_a_file_that_was_lost_is_found_when_it_is_read_back(s3, server):
    _, proxy = server
    plain = proxy.alter

    def alter(request, headers, body):
        headers, body = plain(request, headers, body)
        return headers, b"x" * len(body) if request.method == "GET" and body else body

    proxy.alter = alter
    with pytest.raises(StorageError, match="although the server accepted the file"):
        S3Store(s3.bucket).write("a", b"what was written")


def test_a_file_that_is_altered_in_the_store_is_found_by_its_tag(s3, proxy):
    def alter(request, headers, body):
        if request.method == "PUT":
            s3.corrupt("a", lambda data: data[::-1])
        return headers, body

    proxy.alter = alter
    with pytest.raises(StorageError, match="although the server accepted the file"):
        S3Store(s3.bucket).write("a", b"correct")


def test_a_redirection_without_a_region_is_one_sentence(s3, proxy):
    proxy.refuse = lambda request: (301, "PermanentRedirect")
    with pytest.raises(StorageError, match="AWS_DEFAULT_REGION if the bucket is in another region"):
        S3Store(s3.bucket).check()


def test_a_redirection_to_the_page_of_a_login_is_not_called_another_region(s3, proxy):
    proxy.refuse = lambda request: (302, "")
    with pytest.raises(StorageError, match="address of a login page or a proxy"):
        S3Store(s3.bucket).check()


def test_an_upload_that_breaks_off_is_tried_again(s3, proxy, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "4")
    left = [1, 1]
    plain = proxy.refuse

    def refuse(request):
        if request.method == "PUT" and left:
            left.pop()
            raise ConnectionAbortedError
        return plain(request)

    proxy.refuse = refuse
    store = S3Store(s3.bucket, part_size=PART)
    value = os.urandom(2 * PART)
    store.write("a", value)
    assert not left
    assert store.read("a") == value


def test_parts_of_an_upload_that_fails_are_removed(s3, proxy):
    proxy.refuse = lambda request: (403, "AccessDenied") if "partNumber=2" in request.path else None
    with pytest.raises(StorageError, match="grant them the right to"):
        S3Store(s3.bucket, part_size=PART).write("a", os.urandom(PART + 1))
    assert "Uploads" not in s3.client.list_multipart_uploads(Bucket=s3.bucket)


@pytest.mark.parametrize("server", ["If-None-Match ignored"], indirect=True)
def test_where_conditions_are_ignored_a_place_goes_to_whoever_wrote_last(s3, server, monkeypatch):
    from icl.store.s3_requests import Requests

    store, other = S3Store(s3.bucket), S3Store(s3.bucket)
    plain = Requests.knows_conditions

    def meanwhile(requests, key, data):
        known = plain(requests, key, data)
        monkeypatch.setattr(Requests, "knows_conditions", plain)
        other._requests.put("id", b"other's")  # both had seen that there was none
        return known

    monkeypatch.setattr(Requests, "knows_conditions", meanwhile)
    assert not store.create("id", b"mine")
    assert store.read("id") == b"other's"
