"""Damaged files of stored estimates are ignored, whatever their content claims, and the estimates are computed again."""

import dataclasses
import io
import json
import random
import shutil
import zipfile

import numpy as np
import pytest
from sampling.llc_runs import QUICK, make_run, write_older_estimate

from icl.runs.measure import Entry
from icl.sampling.records import VERSION, EstimateSettings, read_all
from icl.sampling.run import estimate_run
from tests.reliability.mutations import claim_size, flip_bits

SAMPLER = dataclasses.replace(QUICK, num_draws=2, num_burnin_steps=1, num_init_batches=2, steps="60")


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """Return a run with one estimate in the format of 0.1.0: its folder, the file, the bytes of the file, and the record."""
    folder = make_run(tmp_path_factory.mktemp("runs") / "run")
    (record,) = estimate_run(folder.path, SAMPLER).records
    shutil.rmtree(folder.results / "llc")
    file = write_older_estimate(folder, record)
    return folder, file, file.read_bytes(), record


def arrays_of(data):
    with np.load(io.BytesIO(data)) as saved:
        return dict(saved)


def as_npz(arrays, save=np.savez):
    buffer = io.BytesIO()
    save(buffer, **arrays)
    return buffer.getvalue()


def saying(data, change):
    """Return the file with a changed description."""
    arrays = arrays_of(data)
    about = json.loads(str(arrays["about"]))
    change(about)
    return as_npz(arrays | {"about": np.array(json.dumps(about))})


def damages(data):
    """Yield the names and the bytes of damaged copies of the file."""
    arrays = arrays_of(data)
    name = next(name for name in arrays if name != "about")
    yield "empty", b""
    yield "short", data[: len(data) // 2]
    yield "zeros", bytes(len(data))
    yield "flipped", flip_bits(data, random.Random(0))
    yield "no zip", b"PK\x03\x04"
    yield "no description", as_npz({name: array for name, array in arrays.items() if name != "about"})
    yield "another description", as_npz(arrays | {"about": np.array("{}")})
    yield "nested", as_npz(arrays | {"about": np.array("[" * 100_000)})
    yield "another type", as_npz(arrays | {name: arrays[name].astype("U9")})
    yield "pickled", as_npz(arrays | {name: np.array([{}], dtype=object)})
    for seed in range(6):
        yield f"huge claim {seed}", claim_size(data, random.Random(seed))
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("about.npy", bytes(2**27))
    yield "bomb", bomb.getvalue()


def replace(*keys, value):
    """Return a function that replaces the value at a path of keys."""

    def change(about):
        for key in keys[:-1]:
            about = about[key]
        about[keys[-1]] = value

    return change


WRONG = [
    replace("row", "llc", value="high"),
    replace("row", "step", value=float("inf")),
    replace("row", "step", value=30),
    replace("row", "verdict", value=1),
    replace("row", "verdict", value="fine"),
    replace("row", "settings", value="00000000"),
    replace("row", "rhat", value=[1]),
    replace("row", value=[]),
    replace("row", value={}),
    replace("positions", value=3),
    replace("positions", 0, "position", value="x"),
    replace("stride", value=0),
    replace("stride", value=1.5),
]


def test_an_estimate_of_0_1_0_stays_in_the_tables_and_is_made_again_when_asked_for(sampled):
    folder, file, data, record = sampled
    (kept,) = read_all(folder)
    assert {name: repr(value) for name, value in kept.row.items()} == {
        name: repr(value) for name, value in record.row.items()
    }
    assert np.array_equal(kept.traces, record.traces)
    assert (kept.positions, kept.stride) == (record.positions, record.stride)
    (again,) = estimate_run(folder.path, SAMPLER).records
    assert again.row["llc"] == record.row["llc"]
    assert not file.exists()
    assert len(read_all(folder)) == 1
    (file.with_suffix(".json")).unlink()
    file.write_bytes(data)


def test_a_damaged_estimate_of_0_1_0_counts_as_none(sampled):
    folder, file, data, _ = sampled
    trials = dict(damages(data)) | {f"wrong {number}": saying(data, change) for number, change in enumerate(WRONG)}
    for name, content in trials.items():
        file.write_bytes(content)
        assert read_all(folder) == [], name
    file.unlink()
    file.mkdir()
    assert read_all(folder) == []
    file.rmdir()
    file.write_bytes(data)


@pytest.mark.parametrize(
    "change",
    [
        {"llc": "high"},
        {"step": float("inf")},
        {"step": 30},
        {"verdict": 1},
        {"verdict": "fine"},
        {"settings": "00000000"},
        {"rhat": [1]},
        {"stride": 0},
        {"stride": 1.5},
        {"stride": None},
    ],
)
def test_a_strangers_estimate_with_a_right_digest_counts_as_none(sampled, change):
    folder, _, _, record = sampled
    settings = EstimateSettings(SAMPLER)
    cache, key = settings.cache(folder), {"checkpoint_hash": "abc", "settings": settings.key, "version": VERSION}
    row, *positions = record.measurement.rows
    for rows in ([row | change, *positions], [], [row, {"position": "x"}]):
        cache.write(Entry(60, "abc", rows, record.measurement.arrays), key)
        assert [kept.row["checkpoint_hash"] for kept in read_all(folder)] == []
    cache.write(Entry(60, "abc", [row, *positions], {"traces": np.zeros(3)}), key)
    assert read_all(folder) == []
    for file in cache.folder.glob("step-000000060.*"):
        file.unlink()


def test_a_damaged_estimate_is_made_again(sampled):
    folder, _, _, record = sampled
    estimate_run(folder.path, SAMPLER)
    settings = EstimateSettings(SAMPLER)
    for suffix in ("json", "npy"):
        file = settings.cache(folder).folder / f"step-000000060.{suffix}"
        data = file.read_bytes()
        file.write_bytes(flip_bits(data, random.Random(0)))
        (again,) = estimate_run(folder.path, SAMPLER).records
        assert again.row["llc"] == record.row["llc"]
        assert file.read_bytes() == data
