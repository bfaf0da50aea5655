"""Files of `torch.save` are read as PyTorch reads them, and malicious ones are refused in little time and memory."""

import collections
import io
import pickle
import struct
import time
import tracemalloc
import zipfile
from typing import Any

import numpy as np
import pytest
import torch

from icl.files import pickled
from icl.files.pickled import PickledObject
from icl.files.reading import ContentError
from icl.files.torch_files import parse_torch_file

GENERATOR = torch.Generator().manual_seed(0)


def saved(tree: Any, *, is_zip: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(tree, buffer, _use_new_zipfile_serialization=is_zip)
    return buffer.getvalue()


def tensors() -> dict[str, torch.Tensor]:
    """Return tensors of many types, shapes and strides. Some share numbers."""
    base = torch.randn(6, 8, generator=GENERATOR)
    types = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64)
    views = {
        "base": base,
        "t": base.T,
        "row": base[2],
        "part": base[1:3, ::2],
        "again": base,
        "wide": base[:1].expand(3, 8),
    }
    odd = {"empty": torch.ones(0, 3), "scalar": torch.tensor(3.5), "parameter": torch.nn.Parameter(base * 2)}
    return {**views, **odd, **{str(dtype): base.to(dtype) for dtype in types}}


@pytest.mark.parametrize("is_zip", [True, False])
def test_tensors_are_those_that_torch_reads(is_zip):
    tree = tensors()
    read = parse_torch_file(saved(tree, is_zip=is_zip))
    assert list(read) == list(tree)
    for name, tensor in tree.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(read[name], tensor.detach())
    assert read["t"].data_ptr() == read["base"].data_ptr()
    assert all(tensor.data_ptr() % 64 == 0 for tensor in (read["base"], read["torch.float64"]))


@pytest.mark.parametrize("is_zip", [True, False])
def test_states_of_models_and_optimisers_are_those_that_torch_reads(is_zip):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    adam = torch.optim.Adam(model.parameters(), lr=1e-3)
    model(torch.randn(5, 3, generator=GENERATOR)).square().sum().backward()
    adam.step()
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, 0.1, total_steps=9)
    tree = {"model": model.state_dict(), "adam": adam.state_dict(), "schedule": schedule.state_dict()}
    data = saved(tree, is_zip=is_zip)
    again = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    again.load_state_dict(parse_torch_file(data)["model"])
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert parse_torch_file(data)["schedule"] == tree["schedule"]


@pytest.mark.parametrize("is_zip", [True, False])
def test_plain_values_are_those_that_torch_reads(is_zip):
    tree = {
        "a": [
            1,
            -1,
            2**40,
            -(2**70),
            0.1,
            float("inf"),
            True,
            None,
            "\u00e4\U0001f600",
            b"\x00\xff",
            (),
            (1,),
            (1, 2),
            (1, 2, 3, 4),
        ],
        "b": {1: {2, 3}, "x": complex(1, 2), None: collections.OrderedDict(a=1), 0.5: collections.Counter("aab")},
        "c": [[[]], {}, bytes(300), "x" * 300, list(range(1000)), torch.Size([2, 3])],
    }
    assert parse_torch_file(saved(tree, is_zip=is_zip)) == tree


def test_other_objects_are_refused_or_kept_as_their_data():
    data = saved({"x": np.float32(1.5)})
    with pytest.raises(ContentError, match=r"contains the Python object `numpy._core.multiarray.scalar`"):
        parse_torch_file(data)
    kept = parse_torch_file(data, is_kept=lambda name: name.startswith("numpy."))["x"]
    assert isinstance(kept, PickledObject)
    assert (kept.name, kept.arguments[0].name) == ("numpy._core.multiarray.scalar", "numpy.dtype")


# Malicious files


def text(word: str) -> bytes:
    return b"X" + struct.pack("<I", len(word.encode())) + word.encode()


def call(module: str, name: str, *arguments: bytes) -> bytes:
    return b"c" + f"{module}\n{name}\n".encode() + b"(" + b"".join(arguments) + b"tR"


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def storage(key: str, length: int) -> bytes:
    return b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu") + number(length) + b"tQ"


def tensor(length: int, stride: int, numbers: bytes) -> bytes:
    shapes = [b"(" + number(value) + b"t" for value in (length, stride)]
    return call("torch._utils", "_rebuild_tensor_v2", numbers, number(0), *shapes, b"\x89N")


