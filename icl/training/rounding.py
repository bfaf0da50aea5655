"""What decides how a training's numbers are rounded, so that a run that is resumed under other conditions can say so.

The prompts and the settings decide what is computed; the threads, the device and the libraries decide in which order its
sums are taken. Under the same conditions a resumed run is bit for bit one that was never interrupted.
"""

import platform
from collections.abc import Mapping
from pathlib import Path

import torch

from icl import tiny_attention
from icl.config import TrainerConfig
from icl.environment import versions


def rounding_conditions(settings: TrainerConfig, *, device: str, is_compiled: bool) -> dict[str, str]:
    """Return the present conditions by name.

    Args:
        settings: How many processes there are.
        device: Its kind, as torch calls it.
        is_compiled: Whether the step is compiled.
    """
    found = {
        "device": device,
        "processes": str(settings.devices * settings.num_nodes),
        "compiled step": "yes" if is_compiled else "no",
        "torch": str(torch.__version__),
        "icl": versions()["icl"],
    }
    if device == "cpu":
        return found | {
            "threads": str(torch.get_num_threads()),
            "attention": tiny_attention.ON_CPUS,
            "vectors": torch.backends.cpu.get_cpu_capability(),
            "processor": _processor(),
        }
    return found | {"device": torch.cuda.get_device_name() if device == "cuda" else device}


def describe_changes(before: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """Return the sentence for a run that is resumed under other conditions, or None under the same ones.

    Conditions that only one of the two knows are left out: a GPU's threads, say.
    """
    changed = [
        f"{name} {now[name]} (before: {before[name]})" for name in now if name in before and before[name] != now[name]
    ]
    if not changed:
        return None
    return f"This start differs in {', '.join(changed)}: the results may differ by rounding from those of a run that was never interrupted."


def _processor() -> str:
    """The processor's model where the system tells it, else its kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
