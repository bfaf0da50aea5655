"""Random damage to the bytes of a file, as disks, editors, interrupted copies and strangers cause it.

`damaged` chooses one mutation for a kind of file. Every kind can be damaged as bytes. Text can also be damaged in its numbers.
JSON, YAML, CSV, NPZ and safetensors can also be damaged in their structure. In that case the length, the checksum or the digest
that guards the structure is made right again, so that the damage reaches the code behind the check.
"""

import csv
import io
import json
import random
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
import yaml

from icl.runs.checkpoints import _SEAL, _seal, weights_digest

EXTREMES = (
    *(-1, 0, 1, 2**31, 2**63, 10**30, 10**400, -(10**18), 1e308, -1e308, 5e-324, 0.5, -0.0),
    *(float("inf"), float("-inf"), float("nan")),
    *(None, True, False, "", "x", "inf", "nan", "\ud800", "\x00", "../../x", "é" * 50, "9" * 5000, "a" * 100_000),
    *([], {}, [1, "a", None], {"a": 1}, [[[]]], {"value": {"value": 1}}),
)
NUMBER_TEXTS = (
    "-1",
    "0",
    "1e308",
    "-1e999",
    "9" * 40,
    "9" * 5000,
    "nan",
    "inf",
    "1.5",
    "",
    "0x10",
    "1_000",
    "١٢",
    "1e-400",
)
DEPTHS = (60, 900, 100_000)

Mutation = Callable[[bytes, random.Random], bytes]


class Damage(NamedTuple):
    """A damaged file."""

    data: bytes
    is_forged: bool
    """Whether the digests in the file were made right again. Only an attacker would do so."""


def damaged(kind: str, data: bytes, draw: random.Random) -> Damage:
    """Return a damaged copy of a file. Its kind is bytes, text, json, yaml, csv, npy, npz or safetensors."""
    mutation = draw.choice(MUTATIONS[kind])
    return Damage(mutation(data, draw), mutation in _FORGERIES)


def flip_bits(data: bytes, draw: random.Random) -> bytes:
    """Flip one to sixteen bits."""
    changed = bytearray(data or b"\0")
    for _ in range(draw.choice((1, 2, 16))):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def truncate(data: bytes, draw: random.Random) -> bytes:
    """Keep only the beginning of the file, or nothing."""
    return data[: draw.choice((0, draw.randint(0, len(data))))]


def zero_fill(data: bytes, draw: random.Random) -> bytes:
    """Set a range of bytes to zero, as after a power cut."""
    start, stop = _stretch(data, draw)
    return data[:start] + bytes(stop - start) + data[stop:]


def insert_noise(data: bytes, draw: random.Random) -> bytes:
    """Insert random bytes."""
    place = draw.randint(0, len(data))
    return data[:place] + draw.randbytes(draw.choice((1, 8, 4096))) + data[place:]


def swap_blocks(data: bytes, draw: random.Random) -> bytes:
    """Exchange two neighbouring ranges of bytes."""
    (start, middle), stop = _stretch(data, draw), draw.randint(0, len(data))
    first, middle, last = sorted((start, middle, stop))
    return data[:first] + data[middle:last] + data[first:middle] + data[last:]


def repeat_block(data: bytes, draw: random.Random) -> bytes:
    """Write a range of bytes twice."""
    start, stop = _stretch(data, draw)
    return data[:stop] + data[start:]


def replace_all(data: bytes, draw: random.Random) -> bytes:
    """Replace the whole file by noise, another format, or text in another encoding."""
    return draw.choice((b"\0" * len(data), draw.randbytes(500), b"PK\x03\x04", b"\x80\x04N.", "é,ü".encode("utf-16")))


def replace_numbers(data: bytes, draw: random.Random) -> bytes:
    """Replace one number of a text by an extreme one."""
    numbers = list(re.finditer(rb"-?\d+(\.\d+)?(e[+-]?\d+)?", data))
    if not numbers:
        return insert_noise(data, draw)
    match = draw.choice(numbers)
    return data[: match.start()] + draw.choice(NUMBER_TEXTS).encode() + data[match.end() :]


def nest_deeply(data: bytes, draw: random.Random) -> bytes:
    """Nest lists or tables up to 100,000 levels deep, as the whole file or in the place of a value."""
    depth, (opening, closing) = draw.choice(DEPTHS), draw.choice((("[", "]"), ('{"a":', "}")))
    nested = (opening * depth + "1" + closing * depth).encode()
    start = data.find(b": ") + 2
    return nested if start < 2 or draw.random() < 0.5 else data[:start] + nested + data[start:]


