"""Checkpoints for analysis: the weights of one step as safetensors, with the step and the whole configuration.

Checkpoints are small and load fast. Because nothing is unpickled, it is safe to load a checkpoint from an unknown source. A file
begins with eight bytes that give the length of a JSON header. The header lists each tensor with its type, shape and position.

The header of a file from an unknown source can contain anything. So before any tensor is made, we compare the header with the file's
size. We also compare the shapes of the tensors with the shapes that the saved configuration implies. Thus a bad file is refused
quickly and with little memory. Each file also contains a digest of its weights, and a digest of its step and configuration. A file
that was cut short, altered or made by another program does not match these digests and is refused.

If `checkpoints.moments` is true, Adam's moments are saved in a separate file in the subfolder `moments/`, with the same name and
format as the checkpoint. So the moments are not read when the weights are loaded. The tensors of the moments are named
`exp_avg/<parameter>` and `exp_avg_sq/<parameter>`.
"""

import hashlib
import io
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from icl.config import RunConfig
from icl.config.validation import UserError, is_count
from icl.files.arrays import StoredArray
from icl.files.reading import ContentError, first_line, parse_json
from icl.model.losses import shapes_of
from icl.model.stacked import Params
from icl.runs.tasks_file import remember_tasks
from icl.store.base import LocalStore, Store

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Names of Adam's moments in torch. They are the running means of the gradient and of its square."""
_TYPES = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}
"""Types of numbers that a checkpoint may contain: the name of each type in safetensors, and in NumPy."""
_MAX_HEADER = 2**23
"""Largest size of a header in bytes. Headers that `icl` writes have a few thousand bytes."""
_MAX_TENSORS = 10_000
"""Largest number of tensors in a file. A model of 800 layers has about this number of tensors."""
_FORMAT = "icl-checkpoint-1"
_ENTRY = "icl"
_SEAL = "about_digest"
"""Key of the digest of a file's metadata. Files of version 0.1.0 have no such digest."""
_NAME = re.compile(r"step-(\d{9,})\.safetensors")


class CheckpointError(UserError, ValueError):
    """Raised if a file is not a usable checkpoint. The message says what is wrong, or what was expected."""


class Checkpoint(NamedTuple):
    """One saved step of a run."""

    step: int
    """Number of optimizer updates before the checkpoint. The initial model has step 0."""
    config: RunConfig
    params: Params
    """Weights on the CPU, keyed by parameter name."""
    digest: str
    """A hash of the weights. Equal weights have equal hashes."""


class _CutShortError(ContentError):
    """Raised if the header of a file is complete, but the file's size differs from the size that the header describes."""


class _TensorEntry(NamedTuple):
    """The header's entry for one tensor."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    """Position of the tensor's first byte in the file."""
    stop: int


def checkpoint_name(step: int) -> str:
    """Return the file name of a step, such as `step-000001465.safetensors`. Names sort in the order of the steps."""
    return f"step-{step:09d}.safetensors"


def save_checkpoint(store: Store, step: int, config: RunConfig, params: Mapping[str, Tensor]) -> None:
    """Write the checkpoint of one step to a store, atomically.

    Raises:
        StorageError: If the store cannot be written.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in params.items()}
    about = {"format": _FORMAT, "step": step, "config": config.to_dict(), "digest": weights_digest(tensors)}
    about[_SEAL] = _seal(about)
    # The metadata is a single entry, because safetensors writes several entries in random order.
    data = safetensors.torch.save(tensors, {_ENTRY: json.dumps(about)})
    store.write(checkpoint_name(step), data)


def list_steps(store: Store) -> list[int]:
    """Return the steps whose checkpoints are in a store, in order."""
    return sorted(int(match[1]) for match in map(_NAME.fullmatch, store.keys()) if match)


def load_checkpoint_file(path: str | Path) -> Checkpoint:
    """Return a checkpoint from its file.

    Raises:
        CheckpointError: If the file is missing, truncated, altered, or not a checkpoint of this program.
        TasksError: If the table of tasks of an imported run is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"There is no checkpoint {path}; expected a file like {checkpoint_name(1465)}.")
    try:
        with path.open("rb") as file:
            about = _read_about(file, str(path))
            file.seek(0)
            checkpoint = _with_weights(about, file.read(), str(path))
    except OSError as error:
        raise CheckpointError(f"The checkpoint {path} cannot be read: {error.strerror}.") from None
    except CheckpointError as error:
        run = path.parent.parent
        hint = f" `icl checkpoints {run} verify` lists all damaged files." if (run / "config.yaml").is_file() else ""
        raise CheckpointError(f"{error}{hint}") from None
    if checkpoint.config.task.imported_tasks is not None:
        remember_tasks(path.parent, checkpoint.config)
    return checkpoint


