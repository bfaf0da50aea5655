"""Conditions that affect rounding errors in training. A run that resumes under other conditions reports the changes.

The settings determine what is computed. The device, the number of threads and the libraries determine the order of summation,
and so the rounding. Under the same conditions, a resumed run is bit-identical to an uninterrupted one.
"""

import platform
from collections.abc import Mapping
from pathlib import Path

import torch

from icl.config import TrainerConfig
from icl.model import attention as tiny_attention
from icl.runs.environment import versions


def rounding_conditions(settings: TrainerConfig, *, device: str, is_compiled: bool) -> dict[str, str]:
    """Return the current conditions, keyed by name.

    Args:
        settings: Settings of the trainer. They contain the number of processes.
        device: Type of the device in torch, such as `cpu`.
        is_compiled: Whether the step is compiled.
    """
    conditions = {
        "device": device,
        "processes": str(settings.num_processes),
        "compiled step": "yes" if is_compiled else "no",
        "torch": str(torch.__version__),
        "icl": versions()["icl"],
    }
    if device == "cpu":
        return conditions | {
            "threads": str(torch.get_num_threads()),
            "attention": tiny_attention.ON_CPUS,
            "vectors": torch.backends.cpu.get_cpu_capability(),
            "processor": _processor(),
        }
    return conditions | {"device": torch.cuda.get_device_name() if device == "cuda" else device}


def describe_changes(before: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """Return a sentence on the conditions that have changed, or None if none have changed.

    Conditions that only `before` or only `now` contains are ignored. The number of threads, for example, is not recorded on a GPU.
    """
    changed = [
        f"{name} {now[name]} (before: {before[name]})" for name in now if name in before and before[name] != now[name]
    ]
    if not changed:
        return None
    return f"Conditions have changed: {', '.join(changed)}. Results may differ by rounding from those of an uninterrupted run."


def _processor() -> str:
    """Return the model of the processor if the system reports it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