def repeat_line(data: bytes, draw: random.Random) -> bytes:
    """Write a line twice: a key in YAML and in our JSON, a row in CSV."""
    lines = data.splitlines(keepends=True) or [b""]
    place = draw.randrange(len(lines))
    return b"".join(lines[: place + 1] + lines[place:])


def change_json(data: bytes, draw: random.Random) -> bytes:
    """Change one place of a JSON tree."""
    return json.dumps(change_tree(json.loads(data), draw)).encode()


def change_yaml(data: bytes, draw: random.Random) -> bytes:
    """Change one place of a YAML tree."""
    tree = change_tree(yaml.safe_load(data), draw)
    return (
        json.dumps(tree).encode()
        if draw.random() < 0.5
        else yaml.safe_dump(tree, allow_unicode=True).encode(errors="replace")
    )


def change_csv(data: bytes, draw: random.Random) -> bytes:
    """Change a cell, the name of a column, or all values of a column, or remove or repeat a row or a column."""
    rows = list(csv.reader(io.StringIO(data.decode())))
    row, column = draw.randrange(len(rows)), draw.randrange(len(rows[0]))
    what = draw.randrange(8)
    if what < 3:
        rows[row][min(column, len(rows[row]) - 1)] = draw.choice(
            (*NUMBER_TEXTS, "x", "True", "\x00", "a,b", '"', "\ud83d\ude00")
        )
    elif what == 3:
        del rows[row]
    elif what == 4:
        rows = [[*cells[:column], *cells[column + 1 :]] for cells in rows]
    elif what == 5:
        rows = [[*cells[: column + 1], *cells[column:]] for cells in rows]
    elif what == 6:
        blank = draw.choice(("nan", "", "inf", "0"))
        rows[1:] = [[*cells[:column], blank, *cells[column + 1 :]] for cells in rows[1:]]
    else:
        rows = [*rows[: row + 1], *rows[row:]]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode(errors="surrogatepass")


def change_npz(data: bytes, draw: random.Random) -> bytes:
    """Change the description in an NPZ file, or the shape, type or values of an array. The checksums are right."""
    with np.load(io.BytesIO(data)) as saved:
        arrays = dict(saved)
    name = draw.choice(list(arrays))
    if name == "about":
        arrays[name] = np.array(change_json(str(arrays[name]).encode(), draw).decode())
    else:
        changes = (
            lambda a: a.T,
            lambda a: a[:0],
            lambda a: a.ravel(),
            lambda a: a.astype("U9"),
            lambda a: a.astype("i8"),
        )
        wild = (
            lambda a: a * np.nan,
            lambda a: a[..., None],
            lambda a: a.astype("f2"),
            lambda a: a * 1e38,
            lambda a: a + 1j,
        )
        arrays[name] = draw.choice((*changes, *wild))(arrays[name])
    if draw.random() < 0.2:
        del arrays[name]
    buffer = io.BytesIO()
    draw.choice((np.savez, np.savez_compressed))(buffer, **arrays)
    return buffer.getvalue()


def claim_size(data: bytes, draw: random.Random) -> bytes:
    """Let the arrays of an NPZ file claim a wrong shape, such as a huge one. The file is written again, so checksums are right."""
    import zipfile

    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            shape = draw.choice((b"(99999999999,)", b"(10**9, 10**9)", b"(-1,)", b"(2, 3"))
            new.writestr(name, re.sub(rb"'shape': \([^)]*\)", b"'shape': " + shape, old.read(name)))
    return buffer.getvalue()


def claim_array_size(data: bytes, draw: random.Random) -> bytes:
    """Let a `.npy` file claim another shape or type."""
    shape = draw.choice((b"(99999999999,)", b"(10**9, 10**9)", b"(-1,)", b"(2, 3", b"()", b"(0,)"))
    header = draw.choice(((rb"'shape': \([^)]*\)", b"'shape': " + shape), (rb"'<f4'", b"'|O'"), (rb"'<f4'", b"'<c8'")))
    return re.sub(*header, data)


def change_header(data: bytes, draw: random.Random) -> bytes:
    """Change the JSON header of a safetensors file and keep its length right, or change only the length."""
    length = int.from_bytes(data[:8], "little")
    if draw.random() < 0.2:
        return draw.choice((2**60, 2**64 - 1, 0, length - 1, length + 1, 10**6)).to_bytes(8, "little") + data[8:]
    change = draw.choice((change_json, nest_deeply, replace_numbers, repeat_block))
    return _with_header(change(data[8 : 8 + length], draw), data[8 + length :])


