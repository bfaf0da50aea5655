"""The header of a checkpoint: which tensors a safetensors file holds, checked before a single one is made.

A file begins with eight bytes that give the length of a JSON header; the header names each tensor with its type, shape and place.
A stranger's file can claim anything there. So the claims are compared with the file's size, and the shapes with those that the
saved configuration implies, without making a tensor: the time and memory of a refusal do not depend on the numbers claimed.
"""

import io
import math
import os
from typing import Any, NamedTuple

import numpy as np

from icl.config import RunConfig
from icl.config.validation import is_count
from icl.files.reading import ContentError, parse_json
from icl.model.transformer import parameter_shapes

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's running means of the gradient and of its square, as torch calls them."""
TYPES = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}
"""The types of numbers that a checkpoint may hold, as safetensors and as numpy name them."""
MAX_HEADER = 2**23
"""Bytes of a header; ours have a few thousand."""
MAX_TENSORS = 10_000
"""Tensors of a file; a model of 800 layers has about as many."""


class CutShortError(ContentError):
    """A file whose header is whole, but which ends before or after its last tensor."""


class TensorEntry(NamedTuple):
    """The header's entry for one tensor."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    """Place of its first byte, from the file's beginning."""
    stop: int


class Header(NamedTuple):
    """The content of a header."""

    tensors: dict[str, TensorEntry]
    metadata: dict[str, Any]


def read_header(file: io.BufferedIOBase) -> Header:
    """Return the header of an open file, or of bytes in memory.

    Raises:
        ContentError: If there is none, or what it says is not what the file holds.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if not 0 < length <= min(MAX_HEADER, size - 8):
        raise ContentError("it has no header of safetensors")
    tree = parse_json(file.read(length))
    metadata = tree.pop("__metadata__", {}) if isinstance(tree, dict) else None
    if not isinstance(metadata, dict):
        raise ContentError("it has no header of safetensors")
    if len(tree) > MAX_TENSORS:
        raise ContentError(f"it holds {len(tree):,} tensors, and at most {MAX_TENSORS:,} are read")
    tensors = {name: _entry(about, 8 + length) for name, about in tree.items()}
    end = max((tensor.stop for tensor in tensors.values()), default=8 + length)
    if end != size:
        raise CutShortError(f"it has {size:,} bytes, and its header tells of {end:,}")
    return Header(tensors, metadata)


def require_shapes(header: Header, config: RunConfig) -> None:
    """Refuse tensors that are not the parameters of the configuration's model, or the moments of all of them.

    Raises:
        ContentError: Naming the first difference.
    """
    expected = parameter_shapes(config.model, task_size=config.task.task_size, max_examples=config.task.max_examples)
    kinds = [f"{kind}/" for kind in MOMENTS] if any("/" in name for name in header.tensors) else [""]
    count = len(kinds) * expected.num_tensors  # compared first: a configuration can claim millions of layers
    if len(header.tensors) != count:
        raise ContentError(f"it holds {len(header.tensors):,} tensors, and its configuration describes {count:,}")
    for name, shape in expected.by_name().items():
        for kind in kinds:
            tensor = header.tensors.get(kind + name)
            if tensor is None or tensor.shape != shape:
                there = "missing" if tensor is None else f"of shape {tensor.shape}"
                raise ContentError(f"{kind}{name} is {there}, and its configuration describes shape {shape}")
    types = sorted({tensor.dtype for tensor in header.tensors.values()})
    if len(types) > 1:
        raise ContentError(f"its tensors are of several types, {' and '.join(types)}")


def _entry(about: Any, before: int) -> TensorEntry:
    """Return one tensor's entry, whose numbers begin `before` bytes after the file's beginning at the earliest."""
    try:
        dtype, shape, (start, stop) = about["dtype"], about["shape"], about["data_offsets"]
    except (LookupError, TypeError, ValueError):
        raise ContentError("its header does not describe every tensor") from None
    if not isinstance(dtype, str) or dtype not in TYPES:
        raise ContentError(f"a tensor is of type {dtype!r}, and should be one of {', '.join(TYPES)}")
    numbers = [*shape, start, stop] if isinstance(shape, list) else [None]
    if not all(is_count(number) for number in numbers):
        raise ContentError("its header does not describe every tensor")
    if math.prod(shape) * np.dtype(TYPES[dtype]).itemsize != stop - start:
        raise ContentError(f"a tensor of shape {tuple(shape)} has {stop - start:,} bytes")
    return TensorEntry(dtype, tuple(shape), before + start, before + stop)
