"""`icl import --from raventos` reads Flax's msgpack files and their config.json, and reproduces JAX's random numbers."""

import contextlib
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from importing import older_models as older

from icl.api import load_model
from icl.cli import main
from icl.config.validation import ConfigError
from icl.files.reading import ContentError
from icl.importing import threefry
from icl.importing.msgpack import parse_msgpack
from icl.importing.pickles import OlderFileError
from icl.importing.run import import_run
from icl.tasks.priors import task_pool, task_sequence

msgpack = pytest.importorskip("msgpack")  # an independent writer of the format

CONFIG = {
    "dtype": "float32",
    "task": {
        "n_tasks": 7,
        "n_dims": 3,
        "n_points": 5,
        "batch_size": 64,
        "data_seed": 101,
        "task_seed": 102,
        "noise_seed": 103,
    }
    | {"data_scale": 1.0, "task_scale": 1.0, "noise_scale": 0.5},
    "model": {"name": "transformer", "n_points": 5, "n_layer": 2, "n_embd": 16, "n_head": 2, "seed": 100},
    "training": {"optimizer": "adam", "lr": 1e-3, "schedule": "triangle", "warmup_steps": 250, "total_steps": 500},
}

FIRST_TASK = [0.09196234494447708, -0.07569374144077301, -1.5266567468643188]


def packed(tree: object) -> bytes:
    """Return a tree in Flax's format, in which an array is an extension of shape, type and bytes."""

    def extension(value: object) -> msgpack.ExtType:
        assert isinstance(value, (np.ndarray, np.generic))
        inner = msgpack.packb((value.shape, value.dtype.name, value.tobytes()), use_bin_type=True)
        return msgpack.ExtType(1 if isinstance(value, np.ndarray) else 3, inner)

    return msgpack.packb(tree, default=extension, strict_types=True)


def save_run(folder: Path, *, is_folder: bool, config: dict | None = None) -> dict:
    """Write a run's folder as the older code does, and return its parameters."""
    params = older.flax_params(D=3, K=5, width=16, layers=2)
    tree = {
        "step": np.int32(500),
        "params": params,
        "opt_state": {"0": {"count": np.asarray(500), "mu": params}, "1": {}},
    }
    file = folder / "checkpoint_500" / "checkpoint" if is_folder else folder / "checkpoint_500"
    file.parent.mkdir(parents=True)
    file.write_bytes(packed(tree))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return params


@pytest.mark.parametrize("is_folder", [True, False])
def test_a_run_predicts_as_the_older_model(tmp_path, capsys, is_folder):
    params = save_run(tmp_path / "train_abc", is_folder=is_folder, config=CONFIG)
    words = ["import", str(tmp_path / "train_abc"), "--from", "raventos", "--out", str(tmp_path / "run")]
    assert main(words) == 2  # the files have no tasks, and JAX's numbers depend on its version
    assert "--tasks recompute" in capsys.readouterr().err
    assert main([*words, "--tasks", "recompute"]) == 0
    xs, ys = older.prompts()
    with torch.no_grad():
        predictions = load_model(tmp_path / "run")(xs, ys).double().numpy()
    expected = older.flax_predict(params, xs.numpy(), ys.numpy(), heads=2)
    np.testing.assert_allclose(predictions, expected, rtol=0, atol=1e-5)
    assert main(["checkpoints", str(tmp_path / "run"), "verify"]) == 0


def test_settings_come_from_config_json_or_are_asked_for(tmp_path):
    params = save_run(tmp_path / "train_abc", is_folder=True, config=CONFIG)
    config = import_run(tmp_path / "train_abc", "raventos", tmp_path / "run", tasks="recompute").settings.config
    assert (config.task.num_tasks, config.task.noise_variance, config.trainer.batch_size) == (7, 0.25, 64)
    assert (config.seeds.tasks, config.optim.warmup_steps, config.trainer.max_steps) == (102, 250, 500)
    # `jax.random.normal(jax.random.fold_in(jax.random.PRNGKey(102), 0), (7, 3, 1))` of JAX 0.4.38: its first task
    assert task_pool(7, 3, task_sequence(config))[0].tolist() == pytest.approx(FIRST_TASK, abs=1e-6)
    (tmp_path / "alone.msgpack").write_bytes(packed(params))
    with pytest.raises(OlderFileError, match="does not say its step"):
        import_run(tmp_path / "alone.msgpack", "raventos", tmp_path / "alone")
    with pytest.raises(
        ConfigError, match=r"does not contain `task.num_tasks`.*`task.noise_variance`.*`model.num_heads`"
    ):
        import_run(tmp_path / "alone.msgpack", "raventos", tmp_path / "alone", step=1)


