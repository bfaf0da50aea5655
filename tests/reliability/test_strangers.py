"""A stranger's checkpoint or status costs no more time and memory than its size justifies, whatever its content claims."""

import json
import os
import time
import tracemalloc

import pytest
import safetensors.torch
import torch
from tiny_runs import TINY

from icl.api import load_checkpoint, load_model
from icl.build import build_model
from icl.cli import main
from icl.runs.checkpoints import CheckpointError, checkpoint_name, save_checkpoint
from icl.runs.folder import RunFolder
from icl.runs.listing import describe_runs
from icl.runs.status import Status
from icl.store.base import LocalStore

MEBIBYTE = 2**20
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture(autouse=True)
def _unchecked(as_users_run):
    """Turn off the checks of types, so that `icl` itself must refuse bad values."""


@pytest.fixture
def honest(tmp_path) -> bytes:
    """Return the bytes of an intact checkpoint."""
    store = LocalStore(tmp_path / "honest")
    save_checkpoint(store, 60, TINY, dict(build_model(TINY).named_parameters()))
    return store.read(checkpoint_name(60))


def parts_of(data):
    """Return the header of a checkpoint, its description, and the bytes after the header."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    return header, json.loads(header["__metadata__"]["icl"]), data[8 + length :]


def joined(header, rest):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + rest


def claiming(data, claim):
    """Return the checkpoint with another description. A claim is a dict by dotted key, or the whole text."""
    header, about, rest = parts_of(data)
    if isinstance(claim, str):
        header["__metadata__"]["icl"] = claim
        return joined(header, rest)
    for key, value in claim.items():
        place = about
        *outer, last = key.split(".")
        for name in outer:
            place = place[name]
        place[last] = value
    header["__metadata__"]["icl"] = json.dumps(about)
    return joined(header, rest)


CLAIMS = [
    *({"config.model.num_layers": value} for value in (10**7, 2**62, 10**300, -1, 0, 1.5, True, "1", None, [1])),
    *({"config.task.max_examples": value} for value in (10**9, 2**62, -4)),
    *({"config.task.task_size": value} for value in (10**9, 10**18)),
    *({"config.model.mlp_size": value} for value in (10**9, 2**62)),
    {"config.model.embed_size": 2 * 10**9},
    *({"config.task.num_tasks": value} for value in (10**12, 0, -1, float("nan"), [])),
    *({"step": value} for value in (float("inf"), float("nan"), -1, 10**30, 1.5, True, None, "60", [], {})),
    *({"config.optim.lr": value} for value in (float("inf"), "x", {})),
    {"config.evaluation.num_prompts": 10**30},
    {"config": None},
    {"config": []},
    {"config.preset": {}},
    {"config.population.seeds": [[0], [1]]},
    {"digest": None},
    {"digest": {}},
    {"format": ["icl-checkpoint-1"]},
    "[]",
    "null",
    '{"format": "icl-checkpoint-1", "format": "icl-checkpoint-1"}',
    '{"format": "icl-checkpoint-1", "config": ' + DEEP + "}",
    '{"step": ' + "9" * 10_000 + "}",
]


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: str(claim)[:60])
def test_a_checkpoint_that_claims_what_it_does_not_hold_is_refused(tmp_path, honest, claim):
    refuse(tmp_path, claiming(honest, claim))


def hostile_headers(data):
    header, _, rest = parts_of(data)
    yield "length 2^60", (2**60).to_bytes(8, "little") + data[8:]
    yield "length 2^64 - 1", b"\xff" * 8 + data[8:]
    yield "nested", joined(DEEP.encode(), rest)
    yield "nested entry", joined(b'{"a": ' + DEEP.encode() + b"}", rest)
    yield "repeated key", joined(json.dumps(header).encode()[:-1] + b', "final_norm.weight": 1}', rest)
    name = next(name for name in header if name != "__metadata__")
    for field, value in (
        ("dtype", "I64"),
        ("dtype", ["F32"]),
        ("shape", [10**12, 10**12]),
        ("shape", [-1]),
        ("shape", [1.0]),
        ("shape", 8),
        ("data_offsets", [0, 2**62]),
        ("data_offsets", [4, 0]),
        ("data_offsets", "ab"),
    ):
        yield f"{field} {value}", joined(header | {name: header[name] | {field: value}}, rest)
    yield "a list", joined(b"[1, 2]", rest)
    entry = b'"t": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}, '
    yield "a million tensors", joined(b"{" + entry * 10**6 + json.dumps(header).encode()[1:], rest)
    yield (
        "11,000 tensors",
        joined(
            header | {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(11_000)},
            rest,
        ),
    )


def test_a_hostile_header_is_refused(tmp_path, honest):
    for name, data in hostile_headers(honest):
        print(name)
        refuse(tmp_path, data)


def refuse(folder, data):
    """Load the checkpoint, and check that it is refused in one short sentence, with little time and memory."""
    path = folder / checkpoint_name(60)
    path.write_bytes(data)
    tracemalloc.start()
    started = time.process_time()
    with pytest.raises(CheckpointError) as refusal:
        load_model(path)
    seconds, peak = time.process_time() - started, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < 5, seconds
    assert peak < 64 * MEBIBYTE, peak
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 1000


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.bfloat16])
def test_tensors_of_a_type_that_no_checkpoint_has_are_refused(tmp_path, honest, dtype):
    _, about, _ = parts_of(honest)
    tensors = {name: tensor.to(dtype) for name, tensor in safetensors.torch.load(honest).items()}
    refuse(tmp_path, safetensors.torch.save(tensors, {"icl": json.dumps(about)}))


def test_weights_that_are_not_finite_load_and_their_predictions_are_refused(tmp_path, capsys):
    params = {name: tensor * torch.nan for name, tensor in build_model(TINY).named_parameters()}
    save_checkpoint(LocalStore(tmp_path), 60, TINY, params)
    path = tmp_path / checkpoint_name(60)
    assert load_checkpoint(path)[1]["step"] == 60
    (tmp_path / "prompt.json").write_text('{"x_context": [[1, 2]], "y_context": [1], "x_query": [[1, 2]]}')
    assert main(["predict", str(path), "--prompt", str(tmp_path / "prompt.json")]) == 1
    assert "not finite" in capsys.readouterr().err
    assert main(["evaluate", str(path)]) == 0


def test_every_command_refuses_a_hostile_checkpoint_in_one_sentence(tmp_path, honest, capsys):
    run = RunFolder(tmp_path / "run")
    run.write_config(TINY)
    run.checkpoints.write(checkpoint_name(60), claiming(honest, {"config.model.num_layers": 10**7}))
    (tmp_path / "prompt.json").write_text('{"x_context": [[1, 2]], "y_context": [1], "x_query": [[1, 2]]}')
    store = tmp_path / "store"
    LocalStore(store / "run").write("config.yaml", run.config_file.read_bytes())
    LocalStore(store / "run").write(f"checkpoints/{checkpoint_name(60)}", run.checkpoints.read(checkpoint_name(60)))
    for words in (
        ["predict", "RUN", "--prompt", str(tmp_path / "prompt.json")],
        ["evaluate", "RUN"],
        ["llc", "RUN"],
        ["analyse", "RUN", "--what", "embeddings"],
    ):
        assert main([str(run.path) if word == "RUN" else word for word in words]) == 1
        (sentence,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("icl: ")]
        assert "its configuration describes" in sentence
    assert main(["checkpoints", str(run.path), "verify"]) == 1
    assert "its configuration describes" in "".join(capsys.readouterr())
    (tmp_path / "other").mkdir()
    assert main(["checkpoints", "run", "pull", "--store", str(store)]) == 1
    assert "its configuration describes" in capsys.readouterr().err
    assert main(["report", str(run.path)]) == 0  # it reads no checkpoint


STATUS = {"state": "running", "step": 3, "max_steps": 60, "loss": 0.5, "updated": 1.7e9}
BAD_STATUSES = [
    *(STATUS | {"step": value} for value in (float("inf"), float("nan"), 3.5, -1, 10**30, True, "3", None, [], {})),
    *(STATUS | {"max_steps": value} for value in (float("inf"), 1.5, "60")),
    *(STATUS | {"updated": value} for value in (float("inf"), float("nan"), 3.2e16, -1, True, "now", None, [])),
    *(STATUS | {"loss": value} for value in (True, "low", [], 10**400)),
    *(STATUS | {"best_step": value} for value in (1.5, -1, "1")),
    *(STATUS | {"reason": value} for value in ({}, [], 3, "\ud800")),
    *(STATUS | {"state": value} for value in ("asleep", None, 3, [], {})),
    STATUS | {"mood": "good"},
    [STATUS],
    3,
]


def test_a_bad_status_is_told_and_the_other_runs_are_listed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_ROOT", str(tmp_path))
    contents = [json.dumps(status).encode() for status in BAD_STATUSES]
    contents += [b"", b"\0" * 200, b"\xff\xfe{", DEEP.encode(), b'{"state": ' + DEEP.encode() + b"}"]
    contents += [json.dumps(STATUS).encode()[:-1] + b', "step": 4}', b'{"step": ' + b"9" * 5000 + b"}", b" " * 2**21]
    for number, content in enumerate(contents):
        folder = tmp_path / f"bad{number}"
        folder.mkdir()
        (folder / "status.json").write_bytes(content)
    (tmp_path / "folder" / "status.json").mkdir(parents=True)
    (tmp_path / "nowhere").mkdir()
    (tmp_path / "nowhere" / "status.json").symlink_to("loop")
    (tmp_path / "nowhere" / "loop").symlink_to("status.json")
    RunFolder(tmp_path / "good").write_status(Status(state="finished", step=60, max_steps=60, loss=0.25))
    assert main(["runs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert next(line for line in lines if line.startswith("good ")).split()[1:5] == [
        "finished",
        "step",
        "60/60",
        "loss",
    ]
    bad = [line for line in lines if not line.startswith("good ")]
    assert len(bad) >= len(contents) + 1
    assert all(" unreadable " in line for line in bad), bad
    assert describe_runs(tmp_path) == lines


def test_a_pipe_in_the_place_of_a_status_does_not_hold_the_program(tmp_path):
    os.mkfifo(tmp_path / "status.json")
    assert RunFolder(tmp_path).read_status() is None


def test_icl_runs_prints_no_name_that_moves_the_cursor_and_no_endless_number(tmp_path):
    for name in ("red\x1b[31m", "two\nlines", "plain"):
        RunFolder(tmp_path / name).write_status(Status(state="running", loss=1e300))
    lines = describe_runs(tmp_path)
    assert len(lines) == 3
    assert all(line.isprintable() and len(line) < 150 and "1e+300" in line for line in lines)
