"""Cached measurements: stored under a key, completely or not at all; damaged files are ignored; arrays can be read in parts."""

import json

import numpy as np
import pytest

from icl.files.arrays import write_array
from icl.files.reading import ContentError
from icl.runs.measure import Cache, Entry

KEY = {"checkpoint_hash": "abc", "settings": {"n": 3}, "version": 1}
ROWS = [{"quantity": "loss", "value": 0.5}, {"quantity": "gap", "value": float("nan")}]
ARRAYS = {"true/loss": np.arange(12.0, dtype=np.float32).reshape(3, 4), "state": np.arange(5, dtype=np.float32)}


@pytest.fixture
def cache(tmp_path) -> Cache:
    cache = Cache(tmp_path / "made-up")
    cache.write(Entry(60, "abc", ROWS, ARRAYS), KEY)
    return cache


def test_an_entry_is_read_as_it_was_written(cache):
    entry = cache.read(60, KEY)
    assert repr(entry.rows) == repr(ROWS)
    assert (entry.step, entry.checkpoint_hash) == (60, "abc")
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(entry.arrays[name], array)
        assert entry.arrays[name].dtype == array.dtype


def test_an_entry_without_arrays_is_one_file(tmp_path):
    cache = Cache(tmp_path)
    cache.write(Entry(3, "abc", ROWS), KEY)
    assert [file.name for file in tmp_path.iterdir()] == ["step-000000003.json"]
    assert cache.read(3, KEY).arrays == {}


@pytest.mark.parametrize("change", [{"checkpoint_hash": "x"}, {"settings": {"n": 4}}, {"version": 2}])
def test_an_entry_of_another_key_counts_as_none(cache, change):
    assert cache.read(60, KEY | change) is None
    assert cache.read(60) is not None
    assert cache.read(30) is None


def test_steps_are_those_of_the_same_settings_and_version(cache):
    cache.write(Entry(7, "other", []), KEY | {"checkpoint_hash": "other"})
    cache.write(Entry(9, "abc", []), KEY | {"version": 2})
    (cache.folder / "step-000000011.json").write_text("{")
    assert cache.steps({"n": 3}, 1) == {7, 60}
    assert cache.steps({"n": 5}, 1) == set()


def test_an_array_is_read_where_it_lies(cache):
    stored = cache.stored_array(60, "state")
    assert len(stored) == 5
    np.testing.assert_array_equal(stored[:], ARRAYS["state"])
    np.testing.assert_array_equal(stored[3:2000], ARRAYS["state"][3:])
    assert len(cache.stored_array(60, "true/loss")) == 12
    with pytest.raises(KeyError):
        cache.stored_array(60, "missing")


def test_the_entry_as_version_0_1_0_kept_it_goes(cache):
    older = cache.folder / "step-000000060.npz"
    older.write_bytes(b"any")
    cache.write(Entry(60, "abc", ROWS, ARRAYS), KEY)
    assert not older.exists()


def wrong_contents(text: str):
    """Return faulty contents of the JSON file, by name. Even with a matching digest, they must be refused."""
    content = json.loads(text)
    yield "empty", ""
    yield "short", text[: len(text) // 2]
    yield "nested", "[" * 100_000
    yield "no table", "[]"
    yield "a changed digit", text.replace("0.5", "0.6")
    yield "no digest", json.dumps({name: value for name, value in content.items() if name != "digest"})
    yield "another digest", json.dumps(content | {"digest": "0" * 32})


def test_a_damaged_entry_counts_as_none(cache):
    file, numbers = cache.folder / "step-000000060.json", cache.folder / "step-000000060.npy"
    text, data = file.read_text(), numbers.read_bytes()
    for name, content in wrong_contents(text):
        file.write_text(content)
        assert cache.read(60, KEY) is None, name
        with pytest.raises(ContentError):
            cache.stored_array(60, "state")
    file.write_text(text)
    huge = data.replace(b"(17,)", b"(1700000000000,)").replace(b" " * 11 + b"\n", b"\n")
    for damaged in (b"", data[:-1], data[:50], bytes(len(data)), data[:-2] + b"xx", huge):
        numbers.write_bytes(damaged)
        assert cache.read(60, KEY) is None
    write_array(numbers, np.zeros(17, dtype=np.float32))
    assert cache.read(60, KEY) is None
    numbers.unlink()
    assert cache.read(60, KEY) is None
    with pytest.raises(ContentError):
        cache.stored_array(60, "state")


def forged(cache: Cache, **changes) -> None:
    """Write the JSON file with other content and a matching digest, as a stranger could."""
    from icl.runs.measure import _digest

    content = json.loads((cache.folder / "step-000000060.json").read_text()) | changes
    del content["digest"]
    (cache.folder / "step-000000060.json").write_text(json.dumps({"digest": _digest(content), **content}))


@pytest.mark.parametrize(
    "changes",
    [
        *({"rows": value} for value in (3, {}, [3], [{"value": []}], None)),
        *({"places": value} for value in ([], 3, None, {"state": 3}, {"state": [0, 5]}, {"state": [0, 5, [2, 2]]})),
        *({"places": {"state": place}} for place in (["a", 5, [5]], [0, 5, [10**30]], [0, 5, [-1, -1]])),
        *({"key": value} for value in (None, [], {"settings": {"n": 3}})),
        {"array_digest": None},
    ],
)
def test_a_strangers_entry_counts_as_none(cache, changes):
    forged(cache, **changes)
    assert cache.read(60, KEY) is None
    assert cache.read(60) is None
    cache.steps({"n": 3}, 1)