def archive(value: bytes, *, pad: int = 0, **parts: bytes) -> bytes:
    """Return a zip file of `torch.save` with this pickled value and these storages."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("a/data.pkl", b"\x80\x02" + value + b".")
        for name, content in {**parts, "pad": bytes(pad)}.items():
            file.writestr(f"a/data/{name.removeprefix('_')}", content)
    return buffer.getvalue()


def encoded(value: bytes, codec: str) -> bytes:
    return call("_codecs", "encode", value, text(codec))


def doubled(value: bytes, times: int) -> bytes:
    """Return a pickle in which each call makes twice as many bytes as the call before."""
    for _ in range(times):
        value = encoded(value, "hex")
    return value


ONE = bytes(4)
EXPANDED = tensor(10**6, 0, storage("0", 1))
MALICIOUS = {
    "a codec that doubles": archive(doubled(encoded(text("a" * 99), "latin1"), 18)),
    "a slow codec": archive(encoded(text("".join(map(chr, range(0x4E00, 0x5500)))), "punycode")),
    "a set of repeated elements": archive(call("__builtin__", "set", EXPANDED), pad=4 * 10**6, _0=ONE),
    "a dict of repeated elements": archive(call("collections", "Counter", EXPANDED), pad=4 * 10**6, _0=ONE),
    "a size of repeated elements": archive(call("torch", "Size", EXPANDED), pad=4 * 10**6, _0=ONE),
    "many repeated tensors": archive(b"(" + EXPANDED * 200 + b"t", pad=4 * 10**6, _0=ONE),
    "a storage that claims more": archive(tensor(1000, 1, storage("0", 1000)), pad=4000, _0=ONE),
    "a tensor that claims more": archive(tensor(1000, 1, storage("0", 1)), pad=4000, _0=ONE),
    "a stride that claims more": archive(tensor(2, 1000, storage("0", 2)), pad=4000, _0=ONE * 2),
    "a negative stride": archive(tensor(2, -1, storage("0", 2)), _0=ONE * 2),
    "many empty lists": archive(b"(" + b"]" * 2**10 + b"t"),
    "keys with equal hashes": archive(b"}(" + b"".join(pickle.dumps(k * (2**61 - 1), 2)[2:-1] + b"N" for k in range(8, 9)) + b"u"),
    "a key that is slow to hash": archive(b"}()" + b"q\x00h\x00\x86q\x00" * 40 + b"Nu"),
    "text that is no Unicode": archive(b"X\x03\x00\x00\x00\xed\xb2\x80"),
    "a function of the pickle": archive(b"cbuiltins\nprint\n" + b")R"),
    "a class of a number type": archive(b"ctorch\nFloatStorage\n" + b")R"),
    "a very long name": archive(b"cbuiltins\n" + b"a" * 10**6 + b"\n"),
}  # fmt: skip


@pytest.mark.parametrize("name", MALICIOUS)
def test_a_malicious_pickle_is_refused(name, monkeypatch):
    monkeypatch.setattr(pickled, "_MAX_INSTRUCTIONS", 2**10 if name == "many empty lists" else 2**21)
    tracemalloc.start()
    start = time.process_time()
    with pytest.raises(ContentError) as refusal:
        parse_torch_file(MALICIOUS[name])
    assert time.process_time() - start < 5
    assert tracemalloc.get_traced_memory()[1] < 2**28
    tracemalloc.stop()
    assert len(str(refusal.value)) < 200


def old_file(value: bytes, keys: list[str], numbers: bytes) -> bytes:
    """Return a file in the format before version 1.6 of PyTorch."""
    machine = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    begin = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, machine)]
    return b"".join((*begin, b"\x80\x02" + value + b".", pickle.dumps(keys, 2), numbers))


def old_tensor(length: int, view: bytes = b"N") -> bytes:
    return tensor(length, 1, storage("0", length).removesuffix(b"tQ") + view + b"tQ")


@pytest.mark.parametrize(
    ("value", "keys", "numbers"),
    [
        (old_tensor(2), [], bytes(16)),  # PyTorch leaves such tensors uninitialised
        (old_tensor(2), ["0"], struct.pack("<q", 2) + bytes(7)),
        (old_tensor(2), ["0"], struct.pack("<q", 3) + bytes(12)),
        (old_tensor(10**9), ["0"], struct.pack("<q", 10**9)),
        (old_tensor(2, b"(" + text("v") + number(1) + number(2) + b"t"), ["0"], struct.pack("<q", 2) + bytes(8)),
    ],
)
def test_an_old_file_without_its_numbers_is_refused(value, keys, numbers):
    with pytest.raises(ContentError):
        parse_torch_file(old_file(value, keys, numbers))


def test_an_old_file_with_its_numbers_is_read():
    numbers = struct.pack("<q2f", 2, 1.5, 2.5)
    assert parse_torch_file(old_file(old_tensor(2), ["0"], numbers)).tolist() == [1.5, 2.5]
    view = b"(" + text("v") + number(1) + number(1) + b"t"
    part = tensor(1, 1, storage("0", 2).removesuffix(b"tQ") + view + b"tQ")
    assert parse_torch_file(old_file(part, ["0"], numbers)).tolist() == [2.5]


def test_a_file_with_two_pickles_of_one_name_is_refused():
    harmless = archive(b"}" + text("x") + number(1) + b"s")
    assert parse_torch_file(harmless) == {"x": 1}
    twice = io.BytesIO(harmless)
    with zipfile.ZipFile(twice, "a") as file, pytest.warns(UserWarning, match="Duplicate name"):
        file.writestr("a/data.pkl", b"\x80\x02}.")
    with pytest.raises(ContentError, match="it contains a part twice"):
        parse_torch_file(twice.getvalue())
