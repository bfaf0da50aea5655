"""Kept estimates and parts: whatever a damaged file claims, it is as if there were none, and the numbers are made again."""

import dataclasses
import io
import json
import random
import zipfile

import numpy as np
import pytest
from sampling.llc_runs import QUICK, make_run

from icl.analysis.parts import Part, read_part, write_part
from icl.sampling.records import Kind, read_all, read_record
from icl.sampling.run import estimate_run, with_nbeta
from tests.reliability.mutations import claim_size, flip_bits

SAMPLER = dataclasses.replace(QUICK, num_draws=2, num_burnin_steps=1, num_init_batches=2, steps="60")
KEY = {"checkpoint_hash": "abc", "settings": {"n": 3}}


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """A run with one kept estimate: its folder, the file, its bytes, the estimate."""
    folder = make_run(tmp_path_factory.mktemp("runs") / "run")
    (record,) = estimate_run(folder.path, SAMPLER).records
    (file,) = folder.results.glob("llc/*/step-*.npz")
    return folder, file, file.read_bytes(), record


def arrays_of(data):
    with np.load(io.BytesIO(data)) as saved:
        return dict(saved)


def as_npz(arrays, save=np.savez):
    buffer = io.BytesIO()
    save(buffer, **arrays)
    return buffer.getvalue()


def saying(data, change):
    """The file as 0.1.0 would have written it, without a digest, with a changed description."""
    arrays = arrays_of(data)
    del arrays["digest"]
    about = json.loads(str(arrays["about"]))
    change(about)
    return as_npz(arrays | {"about": np.array(json.dumps(about))})


def damages(data):
    """The ways in which both kinds of files are damaged."""
    arrays = arrays_of(data)
    name = next(name for name in arrays if name not in ("about", "digest"))
    yield "empty", b""
    yield "short", data[: len(data) // 2]
    yield "zeros", bytes(len(data))
    yield "flipped", flip_bits(data, random.Random(0))
    yield "no zip", b"PK\x03\x04"
    yield "no description", as_npz({name: array for name, array in arrays.items() if name != "about"})
    yield "another description", as_npz(arrays | {"about": np.array("{}")})
    yield "nested", as_npz(arrays | {"about": np.array("[" * 100_000)})
    yield "another array", as_npz(arrays | {name: arrays[name] + 1})
    yield "another type", as_npz(arrays | {name: arrays[name].astype("U9")})
    yield "pickled", as_npz(arrays | {name: np.array([{}], dtype=object)})
    for seed in range(6):
        yield f"huge claim {seed}", claim_size(data, random.Random(seed))
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("about.npy", bytes(2**27))
    yield "bomb", bomb.getvalue()


def replace(*keys, value):
    """A change of the value at a path of keys."""

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
    replace("settings", value=None),
    replace("rules", value=None),
]


def test_an_undamaged_estimate_is_read_with_or_without_its_digest(sampled):
    folder, file, data, record = sampled
    kind = Kind(with_nbeta(SAMPLER))
    for content in (data, saying(data, lambda about: None)):
        file.write_bytes(content)
        kept = read_record(folder, kind, 60, record.row["checkpoint_hash"])
        assert kept is not None
        assert {name: repr(value) for name, value in kept.row.items()} == {
            name: repr(value) for name, value in record.row.items()
        }
        assert np.array_equal(kept.traces, record.traces)


def test_a_damaged_estimate_counts_as_none(sampled):
    folder, file, data, record = sampled
    kind = Kind(with_nbeta(SAMPLER))
    trials = dict(damages(data)) | {f"wrong {number}": saying(data, change) for number, change in enumerate(WRONG)}
    for name, content in trials.items():
        file.write_bytes(content)
        assert read_record(folder, kind, 60, record.row["checkpoint_hash"]) is None, name
    file.unlink()
    file.mkdir()
    assert read_record(folder, kind, 60, record.row["checkpoint_hash"]) is None
    assert read_all(folder) == []
    file.rmdir()


def test_a_damaged_estimate_is_made_again(sampled):
    folder, file, data, record = sampled
    file.write_bytes(claim_size(data, random.Random(0)))
    (again,) = estimate_run(folder.path, SAMPLER).records
    assert again.row["llc"] == record.row["llc"]
    assert file.read_bytes() == data


def test_a_damaged_part_counts_as_none(tmp_path):
    part = Part(60, "abc", [{"quantity": "loss", "value": 0.5}], {"weights": np.arange(8.0)})
    write_part(tmp_path, part, KEY)
    file = tmp_path / "step-000000060.npz"
    data = file.read_bytes()
    assert read_part(tmp_path, 60, KEY).rows == part.rows
    wrong = [replace("rows", value=value) for value in (3, {}, [3], [{"value": []}], None)]
    wrong += [replace("key", value=value) for value in (None, [], {"checkpoint_hash": []})]
    trials = dict(damages(data)) | {f"wrong {number}": saying(data, change) for number, change in enumerate(wrong)}
    trials["of 0.1.0"] = saying(data, lambda about: None)
    for name, content in trials.items():
        file.write_bytes(content)
        assert read_part(tmp_path, 60, KEY) is None, name
