"""Choose a device, measure the memory of a device or a computation, and refuse a computation that does not fit into memory."""

import os
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from icl.config.validation import ConfigError

_KINDS = ("cpu", "cuda", "tpu", "mps")
_MEMORY, _PROCESS_GROUPS, _CGROUPS = Path("/proc/meminfo"), Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
_ALWAYS_FREE = 2**26
"""Requests below this number of bytes are not checked, because a check takes as long as drawing a small batch."""


def choose_device(accelerator: str = "auto") -> str:
    """Return the kind of device to run on: `accelerator`, or the default if `accelerator` is `auto`.

    The default is the value of $DEVICE. If this variable is not set, the default is the first of cuda, mps and cpu that this machine has.

    Raises:
        ConfigError: If this kind is unknown, or this machine has no such device.
    """
    wanted = os.environ.get("DEVICE", "").strip().lower() or "auto" if accelerator == "auto" else accelerator
    wanted = "cuda" if wanted == "gpu" else wanted
    if wanted == "auto":
        return next(kind for kind in ("cuda", "mps", "cpu") if _is_present(kind))
    if wanted not in _KINDS:
        raise ConfigError(f"There is no kind of device called `{wanted}`. Set DEVICE to one of {', '.join(_KINDS)}.")
    if not _is_present(wanted):
        raise ConfigError(
            f"This machine has no usable {wanted} device. Set DEVICE=cpu or --trainer.accelerator cpu, or install a build of "
            f"torch that supports {wanted}."
        )
    return wanted


def require_memory(sizes: Mapping[str, int], device: torch.device | str = "cpu") -> None:
    """Refuse work that needs more memory than this process can still allocate on a CPU or a GPU.

    Without this check, the system could kill the process without a message.

    Args:
        sizes: Minimum number of bytes that each part of the work needs, keyed by the part's name in the message.
        device: Device on which the work runs. Only CPUs and CUDA devices are checked.

    Raises:
        ConfigError: If memory is too small. The message names the largest part.
    """
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise ConfigError(f"`device` must be one that PyTorch knows, such as cpu or cuda, got {device!r}.") from None
    if kind not in ("cpu", "cuda"):
        return
    total = sum(sizes.values())
    if total > _ALWAYS_FREE and total > (free := device_bytes(device)):
        largest = max(sizes, key=lambda name: sizes[name])
        raise ConfigError(
            f"There is not enough memory for {largest}: at least {_in_units(total)} are needed, and {_in_units(free)} are available. "
            "Lower these numbers."
        )


def device_bytes(device: torch.device | str) -> int:
    """Return the number of bytes that this process can still allocate on a device.

    On a GPU, this includes memory that PyTorch has reserved for this process and that no tensor uses.
    """
    if torch.device(device).type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    return min([_available_bytes(), *_group_bytes()])


def bytes_made_by(work: Callable[[], object]) -> int:
    """Call `work`, and return the number of bytes of all tensors that it makes. Views of the same storage count once."""
    with _Allocations() as allocations:
        work()
    return sum(allocations.sizes.values())


def _is_present(kind: str) -> bool:
    if kind == "cuda":
        return torch.cuda.is_available()
    if kind == "mps":
        return torch.backends.mps.is_available()
    return kind != "tpu" or find_spec("torch_xla") is not None


class _Allocations(TorchDispatchMode):
    """Record of the size of every tensor that is made while this mode is active."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                self.sizes[storage.data_ptr()] = max(self.sizes.get(storage.data_ptr(), 0), storage.nbytes())
        return result


def _available_bytes() -> int:
    """Return the bytes that are available without swapping, or the total memory if the system does not report it."""
    try:
        lines = dict(line.split(":", 1) for line in _MEMORY.read_text().splitlines())
        return 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _group_bytes() -> list[int]:
    """Return the bytes left under each limit of this process's control groups, such as a container's or a Slurm job's."""
    free = []
    try:
        groups = [line.split(":", 2) for line in _PROCESS_GROUPS.read_text().splitlines()]
    except OSError:
        return []
    for _, controllers, group in groups:
        if controllers == "memory":  # version 1 of control groups; in version 2, this field is empty
            root, limit, used = _CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        elif not controllers:
            root, limit, used = _CGROUPS, "memory.max", "memory.current"
        else:
            continue
        innermost = root / group.lstrip("/")
        for folder in (innermost, *innermost.parents):  # the limits of all enclosing groups count too
            if folder.is_relative_to(root):
                free += _free_group_bytes(folder, limit, used)
    return free


def _free_group_bytes(folder: Path, limit: str, used: str) -> list[int]:
    """Return the bytes left in a control group, as a list that is empty if the group has no limit."""
    try:
        limit_bytes, used_bytes = int((folder / limit).read_text()), int((folder / used).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # without a limit, the file contains the word `max`
        return []
    # The system can free these bytes of file cache.
    cached_bytes = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
    return [max(0, limit_bytes - used_bytes + cached_bytes)]


def _in_units(size: int) -> str:
    """Format a number of bytes in the largest unit in which the number is at least 1."""
    for unit, power in (("EiB", 60), ("TiB", 40), ("GiB", 30)):
        if size >= 2**power:
            return f"{size >> power:,} {unit}" if size >= 10 * 2**power else f"{size / 2**power:.1f} {unit}"
    return f"{size >> 20:,} MiB"