def test_neither_another_folder_nor_a_half_written_one_is_used(tmp_path):
    save_run(tmp_path / "train_abc", is_folder=False)
    half = tmp_path / "train_abc" / "checkpoint_501.orbax-checkpoint-tmp-168" / "checkpoint"
    half.parent.mkdir()
    half.write_bytes(b"half")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))  # of another run, in the folder above
    with pytest.raises(ConfigError, match=r"does not contain `task.num_tasks`"):
        import_run(tmp_path / "train_abc", "raventos", tmp_path / "run")


def test_a_scaled_task_and_arrays_of_orbax_are_refused(tmp_path):
    scaled = {**CONFIG, "task": {**CONFIG["task"], "task_scale": 2.0}}
    save_run(tmp_path / "scaled", is_folder=False, config=scaled)
    with pytest.raises(OlderFileError, match=r"task.task_scale = 2.0"):
        import_run(tmp_path / "scaled", "raventos", tmp_path / "run", tasks="recompute")
    (tmp_path / "orbax" / "checkpoint_5" / "params._in.kernel").mkdir(parents=True)
    (tmp_path / "orbax" / "checkpoint_5" / "params._in.kernel" / ".zarray").write_text("{}")
    with pytest.raises(OlderFileError, match=r"flax.serialization.to_bytes"):
        import_run(tmp_path / "orbax", "raventos", tmp_path / "run")


def test_random_numbers_are_those_of_jax():
    """Compare with the cipher's published test vector and with the values in JAX's documentation."""
    zero = np.zeros(2, dtype=np.uint32)
    assert threefry.encrypt(zero, zero).tolist() == [0x6B200159, 0x99BA4EFE]
    assert float(threefry.normal(threefry.key_of(0), ())) == pytest.approx(-0.20584226, abs=1e-7)
    assert float(threefry.normal(threefry.key_of(42), ())) == pytest.approx(-0.18471177, abs=1e-7)


# The reader of msgpack


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=40) | st.dictionaries(st.text(max_size=50), inner, max_size=20),
    max_leaves=40,
)


@given(VALUES)
def test_every_value_is_read_as_it_was_written(value):
    assert parse_msgpack(msgpack.packb(value)) == value


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int32", "uint8", "bool"])
def test_arrays_are_read_in_one_piece_or_in_chunks(dtype):
    array = (np.arange(12).reshape(3, 4) % 2).astype(dtype)
    chunks = {"0": array.ravel()[:5], "1": array.ravel()[5:]}
    chunked = {"__msgpack_chunked_array__": True, "shape": {"0": 3, "1": 4}, "chunks": chunks}
    for tree in ({"a": array}, {"a": chunked}):
        read = parse_msgpack(packed(tree))["a"]
        assert read.dtype == array.dtype
        np.testing.assert_array_equal(read, array)


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data):
    with contextlib.suppress(ContentError):
        parse_msgpack(data)


def test_damage_is_refused_without_memory_for_what_it_claims(tmp_path):
    whole = packed({"a": np.ones(20, dtype=np.float32)})
    for data in (
        whole[:-1],
        whole + b"\x00",
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\x91" * 10**6,
        b"\xc7\x02\x01" * 10**5,
    ):
        with pytest.raises(ContentError):
            parse_msgpack(data)
    (tmp_path / "checkpoint_1").write_bytes(whole[:-1])
    with pytest.raises(OlderFileError, match="cut short"):
        import_run(tmp_path, "raventos", tmp_path / "run")


def test_the_digest_of_every_file_is_kept(tmp_path):
    """The files in several folders may have the same name."""
    save_run(tmp_path / "old", is_folder=True, config=CONFIG)
    (tmp_path / "old" / "checkpoint_400").mkdir()
    tree = {"step": 400, "params": older.flax_params(D=3, K=5, width=16, layers=2, seed=1)}
    (tmp_path / "old" / "checkpoint_400" / "checkpoint").write_bytes(packed(tree))
    import_run(tmp_path / "old", "raventos", tmp_path / "run", tasks="recompute")
    files = json.loads((tmp_path / "run" / "imported.json").read_text())["files"]
    assert files == {
        f"checkpoint_{step}/checkpoint": hashlib.sha256(
            (tmp_path / "old" / f"checkpoint_{step}" / "checkpoint").read_bytes()
        ).hexdigest()
        for step in (400, 500)
    }
