"""One contract for every store; a write is all there or not at all."""

import os
from pathlib import Path

import pytest

from icl.storage import LocalStore, StorageError, Store, remove_temporaries, table_format, write_atomically


@pytest.fixture
def store(tmp_path) -> Store:
    return LocalStore(tmp_path / "store")


def test_what_is_written_is_read(store):
    store.write("a/b.bin", b"\x00one")
    store.write("a/b.bin", b"two")
    assert store.read("a/b.bin") == b"two"


def test_keys_are_listed_sorted_and_below_the_prefix(store):
    for key in ("b/2", "b/1", "c", "b/d/3"):
        store.write(key, b"")
    assert store.keys() == ["b/1", "b/2", "b/d/3", "c"]
    assert store.keys("b") == ["b/1", "b/2", "b/d/3"]
    assert store.keys("nothing") == []


def test_a_missing_key_is_named(store):
    with pytest.raises(StorageError, match=r"absent"):
        store.read("absent")
    store.delete("absent")


def test_a_deleted_key_is_gone(store):
    store.write("a", b"1")
    store.delete("a")
    assert store.keys() == []


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
