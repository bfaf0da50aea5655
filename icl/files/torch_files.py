"""Check files of `torch.save` before PyTorch reads them, so that a small file of unknown origin cannot fill the memory.

`torch.load` with `weights_only=True` runs no code of the file, but three tricks remain. A zip archive can be compressed: 0.4 MB
of zeros become 400 MB. A pickle can call `bytearray(n)` or `torch.Tensor(n)` with any n. A tensor can claim to repeat one number
many times. `require_uncompressed`, `pickled_names` and `require_plain_tensors` detect these tricks. They raise `ContentError`,
whose message completes a sentence such as "last.ckpt cannot be used: ...".
"""

import io
import pickletools
import re
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from icl.files.reading import ContentError

_NUM_OLD_PICKLES = 5
"""Number of pickles at the beginning of a file that PyTorch wrote before version 1.6. Such a file is not a zip archive."""
_PLAIN_NAMES = re.compile(
    r"collections\.(OrderedDict|Counter)|builtins\.(set|complex)|_codecs\.encode"
    r"|torch\.(Size|device|[A-Z]\w+Storage|bool|(bfloat|float|complex|q?u?int)\w+|per_\w+)|torch\.serialization\._get_layout"
    r"|torch\._utils\._rebuild_(parameter|parameter_with_state|tensor|tensor_v2|tensor_v3)"
    r"|torch\._utils\._rebuild_(qtensor|sparse_tensor|meta_tensor_no_storage|nested_tensor)"
)
"""Names of the Python objects that tensors, numbers, strings and containers need. None of these objects allocates memory of a size
that the file chooses freely."""


def require_uncompressed(data: bytes) -> None:
    """Refuse a zip archive that is damaged, or whose parts are larger than the file. Files that are not archives are accepted.

    Raises:
        ContentError: If the archive is refused.
    """
    if not _is_archive(data):
        return
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            parts = archive.infolist()
    except Exception as error:  # zipfile raises many kinds of errors for a damaged file
        raise ContentError(f"it is damaged ({type(error).__name__})") from None
    size = sum(part.file_size for part in parts)
    if size > len(data):
        raise ContentError(f"it claims to contain {size:,} bytes, but has only {len(data):,}")
    # If there were bytes before the archive, zipfile and PyTorch could read different tables of contents.
    if min((part.header_offset for part in parts), default=0) != 0:
        raise ContentError("it has bytes that do not belong to the zip file")


def pickled_names(data: bytes) -> set[str]:
    """Return the names of all Python objects to which a file of `torch.save` refers, without unpickling anything.

    The names have the form `module.name`. PyTorch reads no opcode other than GLOBAL that refers to an object by its name.

    Raises:
        ContentError: If the file is damaged.
    """
    try:
        return {name for pickle in _pickles(data) for name in _names(pickle)}
    except Exception as error:  # zipfile and pickletools raise many kinds of errors for a damaged file
        raise ContentError(f"it is damaged ({type(error).__name__})") from None


def is_plain(name: str) -> bool:
    """Return whether a Python object is needed for tensors, numbers, strings or containers, and cannot fill the memory."""
    return bool(_PLAIN_NAMES.fullmatch(name))


def require_plain_tensors(tree: Any, size: int) -> None:
    """Refuse tensors that are not dense, or that are larger than the file.

    A tensor in a file can claim to repeat one number many times, and so need much more memory than the file.

    Args:
        tree: The content of the file.
        size: Number of bytes of the file.

    Raises:
        ContentError: If a tensor is refused.
    """
    for tensor in _tensors(tree):
        if tensor.is_nested or tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
            raise ContentError("it contains a sparse, nested or quantized tensor")
        if tensor.numel() * tensor.element_size() > size:
            raise ContentError(f"a tensor of shape {tuple(tensor.shape)} is larger than the file")


def _is_archive(data: bytes) -> bool:
    """Return whether PyTorch reads a file as a zip archive."""
    return data[:4] == b"PK\x03\x04"


def _pickles(data: bytes) -> Iterator[io.BytesIO]:
    """Yield the pickles of a file."""
    if not _is_archive(data):
        stream = io.BytesIO(data)  # each pickle begins where the one before it ends
        yield from (stream for _ in range(_NUM_OLD_PICKLES))
        return
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for part in archive.infolist():
            if part.filename.lower().endswith(".pkl"):  # PyTorch's zip reader ignores case
                yield io.BytesIO(archive.read(part))


def _names(pickle: io.BytesIO) -> Iterator[str]:
    for opcode, argument, _ in pickletools.genops(pickle):
        if opcode.name == "GLOBAL":
            module, _, name = str(argument).partition(" ")
            yield f"{'builtins' if module == '__builtin__' else module}.{name}"


def _tensors(tree: Any) -> Iterator[Tensor]:
    """Yield the tensors of a tree. A container that appears many times is visited once, so that a small file cannot take long."""
    stack, seen = [tree], set()
    while stack:
        value = stack.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (Mapping, list, tuple, set)) and id(value) not in seen:
            seen.add(id(value))
            stack.extend(value.values() if isinstance(value, Mapping) else value)
        elif isinstance(fields := getattr(value, "__dict__", None), dict) and id(value) not in seen:  # a config object
            seen.add(id(value))
            stack.extend(fields.values())