def change_about(data: bytes, draw: random.Random) -> bytes:
    """Change the description in a checkpoint: format, step, configuration or digest."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    about = header["__metadata__"]["icl"].encode()
    changed = draw.choice((change_json, change_json, change_json, nest_deeply, replace_numbers))(about, draw)
    header["__metadata__"]["icl"] = changed.decode(errors="replace")
    return _with_header(json.dumps(header).encode(), data[8 + length :])


def forge_about(data: bytes, draw: random.Random) -> bytes:
    """Change the description in a checkpoint, and make the digest of the description right."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    about = change_tree(json.loads(header["__metadata__"]["icl"]), draw)
    if isinstance(about, dict):
        about[_SEAL] = _seal(about)
    header["__metadata__"]["icl"] = json.dumps(about)
    return _with_header(json.dumps(header).encode(), data[8 + length :])


def change_tensors(data: bytes, draw: random.Random) -> bytes:
    """Change tensors of a checkpoint, and make the digest right: types, shapes, names, NaN, too few or too many tensors."""
    length = int.from_bytes(data[:8], "little")
    about = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["icl"])
    tensors = safetensors.torch.load(data)
    name = draw.choice(sorted(tensors))
    tensor = tensors[name]
    what = draw.randrange(9)
    if what < 5:
        kinds = (torch.float64, torch.int64, torch.bool, torch.complex64, torch.float16)
        tensors[name] = tensor.to(kinds[what])
    elif what == 5:
        tensors[name] = tensor * draw.choice((torch.nan, torch.inf, 1e30))
    elif what == 6:
        tensors[name] = draw.choice((tensor.flatten(), tensor[:0], tensor[None], tensor[0])).contiguous()
    elif what == 7:
        tensors[name + "x"] = tensors.pop(name) if draw.random() < 0.5 else tensor.clone()
    else:
        tensors |= {f"blocks.{i}.mlp.hidden.bias": torch.zeros(1) for i in range(draw.choice((3, 10_000)))}
    about["digest"] = weights_digest(tensors)
    about[_SEAL] = _seal(about)
    return safetensors.torch.save(tensors, {"icl": json.dumps(about)})


def change_tree(tree: Any, draw: random.Random) -> Any:
    """Return a JSON tree in which one random entry is replaced, removed, renamed or wrapped."""
    places = list(_places(tree))
    if not places:
        return draw.choice(EXTREMES)
    holder, key = draw.choice(places)
    what = draw.randrange(10)
    if what == 0:
        del holder[key]
    elif what == 1 and isinstance(holder, dict):
        holder[f"{key}_"] = holder.pop(key)
    elif what == 2:
        holder[key] = [holder[key]]
    elif what == 3:
        holder[key] = str(holder[key])
    elif what == 4:
        return draw.choice(EXTREMES)
    else:
        holder[key] = draw.choice(EXTREMES)
    return tree


def _places(tree: Any) -> Any:
    """Yield every entry of a tree, as the list or table that contains it and the key there."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(items):
        yield tree, key
        yield from _places(value)


def _stretch(data: bytes, draw: random.Random) -> tuple[int, int]:
    start, stop = sorted((draw.randint(0, len(data)), draw.randint(0, len(data))))
    return start, stop


def _with_header(header: bytes, rest: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + rest


_BYTES = (flip_bits, truncate, zero_fill, insert_noise, swap_blocks, repeat_block, replace_all)
_TEXT = (*_BYTES, replace_numbers, replace_numbers, repeat_line)
MUTATIONS: dict[str, tuple[Mutation, ...]] = {
    "bytes": _BYTES,
    "text": _TEXT,
    "json": (*_TEXT, nest_deeply, *[change_json] * 8),
    "yaml": (*_TEXT, nest_deeply, *[change_yaml] * 8),
    "csv": (*_TEXT, *[change_csv] * 8),
    "npy": (*_BYTES, *[claim_array_size] * 4),
    "npz": (*_BYTES, claim_size, *[change_npz] * 8),
    "safetensors": (*_BYTES, *[change_header] * 4, *[change_about] * 3, *[forge_about] * 3, *[change_tensors] * 4),
    "foreign safetensors": (*_BYTES, *[change_header] * 6),
}
"""Mutations for each kind of file. A mutation that occurs several times is drawn that much more often."""
_FORGERIES = (forge_about, change_tensors, change_npz, claim_size)