def read_config_of(path: Path) -> RunConfig:
    """Return the configuration in a checkpoint file, without reading the weights.

    Raises:
        CheckpointError: If the file is not a usable checkpoint.
        OSError: If the file cannot be read.
    """
    with path.open("rb") as file:
        return _read_about(file, str(path)).config


def load_step(store: Store, step: int) -> Checkpoint:
    """Return the checkpoint of one step from a store.

    Raises:
        CheckpointError: If the checkpoint is damaged.
        StorageError: If there is no such checkpoint.
    """
    return parse_checkpoint(store.read(checkpoint_name(step)), checkpoint_name(step))


def parse_checkpoint(data: bytes, name: str) -> Checkpoint:
    """Parse a checkpoint from the bytes of its file.

    Args:
        data: The whole file.
        name: Name of the file in error messages.

    Raises:
        CheckpointError: If the file is truncated, altered, or not a checkpoint of this program.
    """
    return _with_weights(_read_about(io.BytesIO(data), name), data, name)


def stored_tensors(file: Path, prefix: str) -> StoredArray:
    """Return a reference to one flat array: the tensors whose names begin with `prefix`. The numbers stay in the file.

    Raises:
        CheckpointError: If there are no such tensors, or they have different types.
    """
    try:
        with file.open("rb") as raw:
            tensors = [entry for name, entry in _read_header(raw)[0].items() if name.startswith(prefix)]
        types = {tensor.dtype for tensor in tensors}
        if len(types) != 1:
            raise ContentError(f"its tensors {prefix}* must all have the same type, got {sorted(types) or 'none'}")
    except ContentError as error:
        raise CheckpointError(f"The checkpoint {file} cannot be used: {error}.") from None
    dtype = np.dtype(_TYPES[types.pop()])
    start, stop = min(tensor.start for tensor in tensors), max(tensor.stop for tensor in tensors)
    return StoredArray(file=file, offset=start, size=(stop - start) // dtype.itemsize, dtype=dtype)


def checkpoint_files(path: str | Path) -> list[Path]:
    """Return the checkpoint files at a path, sorted by step.

    Args:
        path: A checkpoint file, a run's folder, or the folder `checkpoints` in a run's folder.

    Raises:
        CheckpointError: If there are no checkpoints.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    files = [folder / checkpoint_name(step) for step in list_steps(LocalStore(folder))] if folder.is_dir() else []
    if not files:
        raise CheckpointError(
            f"There are no checkpoints at {path}; expected a run's folder, or a file like {checkpoint_name(1465)}."
        )
    return files


def _read_about(file: io.BufferedIOBase, name: str) -> Checkpoint:
    """Return a checkpoint without its weights. Only the header is read.

    The names and shapes of the tensors in the header are compared with the names and shapes that the configuration implies.

    Raises:
        CheckpointError: If the header is damaged, or a name or shape differs.
    """
    try:
        tensors, texts = _read_header(file)
        metadata = parse_json(texts.get(_ENTRY, "null"))
        if not isinstance(metadata, dict) or metadata.get("format") != _FORMAT:
            raise ContentError(f"it has no metadata with format {_FORMAT}")
    except _CutShortError as error:
        raise _damaged(name, error) from None
    except (ContentError, TypeError) as error:
        raise CheckpointError(
            f"{name} is damaged, or is not a checkpoint of icl: expected safetensors with metadata format {_FORMAT}, as in a "
            f"run's checkpoints/ ({first_line(error)})."
        ) from None
    try:
        step, tree = metadata.get("step"), metadata.get("config")
        if not is_count(step):
            raise ContentError(f"its step is {step!r}")
        if not isinstance(tree, dict):
            raise ContentError("it contains no configuration")
        config = RunConfig.from_dict(tree)
        _require_shapes(tensors, config)
        if _SEAL in metadata and metadata[_SEAL] != _seal(metadata):
            raise ContentError("its step and settings do not match their digest")
    except ValueError as error:
        raise _damaged(name, error) from None
    return Checkpoint(step, config, {}, metadata.get("digest", ""))


def _with_weights(about: Checkpoint, data: bytes, name: str) -> Checkpoint:
    """Return a checkpoint with the weights from the bytes of its file."""
    try:
        params = dict(sorted(safetensors.torch.load(data).items()))  # `load` returns them in random order
    except SafetensorError as error:
        raise _damaged(name, error) from None
    if weights_digest(params) != about.digest:
        raise CheckpointError(f"The checkpoint {name} is damaged: its weights do not match their digest.")
    return about._replace(params=params)


def _damaged(name: str, error: Exception) -> CheckpointError:
    return CheckpointError(f"The checkpoint {name} is damaged or was cut short ({first_line(error)}).")


def weights_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of named weights. Equal weights have equal hashes."""
    hasher = hashlib.blake2b(digest_size=8)
    for key in sorted(tensors):
        hasher.update(key.encode())
        hasher.update(tensors[key].contiguous().numpy().tobytes())
    return hasher.hexdigest()


def _seal(about: Mapping[str, Any]) -> str:
    """Return the digest of a checkpoint's metadata. It is computed from JSON with sorted keys."""
    text = json.dumps({key: value for key, value in about.items() if key != _SEAL}, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _read_header(file: io.BufferedIOBase) -> tuple[dict[str, _TensorEntry], dict[str, Any]]:
    """Return two parts of the header of an open file or `io.BytesIO`: the entries of the tensors by name, and the metadata.

    Raises:
        ContentError: If there is no header, or the header does not match the file's size.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if not 0 < length <= min(_MAX_HEADER, size - 8):
        raise ContentError("it has no safetensors header")
    tree = parse_json(file.read(length))
    metadata = tree.pop("__metadata__", {}) if isinstance(tree, dict) else None
    if not isinstance(metadata, dict):
        raise ContentError("it has no safetensors header")
    if len(tree) > _MAX_TENSORS:
        raise ContentError(f"it contains {len(tree):,} tensors, and the limit is {_MAX_TENSORS:,}")
    tensors = {name: _entry(about, 8 + length) for name, about in tree.items()}
    end = max((tensor.stop for tensor in tensors.values()), default=8 + length)
    if end != size:
        raise _CutShortError(f"it has {size:,} bytes, but its header describes a file of {end:,} bytes")
    return tensors, metadata


def _require_shapes(tensors: Mapping[str, _TensorEntry], config: RunConfig) -> None:
    """Check that a file's tensors are all the parameters of the configured model, or Adam's moments of all these parameters.

    Raises:
        ContentError: If a tensor is missing or has a wrong shape, or if the tensors have different types. The message names the
            first difference.
    """
    expected = shapes_of(config)
    kinds = [f"{kind}/" for kind in MOMENTS] if any("/" in name for name in tensors) else [""]
    count = len(kinds) * expected.num_tensors  # compared first, because a configuration can claim millions of layers
    if len(tensors) != count:
        raise ContentError(f"it contains {len(tensors):,} tensors, but its configuration describes {count:,}")
    for name, shape in expected.by_name().items():
        for kind in kinds:
            tensor = tensors.get(kind + name)
            if tensor is None or tensor.shape != shape:
                there = "missing" if tensor is None else f"of shape {tensor.shape}"
                raise ContentError(f"{kind}{name} is {there}, but its configuration describes shape {shape}")
    types = sorted({tensor.dtype for tensor in tensors.values()})
    if len(types) > 1:
        raise ContentError(f"its tensors have different types: {' and '.join(types)}")


def _entry(about: Any, before: int) -> _TensorEntry:
    """Parse the header's entry for one tensor. Offsets in the entry count from the end of the header, which is at byte `before`."""
    try:
        dtype, shape, (start, stop) = about["dtype"], about["shape"], about["data_offsets"]
    except (LookupError, TypeError, ValueError):
        raise ContentError("its header does not describe every tensor") from None
    if not isinstance(dtype, str) or dtype not in _TYPES:
        raise ContentError(f"a tensor has the type {dtype!r}; the type must be one of {', '.join(_TYPES)}")
    numbers = [*shape, start, stop] if isinstance(shape, list) else [None]
    if not all(is_count(number) for number in numbers):
        raise ContentError("its header does not describe every tensor")
    if math.prod(shape) * np.dtype(_TYPES[dtype]).itemsize != stop - start:
        raise ContentError(
            f"a tensor of shape {tuple(shape)} has {stop - start:,} bytes, which does not match its shape and type"
        )
    return _TensorEntry(dtype, tuple(shape), before + start, before + stop)
