"""A contract for all stores; a write is complete or has no effect."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from icl.files.writing import StorageError, remove_temporaries, table_format, write_atomically
from icl.store.base import LocalStore, MissingKeyError, Store, sha256
from icl.store.opening import open_store
from icl.store.s3 import S3Store

# The contract


@pytest.fixture(
    params=[
        "folder",
        "file URL",
        "s3",
        "s3 with a prefix",
        "hub with a folder",
        pytest.param("hub", marks=pytest.mark.slow),
    ]
)
def store(request, tmp_path) -> Store:
    if request.param.startswith("hub"):
        server = request.getfixturevalue("hub")
        if "folder" in request.param:
            server.create("user/models", private=True)
            server.commit("user/models", {"runs-of-others/a": b"not mine", "README.md": b"# mine"}, "other")
        return open_store("hf://user/models/runs" if "folder" in request.param else "hf://user/models")
    if not request.param.startswith("s3"):
        return open_store(f"{'file://' if 'URL' in request.param else ''}{tmp_path / 'store'}")
    s3 = request.getfixturevalue("s3")
    s3.client.put_object(Bucket=s3.bucket, Key="runs-of-others/a", Body=b"not mine")
    if "prefix" in request.param:
        return open_store(f"{s3.url}/runs")
    s3.client.delete_object(Bucket=s3.bucket, Key="runs-of-others/a")
    return open_store(s3.url)


def test_every_store_keeps_the_protocol(store):
    assert isinstance(store, Store)
    store.check()


def test_what_is_written_is_read(store):
    store.write("a/b.bin", b"\x00one")
    store.write("a/b.bin", b"two")
    assert store.read("a/b.bin") == b"two"


def test_many_values_are_written_and_deleted_together(store):
    store.write("old", b"1")
    files = {f"many/{number}": b"%d" % number for number in range(60)}
    store.write_many(files, delete=["old"])
    assert store.keys() == sorted(files)
    assert store.read("many/59") == b"59"
    store.write_many({})


def test_a_value_is_read_up_to_a_limit(store):
    store.write("a", b"x" * 200_000)
    assert len(store.read("a", limit=200_000)) == 200_000
    for limit in (199_999, 1000):
        with pytest.raises(StorageError, match=rf"{limit:,}"):
            store.read("a", limit=limit)


def test_keys_are_listed_sorted_and_below_the_prefix(store):
    for key in ("b/2", "b/1", "bc", "b/d/3"):
        store.write(key, b"")
    assert store.keys() == ["b/1", "b/2", "b/d/3", "bc"]
    assert store.keys("b") == ["b/1", "b/2", "b/d/3"]
    assert store.keys("nothing") == []


def test_a_missing_key_is_named(store):
    for ask in (store.read, store.digest):
        with pytest.raises(MissingKeyError, match=r"absent") as refusal:
            ask("absent")
        assert "\n" not in str(refusal.value)
    store.delete("absent")


def test_a_deleted_key_is_gone(store):
    store.write("a", b"1")
    store.delete("a")
    assert store.keys() == []


def test_a_digest_is_that_of_the_value(store):
    store.write("a", b"one")
    assert store.digest("a") == sha256(b"one")
    store.write("a", b"")
    assert store.digest("a") == sha256(b"")
    assert store.read("a") == b""


def test_of_many_who_create_a_key_one_succeeds(store):
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda word: store.create("claim/id", word), [b"%d" % number for number in range(8)]))
    assert sum(made) == 1
    assert store.read("claim/id") == b"%d" % made.index(True)
    assert not store.create("claim/id", b"late")
    assert store.keys() == ["claim/id"]


def test_keys_that_people_write_are_kept(store):
    keys = ["L2H4,num_tasks=inf/step-1", "a b/c+d", "ä/ö"]
    for key in keys:
        store.write(key, key.encode())
    assert store.keys() == sorted(keys)
    assert [store.read(key).decode() for key in keys] == keys


# Opening


def test_the_url_chooses_the_store(tmp_path):
    assert isinstance(open_store("runs"), LocalStore)
    assert isinstance(open_store("S3://bucket"), S3Store)
    assert str(open_store("s3://bucket/a/b/")) == "s3://bucket/a/b"
    assert str(open_store(f"file://{tmp_path}")) == str(tmp_path)


@pytest.mark.parametrize("url", ["gs://bucket", "http://host/a", "s3://", ""])
def test_other_urls_are_refused(url):
    with pytest.raises(
        StorageError, match=r"A store must be a folder, file:///folder, s3://bucket/prefix or hf://USER/REPO, got"
    ):
        open_store(url)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be made"):
        open_store(str(tmp_path / "file" / "store")).check()


# The folder


def test_unfinished_writes_are_not_listed_and_can_be_cleared(tmp_path):
    store = LocalStore(tmp_path)
    store.write("a", b"1")
    (tmp_path / ".tmp-1234-b").write_bytes(b"half")
    assert store.keys() == ["a"]
    remove_temporaries(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_a_failed_write_keeps_the_old_bytes_and_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"No space left on device.*intact"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_tables_are_csv_or_json():
    assert table_format(Path("a.CSV")) == "csv"
    assert table_format(Path("a.json")) == "json"
    with pytest.raises(StorageError, match=r"\.csv or \.json"):
        table_format(Path("a.txt"))
