"""Checkpoints contain everything they need, and a file that is not a checkpoint is refused in one sentence."""

import json
import pickle

import pytest
import safetensors.torch
import torch
from tiny_runs import TINY, change

from icl.build import build_checkpoint_model, build_model
from icl.runs.checkpoints import (
    CheckpointError,
    checkpoint_files,
    checkpoint_name,
    list_steps,
    load_checkpoint_file,
    load_step,
    save_checkpoint,
)
from icl.store.base import LocalStore


@pytest.fixture
def store(tmp_path) -> LocalStore:
    store = LocalStore(tmp_path / "checkpoints")
    save_checkpoint(store, 1465, TINY, dict(build_model(TINY).named_parameters()))
    return store


def file_of(store: LocalStore):
    return store.root / checkpoint_name(1465)


def test_a_checkpoint_gives_back_weights_step_and_config_bitwise(store):
    checkpoint = load_step(store, 1465)
    assert checkpoint.step == 1465
    assert checkpoint.config == TINY
    for name, weight in build_model(TINY).named_parameters():
        assert torch.equal(checkpoint.params[name], weight)


def test_a_checkpoint_knows_its_own_model(store):
    xs, ys = torch.randn(3, 4, 2), torch.randn(3, 4)
    model = build_checkpoint_model(load_checkpoint_file(file_of(store)))
    assert torch.equal(model(xs, ys), build_model(TINY)(xs, ys))


def test_infinitely_many_tasks_survive(tmp_path):
    config = change(TINY, task={"num_tasks": float("inf")})
    store = LocalStore(tmp_path)
    save_checkpoint(store, 0, config, dict(build_model(config).named_parameters()))
    assert load_step(store, 0).config == config


def test_saving_twice_gives_the_same_bytes(store):
    before = file_of(store).read_bytes()
    for _ in range(5):
        save_checkpoint(store, 1465, TINY, dict(build_model(TINY).named_parameters()))
        assert file_of(store).read_bytes() == before


def test_steps_are_listed_in_numeric_order_and_other_files_ignored(store):
    for step in (5, 10**9 + 1, 20):
        save_checkpoint(store, step, TINY, dict(build_model(TINY).named_parameters()))
    (store.root / "notes.txt").write_text("mine")
    (store.root / f".tmp-1-{checkpoint_name(7)}").write_bytes(b"")
    assert list_steps(store) == [5, 20, 1465, 10**9 + 1]
    assert [load_checkpoint_file(path).step for path in checkpoint_files(store.root)] == list_steps(store)
    assert checkpoint_files(store.root.parent) == checkpoint_files(store.root)


@pytest.mark.parametrize("kept", [0, 4, 100, 1500, -1])
def test_a_truncated_file_is_refused(store, kept):
    path = file_of(store)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=path.name) as refusal:
        load_checkpoint_file(path)
    assert "\n" not in str(refusal.value)


def test_an_altered_weight_is_refused(store):
    path = file_of(store)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="digest"):
        load_checkpoint_file(path)


def test_foreign_files_are_refused_and_never_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    (tmp_path / "pickle.ckpt").write_bytes(pickle.dumps(Bomb()))
    (tmp_path / "notes.txt").write_text("hello")
    torch.save({"a": torch.zeros(1)}, tmp_path / "torch.pt")
    for path in list(tmp_path.iterdir()):
        with pytest.raises(CheckpointError, match="not a checkpoint of icl"):
            load_checkpoint_file(path)
    assert not (tmp_path / "exploded").exists()


def test_weights_of_another_model_under_this_config_are_refused(store):
    other = change(TINY, model={"embed_size": 16})
    save_checkpoint(store, 2, TINY, dict(build_model(other).named_parameters()))
    with pytest.raises(CheckpointError, match=r"is of shape \(8, 16\), but its configuration describes shape \(8, 8\)"):
        load_step(store, 2)


def test_a_config_of_a_later_version_is_refused_in_a_sentence(store):
    path = file_of(store)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    about = json.loads(header["__metadata__"]["icl"])
    about["config"]["task"]["curriculum"] = 3
    header["__metadata__"]["icl"] = json.dumps(about)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(CheckpointError, match="curriculum"):
        load_checkpoint_file(path)


def with_about(path, change):
    """Write a checkpoint's file again, with another description of its content."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    about = json.loads(header["__metadata__"]["icl"])
    change(about)
    header["__metadata__"]["icl"] = json.dumps(about)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


@pytest.mark.parametrize(
    "change",
    [
        lambda about: about.update(step=61),
        lambda about: about["config"]["task"].update(noise_variance=0.35),
        lambda about: about["config"]["seeds"].update(tasks=7),
        lambda about: about["config"].pop("optim"),
    ],
)
def test_a_step_or_a_setting_that_was_altered_is_refused(store, change):
    path = file_of(store)
    with_about(path, change)
    with pytest.raises(CheckpointError, match="its step and settings do not match their digest"):
        load_checkpoint_file(path)


def test_a_checkpoint_of_0_1_0_has_no_digest_of_its_settings_and_loads(store):
    path = file_of(store)
    whole = load_checkpoint_file(path)
    with_about(path, lambda about: about.pop("about_digest"))
    assert load_checkpoint_file(path).config == whole.config


def test_missing_checkpoints_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="There is no checkpoint"):
        load_checkpoint_file(tmp_path / "nothing.safetensors")
    with pytest.raises(CheckpointError, match="There are no checkpoints at"):
        checkpoint_files(tmp_path)
