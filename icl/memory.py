"""How much memory a device has, and the refusal of what cannot fit into it."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from icl.validation import ConfigError

_MEMORY, _PROCESS_GROUPS, _CGROUPS = Path("/proc/meminfo"), Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
_ALWAYS_FREE = 2**26
"""So many bytes are there in any case; looking costs as much as drawing a small batch."""


def require_memory(sizes: Mapping[str, int], device: torch.device | str = "cpu") -> None:
    """Refuse what needs more memory than there is; the system might otherwise end the process without a word.

    Args:
        sizes: The least number of bytes for each part, by what a message calls it.
        device: Where it is to be; of kinds whose memory is not known, nothing is refused.

    Raises:
        ConfigError: Naming the largest part.
    """
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise ConfigError(f"`device` must be one that PyTorch knows, such as cpu or cuda, got {device!r}.") from None
    if kind not in ("cpu", "cuda"):
        return
    total = sum(sizes.values())
    if total > _ALWAYS_FREE and total > (room := device_bytes(device)):
        largest = max(sizes, key=lambda name: sizes[name])
        raise ConfigError(
            f"There is not enough memory for {largest}: at least {_told(total)} are needed, and {_told(room)} are free. "
            "Make it smaller."
        )


def device_bytes(device: torch.device | str) -> int:
    """The memory of a GPU, or what this process can still have of the machine's."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return min([_available_bytes(), *_group_bytes()])


def _available_bytes() -> int:
    """What the system could give without swapping; all of its memory where it does not say."""
    try:
        lines = dict(line.split(":", 1) for line in _MEMORY.read_text().splitlines())
        return 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _group_bytes() -> list[int]:
    """What the limits of this process's control groups, such as a container's or a Slurm job's, leave."""
    left = []
    try:
        groups = [line.split(":", 2) for line in _PROCESS_GROUPS.read_text().splitlines()]
    except OSError:
        return []
    for _, controllers, place in groups:
        if controllers == "memory":
            root, limit, used = _CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        elif not controllers:
            root, limit, used = _CGROUPS, "memory.max", "memory.current"
        else:
            continue
        own = root / place.lstrip("/")
        for folder in (own, *own.parents):
            if folder.is_relative_to(root):
                left += _left_bytes(folder, limit, used)
    return left


def _left_bytes(folder: Path, limit: str, used: str) -> list[int]:
    """What a control group leaves, beside the files it caches; nothing if it has no limit."""
    try:
        most, taken = int((folder / limit).read_text()), int((folder / used).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # `max`
        return []
    cached = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
    return [max(0, most - taken + cached)]


def _told(size: int) -> str:
    """Return a number of bytes in the largest unit that leaves a whole number."""
    for unit, power in (("EiB", 60), ("TiB", 40), ("GiB", 30)):
        if size >= 2**power:
            return f"{size >> power:,} {unit}" if size >= 10 * 2**power else f"{size / 2**power:.1f} {unit}"
    return f"{size >> 20:,} MiB"
