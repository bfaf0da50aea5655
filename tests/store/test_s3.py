"""The S3 store with a real server over HTTP: long listings, parts, damage, failing servers, and no secret in any message."""

import itertools
import re
import threading

import pytest
from s3_server import SECRET, use_server

from icl.files.writing import StorageError
from icl.runs.checkpoints import checkpoint_name, list_steps
from icl.store import s3_requests, waiting
from icl.store.s3 import S3Store


@pytest.fixture
def store(s3) -> S3Store:
    return S3Store(s3.bucket, "runs/a", part_size=5 * 2**20)


def refusal(ask) -> str:
    with pytest.raises(StorageError) as error:
        ask()
    said = str(error.value)
    assert SECRET not in said
    assert "\n" not in said
    return said


def test_more_than_a_page_of_checkpoints_is_listed_in_numeric_order(s3):
    steps = [*range(0, 10_050, 10), 10**9 + 1, 999_999_999]
    s3.fill(f"runs/a/checkpoints/{checkpoint_name(step)}" for step in steps)
    assert len(steps) > 1000
    assert list_steps(S3Store(s3.bucket, "runs/a/checkpoints")) == sorted(steps)


def test_a_large_value_goes_up_in_parts_and_comes_back(s3, store):
    data = bytes(range(256)) * (12 * 2**12)  # 12 MiB
    store.write("large", data)
    assert s3.client.head_object(Bucket=s3.bucket, Key="runs/a/large")["ETag"].endswith('-3"')
    assert store.read("large") == data


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:-1], lambda data: b"x" + data[1:], lambda data: b""],
    ids=["cut short", "altered", "emptied"],
)
def test_a_damaged_object_is_found_by_reading_it(s3, store, damage):
    store.write("a", b"what was saved")
    s3.corrupt("runs/a/a", damage)
    assert "runs/a/a is damaged" in refusal(lambda: store.read("a"))


def test_an_object_of_another_program_is_read(s3, store):
    s3.client.put_object(Bucket=s3.bucket, Key="runs/a/foreign", Body=b"plain")
    assert store.read("foreign") == b"plain"
    assert re.fullmatch(r"[0-9a-f]{64}", store.digest("foreign"))


def test_a_server_that_takes_a_value_and_loses_it_is_found_at_once(store, proxy):
    proxy.answer = lambda method, path: 200 if method == "PUT" else None
    assert "runs/a/a" in refusal(lambda: store.write("a", b"gone"))


@pytest.mark.parametrize("status", [500, 503])
def test_a_server_that_fails_for_a_while_is_asked_again(store, proxy, monkeypatch, status):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "4")
    numbers = itertools.count()
    proxy.answer = lambda method, path: status if next(numbers) < 2 else None
    store.write("a", b"1")
    assert store.read("a") == b"1"


def test_a_server_that_fails_for_good_is_named_with_its_answer(store, proxy):
    proxy.answer = lambda method, path: 503
    assert "runs/a/a cannot be used: the server answered 503" in refusal(lambda: store.write("a", b"1"))
    assert len(proxy.requests) == 2


def test_a_server_that_talks_nonsense_is_one_sentence(store, proxy):
    proxy.answer = lambda method, path: f"<html>{SECRET}".encode()
    assert "cannot be used" in refusal(store.keys)
    assert "cannot be used" in refusal(store.check)


@pytest.mark.parametrize(
    "page", [b"<html><body>Log in</body></html>", b"<!DOCTYPE html><html></html>", b"<a/>", 200], ids=repr
)
def test_a_page_of_another_service_is_no_empty_bucket(store, proxy, page):
    proxy.answer = lambda method, path: page
    for act in (store.check, store.keys):
        with pytest.raises(StorageError, match="the address of its S3 service"):
            act()


@pytest.mark.parametrize("is_new", [False, True])
def test_a_listing_without_an_end_is_given_up(store, proxy, is_new, monkeypatch):
    monkeypatch.setattr(s3_requests, "MAX_PAGES", 20)
    numbers = itertools.count()

    def page(method, path):
        number = next(numbers)
        key = f"runs/a/{number if is_new else 0}"
        return (
            "<?xml version='1.0'?><ListBucketResult><IsTruncated>true</IsTruncated>"
            f"<NextContinuationToken>{number}</NextContinuationToken><Contents><Key>{key}</Key></Contents></ListBucketResult>"
        ).encode()

    proxy.answer = page
    with pytest.raises(StorageError, match="the address of its S3 service"):
        store.keys()
    assert next(numbers) < 50


def test_a_server_that_keeps_nothing_of_what_it_takes_is_told_as_such(store, proxy):
    proxy.refuse = lambda request: (404, "NoSuchKey") if request.method in ("GET", "HEAD") else None
    for act in (store.write, store.create):
        with pytest.raises(StorageError, match="although the server accepted the file"):
            act("key", b"data")


def test_a_bucket_that_does_not_exist_is_named(s3):
    assert "the bucket does not exist" in refusal(S3Store("no-such-bucket").check)


def test_missing_credentials_are_named_before_anything_is_sent(s3, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in refusal(S3Store(s3.bucket).check)


def test_refused_credentials_are_named(s3, proxy):
    proxy.answer = lambda method, path: 403
    assert "AWS_SECRET_ACCESS_KEY" in refusal(S3Store(s3.bucket).check)


def test_an_endpoint_that_does_not_answer_is_named_without_what_it_carries(s3, proxy, monkeypatch):
    proxy.close()
    use_server(monkeypatch, proxy.endpoint.replace("//", f"//user:{SECRET}@"))
    said = refusal(S3Store(s3.bucket).check)
    assert proxy.endpoint.removeprefix("http://") in said
    assert "AWS_ENDPOINT_URL" in said


def test_an_endpoint_that_is_no_url_is_one_sentence(s3, monkeypatch):
    use_server(monkeypatch, "not a url")
    assert "AWS_ENDPOINT_URL" in refusal(S3Store(s3.bucket).check)


def test_create_works_where_the_server_knows_no_conditions(store, proxy):
    numbers = itertools.count()
    proxy.answer = lambda method, path: 501 if method == "PUT" and next(numbers) == 0 else None
    assert store.create("a", b"1")
    assert not store.create("a", b"2")
    assert store.read("a") == b"1"


def test_a_write_on_which_we_gave_up_is_not_repeated_after_a_later_write(s3, proxy, monkeypatch):
    """The server answers the first try so late that we have given up on it, and asks for another try."""
    store = S3Store(s3.bucket, "runs/a")
    gave_up = threading.Event()

    def answer(method: str, path: str) -> int | None:
        if method == "PUT" and not gave_up.is_set():
            gave_up.wait(60)
            return 503
        return None

    store.write("other", b"so that the client exists")
    proxy.answer = answer
    monkeypatch.setattr(waiting, "SECONDS", 0.5)
    num_left = len(waiting._left)
    with pytest.raises(StorageError, match="no progress"):
        store.write("last.ckpt", b"old")
    s3.client.put_object(Bucket=s3.bucket, Key="runs/a/last.ckpt", Body=b"new")
    gave_up.set()
    waiting._left[num_left].join(30)
    assert s3.get("runs/a/last.ckpt") == b"new"
